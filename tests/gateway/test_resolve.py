import json

import pytest

from meshproxy.config import Credits, Defaults, Model, Route, Settings, Upstream
from meshproxy.errors import Fault
from meshproxy.gateway.deployment import Deployment
from meshproxy.gateway.resolve import resolve
from meshproxy.policy.catalog import Catalog
from meshproxy.policy.template import Template
from tests.gateway.parts import principal

URL = "http://127.0.0.1:1"
UPSTREAMS = {
    "openai": Upstream(kind="openai", base_url=URL),
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


def deployment(**credit):
    models = {
        "large": model("openai", size=8000),
        "small": model("local", size=100),
        "dear": model("local", price="9.00"),
        "routed": model("router"),
        "routed too": model("router", price="3.00"),
    }
    settings = Settings(upstreams=UPSTREAMS, models=models, defaults=Defaults(model="large"), credits=Credits(**credit))
    return Deployment(1, settings, Catalog(settings), {}, frozenset())


class Directory:
    async def template(self, account, name):
        return TEMPLATE if name == "t" else None


async def resolved(*, caller=None, credit=None, **fields):
    body = json.dumps({"messages": HELLO, **fields}).encode()
    return await resolve(body, caller or principal(), deployment(**(credit or {})), Directory(), 0.0)


async def sent(**fields):
    plan = await resolved(**fields)
    return json.loads(plan.body_for(plan.attempts[0]))


async def test_the_model_of_the_request_the_key_the_template_and_the_defaults():
    keyed = principal(default_model="dear")
    assert "large" == (await resolved()).model
    assert "small" == (await resolved(template="t", variables={"who": "Ada"})).model
    assert "dear" == (await resolved(caller=keyed, template="t", variables={"who": "Ada"})).model
    assert "routed" == (await resolved(caller=keyed, model="routed")).model


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
    with pytest.raises(Fault) as raised:
        await resolved(caller=caller, **fields)
    assert expected == (raised.value.problem.status, raised.value.problem.code)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (4096, 4096, 4096)),
        ({"max_tokens": 10}, (10, 10, None)),
        ({"max_completion_tokens": 10, "max_tokens": 20}, (10, 10, None)),
        ({"max_tokens": 100_000}, (8000, 8000, None)),
        ({"stream": True}, (4096, 8000, None)),
        ({"stream": True, "max_tokens": 10}, (10, 10, None)),
        ({"model": "small"}, (100, 100, 100)),
        ({"models": ["small"]}, (100, 100, 100)),
        ({"models": ["small"], "max_tokens": 5000}, (5000, 5000, None)),
        ({"models": ["small"], "stream": True}, (100, 8000, None)),
        ({"credit": {"strict": False}}, (4096, 8000, None)),
    ],
)
async def test_how_much_may_be_said(fields, expected):
    plan = await resolved(**fields)
    assert expected == (plan.output_cap, plan.output_limit, plan.imposed_cap)


async def test_the_dearest_that_may_serve_is_held_for():
    plan = await resolved(models=["dear"])
    assert 9_000 * (plan.prompt_tokens + 10) == plan.hold_nusd(10)
    plan = await resolved(model="routed", models=["routed too"])
    assert 3_000 * (plan.prompt_tokens + 10) == plan.hold_nusd(10)


async def test_the_cap_goes_by_the_name_that_the_provider_knows():
    assert 4096 == (await sent())["max_completion_tokens"]
    assert 100 == (await sent(model="small"))["max_tokens"]


async def test_meshs_own_fields_stay_here_and_openrouters_go_on():
    fields = {"transforms": ["middle-out"], "models": ["routed too"], "session_id": "s"}
    assert {"model", "messages", "max_completion_tokens"} == (await sent(**fields)).keys()
    assert (["router-model"], ["middle-out"]) == (
        (body := await sent(model="routed", **fields))["models"],
        body["transforms"],
    )


async def test_a_template_comes_first():
    body = await sent(template="t", variables={"who": "Ada"})
    assert [{"role": "system", "content": "You are Ada."}, *HELLO] == body["messages"]


async def test_params_fill_what_the_request_lacks():
    plan = await resolved(caller=principal(params={"max_tokens": 7, "n": 2, "seed": 1}), seed=2)
    body = json.loads(plan.body_for(plan.attempts[0]))
    assert (7, 2, 2, 14) == (body["max_tokens"], body["n"], body["seed"], plan.output_bound)


async def test_what_is_clamped_is_told_to_the_provider():
    plan = (await resolved(max_tokens=1000)).clamped_to(1_000 * 20 + 1_000 * 5)
    assert json.loads(plan.body_for(plan.attempts[0]))["max_tokens"] == plan.output_cap < 25


async def test_something_is_always_left_to_say():
    assert 1 == (await resolved()).clamped_to(0).output_cap
