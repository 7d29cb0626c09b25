"""contract.json, `in_words.operators`: what an operator is promised, with a real gateway, a real store and real commands."""

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.cases.conftest import Site
from tests.cases.test_contract import BAD, GOOD, PRICES
from tests.harness.clients import Answer, chat, chat_bytes, fetch
from tests.harness.process import Gateway, Tables
from tests.harness.provider import CHUNK
from tests.harness.waiting import PATIENCE_S, until

TOKEN = "the-operators-token"
HOLDS_S = 3.0  # within which a change holds everywhere: the contract says two seconds, or a few
EXPIRES_S = 5  # long enough for a command on a busy machine
WORD = {**CHUNK, "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]}
SLOW = {"events": [{"$of": [WORD], "$times": 2000}], "gap_s": 0.05}
PLAYERS: dict[str, Any] = {
    "good": GOOD,
    "bad": BAD,
    "slow": SLOW,
    "short": {"events": [WORD]},
    "dies": {"events": [WORD], "end": "dies"},
    "silent": {"events": [WORD], "end": "silent"},
}
_accounts = (f"operators-{number}" for number in count())


class Operator:
    """Who runs the gateway: with commands, the admin API and its own keys."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.command = gateway.run
        self.data = gateway.command

    async def admin(self, method: str, path: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, Any]:
        """Ask the admin API: status and JSON."""
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        answer = await fetch(method, f"{self.gateway.admin}/admin/v1{path}", headers=headers, json=body)
        return answer.status, answer.json

    async def ask(self, secret: str, model: str = "m/good", **options: Any) -> Answer:
        """Make a request with a key."""
        auth = {"authorization": f"Bearer {secret}"}
        return await chat(self.gateway.url, auth, model=model, max_tokens=10, **options)

    async def logged(self, request_id: str, event: str) -> list[dict[str, Any]]:
        """The lines of the log about a request, when there is one of this event."""
        return await until(lambda: self.gateway.logged(event, request_id=request_id), event, HOLDS_S)

    async def becomes(
        self, secret: str, status: int, model: str = "m/good", within_s: float = HOLDS_S, meanwhile: int | None = None
    ) -> Answer:
        """The first answer of this status, which must come while a change may take to hold; `meanwhile`: that of all before."""

        async def fitting() -> Answer | None:
            answer = await self.ask(secret, model)
            assert meanwhile is None or answer.status in (meanwhile, status)
            return answer if answer.status == status else None

        return await until(fitting, f"status {status}", within_s, poll_s=0.1)

    @asynccontextmanager
    async def streaming(self, secret: str, model: str = "m/slow") -> AsyncIterator[asyncio.StreamReader]:
        """A stream that has begun; hung up on at the end."""
        reader, writer = await asyncio.open_connection(*self.gateway.address)
        writer.write(chat_bytes({"authorization": f"Bearer {secret}"}, model=model, stream=True))
        try:
            async with asyncio.timeout(PATIENCE_S):
                assert (await reader.readline()).split()[1] == b"200"
                await reader.readuntil(b"data: ")
            yield reader
        finally:
            writer.close()


def configured(site: Site, folder: Path) -> Tables:
    """The gateway's tables: a model for each player, and a pair."""
    (folder / "token").write_text(TOKEN)
    tables: Tables = {"server": {"admin_token": {"file": str(folder / "token")}}, "credits": {"hold_ttl_s": 3}}
    for name, does in PLAYERS.items():
        timeouts = {"idle_timeout_s": 1} if name == "silent" else {}
        base_url = site.add(f"operators-{name}", does)
        tables[f"upstreams.{name}"] = {"kind": "openai", "base_url": base_url, **timeouts}
        route = [{"upstream": name, "model": "up-model"}]
        tables[f'models."m/{name}"'] = {"upstreams": route, "context_window": 128_000, **PRICES}
    return tables


@pytest.fixture(scope="session")
def gateway(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    return site.gateway("operators", configured(site, tmp_path_factory.mktemp("operators")), token=TOKEN)


@pytest.fixture
def operator(gateway: Gateway) -> Operator:
    return Operator(gateway)


@pytest.fixture
def account() -> str:
    return next(_accounts)


@pytest.fixture
def create(operator: Operator, account: str) -> Callable[..., Any]:
    """Mint a key of the test's account, which is rich from the first on."""
    made: list[Any] = []

    def create(*flags: str) -> Any:
        made.append(operator.data("keys", "create", "--account", account, *flags))
        if len(made) == 1:
            operator.data("credits", "grant", account, "1000")
        return made[-1]

    return create


# accounts


def test_accounts_list(operator, account):
    operator.data("credits", "grant", account, "25")
    assert {each["account"]: each["balance_usd"] for each in operator.data("accounts", "list")}[account] == "25.00"


def test_accounts_show(operator, account):
    operator.data("credits", "grant", account, "25")
    shown = operator.data("accounts", "show", account)
    assert [shown[name] for name in ("balance_usd", "held_usd", "available_usd")] == ["25.00", "0.00", "25.00"]
    unknown = operator.command("accounts", "show", "nobody-at-all", "--json")
    assert (unknown.returncode, json.loads(unknown.stderr)["error"]["code"]) == (1, "account_not_found")


# keys


async def test_keys_update_name(operator, create):
    key = create("--name", "old")
    assert operator.data("keys", "update", key["id"], "--name", "new")["name"] == "new"
    assert (await operator.ask(key["key"])).status == 200


async def test_keys_update_models(operator, create):
    key = create()
    assert (await operator.ask(key["key"], "m/short", stream=True)).status == 200
    operator.data("keys", "update", key["id"], "--models", "m/good,m/bad")
    assert (await operator.becomes(key["key"], 403, "m/short")).error["code"] == "forbidden"
    assert (await operator.ask(key["key"], "m/good")).status == 200


async def test_keys_update_expires(operator, create):
    key = create()
    soon = datetime.now(UTC) + timedelta(seconds=EXPIRES_S)
    operator.data("keys", "update", key["id"], "--expires", soon.isoformat())
    assert (await operator.ask(key["key"])).status == 200
    assert (await operator.becomes(key["key"], 401, within_s=EXPIRES_S + HOLDS_S, meanwhile=200)).code == "unauthorized"
    assert datetime.now(UTC) >= soon


async def test_keys_rotate(operator, create, account):
    key = create("--budget", "5", "--burst", "9")
    assert (await operator.ask(key["key"])).status == 200
    rotated = operator.data("keys", "rotate", key["id"])
    assert (rotated["id"], rotated["account"]) == (key["id"], account)
    assert (await operator.becomes(key["key"], 401)).error["code"] == "unauthorized"
    shown = operator.data("keys", "show", key["id"])
    assert (shown["budgets"], shown["limits"]) == (key["budgets"], key["limits"])
    assert shown["spend"]["total_usd"] != "0.00"
    assert (await operator.ask(rotated["key"])).status == 200


async def test_keys_rotate_keeps_a_spent_budget(operator, create):
    key = create("--budget", "0.00015")
    assert [(await operator.ask(key["key"])).status for _ in range(2)] == [200, 402]
    rotated = operator.data("keys", "rotate", key["id"])
    assert (await operator.ask(rotated["key"])).error["code"] == "spend_limit_exceeded"


async def test_keys_rotate_grace(operator, create):
    key = create()
    rotated = operator.data("keys", "rotate", key["id"], "--grace", "3s")
    assert [(await operator.ask(secret)).status for secret in (key["key"], rotated["key"])] == [200, 200]
    await operator.becomes(key["key"], 401, within_s=3 + HOLDS_S)
    assert (await operator.ask(rotated["key"])).status == 200


# credit


def test_credits_ref_and_history(operator, account):
    granted = [operator.data("credits", "grant", account, "25", "--ref", "INV-1", "--note", "paid") for _ in range(2)]
    assert [each["balance_usd"] for each in granted] == ["25.00", "25.00"]
    (grant,) = operator.data("credits", "history", account)
    assert [grant[name] for name in ("amount_usd", "note", "ref")] == ["25.00", "paid", "INV-1"]
    assert datetime.fromisoformat(grant["granted_at"])


@pytest.mark.parametrize(
    "args, code",
    [
        (["credits", "grant", "acme", "abc"], 2),
        (["credits", "show", "nobody-at-all"], 1),
        (["keys", "show", "key_nothing"], 1),
    ],
)
def test_json_errors(operator, args, code):
    done = operator.command(*args, "--json")
    error = json.loads(done.stderr)["error"]
    assert (done.returncode, done.stdout, sorted(error)) == (code, "", ["code", "message"])


# usage and requests


async def test_usage_csv(operator, create, account):
    key = create()
    assert (await operator.ask(key["key"])).status == 200
    told = operator.command("usage", "--account", account, "--by", "model", "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(told.stdout))
    assert [row[name] for name in ("account", "model", "requests")] == [account, "m/good", "1"]
    assert float(row["cost_usd"]) > 0


@pytest.mark.parametrize(
    "model, outcome, cost, cause",
    [("m/good", "completed", True, (None, None)), ("m/bad", "failed", False, ("upstream_error", 500))],
)
async def test_requests_show(operator, create, account, model, outcome, cost, cause):
    key = create()
    answer = await operator.ask(key["key"], model)
    shown = operator.data("requests", "show", answer.headers["x-request-id"])
    assert [
        shown[name] for name in ("request_id", "account", "key_id", "model", "upstream", "attempts", "outcome")
    ] == [
        answer.headers["x-request-id"],
        account,
        key["id"],
        model,
        model.removeprefix("m/"),
        shown["attempts"],
        outcome,
    ]
    assert (shown["attempts"] >= 1, float(shown["cost_usd"]) > 0) == (True, cost)
    assert (shown["code"], shown["upstream_status"]) == cause


async def test_top_counts_refusals(operator, create, account):
    key = create("--burst", "1", "--requests-per-minute", "1")
    assert [(await operator.ask(key["key"])).status for _ in range(4)] == [200, 429, 429, 429]

    def refused():
        return [row["refused"] for row in operator.data("top", "--once") if row["account"] == account]

    await until(lambda: refused() == [3], "its row", HOLDS_S)


# limits


async def test_limits_account_budget(operator, create, account):
    keys = [create(), create()]
    operator.data("accounts", "limits", account, "--budget-monthly", "0.00025")
    assert (await operator.ask(keys[0]["key"])).status == 200
    refused = await operator.becomes(keys[1]["key"], 402, meanwhile=200)
    assert (refused.error["code"], "account" in refused.error["message"]) == ("spend_limit_exceeded", True)


async def test_limits_per_day(operator, create):
    key = create("--requests-per-day", "2")
    answers = [await operator.ask(key["key"]) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert (answers[-1].error["code"], "day" in answers[-1].error["message"]) == ("rate_limit_exceeded", True)
    assert 0 < answers[-1].error["retry_after_seconds"] <= 86_400


async def test_parallel_key(operator, create):
    key = create("--max-parallel", "1")
    async with operator.streaming(key["key"]):
        refused = await operator.ask(key["key"])
        assert (refused.status, refused.error["code"], "parallel" in refused.error["message"]) == (
            429,
            "rate_limit_exceeded",
            True,
        )
    await operator.becomes(key["key"], 200)


async def test_parallel_account(operator, create, account):
    keys = [create(), create()]
    operator.data("accounts", "limits", account, "--max-parallel", "1")
    async with operator.streaming(keys[0]["key"]):
        refused = await operator.becomes(keys[1]["key"], 429, meanwhile=200)
        assert "parallel" in refused.error["message"]
    await operator.becomes(keys[1]["key"], 200)


@pytest.mark.parametrize("model", ["m/good", "m/short", "m/dies", "m/silent", "m/bad"])
async def test_a_slot_is_free_after_the_end(operator, create, model):
    key = create("--max-parallel", "1")
    await operator.ask(key["key"], model, stream=True)
    assert (await operator.becomes(key["key"], 200)).status == 200


async def test_a_slot_is_free_after_the_gateway_was_killed(site, tmp_path_factory, create):
    tables = configured(site, tmp_path_factory.mktemp("killed"))
    doomed = Operator(site.gateway("operators-doomed", tables, token=TOKEN))
    key = create("--max-parallel", "1")
    async with doomed.streaming(key["key"]):
        doomed.gateway.kill()
    again = Operator(site.gateway("operators-again", tables, token=TOKEN))
    await again.becomes(key["key"], 200, within_s=tables["credits"]["hold_ttl_s"] + HOLDS_S, meanwhile=429)


# the admin API


async def test_admin_keys(operator, account):
    body = {"account": account, "name": "ci", "models": ["m/good"], "requests_per_minute": 60, "burst": 5}
    status, made = await operator.admin("POST", "/keys", body)
    assert (status, made["account"], made["models"]) == (201, account, ["m/good"])
    assert (await operator.admin("POST", f"/accounts/{account}/grants", {"amount_usd": "5"}))[0] == 201
    assert (await operator.ask(made["key"])).status == 200
    status, shown = await operator.admin("GET", f"/keys/{made['id']}")
    assert (status, shown) == (200, operator.data("keys", "show", made["id"]))
    status, listed = await operator.admin("GET", f"/keys?account={account}")
    assert operator.data("keys", "list", "--account", account) == listed
    assert made["key"] not in json.dumps([shown, listed])
    assert (await operator.admin("PATCH", f"/keys/{made['id']}", {"name": "new", "models": ["m/bad"]}))[0] == 200
    await operator.becomes(made["key"], 403)
    assert (await operator.admin("PATCH", f"/keys/{made['id']}", {"models": None}))[0] == 200
    status, rotated = await operator.admin("POST", f"/keys/{made['id']}/rotate", {"grace": "1h"})
    assert (status, rotated["id"]) == (200, made["id"])
    await operator.becomes(rotated["key"], 200)
    assert (await operator.admin("DELETE", f"/keys/{made['id']}"))[0] == 200
    await operator.becomes(rotated["key"], 401)


async def test_admin_accounts_and_grants(operator, account):
    path = f"/accounts/{account}/grants"
    answers = [await operator.admin("POST", path, {"amount_usd": "5", "ref": "r", "note": "n"}) for _ in range(2)]
    assert [(status, granted["balance_usd"]) for status, granted in answers] == [(201, "5.00"), (200, "5.00")]
    status, shown = await operator.admin("GET", f"/accounts/{account}")
    assert (status, shown) == (200, operator.data("accounts", "show", account))
    status, listed = await operator.admin("GET", "/accounts?after=operators-")
    assert (status, {each["account"] for each in listed} >= {account}) == (200, True)


async def test_admin_usage_and_request(operator, create, account):
    answer = await operator.ask(create()["key"])
    status, rows = await operator.admin("GET", f"/usage?account={account}&group_by=model")
    assert (status, rows) == (200, operator.data("usage", "--account", account, "--by", "model"))
    request_id = answer.headers["x-request-id"]
    status, shown = await operator.admin("GET", f"/requests/{request_id}")
    assert (status, shown) == (200, operator.data("requests", "show", request_id))


@pytest.mark.parametrize("token", [None, "another"])
@pytest.mark.parametrize("path", ["/keys", "/accounts", "/usage", "/nowhere", "/openapi.json"])
async def test_admin_without_the_token(operator, path, token):
    status, answer = await operator.admin("GET", path, token=token)
    assert (status, answer["error"]["code"]) == (401, "unauthorized")


@pytest.mark.parametrize("path", ["/admin/v1/keys", "/admin/v1/accounts", "/admin/v1/openapi.json"])
async def test_admin_is_not_on_the_data_listener(gateway, path):
    answer = await fetch("GET", gateway.url + path, headers=gateway.auth)
    assert (answer.status, answer.error["code"]) == (404, "not_found")


# the log


async def test_log_upstream_status_and_failed_attempt(operator, create, account):
    answer = await operator.ask(create()["key"], "m/bad")
    request_id = answer.headers["x-request-id"]
    (line,) = await operator.logged(request_id, "request")
    assert (line["upstream_status"], "upstream_request_id" in line, line["account"]) == (500, True, account)
    failed = await operator.logged(request_id, "attempt_failed")
    assert {(each["upstream"], each["status"]) for each in failed} == {("bad", 500)}


async def test_log_refused_by(operator, create):
    key = create("--burst", "1", "--requests-per-minute", "1")
    answers = [await operator.ask(key["key"]) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 429]
    (line,) = await operator.logged(answers[1].headers["x-request-id"], "request")
    assert line["refused_by"] == "key_requests"


# the metrics


async def shows(operator: Operator, *lines: str) -> None:
    """Each beginning of a line is in the metrics, within the time that a change may take."""
    await until(lambda: all(f"\n{line}" in operator.gateway.metrics() for line in lines), f"{lines}", HOLDS_S)


async def test_metrics_by_upstream(operator, create):
    assert (await operator.ask(create()["key"], "m/short", stream=True)).status == 200
    await shows(
        operator,
        'meshproxy_upstream_time_to_first_token_seconds_count{upstream="short"} ',
        'meshproxy_upstream_request_duration_seconds_count{upstream="short"} ',
        'meshproxy_upstream_state{state="serving",upstream="short"} 1.0',
    )


async def test_metrics_ejected_member_of_a_pair(site, tmp_path_factory, create):
    tables = configured(site, tmp_path_factory.mktemp("pair"))
    routes = [{"upstream": name, "model": "up-model", "weight": 1} for name in ("good", "bad")]
    tables['models."m/pair"'] = {"upstreams": routes, "context_window": 128_000, **PRICES}
    operator = Operator(site.gateway("operators-pair", tables, token=TOKEN))
    key = create()
    answers = [(await operator.ask(key["key"], "m/pair")).status for _ in range(20)]
    assert answers == [200] * 20
    await shows(
        operator,
        'meshproxy_upstream_state{state="ejected",upstream="bad"} 1.0',
        'meshproxy_upstream_state{state="serving",upstream="good"} 1.0',
        'meshproxy_upstream_breaker_open{upstream="bad"} 0.0',
    )


async def test_metrics_accounts_off(operator, create, account):
    assert (await operator.ask(create()["key"])).status == 200
    text = operator.gateway.metrics()
    assert (account in text, "meshproxy_account_requests_total{" in text) == (False, False)


async def test_metrics_accounts_all(site, tmp_path_factory, create, account):
    tables = configured(site, tmp_path_factory.mktemp("accounts"))
    tables["metrics"] = {"accounts": "all", "accounts_max": 1}
    operator = Operator(site.gateway("operators-accounts", tables, token=TOKEN))
    key = create()
    another = operator.data("keys", "create", "--account", f"{account}-b")
    operator.data("credits", "grant", f"{account}-b", "1")
    operator.data("accounts", "limits", account, "--budget-monthly", "0.00295")
    assert [(await operator.ask(each["key"])).status for each in (key, another)] == [200, 200]
    await shows(
        operator,
        f'meshproxy_account_requests_total{{account="{account}",code="200"}} 1.0',
        f'meshproxy_account_cost_usd_total{{account="{account}"}} 0.000147',
        f'meshproxy_account_balance_usd{{account="{account}"}} 999.999852',
        f'meshproxy_account_budget_spent_ratio{{account="{account}",budget="monthly"}} 0.05',
        'meshproxy_account_requests_total{account="other",code="200"} 1.0',
    )
    assert f"{account}-b" not in operator.gateway.metrics()


# reload without a signal


async def test_watched_files_are_reloaded_as_by_a_signal(site, tmp_path):
    (tmp_path / "key").write_text("old")
    tables = configured(site, tmp_path)
    tables["upstreams.good"]["api_key"] = {"file": str(tmp_path / "key")}
    gateway = site.gateway("operators-watched", tables, "--watch", token=TOKEN)

    async def logs(event: str) -> dict[str, Any]:
        return (await until(lambda: gateway.logged(event), event))[-1]

    good = gateway.config.read_text()
    gateway.config.write_text(good.replace("[credits]", "[credit]"))
    assert "credit" in (await logs("reload_failed"))["faults"][0]
    gateway.config.write_text(good)
    assert (await logs("reloaded"))["generation"] == 2
    (tmp_path / "new").write_text("new")
    (tmp_path / "new").replace(tmp_path / "key")
    await until(lambda: gateway.logged("reloaded", generation=3), "another reload")
