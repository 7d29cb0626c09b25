"""Renewal: a hold grows while its stream runs, and stays as it was where credit, budgets or buckets refuse."""

import pytest

from meshproxy.ledger.records import Denial, Hold
from meshproxy.openai.usage import Usage
from meshproxy.policy.principal import Budgets, Limits


@pytest.fixture
def admit(ledger, ask):
    """Hold 100 of a grant of 250."""

    async def admit(**fields):
        await ledger.grant("acme", 250)
        return await ledger.admit(ask(**fields))

    return admit


async def test_a_hold_grows_to_the_new_total(ledger, admit, read, keys):
    hold = await admit(budgets=Budgets(total_nusd=300), session="s1", session_budgets=Budgets(total_nusd=300))
    renewed = await ledger.renew(hold, amount_nusd=180)
    assert Hold(hold.request, 180, 70, ()) == renewed
    assert await read.hash(keys.credit) == {"balance": "250", "granted": "250", "held": "180"}
    assert await read.hash(keys.held) == {"key:k1": "180", "session:s1": "180"}


async def test_a_renewal_repeated_or_late_changes_nothing(ledger, admit, read, keys):
    hold = await admit()
    for amount in (180, 180, 120):
        assert (await ledger.renew(hold, amount_nusd=amount)).amount_nusd == 180
    assert (await read.hash(keys.credit))["held"] == "180"


async def test_the_deadline_is_put_off(ledger, admit, store, keys):
    hold = await admit(ttl_ms=1000)
    before = int(await store.execute("ZSCORE", keys.deadlines, "h1"))
    await ledger.renew(hold, amount_nusd=100, ttl_ms=500_000)
    assert 499_000 <= int(await store.execute("ZSCORE", keys.deadlines, "h1")) - before < 600_000


async def test_without_credit_the_hold_stays_and_its_deadline_moves(ledger, admit, read, store, keys):
    hold = await admit(ttl_ms=1000)
    before = int(await store.execute("ZSCORE", keys.deadlines, "h1"))
    record = await read.hash(keys.holds)
    denied = await ledger.renew(hold, amount_nusd=251, ttl_ms=500_000)
    assert Denial("insufficient_credits", "credit", 150, needed_nusd=151) == denied
    assert await read.hash(keys.holds) == record
    assert (await read.hash(keys.credit))["held"] == "100"
    assert int(await store.execute("ZSCORE", keys.deadlines, "h1")) > before + 400_000


async def test_an_overdrawn_account_s_holds_can_still_be_kept(ledger, admit):
    hold = await admit()
    await ledger.grant("acme", -1000)
    assert await ledger.renew(hold, amount_nusd=100) == Hold(hold.request, 100, -850, ())


async def test_without_strict_credit_a_hold_grows_while_something_is_free(ledger, admit):
    hold = await admit(strict=False)
    assert (await ledger.renew(hold, amount_nusd=900)).available_nusd == -650
    assert isinstance(await ledger.renew(hold, amount_nusd=901), Denial)


@pytest.mark.parametrize(
    ("fields", "which"),
    [
        ({"budgets": Budgets(daily_nusd=149)}, "key daily budget"),
        ({"session": "s1", "session_budgets": Budgets(daily_nusd=149)}, "session daily budget"),
    ],
)
async def test_a_budget_binds_renewals(ledger, admit, fields, which, store, snapshot, keys):
    hold = await admit(**fields)
    before = await snapshot(store)
    denied = await ledger.renew(hold, amount_nusd=150)
    assert Denial("spend_limit", which, 150, needed_nusd=50, budget_nusd=149, spent_nusd=100) == denied
    after = await snapshot(store)
    moved = {keys.deadlines: None, keys.script_keys_of_key("k1")[2]: None}
    assert {**after, **moved} == {**before, **moved}
    assert (await ledger.renew(hold, amount_nusd=149)).amount_nusd == 149


async def test_tokens_are_debited_into_debt(ledger, admit, read, keys):
    hold = await admit(key_limits=Limits(tokens_per_minute=60), account_limits=Limits(tokens_per_minute=1000))
    await ledger.renew(hold, amount_nusd=100, tokens=110)
    assert -50 <= await read.level(keys.key_bucket("k1"), "tokens") < -49
    assert 890 <= await read.level(keys.bucket, "tokens") < 910


async def test_renewed_tokens_are_put_right_by_the_settlement(ledger, admit, settlement, read, keys):
    hold = await admit(key_limits=Limits(tokens_per_minute=600))
    await ledger.renew(hold, amount_nusd=100, tokens=110)
    await ledger.renew(hold, amount_nusd=100, tokens=210)
    await ledger.settle(settlement(usage=Usage(100, 20)))
    assert 480 <= await read.level(keys.key_bucket("k1"), "tokens") < 482


async def test_a_debt_denies_no_renewal_that_needs_no_more_tokens(ledger, admit):
    hold = await admit(key_limits=Limits(tokens_per_minute=60), tokens=500)
    assert (await ledger.renew(hold, amount_nusd=120, tokens=500, enforce_tokens=True)).amount_nusd == 120


async def test_enforced_tokens_deny(ledger, admit, read, keys):
    hold = await admit(key_limits=Limits(tokens_per_minute=60), account_limits=Limits(tokens_per_minute=30))
    denied = await ledger.renew(hold, amount_nusd=120, tokens=40, enforce_tokens=True)
    assert (denied.reason, denied.which) == ("rate_limit", "account tokens")
    assert 19 < denied.retry_after_s <= 20
    assert (await read.hash(keys.credit))["held"] == "100"
    assert (await ledger.renew(hold, amount_nusd=120, tokens=30, enforce_tokens=True)).amount_nusd == 120
    assert 30 <= await read.level(keys.key_bucket("k1"), "tokens") < 31


async def test_a_settled_hold_is_gone(ledger, admit, settlement, store, snapshot):
    hold = await admit()
    await ledger.settle(settlement())
    before = await snapshot(store)
    assert await ledger.renew(hold, amount_nusd=120) == Denial("gone", "hold", 0)
    assert await snapshot(store) == before


async def test_an_expired_hold_that_nobody_released_goes_on(ledger, admit, read, keys):
    hold = await admit(ttl_ms=0)
    assert (await ledger.renew(hold, amount_nusd=100, ttl_ms=60_000)).amount_nusd == 100
    await ledger.balance("acme")
    assert list(await read.hash(keys.holds)) == ["h1"]


async def test_an_abandoned_hold_is_taken_back(ledger, admit, read, store, keys, settlement):
    """Its worker was stuck, and woke."""
    hold = await admit(ttl_ms=0, budgets=Budgets(total_nusd=300), key_limits=Limits(tokens_per_minute=60))
    await ledger.balance("acme")
    assert (await read.hash(keys.credit))["held"] == "0"
    assert await ledger.renew(hold, amount_nusd=120, ttl_ms=60_000) == Hold(hold.request, 120, 130, hold.buckets)
    assert (await read.hash(keys.credit))["held"] == "120"
    assert await read.hash(keys.held) == {"key:k1": "120"}
    assert (list(await read.hash(keys.holds)), await read.hash(keys.abandoned)) == (["h1"], {})
    await ledger.balance("acme")
    assert list(await read.hash(keys.holds)) == ["h1"]
    deadline_ms = int(await store.execute("ZSCORE", keys.deadlines, "h1"))
    assert deadline_ms - int((await read.events(keys.usage))[-1]["abandoned_ms"]) < 70_000
    assert 50 <= await read.level(keys.key_bucket("k1"), "tokens") < 51  # debited once
    assert await ledger.settle(settlement()) is True
    assert await read.hash(keys.held) == {}


async def test_an_abandoned_hold_stays_so_without_credit(ledger, ask, admit, read, keys, settlement):
    hold = await admit(ttl_ms=0)
    await ledger.admit(ask("h2", amount_nusd=200))
    denied = await ledger.renew(hold, amount_nusd=100, ttl_ms=60_000)
    assert Denial("insufficient_credits", "credit", 50, needed_nusd=100) == denied
    assert list(await read.hash(keys.abandoned)) == ["h1"]
    assert await ledger.settle(settlement()) is True


async def test_a_renewal_releases_what_others_left(ledger, ask, admit, read, keys):
    hold = await admit()
    await ledger.admit(ask("h2", amount_nusd=150, ttl_ms=0))
    assert (await ledger.renew(hold, amount_nusd=250)).available_nusd == 0
    assert list(await read.hash(keys.abandoned)) == ["h2"]
