"""The supervisor of several workers: it starts a process for each, restarts it, queries it and ends it.

The supervisor serves no request. It holds the listening sockets, so that a connection that arrives while its worker is
restarted waits instead of being refused.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import sys
import time
from functools import partial

import msgspec
import structlog

from meshproxy.app.application import wait_for_event
from meshproxy.app.reload import RunningConfig
from meshproxy.app.worker_process import (
    Command,
    ControlChannel,
    Drain,
    Interrupt,
    Prepare,
    Report,
    ReportRequest,
    Request,
)
from meshproxy.ledger.journal import SettlementsLost
from meshproxy.server.admin import WorkerStatus
from meshproxy.telemetry.exposition import MergedMetrics
from meshproxy.telemetry.logs import set_level
from meshproxy.telemetry.tasks import Tasks
from meshproxy.units import backoff_s

STEADY_S = 10.0  # a worker that lived this long resets its backoff
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0
EXIT_GRACE_S = 30.0  # beyond drain_s, before a worker is killed
PREPARE_S = 30.0  # how long a worker may take to build a configuration: 16 ms for each upstream with TLS
ANSWER_S = 2.0  # a worker that takes longer to answer is left out of a scrape

_log = structlog.get_logger("meshproxy.app")


class WorkerProcess:
    """One worker process and the control socket to it."""

    def __init__(
        self, number: int, restarts: int, process: asyncio.subprocess.Process, control: ControlChannel
    ) -> None:
        self.number = number
        self.restarts = restarts
        self.started_at = time.time()
        self.process = process
        self.control = control

    @classmethod
    async def spawn(cls, number: int, restarts: int, sock: socket.socket) -> "WorkerProcess":
        """Start a process that will serve `sock`."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            fds = theirs.fileno(), sock.fileno()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "meshproxy.app.worker_process", *map(str, fds), pass_fds=fds
            )
            stack.pop_all()
        return cls(number, restarts, process, await ControlChannel.from_socket(ours))

    async def request(self, message: Request, timeout_s: float = ANSWER_S) -> bytes | None:
        """Return the answer, still encoded; None if the worker is gone or doesn't answer in time."""
        try:
            return await asyncio.wait_for(self.control.request(message), timeout_s)
        except (ConnectionError, TimeoutError):
            return None

    def send(self, command: Command) -> None:
        """Send a command. Does nothing if the worker is gone."""
        with contextlib.suppress(ConnectionError):
            self.control.send(command)


class Supervisor:
    """Keeps one worker alive for each listening socket.

    `up` is set once all are up. `metrics` has the metrics of all workers, also of those that ended.
    """

    def __init__(self, config: RunningConfig, sockets: list[socket.socket]) -> None:
        self.config = config
        self.up = asyncio.Event()
        self.rejected = asyncio.Event()  # a worker can't serve this configuration, and none has served it before
        self.faults: list[str] = []  # what can't be served
        self.metrics = MergedMetrics()
        self._sockets = sockets
        self._processes: dict[int, WorkerProcess] = {}
        self._numbers = itertools.count(1)
        self._tasks = Tasks()
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._interrupted = asyncio.Event()
        self._lost = False  # a worker could not keep a settlement

    async def start(self) -> None:
        """Start the workers and keep them alive."""
        self._keepers = [self._tasks.supervise("worker-keeper", partial(self._keep, sock)) for sock in self._sockets]

    async def prepare(self, config: RunningConfig) -> list[str]:
        """Have every worker build a configuration, and return the faults that prevent it.

        A worker that doesn't answer is a fault, unless it has ended: its successor begins with the configuration then
        in force.
        """
        workers = list(self._processes.values())
        answers = await asyncio.gather(*(worker.request(Prepare(config), PREPARE_S) for worker in workers))
        faults: list[str] = []
        for worker, answer in zip(workers, answers, strict=True):
            if answer is not None:
                faults += [fault for fault in _faults(answer) if fault not in faults]
            elif worker.number in self._processes:
                faults.append(f"worker {worker.number} did not answer within {PREPARE_S:g} s")
        return faults

    async def apply(self, config: RunningConfig) -> list[str]:
        """Put this configuration in force. Later workers begin with it, so a worker's faults are only logged."""
        self.config = config
        set_level(config.settings.log.level)
        for number, answer in (await self._request_all(config)).items():
            for fault in _faults(answer):
                _log.error("worker_not_reloaded", worker=number, fault=fault)
        return []

    async def reports(self) -> dict[int, Report]:
        """Return the reports of the workers that answer in time, by number."""
        answers = await self._request_all(ReportRequest())
        return {number: msgspec.msgpack.decode(answer, type=Report) for number, answer in answers.items()}

    def workers(self) -> list[WorkerStatus]:
        """List the workers that are up."""
        state = "draining" if self._stopping.is_set() else "running"
        return [
            {
                "pid": worker.process.pid,
                "state": state,
                "uptime_s": time.time() - worker.started_at,
                "restarts": worker.restarts,
            }
            for worker in self._processes.values()
        ]

    async def stop(self) -> None:
        """Drain every worker and wait for its exit. Kill those that remain after drain_s + EXIT_GRACE_S.

        Raises SettlementsLost if a worker could not keep a settlement.
        """
        server = self.config.settings.server
        self._stopping.set()
        self._send_all(Drain())
        await wait_for_event(self._interrupted, server.drain_grace_s)
        for sock in self._sockets:
            sock.close()  # as the workers close theirs: connections are refused instead of waiting in vain
        _, late = await asyncio.wait(self._keepers, timeout=server.drain_s + EXIT_GRACE_S)
        for worker in self._processes.values() if late else ():
            _log.error("worker_killed", worker=worker.number)
            worker.process.kill()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._lost:
            raise SettlementsLost

    def interrupt(self) -> None:
        """End running requests now, and skip the waits of stop()."""
        self._interrupted.set()
        self._send_all(Interrupt())

    async def _keep(self, sock: socket.socket) -> None:
        """Keep one worker alive on `sock` until the supervisor stops."""
        failures = 0
        for restarts in itertools.count():
            if self._stopping.is_set():
                return
            started_at = time.monotonic()
            try:
                worker = await WorkerProcess.spawn(next(self._numbers), restarts, sock)
            except OSError as error:  # no memory, processes or descriptors left
                failures += 1
                pause_s = backoff_s(failures, FIRST_BACKOFF_S, MAX_BACKOFF_S)
                _log.error("worker_not_started", reason=error.strerror or str(error), again_in_s=pause_s)
                await wait_for_event(self._stopping, pause_s)
                continue
            began = await self.configure(worker)
            code = await worker.process.wait()
            worker.control.close()
            self._processes.pop(worker.number, None)
            self.metrics.retire(worker.number)
            self._lost |= code == os.EX_IOERR
            if self._stopping.is_set():
                return
            if code == os.EX_CONFIG and not self.up.is_set():
                self.rejected.set()
                return
            _log.error("worker_died" if began else "worker_did_not_start", worker=worker.number, exit_code=code)
            failures = 1 if time.monotonic() - started_at >= STEADY_S else failures + 1
            await wait_for_event(self._stopping, backoff_s(failures, FIRST_BACKOFF_S, MAX_BACKOFF_S))

    async def configure(self, worker: WorkerProcess) -> bool:
        """Send a new worker the configuration in force, again if it changes meanwhile. Return False if the worker ends."""
        given = None
        try:
            while given is not self.config:
                given = self.config
                faults = _faults(await worker.control.request(given))
                if faults:
                    self.faults = faults
                    _log.error("worker_refused", worker=worker.number, faults=faults)
                    return False
        except ConnectionError:
            return False
        self._processes[worker.number] = worker
        if len(self._processes) == len(self._sockets):
            self.up.set()
        if self._stopping.is_set():
            worker.send(Drain())
        return True

    def _send_all(self, command: Command) -> None:
        for worker in self._processes.values():
            worker.send(command)

    async def _request_all(self, request: Request) -> dict[int, bytes]:
        workers = list(self._processes.values())
        answers = await asyncio.gather(*(worker.request(request) for worker in workers))
        return {
            worker.number: answer
            for worker, answer in zip(workers, answers, strict=True)
            if answer is not None and worker.number in self._processes
        }


def _faults(answer: bytes) -> list[str]:
    return msgspec.msgpack.decode(answer, type=list[str] | None) or []
