"""Providers that fail, and who is asked instead: the whole gateway over real sockets. All upstreams are one simulator, which
tells them apart by the models that they are asked for.
"""

import asyncio
import json
import time

import pytest

from tests.harness.clients import HELLO
from tests.harness.mesh import model

GOOD = "sim/plain?tokens=8"
BEFORE_THE_FIRST_EVENT = (
    "sim/error-500",
    "sim/error-429",
    "sim/error-401",
    "sim/refuse",
    "sim/reset",
    "sim/empty",
    "sim/die-mid-stream?after=0",
    "sim/reset-mid-stream?after=0",
    "sim/bad-chunk?after=0",
    "sim/end-early?after=0",
    "sim/error-mid-stream?after=0",
    "sim/comments+error-mid-stream?after=0",
)


class Time:
    """The time by which breakers and ejections go; the tests turn it forward."""

    def __init__(self, mesh):
        self.later_s = 0.0
        mesh.worker.gateway.health.clock = lambda: time.monotonic() + self.later_s


@pytest.fixture
async def start(start_mesh, simulator):
    """Start a gateway with three upstreams and models of one name each: `{name: (upstream, model, ...)}`."""

    async def start_one(server=None, upstream=None, **routes):
        upstreams = {
            name: {"kind": "openai", "base_url": simulator.base_url, **(upstream or {})}
            for name in ("one", "two", "three")
        }
        return await start_mesh(
            server=server or {},
            upstreams=upstreams,
            models={name: route if isinstance(route, dict) else model(*route) for name, route in routes.items()},
        )

    return start_one


def equals(*names):
    """A model served by upstreams that are equals, each under a name of its own."""
    served = model(
        *(part for upstream, name in zip(("one", "two", "three"), names, strict=False) for part in (upstream, name))
    )
    return {**served, "upstreams": [{**route, "weight": 1} for route in served["upstreams"]]}


def asked(mesh):
    """The models that were asked for, in order."""
    return [json.loads(entry.raw_body)["model"] for entry in mesh.received]


def breaker(mesh, upstream="one"):
    (family,) = mesh.worker.metrics.breaker_open.labels(upstream).collect()
    return family.samples[0].value


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_connection_is_tried_elsewhere(start, stream):
    mesh = await start(m=("refused", "x", "two", GOOD))
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="m", stream=stream)
    assert (answer.status, answer.headers["x-mesh-attempts"], answer.headers["x-mesh-model"]) == (200, "2", "m")
    assert ((await mesh.settlement(caller))["upstream"], mesh.log.lines[-1]["outcome"]) == ("two", "completed")


@pytest.mark.parametrize("bad", BEFORE_THE_FIRST_EVENT)
async def test_a_stream_that_fails_before_its_first_event_is_tried_elsewhere(start, bad):
    mesh = await start(m=("one", bad, "two", GOOD))
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="m")
    assert (answer.status, answer.events[-1], answer.headers["x-mesh-attempts"]) == (200, "[DONE]", "2")
    assert [event for event in answer.events if "error" in event] == []
    assert asked(mesh) == [bad, GOOD]
    assert (await mesh.settlement(caller))["completion_tokens"] == "8"


@pytest.mark.parametrize("bad", BEFORE_THE_FIRST_EVENT)
async def test_where_nobody_else_is_left_it_is_refused_with_an_honest_status(start, bad):
    mesh = await start(m=("one", bad))
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="m")
    expected = (503, "provider_not_available") if bad == "sim/error-429" else (502, "upstream_error")
    assert (answer.status, answer.code) == expected
    assert await mesh.spent(caller) == 0


@pytest.mark.parametrize("bad", ["sim/stall", "sim/stall-head"])
async def test_a_stream_that_never_begins_is_tried_elsewhere(start, bad):
    patience = {"idle_timeout_s": 0.1, "first_byte_timeout_s": 0.1}
    mesh = await start(upstream=patience, m=("one", bad, "two", GOOD))
    caller = await mesh.key()
    assert (await mesh.stream(caller, model="m")).events[-1] == "[DONE]"
    assert asked(mesh) == [bad, GOOD]


@pytest.mark.parametrize("bad", ["sim/die-mid-stream?after=1&tps=100", "sim/error-mid-stream?after=1&tps=100"])
async def test_after_an_event_nobody_else_is_asked(start, bad):
    mesh = await start(m=("one", bad, "two", GOOD))
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="m")
    assert (answer.status, answer.events[-1]["error"]["code"]) == (200, "upstream_error")
    assert asked(mesh) == [bad]


@pytest.mark.parametrize("bad", ["sim/die-mid-stream", "sim/reset", "sim/error-mid-stream"])
async def test_a_whole_answer_that_may_have_cost_its_price_is_not_asked_for_again(start, bad):
    mesh = await start(m=("one", bad, "two", GOOD))
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="m")
    assert (answer.status, answer.headers["x-should-retry"]) == (502, "false")
    assert asked(mesh) == [bad]


async def test_what_every_provider_would_refuse_is_asked_for_once(start):
    mesh = await start(m=("one", "sim/error-400", "two", GOOD))
    caller = await mesh.key()
    assert ((await mesh.stream(caller, model="m")).status, asked(mesh)) == (400, ["sim/error-400"])


async def test_the_head_is_held_for_a_short_time_only(start):
    mesh = await start(
        server={"first_event_hold_s": 0.05, "heartbeat_s": 0.1},
        upstream={"idle_timeout_s": 0.4},
        m=("one", "sim/stall", "two", GOOD),
    )
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="m")
    assert (answer.status, answer.events[-1]["error"]["code"]) == (200, "gateway_timeout")
    assert b": ping\n\n" in answer.body


async def test_a_first_event_too_large_to_wait_for_is_not_waited_for(start):
    mesh = await start(server={"first_event_hold_s": 30, "heartbeat_s": 60}, m=("one", "sim/burst?tokens=2000"))
    caller = await mesh.key()
    async with asyncio.timeout(5):
        assert (await mesh.stream(caller, model="m")).events[-1] == "[DONE]"


# Breakers.


async def test_a_breaker_opens_and_closes_after_a_probe(start):
    mesh = await start(m=("one", "sim/fail-first-10"))
    clock = Time(mesh)
    caller = await mesh.key()
    assert [(await mesh.chat(caller, model="m")).status for _ in range(10)] == [502] * 10
    assert breaker(mesh) == 1.0
    answer = await mesh.chat(caller, model="m")
    assert (answer.status, answer.code) == (503, "provider_not_available")
    assert 1 <= int(answer.headers["retry-after"]) <= 8
    assert len(mesh.received) == 10
    clock.later_s = 8.0
    assert (await mesh.chat(caller, model="m")).status == 200
    assert breaker(mesh) == 0.0
    assert (await mesh.chat(caller, model="m")).status == 200


@pytest.mark.parametrize(
    "bad, stream",
    [
        ("sim/refuse", False),
        ("sim/stall-head", False),
        ("sim/die-mid-stream?tps=200", True),
        ("sim/die-mid-stream", False),
    ],
)
async def test_what_opens_a_breaker(start, bad, stream):
    mesh = await start(upstream={"first_byte_timeout_s": 0.05}, m=("one", bad))
    caller = await mesh.key()
    for _ in range(10):
        await mesh.chat(caller, model="m", stream=stream)
    await mesh.quiet()
    assert breaker(mesh) == 1.0


@pytest.mark.parametrize("bad", ["sim/error-400", "sim/error-401", "sim/error-404", "sim/error-429"])
async def test_what_opens_no_breaker(start, bad):
    mesh = await start(m=("one", bad))
    caller = await mesh.key()
    for _ in range(7):
        await mesh.chat(caller, model="m")
    assert (len(mesh.received), breaker(mesh)) == (7, 0.0)


async def test_clients_that_hang_up_open_no_breaker(start):
    mesh = await start(m=("one", "sim/stall-head"))
    caller = await mesh.key()
    tasks = [asyncio.create_task(mesh.chat(caller, model="m")) for _ in range(7)]
    await mesh.until(lambda: len(mesh.received) == 7)
    for task in tasks:
        task.cancel()
    await mesh.quiet()
    assert breaker(mesh) == 0.0
    (route,) = mesh.worker.gateway.health.upstreams["one"].routes.values()
    assert route.in_flight == 0


@pytest.mark.parametrize("bad", ["sim/error-500", "sim/refuse", "sim/die-mid-stream"])
async def test_one_accounts_failures_leave_the_model_to_the_others(start, bad):
    mesh = await start(m=("one", bad))
    poisoner, other = await mesh.key(), await mesh.key()
    got = [(await mesh.chat(poisoner, model="m")).status for _ in range(11)]
    assert (got[:10], got[10]) == ([502] * 10, 503)
    assert (await mesh.chat(other, model="m")).status == 502
    assert len(mesh.received) == 11


async def test_two_accounts_failures_close_it_to_all(start):
    mesh = await start(m=("one", "sim/error-500"))
    for caller in (await mesh.key(), await mesh.key()):
        for _ in range(5):
            await mesh.chat(caller, model="m")
    assert (await mesh.chat(await mesh.key(), model="m")).status == 503


async def test_connections_that_cannot_be_made_close_it_to_all(start):
    mesh = await start(m=("refused", "x"))
    caller = await mesh.key()
    for _ in range(10):
        await mesh.chat(caller, model="m")
    assert (await mesh.chat(await mesh.key(), model="m")).status == 503


async def test_an_open_breaker_is_passed_over(start):
    mesh = await start(bad=("one", "sim/error-500"), m=("one", "sim/error-500", "two", GOOD))
    caller = await mesh.key()
    for _ in range(10):
        await mesh.chat(caller, model="bad")
    answer = await mesh.chat(caller, model="m")
    assert (answer.status, answer.headers["x-mesh-attempts"]) == (200, "1")
    assert asked(mesh)[-1] == GOOD


async def test_a_breaker_of_one_model_leaves_the_others_of_its_upstream_alone(start):
    mesh = await start(bad=("one", "sim/error-500"), m=("one", GOOD))
    caller = await mesh.key()
    for _ in range(11):
        answer = await mesh.chat(caller, model="bad")
    assert (answer.status, breaker(mesh)) == (503, 1.0)
    assert (await mesh.chat(caller, model="m")).status == 200


async def test_a_probe_that_fails_costs_its_client_nothing_where_another_is_left(start):
    mesh = await start(m=("one", "sim/error-500", "two", GOOD))
    clock = Time(mesh)
    caller = await mesh.key()
    for later_s in (0.0, 0.0, 0.0, 6.0, 12.0, 12.0, 20.0, 20.0):
        clock.later_s = later_s
        assert (await mesh.chat(caller, model="m")).status == 200
    assert asked(mesh).count("sim/error-500") == 6


async def test_a_reload_forgets_the_breaker_of_an_upstream_that_changed(start):
    mesh = await start(m=("one", "sim/error-500"))
    caller = await mesh.key()
    for _ in range(10):
        await mesh.chat(caller, model="m")
    mesh.worker.gateway.health.retain(["two"])
    assert breaker(mesh) == 0.0
    assert (await mesh.chat(caller, model="m")).status == 502


# Equals.


async def test_an_upstream_that_is_full_is_spared_for_as_long_as_it_asks(start):
    mesh = await start(m=("one", "sim/error-429?retry_after=7", "two", GOOD))
    clock = Time(mesh)
    caller = await mesh.key()
    for later_s in (0.0, 0.0, 6.5, 7.5):
        clock.later_s = later_s
        assert (await mesh.chat(caller, model="m")).status == 200
    full = "sim/error-429?retry_after=7"
    assert asked(mesh) == [full, GOOD, GOOD, GOOD, full, GOOD]


async def test_an_outlier_is_asked_last_before_its_breaker_opens(start):
    mesh = await start(m=("one", "sim/error-500", "two", GOOD))
    caller = await mesh.key()
    for _ in range(6):
        await mesh.chat(caller, model="m")
    assert (asked(mesh).count("sim/error-500"), breaker(mesh)) == (3, 0.0)


async def test_a_session_stays_with_one_upstream(start):
    mesh = await start(m=equals("gpt-a", "gpt-b", "gpt-c"))
    caller = await mesh.key()
    for number in range(12):
        for _ in range(3):
            await mesh.chat(caller, model="m", session_id=f"session-{number}")
    went = asked(mesh)
    assert [len(set(went[first : first + 3])) for first in range(0, 36, 3)] == [1] * 12
    assert set(went) == {"gpt-a", "gpt-b", "gpt-c"}


async def test_equals_share_the_work(start):
    mesh = await start(m=equals("gpt-a", "gpt-b"))
    caller = await mesh.key()
    await asyncio.gather(*(mesh.chat(caller, model="m") for _ in range(40)))
    assert 10 <= asked(mesh).count("gpt-a") <= 30


# The budget, and the deadline.


async def test_second_attempts_are_a_fifth_of_the_load_and_a_few(start):
    mesh = await start(m=("one", "sim/error-408", "two", GOOD))
    caller = await mesh.key()
    got = [(await mesh.chat(caller, model="m")).status for _ in range(30)]
    assert (got.count(200), got.count(502)) == (16, 14)
    assert len(mesh.received) == 46


@pytest.mark.parametrize("refusal", ["sim/error-401", "sim/error-402", "sim/error-403", "sim/error-404"])
async def test_the_budget_doesnt_bound_what_a_refusal_of_the_gateway_sends_elsewhere(start, refusal):
    mesh = await start(m=("one", refusal, "two", GOOD))
    caller = await mesh.key()
    assert [(await mesh.chat(caller, model="m")).status for _ in range(30)] == [200] * 30


async def test_the_budget_doesnt_bound_what_another_model_may_take(start):
    mesh = await start(m=("one", "sim/error-413"), n=("two", GOOD))
    caller = await mesh.key()
    assert [(await mesh.chat(caller, model="m", models=["n"])).status for _ in range(30)] == [200] * 30


async def test_attempts_share_the_clients_deadline(start):
    mesh = await start(m=("one", "sim/error-500", "two", "sim/stall-head", "three", GOOD))
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="m", headers={"x-stainless-read-timeout": "0.2"})
    assert (answer.status, answer.code, answer.headers["x-should-retry"]) == (504, "gateway_timeout", "false")
    assert asked(mesh) == ["sim/error-500", "sim/stall-head"]
    assert await mesh.spent(caller) == 0


async def test_no_attempt_begins_after_the_deadline(start):
    mesh = await start(m=("one", GOOD))
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="m", headers={"x-stainless-read-timeout": "0.000001"})
    assert (answer.status, mesh.received) == (504, [])
    assert "x-should-retry" not in answer.headers


async def test_impatient_clients_open_no_breaker(start):
    mesh = await start(m=("one", "sim/stall-head"))
    caller = await mesh.key()
    impatient = {"x-stainless-read-timeout": "0.25"}
    got = [(await mesh.chat(caller, model="m", headers=impatient)).status for _ in range(7)]
    assert (got, len(mesh.received), breaker(mesh)) == ([504] * 7, 7, 0.0)


async def test_what_a_client_says_of_its_patience_is_not_passed_on(start):
    mesh = await start(m=("one", "gpt-4o"))
    caller = await mesh.key()
    await mesh.sdk(caller, timeout=30).chat.completions.create(model="m", messages=HELLO)
    assert "x-stainless-read-timeout" not in {name.lower() for name, _ in mesh.received[0].headers}
