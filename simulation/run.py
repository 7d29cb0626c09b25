r"""Run one story in a world of its own: `run(seed, story)`.

A story is an async function of a `World`. It starts what it needs (the gateway, providers, clients over plain asyncio
streams), causes faults, and returns. Then the gateway is drained, and the outcome says what was left behind.

    async def story(world: World) -> None:
        gateway = await world.start_gateway(TOML, workers=2)
        secret = (await (await gateway.administration()).create_key("acme", KeyChange()))["key"]
        reader, writer = await asyncio.open_connection(gateway.instances[0].host, gateway.instances[0].port)
        ...

    outcome = run(7, story)
    print("\n".join(outcome.transcript))
"""

import asyncio
import logging
import random
import re
import traceback
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import ExitStack
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import web_app
from msgspec import Struct

from meshproxy.app import serve as serving
from meshproxy.app import worker_process
from meshproxy.gateway import pipeline
from meshproxy.gateway.exchange import Exchange
from meshproxy.ledger.store import Script
from meshproxy.telemetry.logs import configure
from simulation import machine
from simulation.gateway import JOURNAL, Gateway, replacements, take_back
from simulation.loop import PROCESS, START_S, Process, SimLoop, Stuck
from simulation.network import Network
from simulation.store import Store, name_scripts

MAX_TURNS = 2_000_000
STOP_S = 600.0  # virtual: what a gateway may take to drain
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Left(Struct):
    """What is left when all instances have ended: each list is empty after a clean history."""

    tasks: list[str]
    timers: list[str]
    sockets: list[str]
    files: list[str]
    holds: list[str]
    slots: list[str]
    journal: list[str]


_MIDDLEWARES: Final = vars(web_app)["_cached_build_middleware"]
Line = tuple[float, str, tuple[Any, ...]]  # of the transcript: a time, a template, its values
HOLD_OF: Final = "%s: %s has the hold id %s"


class Outcome(Struct):
    """What came of a history. `failure`: the exception that ended the story, None if it returned. `left`: leftovers.

    `marks`: times that the story gave a name. The transcript's clock is 0 at the mark `steps`, or else at the beginning.
    """

    seed: int
    lines: list[Line]
    result: Any
    failure: BaseException | None
    left: Left
    errors: list[str]
    took_s: float
    turns: int
    marks: dict[str, float]

    @property
    def transcript(self) -> list[str]:
        """The lines as text: most runs need none."""
        return self.told(self.lines)

    def told(self, lines: Iterable[Line]) -> list[str]:
        """Return lines as text."""
        zero = self.marks.get("steps", START_S)
        return [f"{at - zero:11.6f}  {_ADDRESS.sub('', text % values)}" for at, text, values in lines]


class World:
    """All that a story plays with. `rng` is the run's only source of chance. `is_traced`: whether there is a transcript."""

    def __init__(self, loop: SimLoop, *, is_traced: bool = True) -> None:
        self.loop = loop
        self.rng = loop.rng
        self.network = Network(loop)
        self.disk = machine.Disk(loop)
        self.store = Store(loop)
        self.gateways: list[Gateway] = []
        self.lines: list[Line] = []
        self.log: list[
            tuple[str, dict[str, Any] | bytes]
        ] = []  # the instances' log: (process, event or request's line)
        self.unkept: list[tuple[float, str]] = []  # when a process's journal was refused by its disk
        self.marks: dict[str, float] = {}
        self.is_traced = is_traced
        if is_traced:
            loop.trace = self._trace

    @property
    def now(self) -> float:
        """Seconds since the story began."""
        return self.loop.now - START_S

    def note(self, text: str) -> None:
        """Add a line to the transcript."""
        self._trace("%s", text)

    def mark(self, name: str) -> None:
        """Give the present time a name."""
        self.marks[name] = self.loop.now

    def process(self, name: str) -> Process:
        """Make a process, for `spawn`."""
        return self.loop.process(name)

    def spawn(self, process: Process, coro: Coroutine[Any, Any, Any], name: str | None = None) -> "asyncio.Task[Any]":
        """Run a coroutine in a process."""
        return self.loop.start(process, coro, name)

    def kill(self, process: Process) -> None:
        """Kill a process."""
        self.loop.kill(process)

    async def start_gateway(
        self, text: str, *, workers: int = 1, supervised: int = 1, journal: str | None = JOURNAL
    ) -> Gateway:
        """Start the gateway with a configuration in TOML, whose redis.url is `redis://store`.

        `workers` are instances with one worker each; with `supervised` each is a supervisor of so many.
        """
        gateway = Gateway(self.loop, text, workers=workers, supervised=supervised, journal=journal)
        self.gateways.append(gateway)
        await gateway.start()
        return gateway

    def _trace(self, text: str, *values: Any) -> None:
        self.lines.append((self.loop.now, text, values))


class _Sink:
    """What a gateway's request log writes to: a telemetry.logs.LineSink."""

    def __init__(self, world: World) -> None:
        self._world = world

    def write(self, line: bytes, *, urgent: bool = False) -> None:
        process = PROCESS.get().name
        self._world.log.append((process, line))
        if self._world.is_traced:
            self._world.loop.trace("%s: %s", process, line.decode().rstrip("\n"))

    def close(self) -> None:
        """Nothing: each line is kept at once."""


class _Records(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        words = f"{record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            words += f": {_where(record.exc_info[1])}"
        self._world.loop.errors.append(f"{PROCESS.get().name}: {words}")
        self._world.loop.trace("%s: %s", PROCESS.get().name, words)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{error!r} in " + " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


def _trace_holds(world: World, stack: ExitStack) -> None:
    """Have the transcript say which hold id each request got: the ledger isn't told whose a hold is before it is settled."""
    make = vars(pipeline)["Exchange"]

    def made(call: Any, hold_id: str) -> Exchange:
        world.loop.trace(HOLD_OF, PROCESS.get().name, call.request_id, hold_id)
        exchange: Exchange = make(call, hold_id)
        return exchange

    vars(pipeline)["Exchange"] = made
    stack.callback(vars(pipeline).__setitem__, "Exchange", make)


def _logged(world: World, stack: ExitStack) -> None:
    """Have all logs go to the world."""

    def capture(_logger: Any, method: str, event: Any) -> Any:
        process = PROCESS.get().name
        error = event.get("exc_info")
        if isinstance(error, BaseException):
            event["exc_info"] = _where(error)
        world.log.append((process, {"level": method, **event}))
        if event["event"] == "journal_not_written":
            world.unkept.append((world.loop.now, process))
        if world.is_traced:
            told = " ".join(f"{name}={value!r}" for name, value in event.items() if name != "event")
            world.loop.trace("%s: %s %s", process, event["event"], told)
        raise structlog.DropEvent

    before = structlog.get_config()
    stack.callback(lambda: structlog.configure(**before))
    structlog.configure(
        processors=[capture],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [_Records(world)]
    if level != logging.WARNING:  # setting it makes all loggers look it up anew
        root.setLevel(logging.WARNING)

    def restore() -> None:
        root.handlers[:] = handlers
        if level != logging.WARNING:
            root.setLevel(level)
        for module in (serving, worker_process):
            vars(module)["configure"] = configure

    stack.callback(restore)
    for module in (serving, worker_process):
        vars(module)["configure"] = lambda *_: _Sink(world)


@cache
def _name_scripts() -> None:
    """Have the transcript name the scripts, once: it takes a millisecond."""
    files = resources.files("meshproxy.ledger").joinpath("scripts").iterdir()
    scripts = [Script.load(file.name.removesuffix(".lua")) for file in files]
    name_scripts({script.sha.encode(): script.name for script in scripts})


def run(
    seed: int, story: Callable[[World], Awaitable[Any]], *, max_turns: int = MAX_TURNS, is_traced: bool = True
) -> Outcome:
    """Run a story to its end in a world of its own, and return what came of it; without a transcript if not `is_traced`."""
    _name_scripts()
    loop = SimLoop(random.Random(seed), max_turns=max_turns)
    result: Any = None
    failure: BaseException | None = None
    with ExitStack() as stack:
        world = World(loop, is_traced=is_traced)
        stack.enter_context(machine.installed(loop, world.disk, replacements()))
        _logged(world, stack)
        if is_traced:
            _trace_holds(world, stack)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")

        async def whole() -> Any:
            await loop.start(world.store.process, world.store.start(), "listen")
            try:
                return await story(world)
            finally:
                for gateway in world.gateways:
                    if not await gateway.stop(STOP_S):
                        world.note("the gateway didn't end in time")

        try:
            result = loop.run_until_complete(whole())
        except (Exception, Stuck) as error:  # noqa: BLE001 - part of the outcome
            failure = error
            world.note(f"failed: {_where(error)}")
        took_s, turns = world.now, loop.turns
        left = _left(world)
        lines = world.lines[:]  # what is closed now may log
        loop.dispose()
        take_back()
        world.store.put_away()
        _MIDDLEWARES.cache_clear()  # aiohttp's: it would keep the run's application
    return Outcome(seed, lines, result, failure, left, loop.errors, took_s, turns, world.marks)


def _left(world: World) -> Left:
    store, loop = world.store, world.loop
    of_instances: dict[str, list[str]] = {"tasks": [], "timers": [], "sockets": [], "files": []}
    for process in loop.processes:
        if process.name.startswith("gateway-"):
            for kind, left in (loop.leftovers(process) if process.alive else process.left).items():
                of_instances[kind] += [f"{process.name}: {each}" for each in left]
    before, store.refusal = store.refusal, None
    with loop.within(store.process):
        keys = [(key, key.decode()) for key in sorted(store.ask("KEYS", "mesh:*"))]
        holds = [
            f"{name}: {each.decode()}"
            for key, name in keys
            if name.endswith(":holds")
            for each in store.ask("HKEYS", key)
        ]
        slots = [
            f"{name}: {each.decode()}"
            for key, name in keys
            if ":running" in name
            for each in store.ask("ZRANGE", key, 0, -1)
        ]
    store.refusal = before
    journal = [f"{path}: {line}" for path, line in world.disk.lines()]
    return Left(**of_instances, holds=holds, slots=slots, journal=journal)
