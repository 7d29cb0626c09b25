"""`serve`: run the gateway until a signal, with one worker in this process or several in their own.

`run` opens the listeners, starts the workers and the admin listener, and handles signals. `WorkersState` gives the admin
listener its figures.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import structlog
import uvloop
from aiohttp import web
from msgspec.structs import asdict, replace

from meshproxy import VERSION
from meshproxy.app.load import journal_path, load
from meshproxy.app.reload import READY, STOPPING, FileWatch, Read, Reloader, RunningConfig, notify
from meshproxy.app.supervisor import Supervisor
from meshproxy.app.worker import with_redis
from meshproxy.app.worker_process import Report, RunningWorker
from meshproxy.config import ConfigError, Secrets, Settings
from meshproxy.gateway.record import MAX_FAILURES, MAX_REFUSED, Failure, Refused
from meshproxy.ledger.administration import Administration
from meshproxy.ledger.connection import StoreError, Unavailable, connect, store_warnings
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.journal import SettlementsLost
from meshproxy.ledger.ledger import Ledger
from meshproxy.server.admin import Status, create_admin
from meshproxy.server.aiohttp_path import ConnectionLimits
from meshproxy.server.listener import Runner, listen, listen_shared, name_of
from meshproxy.telemetry.exposition import Summary, render, summarize
from meshproxy.telemetry.logs import configure
from meshproxy.telemetry.tasks import Tasks
from meshproxy.upstream.provider import RESERVED_DESCRIPTORS

Workers = RunningWorker | Supervisor
WATCH_S = 1.0  # between two checks of the configuration's files
HISTORY_S = 3600.0  # shown by the status page
POINT_S = 20.0  # between two points of the history


class History:
    """The last hour of an instance, a point each POINT_S, for the status page to show as soon as it is opened."""

    def __init__(self) -> None:
        self.points: deque[dict[str, Any]] = deque(maxlen=int(HISTORY_S / POINT_S))
        self._last: Summary | None = None

    def note(self, at: float, summary: Summary) -> None:
        """Add a point for the time since the last one. The first call adds none."""
        last, self._last = self._last, summary
        if last is None:
            return
        counts = {name: max(0, count - last["requests"].get(name, 0)) for name, count in summary["requests"].items()}
        duration = summary["request_duration"]
        pairs = zip(duration["counts"], last["request_duration"]["counts"], strict=True)
        since = [max(0, now - then) for now, then in pairs]
        edges = duration["edges"]
        self.points.append(
            {"at": at, **counts, "p50": quantile(edges, since, 0.5), "p99": quantile(edges, since, 0.99)}
        )


def quantile(edges: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return a quantile of a histogram, linear within a bucket, as Prometheus' histogram_quantile(). None without counts."""
    rank, below, low = share * sum(counts), 0, 0.0
    if not rank:
        return None
    for edge, count in zip(edges, counts, strict=False):
        if count and below + count >= rank:
            return low + (edge - low) * (rank - below) / count
        below, low = below + count, edge
    return low


class WorkersState:
    """The admin listener's AdminState (server/admin.py) of all workers. `worker_count`: how many there should be."""

    def __init__(self, workers: Workers, worker_count: int) -> None:
        self._workers = workers
        self._worker_count = worker_count
        self._started_at = time.time()
        self._history = History()

    async def keep_history(self) -> None:
        """Add points to the history until cancelled."""
        while True:
            await self._reports()
            self._history.note(time.time(), summarize(self._workers.metrics.merged()))
            await asyncio.sleep(POINT_S)

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """Render one exposition for all workers."""
        await self._reports()
        return await render(self._workers.metrics.merged(), accept)

    async def ready(self) -> list[str]:
        """Return why a balancer should send nothing here: workers are still starting, none is up, or none is ready."""
        return self._reasons(await self._reports())

    async def status(self) -> Status:
        """Return the status page's figures."""
        reports = await self._reports()
        return {
            **summarize(self._workers.metrics.merged()),
            "version": VERSION,
            "uptime_s": time.time() - self._started_at,
            "not_ready": self._reasons(reports),
            "max_in_flight": self._workers.config.settings.server.max_in_flight * self._worker_count,
            "ledger_state": "up" if any(report.connected for report in reports) else "down",
            "workers": self._workers.workers(),
            "history": list(self._history.points),
            "failures": _latest(reports),
            "last_errors": _last_errors(reports),
            "refused": summed_refusals(reports),
        }

    def _reasons(self, reports: list[Report]) -> list[str]:
        # the kernel gives connections to every socket, even to one whose worker isn't up yet
        if not self._workers.up.is_set():
            return ["starting"]
        if any(not report.not_ready for report in reports):
            return []
        return sorted({reason for report in reports for reason in report.not_ready}) or ["no worker is up"]

    async def _reports(self) -> list[Report]:
        reports = await self._workers.reports()
        for number, report in reports.items():
            self._workers.metrics.report(number, report.snapshot)
        return list(reports.values())


def _latest(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Return the latest failures of all workers, newest first."""
    failures = sorted(chain.from_iterable(report.failures for report in reports), key=lambda failure: -failure.at)
    return [asdict(failure) for failure in failures[:MAX_FAILURES]]


def _last_errors(reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """Return the last error of each upstream from all workers."""
    last: dict[str, Failure] = {}
    for report in reports:
        for name, failure in report.last_errors.items():
            if name not in last or failure.at > last[name].at:
                last[name] = failure
    return {name: asdict(failure) for name, failure in last.items()}


def summed_refusals(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Sum the refusals of about the last minute in all workers, by account and limit, most first."""
    sums: dict[tuple[str, str], Refused] = {}
    for refused in chain.from_iterable(report.refused for report in reports):
        pair = refused.account, refused.refused_by
        if (other := sums.get(pair)) is None:
            sums[pair] = refused
        else:
            last = max(other, refused, key=lambda refused: refused.at)
            sums[pair] = replace(last, lately=other.lately + refused.lately)
    return [asdict(refused) for refused in sorted(sums.values(), key=lambda refused: -refused.lately)[:MAX_REFUSED]]


MAX_DESCRIPTORS = 1_048_576  # of one process: fs.nr_open's default (proc_sys_fs(5))

_log = structlog.get_logger("meshproxy.app")


def serve(config_path: str, *, watch: bool = False) -> int:
    """Serve a configuration until SIGTERM or SIGINT; return the exit code. Raises ConfigError if it can't.

    `watch`: also reload when one of its files changes.
    """
    loaded = load(config_path)
    settings, secrets = loaded.settings, loaded.secrets
    worker_count = settings.server.workers or len(os.sched_getaffinity(0))
    raise_descriptor_limit()
    journal = None if settings.redis.url == "embedded" else journal_path(settings)
    try:
        uvloop.run(
            run(
                settings,
                secrets,
                worker_count=worker_count,
                reload=partial(load, config_path),
                journal=journal,
                warnings=loaded.warnings,
                watch=FileWatch(config_path) if watch else None,
            )
        )
    except OSError as error:
        print(f"meshproxy: {error.strerror or error}: {error.filename or settings.server.listen}", file=sys.stderr)  # noqa: T201
        return 1
    except SettlementsLost:  # they are in the log
        return os.EX_IOERR
    return 0


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one, for this process and its workers.

    Shells and systemd give 1,024 by default, enough for some 500 requests (systemd.exec(5), LimitNOFILE=).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it: then the limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


async def run(
    settings: Settings,
    secrets: Secrets,
    *,
    worker_count: int = 1,
    on_ready: Callable[[str, str], None] | None = None,
    reload: Read | None = None,
    journal: str | None = None,
    warnings: Sequence[str] = (),
    watch: FileWatch | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    `on_ready` is called with the addresses of data and admin. `reload` reads the configuration again on SIGHUP, and when
    `watch` sees a change.
    `journal` is the journal's path (None: in memory). Raises OSError if an address is taken, and ConfigError if the
    configuration can't be served.
    """
    sink = configure(settings.log.level, settings.log.format, sys.stderr.buffer)
    for warning in warnings:
        _log.warning("config_warning", warning=warning)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = 2 * settings.server.max_in_flight + RESERVED_DESCRIPTORS  # a client's and a provider's per request
    if limit < needed:
        _log.warning("descriptors_short", limit=limit, needed=needed, key="server.max_in_flight")
    address = settings.server.listen
    data = [listen(address)] if worker_count == 1 else listen_shared(address, worker_count)
    admin = listen(settings.server.admin_listen)
    addresses = name_of(data[0]), name_of(admin)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(sink.close)
        config = RunningConfig(await stack.enter_async_context(with_redis(settings)), secrets, journal)
        workers: Workers = RunningWorker(config, data[0], sink) if worker_count == 1 else Supervisor(config, data)
        administration = (
            await stack.enter_async_context(_open_administration(config)) if secrets.admin_token is not None else None
        )
        state = WorkersState(workers, worker_count)
        admin_app = create_admin(state, secrets.admin_token, settings.server.admin_hosts, administration)
        runner = Runner(admin_app, None, _admin_limits(workers))
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await workers.start()
        stack.push_async_callback(workers.stop)
        await web.SockSite(runner, admin).start()
        tasks = Tasks()
        stack.push_async_callback(tasks.close)
        tasks.supervise("history", state.keep_history)
        stopped = _on_signals(workers, Reloader(settings, reload) if reload is not None else None, tasks, watch)
        event = "serving" if worker_count == 1 else "supervising"
        _log.info(event, data=addresses[0], admin=addresses[1], workers=worker_count, version=VERSION)
        await _wait_for_first(workers.up, workers.rejected, stopped)
        if workers.rejected.is_set():
            workers.interrupt()
            raise ConfigError(workers.faults)
        if settings.redis.url != "embedded":
            tasks.supervise("store", partial(_warn_about_redis, workers.config))
        notify(READY)
        if on_ready is not None:
            on_ready(*addresses)
        await stopped.wait()
        notify(STOPPING)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # nothing is left to reload
    _log.info("stopped")


@contextlib.asynccontextmanager
async def _open_administration(config: RunningConfig) -> AsyncIterator[Administration]:
    """Open the admin API's `Administration` over its own connection to Redis, which is made in the background."""
    dialling = Tasks()
    store = await connect(config.settings.redis, wait=False, supervise=dialling.supervise)
    try:
        yield Administration(store, Directory(store), Ledger(store), "admin")
    finally:
        await store.close()
        await dialling.close()


async def _warn_about_redis(config: RunningConfig) -> None:
    """Log each setting of Redis that may lose money, once."""
    with contextlib.suppress(Unavailable, StoreError):
        store = await connect(config.settings.redis)
        try:
            for warning in await store_warnings(store):
                _log.warning("redis_warning", warning=warning)
        finally:
            await store.close()


def _admin_limits(workers: Workers) -> ConnectionLimits:
    """Return how the admin listener treats slow clients."""
    return ConnectionLimits(
        lambda: workers.config.settings.server.header_timeout_s,
        write_timeout_s=lambda: workers.config.settings.server.write_timeout_s,
    )


def _on_signals(workers: Workers, reloader: Reloader | None, tasks: Tasks, watch: FileWatch | None) -> asyncio.Event:
    """Install the signal handlers.

    The returned event is set by the first SIGTERM or SIGINT; the second one interrupts the workers.

    A SIGHUP that arrived before this, or while the file is being read, counts too.
    """
    loop, stopped, hangup = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def stop() -> None:
        if stopped.is_set():
            workers.interrupt()
        stopped.set()

    async def reload_when_asked() -> None:
        while reloader is not None:
            await hangup.wait()
            hangup.clear()
            await reloader.reload(workers)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop)
    if reloader is not None:
        loop.add_signal_handler(signal.SIGHUP, hangup.set)
        tasks.supervise("reload", reload_when_asked)
        if watch is not None:
            tasks.supervise("watch", partial(_poll_files, watch, hangup))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    return stopped


async def _poll_files(watch: FileWatch, changed: asyncio.Event) -> None:
    """Set the event each time that a watched file has changed."""
    while True:
        await asyncio.sleep(WATCH_S)
        if await asyncio.to_thread(watch.changed):
            changed.set()


async def _wait_for_first(*events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
