"""providers.json: what providers do, and what is right.

Each case has an upstream, a model, a player and an account of its own; cases whose `server` is the same share a gateway.

    case            what is done
    ask             the client's body; `model` is added, and one message "hi" where there are no `messages`
    client          hangs_up_after_events, times (so many at once), headers, timeout_s
    credit          USD of the account
    upstream, model, server   options in the configuration
    fallbacks       further models, each with a provider; the request's `models` names them
    elsewhere       further upstreams of the same model, tried after the first
    provider, then  what the provider does; with `then`, what it does for one more request, and that one is judged

tests/harness/provider.py plays the provider. `CHECKS` has what is expected, by name.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from meshproxy.config.settings import Upstream
from tests.cases.conftest import Client, Site, load, parameters, refused
from tests.harness.clients import CHAT, Answer, fetch
from tests.harness.process import Tables, free_port
from tests.harness.provider import CAPS, Player, expand
from tests.harness.waiting import until

PRICES = {"input_usd_per_mtok": "1.00", "cached_input_usd_per_mtok": "0.10", "output_usd_per_mtok": "10.00"}
HELLO = [{"role": "user", "content": "hi"}]
LOGGED_S = 3.0  # within which a line is in the log
CASES = load("providers")
NUMBERS = {case["name"]: number for number, case in enumerate(CASES)}


class Names:
    """What a case's parts are called in the configuration, in the log and at the provider."""

    def __init__(self, case: dict[str, Any]) -> None:
        self._number = f"{NUMBERS[case['name']]:03d}"

    def upstream(self, part: str = "first") -> str:
        return f"case-{self._number}-{part}"

    def model(self, part: str = "first") -> str:
        return f"cases/{self._number}-{part}"

    @property
    def account(self) -> str:
        return f"cases-{self._number}"


def tables_of(case: dict[str, Any], base_url: Callable[[str], str]) -> Tables:
    """The configuration of one case; `base_url` is the provider's for a player."""
    names = Names(case)
    tables: Tables = {}

    def upstream(part: str, **options: Any) -> None:
        tables[f"upstreams.{names.upstream(part)}"] = {
            "kind": "openai",
            "base_url": base_url(names.upstream(part)),
            **options,
        }

    def model(part: str, upstreams: list[str], options: dict[str, Any]) -> None:
        routes = [{"upstream": names.upstream(each), "model": "up-model"} for each in upstreams]
        tables[f'models."{names.model(part)}"'] = {"upstreams": routes, **PRICES, **options}

    options = dict(case.get("upstream", {}))
    if "base_url" in options:
        options["base_url"] = options["base_url"].replace("@CLOSED@", str(free_port()))
    upstream("first", **options)
    for other in case.get("elsewhere", []):
        upstream(other["name"])
    for other in case.get("fallbacks", []):
        upstream(other["name"])
        model(other["name"], [other["name"]], other.get("model", {}))
    model("first", ["first", *(other["name"] for other in case.get("elsewhere", []))], case.get("model", {}))
    return tables


@pytest.fixture(scope="session")
def tables(site: Site) -> dict[str, Tables]:
    """The configuration of each case, by its name; the providers are there."""
    for case in CASES:
        names = Names(case)
        site.add(names.upstream(), case["provider"], case.get("then"))
        for other in case.get("elsewhere", []) + case.get("fallbacks", []):
            site.add(names.upstream(other["name"]), other["provider"])
    return {case["name"]: tables_of(case, site.provider.base_url) for case in CASES}


def gateway_for(site: Site, case: dict[str, Any], tables: dict[str, Tables]) -> Any:
    """The gateway for a case, with the models of all cases that it can serve too."""
    server = case.get("server", {})
    alike = [
        other["name"] for other in CASES if other.get("server", {}) == server and not refused(tables[other["name"]])
    ]
    whole: Tables = {"server": server} if server else {}
    for name in alike:
        whole |= tables[name]
    return site.gateway(f"providers-{json.dumps(server)}".replace('"', ""), whole)


@dataclass
class Run:
    """What happened to a case. `charged_usd`: to its account by what is judged."""

    case: dict[str, Any]
    names: Names
    answer: Answer
    client: Client
    players: dict[str, Player]
    charged_usd: Decimal
    available_usd: Decimal
    logged_usd: Decimal

    @property
    def sent(self) -> dict[str, Any]:
        """The last body that the case's provider got."""
        return self.players["first"].bodies[-1]


async def run(case: dict[str, Any], site: Site, tables: dict[str, Tables]) -> Run:
    names = Names(case)
    unfit = refused(tables[case["name"]])
    assert not unfit, unfit
    gateway = gateway_for(site, case, tables)
    caller = site.client(gateway, names.account, case.get("credit"))
    client = case.get("client", {})
    body = {"model": names.model(), "messages": HELLO, **expand(case["ask"])}
    if "fallbacks" in case:
        body["models"] = [names.model(other["name"]) for other in case["fallbacks"]]
    data = json.dumps(body).encode()

    def ask() -> Any:
        return fetch(
            "POST",
            gateway.url + CHAT,
            headers={**caller.auth, **client.get("headers", {})},
            data=data,
            timeout_s=client.get("timeout_s", 30),
            hang_up_after_events=client.get("hangs_up_after_events"),
        )

    parts = ["first", *(other["name"] for other in case.get("elsewhere", []) + case.get("fallbacks", []))]
    players = {part: site.provider.players[names.upstream(part)] for part in parts}
    before = await caller.settled()
    times = client.get("times", 1)
    answers = await asyncio.gather(*(ask() for _ in range(times)))
    after = await caller.settled()
    earlier = 0
    if "then" in case:
        players["first"].turn()
        before, earlier, times = after, times, 1
        answers = [await ask()]
        after = await caller.settled()
    lines = (await caller.logged(earlier + times))[earlier:]
    return Run(
        case=case,
        names=names,
        answer=answers[0],
        client=caller,
        players=players,
        charged_usd=before["balance_usd"] - after["balance_usd"],
        available_usd=after["available_usd"],
        logged_usd=sum((Decimal(line["cost_usd"]) for line in lines), Decimal(0)),
    )


def price(case: dict[str, Any], bill: dict[str, Any]) -> Decimal:
    """What a bill comes to, in USD."""
    served = next(
        (other for other in case.get("fallbacks", []) if other["name"] == case["expect"].get("served_by")), case
    )
    prices = {**PRICES, **served.get("model", {})}
    cached = bill.get("cached_tokens", 0)
    millionths = (
        (bill["prompt_tokens"] - cached) * Decimal(prices["input_usd_per_mtok"])
        + cached * Decimal(prices["cached_input_usd_per_mtok"])
        + bill["completion_tokens"] * Decimal(prices["output_usd_per_mtok"])
    )
    return millionths / 1_000_000


async def bill(run: Run, wanted: dict[str, Any]) -> None:
    true_usd = price(run.case, wanted)
    low, high = (Decimal(str(factor)) for factor in wanted["within"])
    ratio = run.charged_usd / true_usd
    assert low <= ratio <= high, f"charged {run.charged_usd} for {true_usd}: {ratio:.3f} of it, not {low} to {high}"
    assert run.logged_usd == run.charged_usd


async def available_usd_at_least(run: Run, wanted: str) -> None:
    assert run.available_usd >= Decimal(wanted)


async def status(run: Run, wanted: list[int]) -> None:
    assert run.answer.status in wanted, run.answer.body_text[:500]


async def contains(run: Run, wanted: list[str]) -> None:
    for words in wanted:
        assert words in run.answer.body_text


async def lacks(run: Run, wanted: list[str]) -> None:
    for words in wanted:
        assert words not in run.answer.body_text


async def bytes_at_least(run: Run, wanted: int) -> None:
    assert len(run.answer.body) >= wanted


async def at_path(run: Run, wanted: list[Any]) -> None:
    *path, value = wanted
    found = run.answer.json
    for step in path:
        assert isinstance(found, list | dict), run.answer.body_text[:500]
        assert step in found if isinstance(found, dict) else step < len(found)
        found = found[step]
    assert found == value


async def completed(run: Run, wanted: bool) -> None:
    assert run.answer.is_done == wanted, run.answer.body_text[-500:]


async def error(run: Run, wanted: dict[str, Any]) -> None:
    told = run.answer.error
    for member, value in wanted.items():
        if member == "says":
            assert value in told["message"]
        else:
            assert told.get(member) == value, told


async def wait_s(run: Run, wanted: list[float]) -> None:
    low, high = wanted
    assert "retry-after" in run.answer.headers
    assert low <= float(run.answer.headers["retry-after"]) <= high


async def no_retry(run: Run, wanted: bool) -> None:
    assert (run.answer.headers.get("x-should-retry") == "false") == wanted


async def head_and_ping_within_s(run: Run, wanted: float) -> None:
    assert run.answer.pinged_s is not None
    assert run.answer.pinged_s <= wanted


async def provider_saw(run: Run, wanted: Any) -> None:
    for name in wanted:
        assert name in run.sent
        assert not isinstance(wanted, dict) or run.sent[name] == wanted[name]


async def provider_did_not_see(run: Run, wanted: list[str]) -> None:
    for name in wanted:
        assert name not in run.sent


async def caps_at_least(run: Run, wanted: int) -> None:
    caps = {name: run.sent[name] for name in CAPS if name in run.sent}
    assert min(caps.values(), default=wanted) >= wanted


async def tells_cap(run: Run, wanted: bool) -> None:
    unasked = {run.sent[name] for name in CAPS if name in run.sent and run.case["ask"].get(name) is None}
    if unasked:
        assert {run.answer.headers.get("x-mesh-max-tokens")} == {str(cap) for cap in unasked}


async def served_by(run: Run, wanted: str) -> None:
    assert run.answer.headers.get("x-mesh-model") == run.names.model(wanted)


async def not_asked(run: Run, wanted: str) -> None:
    assert not run.players[wanted].bodies


async def logged(run: Run, wanted: list[Any]) -> None:
    words = [run.names.upstream(), *wanted]

    def has(line: str) -> bool:
        alternatives = ([word] if isinstance(word, str) else word for word in words)
        return all(any(word.lower() in line for word in some) for some in alternatives)

    def is_there() -> bool:
        return any(has(json.dumps(line, ensure_ascii=False).lower()) for line in run.client.gateway.lines)

    await until(is_there, f"a line of the log with {words}", LOGGED_S)


async def any_of(run: Run, wanted: list[dict[str, Any]]) -> None:
    failures = []
    for some in wanted:
        try:
            await judge(run, some)
        except AssertionError as failure:
            failures.append(str(failure))
        else:
            return
    raise AssertionError("\n".join(failures))


CHECKS = {
    check.__name__: check
    for check in (
        bill, available_usd_at_least, status, contains, lacks, bytes_at_least, completed, error, wait_s, no_retry,
        head_and_ping_within_s, provider_saw, provider_did_not_see, caps_at_least, tells_cap, served_by, not_asked,
        logged, any_of,
    )
} | {"json": at_path}  # fmt: skip


async def judge(run: Run, expected: dict[str, Any]) -> None:
    """All of it must hold."""
    for name, wanted in expected.items():
        await CHECKS[name](run, wanted)


@pytest.mark.parametrize("case", parameters("providers"))
async def test_case(case: dict[str, Any], site: Site, tables: dict[str, Tables]) -> None:
    await judge(await run(case, site, tables), case["expect"])


def test_reasoning_models_have_time_by_default() -> None:
    upstream = Upstream(kind="openai", base_url="http://127.0.0.1:1/v1")
    assert upstream.first_byte_timeout_s >= 300
    assert upstream.idle_timeout_s >= 120
