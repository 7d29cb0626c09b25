"""Work that outlives its client: what it used is written down before its exchange is closed, however it ends."""

import asyncio
import time

import pytest

from meshproxy.errors import GatewayError, Source, overloaded
from meshproxy.gateway import in_flight as module
from meshproxy.gateway.exchange import Call, Exchange
from meshproxy.gateway.in_flight import Detacher
from meshproxy.policy.catalog import Candidate
from meshproxy.policy.pricing import Price
from meshproxy.telemetry.tasks import Tasks
from tests.harness.waiting import turns


class Closed:
    """What each exchange said of itself when it was closed."""

    def __init__(self):
        self.exchanges = []

    def __call__(self, exchange):
        self.exchanges.append((exchange.outcome, exchange.usage_source, exchange.cost_nusd))


@pytest.fixture
def closed():
    return Closed()


@pytest.fixture
async def tasks():
    running = Tasks()
    yield running
    await running.finish(5)
    assert len(running) == 0


@pytest.fixture
def detacher(tasks, closed):
    return Detacher(tasks, closed, time.monotonic)


async def _no_body():
    return b""


def exchange():
    begun = Exchange(Call("r1", None, _no_body, 0.0), "h1")
    begun.candidate = Candidate("drained", "openai", "o", "a/one", 1, 1, Price(*[1] * 7))
    return begun


class Work:
    """A request that goes on until it is told, and then writes down what it used."""

    def __init__(self, result="answer", error=None):
        self.exchange = exchange()
        self.go_on = asyncio.Event()
        self.result, self.error = result, error

    async def run(self):
        try:
            await self.go_on.wait()
            self.exchange.usage_source = "reported"
            if self.error is not None:
                raise self.error
            return self.result
        finally:
            self.exchange.cost_nusd = 42


async def begun(detacher, work):
    """The request's handler, waiting for its work."""
    handler = asyncio.create_task(detacher.run(work.exchange, work.run(), {"drained"}))
    await turns(2)
    return handler


async def hang_up(handler):
    handler.cancel()
    await asyncio.wait([handler])
    assert handler.cancelled()


async def test_the_result_comes_through(detacher, closed):
    work = Work()
    handler = await begun(detacher, work)
    work.go_on.set()
    assert await handler == "answer"
    assert (closed.exchanges, work.exchange.detached) == ([], False)


async def test_so_does_a_fault(detacher):
    work = Work(error=GatewayError(Source.GATEWAY, overloaded("no")))
    handler = await begun(detacher, work)
    work.go_on.set()
    with pytest.raises(GatewayError):
        await handler


async def test_it_goes_on_when_the_client_has_gone(detacher, closed, tasks):
    work = Work()
    await hang_up(await begun(detacher, work))
    assert (work.exchange.detached, closed.exchanges) == (True, [])
    work.go_on.set()
    await tasks.finish(5)
    assert closed.exchanges == [("client_disconnected", "drained", 42)]


async def test_what_fails_behind_the_client_is_closed_too(detacher, closed, tasks):
    work = Work(error=GatewayError(Source.UPSTREAM, overloaded("no")))
    await hang_up(await begun(detacher, work))
    work.go_on.set()
    await tasks.finish(5)
    assert closed.exchanges == [("client_disconnected", "drained", 42)]


async def test_time_is_bounded(detacher, closed, tasks, monkeypatch):
    monkeypatch.setattr(module, "MAX_DETACHED_S", 0.01)
    await hang_up(await begun(detacher, Work()))
    await tasks.finish(5)
    assert closed.exchanges == [("client_disconnected", "none", 42)]


async def test_number_is_bounded_also_for_hang_ups_in_one_turn(detacher, closed, tasks, monkeypatch):
    monkeypatch.setattr(module, "MAX_DETACHED", 3)
    works = [Work() for _ in range(8)]
    handlers = [await begun(detacher, work) for work in works]
    for handler in handlers:
        handler.cancel()
    await asyncio.wait(handlers)
    assert [work.exchange.detached for work in works] == [True] * 3 + [False] * 5
    assert [work.exchange.cost_nusd for work in works[3:]] == [42] * 5
    for work in works:
        work.go_on.set()
    await tasks.finish(5)
    assert len(closed.exchanges) == 3


async def test_a_place_is_free_again_when_the_work_is_over(detacher, closed, tasks, monkeypatch):
    monkeypatch.setattr(module, "MAX_DETACHED", 1)
    for count in range(1, 4):
        work = Work()
        await hang_up(await begun(detacher, work))
        work.go_on.set()
        await tasks.finish(5)
        assert len(closed.exchanges) == count


@pytest.mark.parametrize("why", ["full", "closed"])
async def test_cancelled_work_has_written_down_what_it_used_before_the_handler_ends(detacher, monkeypatch, why):
    """The handler closes the exchange as soon as it ends: a settlement made before would charge nothing."""
    if why == "full":
        monkeypatch.setattr(module, "MAX_DETACHED", 0)
    else:
        detacher.closed = True
    work = Work()
    handler = await begun(detacher, work)
    seen = []
    handler.add_done_callback(lambda _: seen.append(work.exchange.cost_nusd))
    await hang_up(handler)
    assert (seen, work.exchange.detached) == ([42], False)


async def test_a_client_that_goes_in_the_turn_in_which_the_work_ends(detacher, closed, tasks):
    """The handler closes the exchange; nothing is left to do behind it."""
    work = Work()
    handler = await begun(detacher, work)
    work.go_on.set()
    await turns(1)
    await hang_up(handler)
    await tasks.finish(5)
    assert (work.exchange.cost_nusd, int(work.exchange.detached)) == (42, len(closed.exchanges))


async def test_a_shutdown_that_cannot_wait_closes_it_all_the_same(detacher, closed, tasks):
    work = Work()
    await hang_up(await begun(detacher, work))
    await turns(1)
    await tasks.finish(0)
    assert closed.exchanges == [("client_disconnected", "none", 42)]


async def test_an_interrupt_ends_what_goes_on_without_its_client(detacher, closed, tasks):
    work, other = Work(), Work()
    await hang_up(await begun(detacher, work))
    with_client = await begun(detacher, other)
    detacher.interrupt()
    await turns(3)
    assert closed.exchanges == [("client_disconnected", "none", 42)]
    other.go_on.set()
    assert await with_client == "answer"
