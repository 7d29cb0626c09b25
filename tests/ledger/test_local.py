"""Admission without Redis: no worker gives more than its share, whatever is asked of it."""

import asyncio
import math
import time
from contextlib import suppress

import pytest

from meshproxy.ledger import local as module
from meshproxy.ledger.local import LINE_BYTES, WORKERS, LocalAdmission, WorkerCount
from meshproxy.ledger.records import Denial, Hold
from meshproxy.ledger.store import Unavailable
from meshproxy.policy.principal import Limits
from tests.harness.waiting import turns, until
from tests.ledger.conftest import FakeStore

DOLLAR = 1_000_000_000
MIB = 1_048_576


def instances(count=1):
    return WorkerCount(FakeStore(), "w1", count)


@pytest.fixture
def admission(clock):
    return make_admission(clock)


def make_admission(clock, count=1, room_bytes=MIB):
    return LocalAdmission(DOLLAR, instances(count), clock, lambda: room_bytes)


async def beat_once(known):
    known.count = 0
    beating = asyncio.create_task(known.beat())
    await until(lambda: known.count, poll_s=0)
    beating.cancel()
    with suppress(asyncio.CancelledError):
        await beating


def test_an_allowance_is_held_and_never_exceeded(admission, ask):
    assert admission.admit(ask("h1", amount_nusd=400_000_000)).available_nusd == DOLLAR - 400_000_000
    assert isinstance(admission.admit(ask("h2", amount_nusd=600_000_000)), Hold)
    denied = admission.admit(ask("h3", amount_nusd=1))
    assert Denial("insufficient_credits", "credit", 0, needed_nusd=1) == denied


@pytest.mark.parametrize(("least", "held"), [(None, None), (DOLLAR + 1, None), (DOLLAR, DOLLAR), (1, DOLLAR // 2)])
def test_a_hold_that_does_not_fit_may_be_smaller(admission, ask, least, held):
    answer = admission.admit(ask("h1", amount_nusd=2 * DOLLAR, amount_min_nusd=least, share_percent=50))
    assert getattr(answer, "amount_nusd", None) == held


def test_each_account_has_its_own(admission, ask):
    admission.admit(ask("h1", amount_nusd=DOLLAR))
    assert isinstance(admission.admit(ask("h2", account="other", amount_nusd=DOLLAR)), Hold)


def test_a_request_that_is_over_leaves_what_it_really_cost(admission, ask, settlement):
    admission.admit(ask("h1", amount_nusd=900_000_000))
    admission.settled_here(settlement("h1", cost_nusd=100_000_000), 0)
    denied = admission.admit(ask("h2", amount_nusd=900_000_001))
    assert (
        denied.reason,
        denied.available_nusd,
        denied.needed_nusd,
    ) == ("insufficient_credits", 900_000_000, 900_000_001)
    assert isinstance(admission.admit(ask("h3", amount_nusd=900_000_000)), Hold)


def test_a_cost_above_the_hold_comes_out_of_the_allowance_too(admission, ask, settlement):
    admission.admit(ask("h1", amount_nusd=0))
    admission.settled_here(settlement("h1", cost_nusd=DOLLAR), 0)
    assert isinstance(admission.admit(ask("h2", amount_nusd=1)), Denial)


def test_only_settled_money_refills_the_allowance(admission, ask, settlement):
    """Redis may come and go meanwhile: what is spent here is owed until Redis has charged it."""
    admission.admit(ask("h1", amount_nusd=DOLLAR))
    admission.settled_here(settlement("h1", cost_nusd=DOLLAR), 0)
    admission.drop_buckets()
    assert isinstance(admission.admit(ask("h2", amount_nusd=1)), Denial)
    admission.charged("h1")
    assert isinstance(admission.admit(ask("h2", amount_nusd=DOLLAR)), Hold)


def test_a_restart_refills_no_allowance(admission, ask, settlement):
    admission.count_journaled([settlement("h1", cost_nusd=DOLLAR, unheld=True), settlement("h2", cost_nusd=DOLLAR)])
    assert isinstance(admission.admit(ask("h3", amount_nusd=1)), Denial)
    admission.charged("h1")
    assert isinstance(admission.admit(ask("h3", amount_nusd=DOLLAR)), Hold)


def test_slices_come_out_of_the_same_allowance(admission, ask):
    first = ask("h1", amount_nusd=900_000_000)
    admission.admit(first)
    assert [admission.hold_more(first, 50_000_000) for _ in range(3)] == [True, True, False]


def test_slices_of_a_hold_in_redis_are_owed_beyond_what_redis_holds(admission, ask, settlement):
    held_by_redis = ask("h1", amount_nusd=400)
    assert admission.hold_more(held_by_redis, DOLLAR)
    admission.settled_here(settlement("h1", cost_nusd=1000), 400)
    assert admission.admit(ask("h2", amount_nusd=0)).available_nusd == DOLLAR - 600


def test_nothing_is_admitted_that_the_journal_has_no_room_for(ask, clock, settlement):
    admission = make_admission(clock, room_bytes=2 * LINE_BYTES)
    asks = [ask(f"h{number}") for number in range(3)]
    for each in asks[:2]:
        assert admission.has_room(each)
        admission.admit(each)
    assert not admission.has_room(asks[2])
    admission.settled_here(settlement("h0"), 0)
    assert admission.has_room(asks[2])


def test_a_session_s_name_takes_room_in_the_journal(ask, clock):
    admission = make_admission(clock, room_bytes=LINE_BYTES + 6 * 10)
    assert [admission.has_room(ask(session=session)) for session in (None, "s" * 10, "s" * 11)] == [True, True, False]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_all_instances_together_give_one_allowance(ask, clock, count):
    workers = [make_admission(clock, count) for _ in range(count)]
    given = sum(
        isinstance(worker.admit(ask(f"h{number}", amount_nusd=DOLLAR // 50)), Hold)
        for worker in workers
        for number in range(60)
    )
    assert given * (DOLLAR // 50) <= DOLLAR


@pytest.mark.parametrize("count", [1, 2, 4])
def test_buckets_are_shared_out_among_the_instances(ask, clock, count):
    limits = Limits(requests_per_minute=60, burst=20)
    workers = [make_admission(clock, count) for _ in range(count)]

    def admitted():
        return sum(
            isinstance(worker.admit(ask("h", amount_nusd=0, key_limits=limits)), Hold)
            for worker in workers
            for _ in range(100)
        )

    assert admitted() == 20
    clock.now += 4
    assert admitted() == 4
    clock.now += 3600
    assert admitted() == 20


def test_the_wait_is_exact(admission, ask, clock):
    limits = Limits(requests_per_minute=30, burst=1)
    admission.admit(ask("h1", account_limits=limits))
    denied = admission.admit(ask("h2", account_limits=limits))
    assert (denied.reason, denied.which, denied.retry_after_s) == ("rate_limit", "account requests", 2.0)
    clock.now += 2.0
    assert isinstance(admission.admit(ask("h3", account_limits=limits)), Hold)


def test_the_longest_wait_is_named(admission, ask):
    key, account = Limits(requests_per_minute=60, burst=1), Limits(tokens_per_minute=600)
    admission.admit(ask("h1", tokens=600, key_limits=key, account_limits=account))
    denied = admission.admit(ask("h2", tokens=600, key_limits=key, account_limits=account))
    assert (denied.which, denied.retry_after_s) == ("account tokens", 60.0)


def test_a_denial_takes_nothing(admission, ask):
    """Of tokens and credit: what is left of either is there to the last."""
    limits = Limits(requests_per_minute=60, burst=1, tokens_per_minute=100)
    admission.admit(ask("h1", tokens=10, key_limits=limits))
    assert isinstance(admission.admit(ask("h2", tokens=10, key_limits=limits)), Denial)
    rest = {"tokens": 90, "amount_nusd": DOLLAR - 100, "key_limits": Limits(tokens_per_minute=100)}
    assert isinstance(admission.admit(ask("h3", **rest)), Hold)


def test_more_tokens_than_a_bucket_holds_get_through_when_it_is_full(admission, ask, clock):
    limits = Limits(tokens_per_minute=60)
    assert isinstance(admission.admit(ask("h1", tokens=90, key_limits=limits)), Hold)
    denied = admission.admit(ask("h2", tokens=90, key_limits=limits))
    assert denied.retry_after_s == 90.0
    clock.now += 90
    assert isinstance(admission.admit(ask("h3", tokens=90, key_limits=limits)), Hold)


@pytest.mark.parametrize("limits", [Limits(requests_per_minute=0), Limits(tokens_per_minute=0)])
def test_a_limit_of_nothing_lets_nothing_in(admission, ask, limits):
    denied = admission.admit(ask(key_limits=limits))
    assert (denied.reason, denied.retry_after_s) == ("rate_limit", None)


def test_requests_a_day_are_counted_over_the_day(admission, ask, clock):
    limits = Limits(requests_per_day=1)
    admission.admit(ask("h1", key_limits=limits))
    denied = admission.admit(ask("h2", key_limits=limits))
    assert (denied.which, denied.retry_after_s) == ("key requests per day", 86_400.0)


@pytest.mark.parametrize("scope", ["key", "account"])
def test_so_many_run_in_parallel(admission, ask, settlement, scope):
    limits = {f"{scope}_limits": Limits(max_parallel=1)}
    admission.admit(ask("h1", **limits))
    denied = admission.admit(ask("h2", **limits))
    assert (denied.which, denied.retry_after_s) == (f"{scope} parallel requests", 1.0)
    admission.settled_here(settlement("h1"), 0)
    assert isinstance(admission.admit(ask("h2", **limits)), Hold)


def test_what_is_told_of_the_buckets(admission, ask):
    limits = Limits(requests_per_minute=60, tokens_per_minute=600)
    states = admission.admit(ask(tokens=60, key_limits=limits)).buckets
    assert [(state.kind, state.limit, state.remaining, state.reset_s) for state in states] == [
        ("requests", 60, 59, 1.0),
        ("tokens", 600, 540, 6.0),
    ]


def test_there_is_a_bound_on_accounts_that_known_ones_do_not_feel(admission, ask, monkeypatch):
    monkeypatch.setattr(module, "MAX_ACCOUNTS", 2)
    for account in ("a", "b"):
        assert isinstance(admission.admit(ask(f"h-{account}", account=account)), Hold)
    assert isinstance(admission.admit(ask("h-c", account="c")), Denial)
    assert isinstance(admission.admit(ask("h-more", account="a")), Hold)


def test_redis_counts_again_and_local_buckets_are_dropped(admission, ask):
    limits = Limits(requests_per_minute=1)
    admission.admit(ask("h1", key_limits=limits))
    admission.drop_buckets()
    assert isinstance(admission.admit(ask("h2", key_limits=limits)), Hold)


def test_levels_are_never_infinite_nor_nan(admission, ask, clock):
    limits = Limits(requests_per_minute=1, burst=1_000_000, tokens_per_minute=2**53)
    clock.now += 1e12
    for state in admission.admit(ask(tokens=2**52, key_limits=limits)).buckets:
        assert math.isfinite(state.reset_s)


async def test_workers_are_counted_by_their_heartbeats(store):
    for name in ("w2", "w3"):
        await beat_once(WorkerCount(store, name))
    known = WorkerCount(store, "w1")
    await beat_once(known)
    assert known.count == 3


async def test_a_heartbeat_is_not_followed_at_once_by_the_next(store, monkeypatch):
    run, beats = store.run, []

    async def counted(*arguments):
        beats.append(await run(*arguments))
        return beats[-1]

    monkeypatch.setattr(store, "run", counted)
    beating = asyncio.create_task(WorkerCount(store, "w1").beat())
    await until(lambda: beats, poll_s=0)
    await turns(100)
    beating.cancel()
    assert len(beats) == 1


async def test_a_heartbeat_that_failed_is_tried_again_soon(store, monkeypatch):
    run, beats = store.run, []

    async def lost_once(*arguments):
        beats.append(1)
        if len(beats) == 1:
            raise Unavailable("connection", "lost")
        return await run(*arguments)

    monkeypatch.setattr(store, "run", lost_once)
    monkeypatch.setattr(module, "BEAT_RETRY_S", 0.0)
    await beat_once(known := WorkerCount(store, "w1"))
    assert (len(beats), known.count) == (2, 1)


async def test_workers_that_are_gone_are_not_counted(store):
    await store.execute("ZADD", WORKERS, 1, "dead")
    for name in ("w2", "w1"):
        await beat_once(known := WorkerCount(store, name))
    assert known.count == 2


async def test_a_lower_number_counts_when_it_is_told_twice(store):
    """The first to report after a long outage is alone: the others report within BEAT_S."""
    for name in ("w2", "w1"):
        await beat_once(known := WorkerCount(store, name))
    counts = []
    for _ in range(2):
        await store.execute("ZREM", WORKERS, "w2")
        await beat_once(known)
        counts.append(known.count)
    assert counts == [2, 1]


async def test_no_host_clock_decides_who_counts(server_store, monkeypatch):
    """A worker whose clock is far ahead drops none of the others."""
    await beat_once(WorkerCount(server_store, "w2"))
    monkeypatch.setattr(time, "time", lambda: 1e10)
    await beat_once(known := WorkerCount(server_store, "w1"))
    assert known.count == 2


async def test_there_are_at_least_as_many_as_this_host_has(store):
    known = WorkerCount(store, "w1", at_least=4)
    await beat_once(WorkerCount(store, "w2"))
    assert known.count == 4


async def test_without_redis_the_last_known_number_holds(server_store):
    for name in ("w2", "w1"):
        await beat_once(known := WorkerCount(server_store, name))
    await server_store.close()
    beating = asyncio.create_task(known.beat())
    await turns(1)
    assert not beating.done()
    beating.cancel()
    assert known.count == 2
