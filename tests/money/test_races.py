"""Hundreds of clients at once over four workers, and what has to be true of the books at the end."""

import asyncio
import time

import pytest
from msgspec.structs import replace

from meshproxy.ledger.records import Hold, HoldRequest
from meshproxy.policy.principal import Budgets, Limits
from tests.money.conftest import INPUT_NUSD, OUTPUT_NUSD, PROMPT_ESTIMATE, Client, figure, scaled

CLIENTS = scaled(100, 500)
EACH = 3
UNARY_NUSD = 6 * INPUT_NUSD + 8 * OUTPUT_NUSD
HELD_NUSD = PROMPT_ESTIMATE * INPUT_NUSD + 8 * OUTPUT_NUSD
MODELS = {
    "fast": ("sim", "sim/fast?tokens=8"),
    "drip": ("sim", "sim/plain?tokens=40&tps=60"),
    "drained": ("drained", "sim/plain?tokens=20&tps=100"),
    "fails": ("sim", "sim/error-500"),
    "dies": ("sim", "sim/die-mid-stream"),
}


@pytest.fixture(scope="module")
def running(shared):
    return shared(server={"workers": 4}, models=MODELS)


@pytest.fixture
def valkey(running):
    return running[0]


@pytest.fixture
def proxy(running):
    return running[1]


async def test_a_mix_of_everything(proxy, books, session):
    """Whole answers, streams, hang-ups, failures and repeats; on accounts with enough, and on one with too little."""
    keys = [await books.key(account, credit) for account, credit in (("a", "5"), ("b", "5"), ("poor", "0.02"))]
    clients = [Client(session, proxy, caller) for caller in keys]

    async def one(number):
        client, outcomes = clients[number % len(clients)], []
        for turn in range(EACH):
            kind = (number + turn) % 7
            if kind == 0:
                outcomes.append(await client.chat(model="fast", max_tokens=8))
            elif kind == 1:
                outcomes.append(await client.chat(model="fast", stream=True))
            elif kind == 2:
                await client.chat(stream=True, hang_up_after_events=1, model="drip")
            elif kind == 3:
                await client.chat(stream=True, hang_up_after_events=1, model="drained")
            elif kind == 4:
                outcomes.append(await client.chat(model="fails"))
            elif kind == 5:
                outcomes.append(await client.chat(model="dies", stream=True))
            else:
                outcomes.append(await client.chat(idempotency_key=f"k{number % 5}", model="fast", stream=True))
        return outcomes

    began = time.monotonic()
    outcomes = [outcome for row in await asyncio.gather(*map(one, range(CLIENTS))) for outcome in row]
    took_s = time.monotonic() - began
    assert {outcome.status for outcome in outcomes} - {200, 402, 500, 502, 503} == set()
    assert [outcome for outcome in outcomes if outcome.broken] == []
    settled = 0
    for caller in keys:
        balance = await books.closed(caller.account)
        events = await books.events(caller.account)
        assert [event for event in events if event["event"] == "abandoned"] == []
        settled += sum(event["event"] == "settled" for event in events)
        assert balance.balance_nusd >= 0 or caller.account == "poor"
    figure("mix over 4 workers", clients=CLIENTS, requests=CLIENTS * EACH, settled=settled, took_s=round(took_s, 1))


async def test_a_bucket_never_gives_more_than_it_has(proxy, books, session):
    """60 a minute with a burst of 20, asked for by everybody at once."""
    limits = Limits(requests_per_minute=60, burst=20)
    caller = await books.key("a-bucket-never-gives", limits=limits)
    client = Client(session, proxy, caller)
    began = time.monotonic()
    outcomes = await asyncio.gather(*(client.chat(max_tokens=8) for _ in range(CLIENTS)))
    refill = time.monotonic() - began + 1
    admitted = [outcome for outcome in outcomes if outcome.status == 200]
    denied = [outcome for outcome in outcomes if outcome.status == 429]
    assert len(admitted) + len(denied) == CLIENTS
    assert 20 <= len(admitted) <= 20 + refill
    assert len(admitted) * UNARY_NUSD == (await books.closed(caller.account)).settled_nusd
    assert len(admitted) == len(await books.events(caller.account, "settled"))
    figure("burst of 20 at 60 a minute", clients=CLIENTS, admitted=len(admitted), bound=int(20 + refill))


async def test_credit_for_ten_buys_ten(proxy, books, session):
    """Each request holds what it costs, to the last nano-dollar: an account that can pay for ten is charged for ten."""
    caller = await books.key("credit-for-ten-buys", credit="0")
    await books.ledger.grant(caller.account, 10 * HELD_NUSD)
    client = Client(session, proxy, caller)
    outcomes = await asyncio.gather(*(client.chat(max_tokens=8) for _ in range(CLIENTS)))
    admitted = [outcome for outcome in outcomes if outcome.status == 200]
    assert {outcome.status for outcome in outcomes} == {200, 402}
    balance = await books.closed(caller.account)
    assert balance.balance_nusd >= 0
    assert len(admitted) * UNARY_NUSD == balance.settled_nusd
    assert 10 <= len(admitted) <= 10 * HELD_NUSD // UNARY_NUSD


async def test_a_budget_is_not_exceeded_by_a_crowd(proxy, books, session):
    caller = await books.key("a-budget-is-not", budgets=Budgets(total_nusd=5 * HELD_NUSD))
    client = Client(session, proxy, caller)
    outcomes = await asyncio.gather(*(client.chat(max_tokens=8) for _ in range(CLIENTS)))
    assert {outcome.code for outcome in outcomes} == {None, "spend_limit_exceeded"}
    assert (await books.closed(caller.account)).settled_nusd <= 5 * HELD_NUSD


async def test_an_accounts_bucket_is_shared_by_its_keys(proxy, books, session):
    await books.directory.ensure_account("an-accounts-bucket-is")
    limits = Limits(requests_per_minute=60, burst=10)
    await books.directory.change_account("an-accounts-bucket-is", lambda account: replace(account, limits=limits))
    keys = [await books.key("an-accounts-bucket-is", "1") for _ in range(4)]
    clients = [Client(session, proxy, caller) for caller in keys]
    began = time.monotonic()
    outcomes = await asyncio.gather(*(client.chat(max_tokens=8) for client in clients for _ in range(20)))
    admitted = sum(outcome.status == 200 for outcome in outcomes)
    assert 10 <= admitted <= 10 + time.monotonic() - began + 1
    await books.closed("an-accounts-bucket-is")


async def test_what_an_admission_costs(proxy, books, session):
    """One round trip: two scripts a request, and no other command."""
    caller = await books.key("what-an-admission-costs")
    client = Client(session, proxy, caller)
    for _ in range(20):
        assert (await client.chat(max_tokens=8)).is_whole
    await books.closed(caller.account)
    before = await calls(books)
    requests = 200
    for _ in range(requests // 20):
        await asyncio.gather(*(client.chat(max_tokens=8) for _ in range(20)))
    await books.until(caller.account, lambda now: now.settled_nusd >= (20 + requests) * UNARY_NUSD)
    after = await calls(books)
    scripts = (
        after["evalsha"][0] - before["evalsha"][0] - 20
    )  # of them some are this test's own readings of the balance
    assert 2 * requests - 20 <= scripts <= 2 * requests + 40
    spent_us = (after["evalsha"][1] - before["evalsha"][1]) / max(after["evalsha"][0] - before["evalsha"][0], 1)
    await books.ledger.grant("probe", 1_000_000)
    took_us = sorted([await admission_us(books.ledger, number) for number in range(200)])
    figure(
        "admission", scripts_a_request=2, redis_us_a_script=round(spent_us, 1), round_trip_us_p50=round(took_us[100])
    )


async def admission_us(ledger, number):
    """One admission, alone on its connection."""
    limits = Limits(requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000)
    ask = HoldRequest(
        hold_id=f"a{number}", account="probe", key_id="k1", amount_nusd=1, tokens=1, ttl_ms=60_000, key_limits=limits
    )
    began = time.perf_counter()
    assert isinstance(await ledger.admit(ask), Hold)
    return (time.perf_counter() - began) * 1e6


async def calls(books):
    """Calls and microseconds of each command so far."""
    text = (await books.store.execute("INFO", "commandstats")).decode()
    stats = {}
    for line in text.splitlines():
        if line.startswith("cmdstat_"):
            name, _, rest = line.removeprefix("cmdstat_").partition(":")
            fields = dict(field.split("=") for field in rest.split(","))
            stats[name] = (int(fields["calls"]), int(fields["usec"]))
    return stats
