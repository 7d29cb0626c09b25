import math

import msgspec
import pytest

from meshproxy.config import Credits, Defaults
from meshproxy.gateway.admission import affordable, ask_for, clamps, first_slice, limit_headers, limits_of, refused
from meshproxy.ledger.records import Admitted, Denied
from meshproxy.policy.principal import Account, Budgets, Limits, Principal
from tests.gateway.parts import BODY, ask, attempt, bucket, plan, principal

PROMPT_NUSD = 18 * 2_500


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (BODY, 1000),
        (b'{"n":2,%b' % BODY[1:], 2000),
        (b'{"stream":true,%b' % BODY[1:], 256),
        (b'{"stream":true,"n":2,%b' % BODY[1:], 512),
        (b'{"stream":true,"n":10,%b' % BODY[1:], 2560),
    ],
)
def test_a_stream_holds_a_slice_and_a_whole_answer_all(body, expected):
    assert expected == first_slice(plan(body), Credits())


def test_a_slice_is_no_more_than_the_whole():
    assert 100 == first_slice(plan(output_cap=100), Credits())


def test_a_stream_of_a_model_that_thinks_in_secret_holds_all_it_can_have():
    secretive = msgspec.structs.replace(attempt(), hidden_reasoning=True)
    assert 4000 == first_slice(plan(attempts=(secretive,), output_limit=4000), Credits())


def test_what_the_ledger_is_asked():
    caller = principal(budgets=Budgets(daily_nusd=5), session=Budgets(total_nusd=6), limits=Limits(burst=3))
    of_plan = plan(b'{"session_id":"s",%b' % BODY[1:])
    asked = ask_for(of_plan, 99, caller, "h1", Credits(hold_ttl_s=30), Defaults(), enforce_mid_stream=False)
    assert ("h1", "acme", "k", "s", 30_000, True) == (
        asked.hold_id,
        asked.account,
        asked.key_id,
        asked.session,
        asked.ttl_ms,
        asked.strict,
    )
    assert (PROMPT_NUSD + 99 * 10_000, None, 1018) == (asked.amount_nusd, asked.amount_min_nusd, asked.tokens)
    assert (Limits(600, 1_000_000, 3), Limits()) == (asked.key_limits, asked.account_limits)
    assert (Budgets(daily_nusd=5), Budgets(total_nusd=6)) == (asked.budgets, asked.session_budgets)


def test_where_tokens_end_streams_only_a_slice_is_reserved():
    asked = ask_for(plan(), 256, principal(), "h", Credits(), Defaults(), enforce_mid_stream=True)
    assert 18 + 256 == asked.tokens


def test_where_output_is_clamped_one_token_is_enough():
    asked = ask_for(plan(BODY), 99, principal(), "h", Credits(clamp=True), Defaults(), enforce_mid_stream=False)
    assert PROMPT_NUSD + 10_000 == asked.amount_min_nusd


@pytest.mark.parametrize(
    ("of_key", "of_all", "expected"), [(None, True, True), (False, True, False), (True, False, True)]
)
def test_the_key_decides_about_clamping_before_the_configuration(of_key, of_all, expected):
    assert expected == clamps(principal(clamp=of_key), Credits(clamp=of_all))


def test_a_plan_is_cut_to_what_was_held():
    cut = affordable(plan(BODY), Admitted(ask(), PROMPT_NUSD + 42 * 10_000, 10**12, ()))
    assert (42, 42, 42, True) == (cut.output_cap, cut.output_limit, cut.imposed_cap, cut.clamped)


def test_a_stream_may_use_what_is_free_besides():
    cut = affordable(plan(), Admitted(ask(), PROMPT_NUSD + 42 * 10_000, 58 * 10_000, ()))
    assert (100, True) == (cut.output_cap, cut.clamped)


def test_what_can_be_paid_is_not_cut():
    whole = plan(BODY)
    assert whole is affordable(whole, Admitted(ask(), 10**12, 0, ()))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (Limits(), Limits(600, 1_000_000)),
        (Limits(requests_per_minute=5), Limits(5, 1_000_000)),
        (Limits(tokens_per_minute=0, burst=2), Limits(600, 0, 2)),
    ],
)
def test_a_keys_limits_come_before_the_defaults(own, expected):
    assert expected == limits_of(principal(limits=own), Defaults())


def test_an_account_has_no_default_limits():
    caller = Principal(principal().key, Account("acme", limits=Limits(requests_per_minute=7)))
    asked = ask_for(plan(), 99, caller, "h", Credits(), Defaults(), enforce_mid_stream=False)
    assert Limits(7) == asked.account_limits


@pytest.mark.parametrize(
    ("denied", "status", "code", "words", "wait"),
    [
        (Denied("rate_limit", "key requests", 0, 0.25), 429, "rate_limit_exceeded", "key requests per minute", 0.25),
        (Denied("rate_limit", "key tokens", 0, None), 429, "rate_limit_exceeded", "no key tokens", math.inf),
        (
            Denied("spend_limit", "account daily budget", 0, needed_nusd=3000, budget_nusd=2000, spent_nusd=1000),
            402,
            "spend_limit_exceeded",
            "account daily budget of 0.000002 USD leaves too little: 0.000001 USD spent or held, 0.000003 USD needed",
            None,
        ),
        (
            Denied("rate_limit", "key requests per day", 0, 9),
            429,
            "rate_limit_exceeded",
            "key requests per day. Try",
            9,
        ),
        (Denied("rate_limit", "key parallel requests", 0, 1), 429, "rate_limit_exceeded", "parallel requests. Try", 1),
        (Denied("insufficient_credits", "credit", 5 * 10**8), 402, "insufficient_credits", "0.50 USD", None),
        (Denied("insufficient_credits", "credit", -1), 402, "insufficient_credits", "0.00 USD", None),
    ],
)
def test_what_a_denial_says(denied, status, code, words, wait):
    problem = refused(denied)
    assert (status, code, wait) == (problem.status, problem.code, problem.retry_after_s)
    assert words in problem.message


def test_the_tightest_bucket_is_told():
    buckets = (
        bucket(remaining=50),
        bucket(scope="account", limit=90, remaining=7, reset_s=0.5),
        bucket(kind="tokens", limit=1000, remaining=900, reset_s=61),
    )
    assert [
        ("x-ratelimit-limit-requests", "90"),
        ("x-ratelimit-remaining-requests", "7"),
        ("x-ratelimit-reset-requests", "500ms"),
        ("x-ratelimit-limit-tokens", "1000"),
        ("x-ratelimit-remaining-tokens", "900"),
        ("x-ratelimit-reset-tokens", "1m1s"),
    ] == limit_headers(buckets)


def test_without_buckets_nothing_is_told():
    assert [] == limit_headers(())
