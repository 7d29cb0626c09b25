"""An event loop with virtual time for a whole world of processes in one thread, with every choice drawn from one seed.

A process is a `Process` in the context variable PROCESS: whatever code schedules (callbacks, tasks, timers, jobs for
threads) belongs to the process of its context. Each process has a first-in-first-out queue, as a real loop has. A turn
runs what is in the queue of one process; which process has the next turn is drawn. When no process has anything to run,
time jumps to the next event.

Nothing here reads a clock, opens a socket, starts a thread or asks for entropy.
"""

import asyncio
import contextvars
import heapq
import random
import signal
import socket
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

if TYPE_CHECKING:
    from simulation.network import Network, Socket

TURN_S = 0.000_01  # what a turn takes: code that polls in a loop can't stop time
START_S = 1_000.0  # the monotonic clock at the start
EPOCH_S = 1_767_225_600  # 2026-01-01T00:00:00Z; each run starts at a moment within YEAR_S from there
YEAR_S = 31_536_000
FAST_JOB_S, SLOW_JOB_S = 0.000_05, 0.02  # how long work in a thread takes, as a rule and at times
FIRST_FD = 3
EXIT_S = 0.01  # what a process that ends gives its transports to close

Job = tuple[Callable[..., Any], tuple[Any, ...], "asyncio.Future[Any]"]


class Stuck(Exception):
    """Nothing can happen any more, or the run took more than its bound of turns."""


class Killed(BaseException):
    """Raised in a killed process's job for a thread, to stop it where it is."""


class Process:
    """A simulated process: its queue, and what the kernel closes when it dies."""

    def __init__(self, name: str, number: int, *, is_deferring: bool) -> None:
        self.name = name
        self.number = number
        self.pid = 1_000 + number
        self.address = f"10.1.{number // 250}.{number % 250 + 1}"
        self.alive = True
        self.is_deferring = (
            is_deferring  # whether writes go out at a turn's end, as uvloop's do, or at once, as asyncio's
        )
        self.skew_s = 0.0  # of its wall clock
        self.ready: deque[Any] = deque()  # handles
        self.is_queued = False  # for a turn
        self.flushes: list[Callable[[], None]] = []  # writes that the end of the turn sends
        self.sockets: dict[int, Socket] = {}  # by descriptor
        self.files: set[int] = set()  # descriptors of the disk
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.jobs: dict[int, Job] = {}  # for threads, not run yet
        self.signals: dict[int, Callable[[], None]] = {}
        self.hung_up = False  # whether SIGHUP came before its handler
        self.children: list[Process] = []
        self.left: dict[str, list[str]] = {}  # what it left at its own end
        self.on_death: list[Callable[[], None]] = []
        self.on_job: list[Callable[[], None]] = []
        self.kept: list[Any] = []  # tasks of a killed process: collected, they would run their `finally`

    def free_fd(self) -> int:
        """Return the lowest free descriptor, as open(2) does."""
        fd = FIRST_FD
        while fd in self.sockets:
            fd += 1
        return fd

    def __repr__(self) -> str:
        return self.name


PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("PROCESS")


class Event(Struct, eq=False):
    """Something that the world does by itself, such as a packet's arrival. It belongs to no process."""

    callback: Callable[..., None]
    args: tuple[Any, ...]
    _cancelled: bool = False

    def cancel(self) -> None:
        """Have it not happen."""
        self._cancelled = True


class Child(asyncio.SubprocessTransport):
    """A child process, as asyncio's transport of one."""

    def __init__(self, loop: "SimLoop", process: Process, protocol: Any) -> None:
        super().__init__()
        self._loop = loop
        self.process = process
        self._protocol = protocol
        self._ended: asyncio.Future[int] = loop.create_future()
        self._context = contextvars.copy_context()  # the parent's
        process.on_death.append(lambda: self.end(-int(signal.SIGKILL)))

    def end(self, code: int) -> None:
        """Have the parent see the exit code."""
        if not self._ended.done():
            self._ended.set_result(code)
            self._loop.call_soon(self._protocol.process_exited, context=self._context)

    async def _wait(self) -> int:
        return await asyncio.shield(self._ended)

    def get_pid(self) -> int:
        """Return the process's number."""
        return self.process.pid

    def get_returncode(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._ended.result() if self._ended.done() else None

    def get_pipe_transport(self, fd: int) -> None:
        """Return None: there are no pipes."""

    def kill(self) -> None:
        """Send SIGKILL."""
        self._loop.kill(self.process)

    def close(self) -> None:
        """Nothing: the process goes on."""


class SimHandle(Struct, eq=False):
    """A callback or a timer, as asyncio's handles of them: a run makes two thousand, in a third of the time.

    `context` may be None for `_end_sleep` alone, which runs in none.
    """

    _callback: Callable[..., Any] | None
    _args: Sequence[Any]
    _context: contextvars.Context | None
    _when: float = 0.0
    _cancelled: bool = False

    def cancel(self) -> None:
        """Have it not run."""
        self._cancelled = True
        self._callback = None
        self._args = ()

    def cancelled(self) -> bool:
        """Return whether it won't run."""
        return self._cancelled

    def when(self) -> float:
        """Return a timer's time."""
        return self._when


class SimLoop(asyncio.BaseEventLoop):
    """The loop. `network` is set by its Network; `trace` takes one line of the transcript, as a template and values."""

    network: "Network"
    _stopping: bool  # BaseEventLoop's

    def __init__(self, rng: random.Random, *, max_turns: int) -> None:
        super().__init__()
        self.rng = rng
        self._draw = rng.random
        self.now = START_S
        self.wall_offset_s = EPOCH_S + rng.randrange(YEAR_S) + rng.random() - START_S
        self.turns = 0
        self.max_turns = max_turns
        self.muted = False
        self.trace: Callable[..., None] = lambda *_: None
        self.errors: list[str] = []  # exceptions that nothing handled
        self.processes: list[Process] = []
        self._runnable: list[Process] = []
        self._events: list[tuple[float, float, int, Process | None, Any]] = []
        self._sequence = 0
        self._task_names = 0
        self._children = 0
        self.world = self.process("world")
        self._before = PROCESS.set(self.world)

    # Processes.

    def process(self, name: str) -> Process:
        """Make a process."""
        made = Process(name, len(self.processes), is_deferring=self.rng.random() < 0.5)
        self.processes.append(made)
        return made

    @contextmanager
    def within(self, process: Process) -> Iterator[None]:
        """Have the code of this block, which must not await, belong to a process."""
        token = PROCESS.set(process)
        try:
            yield
        finally:
            PROCESS.reset(token)

    def start(self, process: Process, coro: Coroutine[Any, Any, Any], name: str | None = None) -> "asyncio.Task[Any]":
        """Run a coroutine as a task of a process."""
        with self.within(process):
            return self.create_task(coro, name=name)

    def kill(self, process: Process) -> None:
        """End a process at once, as SIGKILL does: no code of it runs again, and the kernel closes its sockets and files."""
        if not process.alive:
            return
        self.trace("%s: killed", process.name)
        self._end(process)
        for callback in process.on_death:
            callback()

    def _end(self, process: Process) -> None:
        process.alive = False
        jobs, process.jobs = process.jobs, {}
        for function, args, _ in jobs.values():
            self._tear(process, function, args)
        process.kept += [*process.tasks, *process.ready]
        process.ready.clear()
        process.flushes.clear()
        for sock in list(process.sockets.values()):
            sock.die()
        for fd in sorted(process.files):
            self.close_file(fd)
        process.files.clear()

    close_file: Callable[[int], None] = staticmethod(lambda _fd: None)  # the disk's, set by it
    torn: Callable[[bool], None] = staticmethod(lambda _is_torn: None)  # the disk's: whether writes end in the middle

    def _tear(self, process: Process, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Decide how far a thread got before its process was killed: not begun, in the middle, or done."""
        chance = self.rng.random()
        if chance < 0.4:
            return
        self.torn(chance < 0.7)
        try:
            with self.within(process):
                function(*args)
        except (Exception, Killed) as error:  # noqa: BLE001 - the thread is gone with its process
            self.trace("%s: a thread ended in the middle (%s)", process.name, type(error).__name__)
        finally:
            self.torn(False)  # noqa: FBT003 - its only argument

    def signal(self, process: Process, number: int) -> bool:
        """Deliver a signal. Return False if the process is gone or has no handler: SIGTERM then ends it."""
        handler = process.signals.get(number)
        if process.alive and handler is None and number == signal.SIGTERM:
            self.kill(process)
        elif process.alive and handler is None and number == signal.SIGHUP:  # blocked until there is a handler
            process.hung_up = True
        if not process.alive or handler is None:
            return False
        self.at(self.now, process, SimHandle(handler, (), self._context_of(process)))
        return True

    def _context_of(self, process: Process) -> contextvars.Context:
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        return context

    # Time.

    def time(self) -> float:
        """Return the virtual monotonic clock, in seconds."""
        return self.now

    def wall(self) -> float:
        """Return the virtual Unix time of the current process, in seconds."""
        return self.now + self.wall_offset_s + PROCESS.get().skew_s

    def at(self, when: float, process: Process | None, what: Any) -> None:
        """Have a handle run in a process, or an Event happen, at a time. Events of one moment happen in drawn order."""
        self._sequence += 1
        heapq.heappush(self._events, (when, self._draw(), self._sequence, process, what))

    def happen(self, delay_s: float, callback: Callable[..., None], *args: Any) -> Event:
        """Have something happen that belongs to no process."""
        event = Event(callback, args)
        self.at(self.now + delay_s, None, event)
        return event

    def jitter(self, usual_s: float, rare_s: float) -> float:
        """Draw a delay: about `usual_s` as a rule, and now and then up to `rare_s`."""
        draw = self._draw
        return usual_s * (0.5 + draw()) if draw() < 0.95 else rare_s * draw()

    # asyncio's interface.

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Run the callback in the process's next turn."""
        if context is None:
            context = contextvars.copy_context()
        handle = SimHandle(callback, args, context)
        process = context[PROCESS]  # what follows is _enqueue, without its call
        if process.alive and not self.muted:
            process.ready.append(handle)
            if not process.is_queued:
                process.is_queued = True
                self._runnable.append(process)
        return handle  # type: ignore[return-value]  # which has what is asked of one

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Run the callback at a time of this loop."""
        if context is None:
            context = contextvars.copy_context()
        handle = SimHandle(callback, args, context, when)
        if not self.muted:
            self.at(when, context[PROCESS], handle)
        return handle  # type: ignore[return-value]  # which has what is asked of one

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Run the callback after a delay."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None, **_options: Any) -> "asyncio.Task[Any]":
        """Start a task, named by this loop, so that its name depends on nothing before the run."""
        if name is None:
            self._task_names += 1
            name = f"task-{self._task_names}"
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        (PROCESS.get() if context is None else context[PROCESS]).tasks.add(task)
        return task

    def run_in_executor(self, _executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        """Run a function after a drawn delay, in this thread, and resolve the future after another one."""
        future: asyncio.Future[Any] = self.create_future()
        process = PROCESS.get()
        self._sequence += 1
        number = self._sequence
        process.jobs[number] = (func, args, future)
        for callback in process.on_job:
            callback()
        self.call_later(self.jitter(FAST_JOB_S, SLOW_JOB_S), self._run_job, process, number)
        return future

    def _run_job(self, process: Process, number: int) -> None:
        func, args, future = process.jobs.pop(number)
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - as a thread's
            self.call_later(self.jitter(FAST_JOB_S, SLOW_JOB_S), _fail, future, error)
        else:
            self.call_later(self.jitter(FAST_JOB_S, SLOW_JOB_S), _resolve, future, result)

    async def subprocess_exec(self, protocol_factory: Any, *argv: Any, pass_fds: Any = (), **_options: Any) -> Any:
        """Start a program of `programs` in a process of its own, which inherits the descriptors."""
        parent = PROCESS.get()
        self._children += 1
        process = self.process(f"{parent.name}/{self._children}")
        parent.children.append(process)
        for fd in pass_fds:
            parent.sockets[fd].inherit(process)
        protocol = protocol_factory()
        child = Child(self, process, protocol)
        protocol.connection_made(child)
        self.start(process, self._run_program(process, child, self.programs(argv)), "main")
        await asyncio.sleep(self.jitter(FAST_JOB_S, SLOW_JOB_S))
        return child, protocol

    programs: Callable[[Any], Coroutine[Any, Any, int]]  # from a command line, what it runs

    async def _run_program(self, process: Process, child: Child, program: Coroutine[Any, Any, int]) -> None:
        code = await program
        await self.exit(process, code)
        child.end(code)

    async def exit(self, process: Process, code: int) -> None:
        """End the current process, and note what it leaves after a moment for closing."""
        await asyncio.sleep(EXIT_S)
        process.left = self.leftovers(process)
        self.trace("%s: exit code %d", process.name, code)
        self._end(process)

    def leftovers(self, process: Process) -> dict[str, list[str]]:
        """Describe the tasks, timers, sockets and files that a process has, the current task aside."""
        me = asyncio.current_task(self)
        timers = [(when, what) for when, _, _, owner, what in self._events if owner is process and not what._cancelled]
        return {
            "tasks": sorted(task.get_name() for task in process.tasks if not task.done() and task is not me),
            "timers": [
                f"{what._callback!r} at {when - START_S:.3f}" for when, what in sorted(timers, key=lambda each: each[0])
            ],
            # a worker's end of the pair to its supervisor lasts as long as the process
            "sockets": [f"{fd} {sock.name}" for fd, sock in process.sockets.items() if sock.family != socket.AF_UNIX],
            "files": [str(fd) for fd in sorted(process.files)],
        }

    def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Have a signal to the current process call this."""
        process = PROCESS.get()
        process.signals[sig] = lambda: callback(*args)
        if sig == signal.SIGHUP and process.hung_up:
            self.signal(process, sig)

    def remove_signal_handler(self, sig: int) -> bool:
        """Remove a signal's handler."""
        return PROCESS.get().signals.pop(sig, None) is not None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Note an exception that nothing handled."""
        if not self.muted:
            words = f"{PROCESS.get().name}: {context.get('message')}: {context.get('exception')!r}"
            self.errors.append(words)
            self.trace("unhandled: %s", words)

    get_debug = staticmethod(bool)  # False: asyncio's debug mode measures real time. Each future asks

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        """Look a name up in the network's DNS."""
        return await self.network.look_up(host, port, **options)

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        """Listen at an address of the network."""
        return await self.network.create_server(protocol_factory, host, port, **options)

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        """Connect to an address of the network."""
        return await self.network.create_connection(protocol_factory, host, port, **options)

    async def sock_connect(self, sock: Any, address: Any) -> None:
        """Connect a socket of the network."""
        await self.network.connect(sock, address)

    async def sock_accept(self, sock: Any) -> Any:
        """Accept a connection of a listening socket."""
        return await self.network.accept(sock)

    async def sock_recv(self, sock: Any, n: int) -> bytes:
        """Receive at most `n` bytes."""
        return await self.network.receive(sock, n)

    async def connect_accepted_socket(self, protocol_factory: Any, sock: Any, **_options: Any) -> Any:
        """Give an accepted connection to a protocol."""
        return self.network.attach(protocol_factory, sock)

    async def sleep(self, delay: float, result: Any = None) -> Any:
        """Do what asyncio.sleep does, without asking for the running loop: in CPython 3.11 that is a system call."""
        if delay <= 0:
            return await _sleep(delay, result)
        future: asyncio.Future[Any] = asyncio.Future(loop=self)
        handle = SimHandle(_end_sleep, (future, result), None)
        if not self.muted:
            self._sequence += 1
            heapq.heappush(self._events, (self.now + delay, self._draw(), self._sequence, PROCESS.get(), handle))
        try:
            return await future
        finally:
            handle.cancel()

    # The engine.

    def _enqueue(self, process: Process, handle: SimHandle) -> None:
        if not process.alive or self.muted:
            return
        if not process.is_queued:
            process.is_queued = True
            self._runnable.append(process)
        process.ready.append(handle)

    def _run_once(self) -> None:
        """Run turns until the loop is stopped."""
        events, runnable, draw, pop = self._events, self._runnable, self.rng.random, heapq.heappop
        while not self._stopping:
            if not runnable:
                while events and events[0][4]._cancelled:
                    pop(events)
                if not events:
                    raise Stuck("nothing is scheduled, so what is awaited can't come")
                self.now = max(self.now, events[0][0])
            now = self.now
            while events and events[0][0] <= now:
                _, _, _, owner, what = pop(events)
                if what._cancelled:
                    continue
                if owner is None:
                    what.callback(*what.args)
                elif not owner.alive:
                    continue
                elif what._callback is _end_sleep:
                    future, result = what._args
                    if not future.cancelled():
                        future.set_result(result)  # wakes a task by call_soon: a turn of its own would change nothing
                else:
                    owner.ready.append(what)
                    if not owner.is_queued:
                        owner.is_queued = True
                        runnable.append(owner)
            if not runnable:
                continue
            self.turns += 1
            if self.turns > self.max_turns:
                raise Stuck(f"more than {self.max_turns} turns")
            self.now += TURN_S
            index = int(draw() * len(runnable)) if len(runnable) > 1 else 0
            process = runnable[index]
            runnable[index] = runnable[-1]
            runnable.pop()
            self._run_turn(process)
            if process.ready:
                runnable.append(process)
            else:
                process.is_queued = False

    def _run_turn(self, process: Process) -> None:
        """Run what is in a process's queue now, and then send what its transports have kept."""
        ready = process.ready
        take = ready.popleft
        for _ in range(len(ready)):
            handle = take()
            if handle._cancelled:
                continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as asyncio's handles
                words = f"in {getattr(handle._callback, '__qualname__', handle._callback)}"
                handle._context.run(self.call_exception_handler, {"message": words, "exception": error})
            if not process.alive:
                return
        if process.flushes:
            flushes, process.flushes = process.flushes, []
            for flush in flushes:
                flush()

    def dispose(self) -> None:
        """End what is left of the run without letting it touch anything. The loop can't be used afterwards."""
        self.muted = True
        closed: set[asyncio.Task[Any]] = set()
        asyncio.events._set_running_loop(self)
        for _ in range(20):  # what is closed may start tasks in its `finally`
            left = [
                task for process in self.processes for task in process.tasks if not task.done() and task not in closed
            ]
            for task in left:
                _close(task)
            closed.update(left)
        asyncio.events._set_running_loop(None)
        for process in self.processes:
            process.kept.clear()
            process.ready.clear()
            process.jobs.clear()
            process.sockets.clear()
        self._events.clear()
        self._runnable.clear()
        self.close()
        PROCESS.reset(self._before)


_sleep: Final = asyncio.sleep
_end_sleep: Final = vars(asyncio.futures)["_set_result_unless_cancelled"]  # the callback of asyncio.sleep


def _close(task: "asyncio.Task[Any]") -> None:
    """Close an unfinished task's coroutines, from the innermost: what they await in a `finally` never comes."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    outermost: Any = task.get_coro()
    for _ in range(1_000):
        coro = outermost
        while getattr(inner := getattr(coro, "cr_await", None), "cr_frame", None) is not None:
            coro = inner
        with suppress(BaseException):  # of a world that is over
            coro.close()
        if getattr(outermost, "cr_frame", None) is None:
            return


def _resolve(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
