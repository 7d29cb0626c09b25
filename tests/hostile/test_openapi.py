"""The API keeps to its own description, whatever is made up from it."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from meshproxy.policy.principal import Limits
from meshproxy.server.admin_api import OPENAPI_PATH
from meshproxy.server.api import OPENAPI_PATH as PATH
from meshproxy.server.api import ROUTES, document
from tests.harness.mesh import model
from tests.harness.process import Gateway, Program, Valkey

FREE = Limits(1_000_000, 1_000_000_000, 1_000_000)
EXAMPLES = os.environ.get("MESHPROXY_EXAMPLES", "10")
PATIENCE_S = 900
ADMIN_TOKEN = "the-operators-token"


async def test_every_path_is_described_and_the_description_needs_no_key(mesh):
    answer = await mesh.request("GET", PATH)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert document() == answer.json
    described = {(method.upper(), path) for path, methods in answer.json["paths"].items() for method in methods}
    routes = {(route.method, route.path.replace(":.+", "")) for route in ROUTES}
    assert {("POST", "/v1/chat/completions"), *routes} == described


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/v1/models", {"free", "provider"}),
        ("/v1/models/free", {"provider"}),
        ("/v1/models/paid", {"provider"}),
        ("/v1/models/search", {"q", "free", "brand", "sort", "order", "limit", "offset"}),
        ("/v1/usage", {"group_by", "session_id", "since", "until"}),
        ("/v1/key", set()),
    ],
)
def test_the_parameters_of_a_query_are_described(path, names):
    described = document()["paths"][path]["get"]["parameters"]
    assert {each["name"] for each in described if each["in"] == "query"} == names


needs_schemathesis = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)


@needs_schemathesis
async def test_what_is_made_up_from_the_description_is_answered_as_it_says(alone, mesh, tmp_path):
    gateway = await alone(models={"openai/gpt-4o": model("sim", "sim/fast?tokens=2")})
    caller = await mesh.key(credit="100000", limits=FREE)
    await _keeps_to_its_description(f"{gateway.url}{PATH}", caller.secret, tmp_path)


@needs_schemathesis
async def test_the_admin_api_keeps_to_its_own(tmp_path):
    """`serve` as operators run it. A wrong method is tried too."""
    (tmp_path / "token").write_text(ADMIN_TOKEN)
    redis = Valkey(tmp_path)
    upstreams = {"u": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"}}
    price = {"input_usd_per_mtok": "1", "output_usd_per_mtok": "1"}
    gateway = Gateway(
        tmp_path,
        {
            "server": {"admin_token": {"file": str(tmp_path / "token")}},
            "redis": {"url": redis.url, "journal": str(tmp_path / "journal")},
            "upstreams": upstreams,
            "models": {"m": {"upstreams": [{"upstream": "u", "model": "m"}], **price}},
        },
    )
    try:
        gateway.launch()
        await gateway.program.until(gateway.is_ready)
        await _keeps_to_its_description(f"{gateway.admin}{OPENAPI_PATH}", ADMIN_TOKEN, tmp_path, "ignored_auth")
        assert [line for line in gateway.lines if line["event"] in {"admin_failed", "handler failed", "bug"}] == []
    finally:
        gateway.end()
        redis.kill()


async def _keeps_to_its_description(
    url: str, token: str, home: Path, without: str = "ignored_auth,unsupported_method"
) -> None:
    """Positive data may be refused: bounds that hang together, such as a span of times, can't be described."""
    command = (
        *(Path(sys.executable).parent / "schemathesis", "run", url, "--checks=all", "--seed=1", "--no-color"),
        *(f"--header=authorization: Bearer {token}", f"--max-examples={EXAMPLES}"),
        f"--exclude-checks={without},positive_data_acceptance",
        *("--suppress-health-check=all", "--generation-database=none"),
    )
    with Program(*command, log=home / "log", cwd=home) as running:
        assert await running.exit(PATIENCE_S) == 0, running.text
