"""What is in flight, and the one pulse that looks after all of it: holds are kept alive, silent streams get their ping."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from meshproxy.config import Settings
from meshproxy.errors import GatewayError
from meshproxy.gateway.admit import Lease
from meshproxy.gateway.attempts import Opening, too_late
from meshproxy.gateway.exchange import Exchange
from meshproxy.gateway.idempotency import Recording
from meshproxy.gateway.relay import Relay
from meshproxy.ledger.store import StoreError
from meshproxy.telemetry.tasks import Tasks

PULSE_S = 0.5  # how late a ping may be

_log = structlog.get_logger("meshproxy.gateway")


class Live:
    """The leases, openings, relays and recordings of this worker. Nothing here costs a timer a request."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept_at = clock()  # survives a pulse that raises: or no hold would be kept while one relay makes trouble
        self.leases: set[Lease] = set()
        self.openings: set[Opening] = set()
        self.relays: set[Relay] = set()
        self.recordings: set[Recording] = set()

    async def pulse(self, settings: Callable[[], Settings]) -> None:
        """Run for the life of the worker, by the settings of the moment. One relay's or hold's trouble is raised after all the
        others were looked after.
        """
        while True:
            heartbeat_s, hold_ttl_s = settings().server.heartbeat_s, settings().credits.hold_ttl_s
            await asyncio.sleep(min(PULSE_S, heartbeat_s / 4, hold_ttl_s / 4))
            now = self._clock()
            trouble = self._look_after_relays(now, heartbeat_s)
            if now - self._kept_at >= hold_ttl_s / 3:
                self._kept_at = now
                await self._keep_holds()
            if trouble is not None:
                raise trouble

    def _look_after_relays(self, now: float, heartbeat_s: float) -> Exception | None:
        """Look after each; what one of them raised."""
        trouble: Exception | None = None
        silent: tuple[Opening | Relay, ...] = (*self.openings, *self.relays)
        for relay in silent:
            try:
                relay.look_after(now, heartbeat_s)
            except Exception as error:  # noqa: BLE001 - the pulse is supervised, and raises it
                trouble = error
        return trouble

    async def _keep_holds(self) -> None:
        """All in one loop turn, so that they share a pipeline."""
        keeping = [*(lease.keep() for lease in self.leases), *(recording.keep_alive() for recording in self.recordings)]
        results = await asyncio.gather(*keeping, return_exceptions=True)
        refused = [result for result in results if isinstance(result, StoreError)]
        if refused:  # one account's trouble is no reason to let go of the others
            _log.error("holds_not_kept", holds=len(refused), reason=str(refused[0]))
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, GatewayError | StoreError):
                raise result


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
        if isinstance(answer, GatewayError):
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


async def _with_fault_told(work: Coroutine[Any, Any, T]) -> T | GatewayError:
    """What a provider or a client does wrong is an answer too, and no task's failure."""
    try:
        return await work
    except GatewayError as fault:
        return fault
