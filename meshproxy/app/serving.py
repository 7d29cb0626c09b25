"""One worker behind its listener: all there is where one is enough, and what each process of a supervisor's runs."""

import asyncio
import gc
import os
import socket
import time

import structlog

from meshproxy.app.control import Report
from meshproxy.app.data_listener import DataListener
from meshproxy.app.reload import Standing
from meshproxy.app.worker import Prepared, Worker
from meshproxy.config import Unfit
from meshproxy.server.admin import WorkerStatus
from meshproxy.telemetry import logs
from meshproxy.telemetry.logs import RequestLog
from meshproxy.telemetry.sink import LineSink
from meshproxy.telemetry.snapshot import Fleet

GC_THRESHOLD = (
    20_000  # objects made before the youngest are looked through: a request makes some hundreds and keeps none
)

_log = structlog.get_logger("meshproxy.app")


class Serving:
    """Serves a socket. `up` is set once it does; `fleet` has what was counted. Unfit if the certificate is no use."""

    def __init__(self, standing: Standing, sock: socket.socket, sink: LineSink) -> None:
        settings = standing.settings
        self.standing = standing
        self.up = asyncio.Event()
        self.refused = asyncio.Event()  # never set: start() raises
        self.faults: list[str] = []
        self._prepared: Prepared | None = None
        self.fleet = Fleet()
        self._request_log = RequestLog(sink, settings.log.level, settings.log.format)
        self.worker = Worker(settings, standing.secrets.upstreams, self._request_log, standing.journal)
        self._listener = DataListener(self.worker, sock)
        self._hurried = asyncio.Event()
        self._started_at = time.time()

    async def start(self) -> None:
        """Begin to serve. Unfit for what a check of the configuration could not know, as a journal whose files are all in use."""
        try:
            await self.worker.start(self.standing.generation)
        except (OSError, ValueError) as error:
            raise Unfit([str(error)]) from error
        if self.standing.reload_failed:
            self.worker.reload_failed()
        await self._listener.start()
        gc.collect()
        gc.set_threshold(GC_THRESHOLD, 20, 50)
        gc.freeze()  # what lives for the whole run need not be walked at each collection
        self.up.set()

    async def prepare(self, standing: Standing) -> list[str]:
        """Build what this needs and serve on as before; what can't be built. Whatever goes wrong, a reload ends no worker."""
        try:
            # Not in the event loop: a TLS context alone takes 16 ms.
            self._prepared = await asyncio.to_thread(
                self.worker.prepare, standing.settings, standing.secrets.upstreams, standing.generation
            )
        except Unfit as unfit:
            return unfit.faults
        except (OSError, ValueError) as error:
            return [str(error)]
        except Exception as error:  # noqa: BLE001 - a bug of ours: reported to the supervisor as a fault, with a traceback here
            _log.error("prepare_failed", exc_info=error)
            return [f"it can't be built ({type(error).__name__})"]
        return []

    async def apply(self, standing: Standing) -> list[str]:
        """Let this hold from now on; what keeps it from that: then everything is as it was."""
        if standing.generation != self.standing.generation:
            if self._prepared is None or self._prepared.generation != standing.generation:
                faults = await self.prepare(standing)
                if faults:
                    return faults
            prepared, self._prepared = self._prepared, None
            assert prepared is not None  # noqa: S101 - prepared a line above
            settings = standing.settings
            self._listener.reload(settings.server)
            self.worker.reload(prepared)
            self._request_log.set_level(settings.log.level)
            logs.set_level(settings.log.level)
        if standing.reload_failed:
            self.worker.reload_failed()
        self.standing = standing
        return []

    async def report(self) -> Report:
        """How the worker is."""
        return Report(await self.worker.metrics.snapshot(), self.worker.not_ready(), self.worker.store.connected)

    async def reports(self) -> dict[int, Report]:
        """How each worker is that says so in time, by its number."""
        return {1: await self.report()}

    def workers(self) -> list[WorkerStatus]:
        """The workers that are up."""
        state = "draining" if self.worker.stopping else "running"
        return [{"pid": os.getpid(), "state": state, "uptime_s": time.time() - self._started_at, "restarts": 0}]

    async def stop(self) -> None:
        """Drain, settle and end."""
        await self._listener.drain(self._hurried)
        await self._listener.close()
        await self.worker.stop()

    def hurry(self) -> None:
        """End what runs now, and wait for nothing in stop()."""
        self._hurried.set()
