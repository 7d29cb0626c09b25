"""One worker behind its listener: all there is where one is enough, and what each process of a supervisor's runs."""

import asyncio
import os
import socket
import time

from meshproxy.app.control import Report
from meshproxy.app.data_listener import DataListener
from meshproxy.app.reload import Standing
from meshproxy.app.worker import Worker
from meshproxy.server.admin import WorkerStatus
from meshproxy.telemetry import logs
from meshproxy.telemetry.logs import RequestLog
from meshproxy.telemetry.sink import LineSink
from meshproxy.telemetry.snapshot import Fleet


class Serving:
    """Serves a socket. `up` is set once it does; `fleet` has what was counted. Unfit if the certificate is no use."""

    def __init__(self, standing: Standing, sock: socket.socket, sink: LineSink) -> None:
        settings = standing.settings
        self.standing = standing
        self.up = asyncio.Event()
        self.fleet = Fleet()
        self._request_log = RequestLog(sink, settings.log.level, settings.log.format)
        self.worker = Worker(settings, standing.secrets.upstreams, self._request_log, standing.journal)
        self._listener = DataListener(self.worker, sock)
        self._hurried = asyncio.Event()
        self._started_at = time.time()

    async def start(self) -> None:
        """Begin to serve."""
        await self.worker.start(self.standing.generation)
        if self.standing.reload_failed:
            self.worker.reload_failed()
        await self._listener.start()
        self.up.set()

    async def apply(self, standing: Standing) -> None:
        """Let this hold from now on."""
        if standing.generation != self.standing.generation:
            settings = standing.settings
            self._listener.reload(settings.server)
            self.worker.reload(settings, standing.secrets.upstreams, standing.generation)
            self._request_log.set_level(settings.log.level)
            logs.set_level(settings.log.level)
        if standing.reload_failed:
            self.worker.reload_failed()
        self.standing = standing

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
