"""Admission: what is held and debited, what a denial says, and that it leaves no trace."""

import pytest

from meshproxy.ledger.records import BucketState, Denial, Hold
from meshproxy.policy.principal import Budgets, Limits
from tests.harness.waiting import until


async def test_credit_is_held(ledger, ask, read, keys):
    await ledger.grant("acme", 250)
    assert await ledger.admit(ask()) == Hold(ask(), 100, 150, ())
    assert await read.hash(keys.credit) == {"balance": "250", "granted": "250", "held": "100"}
    assert list(await read.hash(keys.holds)) == ["h1"]
    assert await read.hash(keys.held) == {}


async def test_the_last_credit_can_be_held_and_no_more(ledger, ask, store, snapshot):
    await ledger.grant("acme", 100)
    assert await ledger.admit(ask("h1")) == Hold(ask("h1"), 100, 0, ())
    before = await snapshot(store)
    assert await ledger.admit(ask("h2", amount_nusd=1)) == Denial("insufficient_credits", "credit", 0, needed_nusd=1)
    assert await snapshot(store) == before


async def test_an_account_without_credit_leaves_no_key_behind(ledger, ask, store, snapshot):
    assert await ledger.admit(ask()) == Denial("insufficient_credits", "credit", 0, needed_nusd=100)
    assert await snapshot(store) == {}


async def test_what_costs_nothing_needs_no_credit(ledger, ask):
    assert await ledger.admit(ask(amount_nusd=0)) == Hold(ask(amount_nusd=0), 0, 0, ())


async def test_an_overdrawn_account_gets_nothing(ledger, ask):
    await ledger.grant("acme", -1)
    assert await ledger.admit(ask(amount_nusd=0)) == Denial("insufficient_credits", "credit", -1)


async def test_amounts_past_a_million_dollars_are_written_in_digits(ledger, ask, read, keys):
    await ledger.grant("acme", 8_999_999_999_999_999)
    big = ask(amount_nusd=8_999_999_999_999_998)
    assert await ledger.admit(big) == Hold(big, 8_999_999_999_999_998, 1, ())
    assert (await read.hash(keys.credit))["held"] == "8999999999999998"


async def test_without_strict_credit_the_last_hold_may_be_too_large(ledger, ask):
    await ledger.grant("acme", 1)
    first, second = ask("h1", strict=False), ask("h2", strict=False)
    assert await ledger.admit(first) == Hold(first, 100, -99, ())
    assert await ledger.admit(second) == Denial("insufficient_credits", "credit", -99, needed_nusd=100)
    await ledger.grant("acme", 99)
    assert await ledger.admit(second) == Denial("insufficient_credits", "credit", 0, needed_nusd=100)


async def test_a_clamped_hold_takes_what_is_left(ledger, ask):
    await ledger.grant("acme", 70)
    clamped = ask(amount_min_nusd=70)
    assert await ledger.admit(clamped) == Hold(clamped, 70, 0, ())


@pytest.mark.parametrize(("granted", "held"), [(100, 100), (99, 49), (60, 30), (50, 30), (30, 30)])
async def test_a_hold_that_does_not_fit_takes_a_share_and_at_least_its_least(ledger, ask, granted, held):
    await ledger.grant("acme", granted)
    shared = ask(amount_nusd=100, amount_min_nusd=30, share_percent=50)
    assert await ledger.admit(shared) == Hold(shared, held, granted - held, ())
    assert shared.amount_within(granted) == held


async def test_a_clamped_hold_is_denied_below_its_least(ledger, ask):
    await ledger.grant("acme", 69)
    assert await ledger.admit(ask(amount_min_nusd=70)) == Denial("insufficient_credits", "credit", 69, needed_nusd=70)


async def test_a_clamped_hold_fits_the_budgets_too(ledger, ask):
    await ledger.grant("acme", 1000)
    clamped = ask(amount_min_nusd=10, budgets=Budgets(total_nusd=30))
    assert await ledger.admit(clamped) == Hold(clamped, 30, 970, ())


async def test_admitting_again_holds_once(ledger, ask, store, snapshot):
    """A reply may be lost, and the ask repeated."""
    await ledger.grant("acme", 250)
    first = ask(key_limits=Limits(requests_per_minute=1), budgets=Budgets(total_nusd=100))
    admitted = await ledger.admit(first)
    before = await snapshot(store)
    again = await ledger.admit(first)
    assert (again.amount_nusd, again.available_nusd) == (admitted.amount_nusd, admitted.available_nusd)
    assert await snapshot(store) == before


@pytest.mark.parametrize(
    ("budgets", "which"),
    [
        (Budgets(total_nusd=159), "total"),
        (Budgets(daily_nusd=159), "daily"),
        (Budgets(monthly_nusd=159), "monthly"),
        (Budgets(total_nusd=159, daily_nusd=159), "total"),
        (Budgets(total_nusd=300, daily_nusd=159, monthly_nusd=160), "daily"),
    ],
)
@pytest.mark.parametrize("scope", ["key", "session", "account"])
async def test_a_budget_counts_what_is_spent_and_held(ledger, ask, settlement, store, snapshot, budgets, which, scope):
    await ledger.grant("acme", 1000)
    owner = {
        "key": {"budgets": budgets},
        "session": {"session": "s1", "session_budgets": budgets},
        "account": {"account_budgets": budgets},
    }[scope]
    assert isinstance(await ledger.admit(ask("h1", **owner)), Hold)
    before = await snapshot(store)
    denied = Denial("spend_limit", f"{scope} {which} budget", 900, needed_nusd=100, budget_nusd=159, spent_nusd=100)
    assert await ledger.admit(ask("h2", **owner)) == denied  # 100 held
    assert await snapshot(store) == before
    await ledger.settle(settlement("h1", session=owner.get("session")))
    assert (await ledger.admit(ask("h3", **owner))).reason == "spend_limit"  # 60 spent
    assert isinstance(await ledger.admit(ask("h4", amount_nusd=99, **owner)), Hold)


async def test_a_budget_of_nothing_lets_nothing_be_spent(ledger, ask):
    await ledger.grant("acme", 1000)
    denied = await ledger.admit(ask(budgets=Budgets(total_nusd=0)))
    assert Denial("spend_limit", "key total budget", 1000, needed_nusd=100) == denied


async def test_budgets_of_one_key_do_not_bind_another(ledger, ask):
    await ledger.grant("acme", 1000)
    tight = Budgets(total_nusd=100)
    await ledger.admit(ask("h1", budgets=tight))
    assert isinstance(await ledger.admit(ask("h2", key_id="k2", budgets=tight)), Hold)


async def test_yesterdays_and_last_months_spend_does_not_count(ledger, ask, store, keys):
    await ledger.grant("acme", 1000)
    await store.execute("HSET", keys.key_spend("k1"), "total", 500, "day:2020-01-01", 500, "month:2020-01", 500)
    budgets = Budgets(total_nusd=600, daily_nusd=100, monthly_nusd=100)
    assert isinstance(await ledger.admit(ask(budgets=budgets)), Hold)


async def test_requests_are_counted_by_key_and_account(ledger, ask, read, keys):
    await ledger.grant("acme", 1000)
    admitted = await ledger.admit(
        ask(key_limits=Limits(requests_per_minute=60, burst=5), account_limits=Limits(600, tokens_per_minute=6000))
    )
    assert admitted.buckets == (
        BucketState("key", "requests", 60, 4, 1.0),
        BucketState("account", "requests", 600, 599, 0.1),
        BucketState("account", "tokens", 6000, 5990, 0.1),
    )
    assert await read.level(keys.key_bucket("k1"), "requests") == 4
    assert await read.level(keys.bucket, "requests") == 599
    assert await read.level(keys.bucket, "tokens") == 5990


@pytest.mark.parametrize(
    ("limits", "which", "retry_after_s"),
    [
        ({"key_limits": Limits(requests_per_minute=60, burst=1)}, "key requests", 1.0),
        ({"account_limits": Limits(requests_per_minute=6, burst=1)}, "account requests", 10.0),
        ({"key_limits": Limits(tokens_per_minute=15)}, "key tokens", 20.0),
        ({"account_limits": Limits(tokens_per_minute=12)}, "account tokens", 40.0),
        ({"key_limits": Limits(60, 15, 1), "account_limits": Limits(60, 15, 1)}, "key tokens", 20.0),
    ],
)
async def test_an_empty_bucket_says_which_it_is_and_for_how_long(
    ledger, ask, store, snapshot, limits, which, retry_after_s
):
    await ledger.grant("acme", 1000)
    admitted = await ledger.admit(ask("h1", **limits))
    before = await snapshot(store)
    denied = await ledger.admit(ask("h2", **limits))
    assert (denied.reason, denied.which, denied.available_nusd) == ("rate_limit", which, 900)
    assert retry_after_s - 1 < denied.retry_after_s <= retry_after_s
    assert [bucket.limit for bucket in denied.buckets] == [bucket.limit for bucket in admitted.buckets]
    assert await snapshot(store) == before


async def test_retry_after_is_exact(ledger, ask, store, read, keys):
    """A millisecond less does not do, and what it says does."""
    await ledger.grant("acme", 1000)
    limits = {"key_limits": Limits(requests_per_minute=1, burst=1)}
    await ledger.admit(ask("h1", **limits))
    denied = await ledger.admit(ask("h2", **limits))
    await read.age(keys.key_bucket("k1"), round(denied.retry_after_s * 1000) - 1000)
    nearly = await ledger.admit(ask("h2", **limits))
    assert 0 < nearly.retry_after_s <= 1
    await read.age(keys.key_bucket("k1"), round(nearly.retry_after_s * 1000))
    assert isinstance(await ledger.admit(ask("h2", **limits)), Hold)


async def test_credit_is_told_before_rate(ledger, ask):
    await ledger.grant("acme", 100)
    limits = {"key_limits": Limits(requests_per_minute=1)}
    await ledger.admit(ask("h1", **limits))
    assert (await ledger.admit(ask("h2", **limits))).reason == "insufficient_credits"


async def test_a_bucket_refills_to_its_size_and_no_further(ledger, ask, read, keys):
    await ledger.grant("acme", 1000)
    limits = {"key_limits": Limits(requests_per_minute=60, burst=2)}
    await ledger.admit(ask("h1", **limits))
    await read.age(keys.key_bucket("k1"), 3_600_000)
    outcomes = [type(await ledger.admit(ask(f"h{number}", **limits))) for number in (2, 3, 4)]
    assert outcomes == [Hold, Hold, Denial]


async def test_more_tokens_than_a_bucket_can_hold_pass_when_it_is_full_and_leave_a_debt(ledger, ask, read, keys):
    await ledger.grant("acme", 1000)
    limits = {"key_limits": Limits(tokens_per_minute=60)}
    assert isinstance(await ledger.admit(ask("h1", tokens=180, **limits)), Hold)
    assert await read.level(keys.key_bucket("k1"), "tokens") == -120
    denied = await ledger.admit(ask("h2", tokens=1, **limits))
    assert 120 < denied.retry_after_s <= 121
    assert denied.buckets[0].remaining == 0
    full = await ledger.admit(ask("h2", tokens=180, **limits))
    assert 179 < full.retry_after_s <= 180


async def test_lower_limits_hold_at_once(ledger, ask):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", key_limits=Limits(requests_per_minute=100)))
    tight = {"key_limits": Limits(requests_per_minute=1)}
    outcomes = [type(await ledger.admit(ask(f"h{number}", **tight))) for number in (2, 3)]
    assert outcomes == [Hold, Denial]


async def test_higher_limits_do_not_fill_a_bucket(ledger, ask):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", key_limits=Limits(requests_per_minute=1)))
    assert isinstance(await ledger.admit(ask("h2", key_limits=Limits(requests_per_minute=600, burst=5))), Denial)


async def test_a_limit_of_nothing_lets_nothing_through_ever(ledger, ask):
    await ledger.grant("acme", 1000)
    denied = await ledger.admit(ask(key_limits=Limits(requests_per_minute=0)))
    assert (denied.which, denied.retry_after_s) == ("key requests", None)


async def test_a_limit_lowered_to_nothing_never_resets(ledger, ask):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", key_limits=Limits(60, burst=1)))
    denied = await ledger.admit(ask("h2", key_limits=Limits(0, burst=1)))
    assert (denied.retry_after_s, denied.buckets) == (None, (BucketState("key", "requests", 0, 0, 0.0),))


async def test_idle_buckets_go_when_they_are_full_again(ledger, ask, store, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", tokens=600, key_limits=Limits(tokens_per_minute=60), account_limits=Limits(60)))
    assert 595_000 < await store.execute("PTTL", keys.key_bucket("k1")) <= 600_000
    assert 115_000 < await store.execute("PTTL", keys.bucket) <= 120_000


async def test_expired_holds_give_their_credit_back_to_the_next(ledger, ask, read, keys):
    await ledger.grant("acme", 100)
    budgeted = {"budgets": Budgets(total_nusd=100), "session": "s1", "session_budgets": Budgets(total_nusd=100)}
    await ledger.admit(ask("h1", ttl_ms=0, key_limits=Limits(tokens_per_minute=60), **budgeted))
    assert await read.hash(keys.held) == {"key:k1": "100", "session:s1": "100"}
    assert isinstance(await ledger.admit(ask("h2", **budgeted)), Hold)
    assert await read.hash(keys.held) == {"key:k1": "100", "session:s1": "100"}
    assert (await read.hash(keys.credit))["held"] == "100"
    assert (list(await read.hash(keys.holds)), list(await read.hash(keys.abandoned))) == (["h2"], ["h1"])
    assert await read.level(keys.key_bucket("k1"), "tokens") == 50  # tokens are not given back
    event = (await read.events(keys.usage))[-1]
    assert [event[name] for name in ("event", "hold_id", "key", "session", "held_nusd", "tokens")] == [
        "abandoned", "h1", "k1", "s1", "100", "10"
    ]  # fmt: skip


async def test_a_denial_releases_expired_holds_all_the_same(ledger, ask, read, keys):
    await ledger.grant("acme", 100)
    await ledger.admit(ask("h1", ttl_ms=0))
    assert (await ledger.admit(ask("h2", amount_nusd=101))).available_nusd == 100
    assert list(await read.hash(keys.abandoned)) == ["h1"]


async def test_a_hundred_holds_are_released_a_call_where_more_are_not_in_the_way(ledger, ask, store, keys):
    await ledger.grant("acme", 100_000)
    for number in range(150):
        await store.execute("ZADD", keys.deadlines, 1, f"h{number}")  # long forgotten
    await ledger.admit(ask("first"))
    assert await store.execute("ZCARD", keys.deadlines) == 51
    await ledger.balance("acme")
    assert await store.execute("ZCARD", keys.deadlines) == 1


async def test_abandoned_holds_are_forgotten_after_a_week(ledger, ask, settlement, store, read, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", ttl_ms=0))
    await ledger.balance("acme")
    released_ms = int((await read.events(keys.usage))[-1]["abandoned_ms"])
    forgotten_ms = int(await store.execute("ZSCORE", keys.deadlines, "h1"))
    assert forgotten_ms - released_ms == 7 * 86_400_000
    await store.execute("ZADD", keys.deadlines, 1, "h1")
    await ledger.balance("acme")
    assert (await read.hash(keys.abandoned), await store.execute("ZCARD", keys.deadlines)) == ({}, 0)
    assert await ledger.settle(settlement("h1")) is False


async def test_an_abandoned_id_admitted_again_is_held_anew(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", ttl_ms=0))
    await ledger.balance("acme")
    await ledger.admit(ask("h1"))
    assert (list(await read.hash(keys.holds)), await read.hash(keys.abandoned)) == (["h1"], {})
    assert [await ledger.settle(settlement("h1")) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("session", ["two words", "é\n\t{x}", "a" * 256, "-1 -1 00 k1 "])
async def test_a_session_may_be_called_anything(ledger, ask, settlement, read, keys, session):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask(ttl_ms=0, session=session, session_budgets=Budgets(total_nusd=100)))
    assert await read.hash(keys.held) == {f"session:{session}": "100"}
    await ledger.balance("acme")
    assert await read.hash(keys.held) == {}
    assert (await read.events(keys.usage))[-1]["session"] == session
    await ledger.settle(settlement(session=session))
    assert (await read.hash(keys.session_spend(session)))["total"] == "60"


async def test_an_account_s_budget_holds_for_all_its_keys_together(ledger, ask, settlement):
    await ledger.grant("acme", 1000)
    budget = {"account_budgets": Budgets(monthly_nusd=150)}
    await ledger.admit(ask("h1", key_id="k1", **budget))
    await ledger.settle(settlement("h1", key_id="k1"))
    assert isinstance(await ledger.admit(ask("h2", key_id="k2", amount_nusd=90, **budget)), Hold)
    denied = await ledger.admit(ask("h3", key_id="k3", amount_nusd=1, **budget))
    assert (denied.which, denied.budget_nusd, denied.spent_nusd) == ("account monthly budget", 150, 150)


async def test_requests_a_day_are_counted_over_the_day(ledger, ask, read, keys):
    await ledger.grant("acme", 1000)
    limits = {"key_limits": Limits(requests_per_minute=600, requests_per_day=2)}
    outcomes = [await ledger.admit(ask(f"h{number}", **limits)) for number in range(3)]
    assert [type(outcome) for outcome in outcomes] == [Hold, Hold, Denial]
    assert outcomes[2].which == "key requests per day"
    assert 43_190 < outcomes[2].retry_after_s <= 43_200
    assert outcomes[1].buckets[-1] == BucketState("key", "requests", 2, 0, outcomes[1].buckets[-1].reset_s, "day")
    await read.age(keys.key_bucket("k1"), 43_200_000)
    assert isinstance(await ledger.admit(ask("h4", **limits)), Hold)


async def test_a_bucket_of_a_day_lasts_until_it_is_full(ledger, ask, store, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", account_limits=Limits(requests_per_day=2)))
    assert 43_190 < await store.execute("TTL", keys.bucket) <= 43_200


@pytest.mark.parametrize("scope", ["key", "account"])
async def test_so_many_requests_run_in_parallel(ledger, ask, settlement, store, snapshot, scope):
    await ledger.grant("acme", 1000)
    limits = {f"{scope}_limits": Limits(max_parallel=2)}
    for number in range(2):
        assert isinstance(await ledger.admit(ask(f"h{number}", **limits)), Hold)
    before = await snapshot(store)
    denied = await ledger.admit(ask("h2", **limits))
    assert (denied.reason, denied.which, denied.retry_after_s) == ("rate_limit", f"{scope} parallel requests", 1.0)
    assert await snapshot(store) == before
    await ledger.settle(settlement("h0"))
    assert isinstance(await ledger.admit(ask("h2", **limits)), Hold)


async def test_keys_have_slots_of_their_own_and_share_those_of_the_account(ledger, ask):
    await ledger.grant("acme", 1000)
    limits = {"key_limits": Limits(max_parallel=1), "account_limits": Limits(max_parallel=2)}
    outcomes = [await ledger.admit(ask(f"h-{key}", key_id=key, **limits)) for key in ("k1", "k2", "k3")]
    assert [type(outcome) for outcome in outcomes] == [Hold, Hold, Denial]
    assert outcomes[2].which == "account parallel requests"


@pytest.mark.parametrize("scope", ["key", "account"])
async def test_the_slot_of_a_dead_worker_is_free_at_its_hold_s_deadline(ledger, ask, scope):
    await ledger.grant("acme", 1000)
    limits = {f"{scope}_limits": Limits(max_parallel=1)}
    await ledger.admit(ask("h1", ttl_ms=0, **limits))
    assert isinstance(await ledger.admit(ask("h2", **limits)), Hold)


async def test_a_renewed_request_keeps_its_slot(ledger, ask):
    await ledger.grant("acme", 1000)
    limits = {"key_limits": Limits(max_parallel=1)}
    hold = await ledger.admit(ask("h1", ttl_ms=30, **limits))
    await ledger.renew(hold, amount_nusd=100, ttl_ms=60_000)
    await ledger.grant("other", 1000)
    await ledger.admit(ask("h3", account="other", key_id="k3", ttl_ms=30, **limits))
    await until(lambda: admitted(ledger, ask("h4", account="other", key_id="k3", **limits)))  # so long ago it is
    assert isinstance(await ledger.admit(ask("h2", **limits)), Denial)


async def admitted(ledger, asked):
    return isinstance(await ledger.admit(asked), Hold)


async def test_no_parallel_requests_at_all_are_none(ledger, ask):
    await ledger.grant("acme", 1000)
    assert isinstance(await ledger.admit(ask(key_limits=Limits(max_parallel=0))), Denial)


@pytest.mark.parametrize("limits", [{}, {"budgets": Budgets(1000)}, {"account_limits": Limits(max_parallel=400)}])
async def test_hundreds_of_dead_holds_make_no_false_denial(ledger, ask, store, keys, limits):
    await ledger.grant("acme", 1000)
    for number in range(350):
        await ledger.admit(ask(f"dead-{number}", amount_nusd=2, **limits))
    for number in range(350):
        await store.execute("ZADD", keys.deadlines, 1, f"dead-{number}")
    assert isinstance(await ledger.admit(ask("h1", amount_nusd=900, **limits)), Hold)


async def test_a_clock_put_back_makes_no_untrue_wait(ledger, ask, read, keys):
    """The stored time lies half a minute ahead: the wait told is the wait there is."""
    await ledger.grant("acme", 1000)
    limits = {"key_limits": Limits(requests_per_minute=60, burst=1)}
    await ledger.admit(ask("h1", **limits))
    await read.age(keys.key_bucket("k1"), -30_000)
    denied = await ledger.admit(ask("h2", **limits))
    assert 0 < denied.retry_after_s <= 1.0
    await read.age(keys.key_bucket("k1"), round(denied.retry_after_s * 1000))
    assert isinstance(await ledger.admit(ask("h2", **limits)), Hold)
