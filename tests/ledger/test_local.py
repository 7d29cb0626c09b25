"""Admission without Redis: no worker gives more than its share, whatever is asked of it."""

import asyncio
import math
from contextlib import suppress

import pytest

from meshproxy.ledger import local as module
from meshproxy.ledger.local import Instances, LocalAdmission
from meshproxy.ledger.records import Admitted, Denied
from meshproxy.ledger.store import Unavailable
from meshproxy.policy.principal import Limits
from tests.ledger.conftest import Clock

DOLLAR = 1_000_000_000


class Heartbeats:
    """A store that has nothing but the workers' heartbeats."""

    def __init__(self, workers=()):
        self.workers = dict(workers)
        self.is_lost = False

    async def execute(self, command, _key, *args):
        if self.is_lost:
            raise Unavailable("connection", "gone")
        if command == "ZADD":
            self.workers[args[1]] = args[0]
        elif command == "ZREMRANGEBYSCORE":
            self.workers = {name: at for name, at in self.workers.items() if at > args[1]}
        return len(self.workers)


def instances(count=1):
    known = Instances(Heartbeats(), "w1", Clock())
    known.count = count
    return known


@pytest.fixture
def admission(clock):
    return LocalAdmission(DOLLAR, instances(), clock)


async def beat_once(known):
    beating = asyncio.create_task(known.beat())
    for _ in range(10):
        await asyncio.sleep(0)
    beating.cancel()
    with suppress(asyncio.CancelledError):
        await beating


def test_an_allowance_is_held_and_never_exceeded(admission, ask):
    assert DOLLAR - 400_000_000 == admission.admit(ask("h1", amount_nusd=400_000_000)).available_nusd
    assert isinstance(admission.admit(ask("h2", amount_nusd=600_000_000)), Admitted)
    denied = admission.admit(ask("h3", amount_nusd=1))
    assert Denied("insufficient_credits", "credit", 0) == denied


def test_each_account_has_its_own(admission, ask):
    admission.admit(ask("h1", amount_nusd=DOLLAR))
    assert isinstance(admission.admit(ask("h2", account="other", amount_nusd=DOLLAR)), Admitted)


def test_a_settlement_leaves_what_it_really_cost(admission, ask, settlement):
    held = ask("h1", amount_nusd=900_000_000)
    admission.admit(held)
    admission.settled(held, settlement("h1", cost_nusd=100_000_000))
    assert Denied("insufficient_credits", "credit", 900_000_000) == admission.admit(ask("h2", amount_nusd=900_000_001))
    assert isinstance(admission.admit(ask("h3", amount_nusd=900_000_000)), Admitted)


def test_slices_come_out_of_the_same_allowance(admission, ask):
    admission.admit(ask("h1", amount_nusd=900_000_000))
    assert [True, True, False] == [admission.take("acme", 50_000_000) for _ in range(3)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_all_instances_together_give_one_allowance(ask, clock, count):
    workers = [LocalAdmission(DOLLAR, instances(count), clock) for _ in range(count)]
    given = sum(
        isinstance(worker.admit(ask(f"h{number}", amount_nusd=DOLLAR // 50)), Admitted)
        for worker in workers
        for number in range(60)
    )
    assert given * (DOLLAR // 50) <= DOLLAR


@pytest.mark.parametrize("count", [1, 2, 4])
def test_buckets_are_shared_out_among_the_instances(ask, clock, count):
    limits = Limits(requests_per_minute=60, burst=20)
    workers = [LocalAdmission(DOLLAR, instances(count), clock) for _ in range(count)]

    def admitted():
        return sum(
            isinstance(worker.admit(ask("h", amount_nusd=0, key_limits=limits)), Admitted)
            for worker in workers
            for _ in range(100)
        )

    assert 20 == admitted()
    clock.now += 4
    assert 4 == admitted()
    clock.now += 3600
    assert 20 == admitted()


def test_the_wait_is_exact(admission, ask, clock):
    limits = Limits(requests_per_minute=30, burst=1)
    admission.admit(ask("h1", account_limits=limits))
    denied = admission.admit(ask("h2", account_limits=limits))
    assert ("rate_limit", "account requests", 2.0) == (denied.reason, denied.which, denied.retry_after_s)
    clock.now += 2.0
    assert isinstance(admission.admit(ask("h3", account_limits=limits)), Admitted)


def test_the_longest_wait_is_named(admission, ask):
    key, account = Limits(requests_per_minute=60, burst=1), Limits(tokens_per_minute=600)
    admission.admit(ask("h1", tokens=600, key_limits=key, account_limits=account))
    denied = admission.admit(ask("h2", tokens=600, key_limits=key, account_limits=account))
    assert ("account tokens", 60.0) == (denied.which, denied.retry_after_s)


def test_a_denial_takes_nothing(admission, ask):
    limits = Limits(requests_per_minute=60, burst=1, tokens_per_minute=100)
    admission.admit(ask("h1", tokens=10, key_limits=limits))
    before = admission.take("acme", 0), {name: bucket.level for name, bucket in admission._buckets.items()}
    assert isinstance(admission.admit(ask("h2", tokens=10, key_limits=limits)), Denied)
    assert before == (True, {name: bucket.level for name, bucket in admission._buckets.items()})
    assert 100 == admission._used_nusd["acme"]


def test_more_tokens_than_a_bucket_holds_get_through_when_it_is_full(admission, ask, clock):
    limits = Limits(tokens_per_minute=60)
    assert isinstance(admission.admit(ask("h1", tokens=90, key_limits=limits)), Admitted)
    denied = admission.admit(ask("h2", tokens=90, key_limits=limits))
    assert 90.0 == denied.retry_after_s
    clock.now += 90
    assert isinstance(admission.admit(ask("h3", tokens=90, key_limits=limits)), Admitted)


@pytest.mark.parametrize("limits", [Limits(requests_per_minute=0), Limits(tokens_per_minute=0)])
def test_a_limit_of_nothing_lets_nothing_in(admission, ask, limits):
    denied = admission.admit(ask(key_limits=limits))
    assert ("rate_limit", None) == (denied.reason, denied.retry_after_s)


def test_what_is_told_of_the_buckets(admission, ask):
    limits = Limits(requests_per_minute=60, tokens_per_minute=600)
    states = admission.admit(ask(tokens=60, key_limits=limits)).buckets
    assert [("requests", 60, 59, 1.0), ("tokens", 600, 540, 6.0)] == [
        (state.kind, state.limit, state.remaining, state.reset_s) for state in states
    ]


def test_there_is_a_bound_on_accounts_that_known_ones_do_not_feel(admission, ask, monkeypatch):
    monkeypatch.setattr(module, "MAX_ACCOUNTS", 2)
    for account in ("a", "b"):
        assert isinstance(admission.admit(ask(account=account)), Admitted)
    assert isinstance(admission.admit(ask(account="c")), Denied)
    assert isinstance(admission.admit(ask(account="a")), Admitted)


def test_redis_is_back_and_all_is_forgotten(admission, ask):
    admission.admit(ask("h1", amount_nusd=DOLLAR, key_limits=Limits(requests_per_minute=1)))
    admission.forget()
    assert ({}, {}) == (admission._used_nusd, admission._buckets)


def test_a_settlement_after_that_leaves_no_credit_behind(admission, ask, settlement):
    held = ask("h1", amount_nusd=900)
    admission.admit(held)
    admission.forget()
    admission.settled(held, settlement("h1", cost_nusd=100))
    assert 0 == admission._used_nusd["acme"]


def test_levels_are_never_infinite_nor_nan(admission, ask, clock):
    limits = Limits(requests_per_minute=1, burst=1_000_000, tokens_per_minute=2**53)
    clock.now += 1e12
    for state in admission.admit(ask(tokens=2**52, key_limits=limits)).buckets:
        assert math.isfinite(state.reset_s)


async def test_workers_are_counted_by_their_heartbeats():
    store = Heartbeats({"w2": 995, "w3": 990, "dead": 900})
    known = Instances(store, "w1", Clock())
    assert 1 == known.count
    await beat_once(known)
    assert 3 == known.count


async def test_without_redis_the_last_known_number_holds():
    store = Heartbeats({"w2": 995})
    known = Instances(store, "w1", Clock())
    await beat_once(known)
    store.is_lost = True
    await beat_once(known)
    assert 2 == known.count
