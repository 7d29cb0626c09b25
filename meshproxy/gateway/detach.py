"""Requests that outlive their client: where hanging up doesn't stop the provider's bill, or where the same request may be
asked for again, the work goes on with nobody listening, within bounds of number and time (and bytes: gateway.relay).
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from meshproxy.errors import Fault
from meshproxy.gateway.exchange import Exchange
from meshproxy.telemetry.tasks import Tasks

MAX_DETACHED = 256  # in one worker; beyond that a hang-up cancels
MAX_DETACHED_S = 120.0

T = TypeVar("T")


class Detacher:
    """Runs what may outlive its request. `close` ends an exchange whose client has gone."""

    def __init__(self, tasks: Tasks, close: Callable[[Exchange], None]) -> None:
        self._tasks = tasks
        self._close = close
        self._detached = 0
        self.closed = False  # whether a hang-up cancels

    async def run(self, exchange: Exchange, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. If the caller is cancelled meanwhile the work goes on, and the exchange is closed after it."""
        task = self._tasks.spawn("drain", _with_fault_told(work))
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            if self.closed or self._detached >= MAX_DETACHED:
                task.cancel()
                await asyncio.wait([task])  # for it to write down what was used, before the exchange is closed
            elif not task.done():
                self._detached += 1
                exchange.detached = True
                self._tasks.spawn("drain", self._finish(exchange, task))
            raise
        if isinstance(answer, Fault):
            raise answer
        return answer

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
