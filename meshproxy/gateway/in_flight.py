"""Requests in flight: one periodic pulse that renews holds and pings silent streams, and work that outlives its client.

At most `MAX_DETACHED` requests of one worker go on without their client, each for at most `MAX_DETACHED_S`.
"""

import asyncio
import math
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

import structlog

from meshproxy.config import Settings
from meshproxy.errors import GatewayError
from meshproxy.gateway.admit import Lease
from meshproxy.gateway.attempts import EarlyHead
from meshproxy.gateway.exchange import Exchange
from meshproxy.gateway.idempotency import Recording
from meshproxy.gateway.relay import Relay
from meshproxy.ledger.store import StoreError
from meshproxy.telemetry.tasks import Tasks

PULSE_S = 0.5  # the most that a ping may be late

_log = structlog.get_logger("meshproxy.gateway")


class InFlight:
    """The leases, openings, relays and recordings of this worker, served by one timer instead of one for each request."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._renewed_at = clock()  # outlives a `pulse` that raises: a failing relay must not stop renewals
        self.leases: set[Lease] = set()
        self.early_heads: set[EarlyHead] = set()
        self.relays: set[Relay] = set()
        self.recordings: set[Recording] = set()

    async def pulse(self, settings: Callable[[], Settings]) -> None:
        """Run for the life of the worker, by the current settings.

        An error of one relay or hold is raised after serving all.
        """
        while True:
            heartbeat_s, hold_ttl_s = settings().server.heartbeat_s, settings().credits.hold_ttl_s
            await asyncio.sleep(min(PULSE_S, heartbeat_s / 4, hold_ttl_s / 4))
            now = self._clock()
            last_error = self._ping_silent_streams(now, heartbeat_s)
            if now - self._renewed_at >= hold_ttl_s / 3:
                self._renewed_at = now
                await self._renew_holds()
            if last_error is not None:
                raise last_error

    def _ping_silent_streams(self, now: float, heartbeat_s: float) -> Exception | None:
        """Serve every opening and relay; return the last exception raised, if any."""
        last_error: Exception | None = None
        silent: tuple[EarlyHead | Relay, ...] = (*self.early_heads, *self.relays)
        for relay in silent:
            try:
                relay.ping_if_silent(now, heartbeat_s)
            except Exception as error:  # noqa: BLE001 - returned, and raised by the supervised pulse
                last_error = error
        return last_error

    async def _renew_holds(self) -> None:
        """Renew all holds and records in one turn of the event loop, so that their commands share one write."""
        renewals = [
            *(lease.renew_deadline() for lease in self.leases),
            *(recording.keep_alive() for recording in self.recordings),
        ]
        results = await asyncio.gather(*renewals, return_exceptions=True)
        refused = [result for result in results if isinstance(result, StoreError)]
        if refused:  # a refusal for one account must not release the others
            _log.error("holds_not_kept", holds=len(refused), reason=str(refused[0]))
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, GatewayError | StoreError):
                raise result


MAX_DETACHED = 256  # in one worker; beyond that a hang-up cancels the request
MAX_DETACHED_S = 120.0

T = TypeVar("T")


class Detacher:
    """Runs work that may outlive its request. `close` ends an exchange whose client has gone."""

    def __init__(self, tasks: Tasks, close: Callable[[Exchange], None], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tasks = tasks
        self._close = close
        self._detached: set[asyncio.Task[Any]] = set()
        self.closed = False  # true: a hang-up cancels the request

    def interrupt(self) -> None:
        """End what goes on without its client: what is known by now is settled."""
        for task in tuple(self._detached):
            task.cancel()

    async def run(self, exchange: Exchange, work: Coroutine[Any, Any, T], draining: Collection[str] = ()) -> T:
        """Return the result of `work`.

        If the caller is cancelled or its deadline passes, the work goes on without the client, where a repeat may want
        its answer, or it waits for one of the upstreams `draining`. What it then writes to the client isn't sent (see
        `ClientStream.end`). The exchange is closed when the work ends.
        """
        exchange.detachable = True
        task = self._tasks.spawn("drain", _error_as_value(work))
        try:
            await asyncio.wait([task], timeout=self._left_s(exchange))
            if not task.done() and _stream_begins(exchange):
                await asyncio.wait([task])
        except asyncio.CancelledError:
            if not (_is_wanted(exchange, draining) and self._detach(exchange, task)):
                await self._cancel(task)
            raise
        if not task.done():
            # A request that no provider works on costs nothing: it is given up, unless a repeat may want its answer.
            may_go_on = _is_wanted(exchange, draining) and (exchange.may_be_billed or exchange.recording is not None)
            goes_on = may_go_on and self._detach(exchange, task)
            if not goes_on:
                await self._cancel(task)
            raise exchange.too_late(is_kept=goes_on and exchange.recording is not None)
        answer = task.result()
        if isinstance(answer, GatewayError):
            raise answer
        return answer

    def _left_s(self, exchange: Exchange) -> float | None:
        """Return the seconds until the deadline; None if there is none."""
        return max(exchange.deadline - self._clock(), 0.0) if exchange.deadline < math.inf else None

    def _detach(self, exchange: Exchange, task: asyncio.Task[Any]) -> bool:
        """Let the work go on without its client; return False if that isn't allowed."""
        if self.closed or len(self._detached) >= MAX_DETACHED:
            return False
        if not task.done():
            self._detached.add(task)
            exchange.detached = True
            self._tasks.spawn("drain", self._finish(exchange, task))
        return True

    async def _cancel(self, task: asyncio.Task[Any]) -> None:
        """Cancel the work and wait until it has recorded what was used, before the exchange is closed."""
        task.cancel()
        await asyncio.wait([task])

    async def _finish(self, exchange: Exchange, task: asyncio.Task[Any]) -> None:
        try:
            async with asyncio.timeout(MAX_DETACHED_S):
                await task
        except (TimeoutError, asyncio.CancelledError):
            pass  # settle what is known by now
        finally:
            self._detached.discard(task)
            if not exchange.end_sent:
                exchange.outcome = "client_disconnected"
                if exchange.usage_source == "reported":
                    exchange.usage_source = "drained"
            self._close(exchange)


def _is_wanted(exchange: Exchange, draining: Collection[str]) -> bool:
    """Return whether an answer is read on without its client."""
    if exchange.recording is not None:
        return True
    return exchange.candidate is not None and exchange.candidate.upstream in draining


def _stream_begins(exchange: Exchange) -> bool:
    """Return whether a provider answers a request for a stream: a stream that has begun is not cut by its deadline."""
    plan = exchange.plan
    return exchange.upstream_status != 0 and not exchange.reads_whole and plan is not None and plan.request.stream


async def _error_as_value(work: Coroutine[Any, Any, T]) -> T | GatewayError:
    """Return a GatewayError instead of raising it: an error of a client or a provider is no failure of the task."""
    try:
        return await work
    except GatewayError as error:
        return error
