"""The judge of what providers are asked, and what is told of it.

Both sides of each bound: rows are a change of the good record, its request, and the rules that it breaks.
"""

import pytest
from msgspec.structs import replace

from simulation.breakers import FAILING
from simulation.client import trace_of
from simulation.history import MODELS, Answer, Request
from simulation.provider import Bill, Call
from simulation.record import Trouble
from tests.simulation.judged import (
    BILLS,
    BROKE,
    CLEAN,
    MARKER,
    NO_KEY,
    PAIR,
    REASONS,
    REQUEST,
    STREAM,
    STREAMED,
    WAITS,
    Case,
    book,
    broken_by,
    charged,
    denied,
    failed_before,
    headed,
    heard_at,
    judge,
    refused,
    settled,
    with_a_repeat,
)


def asked_for(**fields):
    """Let the provider have got these fields, and not those that are None."""

    def change(case):
        case.call.body |= fields
        for name in [name for name, value in fields.items() if value is None]:
            del case.call.body[name]

    return change


def said(text, raw=None):
    """Let the provider have got this text as the client's message, in these bytes."""

    def change(case):
        case.call.body["messages"] = [{"role": "user", "content": text}]
        case.call.raw = b"" if raw is None else raw.encode()

    return change


def traced(traceparent):
    """Let the provider have been told of another trace."""

    def change(case):
        case.call.headers = {"traceparent": traceparent}

    return change


def told_of(*names):
    """Let the provider have got these headers."""

    def change(case):
        case.call.headers = dict.fromkeys(names, "x")

    return change


def called(*answers, asked=(), ended_after_s=0.2, **sight):
    """Let the request have failed with these calls, of the upstreams `asked`."""

    def change(case):
        case.failed(502)
        case.record.calls.clear()
        case.sight.headers |= {"x-mesh-attempts": str(len(answers)), "x-mesh-routing-attempts": str(len(answers))}
        for number, (answer, upstream) in enumerate(zip(answers, asked, strict=True)):
            at = 10.1 + number * ended_after_s
            call = Call(MARKER, upstream, number, at, answer, {**case.call.body, "model": "up-pair"}, {}, lines=[])
            if upstream == "two" and "max_tokens" in call.body:
                call.body["max_completion_tokens"] = call.body.pop("max_tokens")
            call.head_sent = answer.at > 0
            call.ended, call.ended_at = "error" if answer.error else "cut", at + ended_after_s
            case.record.calls.append(call)
        case.sight.ended_at = case.record.calls[-1].ended_at
        case.sight.times = [(case.sight.ended_at, len(case.sight.payload))]
        for name, value in sight.items():
            setattr(case.sight, name, value)

    return change


def handed_on(answer, wait_s, status=502, code="upstream_error", *, says_no=False):
    """Let a provider have asked for a wait, and the client have been told another."""

    def change(case):
        refused(status, code, wait_s)(case)
        case.record.calls = [case.call]
        case.call.answer = answer
        case.sight.headers |= {"x-mesh-attempts": "1", "x-mesh-routing-attempts": "1"}
        if says_no:
            case.sight.headers["x-should-retry"] = "false"

    return change


def asked_late(asked_at):
    """Let a provider have been asked at a time, and the client have been told at 11.0 that the instance shuts down."""

    def change(case):
        refused(503, "overloaded", 1.0, **{"x-should-retry": "false"})(case)
        case.sight.headers |= {"x-mesh-attempts": "1", "x-mesh-routing-attempts": "1"}
        case.record.calls, case.call.at, case.call.ended_at = [case.call], asked_at, asked_at + 0.1
        case.call.complete, case.call.ended = False, "closed"
        case.record.troubles = [Trouble("drained", -9.0, 20.0, 0)]

    return change


def connecting(code, attempts):
    """Let an instance have ended, and the client have been told so, or this, and of attempts that reached no provider."""

    def change(case):
        refused(503, code, 1.0)(case)
        case.sight.headers |= {"x-mesh-attempts": attempts, "x-mesh-routing-attempts": attempts}
        case.record.calls, case.record.troubles = [], [Trouble("drained", -9.0, 20.0, 0)]

    return change


def refused_late(ended_at):
    """Let a provider's refusal of the key have been whole at a time, and the instance have shut down at 11.0."""

    def change(case):
        asked_late(10.5)(case)
        case.call.answer, case.call.ended, case.call.ended_at = Answer(status=401, error="key"), "error", ended_at

    return change


def early_headed(asked_at):
    """Let the client have got a head and a ping at 15.1, and a second provider have been asked at a time."""

    def change(case):
        case.serve("pair")
        heard_at(15.1, 16.0)(case)
        case.call.body["model"] = "up-pair"
        first = Call(MARKER, "one", 0, 10.1, BROKE, dict(case.call.body), {}, lines=[])
        first.ended, first.ended_at = "error", asked_at
        case.call.upstream, case.call.at = "two", asked_at
        case.record.calls.insert(0, first)
        case.record.books = {0: book(settled(model="pair"))}

    return change


def behind_a_dead_one(case):
    """Let the second route of a model have served, where nothing listens at the first."""
    headed(x_mesh_attempts="2", x_mesh_routing_attempts="2", x_mesh_routing_fallback="true")(case)
    case.serve("gone-first")
    case.sight.headers["x-mesh-routing-model"] = "gone-first"
    case.call.upstream, case.call.body["model"] = "two", "up-gone-first"
    case.call.bill = Bill(25, 0, 0)
    charged(75_000, model="gone-first", prompt_tokens=25, completion_tokens=0)(case)


def failing(count, *, ended_at=5.1, wait_s=1.0, **seen):
    """Let the provider have failed so often, and the request have been refused for it."""

    def change(case):
        refused(503, "provider_not_available", wait_s, message=FAILING)(case)
        failed_before(count, ended_at, **seen)(case)

    return change


PAIR_STREAM = Request("q0", model="pair", stream=True)
LOST, CUT = Answer(end="resets", at=0.0), Answer(end="resets", at=0.001)
TOLD_ERRORS = {"refusals_are_told"}
LONG, LARGE = Answer(status=400, error="context"), Answer(status=413, error="large")
ITS = dict.fromkeys(("code", "param", "provider_code", "words"), "its")
ITS["provider_error"] = {"message": "No."}
FLAGGED, TOO_POOR = Answer(status=403, error="flagged"), Answer(status=400, error="balance")
NO_CODE = {"code": "provider_refused", "provider_code": None}
LIMIT = Answer(status=429, error="limit")
PAIR_OF_MODELS = Request("q0", fallbacks=("fee",))
BREAKERS = {"breakers_hold"}
FAILOVER, TOLD = {"failover_happens"}, {"attempts_are_told"}
ATTEMPTS = {
    "a field that the client didn't send": (asked_for(seed=7), REQUEST, CLEAN),
    "a field that is lost": (asked_for(n=None), Request("q0", n=2), CLEAN),
    "another model": (asked_for(model="up-pair"), REQUEST, CLEAN | {"attempts_are_told", "tokens_are_reported"}),
    "a stream that isn't asked for its usage": (asked_for(stream_options=None), STREAMED, CLEAN),
    "a message without its end": (said(f"{MARKER}: the river is old, an"), REQUEST, CLEAN),
    "a message in other bytes": (
        said(f"{MARKER}: the river is old, and", f'{{"messages":[{{"role":"user","content":"{MARKER}..."}}]}}'),
        REQUEST,
        CLEAN,
    ),
    "a whole answer that broke where another asks to wait": (called(LIMIT, CUT, asked=("one", "two")), PAIR, set()),
    "a stream that broke there before its first event": (
        called(LIMIT, CUT, asked=("one", "two")),
        PAIR_STREAM,
        TOLD_ERRORS,
    ),
    "a failed whole answer isn't, of a key": (with_a_repeat(called(BROKE, asked=("one",))), PAIR, FAILOVER),
    "two attempts are told, of a key": (
        with_a_repeat(headed(x_mesh_attempts="2", x_mesh_routing_attempts="2")),
        REQUEST,
        TOLD,
    ),
    "its own trace": (with_a_repeat(traced(trace_of("id-q0"))), REQUEST, set()),
    "another request's trace": (with_a_repeat(traced(trace_of("id-q7"))), REQUEST, CLEAN | BILLS),
    "what every request has": (told_of("host", "user-agent", "accept-encoding", "api-key"), REQUEST, set()),
    "what is passed on": (told_of("tracestate", "http-referer", "x-title", "openai-beta"), REQUEST, set()),
    "the client's request id": (told_of("x-request-id"), REQUEST, CLEAN),
    "the client's key of repeats": (told_of("idempotency-key"), REQUEST, CLEAN),
    "the client's cookie": (told_of("cookie"), REQUEST, CLEAN),
    "a refusal in its own words": (denied(LONG, status=400, **ITS), REQUEST, set()),
    "a refusal with another status": (denied(LONG, status=422, **ITS), REQUEST, REASONS | TOLD_ERRORS),
    "a refusal with another code": (denied(LONG, status=400, **ITS | {"code": "bad"}), REQUEST, TOLD_ERRORS),
    "a refusal with another param": (denied(LONG, status=400, **ITS | {"param": None}), REQUEST, TOLD_ERRORS),
    "a refusal in other words": (denied(LONG, status=400, **ITS | {"words": "No."}), REQUEST, TOLD_ERRORS),
    "a refusal without the provider's error": (
        denied(LONG, status=400, **ITS | {"provider_error": "text"}),
        REQUEST,
        TOLD_ERRORS,
    ),
    "a flagged request": (denied(FLAGGED, status=403, **ITS | NO_CODE), PAIR, set()),
    "a flagged request that is told as a failure": (denied(FLAGGED), REQUEST, TOLD_ERRORS),
    "a flagged request that goes to another provider": (
        denied(FLAGGED, FLAGGED, status=403, **ITS | NO_CODE),
        PAIR,
        FAILOVER,
    ),
    "a credit that is too low": (denied(TOO_POOR), REQUEST, set()),
    "a credit that is too low, told to the client": (
        denied(TOO_POOR, status=400, **ITS | NO_CODE),
        REQUEST,
        REASONS | TOLD_ERRORS,
    ),
    "a refusal without a code": (
        denied(LARGE, status=413, **ITS | {"code": "provider_refused", "provider_code": None}),
        REQUEST,
        set(),
    ),
    "a refusal that is told as a failure": (denied(LONG), REQUEST, TOLD_ERRORS),
    "the first of two refusals": (denied(LONG, LARGE, status=400, **ITS), PAIR_OF_MODELS, set()),
    "the second of two refusals": (
        denied(LONG, LARGE, status=413, by=1, **ITS | {"code": "provider_refused", "provider_code": None}),
        PAIR_OF_MODELS,
        TOLD_ERRORS,
    ),
    "a refusal of the gateway": (denied(NO_KEY, provider_code="its"), REQUEST, set()),
    "a refusal of the gateway without its code": (denied(NO_KEY), REQUEST, TOLD_ERRORS),
    "a refusal of the gateway in its own words": (
        denied(NO_KEY, provider_code="its", words="its"),
        REQUEST,
        TOLD_ERRORS,
    ),
    "a code that no provider gave": (denied(BROKE, provider_code="bad", words="its"), REQUEST, WAITS | TOLD_ERRORS),
    "a failure where another asks to wait": (
        denied(LIMIT, NO_KEY, by=1, provider_code="its"),
        PAIR,
        TOLD_ERRORS,
    ),
    "a lost stream is asked for elsewhere": (called(LOST, BROKE, asked=("one", "two")), PAIR_STREAM, set()),
    "a lost stream isn't": (called(LOST, asked=("one",)), PAIR_STREAM, FAILOVER),
    "a lost whole answer is": (called(LOST, BROKE, asked=("one", "two")), PAIR, FAILOVER),
    "a lost whole answer isn't": (called(LOST, asked=("one",)), PAIR, set()),
    "a failed whole answer isn't": (called(BROKE, asked=("one",)), PAIR, FAILOVER),
    "a stream that broke while its head was held isn't": (
        called(CUT, asked=("one",), ended_after_s=1.7),
        PAIR_STREAM,
        FAILOVER,
    ),
    "a stream that broke as its head was sent": (called(CUT, asked=("one",), ended_after_s=1.9), PAIR_STREAM, set()),
    "a stream that broke later is": (
        called(CUT, BROKE, asked=("one", "two"), ended_after_s=2.3),
        PAIR_STREAM,
        FAILOVER,
    ),
    "a provider that is asked while its client is told": (asked_late(11.09), REQUEST, set()),
    "a provider that is asked later": (asked_late(11.11), REQUEST, TOLD),
    "no attempts are told": (headed(x_mesh_attempts="0", x_mesh_routing_attempts="0"), REQUEST, TOLD),
    "another provider was asked while the head was on its way": (early_headed(15.01), PAIR_STREAM, set()),
    "another provider was asked before the head": (early_headed(14.99), PAIR_STREAM, TOLD),
    "two attempts are told": (headed(x_mesh_attempts="2", x_mesh_routing_attempts="2"), REQUEST, TOLD),
    "an attempt that nothing listened to": (
        behind_a_dead_one,
        Request("q0", model="gone-first"),
        set(),
    ),
    "another model is told": (
        headed(x_mesh_model="pair", x_resolved_model_id="pair"),
        REQUEST,
        {"tokens_are_reported", *TOLD},
    ),
    "a fallback is told": (headed(x_mesh_routing_fallback="true", x_mesh_routing_model="plain"), REQUEST, TOLD),
    "another model by its other name": (headed(x_resolved_model_id="pair"), REQUEST, TOLD),
    "another number by its other name": (headed(x_mesh_routing_attempts="2"), REQUEST, TOLD),
    "a fallback's model where none was": (headed(x_mesh_routing_model="plain"), REQUEST, TOLD),
    "another version": (headed(x_mesh_version="2026-07"), REQUEST, TOLD),
    "a 503 with a wait": (refused(503, "ledger_unavailable", 1.0), REQUEST, REASONS),
    "a 503 without": (refused(503, "ledger_unavailable"), REQUEST, {*REASONS, *WAITS}),
    "a 402 with a wait": (refused(402, "insufficient_credits", 1.0), REQUEST, {*REASONS, *WAITS}),
    "a 503 that no provider saw says no": (
        refused(503, "ledger_unavailable", 1.0, **{"x-should-retry": "false"}),
        REQUEST,
        {*REASONS, *WAITS},
    ),
    "an attempt that hadn't reached a provider at a shutdown": (connecting("overloaded", "1"), REQUEST, set()),
    "two such attempts": (connecting("overloaded", "2"), REQUEST, TOLD),
    "an attempt that nobody saw": (connecting("ledger_unavailable", "1"), REQUEST, {*REASONS, *TOLD}),
    "a refusal that wasn't whole at a shutdown": (refused_late(10.81), REQUEST, set()),
    "a refusal that was": (refused_late(10.79), REQUEST, WAITS),
    "a provider's wait": (handed_on(Answer(status=503, error="busy", wait_s=7.0), 7.0), REQUEST, set()),
    "a provider's wait that is lost": (handed_on(Answer(status=503, error="busy", wait_s=7.0), None), REQUEST, WAITS),
    "a provider's wait of more than a minute": (
        handed_on(Answer(status=429, error="limit", wait_s=90.0), 90.0, 503, "provider_not_available", says_no=True),
        REQUEST,
        set(),
    ),
    "a wait of more than a minute that SDKs obey": (
        handed_on(Answer(status=429, error="limit", wait_s=90.0), 90.0, 503, "provider_not_available"),
        REQUEST,
        WAITS,
    ),
    "a 429 without a wait": (
        handed_on(Answer(status=429, error="limit"), 1.0, 503, "provider_not_available"),
        REQUEST,
        set(),
    ),
    "a spent quota": (
        handed_on(Answer(status=429, error="quota", wait_s=7.0), 600.0, 503, "provider_not_available", says_no=True),
        REQUEST,
        set(),
    ),
    "a spent quota that is waited for too soon": (
        handed_on(Answer(status=429, error="quota", wait_s=7.0), 7.0, 503, "provider_not_available"),
        REQUEST,
        WAITS,
    ),
    "a failure that may be paid twice": (handed_on(BROKE, None), REQUEST, WAITS),
    "a failure that says so": (handed_on(BROKE, None, says_no=True), REQUEST, set()),
    "a provider that failed ten times": (failing(10, ended="left"), REQUEST, set()),
    "a provider that failed nine times": (failing(9), REQUEST, REASONS),
    "a breaker that may still be open": (failing(10, ended_at=2.3), REQUEST, set()),
    "a breaker that can't be": (failing(10, ended_at=2.1), REQUEST, REASONS),
    "a breaker's longest wait": (failing(10, wait_s=1.8), REQUEST, set()),
    "a wait that is longer": (failing(10, wait_s=2.0), REQUEST, BREAKERS),
    "a breaker's shortest wait": (failing(10, ended_at=9.0, wait_s=0.6), REQUEST, set()),
    "a wait that is shorter": (failing(10, ended_at=9.0, wait_s=0.4), REQUEST, BREAKERS),
    "a provider that failed ten times is asked": (failed_before(10, 9.0), REQUEST, BREAKERS),
    "a provider that failed nine times is asked": (failed_before(9, 9.0), REQUEST, set()),
    "a provider is asked that failed for clients that left": (failed_before(10, 9.0, ended="left"), REQUEST, set()),
    "a provider is asked when its breaker may let a probe through": (failed_before(10, 7.5), REQUEST, set()),
}


@pytest.mark.parametrize(("change", "request_", "broken"), ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_attempts_are_judged_at_their_bounds(change, request_, broken):
    assert broken_by(change, request_) == broken


@pytest.mark.parametrize(
    ("status", "timeout_s", "attempts", "broken"),
    [
        (504, 0.5, 1, set()),
        (504, 0.5, 2, {"attempts_are_told"}),
        (504, None, 1, {"attempts_are_told", "waits_are_told"}),
        (502, 0.5, 1, {"attempts_are_told", "waits_are_told"}),
    ],
)
def test_a_deadline_may_pass_while_a_provider_is_connected_to(status, timeout_s, attempts, broken):
    case = Case(Request("q0", timeout_s=timeout_s))
    case.failed(status, code="gateway_timeout" if status == 504 else "upstream_error")
    case.sight.headers |= {"x-mesh-attempts": str(attempts), "x-mesh-routing-attempts": str(attempts)}
    case.record.calls = []
    found = {finding.rule for finding in judge(case.record)}
    assert found & {"attempts_are_told", "waits_are_told"} == broken


GOOD = Answer()
BUSY, SHORT_OF_IT = Answer(status=503, error="busy", wait_s=2.0), Answer(status=429, error="limit")
SPENT, SLOW = Answer(status=429, error="quota"), Answer(status=503, error="busy", wait_s=1.05, pieces=10)
NEVER = Answer(delay_s=2.0)
LONG_BUSY, AT_ONCE = Answer(status=529, error="busy", wait_s=90.0), Answer(status=503, error="busy")


@pytest.mark.parametrize(
    ("asked", "answers", "is_right"),
    [
        pytest.param("one", [], True, id="the first"),
        pytest.param("two", [], False, id="the second"),
        pytest.param("one", [(BUSY, 8.09)], True, id="one whose wait is over"),
        pytest.param("one", [(BUSY, 8.11)], False, id="one whose wait isn't over"),
        pytest.param("one", [(BUSY, 9.89)], False, id="one that has just said so"),
        pytest.param("one", [(BUSY, 9.91)], True, id="one that says so"),
        pytest.param("one", [(AT_ONCE, 9.8)], True, id="one that asks for no wait"),
        pytest.param("one", [(SHORT_OF_IT, 9.11)], False, id="one with a limit"),
        pytest.param("one", [(SHORT_OF_IT, 9.09)], True, id="one with a limit a second ago"),
        pytest.param("one", [(LONG_BUSY, -49.8)], False, id="one that asks for more than a minute"),
        pytest.param("one", [(LONG_BUSY, -50.0)], True, id="one that asked for more than a minute"),
        pytest.param("one", [(SPENT, -49.8)], False, id="one where the quota is spent"),
        pytest.param("one", [(SPENT, -50.0)], True, id="one where the quota was spent"),
        pytest.param("one", [(Answer(status=402, error="credit"), 8.0)], True, id="one that refused the gateway"),
        pytest.param("two", [(SPENT, -50.0)], True, id="another where the quota may be spent"),
        pytest.param("one", [(NEVER, 9.1)], True, id="one whose answer wasn't waited for"),
        pytest.param("one", [(SLOW, 9.1)], True, id="one that said so in a head whose body came later"),
        pytest.param("one", [(replace(GOOD, delay_s=40.0), 9.0)], True, id="one that answered late"),
        pytest.param("two", [(BUSY, 7.81)], True, id="another whose wait may not be over"),
        pytest.param("two", [(BUSY, 7.79)], False, id="another whose wait is over"),
        pytest.param("two", [(LONG_BUSY, -50.3)], False, id="another that asked for a minute"),
        pytest.param("one", [(BROKE, 5.11)] * 3, False, id="one that failed three times"),
        pytest.param("one", [(BROKE, 5.09)] * 3, True, id="one that failed three times before"),
        pytest.param("one", [(BROKE, 9.0)] * 2, True, id="one that failed twice"),
        pytest.param("one", [(BROKE, 9.0), (BROKE, 9.2), (GOOD, 9.4), (BROKE, 9.6)], True, id="one that has answered"),
        pytest.param("two", [(BROKE, 4.81)] * 3, True, id="another that may be ejected"),
        pytest.param("two", [(BROKE, 4.79)] * 3, False, id="another that isn't ejected any more"),
        pytest.param("two", [(BROKE, 9.0)] * 2, False, id="another that failed twice"),
    ],
)
@pytest.mark.parametrize(("worker", "is_known"), [(0, True), (1, False)])
def test_an_ejected_upstream_is_asked_last(asked, answers, is_right, worker, is_known):
    """Of a pair, by a request that came at 10.0 and was at its provider at 10.1."""
    case = Case(PAIR_STREAM)
    case.serve("pair")
    case.record.prices = [(-60.0, MODELS)]
    case.call.upstream, case.call.body["model"] = asked, "up-pair"
    for number, (answer, ended_at) in enumerate(answers):
        failed_before(1, ended_at, worker=worker)(case)
        sight, call = case.record.sights[-1], case.record.calls[-1]
        sight.request, sight.marker, sight.request_id = PAIR_STREAM, f"mk1q{number + 1}z", f"id-q{number + 1}"
        call.marker, call.answer, call.ended = sight.marker, answer, "whole" if answer is GOOD else "error"
        call.body["model"], call.at = "up-pair", min(ended_at, 9.0) if answer is SLOW else ended_at
        if answer is GOOD:
            sight.status, sight.payload = 200, STREAM
    case.record.history = replace(case.record.history, workers=2)
    expected = is_right if is_known else asked == "one"
    assert ("ejections_hold" not in {finding.rule for finding in judge(case.record)}) == expected
