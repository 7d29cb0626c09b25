"""One worker: all parts of a gateway in one event loop. `Worker` makes, connects, starts and stops them in order."""

import asyncio
import contextlib
import os
import random
import resource
import secrets as random_source
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from msgspec import Struct
from msgspec.structs import asdict, replace

from meshproxy import VERSION
from meshproxy.config import Settings
from meshproxy.gateway.entry import Authenticator
from meshproxy.gateway.exchange import ActiveConfig
from meshproxy.gateway.idempotency import IdempotencyKeys
from meshproxy.gateway.in_flight import InFlight
from meshproxy.gateway.pipeline import Gateway
from meshproxy.gateway.record import Recorder, Spans
from meshproxy.gateway.settle import Settler
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.journal import Journal, SettlementsLost, other_journals
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.local import LocalAdmission, WorkerCount
from meshproxy.ledger.replays import Replays
from meshproxy.ledger.store import Store, Unavailable
from meshproxy.policy.catalog import Catalog
from meshproxy.policy.principal import Access
from meshproxy.server.api import Api
from meshproxy.server.chat import ChatHandler
from meshproxy.server.client_address import TrustedProxies
from meshproxy.telemetry.families import CLOSED
from meshproxy.telemetry.logs import LedgerRecorder, RequestLog, Throttle
from meshproxy.telemetry.metrics import AccountMetrics, Metrics
from meshproxy.telemetry.spans import open_tracer
from meshproxy.telemetry.tasks import Tasks, watch_lag
from meshproxy.units import parse_usd
from meshproxy.upstream.provider import Provider

STALE_S = 3600.0  # how long known keys and templates are used while Redis is lost, with on_failure = "local"
ACCOUNT_CHECK_S = 1.0  # between two checks for an account that is new in the metrics
CHECKS_PER_BALANCES = 10  # checks between two reads of all balances
SETTLE_GRACE_S = 10.0  # how long settlements may take at the end, when every request is over

_log = structlog.get_logger("meshproxy.app")


class Prepared(Struct, frozen=True):
    """A configuration that a worker has built and doesn't serve yet."""

    secrets: Mapping[str, str]
    active: ActiveConfig
    trusted_proxies: TrustedProxies
    access: Access

    @property
    def generation(self) -> int:
        """The configuration's generation."""
        return self.active.generation


class Worker:
    """One worker. `start` makes all its parts, in the running loop."""

    store: Store
    ledger: Ledger
    directory: Directory
    gateway: Gateway
    chat: ChatHandler
    api: Api

    def __init__(
        self, settings: Settings, secrets: Mapping[str, str], request_log: RequestLog, journal_path: str | None = None
    ) -> None:
        self.settings = settings
        self._secrets = secrets
        self._journal_path = journal_path
        self.metrics = Metrics(
            settings.models, settings.upstreams, version=VERSION, edges=asdict(settings.metrics.buckets)
        )
        self.tasks = Tasks(self._on_task_failed)
        self.loops = Tasks(self._on_task_failed)  # loops, cancelled in `stop`
        self._connecting = Tasks(self._on_task_failed)  # the store's dialling, ended by its close
        self.live = InFlight(time.monotonic)
        self.recorder = Recorder(self.metrics, request_log, time.monotonic)
        if settings.metrics.accounts == "all":
            self.recorder.accounts = AccountMetrics(self.metrics, settings.metrics.accounts_max)
        self.stopping = False
        self._had_ledger = settings.redis.on_failure == "local"  # or doesn't need it
        self._throttle = Throttle()
        self._lost_at: dict[str, float] = {}  # by the ledger's server; "": at the start

    async def start(self, generation: int = 1) -> None:
        """Connect to Redis and become ready for requests. `generation` is the configuration's, which counts reloads."""
        redis = self.settings.redis
        boot_id = random_source.token_hex(6)
        self._tracer = open_tracer(self.settings.tracing, VERSION)
        if self._tracer is not None:
            self.recorder.spans = Spans(self._tracer, lambda: self.settings.upstreams)
        self.store = await self._connect()
        self.ledger = Ledger(self.store)
        self.journal = self._open_journal()
        instances = local = None
        if redis.on_failure == "local":
            workers = self.settings.server.workers or len(os.sched_getaffinity(0))
            instances = WorkerCount(self.store, boot_id, at_least=workers)
            allowance_nusd = parse_usd(redis.local_allowance_usd)
            local = LocalAdmission(allowance_nusd, instances, time.monotonic, lambda: self.journal.room_bytes)
            local.count_journaled(self.journal)
        settler = Settler(self.ledger, self.journal, local, self.tasks, time.time, time.monotonic)
        self._settler = settler
        self._charge = settler.charge
        self.directory = Directory(self.store, time.monotonic, stale_s=0.0 if local is None else STALE_S)
        self._authenticator = Authenticator(self.directory, access_rules(self.settings), time.time, time.monotonic)
        self.gateway = Gateway(
            active=make_active_config(self.settings, self._secrets, generation=generation, providers={}),
            ledger=self.ledger,
            local=local,
            directory=self.directory,
            authenticator=self._authenticator,
            idempotence=IdempotencyKeys(Replays(self.store), self.tasks, time.monotonic),
            settler=settler,
            recorder=self.recorder,
            tasks=self.tasks,
            live=self.live,
            clock=time.monotonic,
            wall_clock=time.time,
            random=random.random,
            boot_id=boot_id,
        )
        trusted_proxies = TrustedProxies(self.settings.server.trusted_proxies)
        self.chat = ChatHandler(self.gateway, time.monotonic, trusted_proxies)
        self.api = Api(self.gateway, self._authenticator, self.directory, self.ledger, self.store, self.chat.client_of)
        self._set_generation(generation)
        self._bind_gauges()
        self.loops.supervise("pulse", partial(self.live.pulse, lambda: self.settings), is_vital=True)
        self.loops.supervise("journal", partial(self.journal.keep_replaying, self._charge), is_vital=True)
        self.loops.supervise("loop-lag", partial(watch_lag, self.metrics.event_loop_lag.labels().observe))
        self.loops.supervise("refusals", self.ledger.note_refusals)
        if instances is not None:
            self.loops.supervise("instances", instances.beat)
        if self.recorder.accounts is not None:
            self.loops.supervise("balances", partial(self._watch_balances, self.recorder.accounts))

    async def serve_chat(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle a chat completion. For a listener that is made before the worker has started."""
        return await self.chat(request)

    def on_descriptors_exhausted(self) -> None:
        """Log that connections were closed for lack of descriptors."""
        if count := self._throttle.due("descriptors"):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            _log.error(
                "descriptors_exhausted", limit=limit, connections_closed=count, raise_it="LimitNOFILE, ulimit -n"
            )

    def reload_failed(self) -> None:
        """Set the metric of a failed reload."""
        self.metrics.config_last_reload_successful.labels().set(0)

    def prepare(self, settings: Settings, secrets: Mapping[str, str], generation: int) -> Prepared:
        """Build another configuration without serving it. It may be called in a thread.

        Upstreams with unchanged settings and key keep their providers and connections. Raises ValueError for what can't
        be built.
        """
        old = self.gateway.active
        unchanged = {
            name: old.providers[name]
            for name, upstream in settings.upstreams.items()
            if old.settings.upstreams.get(name) == upstream and self._secrets.get(name) == secrets.get(name)
        }
        return Prepared(
            secrets,
            make_active_config(settings, secrets, generation=generation, providers=unchanged),
            TrustedProxies(settings.server.trusted_proxies),
            access_rules(settings),
        )

    def reload(self, prepared: Prepared) -> None:
        """Swap in another configuration: models, prices, upstreams, limits, credit rules, trusted proxies.

        Requests in flight keep theirs. Keys that only a restart changes are already as before (app.reload.hold_back).
        """
        old, new = self.gateway.active, prepared.active
        settings = new.settings
        self.metrics.reconfigure(settings.models, settings.upstreams)
        self.gateway.active = new
        self.chat.trusted_proxies = prepared.trusted_proxies
        self._authenticator.access = prepared.access
        self.settings = settings
        self._secrets = prepared.secrets
        unchanged = [name for name, provider in old.providers.items() if new.providers.get(name) is provider]
        self.gateway.health.retain(unchanged)
        self._set_generation(new.generation)
        self._bind_upstream_gauges()
        for name, provider in old.providers.items():
            if name not in unchanged:
                provider.retire()

    async def stop(self) -> None:
        """Settle the rest and close every connection. Raises SettlementsLost, last, if some couldn't be kept."""
        self.stopping = True
        if await self.tasks.finish(SETTLE_GRACE_S):
            await self.tasks.finish(SETTLE_GRACE_S)  # the settlements of cancelled tasks
        await self.loops.close()
        for provider in self.gateway.active.providers.values():
            await provider.close()
        await self.journal.replay(self._charge)
        lost = self.journal.close()
        await self.store.close()
        await self._connecting.close()
        if self._tracer is not None:
            await self._tracer.close()
        if lost:
            raise SettlementsLost(lost)

    def not_ready(self) -> list[str]:
        """Return why a balancer should send nothing here; empty if it may."""
        reasons = []
        if self.gateway.draining or self.stopping:
            reasons.append("draining")
        self._had_ledger = self._had_ledger or self.store.connected
        if not self._had_ledger:  # once connected, a lost ledger is no reason: docs/decisions/readiness.md
            reasons.append("the ledger can't be reached")
        reasons += [f"the task {name} keeps failing" for name in sorted(self.loops.failing)]
        return reasons

    async def _connect(self) -> Store:
        """Return the store. A Redis that doesn't answer is dialled in the background; calls raise Unavailable."""
        listeners: dict[str, Any] = {
            "on_op": LedgerRecorder(self.metrics).record,
            "supervise": self._connecting.supervise,
            "on_change": self._on_ledger_change,
        }
        try:
            return await connect(self.settings.redis, **listeners)
        except Unavailable as error:
            _log.error("ledger_unavailable", reason=error.reason)
            self._lost_at[""] = time.monotonic()
            return await connect(self.settings.redis, wait=False, **listeners)

    def _open_journal(self) -> Journal:
        """Open the journal on disk; in memory where the disk refuses it and redis.journal isn't set."""
        redis = self.settings.redis
        path = None if self._journal_path is None else Path(self._journal_path)
        try:
            if path is not None and redis.journal is None:
                for other in other_journals(path):
                    _log.warning("journal_of_another_redis", path=str(other))
            return Journal(path, redis.journal_max_bytes)
        except OSError as error:
            if redis.journal is not None:
                raise OSError(f"redis.journal: {error}") from error
            _log.warning("journal_in_memory", path=self._journal_path, reason=str(error))
            return Journal(None, redis.journal_max_bytes)

    def _on_ledger_change(self, server: str, is_connected: bool, reason: str) -> None:  # noqa: FBT001 - as ledger.store has it
        """Log once each time that a server of the ledger is lost, and when it is back."""
        now = time.monotonic()
        if is_connected:
            self._had_ledger = True
            lost_at = self._lost_at.pop(server, None) or self._lost_at.pop("", None)
            if lost_at is not None:
                _log.warning("ledger_back", server=server, away_s=round(now - lost_at, 3))
        elif server not in self._lost_at:
            self._lost_at[server] = now
            _log.error("ledger_lost", server=server, reason=reason)

    def _on_task_failed(self, name: str) -> None:
        self.metrics.task_failures.labels(name).inc()

    def _bind_gauges(self) -> None:
        """Set up the gauges that are read from elsewhere at each scrape."""
        self.metrics.in_flight_limit.labels().set_function(lambda: float(self.settings.server.max_in_flight))
        self.metrics.ledger_connected.labels().set_function(lambda: float(self.store.connected))
        self.metrics.journal_pending.labels().set_function(lambda: float(len(self.journal)))
        self.metrics.in_flight.labels("settle").set_function(lambda: float(self._settler.pending))
        self._bind_upstream_gauges()

    def _bind_upstream_gauges(self) -> None:
        """Set up the gauges of each upstream's state. An upstream that a reload removed is in no state."""
        for name in self.settings.upstreams:
            for state in CLOSED["state"]:
                gauge = self.metrics.upstream_state.labels(name, state)
                gauge.set_function(partial(self._is_in_state, name, state))

    def _is_in_state(self, upstream: str, state: str) -> float:
        return float(upstream in self.settings.upstreams and self.gateway.health.state(upstream) == state)

    async def _watch_balances(self, accounts: AccountMetrics) -> None:
        """Show the balances of the accounts that have metrics: all of them again when there is a new one."""
        while True:
            names = list(accounts.names)
            with contextlib.suppress(Unavailable):
                accounts.note_balances(await self.ledger.account_balances(names))
                accounts.note_budgets(await self.ledger.budget_shares(await self.directory.accounts(names)))
            for _ in range(CHECKS_PER_BALANCES):
                await asyncio.sleep(ACCOUNT_CHECK_S)
                if len(accounts.names) > len(names):
                    break

    def _set_generation(self, generation: int) -> None:
        self.metrics.config_generation.labels().set(generation)
        self.metrics.config_last_reload_successful.labels().set(1)


def access_rules(settings: Settings) -> Access:
    """Return the rules on who may try to authenticate."""
    return Access(settings.server.allowed_clients, settings.server.failed_logins_per_minute)


def make_active_config(
    settings: Settings, secrets: Mapping[str, str], *, generation: int, providers: Mapping[str, Provider]
) -> ActiveConfig:
    """Make an active configuration of these settings. `providers` are unchanged ones, kept with their connections."""
    made = {
        name: providers.get(name) or Provider(name, upstream, secrets.get(name), user_agent=f"meshproxy/{VERSION}")
        for name, upstream in settings.upstreams.items()
    }
    draining = frozenset(name for name, upstream in settings.upstreams.items() if upstream.on_disconnect == "drain")
    return ActiveConfig(generation, settings, Catalog(settings), made, draining)


@asynccontextmanager
async def with_redis(settings: Settings) -> AsyncIterator[Settings]:
    """Yield settings with a URL to connect to. Runs the embedded server meanwhile, if redis.url is `embedded`."""
    if settings.redis.url != "embedded":
        yield settings
        return
    async with Embedded() as server:
        yield replace(settings, redis=replace(settings.redis, url=server.url))
