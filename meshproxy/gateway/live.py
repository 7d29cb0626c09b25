"""What is in flight, and the one pulse that looks after all of it: holds are kept alive, silent streams get their ping."""

import asyncio
from collections.abc import Callable

import structlog

from meshproxy.config import Settings
from meshproxy.errors import Fault
from meshproxy.gateway.first_event import Opening
from meshproxy.gateway.idempotent import Recording
from meshproxy.gateway.lease import Lease
from meshproxy.gateway.relay import Relay
from meshproxy.ledger.store import StoreError

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
            if isinstance(result, BaseException) and not isinstance(result, Fault | StoreError):
                raise result
