"""contract.json: what clients and operators are promised, as single exchanges.

Around each: the models `openai/gpt-4o`, `free/llama` and `m/pair` (an upstream that always answers 500, then a good one), and for
a case with a `provider` a model of its own, at the prices of `openai/gpt-4o`. The good provider answers 19 + 10 tokens.
`$MODEL` is the case's model, `$REQUEST_ID` the `x-request-id` of the last answer before.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from tests.cases.conftest import Client, Site, load, parameters, refused
from tests.harness.clients import CHAT, Answer, fetch
from tests.harness.process import Gateway, Tables
from tests.harness.provider import CHUNK
from tests.harness.waiting import until

CASES = load("contract")
HELLO = [{"role": "user", "content": "hi"}]
SDK = {"x-meshapi-sdk": "python/0.1.11"}
PRICES = {"input_usd_per_mtok": "2.50", "cached_input_usd_per_mtok": "1.25", "output_usd_per_mtok": "10.00"}
FREE = dict.fromkeys(PRICES, "0")
CORS = {"cors_origins": ["https://app.example"]}
GOOD = {"makes": {"wants": 10, "prompt_tokens": 19, "reads": ["max_tokens", "max_completion_tokens"]}}
BAD = {
    "status": 500,
    "answer": {"error": {"message": "always down", "type": "server_error", "param": None, "code": None}},
}
AT_ONCE_S = 0.5  # what "at once" forgives
RECORD_MEMBERS = {"cost_usd", "prompt_tokens"}


class Pricing(Struct):
    """What Mesh's SDKs read of a price: decimal strings or numbers."""

    prompt_usd_per_1k: str | float | None = None
    completion_usd_per_1k: str | float | None = None


class Model(Struct):
    """Mesh's ModelInfo (PyPI meshapi 0.1.11)."""

    id: str
    name: str
    is_free: bool
    context_length: int | None = None
    context_window: int | None = None
    pricing: Pricing | None = None
    description: str | None = None
    provider: str | None = None


class Page(Struct):
    """Mesh's ModelsPage."""

    items: list[Model]
    total: int
    limit: int
    offset: int
    brands: list[str]


class Template(Struct):
    """Mesh's TemplateSummary."""

    id: str
    name: str
    owner: str | None
    is_global: bool
    created_at: str
    updated_at: str
    description: str | None = None
    system: str | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    params: dict[str, Any] | None = None
    variables: list[str] | None = None


class Error(Struct):
    """What typed SDKs decode an error's object to."""

    message: str
    type: str
    code: str
    request_id: str
    param: str | None = None
    details: list[Any] | None = None
    retry_after_seconds: int | None = None
    provider_code: str | None = None
    provider_error: dict[str, Any] | None = None


class Envelope(Struct):
    """The one shape of every error."""

    error: Error
    request_id: str


READERS = {"models": list[Model], "model": Model, "page": Page, "template": Template}


def player_of(provider: dict[str, Any]) -> dict[str, Any]:
    """A case's provider in the words of tests/harness/provider.py."""
    does = {name: provider[name] for name in ("status", "headers", "delay_s") if name in provider}
    if "stream" not in provider:
        told = (
            {"raw": provider["text"]}
            if "text" in provider
            else {"answer": provider["json"]}
            if "json" in provider
            else GOOD
        )
        return {**does, **told}
    stream = provider["stream"]
    words = stream.get("events", 1)
    chunks = [{**CHUNK, "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]}]
    events = words if isinstance(words, list) else [{"$of": chunks, "$times": words}]
    if "usage" in stream:
        events = [*events, {**CHUNK, "choices": [], "usage": stream["usage"]}]
    if "last" in stream:
        events = [*events, stream["last"]]
    return {**does, "events": events, "end": "dies" if stream.get("end") == "cut" else "done"}


def model_of(case: dict[str, Any]) -> str:
    return f"case/{case['name']}" if "provider" in case else "openai/gpt-4o"


def own_tables(case: dict[str, Any], base_url: str) -> Tables:
    """The upstream and the model of a case with a provider of its own."""
    name = case["name"].replace(".", "-")
    route = [{"upstream": name, "model": "up-model"}]
    return {
        f"upstreams.{name}": {"kind": case.get("kind", "openai"), "base_url": base_url},
        f'models."{model_of(case)}"': {"upstreams": route, "context_window": 128_000, **PRICES},
    }


@pytest.fixture(scope="session")
def tables(site: Site) -> Tables:
    """What all gateways have in common."""
    tables: Tables = {}
    for name, does in {"good": GOOD, "bad": BAD}.items():
        tables[f"upstreams.{name}"] = {"kind": "openai", "base_url": site.add(f"contract-{name}", does)}
    served = {"openai/gpt-4o": (["good"], PRICES), "free/llama": (["good"], FREE), "m/pair": (["bad", "good"], PRICES)}
    for model, (upstreams, prices) in served.items():
        routes = [{"upstream": name, "model": "up-model"} for name in upstreams]
        tables[f'models."{model}"'] = {"upstreams": routes, "context_window": 128_000, **prices}
    for case in CASES:
        if "provider" in case:
            own = own_tables(case, site.add(case["name"], player_of(case["provider"])))
            assert not refused(own)
            tables |= own
    return tables


class Conversation:
    """A case's client, and the last answer it got."""

    def __init__(self, case: dict[str, Any], caller: Client) -> None:
        self.case = case
        self.caller = caller
        self.last: Answer | None = None

    async def ask(self, request: dict[str, Any]) -> Answer:
        """Make a request as the case says it."""
        method = request.get("method", "POST")
        headers = {**(SDK if self.case.get("sdk") else {}), **self.caller.auth, **request.get("headers", {})}
        content: Any = request.get("body")
        if content is None and method == "POST":
            content = {"model": "$MODEL", "messages": HELLO, **request.get("json", {})}
        body = None if content is None else content if isinstance(content, str) else json.dumps(content)
        self.last = await fetch(
            method,
            self.caller.gateway.url + self.filled(request.get("path", CHAT)),
            headers=headers,
            data=None if body is None else self.filled(body).encode(),
        )
        return self.last

    def filled(self, text: str) -> str:
        """A text with its places filled in."""
        request_id = self.last.headers.get("x-request-id", "") if self.last is not None else ""
        return text.replace("$MODEL", model_of(self.case)).replace("$REQUEST_ID", request_id)


def client_for(case: dict[str, Any], site: Site, gateway: Gateway) -> Conversation:
    key, account = case.get("key"), f"contract-{[each['name'] for each in CASES].index(case['name'])}"
    if isinstance(key, list):
        return Conversation(case, site.client_by_command(gateway, account, case.get("credit"), key))
    if key is not None:
        return Conversation(case, Client(gateway, "" if key == "none" else key, account))
    return Conversation(case, site.client(gateway, account, case.get("credit")))


MISSING = object()


def member(value: Any, path: str) -> Any:
    """What is at a dotted path; MISSING if nothing is."""
    for step in path.split("."):
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            return MISSING
    return value


KINDS = {
    "object": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "absent": lambda value: value is MISSING,
}


def fits(value: Any, wanted: Any, client: Conversation) -> bool:
    """Whether a value, or MISSING, is what is expected."""
    if not isinstance(wanted, dict):
        return value == (client.filled(wanted) if isinstance(wanted, str) else wanted)
    return all(_matchers[name](value, told) for name, told in wanted.items())


def _is_decimal(value: Any, wanted: str) -> bool:
    try:
        return isinstance(value, str) and Decimal(value) == Decimal(wanted)
    except InvalidOperation:
        return False


_matchers = {
    "contains": lambda value, words: isinstance(value, str) and all(word in value for word in words),
    "lacks": lambda value, words: isinstance(value, str | list) and not any(word in value for word in words),
    "matches": lambda value, pattern: re.search(pattern, "" if value is MISSING else str(value)) is not None,
    "is": lambda value, kinds: any(KINDS[kind](value) for kind in kinds.split(" or ")),
    "decimal": _is_decimal,
    "has": lambda value, items: (
        isinstance(value, str | list) and {item.lower() for item in items} <= set(_listed(value))
    ),
    "numbers": lambda value, count: isinstance(value, str) and len(re.findall(r"\d+(?:\.\d+)?", value)) >= count,
}


def _listed(value: str | list[str]) -> list[str]:
    return [item.strip().lower() for item in (value if isinstance(value, list) else value.split(","))]


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a value, wherever it stands."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(part)


def expect_members(value: Any, wanted: dict[str, Any], client: Conversation) -> None:
    for path, expected in wanted.items():
        found = member(value, path)
        assert fits(found, expected, client), f"{path}: {found if found is not MISSING else 'missing'}, not {expected}"


def expect_headers(answer: Answer, wanted: dict[str, Any], client: Conversation) -> None:
    for name, expected in wanted.items():
        found = answer.headers.get(name, MISSING)
        if expected is None:
            assert found is MISSING, f"{name}: {found}"
        else:
            assert fits(found, expected, client), (
                f"{name}: {found if found is not MISSING else 'missing'}, not {expected}"
            )


def expect_wait(answer: Answer) -> None:
    told = answer.error.get("retry_after_seconds")
    assert KINDS["integer"](told), told
    assert answer.headers["retry-after"] == str(told)
    assert told >= float(answer.headers.get("retry-after-ms", 0)) / 1000


def expect_readable_error(answer: Answer) -> None:
    """Typed SDKs can decode an error, in a body or as an event."""
    for told in [answer.json, *answer.events]:
        if isinstance(told, dict) and "error" in told and answer.headers.get("content-type") == "application/json":
            _decoded(told, Envelope)
        elif isinstance(told, dict) and "error" in told:
            _decoded(told["error"], Error)


def _decoded(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise AssertionError(f"{error}: {value}") from error


def usage_chunks(answer: Answer) -> list[dict[str, Any]]:
    return [event for event in answer.events if isinstance(event, dict) and event.get("usage")]


def stream_cost(answer: Answer) -> Decimal:
    """What a stream says that it cost."""
    told = [str(chunk["cost"]) for chunk in usage_chunks(answer) if "cost" in chunk]
    told += re.findall(r"^: x-mesh-cost=(\S+)$", answer.body_text, re.MULTILINE)
    assert len(told) == 1, f"the stream says what it cost {len(told)} times"
    return Decimal(told[0])


async def expect_record(request: dict[str, Any], wanted: dict[str, Any], client: Conversation) -> None:
    """The object with the request id of the answer before, which half a second may pass for."""
    request_id = client.filled("$REQUEST_ID")
    request = json.loads(client.filled(json.dumps(request)))  # asking again moves $REQUEST_ID

    async def found() -> list[dict[str, Any]]:
        told = objects((await client.ask(request)).json)
        return [each for each in told if each.get("request_id") == request_id and each.keys() >= RECORD_MEMBERS]

    expect_members((await until(found, f"the record of {request_id}", AT_ONCE_S))[0], wanted, client)


@pytest.mark.parametrize("case", parameters("contract"))
async def test_case(case: dict[str, Any], site: Site, tables: Tables) -> None:
    name = case.get("gateway", "usual")
    whole = {**tables, "server": CORS} if name == "cors" else tables
    unfit = refused(whole)
    assert not unfit, unfit
    client = client_for(case, site, site.gateway(f"contract-{name}", whole))
    expected, request = case["expect"], case["request"]
    before = case.get("before", [])
    for earlier in [request] * before if isinstance(before, int) else before:
        await client.ask(earlier)
    balance = (await client.caller.settled())["balance_usd"] if "charge" in expected else Decimal(0)
    if "record" in expected:
        await expect_record(request, expected["record"], client)
    answer = client.last if "record" in expected else await client.ask(request)
    assert answer is not None
    await judge(answer, expected, client, site, balance)


async def judge(answer: Answer, expected: dict[str, Any], client: Conversation, site: Site, balance: Decimal) -> None:
    """All that is expected of an answer but its record."""
    statuses = expected["status"] if isinstance(expected["status"], list) else [expected["status"]]
    assert answer.status in statuses, answer.body_text[:500]
    expect_readable_error(answer)
    expect_headers(answer, expected.get("headers", {}), client)
    expect_members(answer.json, expected.get("body", {}), client)
    if expected.get("wait"):
        expect_wait(answer)
    if "reads_as" in expected:
        _decoded(answer.json, READERS[expected["reads_as"]])
    if "model" in expected:
        of_id = [each for each in objects(answer.json) if each.get("id") == expected["model"]["id"]]
        assert of_id, answer.body_text[:500]
        expect_members(of_id[0], expected["model"], client)
    if "ids" in expected:
        ids = [each["id"] for each in objects(answer.json) if isinstance(each.get("id"), str)]
        assert set(expected["ids"].get("has", [])) <= set(ids)
        assert not set(expected["ids"].get("lacks", [])) & set(ids)
    if expected.keys() & {"provider_has", "provider_lacks"}:
        player = f"{client.filled('$MODEL')}".removeprefix("case/") if "provider" in client.case else "contract-good"
        sent = site.provider.players[player].bodies[-1]
        for name, value in expected.get("provider_has", {}).items():
            assert sent.get(name) == value
        assert not set(expected.get("provider_lacks", [])) & sent.keys()
    if "usage_chunk" in expected:
        chunks = usage_chunks(answer)
        assert len(chunks) == (0 if expected["usage_chunk"] is None else 1)
        expect_members(next(iter(chunks), None), expected["usage_chunk"] or {}, client)
    if "stream_cost" in expected:
        assert stream_cost(answer) == Decimal(expected["stream_cost"])
    if "charge" in expected:
        assert balance - (await client.caller.settled())["balance_usd"] == Decimal(expected["charge"])
    if expected.get("empty"):
        assert not answer.body
    for words in expected.get("lacks", []):
        assert words not in answer.body_text
    if "took_s" in expected:
        low, high = expected["took_s"]
        assert low <= answer.took_s <= high
    if "last_event" in expected:
        last = answer.data[-1] if answer.data else None
        told = json.loads(last) if isinstance(expected["last_event"], dict) and last is not None else last
        if isinstance(expected["last_event"], dict):
            expect_members(told, expected["last_event"], client)
        else:
            assert expected["last_event"] == told
