"""The judge of the log, of usage events and of what the API says of an account.

Both sides of each bound: rows are a change of the good record, its request, and the rules that it breaks.
"""

import json

import pytest
from msgspec.structs import replace

from simulation.books import shown_event, shown_rows, sums_of
from simulation.history import Request
from simulation.record import Look, Sample, Told, Trouble, View
from simulation.told import key_of
from tests.simulation.judged import (
    BROKE,
    COST,
    ERROR,
    GRANTED,
    NO_KEY,
    PAIR,
    REQUEST,
    STREAMED,
    WAITS,
    Case,
    alone,
    book,
    broken_by,
    denied,
    failure_of,
    judge,
    line_of,
    settled,
    told_of,
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


def delayed(delay_s, **fields):
    """Let a provider have begun so late, and the log's line have had these fields."""

    def change(case):
        case.call.answer = replace(case.call.answer, delay_s=delay_s)
        logged(fields)(case)

    return change


def quoted(line):
    """Let the log have had a line with a request's text."""

    def change(case):
        case.record.quoted = [line]

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
            "client": "10.1.0.7",
            "key_id": "key_1",
            "trace_id": "0" * 32,
            "overhead_ms": 0.0,
        }.items()
    },
    "a line of a stream without its first event": (logged({"ttft_ms": None}), STREAMED, LOGGED),
    "a line of a stream's first event as it came": (logged({"ttft_ms": 1000.0}), STREAMED, set()),
    "a line of a stream's first event later than it came": (logged({"ttft_ms": 1000.1}), STREAMED, LOGGED),
    "a line of a stream's first event as its provider sent it": (delayed(0.9, ttft_ms=600.1), STREAMED, set()),
    "a line of a stream's first event before its provider": (delayed(0.9, ttft_ms=599.9), STREAMED, LOGGED),
    "a line of a part until a provider was asked": (logged({"overhead_ms": 100.9}), REQUEST, set()),
    "a line of a part while a provider was asked": (logged({"overhead_ms": 101.1}), REQUEST, LOGGED),
    "a line without a wait, of a worker alone": (alone(logged({"overhead_ms": 0.0}), 40.0), REQUEST, set()),
    "a line with a request's text": (quoted("mk1q0z: the river"), REQUEST, {"bytes_are_ones_own"}),
}


@pytest.mark.parametrize(("change", "request_", "broken"), LOG.values(), ids=LOG.keys())
def test_the_log_is_judged_at_its_bounds(change, request_, broken):
    assert broken_by(change, request_) == broken


WHOLE_EVENT = settled(account="a0", key="key_0", model="plain", started_ms=10_000, upstream="one", attempts=1)


def settled_with(**fields):
    """Let the ledger's event of the request have had these fields, and its sums and the API have agreed with it."""

    def change(case):
        case.record.books = {0: book(settled(**fields))}

    return change


def summed(*field, count):
    """Let an aggregate of the ledger have had another number than its events make."""

    def change(case):
        case.record.books = {0: book(WHOLE_EVENT, sums=sums_of([WHOLE_EVENT]) | {field: count})}

    return change


def granted_to(balance):
    """Let the event of the account's grant have had this balance."""

    def change(case):
        ((granted, *others),) = [case.record.books[0].events]
        case.record.books = {0: replace(case.record.books[0], events=(granted | {"balance_nusd": balance}, *others))}

    return change


def shown(event=None, row=None, more=()):
    """Let the API have had other fields of the request's event, of its row, or more rows than one."""

    def change(case):
        rows = [each | (row or {}) for each in shown_rows([WHOLE_EVENT])]
        case.record.told = {
            0: Told([shown_event(WHOLE_EVENT) | (event or {})], [*rows, *(rows[0] | each for each in more)])
        }

    return change


BALANCE, REPORTED, API = {"books_balance"}, {"tokens_are_reported"}, {"accounts_are_told"}
HOUR = ("hour:1970-01-01T00", "key_0", "plain", "")
BOOKS = {
    "an event of another key": (settled_with(key="key_1"), LOGGED | REPORTED),
    "an event of another account": (settled_with(account="a1"), LOGGED | REPORTED),
    "an event of another upstream": (settled_with(upstream="two"), LOGGED),
    "an event of another model": (settled_with(model="pair"), LOGGED | REPORTED),
    "an event of two attempts": (settled_with(attempts=2), LOGGED),
    "an event with a code": (settled_with(code="upstream_error", upstream_status=200), LOGGED),
    "an event of tokens in no report": (settled_with(cache_write_tokens=1), REPORTED),
    "an event that begins when its client does": (settled_with(started_ms=9_999), set()),
    "an event that begins before": (settled_with(started_ms=9_998), REPORTED),
    "an event that begins when its provider is asked": (settled_with(started_ms=10_100), set()),
    "an event that begins later": (settled_with(started_ms=10_102), REPORTED),
    "sums of an hour": (summed(*HOUR, "requests", count=1), set()),
    "more requests of an hour": (summed(*HOUR, "requests", count=2), BALANCE),
    "cached tokens of an hour": (summed(*HOUR, "cached", count=1), BALANCE),
    "another hour": (summed("hour:1970-01-01T01", *HOUR[1:], "requests", count=1), BALANCE),
    "another key of an hour": (summed(HOUR[0], "key_1", *HOUR[2:], "requests", count=1), BALANCE),
    "another model of a month": (summed("month:1970-01", "key_0", "pair", "~", "cost", count=1), BALANCE),
    "a grant with its balance": (granted_to(str(GRANTED)), set()),
    "a grant with another balance": (granted_to(str(GRANTED - 1)), BALANCE),
    "a request as the ledger has it": (shown(), set()),
    "a row too many": (shown(more=({"key": "key_1"},)), API),
    "a row of another session": (shown({}, {"session_id": "s1"}), API),
    "a row of more requests": (shown({}, {"requests": 2}), API),
    "a row of another cost": (shown({}, {"cost_usd": "0.00"}), API),
    "a row of cached tokens": (shown({}, {"cached_tokens": 1}), API),
    **{
        f"a request that the API has with {name} {wrong}": (shown({name: wrong}), API)
        for name, wrong in {
            "request_id": "id-q7",
            "account": "a1",
            "key_id": "key_1",
            "session_id": "s1",
            "model": "pair",
            "attempts": 2,
            "outcome": "failed",
            "usage_source": "none",
            "code": "upstream_error",
            "prompt_tokens": 21,
            "completion_tokens": 7,
            "cached_tokens": 1,
            "reasoning_tokens": 1,
            "cost_usd": f"0.{COST - 1:09d}",
            "started_at": "1970-01-01T00:00:10.001Z",
            "settled_at": "1970-01-01T00:00:11Z",
        }.items()
    },
}


def looked(at=9.0, troubles=(), limits=None, spend=None, keys=None, **fields):
    """Let `/v1/key` have said this of a key with four slots, which one request has from 10.1 to 11.0."""

    def change(case):
        case.key(max_parallel=4, budget_nusd=GRANTED, burst=700)
        case.record.samples, case.record.looks = [Sample(1.0, 0, GRANTED, 0)], []
        look = Look(0, at, at + 0.1, GRANTED, 0, GRANTED)
        case.record.key_ids, case.record.troubles = ["key_0"], list(troubles)
        case.record.books = {0: book(WHOLE_EVENT)}
        told = told_of(case.record, look, **fields)
        told["limits"] = [bucket | (limits or {}).get(bucket["kind"], {}) for bucket in told["limits"]][:keys]
        case.record.looks = [look._replace(told=told | {"spend": told["spend"] | (spend or {})})]

    return change


COSTS = f"0.{COST:09d}"
KEYS = {
    "a key as it is": (looked(), True),
    "a key of another id": (looked(id="key_1"), False),
    "a key of another account": (looked(account="a1"), False),
    "a key with models": (looked(models=["plain"]), False),
    "a key that expires": (looked(expires_at="2026-01-01T00:00:00Z"), False),
    "a key with a model": (looked(default_model="plain"), False),
    "a key without its budget": (looked(budgets={"total_usd": None, "daily_usd": None, "monthly_usd": None}), False),
    "a key with another limit": (looked(limits={"requests": {"limit": 601}}), False),
    "a key with a limit a day": (looked(limits={"tokens": {"per": "day"}}), False),
    "a key without its slots": (looked(keys=2), False),
    "a bucket that is too full": (looked(limits={"tokens": {"remaining": 1_000_001}}), False),
    "a bucket that isn't full": (looked(limits={"tokens": {"remaining": 999_999, "reset": "1ms"}}), True),
    "a bucket that isn't full, without a wait": (looked(limits={"tokens": {"remaining": 999_999}}), False),
    "a bucket with less than its burst": (looked(limits={"requests": {"remaining": 600, "reset": "10s"}}), True),
    "a bucket with more than its burst": (looked(limits={"requests": {"remaining": 701}}), False),
    "a slot that is taken before a request": (looked(limits={"parallel": {"remaining": 3}}), False),
    "a slot that is taken during a request": (looked(10.2, limits={"parallel": {"remaining": 3}}), True),
    "no slot that is taken during a request": (looked(10.2), False),
    "no slot after a fault": (looked(10.2, [Trouble("gone", 1.0, 2.0)]), True),
    "a slot that is taken long after a request": (looked(36.1, limits={"parallel": {"remaining": 3}}), False),
    "a slot of a dead worker": (looked(35.9, limits={"parallel": {"remaining": 3}}), True),
    "a spend before it": (looked(10.8, [Trouble("gone", 1.0, 2.0)], spend={"total_usd": COSTS}), False),
    "a spend while it is settled": (looked(10.95, [Trouble("gone", 1.0, 2.0)], spend={"total_usd": COSTS}), True),
    "a spend after it": (looked(11.1), True),
    "no spend of the day after it": (looked(11.1, spend={"day_usd": "0.00"}), False),
    "no spend of the month after it": (looked(11.1, spend={"month_usd": "0.00"}), False),
    "no spend before a failover": (
        looked(11.1, [Trouble("failover", 11.0, 20.0)], spend={"total_usd": "0.00"}),
        True,
    ),
}


@pytest.mark.parametrize(("change", "is_right"), KEYS.values(), ids=KEYS.keys())
def test_a_key_is_judged_by_its_fields(change, is_right):
    assert ("keys_are_told" not in broken_by(change, REQUEST)) == is_right


@pytest.mark.parametrize(("change", "broken"), BOOKS.values(), ids=BOOKS.keys())
def test_usage_is_judged_by_its_fields(change, broken):
    assert broken_by(change, REQUEST) == broken


def test_a_key_has_its_models_and_expires_when_it_does():
    case = Case()
    case.key(models=("plain", "pair"), expires_s=2.0)
    case.record.key_ids = ["key_0"]
    right = key_of(View(case.record), Look(0, 9.0, 9.1, GRANTED, 0, GRANTED))
    assert (right["models"], "expires_at" in right) == (["plain", "pair"], False)


@pytest.mark.parametrize(
    ("outcome", "sent_by", "ended", "trouble", "is_right"),
    [
        ("client_disconnected", 11.6, "whole", None, True),
        ("completed", 11.6, "whole", None, False),
        ("completed", 11.5, "whole", None, True),  # the end may have been on its way
        ("failed", 11.6, "error", None, False),
        ("failed", 11.5, "error", None, True),
        ("upstream_failed", 11.5, "cut", None, False),
        ("shutdown", 11.6, "whole", Trouble("drained", 11.0, 20.0, 1), True),
    ],
)
def test_a_request_whose_client_left_is_told_so(outcome, sent_by, ended, trouble, is_right):
    """Its provider closes at 20.0."""
    case = Case(Request("q0", keyed=True, reads="leaves"))
    case.sight.ended, case.sight.ended_at = "left", 10.5
    case.call.ended_at, case.call.last_at, case.call.ended = 20.0, sent_by, ended
    case.call.complete = ended == "whole"
    case.record.history = replace(case.record.history, workers=2)
    case.record.troubles = [trouble] if trouble else []
    case.record.books = {0: book(settled(outcome=outcome))}
    assert ("requests_are_logged" not in {finding.rule for finding in judge(case.record)}) == is_right
