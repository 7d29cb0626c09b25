"""One process that does everything: a worker, its data listener and the admin listener."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web

from meshproxy.app.application import application
from meshproxy.app.worker import Worker, request_log_to, with_redis
from meshproxy.config import Settings, Unfit
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.server.admin import Status, create_admin
from meshproxy.server.listener import Runner
from meshproxy.server.sockets import listen
from meshproxy.telemetry import exposition, logs, snapshot
from meshproxy.telemetry.summary import summarize
from meshproxy.version import VERSION

Reload = Callable[[], tuple[Settings, dict[str, str]]]

_log = structlog.get_logger("meshproxy.app")


class Running:
    """A gateway that is up. `stop` ends it, as SIGTERM does."""

    def __init__(self, worker: Worker, data_address: str, admin_address: str) -> None:
        self.directory: Directory = worker.directory
        self.ledger: Ledger = worker.ledger
        self.data_address = data_address
        self.admin_address = admin_address
        self.stopped = asyncio.Event()

    def stop(self) -> None:
        """Drain, settle and end."""
        self.stopped.set()


async def run(
    settings: Settings,
    secrets: Mapping[str, str],
    *,
    on_ready: Callable[[Running], Awaitable[None]] | None = None,
    reload: Reload | None = None,
    journal: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `reload` reads the configuration again on SIGHUP; `journal` is where settlements wait for
    Redis (None: in memory). OSError if an address is taken.
    """
    sink = logs.configure(settings.log.level, settings.log.format, sys.stderr.buffer)
    data, admin = listen(settings.server.listen), listen(settings.server.admin_listen)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(sink.close)
        settings = await stack.enter_async_context(with_redis(settings))
        worker = Worker(settings, secrets, request_log_to(sink, settings.log), journal)
        await worker.start()
        stack.push_async_callback(worker.stop)
        runner = Runner(application(worker), worker.serve_chat)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        admin_runner = web.AppRunner(create_admin(_State(worker)), access_log=None)
        await admin_runner.setup()
        stack.push_async_callback(admin_runner.cleanup)
        site = web.SockSite(runner, data)
        await site.start()
        await web.SockSite(admin_runner, admin).start()
        running = Running(worker, _name(data), _name(admin))
        _on_signals(running, worker, reload)
        _log.info("serving", data=running.data_address, admin=running.admin_address, version=VERSION)
        if on_ready is not None:
            await on_ready(running)
        await running.stopped.wait()
        await drain(worker, site)
    _log.info("stopped")


async def drain(worker: Worker, site: web.BaseSite) -> None:
    """SIGTERM: not ready at once; accept until the balancer has noticed; then let what runs come to its end."""
    server = worker.settings.server
    _log.info("draining", in_flight=worker.recorder.in_flight)
    worker.stopping = True
    await asyncio.sleep(server.drain_grace_s)
    await site.stop()
    await worker.drain(server.drain_s)


def _on_signals(running: Running, worker: Worker, reload: Reload | None) -> None:
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, running.stop)
    if reload is not None:
        loop.add_signal_handler(signal.SIGHUP, _reload, worker, reload)


def _reload(worker: Worker, read: Reload) -> None:
    """SIGHUP, as a transaction: a configuration with a fault changes nothing."""
    try:
        settings, secrets = read()
    except Unfit as unfit:
        worker.reload_failed()
        _log.error("reload_failed", faults=unfit.faults)
        return
    for key in worker.reload(settings, secrets):
        _log.warning("reload_needs_restart", key=key)
    _log.info("reloaded", generation=worker.gateway.deployment.generation)


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


def _name(sock: Any) -> str:
    """An address as configurations write it."""
    name = sock.getsockname()
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return f"unix:{name}"
