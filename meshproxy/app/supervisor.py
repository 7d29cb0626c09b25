"""Several workers under one roof: a process for each, which this one starts, restarts, questions and ends.

The supervisor serves no request. It holds the listening sockets, so that a connection that arrives while its worker is being
restarted waits instead of being refused.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import sys
import time

import msgspec
import structlog

from meshproxy.app.control import Ask, Control, Drain, Hurry, Order, Question, Report
from meshproxy.app.data_listener import wait
from meshproxy.app.reload import Standing
from meshproxy.ledger.journal import SettlementsLost
from meshproxy.server.admin import WorkerStatus
from meshproxy.telemetry import logs
from meshproxy.telemetry.snapshot import Fleet

STEADY_S = 10.0  # a worker that lived so long has its backoff forgotten
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0
EXIT_GRACE_S = 30.0  # beyond drain_s, before a worker is killed
ANSWER_S = 2.0  # a worker that takes longer to answer is left out of a scrape

_log = structlog.get_logger("meshproxy.app")


class Child:
    """One worker process and the line to it."""

    def __init__(self, number: int, restarts: int, process: asyncio.subprocess.Process, control: Control) -> None:
        self.number = number
        self.restarts = restarts
        self.started_at = time.time()
        self.process = process
        self.control = control

    @classmethod
    async def spawn(cls, number: int, restarts: int, sock: socket.socket) -> "Child":
        """A new process that is to serve `sock`."""
        ours, theirs = socket.socketpair()
        with theirs:
            fds = theirs.fileno(), sock.fileno()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "meshproxy.app.child", *map(str, fds), pass_fds=fds
            )
        return cls(number, restarts, process, await Control.over(ours))

    async def ask(self, question: Question) -> bytes | None:
        """The answer, still encoded, or None from a worker that is gone or stuck."""
        try:
            return await asyncio.wait_for(self.control.ask(question), ANSWER_S)
        except (ConnectionError, TimeoutError):
            return None

    def tell(self, order: Order) -> None:
        """Give an order. One who is gone needs none."""
        with contextlib.suppress(ConnectionError):
            self.control.send(order)


class Supervisor:
    """Keeps one worker for each listening socket alive. `up` is set once all are up; `fleet` has what was counted, also by those
    that are gone.
    """

    def __init__(self, standing: Standing, sockets: list[socket.socket]) -> None:
        self.standing = standing
        self.up = asyncio.Event()
        self.fleet = Fleet()
        self._sockets = sockets
        self._children: dict[int, Child] = {}
        self._numbers = itertools.count(1)
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._lost = False  # a worker could not keep a settlement

    async def start(self) -> None:
        """Begin to serve."""
        self._keepers = [asyncio.create_task(self._keep(sock), name="keep") for sock in self._sockets]

    async def apply(self, standing: Standing) -> None:
        """Let this hold from now on."""
        self.standing = standing
        logs.set_level(standing.settings.log.level)
        await self._ask_all(standing)

    async def reports(self) -> dict[int, Report]:
        """How each worker is that says so in time, by its number."""
        answers = await self._ask_all(Ask())
        return {number: msgspec.msgpack.decode(answer, type=Report) for number, answer in answers.items()}

    def workers(self) -> list[WorkerStatus]:
        """The workers that are up."""
        state = "draining" if self._stopping.is_set() else "running"
        return [
            {
                "pid": child.process.pid,
                "state": state,
                "uptime_s": time.time() - child.started_at,
                "restarts": child.restarts,
            }
            for child in self._children.values()
        ]

    async def stop(self) -> None:
        """Drain every worker and wait for its exit; kill what is still there long after it should be gone. SettlementsLost if one
        could not keep what was to be charged.
        """
        server = self.standing.settings.server
        self._stopping.set()
        self._tell_all(Drain())
        await wait(self._hurried, server.drain_grace_s)
        for sock in self._sockets:
            sock.close()  # as the workers do with theirs: connections are refused, and not left to wait for nobody
        _, late = await asyncio.wait(self._keepers, timeout=server.drain_s + EXIT_GRACE_S)
        for child in self._children.values() if late else ():
            _log.error("worker_killed", worker=child.number)
            child.process.kill()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._lost:
            raise SettlementsLost

    def hurry(self) -> None:
        """End what runs now, and wait for nothing in stop()."""
        self._hurried.set()
        self._tell_all(Hurry())

    async def _keep(self, sock: socket.socket) -> None:
        """Keep one worker alive on `sock` until the supervisor stops."""
        backoff_s = FIRST_BACKOFF_S
        for restarts in itertools.count():
            if self._stopping.is_set():
                return
            started_at = time.monotonic()
            child = await Child.spawn(next(self._numbers), restarts, sock)
            began = await self._brief(child)
            code = await child.process.wait()
            child.control.close()
            self._children.pop(child.number, None)
            self.fleet.retire(child.number)
            self._lost |= code == os.EX_IOERR
            if self._stopping.is_set():
                return
            _log.error("worker_died" if began else "worker_did_not_start", worker=child.number, exit_code=code)
            lived_s = time.monotonic() - started_at
            backoff_s = FIRST_BACKOFF_S if lived_s >= STEADY_S else min(backoff_s * 2, MAX_BACKOFF_S)
            await wait(self._stopping, backoff_s)

    async def _brief(self, child: Child) -> bool:
        """Have a worker begin with what holds, which may change meanwhile; False if it is gone before it serves."""
        told = None
        try:
            while told is not self.standing:
                told = self.standing
                await child.control.ask(told)
        except ConnectionError:
            return False
        self._children[child.number] = child
        if len(self._children) == len(self._sockets):
            self.up.set()
        if self._stopping.is_set():
            child.tell(Drain())
        return True

    def _tell_all(self, order: Order) -> None:
        for child in self._children.values():
            child.tell(order)

    async def _ask_all(self, question: Question) -> dict[int, bytes]:
        children = list(self._children.values())
        answers = await asyncio.gather(*(child.ask(question) for child in children))
        return {
            child.number: answer
            for child, answer in zip(children, answers, strict=True)
            if answer is not None and child.number in self._children
        }
