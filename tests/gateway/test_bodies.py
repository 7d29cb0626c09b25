"""Room for the bodies of requests: what they take together is bounded, and what one account takes."""

import asyncio

import pytest

from meshproxy.errors import GatewayError
from meshproxy.gateway import entry
from meshproxy.gateway.entry import LARGE_BYTES, SMALL_BYTES, BodyMemory
from tests.harness.waiting import turns

MB = 1_000_000
MOST = 10 * MB


@pytest.fixture
def bodies():
    return BodyMemory(lambda: MOST, lambda: 2000)


async def taken(bodies, *sizes, account="a"):
    rooms = [bodies.reserve(account) for _ in sizes]
    for room, size in zip(rooms, sizes, strict=True):
        await room.take(size)
    return rooms


async def waiting(*works):
    tasks = [asyncio.create_task(work) for work in works]
    await turns(3)
    return tasks


async def test_a_small_body_asks_nobody(bodies):
    await taken(bodies, 5 * MB)
    await taken(bodies, 5 * MB, account="b")
    await taken(bodies, *[SMALL_BYTES] * 1000)


@pytest.mark.parametrize("size", [MOST, 3 * MOST])
async def test_one_body_has_room_whatever_its_size(bodies, size):
    await taken(bodies, size)


async def test_an_account_has_half_of_it_and_others_the_rest(bodies):
    await taken(bodies, 2 * MB, 3 * MB)
    (late,) = await waiting(taken(bodies, 1 * MB))
    await taken(bodies, 5 * MB, account="b")
    assert not late.done()
    late.cancel()


async def test_who_waits_gets_room_in_turn_when_others_leave(bodies):
    first, second = await taken(bodies, 5 * MB, account="a") + await taken(bodies, 5 * MB, account="b")
    large, small = await waiting(taken(bodies, 4 * MB, account="c"), taken(bodies, MB, account="d"))
    first.release()
    await large
    await small
    second.release()


async def test_a_large_one_is_not_passed_over_by_small_ones(bodies):
    (room,) = await taken(bodies, 7 * MB)
    large, small = await waiting(taken(bodies, 4 * MB, account="b"), taken(bodies, 2 * MB, account="c"))
    assert [large.done(), small.done()] == [False, False]
    room.release()
    await asyncio.gather(large, small)


async def test_one_that_gives_up_lets_the_next_in(bodies):
    await taken(bodies, 7 * MB)
    large, small = await waiting(taken(bodies, 4 * MB, account="b"), taken(bodies, 2 * MB, account="c"))
    large.cancel()
    await small


async def test_what_was_admitted_and_is_not_large_is_counted_no_more(bodies):
    (room,) = await taken(bodies, 5 * MB)
    room.shrink(LARGE_BYTES)
    await taken(bodies, 5 * MB)


async def test_what_was_admitted_and_is_large_is_counted_to_its_end(bodies):
    (room,) = await taken(bodies, 5 * MB)
    room.shrink(2 * MB)
    await taken(bodies, 3 * MB)
    (late,) = await waiting(taken(bodies, MB))
    assert not late.done()
    room.release()
    await late


async def test_without_room_in_time_the_gateway_is_overloaded(bodies, monkeypatch):
    monkeypatch.setattr(entry, "MEMORY_WAIT_S", 0.01)
    await taken(bodies, 5 * MB)
    with pytest.raises(GatewayError) as caught:
        await taken(bodies, 5 * MB)
    assert (caught.value.response.status, caught.value.response.code) == (503, "overloaded")


async def test_of_one_account_so_many_requests_are_here_without_being_admitted():
    bodies = BodyMemory(lambda: MOST, lambda: 2)
    first, second = bodies.reserve("a"), bodies.reserve("a")
    with pytest.raises(GatewayError) as caught:
        bodies.reserve("a")
    assert (caught.value.response.status, caught.value.response.code) == (503, "overloaded")
    bodies.reserve("b")
    first.shrink(10)
    first.release()
    third = bodies.reserve("a")
    for room in (second, third):
        room.release()
    bodies.reserve("a")
