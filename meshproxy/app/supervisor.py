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
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import structlog
from aiohttp import web

from meshproxy.app.control import Control, Drain, Question, Reload, ReloadFailed, Report, Reported, Start
from meshproxy.app.worker import with_redis
from meshproxy.config import Settings, Unfit
from meshproxy.server.admin import Status, WorkerStatus, create_admin
from meshproxy.server.sockets import listen, listen_shared
from meshproxy.telemetry import exposition, logs
from meshproxy.telemetry.snapshot import Fleet
from meshproxy.telemetry.summary import summarize
from meshproxy.version import VERSION

ANSWER_S = 2.0  # a worker that takes longer to answer is left out of a scrape
STEADY_S = 10.0  # a worker that lived so long has its backoff forgotten
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0
EXIT_GRACE_S = 15.0  # beyond drain_s, before a worker is killed

_log = structlog.get_logger("meshproxy.app")


class Child:
    """One worker process and the line to it."""

    def __init__(self, number: int, restarts: int, process: asyncio.subprocess.Process, control: Control) -> None:
        self.number = number
        self._restarts = restarts
        self._started_at = time.time()
        self.process = process
        self.control = control

    async def ask(self, question: Question) -> bytes | None:
        """The answer, still encoded, or None from a worker that is gone or stuck."""
        try:
            return await asyncio.wait_for(self.control.ask(question), ANSWER_S)
        except (ConnectionError, TimeoutError):
            return None

    def status(self, now: float, *, stopping: bool) -> WorkerStatus:
        """Its line on the status page."""
        state = "draining" if stopping else "running"
        return {
            "pid": self.process.pid,
            "state": state,
            "uptime_s": now - self._started_at,
            "restarts": self._restarts,
        }


class Supervisor:
    """Keeps one worker for each listening socket alive."""

    def __init__(
        self, settings: Settings, secrets: Mapping[str, str], sockets: list[socket.socket], journal: Path | None
    ) -> None:
        self._settings = settings
        self._secrets = dict(secrets)
        self._sockets = sockets
        self._journal = str(journal) if journal is not None else None
        self._children: dict[int, Child] = {}
        self._numbers = itertools.count(1)
        self._fleet = Fleet()
        self._stopping = False
        self._started_at = time.time()

    async def keep(self, sock: socket.socket) -> None:
        """Keep one worker alive on `sock` until the supervisor stops."""
        backoff_s = FIRST_BACKOFF_S
        for restarts in itertools.count():
            if self._stopping:
                return
            started_at = time.monotonic()
            child = await self._spawn(sock, restarts)
            if child is not None:
                code = await child.process.wait()
                self._forget(child)
                if self._stopping:
                    return
                _log.error("worker_died", worker=child.number, exit_code=code)
            lived_s = time.monotonic() - started_at
            backoff_s = FIRST_BACKOFF_S if lived_s >= STEADY_S else min(backoff_s * 2, MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s)

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
            await child.control.ask(Start(self._settings, self._secrets, self._journal))
        except ConnectionError:
            await process.wait()
            return None
        self._children[child.number] = child
        return child

    def _forget(self, child: Child) -> None:
        del self._children[child.number]
        self._fleet.retire(child.number)
        child.control.close()

    async def reload(self, read: Callable[[], tuple[Settings, dict[str, str]]]) -> None:
        """SIGHUP, as a transaction: a configuration with a fault changes nothing, in no worker."""
        try:
            settings, secrets = read()
        except Unfit as unfit:
            _log.error("reload_failed", faults=unfit.faults)
            await self._ask_all(ReloadFailed())
            return
        settings = msgspec.structs.replace(settings, redis=self._settings.redis)
        self._settings, self._secrets = settings, secrets
        answers = await self._ask_all(Reload(settings, secrets))
        stuck = {key for answer in answers.values() for key in msgspec.msgpack.decode(answer, type=list[str])}
        for key in sorted(stuck):
            _log.warning("reload_needs_restart", key=key)
        _log.info("reloaded", workers=len(answers))

    async def stop(self) -> None:
        """Drain every worker and wait for its exit; kill what is still there long after it should be gone."""
        self._stopping = True
        children = list(self._children.values())
        for child in children:
            child.control.send(Drain())
        server = self._settings.server
        patience_s = server.drain_grace_s + server.drain_s + EXIT_GRACE_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(child.process.wait() for child in children)), patience_s)
        for child in children:
            if child.process.returncode is None:
                _log.error("worker_killed", worker=child.number)
                child.process.kill()

    async def metrics(self, *, openmetrics: bool) -> bytes:
        """One exposition for all workers."""
        await self._reports()
        return await exposition.render(self._fleet.merged(), openmetrics=openmetrics)

    async def ready(self) -> list[str]:
        """Why a balancer should send nothing here: nobody serves, or everybody has a reason."""
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
            "workers": [child.status(now, stopping=self._stopping) for child in self._children.values()],
        }

    def _reasons(self, reports: list[Reported]) -> list[str]:
        if self._stopping:
            return ["draining"]
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
    reload: Callable[[], tuple[Settings, dict[str, str]]],
    journal: Path | None,
) -> None:
    """Serve with `workers` processes until SIGTERM or SIGINT. OSError if an address is taken."""
    sink = logs.configure(settings.log.level, settings.log.format, sys.stderr.buffer)
    sockets, admin = listen_shared(settings.server.listen, workers), listen(settings.server.admin_listen)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(sink.close)
        standing = await stack.enter_async_context(with_redis(settings))
        supervisor = Supervisor(standing, secrets, sockets, journal)
        keepers = [asyncio.create_task(supervisor.keep(sock), name="keep") for sock in sockets]
        admin_runner = web.AppRunner(create_admin(supervisor), access_log=None)
        await admin_runner.setup()
        stack.push_async_callback(admin_runner.cleanup)
        await web.SockSite(admin_runner, admin).start()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stopped.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: keepers.append(asyncio.create_task(supervisor.reload(reload))))
        _log.info("supervising", workers=workers, data=settings.server.listen, admin=settings.server.admin_listen)
        await stopped.wait()
        await supervisor.stop()
        await asyncio.gather(*keepers, return_exceptions=True)
    _log.info("stopped")
