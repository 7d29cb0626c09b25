"""The judge of the log.

Both sides of each bound: rows are a change of the good record, its request, and the rules that it breaks.
"""

import json

import pytest
from msgspec.structs import replace

from simulation.history import Request
from simulation.record import Trouble
from tests.simulation.judged import (
    BROKE,
    ERROR,
    NO_KEY,
    PAIR,
    REQUEST,
    STREAMED,
    WAITS,
    Case,
    book,
    broken_by,
    denied,
    failure_of,
    judge,
    line_of,
    settled,
    troubled,
)


@pytest.mark.parametrize(
    ("keyed", "start", "excused"), [(True, ": ping", True), (False, ": ping", False), (True, "data: {}", False)]
)
def test_credit_refuses_a_repeat_behind_its_pings(keyed, start, excused):
    case = Case(Request("q0", stream=True, keyed=keyed))
    words = {**ERROR, "code": "insufficient_credits", "message": "The account has 0.00 USD available, ..."}
    case.sight.payload = f"{start}\n\ndata: {json.dumps({'error': words})}\n\n".encode()
    case.record.calls, case.record.books = [], {0: book()}
    case.record.logged = [line_of(case.record, case.sight, refused_by="credit")]
    assert ("requests_are_logged" not in {finding.rule for finding in judge(case.record)}) == excused


def logged(*lines):
    """Let the log have had these lines of the request, each with other fields than it should have."""

    def change(case):
        case.record.logged = [line_of(case.record, case.sight, **fields) for fields in lines]
        if not lines:
            case.record.logged = [line_of(case.record, case.sight, request_id="id-q7")]

    return change


def failed_as(change, **fields):
    """Let the log's line of the first failed attempt have had these fields."""

    def changed(case):
        change(case)
        first, *others = case.record.calls
        case.record.failed = [failure_of(first, case.record.sights, **fields)]
        case.record.failed += [failure_of(call, case.record.sights) for call in others]

    return changed


def unlogged_until(ended_at):
    """Let the log have no line of a request whose provider is read to its end, at a time."""

    def change(case):
        case.twice(
            request=Request("q7", reads="leaves"),
            request_id="id-q7",
            marker="mk1q7z",
            ended="left",
            headers={},
            status=0,
            payload=b"",
        )
        case.record.books = {0: book(settled(model="drained"))}
        case.sight.request = replace(REQUEST, model="drained")
        case.serve("drained")
        case.call.upstream, case.call.body["model"], case.call.ended_at = "drained", "up-drained", ended_at
        case.record.logged = [line_of(case.record, case.record.sights[1])]

    return change


LOGGED = {"requests_are_logged"}
LOG = {
    **{
        f"an attempt that failed, logged with {name} {wrong}": (
            failed_as(denied(BROKE, NO_KEY), **{name: wrong}),
            PAIR,
            WAITS | {"failures_are_logged"},
        )
        for name, wrong in {
            "upstream": "gone",
            "model": "plain",
            "status": 503,
            "attempt": 3,
            "request_id": "id-q7",
        }.items()
    },
    "attempts that failed, logged": (failed_as(denied(BROKE, NO_KEY)), PAIR, WAITS),
    "a line in the log": (logged({}), REQUEST, set()),
    "two lines in the log": (logged({}, {}), REQUEST, LOGGED),
    "no line in the log": (logged(), REQUEST, LOGGED),
    "no line of a killed worker's that ran on": (
        troubled(unlogged_until(12.5), Trouble("killed", 13.4, 20.0, 0)),
        REQUEST,
        set(),
    ),
    "no line of a killed worker's that had run on": (
        troubled(unlogged_until(12.3), Trouble("killed", 13.4, 20.0, 0)),
        REQUEST,
        LOGGED,
    ),
    "a line as long as the way": (logged({"duration_ms": 600.1}), REQUEST, set()),
    "a line that is too short": (logged({"duration_ms": 599.9}), REQUEST, LOGGED),
    "a short line of a worker that begins": (
        troubled(logged({"duration_ms": 1.0}), Trouble("killed", 5.0, 8.0, 0)),
        REQUEST,
        set(),
    ),
    "a short line of a worker that has begun": (
        troubled(logged({"duration_ms": 1.0}), Trouble("killed", 5.0, 7.9, 0)),
        REQUEST,
        LOGGED,
    ),
    "a line that is too long": (logged({"duration_ms": 1000.1}), REQUEST, LOGGED),
    **{
        f"a line with {name} {wrong}": (logged({name: wrong}), REQUEST, LOGGED)
        for name, wrong in {
            "account": "a1",
            "status": 502,
            "code": "upstream_error",
            "level": "warning",
            "stream": True,
            "model": "pair",
            "upstream": "two",
            "upstream_status": 500,
            "attempts": 2,
            "refused_by": "credit",
            "outcome": "failed",
            "cost_usd": "0.00014",
            "usage_source": "estimated",
            "prompt_tokens": 21,
            "completion_tokens": 7,
            "ttft_ms": 1.0,
        }.items()
    },
    "a line of a stream without its first event": (logged({"ttft_ms": None}), STREAMED, LOGGED),
}


@pytest.mark.parametrize(("change", "request_", "broken"), LOG.values(), ids=LOG.keys())
def test_the_log_is_judged_at_its_bounds(change, request_, broken):
    assert broken_by(change, request_) == broken
