"""Requests that outlive their client: where hanging up doesn't stop the provider's bill, or where the same request may be
asked for again, the work goes on with nobody listening, within bounds of number and time (and bytes: gateway.relay).
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from meshproxy.errors import Fault
from meshproxy.gateway.attempts import too_late
from meshproxy.gateway.exchange import Exchange
from meshproxy.telemetry.tasks import Tasks

MAX_DETACHED = 256  # in one worker; beyond that a hang-up cancels
MAX_DETACHED_S = 120.0

T = TypeVar("T")


class Detacher:
    """Runs what may outlive its request. `close` ends an exchange whose client has gone."""

    def __init__(self, tasks: Tasks, close: Callable[[Exchange], None], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tasks = tasks
        self._close = close
        self._detached = 0
        self.closed = False  # whether a hang-up cancels

    async def run(self, exchange: Exchange, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. If the caller is cancelled or the client's time is over the work goes on, and the exchange is
        closed after it.
        """
        exchange.detachable = True
        task = self._tasks.spawn("drain", _with_fault_told(work))
        try:
            async with asyncio.timeout(self._left_s(exchange)) as limit:
                answer = await asyncio.shield(task)
        except TimeoutError:
            if not limit.expired():
                raise
            if not self._detach(exchange, task):
                await self._cancel(task)
            raise too_late(may_have_run=True) from None
        except asyncio.CancelledError:
            if not self._detach(exchange, task):
                await self._cancel(task)
            raise
        if isinstance(answer, Fault):
            raise answer
        return answer

    def _left_s(self, exchange: Exchange) -> float | None:
        """The time that the client gives a whole answer. A stream keeps its deadline itself: see Attempts."""
        plan, deadline = exchange.plan, min(exchange.deadline, exchange.call.deadline)
        if plan is None or plan.request.stream or deadline == math.inf:
            return None
        return max(deadline - self._clock(), 0.0)

    def _detach(self, exchange: Exchange, task: asyncio.Task[Any]) -> bool:
        """Let the work go on without its client, if that is still allowed."""
        if self.closed or self._detached >= MAX_DETACHED:
            return False
        if not task.done():
            self._detached += 1
            exchange.detached = True
            self._tasks.spawn("drain", self._finish(exchange, task))
        return True

    async def _cancel(self, task: asyncio.Task[Any]) -> None:
        """Cancel, and wait for it to write down what was used, before the exchange is closed."""
        task.cancel()
        await asyncio.wait([task])

    async def _finish(self, exchange: Exchange, task: asyncio.Task[Any]) -> None:
        try:
            async with asyncio.timeout(MAX_DETACHED_S):
                await task
        except (TimeoutError, asyncio.CancelledError):
            pass  # what is known by now is what is settled
        finally:
            self._detached -= 1
            exchange.outcome = "client_disconnected"
            if exchange.usage_source == "reported":
                exchange.usage_source = "drained"
            self._close(exchange)


async def _with_fault_told(work: Coroutine[Any, Any, T]) -> T | Fault:
    """What a provider or a client does wrong is an answer too, and no task's failure."""
    try:
        return await work
    except Fault as fault:
        return fault
