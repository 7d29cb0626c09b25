"""The judge of limits and their buckets.

Both sides of each bound: rows are a change of the good record, its request, and the rules that it breaks.
"""

import json

import pytest
from msgspec.structs import replace

from simulation.accounts import Bucket
from simulation.bills import least_held
from simulation.client import Sight, body_of
from simulation.history import MODELS, Request
from simulation.limits import Taken, level_at_least, level_at_most
from simulation.record import Beat, Done, Sample, Trouble
from simulation.told import usd_of
from tests.simulation.judged import (
    COST,
    MARKER,
    REASONS,
    REQUEST,
    WAITS,
    Case,
    alone,
    book,
    broken_by,
    broken_call,
    failed_before,
    false_wait,
    headed,
    judge,
    refused,
    settled,
    tokens_kept,
    troubled,
)


@pytest.mark.parametrize(("changed_at", "found"), [(7.89, ["waits_are_true"]), (7.91, [])])
def test_a_limit_that_was_changed_just_before_excuses_a_false_wait(changed_at, found):
    case = Case()
    false_wait(case)
    case.record.changes.append(Done("requests_per_minute", 1.0, changed_at, 0, 0, 1))
    assert [each.rule for each in judge(case.record) if each.rule == "waits_are_true"] == found


def felt(change, at, what="gone"):
    """Let a trouble of the store have begun at a time too."""
    return troubled(change, Trouble(what, at, at + 1))


def remaining(tokens, **fields):
    """Let a bucket of 1,000 tokens have had so many after an admission that took 84 to `MOST_TOKENS`."""

    def change(case):
        case.key(tokens_per_minute=1000)
        case.tell_limits(tokens=tokens)
        case.record.books = {0: book(settled(settled_ms=11_000, **fields))}

    return change


LEAST_TOKENS = 84  # that an admission of the good record takes


def reset(kind, told, **fields):
    """Let a bucket's reset be told, of a key with 1,000 tokens or with limits of requests."""

    def change(case):
        limits = {name: value for name, value in fields.items() if name != "requests"}
        case.key(**(limits or {"tokens_per_minute": 1000}))
        case.tell_limits(**{f"reset_{kind}": told}, **{name: fields[name] for name in fields if name == "requests"})

    return change


def unknown(change):
    """Let another request of the key have been lost, so that nothing is known of what it took."""

    def changed(case):
        change(case)
        other = Sight(Request("q1"), "mk1q1z", "id-q1", b"", 10.0, sent_at=10.0, ended="left", ended_at=10.05)
        case.record.sights.append(other)

    return changed


def without(name):
    def change(case):
        del case.sight.headers[name]

    return change


def changed_to(limit, at):
    """Let the head name another limit of requests, to which the key's was changed at a time."""

    def change(case):
        case.record.changes.append(Done("requests_per_minute", at, at + 1, 0, 0, limit))
        case.sight.headers |= {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(limit - 1),
            "x-ratelimit-reset-requests": "1s",
        }

    return change


BODY_BYTES = len(body_of(REQUEST, MARKER))
MOST_TOKENS = BODY_BYTES // 3 + 12 + 64  # that an admission takes from a bucket
BUCKETS = {"buckets_are_right"}


@pytest.mark.parametrize(
    ("start", "end", "excused"), [(1.1, 10.0, True), (1.11, 10.0, False), (1.1, 9.99, False), (-5.0, 10.0, True)]
)
def test_a_slot_may_be_taken_while_a_settlement_waits_for_the_store(start, end, excused):
    case = Case()
    limited(1.0, 1, Trouble("refused", start, end), max_parallel=1)(case)
    case.record.sights[1].ended = "whole"
    assert ("statuses_have_reasons" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(("what", "found"), [("killed", True), ("lost_reply", False)])
def test_a_killed_worker_excuses_no_request_too_many(what, found):
    case = Case()
    failed_before(2, 9.0)(case)
    for call in case.record.calls[1:]:
        call.at = 6.0
    case.key(max_parallel=1)
    case.record.troubles = [Trouble(what, 7.0, 8.0)]
    assert ("limits_hold" in {finding.rule for finding in judge(case.record)}) == found


@pytest.mark.parametrize(("killed_at", "excused"), [(5.0, True), (1.0, False)])
def test_a_slot_stays_taken_until_the_deadline_of_a_worker_that_was_killed_with_it(killed_at, excused):
    case = Case()
    limited(1.0, 1, Trouble("killed", killed_at, killed_at + 1, 0), max_parallel=1)(case)
    case.record.sights[1].ended = "whole"
    case.record.sights[1].began_at, case.record.sights[1].ended_at = 4.0, 5.0
    assert ("statuses_have_reasons" not in {finding.rule for finding in judge(case.record)}) == excused


BUDGET = 1_000_000


@pytest.mark.parametrize(
    ("ended_at", "spent", "ended", "troubles", "is_right"),
    [
        pytest.param(9.0, BUDGET, "whole", [], True, id="a request that may be held for"),
        pytest.param(8.99, COST, "whole", [], True, id="the charge of one that is over"),
        pytest.param(8.99, COST + 1, "whole", [], False, id="more than the charge of one that is over"),
        pytest.param(8.99, BUDGET, "closed", [Trouble("killed", 8.5, 9.5, 0)], True, id="a hold that is left behind"),
        pytest.param(8.99, BUDGET, "whole", [Trouble("killed", 1.0, 2.0, 0)], False, id="a kill before it"),
    ],
)
def test_a_budget_counts_a_hold_while_its_request_runs_and_its_charge_after_that(
    ended_at, spent, ended, troubles, is_right
):
    case = Case()
    needed = BUDGET - spent + 1
    words = f"The key total budget of {usd_of(BUDGET)} USD leaves too little: {usd_of(spent)} USD spent or held"
    refused(402, "spend_limit_exceeded", message=f"{words}, {usd_of(needed)} USD needed")(case)
    case.key(budget_nusd=BUDGET)
    case.twice(began_at=8.0, ended_at=ended_at, ended=ended, request=Request("q1"), marker="mk1q1z", status=200)
    case.record.books, case.record.troubles = {0: book(settled(request_id="id-q1"))}, troubles
    found = [finding for finding in judge(case.record) if "402" in finding.words and "q0" in finding.words]
    assert (not found) == is_right, found


KINDS = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "max_parallel": "parallel",
}


def limited(wait_s, others=1, *troubles, **limits):
    """Let a 429 name this wait, after so many requests of the same key 10 s before."""

    def change(case):
        kind = next(KINDS[limit] for limit in limits if limit in KINDS)
        case.key(**limits)
        case.record.troubles = list(troubles)
        refused(429, "rate_limit_exceeded", wait_s, message=f"Rate limit reached: key {kind}.")(case)
        for number in range(others):
            other = Sight(Request(f"q{number + 1}"), f"mk1q{number + 1}z", f"id-q{number + 1}", b"", 0.0, sent_at=0.0)
            other.headers, other.payload = {}, b""
            other.ended, other.ended_at = "left", 0.1
            case.record.sights.append(other)

    return change


def credited(change, *left):
    """Let so much credit have been left before the request, and at each half second of it."""

    def changed(case):
        change(case)
        case.record.samples = [Sample(9.9 + 0.5 * number, 0, amount, 0) for number, amount in enumerate(left)]
        case.record.looks = []

    return changed


def over_budget(case):
    """Let a key's budget of a nano-USD have refused the request."""
    case.key(budget_nusd=1)
    usd = ("0.000000001", "0.000000000", f"0.{LEAST:09d}")
    words = "The key total budget of {} USD leaves too little: {} USD spent or held, {} USD needed.".format(*usd)
    refused(402, "spend_limit_exceeded", message=words)(case)
    case.record.books = {0: book()}


LEAST = least_held(json.loads(body_of(REQUEST, MARKER))) * 2_500 + 16 * 10_000  # nano-USD that admit the request


def tokens_left(*troubles):
    def change(case):
        tokens_kept(case)
        case.record.troubles = list(troubles)

    return change


def waited(settled_at):
    """Let a request for tokens have waited as it was told, in vain, and another have been over at a time."""

    def change(case):
        case.key(tokens_per_minute=1000)
        refused(429, "rate_limit_exceeded", 0.001, message="Rate limit reached: key tokens per minute.")(case)
        payload = case.sight.payload.replace(b"id-q0", b"id-q1")
        case.twice(request=case.sight.request, again=True, status=429, began_at=12.0, ended_at=12.1, payload=payload)
        other = Sight(Request("q7"), "mk1q7z", "id-q7", b"", 5.0, sent_at=5.0, ended="left", ended_at=settled_at)
        case.record.sights.append(other)
        case.record.calls = [broken_call(other, settled_at)]
        case.record.books = {0: book()}

    return change


LIMITS = {
    "tokens of the least estimate": (remaining(1000 - 84), REQUEST, set()),
    "tokens that were hardly taken": (remaining(1000 - 83), REQUEST, BUCKETS),
    "tokens of the most": (remaining(1000 - MOST_TOKENS), REQUEST, set()),
    "tokens beyond the most": (remaining(1000 - MOST_TOKENS - 1), REQUEST, BUCKETS),
    "tokens of a store that was lost": (felt(remaining(5), 10.9), REQUEST, BUCKETS),
    "tokens of a store that failed over before": (felt(remaining(5), 10.9, "failover"), REQUEST, set()),
    "tokens of a store that failed over later": (felt(remaining(5), 11.1, "failover"), REQUEST, BUCKETS),
    "tokens of a clock that jumped": (felt(remaining(5), 12.9, "clock"), REQUEST, set()),
    "tokens of a clock that jumped later": (felt(remaining(5), 13.1, "clock"), REQUEST, BUCKETS),
    "a reset of tokens": (reset("tokens", "6s"), REQUEST, set()),
    "a reset of tokens that is too short": (reset("tokens", "5s"), REQUEST, BUCKETS),
    "a reset of tokens that is too long": (reset("tokens", "7s"), REQUEST, BUCKETS),
    "a reset that nothing can read": (reset("tokens", "6 s"), REQUEST, BUCKETS),
    "a request of sixty": (reset("requests", "1s", requests_per_minute=60), REQUEST, set()),
    "none of sixty": (reset("requests", "0s", requests_per_minute=60, requests=60), REQUEST, BUCKETS),
    "two of sixty": (reset("requests", "2s", requests_per_minute=60, requests=58), REQUEST, BUCKETS),
    "two of sixty, of one of which nothing is known": (
        unknown(reset("requests", "2s", requests_per_minute=60, requests=58)),
        REQUEST,
        set(),
    ),
    "a reset of a burst": (reset("requests", "20s", requests_per_minute=3, burst=2), REQUEST, set()),
    "a reset of another size": (reset("requests", "40s", requests_per_minute=3, burst=2), REQUEST, BUCKETS),
    "a reset of requests that is halved": (reset("requests", "50ms"), REQUEST, BUCKETS),
    "another limit": (headed(x_ratelimit_limit_requests="60"), REQUEST, BUCKETS),
    "no limit": (without("x-ratelimit-limit-requests"), REQUEST, BUCKETS),
    "a limit that was changed before": (changed_to(60, 10.9), REQUEST, set()),
    "a limit that was changed later": (changed_to(60, 11.1), REQUEST, BUCKETS),
    "a wait for a request": (limited(50.0, requests_per_minute=1), REQUEST, set()),
    "a wait for a request that is too long": (limited(50.3, requests_per_minute=1), REQUEST, WAITS),
    "a wait for a share of the requests": (alone(limited(30.0, 2, requests_per_minute=4)), REQUEST, set()),
    "a wait for a share of one request": (alone(limited(30.0, 1, requests_per_minute=4)), REQUEST, REASONS),
    "a wait for a share that is too long": (alone(limited(30.2, 2, requests_per_minute=4)), REQUEST, WAITS),
    "a wait for a share of the tokens": (alone(limited(25.6, 1, tokens_per_minute=300)), REQUEST, set()),
    "a wait for that share that is too long": (alone(limited(25.8, 1, tokens_per_minute=300)), REQUEST, WAITS),
    "a wait for a share of the slots": (alone(limited(1.0, 1, max_parallel=3)), REQUEST, set()),
    "a wait for a share that is free": (alone(limited(1.0, 1, max_parallel=4)), REQUEST, REASONS),
    "a wait for a request of a burst": (limited(20.0, 3, requests_per_minute=3, burst=2), REQUEST, set()),
    "a wait for tokens": (limited(25.6, 3, tokens_per_minute=300), REQUEST, set()),
    "a wait for tokens that is too long": (limited(25.8, 3, tokens_per_minute=300), REQUEST, WAITS),
    "tokens that were kept": (tokens_left(), REQUEST, {"buckets_are_right"}),
    "tokens by a clock that jumps": (tokens_left(Trouble("clock", 12.9, 41.0)), REQUEST, set()),
    "a wait after an outage": (limited(55.0, 1, Trouble("gone", -70, -49.9), requests_per_minute=1), REQUEST, set()),
    "a wait that is too long after an outage": (
        limited(55.3, 1, Trouble("gone", -70, -49.9), requests_per_minute=1),
        REQUEST,
        WAITS,
    ),
    "a wait long after one": (limited(55.0, 1, Trouble("gone", -70, -50.1), requests_per_minute=1), REQUEST, WAITS),
    "a wait by a clock that had jumped": (
        limited(59.0, 1, Trouble("clock", 10.9, 40.0), requests_per_minute=1),
        REQUEST,
        set(),
    ),
    "a wait by a clock that jumps later": (
        limited(59.0, 1, Trouble("clock", 11.1, 40.0), requests_per_minute=1),
        REQUEST,
        WAITS,
    ),
    "a wait for tokens of a template": (
        limited(9.3, 9, tokens_per_minute=1000),
        Request("q0", template="greeting", manner="few"),
        set(),
    ),
    "a wait for tokens of no template": (
        limited(9.5, 9, tokens_per_minute=1000),
        Request("q0", template="greeting", manner="few"),
        WAITS,
    ),
    "a wait for a slot": (limited(1.0, max_parallel=1), REQUEST, set()),
    "a wait for a slot that is too long": (limited(1.2, max_parallel=1), REQUEST, WAITS),
    "a limit where credit is short": (credited(limited(50.0, requests_per_minute=1), LEAST - 1), REQUEST, REASONS),
    "a limit where credit is enough": (credited(limited(50.0, requests_per_minute=1), LEAST), REQUEST, set()),
    "a limit where credit came": (credited(limited(50.0, requests_per_minute=1), LEAST - 1, LEAST), REQUEST, set()),
    "a limit where the store's credit is short": (
        credited(alone(limited(30.0, 2, requests_per_minute=4)), LEAST - 1),
        REQUEST,
        set(),
    ),
    "a budget where credit is short": (credited(over_budget, LEAST - 1), REQUEST, REASONS),
    "a budget where credit is enough": (credited(over_budget, LEAST), REQUEST, set()),
    "a wait while another is settled": (waited(9.71), REQUEST, set()),
    "a wait in vain": (waited(9.69), REQUEST, {"waits_are_true"}),
}


@pytest.mark.parametrize(("change", "request_", "broken"), LIMITS.values(), ids=LIMITS.keys())
def test_limits_are_judged_at_their_bounds(change, request_, broken):
    assert broken_by(change, request_) == broken


@pytest.mark.parametrize(
    ("remaining", "reset", "is_right"),
    [
        (599, "100ms", True),  # the store's, of 600 a minute
        (299, "200ms", True),  # a half
        (299, "199ms", True),  # it may be full by a part of a millisecond
        (299, "202ms", False),
        (298, "400ms", True),
        (298, "200ms", True),  # of 1 to 2 that are taken
        (298, "190ms", False),
        (300, "0s", True),
        (300, "100ms", False),
        (199, "300ms", False),  # a third
        (0, "1m0s", True),
        (0, "1m1s", False),
    ],
)
def test_a_worker_tells_its_share_of_a_limit_without_the_store(remaining, reset, is_right):
    case = Case()
    case.record.history = replace(case.record.history, local=True, workers=2)
    case.record.troubles = [Trouble("gone", 9.0, 60.0)]
    case.sight.headers |= {"x-ratelimit-remaining-requests": str(remaining), "x-ratelimit-reset-requests": reset}
    assert ("buckets_are_right" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("count", "limits", "told", "outage", "is_right"),
    [
        pytest.param(2, {"requests_per_minute": 4}, 2, ("gone", 9.0, 20.0), True, id="a share of the requests"),
        pytest.param(3, {"requests_per_minute": 4}, 2, ("gone", 9.0, 20.0), False, id="more than that"),
        pytest.param(3, {"requests_per_minute": 4}, 1, ("gone", 9.0, 20.0), True, id="all, as no other is known"),
        pytest.param(3, {"requests_per_minute": 4}, 2, ("gone", 10.1, 20.0), True, id="some were the store's"),
        pytest.param(3, {"requests_per_minute": 4}, 2, ("gone", 9.0, 15.09), True, id="the store was back"),
        pytest.param(3, {"requests_per_minute": 4}, 2, ("slow", 9.0, 20.0), True, id="the store was slow"),
        pytest.param(2, {"max_parallel": 4}, 2, ("gone", 9.0, 20.0), True, id="a share of the slots"),
        pytest.param(3, {"max_parallel": 4}, 2, ("gone", 9.0, 20.0), False, id="more slots than that"),
        pytest.param(1, {"max_parallel": 1}, 2, ("gone", 9.0, 20.0), True, id="at least one slot"),
        pytest.param(2, {"max_parallel": 1}, 2, ("gone", 9.0, 20.0), False, id="and no more"),
        pytest.param(
            2, {"tokens_per_minute": 4 * LEAST_TOKENS}, 2, ("gone", 9.0, 20.0), True, id="a share of the tokens"
        ),
        pytest.param(
            2, {"tokens_per_minute": 4 * LEAST_TOKENS - 2}, 2, ("gone", 9.0, 20.0), False, id="more tokens than that"
        ),
        pytest.param(
            2,
            {"tokens_per_minute": 4 * LEAST_TOKENS - 2},
            1,
            ("gone", 9.0, 20.0),
            True,
            id="all tokens, as no other is known",
        ),
        pytest.param(
            2, {"tokens_per_minute": 4 * LEAST_TOKENS - 2}, 2, ("slow", 9.0, 20.0), True, id="tokens of a slow store"
        ),
        pytest.param(
            1, {"tokens_per_minute": LEAST_TOKENS}, 2, ("gone", 9.0, 20.0), True, id="more tokens than a share, once"
        ),
        pytest.param(
            2,
            {"tokens_per_minute": LEAST_TOKENS},
            2,
            ("gone", 9.0, 20.0),
            False,
            id="more tokens than a share, and again",
        ),
    ],
)
def test_a_worker_keeps_to_its_share_of_limits_without_the_store(count, limits, told, outage, is_right):
    case = Case()
    case.key(**limits)
    for number in range(1, count):
        case.twice(request=Request(f"q{number}"), marker=f"mk1q{number}z", request_id=f"id-q{number}")
        case.record.calls.append(replace(case.call, marker=f"mk1q{number}z"))
    case.record.history = replace(case.record.history, local=True, workers=2)
    case.record.troubles = [Trouble(*outage)]
    case.record.beats = [Beat(at, "worker-00001", told) for at in (1.0, 2.0)]
    ids = ({"hold_id": f"worker-00001{number}", "request_id": f"id-q{number}"} for number in range(count))
    case.record.books = {0: book(*(settled(hold="none", held_nusd=0, settled_ms=30_000, **each) for each in ids))}
    assert ("limits_hold" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("outage", "ended_at", "worker", "is_right"),
    [
        pytest.param(("gone", 1.0, 16.0), 9.0, 0, True, id="over just before"),
        pytest.param(("gone", 1.0, 16.0), 8.99, 0, False, id="over, and the worker counts by itself"),
        pytest.param(("gone", 1.0, 16.0), 9.0, 1, False, id="at another worker"),
        pytest.param(("gone", 1.0, 15.99), 8.99, 0, True, id="when the store was back"),
        pytest.param(("refused", 1.0, 16.0), 8.99, 0, True, id="where the store may count"),
        pytest.param(("refused", -30.0, 16.0), -11.0, 0, True, id="until its hold ends"),
        pytest.param(("refused", -30.0, 16.0), -11.1, 0, False, id="when its hold has ended"),
    ],
)
def test_a_slot_is_given_back_without_the_store(outage, ended_at, worker, is_right):
    case = Case()
    limited(1.0, 1, Trouble(*outage), max_parallel=1)(case)
    case.record.prices = [(-60.0, MODELS)]
    other = case.record.sights[1]
    other.began_at, other.ended_at, other.ended, other.worker = ended_at - 1, ended_at, "whole", worker
    case.record.history = replace(case.record.history, local=True, workers=2)
    assert ("statuses_have_reasons" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("taken", "least", "most"),
    [
        pytest.param(Taken(0.0, 0.1, 100, 110, 600, 1.0), 9.0, 31.0, id="made right upwards"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 10, 1.0), 599.0, 600.0, id="made right downwards"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 600, 5.0), 509.0, 521.0, id="not yet made right"),
        pytest.param(Taken(1.9, 3.0, 100, 110, 600, 5.0), 490.0, 600.0, id="perhaps not yet admitted"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 600, 2.05), 9.0, 521.0, id="perhaps made right"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 10, 2.101), 509.0, 600.0, id="made right in the same moment"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 10, 2.103), 509.0, 521.0, id="made right a moment later"),
        pytest.param(Taken(2.2, 3.0, 100, 110, 600, 5.0), 600.0, 600.0, id="later"),
    ],
)
def test_a_bucket_s_level_has_bounds(taken, least, most):
    bounds = level_at_least(BUCKET, [taken], 2.0, 2.1), level_at_most(BUCKET, [taken], 2.0, 2.1)
    assert bounds == pytest.approx((least, most), abs=0.11)


BUCKET = Bucket("tokens", 600, 600)


@pytest.mark.parametrize(("chars", "escapes", "tokens"), [(8_000, 1, 0), (9_000, 1, 1), (90_000, 2, 20)])
def test_an_escape_in_a_long_prompt_may_stand_for_many(chars, escapes, tokens):
    plain, other = (
        {"messages": [{"role": "user", "content": "a" * chars + each * escapes}]} for each in ("bbb", "\u2028")
    )
    assert least_held(plain) - least_held(other) == tokens
