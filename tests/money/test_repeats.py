"""The same Idempotency-Key by fifty clients at once over several workers: one of them is served, all get the answer, and it is
charged once.
"""

import asyncio

import pytest

from tests.harness.waiting import until
from tests.money.conftest import INPUT_NUSD, OUTPUT_NUSD, Client, figure, scaled

REPEATS = scaled(50, 100)
TOKENS = 12
COST = 6 * INPUT_NUSD + TOKENS * OUTPUT_NUSD
MODELS = {
    "slow": ("sim", f"sim/plain?tokens={TOKENS}&tps=40"),
    "fails": ("sim", "sim/error-500"),
}


@pytest.fixture(scope="module")
def running(shared):
    return shared(models=MODELS)


@pytest.fixture
def valkey(running):
    return running[0]


@pytest.fixture
def proxy(running):
    return running[1]


async def test_repeats_at_once_are_charged_once(proxy, books, session):
    for stream in (True, False):
        account = f"once-{stream}"
        caller = await books.key(account)
        client = Client(session, proxy, caller)
        repeat = {"model": "slow", "stream": stream, "idempotency_key": "once"}
        outcomes = await asyncio.gather(*(client.chat(**repeat) for _ in range(REPEATS)))
        late = await client.chat(**repeat)
        assert [outcome.is_whole for outcome in outcomes] == [True] * REPEATS
        assert len({outcome.body for outcome in (*outcomes, late)}) == 1
        replayed = [outcome for outcome in outcomes if outcome.headers.get("idempotent-replayed")]
        assert len(replayed) == REPEATS - 1
        assert late.headers["idempotent-replayed"] == "true"
        assert len({outcome.headers["x-request-id"] for outcome in outcomes}) == REPEATS
        balance = await books.closed(account)
        assert (balance.settled_nusd, len(await books.events(account, "settled"))) == (COST, 1)
        figure("repeats at once", stream=stream, repeats=REPEATS + 1, charges=1)


async def test_a_client_that_goes_and_asks_again_pays_once(proxy, books, session):
    caller = await books.key("a-client-that-goes")
    client = Client(session, proxy, caller)
    repeat = {"model": "slow", "stream": True, "idempotency_key": "once"}
    gone = asyncio.create_task(client.chat(**repeat))
    await books.until(caller.account, lambda now: now.held_nusd > 0)
    gone.cancel()
    await asyncio.wait([gone])
    again = await client.chat(**repeat)
    assert (again.is_done, again.headers["idempotent-replayed"]) == (True, "true")
    balance = await books.closed(caller.account)
    settled = await books.events(caller.account, "settled")
    assert (balance.settled_nusd, [event["usage_source"] for event in settled]) == (COST, ["drained"])


async def test_another_body_is_refused_and_costs_nothing(proxy, books, session):
    caller = await books.key("another-body-is-refused")
    client = Client(session, proxy, caller)
    first = await client.chat(model="slow", idempotency_key="once")
    others = await asyncio.gather(
        *(client.chat(model="slow", idempotency_key="once", seed=number) for number in range(20))
    )
    assert first.is_whole
    assert {(outcome.status, outcome.code) for outcome in others} == {(409, "idempotency_conflict")}
    assert (await books.closed(caller.account)).settled_nusd == COST


async def test_repeats_of_what_fails_each_try_and_none_is_charged(proxy, books, session):
    caller = await books.key("repeats-of-what-fails")
    client = Client(session, proxy, caller)
    outcomes = await asyncio.gather(*(client.chat(model="fails", idempotency_key="once") for _ in range(10)))
    assert {outcome.status for outcome in outcomes} - {502, 503} == set()
    assert (await books.closed(caller.account)).settled_nusd == 0


async def test_repeats_survive_the_death_of_the_worker_that_served(proxy, books, session):
    """The record of a request whose worker died ends with its hold: those that are attached hear that it failed, and the
    next one is served, and alone is charged.
    """
    caller = await books.key("repeats-survive-the-death")
    client = Client(session, proxy, caller)
    repeat = {"model": "slow", "stream": True, "idempotency_key": "once"}
    running = [asyncio.create_task(client.chat(**repeat)) for _ in range(10)]
    await books.until(caller.account, lambda now: now.held_nusd > 0)
    await asyncio.to_thread(proxy.kill)
    await asyncio.gather(*running)
    await asyncio.to_thread(proxy.start)
    attached = await asyncio.gather(*(client.chat(**repeat) for _ in range(10)))
    assert {outcome.code for outcome in attached if not outcome.is_done} - {"upstream_error"} == set()
    assert (await client.chat(**repeat)).is_done
    balance = await books.closed(caller.account)
    assert (balance.settled_nusd, len(await books.events(caller.account, "settled"))) == (COST, 1)


async def test_a_worker_that_dies_right_behind_its_settlement_is_not_followed_by_a_second_charge(proxy, books, session):
    """What a settlement leaves of the record, and nothing after it: the answer is lost, and was paid for."""
    caller = await books.key("behind-its-settlement")
    client = Client(session, proxy, caller)
    assert (await client.chat(idempotency_key="once")).is_whole
    await books.closed(caller.account)
    (record,) = await books.store.execute("KEYS", f"mesh:{{{caller.account}}}:replay:*")

    async def is_concluded():
        return await books.store.execute("HGET", record, "state") == b"finished"

    await until(is_concluded)  # the worker's last word comes after its settlement
    await books.store.execute("HSET", record, "state", "charged", "charged_ms", 1)
    repeated = await client.chat(idempotency_key="once")
    assert (repeated.status, repeated.code) == (409, "idempotency_conflict")
    assert len(await books.events(caller.account, "settled")) == 1
