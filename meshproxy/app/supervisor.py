"""Several workers under one roof: a process for each, which this one starts, restarts, questions and ends.

The supervisor serves no request. It holds the listening sockets, so that a connection that arrives while its worker is being
restarted waits instead of being refused, and the admin listener, which answers for all workers.
"""

import asyncio
import contextlib
import itertools
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog
from aiohttp import web
from msgspec.structs import replace

from meshproxy.app.brood import Child
from meshproxy.app.control import Control, Drain, Hurry, Question, Reload, ReloadFailed, Report, Reported, Start
from meshproxy.app.notify import READY, STOPPING, notify
from meshproxy.app.reload import Read, Reloader
from meshproxy.app.worker import with_redis
from meshproxy.config import Settings
from meshproxy.server.admin import Status, create_admin
from meshproxy.server.sockets import listen, listen_shared, name_of
from meshproxy.telemetry import exposition, logs
from meshproxy.telemetry.snapshot import Fleet
from meshproxy.telemetry.summary import summarize
from meshproxy.version import VERSION

STEADY_S = 10.0  # a worker that lived so long has its backoff forgotten
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0
EXIT_GRACE_S = 30.0  # beyond drain_s, before a worker is killed

_log = structlog.get_logger("meshproxy.app")


class Supervisor:
    """Keeps one worker for each listening socket alive."""

    def __init__(
        self, settings: Settings, secrets: Mapping[str, str], sockets: list[socket.socket], journal: Path | None
    ) -> None:
        self._settings = settings
        self._secrets = dict(secrets)
        self._sockets = sockets
        self._journal = str(journal) if journal is not None else None
        self._generation = 1
        self._reload_failed = False
        self._reloading = asyncio.Lock()
        self._children: dict[int, Child] = {}
        self._numbers = itertools.count(1)
        self._fleet = Fleet()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._started_at = time.time()
        self.up = asyncio.Event()  # whether every worker has been up
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start the workers, and keep them."""
        self._keepers = [asyncio.create_task(self._keep(sock), name="keep") for sock in self._sockets]

    async def _keep(self, sock: socket.socket) -> None:
        """Keep one worker alive on `sock` until the supervisor stops."""
        backoff_s = FIRST_BACKOFF_S
        for restarts in itertools.count():
            if self._stopping.is_set():
                return
            started_at = time.monotonic()
            child = await self._spawn(sock, restarts)
            if child is not None:
                code = await child.process.wait()
                self._forget(child)
                if self._stopping.is_set():
                    return
                _log.error("worker_died", worker=child.number, exit_code=code)
            lived_s = time.monotonic() - started_at
            backoff_s = FIRST_BACKOFF_S if lived_s >= STEADY_S else min(backoff_s * 2, MAX_BACKOFF_S)
            await _wait(self._stopping, backoff_s)

    async def _spawn(self, sock: socket.socket, restarts: int) -> Child | None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "meshproxy.app.child",
                str(theirs.fileno()),
                str(sock.fileno()),
                pass_fds=(theirs.fileno(), sock.fileno()),
            )
        child = Child(next(self._numbers), restarts, process, await Control.over(ours))
        try:
            await self._brief(child)
        except ConnectionError:
            code = await process.wait()
            _log.error("worker_did_not_start", worker=child.number, exit_code=code)
            return None
        self._children[child.number] = child
        if len(self._children) == len(self._sockets):
            self.up.set()
        if self._stopping.is_set():
            child.tell(Drain())
        return child

    async def _brief(self, child: Child) -> None:
        """Start a worker with what holds now, and tell it what changed while it was starting."""
        told = self._generation
        start = Start(self._settings, self._secrets, told, self._reload_failed, self._journal)
        await child.control.ask(start)
        while told != self._generation:
            told = self._generation
            await child.control.ask(Reload(self._settings, self._secrets, told))

    def _forget(self, child: Child) -> None:
        del self._children[child.number]
        self._fleet.retire(child.number)
        child.control.close()

    async def reload(self, reloader: Reloader) -> None:
        """SIGHUP: every worker swaps in what the file says now, or none does."""
        async with self._reloading:
            swap = reloader.next()
            self._reload_failed = swap is None
            if swap is None:
                await self._ask_all(ReloadFailed())
                return
            settings, self._secrets = swap
            self._settings = replace(settings, redis=self._settings.redis)  # the embedded server has a URL of its own
            self._generation += 1
            logs.set_level(settings.log.level)
            answers = await self._ask_all(Reload(self._settings, self._secrets, self._generation))
            _log.info("reloaded", generation=self._generation, workers=len(answers))

    async def stop(self) -> None:
        """Drain every worker and wait for its exit; kill what is still there long after it should be gone."""
        server = self._settings.server
        self._stopping.set()
        self._tell_all(Drain())
        await _wait(self._hurry, server.drain_grace_s)
        for sock in self._sockets:
            sock.close()  # as the workers do with theirs: connections are refused, and not left to wait for nobody
        _, late = await asyncio.wait(self._keepers, timeout=server.drain_s + EXIT_GRACE_S)
        for child in self._children.values() if late else ():
            _log.error("worker_killed", worker=child.number)
            child.process.kill()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def hurry(self) -> None:
        """End what runs now."""
        self._hurry.set()
        self._tell_all(Hurry())

    def _tell_all(self, order: Drain | Hurry) -> None:
        for child in self._children.values():
            child.tell(order)

    async def metrics(self, *, openmetrics: bool) -> bytes:
        """One exposition for all workers."""
        await self._reports()
        return await exposition.render(self._fleet.merged(), openmetrics=openmetrics)

    async def ready(self) -> list[str]:
        """Why a balancer should send nothing here: not all serve yet, nobody does, or everybody has a reason."""
        return self._reasons(await self._reports())

    async def status(self) -> Status:
        """The status page's figures."""
        reports = await self._reports()
        now = time.time()
        return {
            **summarize(self._fleet.merged()),
            "version": VERSION,
            "uptime_s": now - self._started_at,
            "not_ready": self._reasons(reports),
            "max_in_flight": self._settings.server.max_in_flight * len(self._sockets),
            "ledger_state": "up" if any(report.connected for report in reports) else "down",
            "workers": [child.status(now, stopping=self._stopping.is_set()) for child in self._children.values()],
        }

    def _reasons(self, reports: list[Reported]) -> list[str]:
        if self._stopping.is_set():
            return ["draining"]
        if not self.up.is_set():
            return [
                "starting"
            ]  # the kernel deals connections out to every socket, also to one whose worker isn't there yet
        if any(not report.not_ready for report in reports):
            return []
        return sorted({reason for report in reports for reason in report.not_ready}) or ["no worker is up"]

    async def _reports(self) -> list[Reported]:
        reports = []
        for number, answer in (await self._ask_all(Report())).items():
            report = msgspec.msgpack.decode(answer, type=Reported)
            self._fleet.report(number, report.snapshot)
            reports.append(report)
        return reports

    async def _ask_all(self, question: Question) -> dict[int, bytes]:
        children = list(self._children.values())
        answers = await asyncio.gather(*(child.ask(question) for child in children))
        return {
            child.number: answer
            for child, answer in zip(children, answers, strict=True)
            if answer is not None and child.number in self._children
        }


async def supervise(
    settings: Settings,
    secrets: Mapping[str, str],
    workers: int,
    *,
    reload: Read,
    journal: Path | None,
    admin_token: str | None = None,
) -> None:
    """Serve with `workers` processes until SIGTERM or SIGINT. OSError if an address is taken."""
    sink = logs.configure(settings.log.level, settings.log.format, sys.stderr.buffer)
    sockets, admin = listen_shared(settings.server.listen, workers), listen(settings.server.admin_listen)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(sink.close)
        standing = await stack.enter_async_context(with_redis(settings))
        supervisor = Supervisor(standing, secrets, sockets, journal)
        supervisor.start()
        admin_runner = web.AppRunner(create_admin(supervisor, admin_token), access_log=None)
        await admin_runner.setup()
        stack.push_async_callback(admin_runner.cleanup)
        await web.SockSite(admin_runner, admin).start()
        stopped = _on_signals(supervisor, Reloader(settings, reload))
        _log.info("supervising", workers=workers, data=name_of(sockets[0]), admin=name_of(admin))
        await _first(supervisor.up, stopped)
        notify(READY)
        await stopped.wait()
        notify(STOPPING)
        await supervisor.stop()
    _log.info("stopped")


def _on_signals(supervisor: Supervisor, reloader: Reloader) -> asyncio.Event:
    """Obey signals; the event is set by the first that says to stop."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()

    def stop() -> None:
        if stopped.is_set():
            supervisor.hurry()
        stopped.set()

    def reload() -> None:
        task = asyncio.create_task(supervisor.reload(reloader), name="reload")
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    return stopped


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


async def _first(*events: asyncio.Event) -> None:
    """Return when one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
