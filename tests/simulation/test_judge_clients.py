"""The judge of what clients see, and when.

Both sides of each bound: rows are a change of the good record, its request, and the rules that it breaks.
"""

import json

import pytest
from msgspec.structs import replace

from simulation.client import Idle, body_of
from simulation.history import MODELS, PROVIDER_SECRET, Answer, History, Request
from simulation.invalid import INVALID, spoiled
from simulation.record import Drain, Trouble
from simulation.story import played
from tests.simulation.judged import (
    BROKE,
    LINE,
    MARKER,
    REASONS,
    REQUEST,
    STREAM,
    STREAMED,
    WAITS,
    Case,
    book,
    broken_by,
    conflicting,
    denied,
    envelope,
    headed,
    heard_at,
    judge,
    refused,
    settled,
    with_a_repeat,
)

GOOD = Answer()


def sent_at(event_at, end_at=11.0, *troubles):
    """Let the provider have sent its event and its end at these times; its client had both at 11.0."""

    def change(case):
        case.call.lines_at, case.call.ended_at = [event_at], end_at
        case.record.troubles = list(troubles)

    return change


def lingered(done_at, ended_at, closed_at, answer=GOOD):
    """Let the provider have sent all at 11.0 and closed at a time; its client had `[DONE]` and the end at these times."""

    def change(case):
        case.call.answer, case.call.lines_at, case.call.last_at, case.call.ended_at = answer, [11.0], 11.0, closed_at
        case.sight.times, case.sight.ended_at = [(11.0, len(STREAM) - 14), (done_at, len(STREAM))], ended_at

    return change


def beside(came, *others):
    """Let a stream have come in these bytes, and its provider have sent these comments and names beside its event."""

    def change(case):
        case.sight.payload, case.call.others = came, list(others)
        case.sight.times = [(11.0, len(came))]

    return change


def replayed(sent_at, came_at):
    """Let a repeat, which was sent at 10.0, have got at a time what the first request's provider had sent."""

    def change(case):
        case.sight.request = replace(case.sight.request, keyed=True)
        case.twice(ended_at=came_at, times=[(came_at, len(STREAM))])
        case.record.sights[1].request = replace(case.record.sights[1].request, stream=True)
        case.record.sights[1].headers["idempotent-replayed"] = "true"
        case.call.lines_at, case.call.ended_at = [sent_at], sent_at
        case.sight.ended_at, case.sight.times = sent_at, [(sent_at, len(STREAM))]
        case.sight.began_at = case.sight.sent_at = case.call.at = sent_at - 1
        case.record.books = {0: book(settled(settled_ms=round(sent_at * 1000)))}

    return change


def cut_short_at(ended_at, *troubles):
    """Let a stream's worker have had these troubles, and the stream have ended as if it had been cut short."""

    def change(case):
        error = envelope(code="overloaded").decode()
        case.sight.payload = f"data: {LINE}\n\ndata: {error}\n\n".encode()
        case.sight.ended_at = ended_at
        case.sight.times = [
            (at, len(case.sight.payload)) for at in (11.0, 16.0, 21.0, 26.0, ended_at) if at <= ended_at
        ]
        case.call.complete, case.call.ended, case.call.ended_at, case.call.reported = False, "closed", ended_at, False
        case.record.books = {0: book(settled(usage_source="estimated"))}
        case.record.troubles = list(troubles)
        case.record.history = replace(case.record.history, workers=2)

    return change


def repeated(*troubles, code="upstream_error", ended_at=30.0, answer=GOOD):
    """Let worker 1 have had a request that broke off, and a repeat at another worker have ended with an error."""

    def change(case):
        case.sight.request = replace(case.sight.request, keyed=True, reads="leaves")
        case.sight.worker, case.sight.ended, case.sight.ended_at = 1, "left", 10.6
        error = b"data: %b\n\n" % envelope(code=code)
        headers = {**case.sight.headers, "idempotent-replayed": "true", "x-request-id": "id-q1"}
        case.twice(began_at=11.0, sent_at=11.0, ended_at=ended_at, payload=error, headers=headers)
        case.record.sights[1].request = replace(REQUEST, name="q1", stream=True, keyed=True)
        case.record.sights[1].times = [(at, len(error)) for at in (11.0, 16.0, 21.0, 26.0, ended_at)]
        case.call.answer, case.call.ended, case.call.ended_at = answer, "cut", 10.6
        case.call.complete = case.call.reported = False
        left = {"usage_source": "estimated", "outcome": "client_disconnected"}
        case.record.books = {0: book(settled(cost_nusd=130_000, **left))}
        case.record.troubles = list(troubles)
        case.record.history = replace(case.record.history, workers=3)

    return change


def stalled(last_at, left_at, *, head=True, code="gateway_timeout", keyed=False):
    """Let a provider that was asked at 10.1 have stalled, and been left at a time, when the stream ended with an error."""

    def change(case):
        if keyed:
            repeated(code=code, ended_at=left_at, answer=Answer(end="stalls"))(case)
        else:
            error = b"data: %b\n\n" % envelope(code=code)
            heard_at(*range(11, int(left_at), 5), left_at)(case)
            case.sight.payload = case.sight.payload.replace(STREAM, error)
            case.call.answer, case.call.ended = Answer(end="stalls", at=0.05 * head), "cut"
            case.call.complete = case.call.reported = False
            case.call.shown_begun, case.record.books = 0, {0: book()}
        case.call.head_sent, case.call.last_at, case.call.ended_at = head, last_at, left_at

    return change


def misnamed(change, **ids):
    """Let the client's error have had these ids, in itself or beside it."""

    def changed(case):
        change(case)
        got = json.loads(case.sight.data[-1]) if case.sight.is_stream else json.loads(case.sight.payload)
        got["request_id"], got["error"]["request_id"] = ids.get("beside", "id-q0"), ids.get("within", "id-q0")
        payload = json.dumps(got).encode()
        case.sight.payload = b": ping\n\n" * 5 + b"data: %b\n\n" % payload if case.sight.is_stream else payload

    return changed


def replayed_as(*, says, has_run, pinged=False):
    """Let a repeat have been answered, and its head say or not that the answer is another request's."""

    def change(case):
        replayed(5.0, 11.0)(case)
        repeat = case.record.sights[1]
        if not says:
            del repeat.headers["idempotent-replayed"]
        if pinged:
            repeat.payload = b": ping\n\n" + repeat.payload
        if has_run:
            again = settled(hold_id="h2", request_id="id-q1", cost_nusd=0)
            case.record.books = {0: book(settled(settled_ms=5_000), again)}

    return change


def timed_out(took_s, *, head_at=None, cut_at=None, **answer):
    """Let the request's own deadline have ended it after a time, with the provider's head at a time, or none."""

    def change(case):
        refused(504, "gateway_timeout", **{"x-should-retry": "false"})(case)
        case.sight.headers |= {"x-mesh-attempts": "1", "x-mesh-routing-attempts": "1"}
        case.record.calls, case.call.answer = [case.call], Answer(delay_s=(head_at or 0.1) - 0.1, **answer)
        case.call.lines_at = []
        case.call.head_sent, case.call.complete, case.call.reported = head_at is not None, False, False
        case.call.ended, case.call.ended_at = "cut" if cut_at else "closed", cut_at or 10.0 + took_s
        case.sight.ended_at, case.sight.times = 10.0 + took_s, [(10.0 + took_s, 300)]

    return change


def closed_at(sent_at, *troubles):
    """Let the connection of a request that was sent at a time have been closed without an answer."""

    def change(case):
        case.sight.ended, case.sight.sent_at, case.sight.status, case.sight.payload = "closed", sent_at, 0, b""
        case.record.troubles, case.record.calls, case.record.books = list(troubles), [], {0: book()}
        case.record.history = replace(case.record.history, workers=2)

    return change


def slow(ended_at, reads="slowly"):
    """Let the stream of a client whose worker was drained at 11.0 have been closed at a time."""

    def change(case):
        cut_short_at(ended_at, Trouble("drained", 11.0, 32.0, 0))(case)
        case.sight.request = replace(case.sight.request, reads=reads)
        case.sight.ended, case.sight.payload = "closed", f"data: {LINE}\n\n".encode()

    return change


def kept(change):
    """Let the request have come on a connection that had been used before."""

    def changed(case):
        change(case)
        case.sight.reused = True

    return changed


def left_at(upstream, provider_left_at, answer=GOOD):
    """Let the client have left at 11.0, and the provider have been left at another time."""

    def change(case):
        case.sight.ended, case.call.upstream, case.call.answer = "left", upstream, answer
        case.record.prices = [(0.0, MODELS | {"plain": replace(MODELS["plain"], routes=(upstream,))})]
        case.call.ended, case.call.ended_at, case.call.complete = "closed", provider_left_at, False
        case.sight.request = replace(case.sight.request, reads="hangs_up")
        case.record.books = {0: book(settled(outcome="client_disconnected"))}

    return change


def broken_down(change):
    """Let the provider have sent an error event by then."""

    def changed(case):
        change(case)
        case.call.broke_down = True

    return changed


def echoed(text):
    def change(case):
        case.failed(502, message=f"No. {text}")

    return change


ENDS, PROMPT, ALIVE = {"ends_are_honest"}, {"answers_are_prompt"}, {"streams_are_alive"}
DEADLINES, IDS = {"deadlines_hold"}, {"ids_are_told"}
NOTE, NAME, NAMED = (0, ": keep-alive"), (1, "event: chunk"), STREAM.replace(b"\n\n", b"\nevent: chunk\n\n", 1)
LOST = {"answers_are_not_lost"}
SEEN = {
    "a provider's comment": (beside(b": keep-alive\n\n" + STREAM, NOTE), STREAMED, set()),
    "a provider's comment beside a ping": (beside(b": ping\n\n: keep-alive\n\n" + STREAM, NOTE), STREAMED, set()),
    "a provider's comment that is lost": (beside(STREAM, NOTE), STREAMED, LOST),
    "a provider's comment that comes twice": (beside(b": keep-alive\n\n" * 2 + STREAM, NOTE), STREAMED, LOST),
    "a provider's comment behind its event": (
        beside(STREAM.replace(b": x-mesh", b": keep-alive\n\n: x-mesh"), NOTE),
        STREAMED,
        LOST,
    ),
    "an event's name": (beside(NAMED, NAME), STREAMED, set()),
    "an event's name that is lost": (beside(STREAM, NAME), STREAMED, LOST),
    "an event's id": (beside(STREAM.replace(b"\n\n", b"\nid: 1\n\n", 1)), STREAMED, LOST),
    "a wait before another connection": (beside(b"retry: 3000\n\n" + STREAM), STREAMED, LOST),
    "an event on its way": (sent_at(10.61), STREAMED, set()),
    "an event that was held": (sent_at(10.59), STREAMED, PROMPT),
    "an end on its way": (sent_at(11.0, 10.61), STREAMED, set()),
    "an end that was held": (sent_at(11.0, 10.59), STREAMED, PROMPT),
    "[DONE] on its way": (lingered(11.39, 14.0, 14.0), STREAMED, set()),
    "[DONE] that was held": (lingered(11.41, 14.0, 14.0), STREAMED, PROMPT),
    "[DONE] of an answer without it": (lingered(14.0, 14.0, 14.0, Answer(end="no_done")), STREAMED, set()),
    "the end of a body that ends": (lingered(11.0, 12.0, 12.0), STREAMED, set()),
    "the end of a body that doesn't": (lingered(11.0, 14.39, 20.0), STREAMED, set()),
    "the end of a body that is waited for": (lingered(11.0, 14.41, 20.0), STREAMED, PROMPT),
    "the end of a body without [DONE]": (lingered(16.0, 16.0, 16.0, Answer(end="no_done")), STREAMED, set()),
    "an event that waits for a slow store": (sent_at(10.2, 11.0, Trouble("slow", 10.5, 20.0)), STREAMED, set()),
    "an event after a slow store": (sent_at(10.2, 11.0, Trouble("slow", 1.0, 9.9)), STREAMED, PROMPT),
    "an event before a slow store": (sent_at(10.2, 11.0, Trouble("slow", 12.1, 20.0)), STREAMED, PROMPT),
    "an event while a disk is full": (sent_at(10.2, 11.0, Trouble("disk_full", 10.0, 20.0)), STREAMED, PROMPT),
    "a repeat of a running stream": (replayed(11.01, 12.0), STREAMED, set()),
    "a repeat that lags behind": (replayed(10.99, 12.0), STREAMED, PROMPT),
    "a repeat of a finished stream": (replayed(5.0, 11.29), STREAMED, set()),
    "a repeat that waits for nothing": (replayed(5.0, 11.31), STREAMED, PROMPT),
    "a first ping in time": (heard_at(16.4), STREAMED, set()),
    "a first ping too late": (heard_at(16.6), STREAMED, ALIVE),
    "a ping in time": (heard_at(11.0, 17.1), STREAMED, set()),
    "a ping too late": (heard_at(11.0, 17.3), STREAMED, ALIVE),
    "cut short after drain_s": (cut_short_at(31.1, Trouble("drained", 11.0, 32.0, 0)), STREAMED, set()),
    "cut short before drain_s": (cut_short_at(30.9, Trouble("drained", 11.0, 32.0, 0)), STREAMED, REASONS),
    "cut short by a second signal": (
        cut_short_at(20.0, Trouble("drained", 11.0, 32.0, 0), Trouble("drained", 19.9, 32.0, 0)),
        STREAMED,
        set(),
    ),
    "cut short before a second signal": (
        cut_short_at(20.0, Trouble("drained", 11.0, 32.0, 0), Trouble("drained", 20.1, 32.0, 0)),
        STREAMED,
        REASONS,
    ),
    "cut short by the end of another worker": (
        cut_short_at(31.1, Trouble("drained", 11.0, 32.0, 1)),
        STREAMED,
        REASONS,
    ),
    "cut short by a drain long ago": (cut_short_at(31.1, Trouble("drained", 1.0, 9.0, 0)), STREAMED, REASONS),
    "a repeat of a stalled stream at the first one's time-out": (stalled(10.1, 29.95, keyed=True), STREAMED, set()),
    "a repeat that ended before the first one's time-out": (stalled(10.1, 29.85, keyed=True), STREAMED, REASONS),
    "a repeat of what a killed worker ran": (repeated(Trouble("killed", 10.5, 30.0, 1)), STREAMED, set()),
    "a repeat of what another worker ran": (repeated(Trouble("killed", 10.5, 30.0, 2)), STREAMED, REASONS),
    "a repeat of what ran after a worker's death": (repeated(Trouble("killed", 9.9, 30.0, 1)), STREAMED, REASONS),
    "cut short as it came": (cut_short_at(11.0, Trouble("drained", -10.9, 20.0, 0)), STREAMED, set()),
    "cut short as it came much later": (cut_short_at(11.0, Trouble("drained", -11.1, 20.0, 0)), STREAMED, REASONS),
    "a silence after the head": (stalled(11.0, 31.3), STREAMED, set()),
    "a silence that ended too early": (stalled(11.0, 30.7), STREAMED, REASONS),
    "a silence that ended too late": (stalled(11.0, 31.5), STREAMED, DEADLINES),
    "a silence before the head": (stalled(0.0, 40.4, head=False), STREAMED, set()),
    "a silence before the head that ended too early": (stalled(0.0, 39.8, head=False), STREAMED, REASONS),
    "a silence before the head that ended too late": (stalled(0.0, 40.6, head=False), STREAMED, DEADLINES),
    "a silence that is told as a failure": (stalled(11.0, 31.3, code="upstream_error"), STREAMED, REASONS),
    "a whole answer's own deadline": (timed_out(0.5, head_at=0.2), Request("q0", timeout_s=0.5), set()),
    "a whole answer's deadline too early": (timed_out(0.48), Request("q0", timeout_s=0.5), REASONS),
    "a whole answer's deadline too late": (timed_out(0.91), Request("q0", timeout_s=0.5), DEADLINES),
    "a deadline of a stream without a head": (timed_out(0.5), Request("q0", stream=True, timeout_s=0.5), set()),
    "a deadline after a stream broke off": (
        timed_out(0.5, head_at=0.2, cut_at=10.5, end="resets"),
        Request("q0", stream=True, timeout_s=0.5),
        set(),
    ),
    "a deadline before a stream broke off": (
        timed_out(0.5, head_at=0.2, cut_at=10.51, end="resets"),
        Request("q0", stream=True, timeout_s=0.5),
        REASONS,
    ),
    "a deadline after a stream stalled": (
        timed_out(0.5, head_at=0.2, cut_at=10.4, end="stalls"),
        Request("q0", stream=True, timeout_s=0.5),
        REASONS,
    ),
    "a deadline as a stream begins": (timed_out(0.5, head_at=0.41), Request("q0", stream=True, timeout_s=0.5), set()),
    "a deadline of a stream whose head doesn't say so": (
        timed_out(0.5, head_at=0.2, content_type=None),
        Request("q0", stream=True, timeout_s=0.5),
        set(),
    ),
    "a deadline of a stream that had begun": (
        timed_out(0.5, head_at=0.39),
        Request("q0", stream=True, timeout_s=0.5),
        REASONS,
    ),
    "an end that was held, of a key": (with_a_repeat(sent_at(11.0, 10.59)), STREAMED, PROMPT),
    "another request's id": (headed(x_request_id="id-q7"), REQUEST, IDS),
    "an error event of another request": (misnamed(stalled(11.0, 31.3), within="id-q7"), STREAMED, IDS),
    "an error event in another request's name": (misnamed(stalled(11.0, 31.3), beside="id-q7"), STREAMED, IDS),
    "an error in another request's name": (misnamed(denied(BROKE), beside="id-q7"), REQUEST, WAITS | IDS),
    "a repeat that says so": (replayed_as(says=True, has_run=False), STREAMED, set()),
    "a repeat that doesn't say so": (replayed_as(says=False, has_run=False), STREAMED, IDS),
    "a repeat whose ping came first": (replayed_as(says=False, has_run=False, pinged=True), STREAMED, set()),
    "a repeat that has run and says that it hasn't": (
        replayed_as(says=True, has_run=True),
        STREAMED,
        IDS | {"requests_are_logged"},
    ),
    "a deadline": (sent_at(11.0), Request("q0", timeout_s=0.61), set()),
    "a deadline that has passed": (sent_at(11.0), Request("q0", timeout_s=0.59), {"deadlines_hold"}),
    "closed as its worker was drained": (closed_at(10.0, Trouble("drained", 10.09, 20.0, 0)), REQUEST, set()),
    "closed though it had come before the drain": (closed_at(10.0, Trouble("drained", 10.11, 20.0, 0)), REQUEST, ENDS),
    "closed as another worker was drained": (closed_at(10.0, Trouble("drained", 10.0, 20.0, 1)), REQUEST, ENDS),
    "closed after a drain": (closed_at(10.0, Trouble("drained", 1.0, 9.9, 0)), REQUEST, ENDS),
    "closed on a slow client that was cut short": (slow(31.1), STREAMED, set()),
    "closed on a slow client before it was cut short": (slow(30.9), STREAMED, ENDS),
    "closed on a client that reads all": (slow(31.1, "all"), STREAMED, ENDS),
    "closed on a kept connection just after a drain": (
        kept(closed_at(10.0, Trouble("drained", 1.0, 9.91, 0))),
        REQUEST,
        set(),
    ),
    "closed on a kept connection after a drain": (
        kept(closed_at(10.0, Trouble("drained", 1.0, 9.89, 0))),
        REQUEST,
        ENDS,
    ),
    "closed on a kept connection just after a death": (
        kept(closed_at(10.0, Trouble("killed", 9.9, 9.91, 0))),
        REQUEST,
        set(),
    ),
    "closed on a kept connection after a death": (
        kept(closed_at(10.0, Trouble("killed", 9.8, 9.89, 0))),
        REQUEST,
        ENDS,
    ),
    "closed on a new connection just after a death": (closed_at(10.0, Trouble("killed", 9.9, 9.91, 0)), REQUEST, ENDS),
    "closed as its worker was killed": (closed_at(10.0, Trouble("killed", 10.5, 20.0, 0)), REQUEST, set()),
    "closed as another worker was killed": (closed_at(10.0, Trouble("killed", 10.5, 20.0, 1)), REQUEST, ENDS),
    "closed long before its worker was killed": (closed_at(10.0, Trouble("killed", 12.1, 20.0, 0)), REQUEST, ENDS),
    "another body behind a key": (conflicting(12.0, 409), REQUEST, set()),
    "another body behind a key is answered": (conflicting(10.21), REQUEST, {"conflicts_are_refused"}),
    "another body at the same time": (conflicting(10.19), REQUEST, set()),
    "another body after its worker's end": (conflicting(12.0, 200, Trouble("killed", 10.9, 20.0, 0)), REQUEST, set()),
    "a secret of the provider": (echoed(PROVIDER_SECRET), REQUEST, {"bytes_are_ones_own"}),
    "eight characters of it": (echoed(PROVIDER_SECRET[:8]), REQUEST, {"bytes_are_ones_own"}),
    "seven characters of it": (echoed(PROVIDER_SECRET[:7]), REQUEST, set()),
    "a drained answer is left": (left_at("drained", 130.9), REQUEST, {"what_runs_on_is_read"}),
    "a drained answer is left before its client has": (left_at("drained", 10.9), REQUEST, set()),
    "a drained answer is left as its client has": (left_at("drained", 11.0), REQUEST, {"what_runs_on_is_read"}),
    "a drained answer that broke down is left": (broken_down(left_at("drained", 130.9)), REQUEST, set()),
    "a drained answer is left in the end": (left_at("drained", 131.1), REQUEST, set()),
    "an answer is left with its client": (left_at("one", 11.9), REQUEST, set()),
    "an empty answer whose head had come": (left_at("one", 16.0, Answer(error="empty", delay_s=0.99)), REQUEST, set()),
    "an empty answer whose head hadn't": (
        left_at("one", 16.0, Answer(error="empty", delay_s=1.01)),
        REQUEST,
        {"hang_ups_are_noticed"},
    ),
    "an answer is left too late": (left_at("one", 12.1), REQUEST, {"hang_ups_are_noticed"}),
}


@pytest.mark.parametrize(("change", "request_", "broken"), SEEN.values(), ids=SEEN.keys())
def test_what_clients_see_is_judged_at_its_bounds(change, request_, broken):
    assert broken_by(change, request_) == broken


def test_a_kept_connection_has_the_worker_that_it_was_opened_to():
    requests = Request("q0", connection="c1"), Request("q1", at_s=1.0, connection="c1", worker=1)
    record = played(History(1, "kept", workers=2, steps=requests)).record
    assert [sight.worker for sight in record.sights] == [0, 0]


@pytest.mark.parametrize(
    ("complete", "end", "found"), [(True, "resets", False), (False, "no_done", False), (False, "resets", True)]
)
def test_a_repeat_gets_what_a_client_that_left_would_have_got(complete, end, found):
    case = Case()
    case.twice(headers=case.sight.headers | {"x-request-id": "id-q1", "idempotent-replayed": "true"})
    for sight in case.record.sights:
        sight.request = replace(sight.request, keyed=True)
    case.sight.ended, case.call.answer, case.call.complete = "left", Answer(end=end), complete
    assert ("repeats_agree" in {finding.rule for finding in judge(case.record)}) == found


@pytest.mark.parametrize(
    ("settled_at", "fields", "is_right"),
    [
        pytest.param(41.0, {}, True, id="30 s later"),
        pytest.param(40.99, {}, False, id="before"),
        pytest.param(40.99, {"outcome": "upstream_failed"}, True, id="before, by its provider"),
        pytest.param(44.0, {}, True, id="when it is looked at"),
        pytest.param(44.01, {}, False, id="too late"),
        pytest.param(44.01, {"outcome": "completed"}, False, id="too late, as it is complete"),
        pytest.param(44.01, {"size": 65_000}, True, id="with all under way to it"),
        pytest.param(44.01, {"timeout_s": 10.0}, True, id="with an answer that goes on without it"),
        pytest.param(54.0, {"keyed": True}, True, id="when the rest has run on"),
        pytest.param(54.01, {"keyed": True}, False, id="after the rest has run on"),
        pytest.param(44.01, {"trouble": Trouble("slow", 44.9, 60.0)}, True, id="while the store is slow"),
        pytest.param(44.01, {"trouble": Trouble("slow", 45.1, 60.0)}, False, id="before the store is slow"),
    ],
)
def test_a_client_that_takes_nothing_is_given_up_in_time(settled_at, fields, is_right):
    """By what its provider had sent at 11.5, of which the way to it takes 64 KiB."""
    keyed, timeout_s = fields.get("keyed", False), fields.get("timeout_s")
    case = Case(Request("q0", stream=True, reads="stalls", keyed=keyed, timeout_s=timeout_s))
    case.sight.ended, case.sight.ended_at = "left", 101.0
    case.call.lines, case.call.lines_at = ["-" * fields.get("size", 66_000)], [11.5]
    case.call.answer = Answer(gap_s=10.0)
    outcome = fields.get("outcome", "client_disconnected")
    case.record.books = {0: book(settled(settled_ms=round(settled_at * 1000), outcome=outcome))}
    case.record.troubles = [fields["trouble"]] if "trouble" in fields else []
    assert ("holds_are_kept" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("settled_at", "is_right"),
    [
        pytest.param(40.51, True, id="by the first event that may have filled it, with its chunk's framing"),
        pytest.param(40.49, False, id="before that"),
        pytest.param(44.99, True, id="by the event that surely filled it"),
        pytest.param(45.01, False, id="after that"),
    ],
)
def test_the_way_to_a_client_is_full_by_the_framing_of_its_events(settled_at, is_right):
    case = Case(Request("q0", stream=True, reads="stalls"))
    case.sight.ended, case.sight.ended_at = "left", 101.0
    fills = len(case.sight.payload) + 65_536 - 8
    case.call.lines, case.call.lines_at = ["-" * fills, "-" * 9], [11.0, 12.5]
    case.record.books = {0: book(settled(settled_ms=round(settled_at * 1000), outcome="client_disconnected"))}
    assert ("holds_are_kept" not in {finding.rule for finding in judge(case.record)}) == is_right


STALLS = Request("q0", reads="stalls")
SIGNAL = 10.5  # when an instance is told to end whose request ends at 11.0


@pytest.mark.parametrize(
    ("ended_at", "request_", "others", "is_right"),
    [
        pytest.param(11.5, REQUEST, [], True, id="when its request is over"),
        pytest.param(11.51, REQUEST, [], False, id="later"),
        pytest.param(11.51, REQUEST, [Drain(1, 11.2, 11.5)], False, id="later, as another was told"),
        pytest.param(SIGNAL + 20 + 4.5, STALLS, [], True, id="after drain_s"),
        pytest.param(SIGNAL + 20 + 4.51, STALLS, [], False, id="long after drain_s"),
        pytest.param(12.0 + 4.5, STALLS, [Drain(0, 12.0, 16.5)], True, id="after a second signal"),
        pytest.param(12.0 + 4.51, STALLS, [Drain(0, 12.0, 16.51)], False, id="long after a second signal"),
        pytest.param(11.5 + 30, REQUEST, [Trouble("gone", 11.0, 60.0)], True, id="without the store"),
        pytest.param(11.51 + 30, REQUEST, [Trouble("gone", 11.0, 60.0)], False, id="long after that"),
        pytest.param(11.51, REQUEST, [Trouble("gone", 1.0, 10.4)], False, id="when the store is back"),
        pytest.param(11.51, REQUEST, [Trouble("killed", 11.0, 60.0, 1)], False, id="when another was killed"),
    ],
)
def test_an_instance_ends_in_time(ended_at, request_, others, is_right):
    case = Case(request_)
    case.sight.headers["connection"] = "close"
    case.record.history = replace(case.record.history, workers=2)
    case.record.drains = [Drain(0, SIGNAL, ended_at), *(each for each in others if isinstance(each, Drain))]
    case.record.troubles = [each for each in others if isinstance(each, Trouble)]
    assert ("drains_end" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("left_at", "signals", "answer", "complete", "is_right"),
    [
        (SIGNAL - 0.1, [SIGNAL], GOOD, False, True),
        (SIGNAL, [SIGNAL], GOOD, False, False),
        (SIGNAL, [SIGNAL], GOOD, True, True),
        (SIGNAL, [SIGNAL], Answer(gap_s=20.01), False, True),  # for its silence
        (SIGNAL + 19.89, [SIGNAL], GOOD, False, False),
        (SIGNAL + 19.91, [SIGNAL], GOOD, False, True),
        (14.89, [SIGNAL, 15.0], GOOD, False, False),
        (14.91, [SIGNAL, 15.0], GOOD, False, True),
    ],
)
def test_what_runs_on_is_waited_for_by_an_instance_that_ends(left_at, signals, answer, complete, is_right):
    case = Case(replace(REQUEST, keyed=True, reads="leaves"), answer=answer)
    case.sight.headers["connection"] = "close"
    case.sight.ended, case.sight.ended_at, case.call.ended, case.call.ended_at = "left", 10.2, "closed", left_at
    case.call.complete = complete
    case.record.drains = [Drain(0, signal, max(left_at, *signals) + 0.2) for signal in signals]
    assert ("drains_end" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("began_at", "worker", "connection", "is_right"),
    [
        pytest.param(10.89, 0, "close", True, id="to be closed"),
        pytest.param(10.89, 0, None, False, id="to be kept"),
        pytest.param(10.89, 0, "keep-alive", False, id="to be kept, in words"),
        pytest.param(10.91, 0, None, True, id="perhaps before the drain"),
        pytest.param(10.89, 1, None, True, id="of another worker"),
    ],
)
def test_an_answer_in_a_drain_says_that_its_connection_is_closed(began_at, worker, connection, is_right):
    """Its first bytes come at 11.0."""
    case = Case()
    case.sight.headers |= {} if connection is None else {"connection": connection}
    case.record.history = replace(case.record.history, workers=2)
    case.record.drains = [Drain(worker, began_at, 11.3)]
    assert ("drains_end" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("idle", "is_right"),
    [
        pytest.param(Idle(0, 9.0, SIGNAL + 0.5), True, id="closed"),
        pytest.param(Idle(0, 9.0, SIGNAL + 0.51), False, id="kept"),
        pytest.param(Idle(2, 9.0, SIGNAL + 0.51), False, id="kept by the same worker's number"),
        pytest.param(Idle(1, 9.0, SIGNAL + 0.51), True, id="kept by another worker"),
        pytest.param(Idle(0, SIGNAL + 0.1, SIGNAL + 0.6), True, id="closed after its answer"),
        pytest.param(Idle(0, SIGNAL + 0.1, SIGNAL + 0.61), False, id="kept after its answer"),
        pytest.param(Idle(0, SIGNAL + 1.0, SIGNAL + 9.0), True, id="of what is started next"),
    ],
)
def test_a_connection_without_a_request_is_closed_in_a_drain(idle, is_right):
    case = Case()
    case.sight.headers["connection"] = "close"
    case.record.history = replace(case.record.history, workers=2)
    case.record.drains, case.record.idles = [Drain(0, SIGNAL, 11.4)], [idle]
    assert ("drains_end" not in {finding.rule for finding in judge(case.record)}) == is_right


def invalid(name, status, code, param=None, **changes):
    """Let the request have been invalid, and have got this error."""

    def change(case):
        refused(status, code, message="No.")(case)
        error = {"code": code, "message": "No.", "param": param}
        if changes.get("details", status == 422):
            error["details"] = [{"type": "missing", "loc": ["body"], "msg": "No."}]
        case.sight.request = replace(case.sight.request, invalid=name)
        case.sight.payload = envelope(**error)
        case.sight.headers |= {"allow": "POST"} if status == 405 else {}
        case.sight.headers |= changes.get("headers", {})
        case.record.books = {0: book()}
        case.record.troubles = changes.get("troubles", [])

    return change


LET_THROUGH = {"invalid_requests_are_refused"}
INVALID_ONES = {
    "what it should get": (invalid("no messages", 422, "validation_error", "messages"), set()),
    "no param": (invalid("no messages", 422, "validation_error"), LET_THROUGH),
    "no details": (invalid("no messages", 422, "validation_error", "messages", details=False), LET_THROUGH),
    "another code": (invalid("no messages", 422, "bad_request", "messages"), LET_THROUGH | REASONS),
    "another status": (invalid("no messages", 404, "not_found"), LET_THROUGH | REASONS),
    "another method": (invalid("another method", 405, "method_not_allowed"), set()),
    "a method without those that may be used": (
        invalid("another method", 405, "method_not_allowed", headers={"allow": "GET"}),
        LET_THROUGH,
    ),
    "a connection that is closed": (
        invalid("no messages", 422, "validation_error", "messages", headers={"connection": "close"}),
        LET_THROUGH,
    ),
    "a connection that a drain closed": (
        invalid(
            "no messages",
            422,
            "validation_error",
            "messages",
            headers={"connection": "close"},
            troubles=[Trouble("drained", 10.0, 12.0, 0)],
        ),
        set(),
    ),
}


@pytest.mark.parametrize(("change", "broken"), INVALID_ONES.values(), ids=INVALID_ONES.keys())
def test_an_invalid_request_gets_its_error(change, broken):
    assert broken_by(change, REQUEST) == broken


def test_an_invalid_request_is_not_let_through():
    assert "invalid_requests_are_refused" in broken_by(lambda _: None, Request("q0", invalid="no messages"))


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_request_has_one_fault(name):
    body = body_of(REQUEST, MARKER)
    headers = {"content-type": "application/json", "authorization": "Bearer rsk_1"}
    right = spoiled("", headers, body)
    assert right == ("POST /v1/chat/completions", {**headers, "content-length": str(len(body))}, body)
    assert spoiled(name, headers, body) != right


MOST_WAIT = 128 * 1024 + 3 * 65_536 + 2 * len(LINE)  # in the gateway, on both ways, at the provider, and two events
STALLING = Request("q0", stream=True, reads="stalls")


@pytest.mark.parametrize(
    ("sent_bytes", "request_", "answer", "is_right"),
    [
        pytest.param(len(STREAM) + MOST_WAIT, STALLING, GOOD, True, id="what buffers take"),
        pytest.param(len(STREAM) + MOST_WAIT + 1, STALLING, GOOD, False, id="more"),
        pytest.param(10**6, replace(STALLING, keyed=True), GOOD, True, id="for a repeat"),
        pytest.param(10**6, replace(STALLING, reads="slowly"), GOOD, True, id="which was taken in the end"),
        pytest.param(10**6, STALLS, GOOD, True, id="of a whole answer"),
        pytest.param(10**6, STALLING, Answer(gzip=True), True, id="that were more than they seem"),
        pytest.param(10**6, STALLING, Answer(other_shape=True), True, id="of a whole answer in its place"),
    ],
)
def test_a_stream_waits_for_a_client_that_takes_nothing(sent_bytes, request_, answer, is_right):
    case = Case(request_, answer=answer)
    case.call.sent_bytes = sent_bytes
    assert ("streams_wait" not in {finding.rule for finding in judge(case.record)}) == is_right
