import json
import math

import pytest

from meshproxy.config import Credits, Defaults
from meshproxy.gateway.admit import affordable, first_slice, limit_headers, limits_of, make_hold_request, may_clamp
from meshproxy.gateway.exchange import denial_response
from meshproxy.ledger.records import Denial, Hold
from meshproxy.policy.principal import Account, Budgets, Limits, Principal
from tests.gateway.parts import BODY, ask, bucket, plan, principal

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
    assert first_slice(plan(body), Credits()) == expected


def test_a_slice_is_no_more_than_the_whole():
    assert first_slice(plan(output_cap=100), Credits()) == 100


def test_what_is_held_whole_holds_all_it_can_have():
    assert first_slice(plan(holds_whole=True, output_limit=4000), Credits()) == 4000
    assert first_slice(plan(holds_whole=True, output_limit=4000), Credits(strict=False)) == 1000


def request(**fields):
    return json.dumps({"messages": [{"role": "user", "content": "Hello there"}], **fields}).encode()


@pytest.mark.parametrize(
    ("of_plan", "credit", "expected"),
    [
        (plan(request()), {}, (256, 50)),
        (plan(request(n=2)), {}, (512, 50)),
        (plan(request(), output_limit=100), {}, (100, 50)),
        (plan(request()), {"strict": False}, None),
        (plan(request(max_tokens=1000)), {}, None),
        (plan(request(max_tokens=4000), output_limit=4000), {}, (1000, 50)),
        (plan(request(max_tokens=1000)), {"clamp": True}, (1, 100)),
        (plan(request()), {"clamp": True}, (1, 50)),
        (plan(request(stream=True)), {}, None),
        (plan(request(stream=True), holds_whole=True), {}, (256, 50)),
        (plan(request(stream=True)), {"clamp": True}, (1, 100)),
    ],
)
def test_how_little_is_enough_and_which_share_is_taken_then(of_plan, credit, expected):
    asked = make_hold_request(of_plan, 999, principal(), "h", Credits(**credit), Defaults(), enforce_mid_stream=False)
    least = None if expected is None else PROMPT_NUSD + expected[0] * 10_000
    assert asked.amount_min_nusd == least
    assert expected is None or asked.share_percent == expected[1]


def test_what_the_ledger_is_asked():
    caller = principal(budgets=Budgets(daily_nusd=5), session=Budgets(total_nusd=6), limits=Limits(burst=3))
    of_plan = plan(b'{"session_id":"s","max_tokens":1000,%b' % BODY[1:])
    asked = make_hold_request(of_plan, 99, caller, "h1", Credits(hold_ttl_s=30), Defaults(), enforce_mid_stream=False)
    assert (
        asked.hold_id,
        asked.account,
        asked.key_id,
        asked.session,
        asked.ttl_ms,
        asked.strict,
    ) == ("h1", "acme", "k", "s", 30_000, True)
    assert (asked.amount_nusd, asked.amount_min_nusd, asked.tokens) == (PROMPT_NUSD + 99 * 10_000, None, 1018)
    assert (Limits(600, 1_000_000, 3), Limits()) == (asked.key_limits, asked.account_limits)
    assert (Budgets(daily_nusd=5), Budgets(total_nusd=6)) == (asked.budgets, asked.session_budgets)


def test_where_tokens_end_streams_only_a_slice_is_reserved():
    asked = make_hold_request(plan(), 256, principal(), "h", Credits(), Defaults(), enforce_mid_stream=True)
    assert asked.tokens == 18 + 256


@pytest.mark.parametrize(
    ("of_key", "of_all", "expected"), [(None, True, True), (False, True, False), (True, False, True)]
)
def test_the_key_decides_about_clamping_before_the_configuration(of_key, of_all, expected):
    assert may_clamp(principal(clamp=of_key), Credits(clamp=of_all)) == expected


def held(tokens, free_tokens=0):
    """What was admitted: credit for the prompt and so many tokens, and so many more that are free."""
    return Hold(ask(), PROMPT_NUSD + tokens * 10_000, free_tokens * 10_000, ())


@pytest.mark.parametrize(
    ("of_plan", "admitted", "clamp", "expected"),
    [
        (plan(request()), held(42, 10**6), False, 42),
        (plan(request()), held(1000, 10**6), False, None),
        (plan(request()), held(1000, 1010), False, None),
        (plan(request()), held(1000, 900), False, 1000),
        (plan(request(max_tokens=1000)), held(1000), False, None),
        (plan(request(max_tokens=1000)), held(42), True, 42),
        (plan(request(max_tokens=4000), output_limit=4000), held(2000), False, 2000),
        (plan(request(stream=True)), held(42, 58), True, 100),
        (plan(request(stream=True)), held(42, 58), False, None),
        (plan(request(stream=True), holds_whole=True), held(42, 58), False, 42),
    ],
)
def test_the_cap_that_fits_what_was_held(of_plan, admitted, clamp, expected):
    cut = affordable(of_plan, admitted, clamp=clamp)
    assert (cut.imposed_cap, cut.clamped) == (expected, expected is not None)
    assert cut.output_limit == (expected or of_plan.output_limit)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (Limits(), Limits(600, 1_000_000)),
        (Limits(requests_per_minute=5), Limits(5, 1_000_000)),
        (Limits(tokens_per_minute=0, burst=2), Limits(600, 0, 2)),
    ],
)
def test_a_keys_limits_come_before_the_defaults(own, expected):
    assert limits_of(principal(limits=own), Defaults()) == expected


def test_an_account_has_no_default_limits():
    caller = Principal(principal().key, Account("acme", limits=Limits(requests_per_minute=7)))
    asked = make_hold_request(plan(), 99, caller, "h", Credits(), Defaults(), enforce_mid_stream=False)
    assert Limits(7) == asked.account_limits


@pytest.mark.parametrize(
    ("denied", "status", "code", "words", "wait"),
    [
        (Denial("rate_limit", "key requests", 0, 0.25), 429, "rate_limit_exceeded", "key requests per minute", 0.25),
        (Denial("rate_limit", "key tokens", 0, None), 429, "rate_limit_exceeded", "no key tokens", math.inf),
        (
            Denial("spend_limit", "account daily budget", 0, needed_nusd=3000, budget_nusd=2000, spent_nusd=1000),
            402,
            "spend_limit_exceeded",
            "account daily budget of 0.000002 USD leaves too little: 0.000001 USD spent or held, 0.000003 USD needed",
            None,
        ),
        (
            Denial("rate_limit", "key requests per day", 0, 9),
            429,
            "rate_limit_exceeded",
            "key requests per day. Try",
            9,
        ),
        (Denial("rate_limit", "key parallel requests", 0, 1), 429, "rate_limit_exceeded", "parallel requests. Try", 1),
        (Denial("insufficient_credits", "credit", 5 * 10**8), 402, "insufficient_credits", "0.50 USD", None),
        (
            Denial("insufficient_credits", "credit", -1),
            402,
            "insufficient_credits",
            "has -0.000000001 USD available",
            None,
        ),
    ],
)
def test_what_a_denial_says(denied, status, code, words, wait):
    response = denial_response(denied)
    assert (response.status, response.code, response.retry_after_s) == (status, code, wait)
    assert words in response.message


def test_the_tightest_bucket_is_told():
    buckets = (
        bucket(remaining=50),
        bucket(scope="account", limit=90, remaining=7, reset_s=0.5),
        bucket(kind="tokens", limit=1000, remaining=-30, reset_s=61),  # in debt
    )
    assert limit_headers(buckets) == [
        ("x-ratelimit-limit-requests", "90"),
        ("x-ratelimit-remaining-requests", "7"),
        ("x-ratelimit-reset-requests", "500ms"),
        ("x-ratelimit-limit-tokens", "1000"),
        ("x-ratelimit-remaining-tokens", "0"),
        ("x-ratelimit-reset-tokens", "1m1s"),
    ]


def test_without_buckets_nothing_is_told():
    assert limit_headers(()) == []
