"""The real gateway in the world: `app.serve.run` in processes of the loop, on one machine or several, over one store.

`Gateway.start` starts as many instances as asked for. Each is a process with a listener of its own, a worker, an admin
listener, and the journal of its machine. SIGHUP reloads one, SIGTERM drains it, `kill` is SIGKILL; `restart` starts a
new process at the same address, which finds the journal that the dead one left.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache, partial
from importlib import resources
from typing import Any

import orjson
from aiohttp import web_urldispatcher
from msgspec import structs
from msgspec.structs import replace
from prometheus_client import Gauge

from meshproxy.app import application, worker, worker_process
from meshproxy.app import load as loading
from meshproxy.app import serve as serving
from meshproxy.app.load import Loaded, load
from meshproxy.config.settings import Settings
from meshproxy.gateway import in_flight
from meshproxy.ledger import journal as journals
from meshproxy.ledger import ledger as ledgers
from meshproxy.ledger.administration import Administration
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.journal import SettlementsLost
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.store import Script
from meshproxy.policy.catalog import Catalog
from meshproxy.server import admin, listener
from meshproxy.server.api import document
from meshproxy.telemetry.metrics import FamilyOf, Metrics
from simulation.loop import PROCESS, Process, SimLoop
from simulation.machine import ROOT

FIRST_PORT, FIRST_ADMIN_PORT = 8_080, 9_080
JOURNAL = f"{ROOT}state/redis/journal"

PATH = "meshproxy.toml"  # what faults of a configuration name
MAX_LOADED = 64
CHECK_S, RESTING_S = 1.0, 5.0  # how often a gateway looks at its connections and refusals, and when nothing is asked


async def _no_history(_self: serving.WorkersState) -> None:
    """Keep no hour of figures: to merge all metrics every 20 s takes a third of a run."""


def replacements() -> dict[tuple[Any, str], Any]:
    """Return what a run replaces of the gateway, by owner and name.

    What depends on files or on a configuration's models alone is made once: scripts, pages, the API's description, catalogues.
    Metrics are used again.
    No figures are kept for the status page, no series of a metric exists before it counts, and the loop's lag isn't
    measured: virtual time has none. What looks at all connections or the journal several times a second does so less
    often, since most of a history is waiting.
    """
    return {
        (Script, "load"): _scripts,
        (admin, "_content_security_policy"): _policies,
        (admin, "files"): _files,
        (application, "document"): _document,
        (worker, "Catalog"): _catalog,
        (web_urldispatcher, "_requote_path"): _requoted,
        (structs, "fields"): _fields,
        (serving.WorkersState, "keep_history"): _no_history,
        (worker, "watch_lag"): _no_lag,
        (worker, "Metrics"): _metrics,
        (worker.Worker, "start"): _start,
        (FamilyOf, "preset"): lambda _: None,
        (listener, "CHECK_INTERVAL_S"): CHECK_S,
        (in_flight, "PULSE_S"): 1.0,
        (ledgers, "NOTE_REFUSALS_S"): CHECK_S,
        (journals, "REPLAY_INTERVAL_S"): 1.0,
        (loading, "_check_journal"): lambda _: None,  # it makes a temporary file, which the disk in memory can't
    }


_scripts = cache(Script.load)
_fields_of = cache(structs.fields)


def _fields(record: Any) -> tuple[structs.FieldInfo, ...]:
    return _fields_of(record if isinstance(record, type) else type(record))


_requoted = lru_cache(256)(vars(web_urldispatcher)["_requote_path"])  # of routes
_policies = lru_cache(1)(vars(admin)["_content_security_policy"])


@cache
def _document() -> orjson.Fragment:
    return orjson.Fragment(orjson.dumps(document()))


class _Read:
    """A file of a package, or a folder, whose content is read once."""

    def __init__(self, where: Any) -> None:
        self._where = where

    @cache  # noqa: B019 - of a few files, for good
    def joinpath(self, *names: str) -> "_Read":
        """Return a file in it."""
        return _Read(self._where.joinpath(*names))

    @cache  # noqa: B019
    def read_bytes(self) -> bytes:
        """Return the content."""
        return bytes(self._where.read_bytes())


@cache
def _files(package: str) -> _Read:
    return _Read(resources.files(package))


_catalogs: dict[int, tuple[Settings, Catalog]] = {}


def _catalog(settings: Settings) -> Catalog:
    """Return the catalogue of settings; the same one for the same models and upstreams, since it never changes."""
    made = _catalogs.get(id(settings.models))
    if made is None or made[0].models is not settings.models or made[0].upstreams is not settings.upstreams:
        if len(_catalogs) >= MAX_LOADED:
            _catalogs.clear()
        made = _catalogs[id(settings.models)] = settings, Catalog(settings)
    return made[1]


# Metrics of workers of runs before, with their gauges: to make them takes a tenth of a run, and to collect them another.
_spare: list[tuple[Metrics, list[FamilyOf[Gauge]]]] = []
_lent: list[tuple[Metrics, list[FamilyOf[Gauge]]]] = []


def _metrics(models: Iterable[str], upstreams: Iterable[str], **options: Any) -> Metrics:
    """Return the metrics of a worker that is over, or new ones. All gateways of runs have the same buckets.

    They count on from run to run: no history reads them, and to set them to zero takes a fortieth of a run.
    """
    if _spare:
        made, gauges = _spare.pop()
        made.reconfigure(models, upstreams)
    else:
        made = Metrics(models, upstreams, **options)
        gauges = [family for family in vars(made)["_families"] if isinstance(vars(family)["_metric"], Gauge)]
    _lent.append((made, gauges))
    return made


def rest() -> None:
    """Have the gateway look rarely at its connections and refusals until the run's end: no client asks any more."""
    vars(listener)["CHECK_INTERVAL_S"] = vars(ledgers)["NOTE_REFUSALS_S"] = RESTING_S


_workers: list[tuple[Process, worker.Worker]] = []  # of a run
_start_worker = worker.Worker.start


async def _start(self: worker.Worker, generation: int = 1) -> None:
    """Start a worker, and keep it for `in_use`."""
    await _start_worker(self, generation)
    _workers.append((PROCESS.get(), self))  # one that doesn't start has nothing to count


def in_use() -> list[str]:
    """Describe what workers count as in use, those aside that were killed: nothing, once no client asks any more."""
    return [
        f"{process.name}: {count} {what}"
        for process, each in _workers
        if process.alive or process.left
        for what, count in _counts(each)
        if count
    ]


def _counts(of: worker.Worker) -> Iterator[tuple[str, int]]:
    """Return what a worker has in use, by what it counts itself."""
    gateway, live = of.gateway, of.live
    bodies, pools = vars(gateway.bodies), [vars(vars(each)["_pool"]) for each in gateway.active.providers.values()]
    yield "requests in flight", of.recorder.in_flight
    yield "requests without their client", vars(vars(gateway)["_detacher"])["_detached"]
    yield "bytes of bodies", bodies["_taken"]
    yield "requests that aren't admitted", sum(bodies["_unadmitted"].values())
    yield "streams", len(live.relays) + len(live.early_heads)
    yield "holds", len(live.leases)
    yield "records of Idempotency-Keys", len(live.recordings)
    yield "answers that are followed", len(vars(vars(vars(gateway)["_idempotence"])["_answers"])["_followed"])
    yield "settlements", vars(of)["_settler"].pending
    yield "connections to providers", sum(len(pool["_live"]) - len(pool["_idle"]) for pool in pools)
    yield "requests that wait for a connection", sum(len(pool["_waiters"]) for pool in pools)
    yield "locks", len(vars(gateway.locks)["_locks"])
    for name, upstream in gateway.health.upstreams.items():
        yield f"attempts at {name}", sum(route.in_flight for route in upstream.routes.values())
    local = vars(vars(gateway)["_admitter"])["_local"]
    if local is not None:
        yield "requests admitted without Redis", len(vars(local)["_running"])
        yield "bytes of the journal that are reserved", vars(local)["_reserved_bytes"]


def take_back() -> None:
    """Keep the metrics of a run's workers for the next run."""
    _workers.clear()
    for metrics, gauges in _lent:
        metrics.pending.clear()
        for family in gauges:
            for gauge in family.values():
                vars(gauge).pop("_child_samples", None)  # its function, which would keep its worker
    _spare.extend(_lent)
    _lent.clear()


async def _no_lag(_observe: Any) -> None:
    """Measure nothing."""


@lru_cache(MAX_LOADED)
def loaded(text: str) -> Loaded:
    """Load a configuration from its text, as `serve` does from the file PATH: it takes 10 ms. Raises ConfigError."""
    read = vars(loading)["_read_text"]
    vars(loading)["_read_text"] = lambda _path: text
    try:
        return load(PATH)
    finally:
        vars(loading)["_read_text"] = read


async def _worker(argv: Sequence[str]) -> int:
    """Run `python -m meshproxy.app.worker_process CONTROL LISTEN`, as a supervisor starts it."""
    try:
        return await worker_process.serve(int(argv[-2]), int(argv[-1]))
    except SettlementsLost:
        return os.EX_IOERR


class Instance:
    """One process of the gateway. `code`: its exit code, None while it runs, -9 once killed."""

    def __init__(self, gateway: "Gateway", number: int) -> None:
        self.gateway = gateway
        self.number = number
        self.port = FIRST_PORT + number
        self.lives = 0
        self.process: Process
        self.code: int | None = None
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def host(self) -> str:
        """The host to connect to, with `port`."""
        return "127.0.0.1"

    @property
    def name(self) -> str:
        """The process's name."""
        return f"gateway-{self.number}" + (f".{self.lives}" if self.lives > 1 else "")

    def launch(self) -> None:
        """Start the process."""
        loop = self.gateway.loop
        self.lives += 1
        self.code = None
        self.ready, self.ended = asyncio.Event(), asyncio.Event()
        self.process = loop.process(self.name)
        self.process.on_death.append(partial(self._end, -signal.SIGKILL))
        loop.start(self.process, self._run(), "serve")

    async def _run(self) -> None:
        code = 0
        try:
            found = self._read()
            await serving.run(
                found.settings,
                found.secrets,
                worker_count=self.gateway.supervised,
                on_ready=lambda *_: self.ready.set(),
                reload=self._read,
                journal=self.gateway.journal,
                warnings=found.warnings,
            )
        except SettlementsLost:
            code = os.EX_IOERR
        except Exception as error:  # noqa: BLE001 - a process that ends by an exception
            self.gateway.loop.trace("%s: ended by %r", self.name, error)
            code = 1
        await self.gateway.loop.exit(self.process, code)
        self._end(code)

    def _end(self, code: int) -> None:
        if not self.ended.is_set():
            self.code = code
            self.ended.set()

    def _read(self) -> Loaded:
        """Load the gateway's present configuration, with this instance's addresses."""
        found = loaded(self.gateway.text)
        server = replace(
            found.settings.server,
            listen=f"0.0.0.0:{self.port}",
            admin_listen=f"0.0.0.0:{FIRST_ADMIN_PORT + self.number}",
        )
        return replace(found, settings=replace(found.settings, server=server))

    def reload(self) -> None:
        """Send SIGHUP."""
        self.gateway.loop.signal(self.process, signal.SIGHUP)

    def drain(self) -> None:
        """Send SIGTERM. `ended` is set when it has ended."""
        self.gateway.loop.signal(self.process, signal.SIGTERM)

    @property
    def workers(self) -> list[Process]:
        """The living workers below its supervisor; itself without one."""
        return [child for child in self.process.children if child.alive] or [self.process]

    def kill(self) -> None:
        """Send SIGKILL."""
        self.gateway.loop.kill(self.process)

    async def restart(self) -> None:
        """Start it anew, once it has ended, and return when it serves."""
        await self.ended.wait()
        self.launch()
        await self.up()

    async def up(self) -> None:
        """Return when it serves, or has ended."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.ready, self.ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class Gateway:
    """The instances. `text` is the configuration in TOML; after a change of it, `reload` has the instances read it."""

    def __init__(
        self, loop: SimLoop, text: str, *, workers: int, supervised: int = 1, journal: str | None = JOURNAL
    ) -> None:
        self.loop = loop
        loop.programs = _worker
        self.supervised = supervised
        self.text = text
        self.journal = journal
        self.instances = [Instance(self, number) for number in range(workers)]
        self._desk_store: Any = None

    async def start(self) -> None:
        """Start all instances, and return when they serve. Raises RuntimeError if one ends instead."""
        for instance in self.instances:
            instance.launch()
        for instance in self.instances:
            await instance.up()
            if instance.code is not None:
                raise RuntimeError(f"{instance.name} ended with {instance.code}")

    def reload(self, text: str | None = None) -> None:
        """Have all instances reload, from another configuration if one is given."""
        if text is not None:
            self.text = text
        for instance in self.instances:
            instance.reload()

    async def stop(self, timeout_s: float) -> bool:
        """Drain all instances. Return whether they ended in time."""
        for instance in self.instances:
            instance.drain()
        ended = True
        for instance in self.instances:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(instance.ended.wait(), timeout_s)
            ended = ended and instance.ended.is_set()
        if self._desk_store is not None:
            await self._desk_store.close()
            self._desk_store = None
        return ended

    async def administration(self, actor: str = "operator") -> Administration:
        """Return a desk for keys, accounts, grants and limits, over a connection of the caller's process to the store."""
        if self._desk_store is None:
            self._desk_store = await connect(loaded(self.text).settings.redis)
        store = self._desk_store
        return Administration(store, Directory(store), Ledger(store), actor)
