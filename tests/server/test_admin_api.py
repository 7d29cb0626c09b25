import re

import pytest
import redis

from meshproxy import config
from meshproxy.ledger.administration import Administration
from meshproxy.ledger.connection import connect, store_warnings
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.server.admin import create_admin
from meshproxy.server.admin_api import OPENAPI_PATH, ROUTES, document

TOKEN = "the-operators-token"
AUTH = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def administration(store_server):
    with redis.Redis.from_url(store_server) as client:
        client.flushall()
    store = await connect(config.Redis(url=store_server))
    yield Administration(store, Directory(store), Ledger(store), "admin")
    await store.close()


@pytest.fixture
async def client(aiohttp_client, administration):
    return await aiohttp_client(create_admin(None, TOKEN, administration=administration))


@pytest.fixture
def api(client):
    """Ask the admin API: the status and the JSON of its answer."""

    async def ask(method, path, body=None, **headers):
        answer = await client.request(method, f"/admin/v1{path}", json=body, headers={**AUTH, **headers})
        return answer.status, await answer.json()

    return ask


async def test_create_a_key_and_see_it(api):
    body = {
        "account": "acme",
        "name": "ci",
        "models": ["a", "b"],
        "requests_per_minute": 60,
        "burst": 5,
        "max_parallel": 2,
        "budget_monthly_usd": "20.5",
        "session_budget_usd": 1,
        "expires_at": "2099-01-01T00:00:00Z",
    }
    status, made = await api("POST", "/keys", body)
    assert (status, made["account"], made["name"], made["models"]) == (201, "acme", "ci", ["a", "b"])
    assert (made["limits"]["burst"], made["limits"]["max_parallel"]) == (5, 2)
    assert (made["budgets"]["monthly_usd"], made["session_budgets"]["total_usd"]) == ("20.50", "1.00")
    secret = made.pop("key")
    assert re.fullmatch(r"rsk_[A-Za-z0-9]{43}", secret)
    status, shown = await api("GET", f"/keys/{made['id']}")
    assert (status, {name: shown[name] for name in made}) == (200, made)
    status, listed = await api("GET", "/keys?account=acme")
    assert (status, [key["id"] for key in listed]) == (200, [made["id"]])
    assert secret not in str(shown) + str(listed)


async def test_change_what_is_given(api):
    _, made = await api("POST", "/keys", {"account": "acme", "name": "ci", "burst": 5, "models": ["a"]})
    status, changed = await api("PATCH", f"/keys/{made['id']}", {"models": None, "burst": None, "max_parallel": 3})
    assert (status, changed["name"], changed["models"], changed["limits"]["burst"]) == (200, "ci", None, None)
    assert changed["limits"]["max_parallel"] == 3
    status, changed = await api("PATCH", f"/keys/{made['id']}", {"status": "suspended", "expires_at": "30d"})
    assert (changed["status"], changed["expires_at"] is not None) == ("suspended", True)


SHOWN = ("limits", "budgets", "session_budgets")


async def test_what_is_shown_can_be_sent_back(api):
    flat = {"burst": 5, "requests_per_day": 9, "budget_daily_usd": "2", "session_budget_usd": "1"}
    _, made = await api("POST", "/keys", {"account": "acme", **flat})
    shown = {name: made[name] for name in SHOWN}
    status, copy = await api("POST", "/keys", {"account": "acme", **shown})
    assert (status, {name: copy[name] for name in SHOWN}) == (201, shown)
    change = {"limits": {"burst": None}, "budgets": {"daily_usd": "3"}}
    _, changed = await api("PATCH", f"/keys/{copy['id']}", change)
    assert changed["limits"] == shown["limits"] | {"burst": None}
    assert changed["budgets"] == shown["budgets"] | {"daily_usd": "3.00"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (
            {"budget_monthly": "1"},
            "budget_monthly",
            "`budget_monthly`: No such field, did you mean budget_monthly_usd?",
        ),
        ({"budgets": {"monthly": "1"}}, "budgets.monthly", "No such field"),
        ({"budgets": {"monthly_usd": "-1"}}, "budgets.monthly_usd", "`budgets.monthly_usd`"),
    ],
)
async def test_a_wrong_field_is_named(api, body, param, words):
    status, refused = await api("POST", "/keys", {"account": "acme", **body})
    assert (status, refused["error"]["param"], words in refused["error"]["message"]) == (422, param, True), refused


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (
            "/keys",
            {"account": "a b"},
            "`account`: 'a b': an account's name has 1 to 64 letters, digits, `_`, `.` and `-`, and begins",
        ),
        (
            "/keys",
            {"account": "acme", "budget_usd": "1,50"},
            "`budget_usd`: '1,50' is not a decimal amount in USD with at most 9 decimals.",
        ),
        (
            "/accounts/acme/grants",
            {"amount_usd": "$5"},
            "`amount_usd`: '$5' is not a decimal amount in USD with at most 9 decimals.",
        ),
        ("/accounts/acme/grants", {"amount_usd": "5", "ref": " "}, "`ref`: Empty: leave it out, or name a payment."),
        ("/keys/key_none/rotate", {"grace": "soon"}, "`grace`: 'soon' is not a duration such as 30d, 24h, 15m."),
    ],
)
async def test_a_rule_of_a_text_is_said_in_words(api, path, body, words):
    status, refused = await api("POST", path, body)
    assert (status, refused["error"]["message"][: len(words)]) == (422, words)


async def test_a_key_that_has_expired_is_shown_so(api):
    _, made = await api("POST", "/keys", {"account": "acme", "name": "old"})
    past = {"expires_at": "2020-01-01T00:00:00Z"}
    assert (await api("PATCH", f"/keys/{made['id']}", past))[1]["status"] == "expired"
    assert [key["status"] for key in (await api("GET", "/keys?account=acme"))[1] if key["id"] == made["id"]] == [
        "expired"
    ]
    suspended = await api("PATCH", f"/keys/{made['id']}", {"status": "suspended"})
    assert suspended[1]["status"] == "suspended"


async def test_null_takes_away_whatever_it_is(api):
    given = {"name": "ci", "params": {"temperature": 0.5}, "clamp": True, "default_model": "a", "expires_at": "30d"}
    _, made = await api("POST", "/keys", {"account": "acme", **given})
    status, changed = await api("PATCH", f"/keys/{made['id']}", dict.fromkeys(given))
    cleared = {"name": "", "params": {}, "clamp": None, "default_model": None, "expires_at": None}
    assert (status, {name: changed[name] for name in given}) == (200, cleared)


async def test_null_is_no_ref_and_no_note(api):
    status, _ = await api("POST", "/accounts/acme/grants", {"amount_usd": "1", "ref": None, "note": None})
    _, history = await api("GET", "/accounts/acme/grants")
    assert (status, history[0]["ref"], history[0]["note"]) == (201, "", "")


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/keys/{id}/rotate", {"grace": "91d"}, "grace"),
        ("GET", "/usage?group_by=weather", None, "group_by"),
        ("GET", "/keys?limit=0", None, "limit"),
        ("GET", "/usage?acount=acme", None, "acount"),
        ("GET", "/usage?account=acme&account=other", None, "account"),
        ("DELETE", "/keys/{id}?account=acme", None, "account"),
        ("POST", "/keys?account=acme", {"account": "acme"}, "account"),
        ("GET", "/templates/t?account=a%20b", None, "account"),
        ("PATCH", "/keys/{id}", {"budget_usd": -1}, "budget_usd"),
        ("POST", "/keys", {"account": "acme", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
    ],
)
async def test_a_fault_names_its_parameter_in_details(api, method, path, body, param):
    _, made = await api("POST", "/keys", {"account": "acme"})
    _, told = await api(method, path.format(id=made["id"]), body)
    assert (told["error"]["param"], told["error"]["details"][0]["loc"][-1]) == (param, param)


async def test_revoke_rotate_and_revoked_for_ever(api):
    _, made = await api("POST", "/keys", {"account": "acme"})
    status, rotated = await api("POST", f"/keys/{made['id']}/rotate", {"grace": "1h"})
    assert (status, rotated["id"], rotated["key"] != made["key"]) == (200, made["id"], True)
    assert (await api("POST", f"/keys/{made['id']}/rotate"))[0] == 200
    status, gone = await api("DELETE", f"/keys/{made['id']}")
    assert (status, gone["status"]) == (200, "revoked")
    status, answer = await api("PATCH", f"/keys/{made['id']}", {"status": "active"})
    assert (status, answer["error"]["code"]) == (409, "key_revoked")


async def test_neither_the_beginning_of_an_id_nor_a_secret_names_a_key(api):
    _, made = await api("POST", "/keys", {"account": "acme"})
    answers = [await api("DELETE", f"/keys/{name}") for name in (made["id"][:12], made["key"])]
    assert [(status, body["error"]["code"]) for status, body in answers] == [(404, "key_not_found")] * 2


async def test_a_page_after_a_key_that_is_gone_is_no_first_page(api):
    await api("POST", "/keys", {"account": "acme"})
    status, told = await api("GET", "/keys?after=key_gone")
    assert (status, told["error"]["code"]) == (404, "key_not_found")


async def test_a_page_after_an_account_that_is_gone_goes_on_by_name(api):
    for name in ("a", "c"):
        await api("POST", f"/accounts/{name}/grants", {"amount_usd": "1"})
    _, listed = await api("GET", "/accounts?after=b")
    assert [account["account"] for account in listed] == ["c"]


async def test_accounts_grants_and_audit(api):
    grants = "/accounts/acme/grants"
    status, granted = await api("POST", grants, {"amount_usd": "25.10", "ref": "inv-1", "note": "paid"})
    assert (status, granted["balance_usd"]) == (201, "25.10")
    status, again = await api("POST", grants, {"amount_usd": 25.1, "ref": "inv-1"})
    assert (status, again["balance_usd"]) == (200, "25.10")
    status, (grant,) = await api("GET", grants)
    assert (grant["amount_usd"], grant["ref"], grant["note"], grant["actor"]) == (
        "25.10",
        "inv-1",
        "paid",
        "admin:127.0.0.1",
    )
    status, account = await api("GET", "/accounts/acme")
    assert [account[name] for name in ("balance_usd", "held_usd", "available_usd")] == ["25.10", "0.00", "25.10"]
    status, (listed,) = await api("GET", "/accounts")
    assert (listed["account"], listed["available_usd"]) == ("acme", "25.10")
    status, changed = await api("PATCH", "/accounts/acme", {"budget_monthly_usd": "5", "status": "suspended"})
    assert (changed["budgets"]["monthly_usd"], changed["status"]) == ("5.00", "suspended")
    status, events = await api("GET", "/audit?limit=10")
    assert [event["action"] for event in events] == ["account.limits", "credit.grant", "account.create"]
    status, gone = await api("DELETE", "/accounts/acme")
    assert (status, gone["deleted"]) == (200, True)
    assert (await api("GET", "/accounts/acme"))[0] == 404


async def test_pages_name_the_next(client, api):
    for name in ("a", "b", "c"):
        await api("POST", f"/accounts/{name}/grants", {"amount_usd": "1"})
    first = await client.get("/admin/v1/accounts?limit=2", headers=AUTH)
    assert [each["account"] for each in await first.json()] == ["a", "b"]
    following = re.fullmatch(r'<(.+)>; rel="next"', first.headers["link"])[1]
    second = await client.get(following, headers=AUTH)
    assert ([each["account"] for each in await second.json()], second.headers.get("link")) == (["c"], None)


async def test_templates(api):
    body = {"name": "greeter", "system": "Greet {{ name }}."}
    status, made = await api("POST", "/templates?account=acme", body)
    assert (status, made["owner"], made["system"]) == (201, "acme", "Greet {{ name }}.")
    assert [each["name"] for each in (await api("GET", "/templates"))[1]] == ["greeter"]
    assert (await api("GET", "/templates/greeter?account=acme"))[1]["id"] == made["id"]
    assert (await api("GET", "/templates/greeter"))[0] == 404
    assert (await api("DELETE", "/templates/greeter?account=acme"))[1]["deleted"] is True


@pytest.mark.parametrize(
    "method, path, body, status, code",
    [
        ("POST", "/keys", {}, 422, "validation_error"),
        ("POST", "/keys", {"account": "a{b}"}, 422, "validation_error"),
        ("POST", "/keys", {"account": "acme", "brust": 1}, 422, "validation_error"),
        ("POST", "/keys", {"account": "acme", "burst": 0}, 422, "validation_error"),
        ("POST", "/keys", {"account": "acme", "models": []}, 422, "validation_error"),
        ("POST", "/keys", {"account": "acme", "params": {"messages": []}}, 422, "validation_error"),
        ("POST", "/keys", {"account": "acme", "budget_usd": "-1"}, 422, "validation_error"),
        ("POST", "/keys", {"account": "acme", "budget_usd": 1e-20}, 422, "validation_error"),
        ("POST", "/keys", {"account": "acme", "expires_at": "tomorrow"}, 422, "validation_error"),
        ("POST", "/keys", {"account": "acme", "expires_at": "9999-12-31T23:59:59-23:00"}, 422, "validation_error"),
        ("POST", "/accounts/acme/grants", {"amount_usd": "abc"}, 422, "validation_error"),
        ("POST", "/accounts/acme/grants", {"amount_usd": "0"}, 422, "validation_error"),
        ("POST", "/accounts/acme/grants", {"amount_usd": "1", "ref": ""}, 422, "validation_error"),
        ("POST", "/accounts/acme/grants", {"amount_usd": "1", "ref": " "}, 422, "validation_error"),
        ("POST", "/accounts/acme/grants", {"amount_usd": "9000001"}, 422, "validation_error"),
        ("POST", "/accounts/a*b/grants", {"amount_usd": "1"}, 422, "validation_error"),
        ("GET", "/accounts/nobody", None, 404, "account_not_found"),
        ("PATCH", "/accounts/nobody", {}, 404, "account_not_found"),
        ("GET", "/accounts/nobody/grants", None, 404, "account_not_found"),
        ("GET", "/keys?account=nobody", None, 404, "account_not_found"),
        ("GET", "/keys?limit=0", None, 422, "validation_error"),
        ("GET", "/keys/key_none", None, 404, "key_not_found"),
        ("GET", "/usage?account=nobody", None, 404, "account_not_found"),
        ("GET", "/usage?group_by=weather", None, 422, "validation_error"),
        ("GET", "/usage?since=yesterday", None, 422, "validation_error"),
        ("GET", "/requests/none", None, 404, "request_not_found"),
        ("GET", "/nowhere", None, 404, "not_found"),
        ("PUT", "/keys", {}, 405, "method_not_allowed"),
    ],
)
async def test_what_cant_be_is_refused_in_the_envelope(api, method, path, body, status, code):
    answered, answer = await api(method, path, body)
    assert (answered, answer["error"]["code"]) == (status, code)


def test_the_document_has_the_parameters_that_each_path_takes():
    paths = document()["paths"]
    for route in ROUTES:
        parameters = paths[route.path][route.method.lower()]["parameters"]
        assert {each["name"] for each in parameters if each["in"] == "query"} == set(route.query), route.path


@pytest.mark.parametrize("authorization", ["", "Bearer another", "Basic YTpi"])
async def test_everything_wants_the_token(client, authorization):
    for route in ROUTES:
        answer = await client.request(route.method, route.path, headers={"authorization": authorization})
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "unauthorized")


async def test_without_a_token_there_is_none(aiohttp_client, administration):
    client = await aiohttp_client(create_admin(None, None, administration=administration))
    assert (await client.get("/admin/v1/keys")).status == 404


@pytest.mark.parametrize(
    "headers", [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "https://evil.example"}]
)
async def test_another_origins_page_changes_nothing(api, headers):
    status, answer = await api("POST", "/keys", {"account": "acme"}, **headers)
    assert (status, answer["error"]["code"]) == (403, "forbidden")
    assert (await api("GET", "/accounts"))[1] == []


async def test_a_body_is_json(client):
    answer = await client.post("/admin/v1/keys", data="account=acme", headers={**AUTH, "content-type": "text/plain"})
    assert (answer.status, (await answer.json())["error"]["code"]) == (415, "unsupported_media_type")


async def test_the_description_has_every_path(client):
    answer = await (await client.get(OPENAPI_PATH, headers=AUTH)).json()
    assert document() == answer
    described = {(method.upper(), path) for path, methods in answer["paths"].items() for method in methods}
    assert {(route.method, route.path) for route in ROUTES} == described


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"maxmemory": "0", "maxmemory-policy": "allkeys-lru", "save": "3600 1"}, []),
        ({"maxmemory": "1gb", "maxmemory-policy": "noeviction", "save": "3600 1"}, []),
        (
            {"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru", "save": "3600 1"},
            ["maxmemory-policy is allkeys-lru"],
        ),
        ({"maxmemory": "0", "maxmemory-policy": "noeviction", "save": ""}, ["appendonly is no"]),
    ],
)
async def test_a_store_that_may_forget_money_is_doubted(administration, store_server, settings, words):
    with redis.Redis.from_url(store_server, decode_responses=True) as client:
        before = {name: client.config_get(name)[name] for name in settings}
        for name, value in settings.items():
            client.config_set(name, value)
        try:
            doubts = await store_warnings(administration.store)
        finally:
            for name, value in before.items():
                client.config_set(name, value)
    assert [doubt.partition(":")[0].partition(" and ")[0] for doubt in doubts] == words
