"""A lookup is remembered for its time to live, and bounded."""

import asyncio

import pytest

from meshproxy.ledger.store import Unavailable
from meshproxy.ledger.templates import MAX_UNKNOWN, Cache
from tests.harness.waiting import until


class Source:
    """Values by key, and what was asked for. `gate`, if set, holds fetches back."""

    def __init__(self, **values):
        self.values = values
        self.asked = []
        self.gate = None
        self.down = False

    async def asking(self):
        await until(lambda: self.asked, poll_s=0)

    async def fetch(self, key):
        self.asked.append(key)
        value = self.values.get(key)
        if self.gate is not None:
            await self.gate.wait()
        if self.down:
            raise Unavailable("connection", "gone")
        return value


@pytest.fixture
def source():
    return Source(a=1, b=2)


@pytest.fixture
def cache(clock, source):
    return Cache(source.fetch, clock=clock, ttl_s=1.0, max_weight=100)


async def test_a_value_is_remembered_for_its_time_to_live(cache, clock, source):
    assert await cache.get("a") == 1
    source.values["a"] = 5
    clock.now += 0.99
    assert await cache.get("a") == 1
    clock.now += 0.01
    assert await cache.get("a") == 5
    assert source.asked == ["a", "a"]


async def test_age_counts_from_the_question_and_not_from_the_answer(cache, clock, source):
    source.gate = asyncio.Event()
    asked = asyncio.create_task(cache.get("a"))
    await source.asking()
    clock.now += 1.0
    source.gate.set()
    assert [await asked, await cache.get("a")] == [1, 1]
    assert source.asked == ["a", "a"]


async def test_what_is_not_there_is_remembered_too(cache, clock, source):
    assert [await cache.get("x"), await cache.get("x")] == [None, None]
    assert source.asked == ["x"]
    clock.now += 1.0
    source.values["x"] = 7
    assert await cache.get("x") == 7


async def test_one_who_leaves_takes_no_other_along(cache, source):
    source.gate = asyncio.Event()
    first, second = asyncio.create_task(cache.get("a")), asyncio.create_task(cache.get("a"))
    await source.asking()
    first.cancel()
    source.gate.set()
    assert await second == 1
    assert first.cancelled()


async def test_a_flood_of_unknown_names_evicts_no_known_one(cache, source):
    assert await cache.get("a") == 1
    for n in range(MAX_UNKNOWN + 10):
        await cache.get(f"unknown-{n}")
    source.asked.clear()
    assert await cache.get("a") == 1
    assert source.asked == []
    unknown = [f"unknown-{n}" for n in range(MAX_UNKNOWN + 10)]
    for name in reversed(unknown):
        await cache.get(name)
    assert source.asked == unknown[9::-1]  # of the others it is still known that they are none


async def test_weight_is_bounded_and_the_longest_unused_goes_first(clock):
    source = Source(a="x" * 40, b="x" * 40, c="x" * 40, huge="x" * 101)
    cache = Cache(source.fetch, clock=clock, ttl_s=1.0, max_weight=100, weigh=len)
    for name in ("a", "b", "a", "c"):
        await cache.get(name)
    source.asked.clear()
    for name in ("a", "c"):
        await cache.get(name)
    assert source.asked == []
    assert await cache.get("huge") == "x" * 101  # too large to be kept, and no room is made for it in vain
    for name in ("huge", "a", "c"):
        await cache.get(name)
    assert source.asked == ["huge", "huge", "a", "c"]


async def test_weight_counts_a_replaced_value_once(clock):
    source = Source(a="x" * 60, b="x" * 40)
    cache = Cache(source.fetch, clock=clock, ttl_s=1.0, max_weight=100, weigh=len)
    for _ in range(3):
        assert await cache.get("a") == "x" * 60
        clock.now += 1
    source.asked.clear()
    for name in ("a", "b", "a"):
        await cache.get(name)
    assert source.asked == ["a", "b"]  # there is room for both


async def test_forgetting_asks_again(cache, source):
    await cache.get("a")
    await cache.get("x")
    source.values.update(a=5, x=6)
    cache.clear()
    assert [await cache.get("a"), await cache.get("x")] == [5, 6]


async def test_a_fetch_that_began_before_a_change_is_not_kept(cache, source):
    source.gate = asyncio.Event()
    early = asyncio.create_task(cache.get("a"))
    await source.asking()
    source.values["a"] = 5
    cache.forget("a")
    source.gate.set()
    assert [await early, await cache.get("a")] == [1, 5]


async def test_without_grace_a_lost_store_is_a_fault(cache, clock, source):
    await cache.get("a")
    source.down = True
    clock.now += 1.0
    with pytest.raises(Unavailable):
        await cache.get("a")


async def test_with_grace_a_known_value_is_served_for_that_long(clock, source):
    cache = Cache(source.fetch, clock=clock, ttl_s=1.0, max_weight=100, stale_s=30.0)
    await cache.get("a")
    source.down = True
    clock.now += 30.9
    assert await cache.get("a") == 1
    with pytest.raises(Unavailable):
        await cache.get("b")
    clock.now += 0.1
    with pytest.raises(Unavailable):
        await cache.get("a")
