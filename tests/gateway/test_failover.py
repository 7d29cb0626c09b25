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
FULL_NUSD = 6 * 2_500 + 8 * 10_000  # what the provider reports of HELLO and eight tokens

# What a first upstream's failure comes to where another one could serve: status, code, x-should-retry; attempts and outcome in
# the log; what the account pays.
ELSEWHERE = (200, None, None, 2, "completed", "all")
NOT_REPEATED = (502, "upstream_error", "false", 1, "failed", "nothing")
CUT_OFF = (200, "upstream_error", None, 1, "upstream_failed", "nothing")  # one event without text
FAILURES = [
    *(  # nothing was done there
        (first, stream, ELSEWHERE)
        for first in ("refused", "error-500", "error-503", "error-429", "error-401", "error-404", "redirect")
        for stream in (False, True)
    ),
    *(  # of a stream nothing was seen
        (first, True, ELSEWHERE)
        for first in (
            *("refuse", "reset", "empty", "stall", "stall-head"),
            *("die-mid-stream?after=0", "reset-mid-stream?after=0", "bad-chunk?after=0", "end-early?after=0"),
            *("error-mid-stream?after=0", "comments+error-mid-stream?after=0"),
        )
    ),
    *((first, True, CUT_OFF) for first in ("die-mid-stream?after=1&tps=100", "error-mid-stream?after=1&tps=100")),
    *(  # a whole answer may have been made, at its price
        (first, False, NOT_REPEATED) for first in ("refuse", "reset", "die-mid-stream", "error-mid-stream", "not-json")
    ),
    *(  # every provider would say so
        (f"error-{status}", stream, (status, code, None, 1, "failed", "nothing"))
        for status, code in ((400, "provider_refused"), (413, "provider_refused"), (422, "unprocessable_entity"))
        for stream in (False, True)
    ),
]


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


@pytest.mark.parametrize("first, stream, expected", FAILURES)
async def test_what_comes_of_a_failure_where_another_is_left(start, first, stream, expected):
    patience = {"idle_timeout_s": 0.1, "first_byte_timeout_s": 0.1} if "stall" in first else {}
    route = ("refused", "x") if first == "refused" else ("one", f"sim/{first}")
    mesh = await start(upstream=patience, m=(*route, "two", GOOD))
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="m", stream=stream)
    settled, line = await mesh.settlement(caller), mesh.log.lines[-1]
    charge = {0: "nothing", FULL_NUSD: "all"}[await mesh.spent(caller)]
    told = (answer.status, answer.code, answer.headers.get("x-should-retry"))
    assert (*told, line["attempts"], line["outcome"], charge) == expected
    last = ("two", GOOD) if expected == ELSEWHERE else route
    assert (line["upstream"], settled["upstream"], asked(mesh)[-1]) == (last[0], last[0], last[1])
    attempts = str(line["attempts"])
    assert (answer.headers.get("x-mesh-attempts"), answer.is_done) == (attempts, stream and expected == ELSEWHERE)


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
