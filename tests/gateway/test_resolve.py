import json

import pytest

from meshproxy.config import Credits, Defaults, Model, Route, Server, Settings, Upstream
from meshproxy.errors import GatewayError
from meshproxy.gateway.exchange import ActiveConfig
from meshproxy.gateway.resolve import resolve
from meshproxy.policy.catalog import Catalog
from meshproxy.policy.template import Template
from tests.gateway.parts import principal

URL = "http://127.0.0.1:1"
UPSTREAMS = {
    "openai": Upstream(kind="openai", base_url="https://api.openai.com/v1"),
    "plain": Upstream(kind="openai", base_url=URL, stream_usage=False),
    "router": Upstream(kind="openrouter", base_url=URL),
    "local": Upstream(kind="simulator", base_url=URL),
}
TEMPLATE = Template(id="t", name="t", created_at=0, updated_at=0, system="You are {{who}}.", model="small")
HELLO = [{"role": "user", "content": "Hi"}]


def model(*upstreams, size=1000, price="1.00", **fields):
    routes = [Route(upstream=upstream, model=f"{upstream}-model") for upstream in upstreams]
    return Model(
        upstreams=routes, max_output_tokens=size, input_usd_per_mtok=price, output_usd_per_mtok=price, **fields
    )


def active(*, server, **credit):
    models = {
        "large": model("openai", size=8000),
        "small": model("local", size=100),
        "dear": model("local", price="9.00"),
        "secretive": model("local", hidden_reasoning=True),
        "narrow": model("local", context_window=8192),
        "narrow too": model("local", context_window=8192),
        "routed narrow": model("router", context_window=8192),
        "plain": model("plain"),
        "routed": model("router"),
        "routed too": model("router", price="3.00"),
    }
    settings = Settings(
        server=server,
        upstreams=UPSTREAMS,
        models=models,
        defaults=Defaults(model="large"),
        credits=Credits(**credit),
    )
    return ActiveConfig(1, settings, Catalog(settings), {}, frozenset())


class Directory:
    @property
    def templates(self):
        return self

    async def find(self, account, name):
        return TEMPLATE if name == "t" else None


async def resolved(*, caller=None, credit=None, server=None, **fields):
    body = json.dumps({"messages": HELLO, **fields}).encode()
    served = active(server=Server(**(server or {})), **(credit or {}))
    return await resolve(body, caller or principal(), served, Directory(), 0.0)


async def sent(**fields):
    plan = await resolved(**fields)
    return json.loads(plan.body_for(plan.candidates[0]))


async def test_the_model_of_the_request_the_key_the_template_and_the_defaults():
    keyed = principal(default_model="dear")
    assert (await resolved()).model == "large"
    assert (await resolved(template="t", variables={"who": "Ada"})).model == "small"
    assert (await resolved(caller=keyed, template="t", variables={"who": "Ada"})).model == "dear"
    assert (await resolved(caller=keyed, model="routed")).model == "routed"


@pytest.mark.parametrize(
    ("fields", "caller", "expected"),
    [
        ({"model": "nope"}, None, (404, "model_not_found")),
        ({"models": ["nope"]}, None, (404, "model_not_found")),
        ({"template": "nope"}, None, (404, "template_not_found")),
        ({"template": "t"}, None, (422, "validation_error")),
        ({"model": "small"}, principal(models=["large"]), (403, "forbidden")),
        ({"models": ["small"]}, principal(models=["large"]), (403, "forbidden")),
        ({"n": 0}, None, (422, "validation_error")),
    ],
)
async def test_what_cannot_be_resolved(fields, caller, expected):
    with pytest.raises(GatewayError) as raised:
        await resolved(caller=caller, **fields)
    assert (raised.value.response.status, raised.value.response.code) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (4096, 8000)),
        ({"max_tokens": 10}, (10, 10)),
        ({"max_completion_tokens": 10, "max_tokens": 20}, (10, 10)),
        ({"max_completion_tokens": 20, "max_tokens": 10}, (10, 10)),
        ({"max_tokens": 100_000}, (8000, 100_000)),
        ({"max_tokens": 1_000_000}, (8000, 128_000)),
        ({"stream": True}, (4096, 8000)),
        ({"stream": True, "max_tokens": 10}, (10, 10)),
        ({"model": "small"}, (100, 100)),
        ({"models": ["small"]}, (100, 8000)),
        ({"models": ["small"], "max_tokens": 5000}, (5000, 5000)),
        ({"models": ["small"], "stream": True}, (100, 8000)),
        ({"credit": {"strict": False}}, (4096, 8000)),
    ],
)
async def test_how_much_may_be_said(fields, expected):
    plan = await resolved(**fields)
    assert (plan.output_cap, plan.output_limit, plan.imposed_cap) == (*expected, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"stream": True}, False),
        ({"stream": True, "reasoning": {"exclude": True}}, True),
        ({"stream": True, "model": "secretive"}, True),
        ({"stream": True, "models": ["secretive"]}, True),
    ],
)
async def test_what_is_held_whole(fields, expected):
    assert (await resolved(**fields)).holds_whole == expected


@pytest.mark.parametrize(
    "member",
    ["functions", "response_format", "documents", "chat_template_kwargs", "tools", "prediction", "knowledge"],
)
async def test_everything_that_goes_out_counts_towards_the_prompt(member):
    bare = (await resolved()).prompt_tokens
    plan = await resolved(**{member: [{"it": " stone" * 9000}]})
    assert 18_000 <= plan.prompt_tokens - bare < 18_010


@pytest.mark.parametrize(
    "fields", [{"session_id": "s" * 200}, {"cache": ["x" * 900]}, {"user": "u" * 200}, {"stop": "s" * 200}]
)
async def test_what_no_model_reads_counts_for_nothing(fields):
    assert (await resolved()).prompt_tokens == (await resolved(**fields)).prompt_tokens


async def test_a_prompt_is_held_for_at_most_the_window():
    messages = [{"role": "user", "content": "word " * 100_000}]
    assert (await resolved(messages=messages)).prompt_tokens == 128_000


@pytest.mark.parametrize(
    ("words", "models", "expected"),
    [
        (20_000, ["narrow", "large"], ["large"]),
        (20_000, ["narrow", "narrow too", "large"], ["large"]),
        (20_000, ["large", "narrow"], ["large"]),
        (100, ["narrow", "large"], ["narrow", "large"]),
        (8_000, ["narrow", "large"], ["narrow", "large"]),
        (20_000, ["narrow", "narrow too"], ["narrow", "narrow too"]),
        (20_000, ["routed narrow", "large"], ["routed narrow", "large"]),
    ],
)
async def test_fallbacks_whose_window_is_surely_too_small_are_skipped(words, models, expected):
    messages = [{"role": "user", "content": " river" * words}]
    plan = await resolved(model=models[0], models=models[1:], messages=messages)
    assert [candidate.model for candidate in plan.candidates] == expected


async def test_what_middle_out_makes_fit_skips_nothing():
    messages = [{"role": "user", "content": " river" * 20_000}]
    plan = await resolved(model="narrow", models=["large"], messages=messages, transforms=["middle-out"])
    assert [candidate.model for candidate in plan.candidates] == ["narrow", "large"]
    assert len(plan.body_for(plan.candidates[0])) < 8192 * 3 < 120_000 < len(plan.body_for(plan.candidates[1]))


async def test_middle_out_is_done_once_for_each_window():
    messages = [{"role": "user", "content": " river" * 20_000}]
    plan = await resolved(model="narrow", messages=messages, transforms=["middle-out"])
    assert plan.prompt.fitted(1000) is plan.prompt.fitted(1000)


async def test_the_dearest_that_may_serve_is_held_for():
    plan = await resolved(models=["dear"])
    assert 9_000 * (plan.prompt_tokens + 10) == plan.hold_nusd(10)
    plan = await resolved(model="routed", models=["routed too"])
    assert 3_000 * (plan.prompt_tokens + 10) == plan.hold_nusd(10)


async def test_the_cap_goes_by_the_name_that_the_provider_knows():
    caps = {"max_completion_tokens": 10, "max_tokens": 20}
    assert {name: value for name, value in (await sent(**caps)).items() if name in caps} == {
        "max_completion_tokens": 10
    }
    asked = await sent(model="small", **caps)
    assert {name: value for name, value in asked.items() if name in caps} == {"max_tokens": 10}


async def test_nothing_is_put_into_a_request():
    assert (await sent()).keys() == {"model", "messages"}
    assert (await sent(model="plain", stream=True)).keys() == {"model", "messages", "stream"}


async def test_meshs_own_fields_stay_here_and_openrouters_go_on():
    fields = {"transforms": ["middle-out"], "models": ["routed too"], "session_id": "s"}
    assert (await sent(**fields)).keys() == {"model", "messages"}
    assert (
        (body := await sent(model="routed", **fields))["models"],
        body["transforms"],
    ) == (["router-model"], ["middle-out"])


async def test_a_template_comes_first():
    body = await sent(template="t", variables={"who": "Ada"})
    assert body["messages"] == [{"role": "system", "content": "You are Ada."}, *HELLO]


async def test_a_template_is_rendered_when_a_provider_is_asked():
    plan = await resolved(template="t", variables={"who": "Ada " * 30_000})
    assert 40_000 < plan.prompt_tokens < 40_100
    assert json.loads(plan.prompt.messages)[0]["content"] == f"You are {'Ada ' * 30_000}."


@pytest.mark.parametrize("copies", [100, 10_000, 100_000])
async def test_a_template_bomb_is_refused_before_it_is_built(copies, monkeypatch):
    bomb = Template(id="t", name="t", created_at=0, updated_at=0, system="{{x}}" * copies)
    monkeypatch.setattr("tests.gateway.test_resolve.TEMPLATE", bomb)
    with pytest.raises(GatewayError) as raised:
        await resolved(template="t", variables={"x": "y" * (40_000_000 // copies)}, server={"max_body_bytes": 2**25})
    response = raised.value.response
    assert (response.status, response.code, response.param) == (413, "request_too_large", "variables")


async def test_params_fill_what_the_request_lacks():
    plan = await resolved(caller=principal(params={"max_tokens": 7, "n": 2, "seed": 1}), seed=2)
    body = json.loads(plan.body_for(plan.candidates[0]))
    assert (body["max_completion_tokens"], body["n"], body["seed"], plan.output_bound) == (7, 2, 2, 14)


async def test_what_is_clamped_is_told_to_the_provider():
    plan = (await resolved(max_tokens=1000)).clamped_to(1_000 * 20 + 1_000 * 5)
    assert json.loads(plan.body_for(plan.candidates[0]))["max_completion_tokens"] == plan.output_cap < 25


async def test_something_is_always_left_to_say():
    assert (await resolved()).clamped_to(0).output_cap == 1
