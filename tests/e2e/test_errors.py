"""Every row of the table of errors (docs/errors.md): over HTTP, through OpenAI's SDK, and what it costs, which is nothing."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from msgspec.structs import replace

from meshproxy.errors import ErrorResponse
from meshproxy.policy.principal import Budgets, Key, Limits
from meshproxy.server import admin_api, api
from tests.harness.books import Caller
from tests.harness.clients import HELLO
from tests.harness.mesh import Mesh, model

ROOT = Path(__file__).parents[2]
TINY = {"sim": {"kind": "openai", "first_byte_timeout_s": 0.1}}


@dataclass
class Case:
    """A request that is refused. `asked`: how often the provider hears of it when the SDK may retry once."""

    status: int
    code: str
    raises: type[openai.APIStatusError]
    fields: dict[str, Any] = field(default_factory=dict)
    caller: Callable[[Mesh], Awaitable[Caller]] = lambda mesh: mesh.key()
    headers: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    asked: int = 0
    may_retry: bool = True
    retry_after_ms: int | None = None


def with_secret(secret: str) -> Callable[[Mesh], Awaitable[Caller]]:
    async def make(mesh: Mesh) -> Caller:
        made = await mesh.key()
        return Caller(secret, made.key)

    return make


def with_status(status: str) -> Callable[[Mesh], Awaitable[Caller]]:
    async def make(mesh: Mesh) -> Caller:
        return await changed(mesh, await mesh.key(), status=status)

    return make


async def changed(mesh: Mesh, caller: Caller, **changes: Any) -> Caller:
    """The caller after its key's record was changed."""
    caller.key = await mesh.worker.directory.change_key(caller.key.id, lambda key: replace(key, **changes))
    return caller


async def of_a_suspended_account(mesh: Mesh) -> Caller:
    caller = await mesh.key()
    await mesh.worker.directory.set_account_status(caller.account, "suspended")
    return caller


async def at_its_limit(mesh: Mesh) -> Caller:
    caller = await mesh.key(limits=Limits(requests_per_minute=6000, burst=1))
    limits = Limits(requests_per_minute=1)
    await mesh.worker.directory.change_account(caller.account, lambda account: replace(account, limits=limits))
    assert (await mesh.chat(caller, model="sim/plain")).status == 200
    await mesh.quiet()
    mesh.simulator.history.clear()
    return caller


CASES = {
    "unknown key": Case(401, "unauthorized", openai.AuthenticationError, caller=with_secret("rsk_" + "x" * 43)),
    "malformed key": Case(401, "unauthorized", openai.AuthenticationError, caller=with_secret("sk-proj-1")),
    "revoked key": Case(401, "unauthorized", openai.AuthenticationError, caller=with_status("revoked")),
    "expired key": Case(
        401,
        "unauthorized",
        openai.AuthenticationError,
        caller=lambda mesh: mesh.key(expires_at=time.time() - 1),
    ),
    "no credit": Case(402, "insufficient_credits", openai.APIStatusError, caller=lambda mesh: mesh.key(credit="0")),
    "not enough credit": Case(
        402, "insufficient_credits", openai.APIStatusError, caller=lambda mesh: mesh.key(credit="0.0001")
    ),
    "budget": Case(
        402,
        "spend_limit_exceeded",
        openai.APIStatusError,
        caller=lambda mesh: mesh.key(budgets=Budgets(daily_nusd=100)),
    ),
    "session budget": Case(
        402,
        "spend_limit_exceeded",
        openai.APIStatusError,
        fields={"extra_body": {"session_id": "s"}},
        caller=lambda mesh: mesh.key(session=Budgets(total_nusd=100)),
    ),
    "suspended key": Case(403, "forbidden", openai.PermissionDeniedError, caller=with_status("suspended")),
    "suspended account": Case(403, "forbidden", openai.PermissionDeniedError, caller=of_a_suspended_account),
    "model not allowed": Case(
        403,
        "forbidden",
        openai.PermissionDeniedError,
        caller=lambda mesh: mesh.key(models=["sim/fast"]),
    ),
    "unknown model": Case(404, "model_not_found", openai.NotFoundError, fields={"model": "no/such"}),
    "unknown fallback": Case(
        404, "model_not_found", openai.NotFoundError, fields={"extra_body": {"models": ["no/such"]}}
    ),
    "unknown template": Case(
        404, "template_not_found", openai.NotFoundError, fields={"extra_body": {"template": "nope"}}
    ),
    "too large": Case(
        413,
        "request_too_large",
        openai.APIStatusError,
        fields={"user": "x" * 2000},
        tables={"server": {"max_body_bytes": 1000}},
    ),
    "compressed": Case(415, "unsupported_media_type", openai.APIStatusError, headers={"content-encoding": "gzip"}),
    "form": Case(
        415,
        "unsupported_media_type",
        openai.APIStatusError,
        headers={"content-type": "application/x-www-form-urlencoded"},
    ),
    "invalid": Case(422, "validation_error", openai.UnprocessableEntityError, fields={"temperature": 3}),
    "refused by the provider": Case(
        400,
        "invalid_value",
        openai.BadRequestError,
        fields={"messages": [{"role": "nobody", "content": "Hi"}]},
        asked=1,
    ),
    "provider says 413": Case(
        413, "provider_refused", openai.APIStatusError, fields={"model": "sim/error-413"}, asked=1
    ),
    "provider says 422": Case(
        422,
        "unprocessable_entity",
        openai.UnprocessableEntityError,
        fields={"model": "sim/error-422"},
        asked=1,
    ),
    "rate limit": Case(
        429,
        "rate_limit_exceeded",
        openai.RateLimitError,
        caller=at_its_limit,
        retry_after_ms=60_000,
    ),
    "connection refused": Case(
        502,
        "upstream_error",
        openai.InternalServerError,
        fields={"model": "m"},
        tables={"models": {"m": model("refused", "m")}},
    ),
    "provider's 401": Case(
        502, "upstream_error", openai.InternalServerError, fields={"model": "sim/error-401"}, asked=2
    ),
    "provider's 402": Case(
        502, "upstream_error", openai.InternalServerError, fields={"model": "sim/error-402"}, asked=2
    ),
    "provider's 403": Case(
        502, "upstream_error", openai.InternalServerError, fields={"model": "sim/error-403"}, asked=2
    ),
    "provider's 404": Case(
        502, "upstream_error", openai.InternalServerError, fields={"model": "sim/error-404"}, asked=2
    ),
    **{
        f"sim/{trait}": Case(
            502,
            "upstream_error",
            openai.InternalServerError,
            fields={"model": f"sim/{trait}"},
            asked=1,
            may_retry=False,
        )
        for trait in (
            "error-500",
            "error-502",
            "error-504",
            "error-408",
            "error-409",
            "error-html",
            "refuse",
            "reset",
            "not-json",
            "empty",
            "die-mid-stream",
            "reset-mid-stream",
            "bad-chunk",
            "error-mid-stream",
        )
    },
    "redirect": Case(502, "upstream_error", openai.InternalServerError, fields={"model": "sim/redirect"}, asked=2),
    "provider's 429": Case(
        503,
        "provider_not_available",
        openai.InternalServerError,
        fields={"model": "m"},
        tables={"models": {"m": model("sim", "sim/error-429?retry_after=0.02")}},
        asked=2,
        retry_after_ms=20,
    ),
    "never answered": Case(
        504,
        "gateway_timeout",
        openai.InternalServerError,
        fields={"model": "sim/stall-head"},
        tables={"upstreams": TINY},
        asked=1,
        may_retry=False,
    ),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
async def refusing(case: Case, start_mesh: Any, simulator: Any) -> Mesh:
    """A gateway as the case wants it."""
    tables = dict(case.tables)
    if "upstreams" in tables:
        tables["upstreams"] = {
            name: {**upstream, "base_url": simulator.base_url} for name, upstream in tables["upstreams"].items()
        }
    return await start_mesh(**tables)


async def test_over_http(case, refusing):
    caller = await case.caller(refusing)
    fields = {"model": "sim/plain", **case.fields}
    fields |= fields.pop("extra_body", {})
    before = await refusing.worker.ledger.balance(caller.account)
    answer = await refusing.chat(caller, headers=case.headers, **fields)
    assert (answer.status, answer.code) == (case.status, case.code)
    assert answer.headers.get("x-should-retry") == (None if case.may_retry else "false")
    if case.retry_after_ms is None:
        assert "retry-after" not in answer.headers
    else:
        assert 0 <= case.retry_after_ms - int(answer.headers["retry-after-ms"]) < 1000
        assert str(-(-int(answer.headers["retry-after-ms"]) // 1000)) == answer.headers["retry-after"]
        assert int(answer.headers["retry-after"]) == answer.error["retry_after_seconds"]
    after = await refusing.balance(caller)
    assert (after.balance_nusd, after.settled_nusd, after.held_nusd) == (before.balance_nusd, before.settled_nusd, 0)


async def test_through_the_sdk(case, refusing):
    caller = await case.caller(refusing)
    retries = 0 if case.status == 429 else 1  # a minute is too long to wait for
    sdk = refusing.sdk(caller, max_retries=retries)
    with pytest.raises(case.raises) as raised:
        await sdk.chat.completions.create(
            **{"model": "sim/plain", "messages": HELLO, **case.fields}, extra_headers=case.headers
        )
    error = raised.value
    assert (error.status_code, error.code) == (case.status, case.code)
    assert error.request_id == error.body["request_id"]
    assert error.request_id.startswith("req_")
    assert error.body["message"] in error.message
    assert len(refusing.received) == case.asked


async def test_the_provider_is_quoted_about_the_request(mesh):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="sim/plain", messages=[{"role": "nobody", "content": "Hi"}])
    words = answer.error["provider_error"]["error"]
    assert (words["param"], words["code"]) == ("messages[0].role", "invalid_value")


@pytest.mark.parametrize("status", [401, 402, 403, 404])
async def test_the_provider_is_not_quoted_about_our_account(mesh, status):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model=f"sim/error-{status}")
    assert "provider_error" not in answer.error
    assert b"sk-" not in answer.body


async def test_a_web_page_is_told_by_its_title(mesh):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="sim/error-html")
    assert answer.error["provider_error"] == {"message": "A web page: 502 Bad Gateway"}


async def test_a_rate_limit_names_which_and_writes_nothing(mesh):
    caller = await at_its_limit(mesh)
    before = await mesh.snapshot(caller)
    answer = await mesh.chat(caller, model="sim/plain")
    assert "account requests" in answer.error["message"]
    await mesh.quiet()
    assert await mesh.snapshot(caller) == before
    assert mesh.received == []


async def test_credit_is_asked_before_limits(mesh):
    caller = await mesh.key(credit="0.0000005", limits=Limits(requests_per_minute=0, burst=0))
    assert (await mesh.chat(caller, model="sim/plain")).code == "insufficient_credits"


async def test_a_limit_of_nothing_has_no_time_to_wait_for(mesh):
    caller = await mesh.key(limits=Limits(requests_per_minute=0))
    answer = await mesh.chat(caller, model="sim/plain")
    assert answer.code == "rate_limit_exceeded"
    assert "retry-after" not in answer.headers
    assert answer.headers["x-should-retry"] == "false"


async def test_the_sdk_waits_as_long_as_it_is_told_and_gets_through(mesh):
    caller = await mesh.key(limits=Limits(requests_per_minute=600, burst=1))
    sdk = mesh.sdk(caller, max_retries=1)
    started = time.monotonic()
    for _ in range(3):
        await sdk.chat.completions.create(model="sim/plain", messages=HELLO)
    assert 0.18 < time.monotonic() - started < 2
    assert len(mesh.received) == 3


async def test_a_revocation_holds_within_two_seconds(mesh):
    caller = await mesh.key()
    assert (await mesh.chat(caller, model="sim/plain")).status == 200
    elsewhere = type(mesh.worker.directory)(mesh.worker.store, time.monotonic)
    assert await elsewhere.set_key_status(caller.key.id, "revoked")
    async with asyncio.timeout(2):
        while (await mesh.chat(caller, model="sim/plain")).status != 401:
            pass


async def test_too_many_in_flight(start_mesh):
    mesh = await start_mesh(server={"max_in_flight": 1})
    caller = await mesh.key()
    first = asyncio.create_task(mesh.chat(caller, model="sim/stall-head"))
    await mesh.until(lambda: len(mesh.received) == 1)
    answer = await mesh.chat(caller, model="sim/plain")
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "overloaded", "1")
    with pytest.raises(openai.InternalServerError) as raised:
        await mesh.sdk(caller).chat.completions.create(model="sim/plain", messages=HELLO)
    assert raised.value.code == "overloaded"
    first.cancel()
    await mesh.quiet()


async def test_without_a_ledger(start_mesh):
    mesh = await start_mesh(redis={"url": "unix:///nonexistent/socket"}, connected=False)
    caller = Caller("rsk_" + "x" * 43, Key(id="key_x", account="nobody", created_at=0))
    answer = await mesh.chat(caller, model="sim/plain")
    assert (answer.status, answer.code) == (503, "ledger_unavailable")
    assert answer.headers["retry-after"] == "1"
    with pytest.raises(openai.InternalServerError) as raised:
        await mesh.sdk(caller).chat.completions.create(model="sim/plain", messages=HELLO)
    assert raised.value.code == "ledger_unavailable"
    for path in ("/v1/models", "/v1/key", "/v1/usage", "/v1/templates"):
        got = await mesh.request("GET", path, headers=caller.auth)
        assert (got.status, got.code) == (503, "ledger_unavailable")
    await mesh.worker.store.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/completions", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/key", 405, "method_not_allowed"),
        ("GET", "/v1/models", 401, "unauthorized"),
        ("GET", "/v1/models/sim/plain", 401, "unauthorized"),
        ("GET", "/v1/templates", 401, "unauthorized"),
        ("POST", "/v1/templates", 401, "unauthorized"),
        ("GET", "/v1/usage", 401, "unauthorized"),
        ("GET", "/v1/key", 401, "unauthorized"),
    ],
)
async def test_paths_and_methods(mesh, method, path, status, code):
    answer = await mesh.request(method, path)
    assert (answer.status, answer.code) == (status, code)
    if status == 405:
        assert "allow" in answer.headers


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("/healthz", "/health"),
        ("/health/", "/health"),
        ("/v1/openapi.json", "/openapi.json"),
        ("/models", "/v1/models"),
        ("/v1/keys", "/v1/key"),
    ],
)
async def test_an_unknown_path_is_told_the_nearest(mesh, path, nearest):
    answer = await mesh.request("GET", path)
    assert f" The nearest is {nearest}. " in answer.error["message"]


async def test_the_answer_to_a_preflight_has_the_requests_id(start_mesh):
    mesh = await start_mesh(server={"cors_origins": ["https://app.example"]})
    headers = {"origin": "https://app.example", "access-control-request-method": "POST", "x-request-id": "page.1"}
    answer = await mesh.request("OPTIONS", "/v1/chat/completions", headers=headers)
    assert (answer.status, answer.headers["x-request-id"]) == (204, "page.1")


async def test_the_answer_to_invalid_http_has_the_version(mesh):
    caller = await mesh.key()
    twice = [("authorization", "Bearer x"), ("authorization", caller.auth["authorization"])]
    answer = await mesh.request("GET", "/v1/models", headers=twice)
    assert (answer.status, answer.code, answer.headers.get("x-mesh-version")) == (400, "bad_request", "2026-08")


async def test_a_path_like_no_other_is_told_none(mesh):
    assert "nearest" not in (await mesh.request("POST", "/v1/messages")).error["message"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/free", "/v1/templates", "/v1/usage", "/v1/key", "/v1/balance"]
)
async def test_an_unknown_version_is_refused_on_every_path(mesh, path):
    headers = {**(await mesh.key()).auth, "x-mesh-version": "1999-01"}
    answer = await mesh.request("GET", path, headers=headers)
    assert (answer.status, answer.code) == (400, "invalid_api_version")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("/v1/models?free=maybe", "free"),
        ("/v1/models/search?free=2", "free"),
        ("/v1/models/search?order=up", "order"),
        ("/v1/models/search?limit=x", "limit"),
        ("/v1/usage?group_by=colour", "group_by"),
        ("/v1/usage?since=yesterday", "since"),
    ],
)
async def test_a_parameter_that_makes_no_sense_is_named_in_details(mesh, query, param):
    answer = await mesh.request("GET", query, headers=(await mesh.key()).auth)
    told = (answer.status, answer.error["param"], [detail["loc"] for detail in answer.error["details"]])
    assert told == (422, param, [["query", param]])


async def test_a_tier_without_a_price_is_named_in_details(mesh):
    answer = await mesh.chat(await mesh.key(), model="sim/plain", service_tier="priority")
    assert [detail["loc"] for detail in answer.error["details"]] == [["body", "service_tier"]]


@pytest.mark.parametrize("authorization", ["{key}", "Token {key}", "Bearer {key} {key}", 'Bearer "{key}"'])
async def test_a_key_that_is_sent_wrongly_is_told_how(mesh, authorization):
    secret = (await mesh.key()).auth["authorization"].removeprefix("Bearer ")
    answer = await mesh.request("GET", "/v1/key", headers={"authorization": authorization.format(key=secret)})
    assert (answer.status, "not a key of this gateway" in answer.error["message"]) == (401, False)


def documented_codes():
    return re.findall(r"^\| (\d{3}) \| `(\w+)` \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)


def test_every_documented_error_has_its_sides_type():
    ours = {status for status, code in documented_codes() if ErrorResponse(int(status), code, "m").type == "api_error"}
    assert ours == {status for status, _ in documented_codes() if status >= "500"}


def test_both_openapi_documents_list_the_documented_statuses():
    clients, administration = (ROOT / "docs/errors.md").read_text().split("## Of the commands and the admin API")
    statuses = {*map(int, re.findall(r"^\| (\d{3}) \| `", clients, re.MULTILINE))}
    assert statuses == set(api.REFUSALS)
    of_administration = {*map(int, re.findall(r"^\| (\d{3}) \| `", administration, re.MULTILINE))}
    assert (of_administration - set(admin_api.REFUSALS), set(admin_api.REFUSALS) - statuses) == (set(), set())


def test_every_code_is_documented_and_no_other():
    documented = documented_codes()
    source = "".join(path.read_text() for path in (ROOT / "meshproxy").rglob("*.py"))
    told = re.findall(r'(?:ErrorResponse|client_error)\(\s*(?:#.*\s*)?(\d{3}|status),\s*"(\w+)"', source)
    middlewares = (ROOT / "meshproxy/server/aiohttp_path.py").read_text()
    told += re.findall(r'^    (\d{3}): "(\w+)",$', middlewares, re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert {code for _, code in told} == {code for _, code in documented}
    assert {pair for pair in told if pair[0] != "status"} <= set(documented)


@pytest.mark.parametrize("model_name", ["sim/stall-head", "sim/stall"])
async def test_a_requests_own_deadline_ends_it(mesh, model_name):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model=model_name, timeout=0.3)
    assert (answer.status, answer.code) == (504, "gateway_timeout")
    assert await mesh.spent(caller) == 0
    assert "timeout" not in mesh.sent


async def test_a_deadline_that_is_met_changes_nothing(mesh):
    caller = await mesh.key()
    assert (await mesh.chat(caller, model="sim/plain", timeout=9)).status == 200


async def test_a_deadline_of_none_is_refused(mesh):
    answer = await mesh.chat(await mesh.key(), model="sim/plain", timeout=0)
    assert (answer.status, answer.error["param"]) == (422, "timeout")
