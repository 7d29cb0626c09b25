"""The judge of accounts: their own limits and budgets, and budgets of a day or a month.

Both sides of each bound.
"""

import json

import pytest
from msgspec.structs import replace

from simulation.accounts import AccountPlan, KeyPlan
from simulation.bills import least_held
from simulation.client import body_of, trace_of
from simulation.history import Answer, History, Request
from simulation.record import Done
from simulation.story import played
from simulation.told import usd_of
from tests.simulation.judged import (
    COST,
    GRANTED,
    MARKER,
    REQUEST,
    WHOLE,
    Case,
    book,
    broken_by,
    judge,
    refused,
    settled,
)

DAY_MS = 86_400_000
LEAST = least_held(json.loads(body_of(REQUEST, MARKER))) * 2_500 + 16 * 10_000  # nano-USD that admit the request
MONTH_MS = 31 * DAY_MS


def bounded(case, **limits):
    """Give the account limits or budgets."""
    case.record.history = replace(case.record.history, accounts=(AccountPlan(**limits),))


def other_key(case):
    """Let the second request be of another key of the account."""
    case.record.history = replace(case.record.history, keys=(KeyPlan(), KeyPlan()))
    case.record.sights[1].request = Request("q1", key=1)
    case.record.sights[1].marker = "mk1q1z"
    call = replace(case.call, marker="mk1q1z")
    case.record.calls.append(call)


def rules(case):
    return {finding.rule for finding in judge(case.record)}


@pytest.mark.parametrize(
    ("budgets", "later_ms", "is_right"),
    [
        pytest.param({"budget_nusd": 2 * COST}, 0, True, id="in all, of two keys"),
        pytest.param({"budget_nusd": 2 * COST - 1}, 0, False, id="more in all"),
        pytest.param({"budget_nusd": 2 * COST - 1}, 2 * MONTH_MS, False, id="more in all, over months"),
        pytest.param({"daily_nusd": 2 * COST - 1}, 0, False, id="more on one day"),
        pytest.param({"daily_nusd": COST}, DAY_MS, True, id="on two days"),
        pytest.param({"daily_nusd": COST - 1}, DAY_MS, False, id="more on each of two days"),
        pytest.param({"monthly_nusd": 2 * COST - 1}, DAY_MS, False, id="more in one month"),
        pytest.param({"monthly_nusd": COST}, MONTH_MS, True, id="in two months"),
    ],
)
def test_an_account_spends_its_budget_and_no_more(budgets, later_ms, is_right):
    case = Case()
    bounded(case, **budgets)
    case.twice()
    other_key(case)
    later = settled(hold_id="h2", request_id="id-q1", settled_ms=11_000 + later_ms)
    case.record.books = {0: book(settled(), later)}
    assert ("budgets_hold" not in rules(case)) == is_right


@pytest.mark.parametrize(
    ("held_nusd", "hold", "is_right"),
    [(COST - 1, "live", True), (COST, "abandoned", True), (COST, "live", False)],
)
def test_a_budget_is_passed_by_what_was_used_beyond_a_hold(held_nusd, hold, is_right):
    case = Case()
    bounded(case, daily_nusd=COST - 1)
    case.record.books = {0: book(settled(held_nusd=held_nusd, hold=hold))}
    assert ("budgets_hold" not in rules(case)) == is_right


def threshold(which, percent, budget, spent, key="key_0"):
    event = {
        "event": "threshold",
        "which": which,
        "key": key,
        "percent": percent,
        "budget_nusd": budget,
        "spent_nusd": spent,
    }
    return {name: str(value) for name, value in event.items()}


def half(of="account daily", key="", spent=COST, budget=2 * COST):
    return threshold(f"{of} budget", 50, budget, spent, key)


@pytest.mark.parametrize(
    ("told", "budgets", "key", "is_right"),
    [
        pytest.param([half()], {"daily_nusd": 2 * COST}, {}, True, id="half of a day's"),
        pytest.param([], {"daily_nusd": 2 * COST}, {}, False, id="not told"),
        pytest.param([], {"daily_nusd": 2 * COST + 1}, {}, True, id="less than half"),
        pytest.param([half(budget=2 * COST + 1)], {"daily_nusd": 2 * COST + 1}, {}, False, id="told too early"),
        pytest.param([half(), half()], {"daily_nusd": 2 * COST}, {}, False, id="told twice"),
        pytest.param([half("account total")], {"daily_nusd": 2 * COST}, {}, False, id="of another period"),
        pytest.param([half("key daily", "key_0")], {}, {"daily_nusd": 2 * COST}, True, id="of a key"),
        pytest.param([half("key daily", "key_1")], {}, {"daily_nusd": 2 * COST}, False, id="of another key"),
        pytest.param(
            [half("key monthly", "key_0"), half("account monthly")],
            {"monthly_nusd": 2 * COST},
            {"monthly_nusd": 2 * COST},
            True,
            id="of both",
        ),
        pytest.param(
            [threshold("account total budget", share, COST, COST, "") for share in (50, 80, 100)],
            {"budget_nusd": COST},
            {},
            True,
            id="all three at once",
        ),
    ],
)
def test_a_settlement_tells_of_the_shares_that_it_passes(told, budgets, key, is_right):
    case = Case()
    case.key(**key)
    bounded(case, **budgets)
    case.record.key_ids = ["key_0"]
    case.record.books = {0: book(*told, settled())}
    assert ("thresholds_are_told" not in rules(case)) == is_right


def test_a_share_is_told_of_nothing_that_was_settled():
    case = Case()
    case.record.books = {0: book(settled(), half())}
    assert "thresholds_are_told" in rules(case)


@pytest.mark.parametrize(
    ("named", "budgets", "settled_ms", "is_right"),
    [
        pytest.param("account total", {"budget_nusd": 2 * COST}, 9_000, True, id="an account's"),
        pytest.param("account total", {"daily_nusd": 2 * COST}, 9_000, False, id="one that it hasn't"),
        pytest.param("key total", {"budget_nusd": 2 * COST}, 9_000, False, id="another's"),
        pytest.param("account daily", {"daily_nusd": 2 * COST}, 9_000, True, id="of a day"),
        pytest.param("account daily", {"daily_nusd": 2 * COST}, 9_000 - DAY_MS, False, id="of the day before"),
        pytest.param("account monthly", {"monthly_nusd": 2 * COST}, 9_000 - DAY_MS, False, id="of the month before"),
        pytest.param("account total", {"budget_nusd": 2 * COST}, 9_000 - DAY_MS, True, id="in all"),
    ],
)
def test_a_402_names_what_was_spent_of_its_budget(named, budgets, settled_ms, is_right):
    case = Case()
    amounts = (
        f"{usd_of(2 * COST)} USD leaves too little: {usd_of(COST)} USD spent or held, {usd_of(COST + 1)} USD needed"
    )
    refused(402, "spend_limit_exceeded", message=f"The {named} budget of {amounts}.")(case)
    bounded(case, **budgets)
    case.twice(began_at=7.0, ended_at=8.9)
    other_key(case)
    case.record.books = {0: book(settled(request_id="id-q1", settled_ms=settled_ms))}
    found = [finding for finding in judge(case.record) if "402" in finding.words and "q0" in finding.words]
    assert (not found) == is_right, found


def told_of(**headers):
    """Let the head of an answer say this of a bucket of requests."""

    def change(case):
        case.sight.headers |= {f"x-ratelimit-{name}-requests": value for name, value in headers.items()}

    return change


@pytest.mark.parametrize(
    ("limits", "headers", "is_right"),
    [
        pytest.param(
            {"requests_per_minute": 60}, {"limit": "60", "remaining": "59", "reset": "1s"}, True, id="the account's"
        ),
        pytest.param({"requests_per_minute": 60}, {}, False, id="the key's, which has more"),
        pytest.param({"requests_per_minute": 600}, {}, True, id="either, of the same size"),
        pytest.param({"requests_per_minute": 700}, {}, True, id="the key's, which has less"),
        pytest.param(
            {"requests_per_minute": 60}, {"limit": "60", "remaining": "58", "reset": "2s"}, False, id="too little"
        ),
        pytest.param(
            {"requests_per_day": 10}, {"limit": "10", "remaining": "9", "reset": "2h24m0s"}, True, id="of a day"
        ),
        pytest.param(
            {"requests_per_day": 10},
            {"limit": "10", "remaining": "9", "reset": "6s"},
            False,
            id="in a minute",
        ),
        pytest.param({"requests_per_day": 10}, {}, False, id="of a minute, which has more"),
    ],
)
def test_an_answer_s_head_is_of_the_tightest_bucket(limits, headers, is_right):
    case = Case()
    bounded(case, **limits)
    told_of(**headers)(case)
    assert ("buckets_are_right" not in rules(case)) == is_right


@pytest.mark.parametrize(
    ("limits", "is_right"),
    [
        ({"requests_per_minute": 2}, True),
        ({"requests_per_minute": 1}, False),
        ({"requests_per_minute": 2, "burst": 1}, False),
        ({"requests_per_day": 2}, True),
        ({"requests_per_day": 1}, False),
    ],
)
def test_the_requests_of_all_keys_count_for_their_account(limits, is_right):
    case = Case()
    bounded(case, **limits)
    case.twice()
    other_key(case)
    assert ("limits_hold" not in rules(case)) == is_right


@pytest.mark.parametrize(("most", "is_right"), [(2, True), (1, False)])
def test_the_slots_of_an_account_are_those_of_all_its_keys(most, is_right):
    case = Case()
    bounded(case, max_parallel=most)
    case.twice()
    other_key(case)
    for call in case.record.calls:
        call.at = 9.0
    assert ("limits_hold" not in rules(case)) == is_right


@pytest.mark.parametrize(
    ("limits", "named", "wait_s", "others", "broken"),
    [
        pytest.param({"requests_per_minute": 1}, "account requests per minute", 50.0, 1, set(), id="an account's"),
        pytest.param(
            {"requests_per_minute": 1}, "account requests per minute", 50.3, 1, {"waits_are_told"}, id="longer"
        ),
        pytest.param(
            {"requests_per_minute": 1}, "key requests per minute", 50.0, 1, {"statuses_have_reasons"}, id="a key's"
        ),
        pytest.param({"requests_per_day": 1}, "account requests per day", 86_390.0, 1, set(), id="of a day"),
        pytest.param(
            {"requests_per_day": 1},
            "account requests per day",
            86_390.3,
            1,
            {"waits_are_told"},
            id="of a day, too long",
        ),
        pytest.param(
            {"requests_per_day": 2}, "account requests per day", 43_190.0, 1, {"statuses_have_reasons"}, id="one of 2"
        ),
        pytest.param({"max_parallel": 1}, "account parallel requests", 1.0, 1, set(), id="a slot"),
        pytest.param(
            {"max_parallel": 2}, "account parallel requests", 1.0, 1, {"statuses_have_reasons"}, id="a free slot"
        ),
    ],
)
def test_a_429_names_a_limit_of_the_account(limits, named, wait_s, others, broken):
    def change(case):
        bounded(case, **limits)
        headers = {"x_should_retry": "false"} if wait_s > 60 else {}
        refused(429, "rate_limit_exceeded", wait_s, message=f"Rate limit reached: {named}.")(case)
        case.sight.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        case.twice(began_at=0.0, sent_at=0.0, ended="left", ended_at=0.1, status=0, payload=b"", headers={}, times=[])
        other_key(case)
        case.record.calls.clear()
        case.record.books = {0: book()}

    found = {rule for rule in broken_by(change, REQUEST) if rule in {"statuses_have_reasons", "waits_are_told"}}
    assert found - ({"waits_are_told"} if broken == {"statuses_have_reasons"} else set()) == broken


def twin(case, *, has_run=True, said=MARKER, replayed=False):
    """Let another account's key have sent the same body with the same Idempotency-Key, and have got an answer."""
    case.sight.request = Request("q0", keyed=True)
    case.record.history = replace(case.record.history, credit=(GRANTED, GRANTED), keys=(KeyPlan(), KeyPlan(1)))
    case.twice(marker="mk1q1z", text=MARKER, payload=WHOLE.replace(MARKER.encode(), said.encode()))
    other = case.record.sights[1]
    other.request = Request("q1", keyed=True, key=1, text_of="q0")
    if replayed:
        other.headers["idempotent-replayed"] = "true"
    if has_run:
        call = replace(case.call, marker="mk1q1z", text=MARKER, headers={"traceparent": trace_of("id-q1")})
        case.record.calls.append(call)
    charged = [settled(hold_id="h2", request_id="id-q1")] if has_run else []
    case.record.changes.append(Done("grant", 1.0, 2.0, 1, 0, GRANTED, ok=True, ref="first"))
    case.record.books = {0: book(settled()), 1: book(*charged)}


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        pytest.param({}, set(), id="its own answer"),
        pytest.param({"said": "mk1q1z"}, {"bytes_are_ones_own", "answers_are_not_lost"}, id="in other words"),
        pytest.param(
            {"has_run": False, "replayed": True},
            {"ends_are_honest", "attempts_are_told", "repeats_agree"},
            id="the other account's answer",
        ),
    ],
)
def test_one_body_and_one_idempotency_key_of_two_accounts_are_two_requests(changes, broken):
    assert broken_by(lambda case: twin(case, **changes), REQUEST) == broken


@pytest.mark.parametrize(
    ("midnight_s", "ends_month", "days", "months"), [(1.0, False, 2, 1), (1.0, True, 2, 2), (None, False, 1, 1)]
)
def test_a_history_goes_on_past_midnight(midnight_s, ends_month, days, months):
    requests = tuple(Request(f"q{number}", at_s=number * 2.0, answers=(Answer(),)) for number in range(2))
    run = played(History(5, "any", midnight_s=midnight_s, ends_month=ends_month, steps=requests))
    assert run.findings == []
    spent = run.record.looks[-1].told["spend"]
    kept = {name: spent[f"{name}_usd"] == spent["total_usd"] for name in ("day", "month")}
    assert kept == {"day": days == 1, "month": months == 1}


@pytest.mark.parametrize(
    ("budgets", "settled_ms", "is_right"),
    [
        pytest.param({"budget_nusd": COST + LEAST - 1}, 9_000, False, id="used up"),
        pytest.param({"budget_nusd": COST + LEAST}, 9_000, True, id="not used up"),
        pytest.param({"budget_nusd": COST + LEAST - 1}, 9_999, True, id="used up as it came"),
        pytest.param({"daily_nusd": COST + LEAST - 1}, 9_000, False, id="used up on that day"),
        pytest.param({"daily_nusd": COST + LEAST - 1}, 9_000 - DAY_MS, True, id="used up the day before"),
    ],
)
def test_no_limit_refuses_what_a_budget_refuses(budgets, settled_ms, is_right):
    case = Case()
    bounded(case, requests_per_minute=1, **budgets)
    refused(429, "rate_limit_exceeded", 50.0, message="Rate limit reached: account requests per minute.")(case)
    case.twice(began_at=0.0, sent_at=0.0, ended_at=0.1)
    other_key(case)
    case.record.books = {0: book(settled(request_id="id-q1", settled_ms=settled_ms))}
    found = [finding for finding in judge(case.record) if "429" in finding.words and "id-q0" in finding.words]
    assert (not found) == is_right


@pytest.mark.parametrize(("budget_nusd", "is_right"), [(1_000_000, False), (None, True)])
def test_a_session_has_spent_what_keys_with_a_budget_for_it_spent(budget_nusd, is_right):
    case = Case(Request("q0", session="s1"))
    bounded(case, requests_per_minute=1)
    refused(429, "rate_limit_exceeded", 50.0, message="Rate limit reached: account requests per minute.")(case)
    case.twice(began_at=0.0, sent_at=0.0, ended_at=0.1)
    other_key(case)
    case.record.sights[1].request = Request("q1", key=1, session="s1")
    keys = KeyPlan(session_budget_nusd=COST + LEAST - 1), KeyPlan(session_budget_nusd=budget_nusd)
    case.record.history = replace(case.record.history, keys=keys)
    case.record.books = {0: book(settled(request_id="id-q1", session="s1", settled_ms=9_000))}
    found = [finding for finding in judge(case.record) if "429" in finding.words and "id-q0" in finding.words]
    assert (not found) == is_right
