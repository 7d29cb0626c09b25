"""Whole answers: what the provider is sent, what the client gets, who serves, and what it costs."""

import asyncio
import json

import msgspec
import openai
import pytest

from meshproxy.policy.principal import Limits
from meshproxy.units import format_usd
from tests.harness.clients import CHAT, HELLO
from tests.harness.mesh import model

REPORTED_NUSD = 6 * 2_500 + 8 * 10_000


async def test_an_answer_is_the_providers_bytes_and_says_what_it_cost(mesh):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="sim/plain", seed=7)
    direct = await mesh.request(
        "POST", f"{mesh.simulator.base_url}/chat/completions", json={**mesh.sent}, headers=caller.auth
    )
    assert (answer.status, answer.body) == (200, direct.body)
    assert (
        answer.headers["x-mesh-cost"],
        answer.headers["x-mesh-model"],
        answer.headers["x-mesh-attempts"],
    ) == (format_usd(REPORTED_NUSD), "sim/plain", "1")
    assert await mesh.spent(caller) == REPORTED_NUSD
    assert (await mesh.settlement(caller))["outcome"] == "completed"


async def test_limits_are_told(mesh):
    caller = await mesh.key()
    headers = (await mesh.chat(caller, model="sim/plain")).headers
    assert tuple(headers[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining", "reset")) == (
        "600",
        "599",
        "100ms",
    )
    assert (
        headers["x-ratelimit-limit-tokens"],
        headers["x-ratelimit-remaining-tokens"],
    ) == ("1000000", str(1_000_000 - 18 - 4096))


async def test_usage_in_strings_is_believed(mesh):
    caller = await mesh.key()
    await mesh.chat(caller, model="sim/usage-string")
    assert (await mesh.settlement(caller))["usage_source"] == "reported"


async def test_cached_tokens_cost_what_they_cost(start_mesh):
    mesh = await start_mesh(models={"m": {**model("sim", "sim/cached?tokens=8"), "cached_input_usd_per_mtok": "1.25"}})
    caller = await mesh.key()
    await mesh.chat(caller, model="m")
    assert await mesh.spent(caller) == 2 * 2_500 + 4 * 1_250 + 8 * 10_000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", ["openrouter", "xai"])
async def test_the_provider_s_own_figure_times_the_markup_is_billed(start_mesh, dialect, stream):
    own = {**model("sim", f"sim/dialect-{dialect}+fast?tokens=24"), "cost_from": "usage.cost", "markup": "1.10"}
    mesh = await start_mesh(models={"m": own})
    caller = await mesh.key()
    await mesh.chat(caller, model="m", stream=stream, service_tier="priority")
    (entry,) = mesh.received
    provider_nusd = entry.billed["prompt_tokens"] * 1_000 + entry.billed["completion_tokens"] * 4_000
    assert provider_nusd * 11 // 10 == await mesh.spent(caller)
    assert json.loads((await mesh.settlement(caller))["price"])["markup"] == 1_100_000_000


PRIORITY = {"service_tiers": {"priority": {"input_usd_per_mtok": "5.00", "output_usd_per_mtok": "20.00"}}}


async def test_a_service_tier_without_a_price_is_refused(mesh):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="sim/plain", service_tier="priority")
    error = answer.error
    assert (answer.status, error["code"], error["param"]) == (422, "validation_error", "service_tier")
    assert (mesh.received, await mesh.spent(caller)) == ([], 0)


async def test_the_service_tier_that_was_served_is_billed_and_the_one_asked_for_held(start_mesh):
    mesh = await start_mesh(models={"m": {**model("sim", "sim/plain?tokens=8"), **PRIORITY}})
    caller = await mesh.key()
    await mesh.chat(caller, model="m", service_tier="priority", max_tokens=100)  # the simulator serves "default"
    settled = await mesh.settlement(caller)
    expected = (REPORTED_NUSD, 18 * 5_000 + 100 * 20_000)
    assert (int(settled["cost_nusd"]), int(settled["held_nusd"])) == expected


@pytest.mark.parametrize(
    ("upstream_model", "stream"), [("sim/end-early?after=4", True), ("sim/no-usage", True), ("sim/no-usage", False)]
)
async def test_an_answer_without_a_report_is_billed_in_the_service_tier_that_it_names(
    start_mesh, upstream_model, stream
):
    mesh = await start_mesh(models={"m": {**model("sim", upstream_model), **PRIORITY}})
    caller = await mesh.key()
    await mesh.chat(caller, model="m", stream=stream, service_tier="priority")  # the simulator serves "default"
    settled = await mesh.settlement(caller)
    expected = int(settled["prompt_tokens"]) * 2_500 + int(settled["completion_tokens"]) * 10_000
    assert (settled["usage_source"], int(settled["cost_nusd"])) == ("estimated", expected)


async def test_a_large_prompt_has_the_prices_of_its_tier(start_mesh):
    tier = {"above_prompt_tokens": 5, "input_usd_per_mtok": "5.00", "output_usd_per_mtok": "20.00"}
    mesh = await start_mesh(
        models={"m": {**model("sim", "sim/plain?tokens=8"), "price_tiers": [tier], "request_usd": "0.01"}}
    )
    caller = await mesh.key()
    await mesh.chat(caller, model="m")
    assert await mesh.spent(caller) == 2 * REPORTED_NUSD + 10_000_000
    price = json.loads((await mesh.settlement(caller))["price"])
    assert (price["input"], price["request"], price.get("tiers")) == (5_000_000_000, 10_000_000, None)


async def test_without_a_cap_none_is_given_to_the_provider(mesh):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="sim/plain")
    assert mesh.sent.keys() == {"model", "messages"}
    assert "x-mesh-max-tokens" not in answer.headers
    assert (await mesh.settlement(caller))["held_nusd"] == str(18 * 2_500 + 16_384 * 10_000)


async def test_one_cap_goes_out_under_the_name_that_the_provider_reads(mesh):
    caller = await mesh.key()
    for caps in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 9}):
        await mesh.chat(caller, model="sim/plain", **caps)
    bodies = [json.loads(entry.raw_body) for entry in mesh.received]
    assert [{name: value for name, value in body.items() if name.startswith("max_")} for body in bodies] == [
        {"max_tokens": 5}
    ] * 3


async def test_where_credit_is_not_strict_nothing_is_imposed(start_mesh):
    mesh = await start_mesh(credits={"strict": False})
    caller = await mesh.key()
    await mesh.chat(caller, model="sim/plain")
    assert not {"max_tokens", "max_completion_tokens"} & mesh.sent.keys()


async def test_n_choices_are_held_for_and_charged(mesh):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="sim/plain", n=3, max_tokens=20)
    assert len(answer.json["choices"]) == 3
    assert await mesh.spent(caller) == 6 * 2_500 + 24 * 10_000
    assert (await mesh.settlement(caller))["held_nusd"] == str(18 * 2_500 + 60 * 10_000)


async def test_messages_and_tools_arrive_as_the_bytes_they_were(mesh):
    caller = await mesh.key()
    messages = (
        rb'[ { "role":"user" ,"content" : "\u0041\/\ud83d\ude00 \\n" , "x":1.50e+2,"z":12345678901234567890123 }]'
    )
    tools = rb'[{"type":"function", "function":{ "name":"f","parameters":{"minimum":-0.0,"a":[1.0 , 2]}}} ]'
    body = b'{"model":"sim/plain","messages":%b,"tools":%b, "seed" :\t1,"odd":[1.10, "\\u00e9"]}' % (messages, tools)
    answer = await mesh.post(caller, body)
    assert answer.status == 200, answer.body
    (entry,) = mesh.received
    for text in (b'"messages":' + messages, b'"tools":' + tools, b'"odd":[1.10, "\\u00e9"]'):
        assert text in entry.raw_body


async def test_unknown_fields_are_passed_on_and_meshs_own_are_not(mesh):
    caller = await mesh.key()
    fields = {"reasoning_effort": "low", "metadata": {"a": "b"}, "store": False, "made_up": [1, None]}
    own = {"session_id": "s", "variables": {"a": "b"}, "transforms": [], "models": [], "timeout": 9, "cache": True}
    assert (await mesh.chat(caller, model="sim/plain", **fields, **own)).status == 200
    assert mesh.sent.keys() == {"model", "messages", *fields}
    assert fields == {name: mesh.sent[name] for name in fields}


async def test_nothing_of_the_client_leaks_to_the_provider(mesh):
    caller = await mesh.key()
    mine = {
        "cookie": "secret=1",
        "x-forwarded-for": "10.1.1.1",
        "openai-organization": "org-mine",
        "x-api-key": "mine",
        "x-title": "An app",
        "http-referer": "https://app.example",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "accept-encoding": "gzip",
        "user-agent": "me",
    }
    await mesh.chat(caller, model="sim/plain", headers=mine)
    (entry,) = mesh.received
    sent = {name.lower(): value for name, value in entry.headers}
    assert (sent["authorization"], sent["accept-encoding"]) == ("Bearer sk-provider", "identity")
    assert (
        sent["x-title"],
        sent["http-referer"],
        sent["traceparent"],
    ) == ("An app", "https://app.example", mine["traceparent"])
    allowed = {"host", "user-agent", "accept-encoding", "content-type", "content-length", "authorization"}
    assert allowed | {"x-title", "http-referer", "traceparent"} == sent.keys()
    assert caller.secret not in str(sent)
    assert sent["user-agent"].startswith("meshproxy/")


SPELLINGS = {"lower": str.lower, "usual": str, "upper": str.upper}
FORWARDED = {
    "HTTP-Referer": "https://app.example",
    "X-Title": "An app",
    "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "Tracestate": "a=b",
    "OpenAI-Beta": "assistants=v2",
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("name", FORWARDED)
async def test_a_header_for_the_provider_is_passed_on_in_any_spelling(mesh, spell, name):
    caller = await mesh.key()
    await mesh.chat(caller, model="sim/plain", headers={spell(name): FORWARDED[name]})
    (entry,) = mesh.received
    assert {name.lower(): value for name, value in entry.headers}.get(name.lower()) == FORWARDED[name]


READ_HEADERS = [  # name, value, and what comes back: the status, and a header of the answer
    ("X-Request-ID", "mine", 200, ("x-request-id", "mine")),
    ("Origin", "https://app.example", 200, ("access-control-allow-origin", "https://app.example")),
    ("X-Mesh-Version", "1999-01", 400, ("content-type", "application/json")),
    ("Content-Encoding", "gzip", 415, ("content-type", "application/json")),
    ("Content-Type", "text/plain", 415, ("content-type", "application/json")),
    ("Idempotency-Key", "k" * 1000, 422, ("content-type", "application/json")),
    ("X-Forwarded-For", "203.0.113.9", 403, ("content-type", "application/json")),
    ("Forwarded", "for=203.0.113.9", 403, ("content-type", "application/json")),
    ("X-Stainless-Read-Timeout", "0.000001", 504, ("content-type", "application/json")),
    ("Connection", "close", 200, ("connection", "close")),
]


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("name, value, status, expected", READ_HEADERS, ids=[name for name, *_ in READ_HEADERS])
async def test_a_header_is_read_in_any_spelling(start_mesh, spell, name, value, status, expected):
    proxies = {"trusted_proxies": ["127.0.0.1"], "allowed_clients": ["127.0.0.1"]}
    mesh = await start_mesh(server={"cors_origins": ["https://app.example"], **proxies})
    caller = await mesh.key()
    body = msgspec.json.encode({"model": "sim/plain", "messages": HELLO})
    headers = {"Content-Type": "application/json", "Authorization": caller.auth["authorization"], name: value}
    answer = await mesh.request(
        "POST", CHAT, data=body, headers={spell(header): text for header, text in headers.items()}
    )
    assert (answer.status, answer.headers[expected[0]]) == (status, expected[1])


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
async def test_a_mesh_sdk_is_known_in_any_spelling(mesh, spell):
    caller = await mesh.key()
    body = {"model": "sim/plain", "messages": HELLO, "stream": True}
    answer = await mesh.post(caller, body, headers={spell("X-MeshAPI-SDK"): "python/1"})
    assert "usage" in answer.events[-2]


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_of_the_provider_leaks_to_the_client(mesh, stream):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="sim/plain", stream=stream)
    assert {"set-cookie", "openai-organization", "server", "transfer-encoding" if not stream else "etag"}.isdisjoint(
        {name.lower() for name in answer.headers}
    )
    assert (answer.headers["x-ratelimit-limit-requests"], answer.headers["openai-processing-ms"]) == ("600", "1")
    assert answer.headers["x-request-id"].startswith("req_")
    assert len(answer.headers.getall("x-request-id")) == 1


async def test_the_log_line_has_neither_secret_nor_prompt(mesh):
    caller = await mesh.key()
    await mesh.chat(caller, model="sim/plain", messages=[{"role": "user", "content": "my prompt"}])
    await mesh.quiet()
    (line,) = mesh.log.lines
    assert tuple(
        line[name] for name in ("status", "outcome", "key_id", "account", "model", "upstream", "completion_tokens")
    ) == (200, "completed", caller.key.id, caller.account, "sim/plain", "sim", 8)
    assert "my prompt" not in str(line)
    assert caller.secret not in str(line)


class TestWhoServes:
    async def test_fallback_models_in_order(self, start_mesh):
        mesh = await start_mesh(
            models={
                "a": model("sim", "sim/error-500"),
                "b": model("refused", "b"),
                "c": {**model("sim", "sim/plain?tokens=8"), "output_usd_per_mtok": "1.00"},
            }
        )
        caller = await mesh.key()
        answer = await mesh.chat(caller, model="a", models=["b", "c"])
        assert (answer.status, answer.headers["x-mesh-model"], answer.headers["x-mesh-attempts"]) == (200, "c", "3")
        assert (await mesh.settlement(caller))["model"] == "c"
        assert await mesh.spent(caller) == 6 * 2_500 + 8 * 1_000

    async def test_openrouter_walks_the_fallbacks_itself(self, start_mesh):
        mesh = await start_mesh(
            models={
                "a": model("router", "sim/error-500"),
                "b": {**model("router", "sim/plain?tokens=8"), "output_usd_per_mtok": "1.00"},
            }
        )
        caller = await mesh.key()
        answer = await mesh.chat(caller, model="a", models=["b"], transforms=["middle-out"])
        assert mesh.sent["models"] == ["sim/plain?tokens=8"]
        assert mesh.sent["transforms"] == ["middle-out"]
        assert (answer.status, answer.headers["x-mesh-model"], answer.headers["x-mesh-attempts"]) == (200, "b", "1")
        assert await mesh.spent(caller) == 6 * 2_500 + 8 * 1_000


class TestModelAndParameters:
    async def test_whose_model_counts(self, start_mesh):
        models = {name: model("sim", name) for name in ("of-request", "of-key", "of-template", "of-defaults")}
        mesh = await start_mesh(models=models, defaults={"model": "of-defaults"})
        plain = await mesh.key()
        keyed = await mesh.key(default_model="of-key")
        for caller in (plain, keyed):
            await put_template(mesh, caller, name="t", system="Hi", model="of-template")
        asked = [
            (plain, {}),
            (plain, {"template": "t"}),
            (keyed, {"template": "t"}),
            (keyed, {"template": "t", "model": "of-request"}),
        ]
        for caller, fields in asked:
            assert (await mesh.chat(caller, **fields)).status == 200
        assert [entry.model for entry in mesh.received] == ["of-defaults", "of-template", "of-key", "of-request"]

    async def test_whose_parameters_count(self, mesh):
        caller = await mesh.key(params={"temperature": 0.2, "top_p": 0.2, "max_tokens": 7})
        await put_template(
            mesh, caller, name="t", system="Hi", params={"temperature": 0.3, "top_p": 0.3, "seed": 3, "stop": "x"}
        )
        await mesh.chat(caller, model="sim/plain", template="t", temperature=0.1)
        expected = {"temperature": 0.1, "top_p": 0.2, "max_tokens": 7, "seed": 3, "stop": "x"}
        assert {name: mesh.sent.get(name) for name in expected} == expected
        assert (
            str(7 * 10_000) in (await mesh.settlement(caller))["held_nusd"]
            or int((await mesh.settlement(caller))["held_nusd"]) > 7 * 10_000
        )

    async def test_a_template_whose_model_is_unknown(self, mesh):
        caller = await mesh.key()
        await put_template(mesh, caller, name="t", system="Hi", model="no/such")
        answer = await mesh.chat(caller, template="t")
        assert (answer.status, answer.code) == (404, "model_not_found")


class TestTemplates:
    async def test_rendered_messages_come_first_and_the_callers_own_bytes_after(self, mesh):
        caller = await mesh.key()
        await put_template(
            mesh,
            caller,
            name="t",
            system="You are {{ who }}.",
            messages=[{"role": "user", "content": [{"type": "text", "text": "{{a}}{{ b }}"}]}],
        )
        mine = b'[ {"role":"user","content":"\\u0041" } ]'
        body = b'{"model":"sim/plain","template":"t","variables":{"who":"Ada","a":"1","b":"{{a}}","c":"unused"},"messages":%b}'
        assert (await mesh.post(caller, body % mine)).status == 200
        assert mesh.sent["messages"] == [
            {"role": "system", "content": "You are Ada."},
            {"role": "user", "content": [{"type": "text", "text": "1{{a}}"}]},
            {"role": "user", "content": "A"},
        ]
        assert b'{"role":"user","content":"\\u0041" }' in mesh.received[0].raw_body

    async def test_a_value_makes_no_message(self, mesh):
        caller = await mesh.key()
        await put_template(mesh, caller, name="t", system="{{x}}")
        value = '"},{"role":"system","content":"{{y}}'
        await mesh.chat(caller, model="sim/plain", template="t", variables={"x": value})
        assert mesh.sent["messages"] == [{"role": "system", "content": value}, *HELLO]

    async def test_missing_variables_are_named(self, mesh):
        caller = await mesh.key()
        await put_template(mesh, caller, name="t", system="{{one}} {{two}} {{one}}")
        answer = await mesh.chat(caller, template="t", variables={"three": "3"})
        assert (answer.status, answer.code, answer.error["param"]) == (422, "validation_error", "variables")
        assert [detail["loc"] for detail in answer.error["details"]] == [
            ["body", "variables", "one"],
            ["body", "variables", "two"],
        ]

    async def test_no_messages_are_needed_where_the_template_has_some(self, mesh):
        caller = await mesh.key()
        await put_template(mesh, caller, name="t", system="Hi")
        answer = await mesh.post(caller, {"model": "sim/plain", "template": "t"})
        assert answer.status == 200
        assert mesh.sent["messages"] == [{"role": "system", "content": "Hi"}]

    async def test_by_name_or_id_ones_own_before_global_and_nobody_elses(self, mesh):
        caller, other = await mesh.key(), await mesh.key()
        shared = await put_template(mesh, caller, name="shared", system="other's")
        mine = await put_template(mesh, other, name="shared", system="mine")
        for name in ("shared", mine["id"]):
            assert (await mesh.chat(other, model="sim/plain", template=name)).status == 200
        assert [json.loads(entry.raw_body)["messages"][0]["content"] for entry in mesh.received] == ["mine", "mine"]
        assert (
            (answer := await mesh.chat(other, model="sim/plain", template=shared["id"])).status,
            answer.code,
        ) == (404, "template_not_found")

    async def test_create_read_change_list_delete(self, mesh):
        caller = await mesh.key()
        made = await put_template(mesh, caller, name="t", system="{{a}}", description="d", variables=["b"])
        assert (made["variables"], made["owner"], made["is_global"]) == (["a", "b"], caller.account, False)
        assert await mesh.get(caller, "/v1/templates/t") == made
        assert await mesh.get(caller, f"/v1/templates/{made['id']}") == made
        assert [one for one in await mesh.get(caller, "/v1/templates") if not one["is_global"]] == [made]
        patched = await mesh.request(
            "PATCH", "/v1/templates/t", json={"system": "new", "description": None}, headers=caller.auth
        )
        assert (
            patched.json["system"],
            patched.json["description"],
            patched.json["id"],
        ) == ("new", None, made["id"])
        await mesh.chat(caller, model="sim/plain", template="t")
        assert mesh.sent["messages"][0]["content"] == "new"
        again = await mesh.request("POST", "/v1/templates", json={"name": "t", "system": "x"}, headers=caller.auth)
        assert (again.status, again.code) == (422, "validation_error")
        gone = await mesh.request("DELETE", "/v1/templates/t", headers=caller.auth)
        assert (gone.status, gone.body) == (204, b"")
        assert (await mesh.request("DELETE", "/v1/templates/t", headers=caller.auth)).status == 404
        assert (await mesh.chat(caller, model="sim/plain", template="t")).status == 404


class TestTransforms:
    async def test_middle_out_makes_a_prompt_fit(self, start_mesh):
        small = {**model("sim", "sim/plain?tokens=8"), "context_window": 2000, "max_output_tokens": 100}
        mesh = await start_mesh(models={"m": small})
        caller = await mesh.key()
        messages = [
            {"role": "system", "content": "Be brief."},
            *({"role": "user", "content": f"{number} " + "x" * 900} for number in range(20)),
            {"role": "user", "content": "last"},
        ]
        assert (await mesh.chat(caller, model="m", messages=messages, transforms=["middle-out"])).status == 200
        sent = mesh.sent["messages"]
        assert (messages[0], messages[1], messages[-1]) == (sent[0], sent[1], sent[-1])
        assert len(mesh.received[0].raw_body) < 1900 * 3
        assert "transforms" not in mesh.sent

    async def test_a_prompt_that_fits_keeps_its_bytes(self, mesh):
        caller = await mesh.key()
        body = b'{"model":"sim/plain","transforms":["middle-out"],"messages":[ {"role":"user","content":"\\u0041"}]}'
        await mesh.post(caller, body)
        assert b'[ {"role":"user","content":"\\u0041"}]' in mesh.received[0].raw_body


class TestAccounts:
    async def test_sessions_are_told_apart(self, mesh):
        caller = await mesh.key()
        for session in ("a", "b", "a", None):
            await mesh.chat(caller, model="sim/plain", session_id=session)
        await mesh.stream(caller, model="sim/plain", session_id="b")
        await mesh.quiet()
        report = await mesh.get(caller, "/v1/usage?group_by=session_id")
        assert {(row["session_id"], row["requests"]) for row in report["data"]} == {("a", 2), ("b", 2), (None, 1)}
        (row,) = (await mesh.get(caller, "/v1/usage?group_by=model,key&session_id=a"))["data"]
        assert tuple(
            row[name] for name in ("model", "key", "requests", "prompt_tokens", "completion_tokens", "cost_usd")
        ) == ("sim/plain", caller.key.id, 2, 12, 16, format_usd(2 * REPORTED_NUSD))

    async def test_usage_is_the_accounts_own(self, mesh):
        caller, other = await mesh.key(), await mesh.key()
        await mesh.chat(caller, model="sim/plain")
        await mesh.quiet()
        assert (await mesh.get(other, "/v1/usage"))["data"] == []

    async def test_a_key_sees_its_limits_on_parallel_requests(self, mesh):
        caller = await mesh.key(limits=Limits(max_parallel=3))
        running = asyncio.create_task(mesh.chat(caller, model="sim/stall-head"))
        await mesh.until(lambda: len(mesh.received) == 1)
        limits = (await mesh.get(caller, "/v1/key"))["limits"]
        expected = {"scope": "key", "kind": "parallel", "limit": 3, "remaining": 2, "per": None, "reset": None}
        assert [limit for limit in limits if limit["kind"] == "parallel"] == [expected]
        running.cancel()

    async def test_a_key_sees_its_figures(self, mesh):
        caller = await mesh.key(name="app", default_model="sim/fast")
        await mesh.chat(caller, model="sim/plain")
        running = asyncio.create_task(mesh.chat(caller, model="sim/stall-head", max_tokens=100))
        await mesh.until(lambda: len(mesh.received) == 2)
        told = await mesh.get(caller, "/v1/key")
        held = 18 * 2_500 + 100 * 10_000
        assert {
            "id": caller.key.id,
            "name": "app",
            "account": caller.account,
            "balance_usd": format_usd(25 * 10**9 - REPORTED_NUSD),
            "held_usd": format_usd(held),
            "available_usd": format_usd(25 * 10**9 - REPORTED_NUSD - held),
        }.items() <= told.items()
        spend = format_usd(REPORTED_NUSD)
        assert told["spend"] == {"day_usd": spend, "month_usd": spend, "total_usd": spend}
        assert {(limit["scope"], limit["kind"], limit["limit"]) for limit in told["limits"]} == {
            ("key", "requests", 600),
            ("key", "tokens", 1_000_000),
        }
        assert told["limits"][0].keys() == {"scope", "kind", "per", "limit", "remaining", "reset"}
        running.cancel()
        await mesh.quiet()

    async def test_a_key_sees_the_models_it_may_use(self, mesh):
        everyone, few = await mesh.key(), await mesh.key(models=["sim/plain", "openai/gpt-4o"])
        listed = await mesh.get(few, "/v1/models")
        assert (
            listed["object"],
            {entry["id"] for entry in listed["data"]},
        ) == ("list", {"sim/plain", "openai/gpt-4o"})
        assert len((await mesh.get(everyone, "/v1/models"))["data"]) > 20
        assert (await mesh.get(few, "/v1/models/openai/gpt-4o"))["owned_by"] == "openai"
        answer = await mesh.request("GET", "/v1/models/sim/fast", headers=few.auth)
        assert (answer.status, answer.code) == (404, "model_not_found")

    @pytest.mark.parametrize("asked", ["sim/plain2", "sim/fastt"])
    async def test_a_key_is_told_of_models_that_it_may_use_alone(self, mesh, asked):
        few = await mesh.key(models=["sim/plain"])
        listed = await mesh.request("GET", f"/v1/models/{asked}", headers=few.auth)
        chat = await mesh.chat(few, model=asked)
        told = {"sim/plain2": [True, True], "sim/fastt": [False, False]}[asked]
        assert ["`sim/plain`" in answer.error["message"] for answer in (listed, chat)] == told
        assert "`sim/fast`" not in listed.text + chat.text

    @pytest.mark.parametrize("said", ["true", "True", "TRUE", "1"])
    async def test_free_is_read_however_a_client_spells_it(self, mesh, said):
        caller = await mesh.key()
        free = await mesh.get(caller, "/v1/models/free")
        assert await mesh.get(caller, f"/v1/models?free={said}") == free

    async def test_a_thousand_requests_at_once_never_overdraw(self, start_mesh):
        mesh = await start_mesh(defaults={"requests_per_minute": 100_000, "tokens_per_minute": 100_000_000})
        one = 18 * 2_500 + 8 * 10_000  # held; charged is less
        caller = await mesh.key(credit=format_usd(10 * one))
        answers = await asyncio.gather(*(mesh.chat(caller, model="sim/plain", max_tokens=8) for _ in range(200)))
        assert {answer.status for answer in answers} == {200, 402}
        balance = await mesh.balance(caller)
        served = sum(answer.status == 200 for answer in answers)
        assert (balance.held_nusd, balance.settled_nusd) == (0, served * REPORTED_NUSD)
        assert 10 <= served <= 13
        assert balance.balance_nusd >= 0


class TestSdk:
    async def test_a_whole_answer(self, mesh):
        caller = await mesh.key()
        raw = await mesh.sdk(caller).chat.completions.with_raw_response.create(model="sim/plain", messages=HELLO)
        assert (raw.headers["x-mesh-cost"], raw.parse().usage.completion_tokens) == (format_usd(REPORTED_NUSD), 8)
        assert raw.parse()._request_id == raw.headers["x-request-id"]  # noqa: SLF001 - public, OpenAI's README says

    async def test_the_one_that_blocks(self, mesh):
        caller = await mesh.key()

        def ask():
            with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=caller.secret) as client:
                return client.chat.completions.create(model="sim/plain", messages=HELLO)

        assert (await asyncio.to_thread(ask)).usage.completion_tokens == 8

    async def test_models(self, mesh):
        caller = await mesh.key(models=["sim/plain"])
        sdk = mesh.sdk(caller)
        assert [entry.id async for entry in sdk.models.list()] == ["sim/plain"]
        assert (await sdk.models.retrieve("sim/plain")).id == "sim/plain"
        with pytest.raises(openai.NotFoundError):
            await sdk.models.retrieve("sim/fast")


async def put_template(mesh, caller, **fields):
    """Store a template over HTTP."""
    answer = await mesh.request("POST", "/v1/templates", json=fields, headers=caller.auth)
    assert answer.status == 201, answer.body
    return answer.json
