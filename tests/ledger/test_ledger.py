"""Grants and balances, the calendar of the scripts, and races on real servers."""

import asyncio
from datetime import UTC, datetime

import pytest

from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import ACCOUNTS, AccountKeys, Balance, BucketState, Grant, Granted, Hold, KeyUse, Spend
from meshproxy.ledger.store import Script
from meshproxy.policy.principal import Budgets, Limits
from meshproxy.units import MAX_NUSD
from tests.harness.waiting import until


async def test_a_grant_adds_to_the_balance_and_says_so(ledger, read, keys):
    assert (await ledger.grant("acme", 250, "invoice 7")).balance_nusd == 250
    assert (await ledger.grant("acme", -300)).balance_nusd == -50
    assert await read.hash(keys.credit) == {"balance": "-50", "granted": "-50"}
    event = (await read.events(keys.usage))[0]
    assert int(event.pop("granted_ms")) > 0
    assert event == {
        "event": "grant", "amount_nusd": "250", "balance_nusd": "250", "note": "invoice 7", "ref": "", "actor": "", "v": "1",
    }  # fmt: skip


async def test_a_grant_counts_once_for_its_ref(ledger):
    grants = [await ledger.grant("acme", 250, "invoice 7", ref="inv-7", actor="ops") for _ in range(2)]
    assert [Granted(250, is_new=True), Granted(250, is_new=False)] == grants
    assert (await ledger.balance("acme")).granted_nusd == 250


async def test_a_ref_is_of_one_amount(ledger):
    await ledger.grant("acme", 250, ref="inv-7")
    with pytest.raises(ValueError, match="another amount"):
        await ledger.grant("acme", 251, ref="inv-7")
    assert (await ledger.balance("acme")).granted_nusd == 250


async def test_refs_are_of_one_account(ledger):
    for account in ("acme", "beta"):
        assert (await ledger.grant(account, 250, ref="inv-7")).is_new


async def test_grants_have_a_history(ledger):
    await ledger.grant("acme", 250, "invoice 7", ref="inv-7", actor="ops")
    await ledger.grant("acme", -50, "typed 250, meant 200")
    latest, first = await ledger.grants("acme")
    assert first == Grant(250, 250, "invoice 7", "inv-7", "ops", first.granted_ms)
    assert latest == Grant(-50, 200, "typed 250, meant 200", "", "", latest.granted_ms)
    assert 1_764_000_000_000 < first.granted_ms <= latest.granted_ms
    assert await ledger.grants("acme", limit=1) == [latest]


async def test_a_grant_makes_its_account_known(ledger, store):
    await ledger.grant("amce", 25)
    assert await store.execute("SMEMBERS", ACCOUNTS) == [b"amce"]


@pytest.mark.parametrize("sign", [1, -1])
async def test_no_balance_grows_past_what_scripts_count_exactly(ledger, store, snapshot, sign):
    await ledger.grant("acme", sign * MAX_NUSD)
    before = await snapshot(store)
    with pytest.raises(ValueError, match="can't be moved"):
        await ledger.grant("acme", sign)
    assert await snapshot(store) == before


async def test_the_balance_of_nobody_is_nothing(ledger, store, snapshot):
    assert await ledger.balance("nobody") == Balance(0, 0, 0, 0)
    assert await snapshot(store) == {}


async def test_a_balance_tells_credit_spend_and_buckets(ledger, ask, settlement):
    await ledger.grant("acme", 1000)
    limits = {
        "key_limits": Limits(requests_per_minute=60, tokens_per_minute=6000, burst=5),
        "account_limits": Limits(requests_per_minute=120),
    }
    await ledger.admit(ask("h1", **limits))
    await ledger.settle(settlement("h1"))
    await ledger.admit(ask("h2", **limits))
    balance = await ledger.balance("acme", "k1", **limits)
    assert (balance.balance_nusd, balance.held_nusd, balance.granted_nusd, balance.settled_nusd) == (940, 100, 1000, 60)
    assert (balance.available_nusd, balance.spend) == (840, Spend(60, 60, 60))
    assert [(bucket.scope, bucket.kind, bucket.limit) for bucket in balance.buckets] == [
        ("key", "requests", 60), ("key", "tokens", 6000), ("account", "requests", 120),
    ]  # fmt: skip


async def test_untouched_buckets_are_full(ledger):
    balance = await ledger.balance("acme", "k1", key_limits=Limits(60, 6000, 5))
    assert balance.buckets == (
        BucketState("key", "requests", 60, 5, 0.0),
        BucketState("key", "tokens", 6000, 6000, 0.0),
    )


async def test_a_balance_releases_expired_holds(ledger, ask):
    await ledger.grant("acme", 100)
    await ledger.admit(ask(ttl_ms=0))
    assert await ledger.balance("acme") == Balance(100, 0, 100, 0)


@pytest.mark.parametrize("name", ["valkey"])
async def test_the_calendar_is_right(dial, name):
    store = await dial(name)
    script = Script.load("balance").text
    calendar = script[script.index("local function civil") : script.index("-- A hold's record")]
    text = f"local now_ms = tonumber(ARGV[1])\n{calendar}\nreturn {{ day, month }}"
    moments = [datetime(year, month, day, tzinfo=UTC) for year in range(1970, 2110, 7) for month, day in
               ((1, 1), (2, 28), (3, 1), (6, 30), (12, 31))]  # fmt: skip
    moments += [datetime(2024, 2, 29, 23, 59, 59, 999_000, tzinfo=UTC), datetime(2100, 2, 28, 23, 59, 59, tzinfo=UTC)]
    for moment in moments:
        day, month = await store.execute("EVAL", text, 0, int(moment.timestamp() * 1000))
        assert (day.decode(), month.decode()) == (f"{moment:%Y-%m-%d}", f"{moment:%Y-%m}")
    await store.close()


async def test_a_hundred_clients_hold_no_more_than_there_is(server_store, ask, settlement):
    ledger = Ledger(server_store)
    await ledger.grant("acme", 1050)
    answers = await asyncio.gather(*(ledger.admit(ask(f"h{number}")) for number in range(100)))
    admitted = [answer for answer in answers if isinstance(answer, Hold)]
    assert len(admitted) == 10
    settled = await asyncio.gather(*(ledger.settle(settlement(hold.hold_id)) for hold in admitted for _ in range(3)))
    assert sum(settled) == 10
    balance = await ledger.balance("acme")
    assert (balance.balance_nusd, balance.held_nusd, balance.granted_nusd, balance.settled_nusd) == (450, 0, 1050, 600)


async def test_a_hundred_clients_stay_in_a_budget_and_a_bucket(server_store, ask):
    ledger = Ledger(server_store)
    await ledger.grant("acme", 100_000)
    budget, bucket = {"budgets": Budgets(daily_nusd=750)}, {"key_limits": Limits(requests_per_minute=1, burst=5)}
    for fields, fit in ((budget, 7), (bucket, 5)):
        asks = [ask(f"{fit}-{number}", key_id=f"k{fit}", **fields) for number in range(100)]
        answers = await asyncio.gather(*(ledger.admit(each) for each in asks))
        assert sum(isinstance(answer, Hold) for answer in answers) == fit


async def test_keys_are_told_with_what_they_spent_and_when(ledger, ask, settlement):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1"))
    await ledger.settle(settlement("h1"))
    used, unused = await ledger.key_spends("acme", ["k1", "k2"])
    assert (used.spend, unused) == (Spend(60, 60, 60), KeyUse(Spend(), 0))
    assert used.used_ms > 1_764_000_000_000
    balance = await ledger.balance("acme", "k1")
    assert (balance.spend, balance.used_ms, balance.account_spend) == (
        Spend(60, 60, 60),
        used.used_ms,
        Spend(60, 60, 60),
    )


async def test_balances_of_many_accounts(ledger):
    for number in range(3):
        await ledger.grant(f"a{number}", number + 1)
    assert [found.balance_nusd for found in await ledger.balances(["a0", "a2", "nobody"])] == [1, 3, 0]


async def test_what_runs_is_told(ledger, ask, settlement):
    await ledger.grant("acme", 1000)
    for number, key in enumerate(("k1", "k1", "k2")):
        await ledger.admit(ask(f"h{number}", key_id=key))
    balance = await ledger.balance("acme", "k1")
    assert (balance.key_running, balance.account_running) == (2, 3)


def test_the_names_in_the_store_are_those_of_the_first_release():
    """An upgrade finds what is there under these names, and what backs it up or counts it does too."""
    keys = AccountKeys("acme")
    parts = ("credit", "held", "holds", "deadlines", "abandoned", "usage", "bucket", "spend", "grants", "grant_refs")
    names = {name: getattr(keys, name) for name in (*parts, "hours", "record", "keys", "templates", "template_names")}
    assert names == {name: "mesh:{acme}:" + name.replace("_", "-") for name in names}


async def test_refusals_are_counted_by_account(ledger, ask, monkeypatch):
    monkeypatch.setattr("meshproxy.ledger.ledger.NOTE_REFUSALS_S", 0)
    for account in ("acme", "acme", "beta"):
        await ledger.admit(ask(account=account))
    noting = asyncio.create_task(ledger.note_refusals())

    async def counted():
        return await ledger.refusals(["acme", "nobody", "beta"], 5) == [2, 0, 1]

    await until(counted, poll_s=0)
    noting.cancel()


async def test_refusals_of_long_ago_are_not_counted(ledger, store, keys, monkeypatch):
    now = 1_764_000_000 // 3600 * 3600 + 120  # two minutes past an hour
    monkeypatch.setattr("meshproxy.ledger.ledger.time.time", lambda: now)
    for hour, minute, count in ((0, 2, 1), (0, 0, 2), (-1, 59, 4), (-1, 57, 8)):
        name = f"{datetime.fromtimestamp(now + hour * 3600, UTC):%Y-%m-%dT%H}"
        await store.execute("HSET", keys.refused(name), minute, count)
    assert [await ledger.refusals(["acme"], minutes) for minutes in (1, 3, 4, 60)] == [[1], [3], [7], [15]]
