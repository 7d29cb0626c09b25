"""Each provider's dialect through a gateway with the settings that docs/providers.md names: the charge is the provider's bill."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from meshproxy.config import parse
from meshproxy.simulator.dialects import DIALECTS
from tests.harness.books import Caller
from tests.harness.clients import HELLO
from tests.harness.mesh import Mesh, StartMesh, model

PAGE = (Path(__file__).parents[2] / "docs" / "providers.md").read_text()
INPUT_NUSD, CACHED_NUSD, OUTPUT_NUSD = 2_500, 250, 10_000  # a token
TOKENS = 200
HANG_UP_AFTER = 20  # events with text
TEXT_WITHIN = (0.7, 1.5)  # of what the client saw, where nobody reports
BATCHED_WITHIN = (0.5, 2.0)


@pytest.fixture
async def mesh(start_mesh: StartMesh, simulator) -> Mesh:
    """A gateway with an upstream and a model for each dialect: fast ones, and slow ones to hang up on."""
    upstreams, models = {}, {}
    for name, dialect in DIALECTS.items():
        own = f"dialect-{name}"
        upstreams[own] = {"kind": "openai", "base_url": simulator.base_url, **dialect.upstream}
        options: dict[str, Any] = {"cached_input_usd_per_mtok": "0.25", **dialect.model}
        models[name] = model(own, f"sim/{own}?tokens={TOKENS}", **options)
        models[f"slow/{name}"] = model(own, f"sim/{own}?tokens={TOKENS}&tps=400", **options)
        for kind in ("context", "filter", "quota", "key"):
            models[f"{kind}/{name}"] = model(own, f"sim/{own}+error-{kind}", **options)
    return await start_mesh(upstreams=upstreams, models=models)


def bill_nusd(billed: dict[str, int]) -> int:
    """What a provider's bill comes to."""
    prompt, cached = billed["prompt_tokens"], billed["cached_tokens"]
    return (prompt - cached) * INPUT_NUSD + cached * CACHED_NUSD + billed["completion_tokens"] * OUTPUT_NUSD


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "stream"])
async def test_the_charge_is_the_bill(mesh, dialect, fields):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model=dialect, **fields)
    assert answer.status == 200, answer.body
    (entry,) = mesh.received
    settled = await mesh.settlement(caller)
    assert (settled["usage_source"], {name: int(settled[name]) for name in entry.billed}) == ("reported", entry.billed)
    assert bill_nusd(entry.billed) == await mesh.spent(caller)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_that_is_hung_up_on_costs_what_was_sent(mesh, dialect):
    caller = await mesh.key()
    await hang_up(mesh, caller, f"slow/{dialect}")
    settled = await mesh.settlement(caller)
    (entry,) = mesh.received
    low, high = BATCHED_WITHIN if DIALECTS[dialect].tokens_per_event > 1 else TEXT_WITHIN
    assert low <= int(settled["completion_tokens"]) / entry.tokens <= high


async def hang_up(mesh: Mesh, caller: Caller, name: str) -> None:
    """Read some of a stream, close the connection, and wait until the provider has noticed."""
    body = {"model": name, "messages": HELLO, "stream": True}
    async with mesh.http.post("/v1/chat/completions", json=body, headers=caller.auth) as response:
        seen = b""
        async for piece in response.content.iter_any():
            seen += piece
            if len(re.findall(rb'"(?:content|reasoning|reasoning_content)":"[^"]', seen)) >= HANG_UP_AFTER:
                break
        response.close()
    await mesh.until(lambda: mesh.received[0].ended != "open")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["context", "filter"])
async def test_a_refusal_reaches_the_client_in_the_providers_words(mesh, dialect, kind):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model=f"{kind}/{dialect}")
    expected = DIALECTS[dialect].refusal(kind)
    assert (answer.status, expected.error["message"] in answer.error["message"]) == (expected.status, True)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["quota", "key"])
async def test_a_refusal_of_the_gateways_account_is_no_fault_of_the_client(mesh, dialect, kind):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model=f"{kind}/{dialect}")
    assert answer.code in {"upstream_error", "provider_not_available"}


def test_every_base_url_and_setting_of_the_page_is_one():
    rows = re.findall(r"^\| [^|`]+ \| (`http[^|]*) \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(rows) > 20
    for urls, needs in rows:
        text = ""
        for number, url in enumerate(re.findall(r"`(\S+)`", urls)):
            settings = re.findall(r"`((?:kind|cap_field|stream_usage) = [^`]+)`", needs)
            kind = [] if any("kind" in setting for setting in settings) else ['kind = "openai"']
            text += "\n".join([f"[upstreams.u{number}]", *kind, *settings, f"base_url = {json.dumps(url)}", ""])
        parse(text)
