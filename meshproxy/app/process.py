"""One process that does everything: a worker, its data listener and the admin listener."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import structlog
from aiohttp import web
from msgspec.structs import replace

from meshproxy.app.data_listener import DataListener
from meshproxy.app.notify import READY, STOPPING, notify
from meshproxy.app.reload import Read, Reloader
from meshproxy.app.worker import Worker, request_log_to, with_redis
from meshproxy.config import Settings
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.server.admin import Status, create_admin
from meshproxy.server.sockets import listen, name_of
from meshproxy.telemetry import exposition, logs, snapshot
from meshproxy.telemetry.logs import RequestLog
from meshproxy.telemetry.summary import summarize
from meshproxy.version import VERSION

_log = structlog.get_logger("meshproxy.app")


class Running:
    """A gateway that is up. `stop` ends it, as SIGTERM does."""

    def __init__(self, worker: Worker, data_address: str, admin_address: str) -> None:
        self.directory: Directory = worker.directory
        self.ledger: Ledger = worker.ledger
        self.data_address = data_address
        self.admin_address = admin_address
        self.stopped = asyncio.Event()
        self.hurried = asyncio.Event()

    def stop(self) -> None:
        """Drain, settle and end; at once, if asked twice."""
        if self.stopped.is_set():
            self.hurried.set()
        self.stopped.set()


async def run(
    settings: Settings,
    secrets: Mapping[str, str],
    *,
    on_ready: Callable[[Running], Awaitable[None]] | None = None,
    reload: Read | None = None,
    journal: Path | None = None,
    admin_token: str | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `reload` reads the configuration again on SIGHUP; `journal` is where settlements wait for
    Redis (None: in memory); `admin_token` is what the admin listener asks for. OSError if an address is taken, Unfit if the
    certificate is no use.
    """
    sink = logs.configure(settings.log.level, settings.log.format, sys.stderr.buffer)
    data, admin = listen(settings.server.listen), listen(settings.server.admin_listen)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(sink.close)
        standing = await stack.enter_async_context(with_redis(settings))
        request_log = request_log_to(sink, settings.log)
        worker = Worker(standing, secrets, request_log, journal)
        await worker.start()
        stack.push_async_callback(worker.stop)
        listener = DataListener(worker, data)
        stack.push_async_callback(listener.close)
        admin_runner = web.AppRunner(create_admin(_State(worker), admin_token), access_log=None)
        await admin_runner.setup()
        stack.push_async_callback(admin_runner.cleanup)
        running = Running(worker, name_of(data), name_of(admin))
        await listener.start()
        await web.SockSite(admin_runner, admin).start()
        reloader = Reloader(settings, reload) if reload is not None else None
        _on_signals(
            running, partial(_reload, reloader, worker, listener, request_log) if reloader is not None else None
        )
        _log.info("serving", data=running.data_address, admin=running.admin_address, version=VERSION)
        notify(READY)
        if on_ready is not None:
            await on_ready(running)
        await running.stopped.wait()
        notify(STOPPING)
        await listener.drain(running.hurried)
    _log.info("stopped")


def _on_signals(running: Running, reload: Callable[[], None] | None) -> None:
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, running.stop)
    if reload is not None:
        loop.add_signal_handler(signal.SIGHUP, reload)


def _reload(reloader: Reloader, worker: Worker, listener: DataListener, request_log: RequestLog) -> None:
    """SIGHUP: swap in what the file says now, or nothing."""
    swap = reloader.next()
    if swap is None:
        worker.reload_failed()
        return
    settings, secrets = swap
    generation = worker.gateway.deployment.generation + 1
    listener.reload(settings.server)
    worker.reload(
        replace(settings, redis=worker.settings.redis), secrets, generation
    )  # the embedded server has its own URL
    logs.set_level(settings.log.level)
    request_log.set_level(settings.log.level)
    _log.info("reloaded", generation=generation)


class _State:
    """What the admin listener tells of a lone worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._started_at = time.time()

    async def metrics(self, *, openmetrics: bool) -> bytes:
        """The exposition."""
        return await exposition.render(snapshot.decode(self._worker.metrics.snapshot()), openmetrics=openmetrics)

    async def ready(self) -> list[str]:
        """Why not."""
        return self._worker.not_ready()

    async def status(self) -> Status:
        """The status page's figures."""
        uptime_s = time.time() - self._started_at
        state = "draining" if self._worker.stopping else "running"
        return {
            **summarize(snapshot.decode(self._worker.metrics.snapshot())),
            "version": VERSION,
            "uptime_s": uptime_s,
            "not_ready": self._worker.not_ready(),
            "max_in_flight": self._worker.settings.server.max_in_flight,
            "ledger_state": "up" if self._worker.store.connected else "down",
            "workers": [{"pid": os.getpid(), "state": state, "uptime_s": uptime_s, "restarts": 0}],
        }
