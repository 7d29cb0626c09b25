"""Play a history in a world, and write down what came of it: `run(seed, partial(play, history=history))`."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from meshproxy.errors import GatewayError
from meshproxy.ledger.store import StoreError, Unavailable
from meshproxy.policy.principal import Bounds, KeyChange
from meshproxy.policy.template import TemplateFields
from simulation.accounts import AccountPlan, Limits
from simulation.bills import nusd
from simulation.client import Clients, trace_of
from simulation.gateway import Gateway, Instance, in_use, rest
from simulation.history import (
    ALLOWANCE_NUSD,
    DEFAULT_OUTPUT_TOKENS,
    DRAIN_S,
    DROPPED,
    FIRST_BYTE_S,
    HEARTBEAT_S,
    HOLD_TTL_S,
    IDLE_S,
    LEASE_TOKENS,
    MAX_OUTPUT_TOKENS,
    MODELS,
    PROVIDER_SECRET,
    STORE_TIMEOUT_S,
    TEMPLATE,
    UPSTREAMS,
    WRITE_TIMEOUT_S,
    WRITES_WITHIN_S,
    Change,
    Fault,
    History,
    Model,
    Outage,
    Price,
    WorkerEvent,
    first_version,
    template_system,
)
from simulation.invalid import MAX_BODY_BYTES
from simulation.judge import SECRET_PART, judge
from simulation.provider import Provider
from simulation.record import (
    RECOVERY_S,
    Beat,
    Book,
    Done,
    Drain,
    Finding,
    Look,
    Loss,
    Record,
    Sample,
    Told,
    Trouble,
    marker_of,
    text_of,
)
from simulation.run import Outcome, World, run
from simulation.store import OOM, READONLY, Client, Fate, script_of

PROVIDER_PORT: Final = 9_000
NOWHERE_PORT: Final = 9
OPERATOR_TRIES: Final = 40
OPERATOR_PAUSE_S: Final = 1.0
MOST_DRAINS: Final = 30  # of JOURNAL_S each, for answers that are read on without a client
NEXT_S: Final = 1.0  # in which another provider is asked for an answer that is read on
JOURNAL_S: Final = 5.0  # after which the journal has been replayed
MAX_TURNS: Final = 400_000
SET_UP_S: Final = 10.0  # that a set-up takes at most, where the time of day matters
BUGS: Final = frozenset(
    {"task_failed", "internal_error", "settlement_lost", "settlement_refused", "usage_refused_late"}
)

QUOTE: Final = re.compile(r"\bmk\d+q\w+?z(?! \[redacted\])")  # a provider's words end with a marker and its secret


def toml(history: History, models: Mapping[str, Model], places: Mapping[str, str]) -> str:
    """Return the configuration of a history's gateway. It has the upstreams that a model names."""
    named = {route for model in models.values() for route in model.routes}
    lines = [
        "[server]",
        f"workers = 1\nfast_path = {str(history.fast_path).lower()}",
        f"max_body_bytes = {MAX_BODY_BYTES}",
        f"heartbeat_s = {HEARTBEAT_S:g}\nwrite_timeout_s = {WRITE_TIMEOUT_S:g}\ndrain_s = {DRAIN_S:g}",
        "[log]\nlevel = 'info'",
        f"[redis]\nurl = 'redis://store'\ntimeout_s = {STORE_TIMEOUT_S:g}",
    ]
    if history.local:
        lines += [
            "on_failure = 'local'",
            f"journal = '/simulated/journal'\nlocal_allowance_usd = '{usd(ALLOWANCE_NUSD)}'",
        ]
    if history.journal_bytes is not None:
        lines.append(f"journal_max_bytes = {history.journal_bytes}")
    if history.kept_bytes is not None:
        lines.append(f"[idempotency]\nmax_bytes = {history.kept_bytes}")
    lines += [
        "[defaults]\nmodel = 'plain'",
        f"[credits]\nhold_ttl_s = {HOLD_TTL_S:g}\nlease_output_tokens = {LEASE_TOKENS}",
        f"default_output_tokens = {DEFAULT_OUTPUT_TOKENS}",
    ]
    for name, upstream in UPSTREAMS.items():
        if name not in named:
            continue
        port, place = PROVIDER_PORT if upstream.is_there else NOWHERE_PORT, f"{name}.{places.get(name, '')}".rstrip(".")
        lines += [
            f"[upstreams.{name}]\nkind = '{upstream.kind}'\nbase_url = 'http://127.0.0.1:{port}/{place}/v1'",
            f"cap_field = '{upstream.cap_field}'",
            f"first_byte_timeout_s = {FIRST_BYTE_S:g}\nidle_timeout_s = {IDLE_S:g}",
            f"stream_usage = {str(upstream.asks_usage).lower()}",
            f"on_disconnect = '{'drain' if upstream.drains else 'cancel'}'",
            f"headers = {{ 'api-key' = '{PROVIDER_SECRET}' }}",
        ]
    for name, model in models.items():
        price = model.price
        weights = [f", weight = {weight}" for weight in model.weights] + [""] * len(model.routes)
        routes = ", ".join(
            f"{{ upstream = '{route}', model = 'up-{name}'{weight} }}"
            for route, weight in zip(model.routes, weights, strict=False)
        )
        lines += [
            f"[models.'{name}']\nupstreams = [{routes}]\ncontext_window = {model.context_window}",
            f"max_output_tokens = {MAX_OUTPUT_TOKENS}\nrequest_usd = '{usd(price.request)}'",
            *_priced(price),
        ]
        if model.hidden_reasoning:
            lines.append("hidden_reasoning = true")
        if model.from_usage_cost:
            lines.append("cost_from = 'usage.cost'")
        lines += _tiers(f"models.'{name}'", price)
        for tier, of_tier in model.services:
            path = f"models.'{name}'.service_tiers.{tier}"
            lines += [f"[{path}]", *_priced(of_tier), *_tiers(path, of_tier)]
    return "\n".join(lines) + "\n"


def _priced(price: Price) -> list[str]:
    lines = [f"input_usd_per_mtok = '{usd(price.input)}'\noutput_usd_per_mtok = '{usd(price.output)}'"]
    parts = {"cached_input": price.cached, "reasoning": price.reasoning}
    return [*lines, *(f"{name}_usd_per_mtok = '{usd(part)}'" for name, part in parts.items() if part is not None)]


def _tiers(path: str, price: Price) -> list[str]:
    return [
        line
        for above, larger in price.tiers
        for line in (f"[[{path}.price_tiers]]\nabove_prompt_tokens = {above}", *_priced(larger))
    ]


def usd(amount_nusd: int) -> str:
    """Return a decimal string of nano-USD."""
    return f"{amount_nusd // 1_000_000_000}.{amount_nusd % 1_000_000_000:09d}"


class Play:
    """One history being played."""

    def __init__(self, world: World, history: History) -> None:
        self._world, self._history = world, history
        self._loop = world.loop
        self._models: dict[str, Model] = dict(MODELS)
        self._places: dict[str, str] = {}
        self.record = Record(history, prices=[(world.loop.time(), dict(self._models))], places=[{}])
        for name in (
            *("sights", "calls", "samples", "changes", "troubles", "left", "errors"),
            *("looks", "losses", "unkept", "exits", "refused", "logged", "failed", "beats", "drains", "quoted"),
        ):
            setattr(self.record, name, [])
        self.record.books, self.record.told = {}, {}
        self._secrets: list[str] = []
        self._key_ids: list[str] = []
        if history.midnight_s is not None:
            world.loop.wall_offset_s += _until_midnight(world.loop.wall(), ends_month=history.ends_month)
            world.loop.wall_offset_s -= SET_UP_S + history.midnight_s
        self._drops = 0
        self._lasting: list[Fault] = []
        self._gateway: Gateway

    async def play(self) -> Record:
        """Set up, play all steps, let everything settle, and read the books."""
        world, history, begun_at = self._world, self._history, self._loop.time()
        plans = {marker_of(history.seed, request): request for request in history.requests if not request.repeats}
        plans |= {
            marker_of(history.seed, request): request
            for request in history.requests
            if marker_of(history.seed, request) not in plans
        }
        twins = {
            trace_of(f"id-{request.name}"): marker_of(history.seed, request)
            for request in history.requests
            if request.text_of
        }
        provider = self._provider = Provider(plans, twins)
        await world.spawn(world.process("provider"), provider.start("0.0.0.0", PROVIDER_PORT))
        if history.local:
            self._watch_beats()
        self._gateway = await world.start_gateway(toml(history, self._models, {}), workers=history.workers)
        await self._set_up()
        self._watch_store()
        marker, text = partial(marker_of, history.seed), partial(text_of, history.seed)
        clients = Clients(self._address, self._secrets.__getitem__, marker, text)
        self._clients, self._people = clients, world.process("clients")
        if history.midnight_s is not None:
            await self._until(begun_at + SET_UP_S)
        start = self._loop.time()
        world.mark("steps")
        self.record.prices[0] = (0.0, self.record.prices[0][1])
        tasks = []
        for step in history.steps:
            await self._until(start + step.at_s)
            if isinstance(step, Fault):
                tasks.append(world.spawn(world.store.process, self._break(step), "fault"))
            elif isinstance(step, WorkerEvent):
                tasks.append(asyncio.ensure_future(self._happen(step)))
            elif isinstance(step, Change):
                tasks.append(asyncio.ensure_future(self._change(step)))
            elif isinstance(step, Outage):
                provider.fail(step)
            else:
                tasks.append(world.spawn(self._people, clients.play(step), step.name))
        await asyncio.gather(*tasks)
        await self._settle()
        await self._read_books()
        await self._read_told()
        self.record.wall_offset_s, self.record.key_ids = self._loop.wall_offset_s, self._key_ids
        self.record.client = self._people.address
        self.record.store_offset_s = self._loop.wall_offset_s + world.store.clock_offset_s
        clients.close()
        self.record.sights, self.record.calls, self.record.idles = clients.sights, provider.calls, clients.idles
        await asyncio.sleep(1)
        self.record.left += in_use()
        for gateway in list(world.gateways):
            if not await gateway.stop(DRAIN_S * 3):
                self.record.left.append("an instance that doesn't end")
            self.record.exits += [(instance.name, instance.code) for instance in gateway.instances]
        world.gateways.clear()
        self._read_log()
        await provider.close()
        return self.record

    def _read_log(self) -> None:
        """Keep what the log says of bugs, and of settlements that no disk took."""
        record = self.record
        for where, event in map(_bug_of, self._world.log):
            is_loss = "settlement_lost" in event or "journal.py" in event  # also told as a failed task, for its alert
            if event and not (is_loss and self._history.fills_disks):
                record.errors.append(f"{where}: {event}")
        for where, logged in self._world.log:
            if isinstance(logged, bytes):
                record.logged.append(json.loads(logged))
            elif logged.get("event") == "attempt_failed":
                record.failed.append(logged)
            if QUOTE.search(str(logged)):
                record.quoted.append(f"{where}: {logged!r}")
            if PROVIDER_SECRET[:SECRET_PART] in str(logged):
                record.errors.append(f"{where} logged a secret: {logged!r}")
            if isinstance(logged, dict) and logged.get("event") == "settlement_lost":
                lost = logged["settlement"]
                record.losses.append(
                    Loss(
                        where, lost["request_id"], lost["hold_id"], lost.get("cost_nusd", 0), lost.get("unheld", False)
                    )
                )
        record.unkept += self._world.unkept

    def _address(self, worker: int) -> tuple[str, int]:
        instance = self._gateway.instances[worker % len(self._gateway.instances)]
        return instance.host, instance.port

    async def _until(self, when: float) -> None:
        if when > self._loop.time():
            await asyncio.sleep(when - self._loop.time())

    async def _set_up(self) -> None:
        """Make accounts and keys, and grant the first credit."""
        operator = await self._gateway.administration()
        for number, credit in enumerate(self._history.credit):
            if credit:
                await self._grant(number, credit, f"first {number}")
        for key in self._history.keys:
            session = {} if key.session_budget_nusd is None else {"total_nusd": key.session_budget_nusd}
            bounds = replace(_bounds(key), session=session)
            made_at = self._loop.time()
            expires_at = None if key.expires_s is None else self._loop.wall() + key.expires_s
            made = await operator.create_key(
                f"a{key.account}", KeyChange(bounds=bounds, expires_at=expires_at, models=list(key.models) or None)
            )
            if key.expires_s is not None:
                at = made_at + key.expires_s
                self.record.changes.append(Done("expire", at, at, key.account, len(self._secrets)))
            self._secrets.append(made["key"])
            self._key_ids.append(made["id"])
        for number, plan in enumerate(self._history.accounts):
            is_known = any(key.account == number for key in self._history.keys)
            if plan != AccountPlan() and is_known:
                await operator.account_limits(f"a{number}", _bounds(plan))
        if any(request.template for request in self._history.requests):
            await operator.put_template(None, TEMPLATE, TemplateFields(system=template_system(DROPPED)))
            for account in range(len(self._history.credit)):
                await self._edit(Change(0.0, "template", account, amount=first_version(account)))

    # What is seen of the store.

    def _watch_beats(self) -> None:
        """Keep what workers are told of how many they are, from the first one on."""
        run_command = self._world.store.run

        def run_and_keep(client: Client, fields: list[bytes]) -> Any:
            reply = run_command(client, fields)
            if type(reply) is int and fields[0][:4].upper() == b"EVAL" and script_of(fields) == "beat":
                self.record.beats.append(Beat(self._loop.time(), fields[4].decode(), reply))
            return reply

        self._world.store.run = run_and_keep  # type: ignore[method-assign]

    def _watch_store(self) -> None:
        """Take a sample of each account's credit after each script."""
        store = self._world.store
        run_command = store.run
        books = [f"mesh:{{a{account}}}:credit" for account in range(len(self._history.credit))]
        last: dict[int, tuple[int, int]] = {}

        def run_and_look(client: Client, fields: list[bytes]) -> Any:
            reply = run_command(client, fields)
            if fields[0][:4].upper() == b"EVAL":
                for account, book in enumerate(books):
                    found = store.peek(book)
                    seen = int(found.get(b"balance", 0)), int(found.get(b"held", 0))
                    if last.get(account) != seen:
                        last[account] = seen
                        self.record.samples.append(Sample(self._loop.time(), account, *seen, script_of(fields)))
            return reply

        store.run = run_and_look  # type: ignore[method-assign]
        store.on_command = self._fate
        store.keeps_replica = any(fault.what == "failover" for fault in self._history.faults)

    def _fate(self, fields: list[bytes]) -> Fate:
        if self._drops and fields[0][:4].upper() == b"EVAL":
            self._drops -= 1
            self.record.troubles.append(Trouble("lost_reply", self._loop.time(), self._loop.time() + RECOVERY_S))
            return Fate.DROP_AFTER
        return Fate.RUN

    # Steps.

    async def _break(self, fault: Fault) -> None:
        """Do to the store or the disk what a fault says, and mend it when no other fault of its kind lasts."""
        store, now = self._world.store, self._loop.time()
        if fault.what == "lost_reply":
            self._loop.trace("fault: the next scripts' replies are lost, with their connections: %d", fault.count)
            self._drops += fault.count
            return
        if fault.what != "flush":
            lasts = HOLD_TTL_S + abs(fault.delay_s) if fault.what == "clock" else RECOVERY_S
            self.record.troubles.append(Trouble(fault.what, now, now + fault.for_s + lasts))
        if fault.what == "flush":
            store.flush_scripts()
        elif fault.what == "clock":
            store.jump(fault.delay_s)
        else:
            if fault.what in {"gone", "failover"}:
                store.go_down()
            if fault.what == "failover":
                store.fail_over()  # to what the replica has now, however long it takes
            self._loop.trace("fault begins: %s, for %g s", _Suffered(fault), fault.for_s)
            self._lasting.append(fault)
            self._suffer(fault)
            await asyncio.sleep(fault.for_s)
            self._loop.trace("fault ends: %s, since %g", _Suffered(fault), fault.at_s)
            self._lasting.remove(fault)
            self._suffer(fault)
            if fault.what in {"gone", "failover"} and not self._last("gone", "failover"):
                store.come_back()

    def _last(self, *whats: str) -> Fault | None:
        """Return the fault of these kinds that began last of those that last."""
        return next((fault for fault in reversed(self._lasting) if fault.what in whats), None)

    def _suffer(self, changed: Fault) -> None:
        """Have the store or the disk behave as the faults say that last, now that one has begun or ended."""
        store, disk = self._world.store, self._world.disk
        if changed.what in {"disk_full", "disk_fails"}:
            broken = self._last("disk_full", "disk_fails")
            disk.room = broken.room if broken is not None and broken.what == "disk_full" else None
            disk.is_failing = broken is not None and broken.what == "disk_fails"
            return
        refusing, slow = self._last("refused", "full"), self._last("slow")
        store.refusal = None if refusing is None else READONLY if refusing.what == "refused" else OOM
        store.delay_s = 0.0 if slow is None else slow.delay_s

    async def _happen(self, event: WorkerEvent) -> None:
        """Do to the workers what an event says."""
        gateway = self._gateway
        trace, number = self._loop.trace, event.worker % len(gateway.instances)
        instance = gateway.instances[number]
        if event.what == "killed_writing":
            trace("operator: kills gateway-%d at its next write", number)
            await self._write_begins(instance)
        now = self._loop.time()
        if event.what == "reloaded":
            told = [f", another price of {name}" for name, _ in event.prices]
            told += [f", {name} asks {', then '.join(routes)}" for name, routes in event.routes]
            told += [f", {name} is at /{name}.{place}".rstrip(".") for name, place in event.places]
            trace("operator: has all gateways reload%s", "".join(told))
            self._models |= {name: replace(self._models[name], price=price) for name, price in event.prices}
            self._models |= {name: replace(self._models[name], routes=routes) for name, routes in event.routes}
            self._places |= dict(event.places)
            self.record.prices.append((now, dict(self._models)))
            self.record.places.append(dict(self._places))
            gateway.reload(toml(self._history, self._models, self._places))
        elif event.what == "bad_reload":
            text = gateway.text
            trace("operator: has all gateways reload a configuration with an error")
            gateway.reload("[server]\nlisten = 17\n")
            await asyncio.sleep(1.0)
            if gateway.text == "[server]\nlisten = 17\n":
                trace("operator: puts the configuration from before into the file")
                gateway.text = text
        elif not instance.ended.is_set():
            what = "drained" if event.what == "drained" else "killed"
            trace("operator: %s gateway-%d", "drains" if what == "drained" else "kills", number)
            instance.drain() if what == "drained" else instance.kill()
            self.record.troubles.append(Trouble(what, now, now + 1e6, number))
            trouble = self.record.troubles[-1]
            await instance.ended.wait()
            if what == "drained":
                self.record.drains.append(Drain(number, now, self._loop.time()))
            self.record.exits.append((instance.name, instance.code))
            await asyncio.sleep(event.for_s)
            for _ in range(OPERATOR_TRIES):  # again, where it has read a bad configuration
                if not instance.ended.is_set():
                    break  # another event has started it
                trace("operator: starts gateway-%d again", number)
                await instance.restart()
                if instance.ended.is_set():  # a bad configuration, or a disk that its journal needs
                    self.record.refused.append(instance.name)
                    await asyncio.sleep(OPERATOR_PAUSE_S)
            self.record.troubles[self.record.troubles.index(trouble)] = trouble._replace(end=self._loop.time())

    async def _write_begins(self, instance: Instance) -> None:
        """Wait until an instance has given a write to a thread, which has not run yet, or for WRITES_WITHIN_S."""
        begun = asyncio.Event()
        instance.process.on_job.append(begun.set)
        with suppress(TimeoutError):
            async with asyncio.timeout(WRITES_WITHIN_S):
                await begun.wait()

    async def _change(self, change: Change) -> None:
        """Do what an operator does, or read the account by one of its keys."""
        if change.what == "look":
            await self._look(change.account)
            return
        if change.what in {"template", "template_dropped"}:
            await self._edit(change)
            return
        if change.what in {"grant", "grant_twice"}:
            await self._grant(change.account, change.amount, f"at {change.at_s}")
            if change.what == "grant_twice":
                await self._grant(change.account, change.amount, f"at {change.at_s}")
            return
        key_id = self._key_ids[change.key]

        async def act() -> None:
            operator = await self._gateway.administration()
            if change.what == "requests_per_minute":
                bounds = Bounds(limits={"requests_per_minute": change.amount})
                await operator.change_key(key_id, KeyChange(bounds=bounds))
            elif change.what == "suspend_account":
                await operator.set_account_status(f"a{change.account}", "suspended")
            else:
                status = {"suspend": "suspended", "activate": "active", "revoke": "revoked"}[change.what]
                await operator.set_key_status(key_id, status)  # type: ignore[arg-type]

        await self._try(act, Done(change.what, 0, 0, change.account, change.key, change.amount))

    async def _edit(self, change: Change) -> None:
        """Store a version of the account's template, or delete it."""
        owner = f"a{change.account}"

        async def act() -> None:
            operator = await self._gateway.administration()
            if change.what == "template":
                await operator.put_template(owner, TEMPLATE, TemplateFields(system=template_system(change.amount)))
            else:
                await operator.delete_template(owner, TEMPLATE)

        await self._try(act, Done("template", 0, 0, change.account, amount=change.amount))

    async def _look(self, account: int) -> None:
        """Ask for an account's credit with one of its keys, if it has one."""
        key = next((at for at, plan in enumerate(self._history.keys) if plan.account == account), None)
        if key is None:
            return
        began_at, worker = self._loop.time(), account % len(self._gateway.instances)
        self._loop.trace("look at a%d: GET /v1/key with k%d at gateway-%d", account, key, worker)
        status, told = await self._world.spawn(self._people, self._clients.fetch(account, key, "/v1/key"))
        if status != 200:
            self._loop.trace("look at a%d: status %d, %s", account, status, told)
            return
        balance, held, available = (nusd(told[f"{name}_usd"]) for name in ("balance", "held", "available"))
        look = Look(account, began_at, self._loop.time(), balance, held, available, key, told)
        self._loop.trace("look at a%d: balance %d, held %d, available %d", account, *look[3:6])
        self.record.looks.append(look)

    async def _grant(self, account: int, amount: int, ref: str) -> None:
        async def act() -> None:
            operator = await self._gateway.administration()
            await operator.grant(f"a{account}", amount, ref=ref)

        await self._try(act, Done("grant", 0, 0, account, amount=amount, ref=ref))

    async def _try(self, act: Callable[[], Any], done: Done) -> None:
        """Do it, again and again while the store is lost, as an operator would."""
        began_at, ok = self._loop.time(), False
        for _ in range(OPERATOR_TRIES):
            with suppress(Unavailable, StoreError):
                try:
                    await act()
                except GatewayError:
                    break
                ok = True
                break
            await asyncio.sleep(OPERATOR_PAUSE_S)
        self.record.changes.append(done._replace(began_at=began_at, ended_at=self._loop.time(), ok=ok))

    # The end.

    async def _settle(self) -> None:
        """Let everything be settled: faults are mended, all instances run, and the longest deadline passes."""
        self._drops = looks = 0
        for _ in range(MOST_DRAINS):
            looks = looks + 1 if all(call.ended_at for call in self._provider.calls) else 0
            if looks > 1:
                break
            await asyncio.sleep(NEXT_S if looks else JOURNAL_S)
        rest()
        await asyncio.sleep(HOLD_TTL_S + JOURNAL_S)
        if any(fault.what == "clock" for fault in self._history.faults):  # deadlines are by the store's clock
            await asyncio.sleep(
                max(0.0, -sum(fault.delay_s for fault in self._history.faults if fault.what == "clock"))
            )
        self._world.mark("books")
        operator = await self._gateway.administration()
        for number in range(len(self._history.credit)):
            with suppress(GatewayError):
                await operator.credit(f"a{number}")  # releases what is past its deadline

    async def _read_books(self) -> None:
        """Read what the ledger has of each account, by the keys in docs/ledger.md."""
        store = self._world.store
        for number in range(len(self._history.credit)):
            prefix = f"mesh:{{a{number}}}:"
            credit = [
                int(value or 0)
                for value in store.ask("HMGET", f"{prefix}credit", "balance", "held", "granted", "settled")
            ]
            events = [_pairs(fields) for _, fields in store.ask("XRANGE", f"{prefix}usage", "-", "+")]
            sums: dict[tuple[str, ...], int] = {}
            keys = [key.decode() for key in store.ask("KEYS", f"{prefix}*")]
            for key in keys:
                name = key.removeprefix(prefix)
                if name.startswith(("hour:", "month:")):
                    fields = _pairs(store.ask("HGETALL", key)).items()
                    sums |= {(name, *field.split("\x1f")): int(value) for field, value in fields}
            now_ms = int((self._loop.wall() + store.clock_offset_s) * 1000)
            running = sum(
                store.ask("ZCOUNT", key, now_ms, "+inf") for key in keys if key.startswith(f"{prefix}running:")
            )
            holds = store.ask("HLEN", f"{prefix}holds")
            balance, held, granted, settled = credit
            budgeted = {name: int(value) for name, value in _pairs(store.ask("HGETALL", f"{prefix}held")).items()}
            self.record.books[number] = Book(
                balance, held, granted, settled, holds, running, tuple(events), sums, budgeted
            )

    async def _read_told(self) -> None:
        """Read what the API says of each account, by a key that still works."""
        for number in range(len(self._history.credit)):
            await self._look(number)
            ids = [
                sight.request_id
                for sight in self._clients.sights
                if self._history.keys[sight.request.key].account == number
            ]
            for key, plan in enumerate(self._history.keys):
                ask = partial(self._clients.fetch, 0, key)
                if plan.account != number or not ids:
                    continue
                status, events = await self._world.spawn(self._people, ask("/v1/usage/events", {"request_ids": ids}))
                if status == 200:
                    _, rows = await self._world.spawn(self._people, ask("/v1/usage?group_by=key,model,session_id"))
                    self.record.told[number] = Told(events["events"], rows["data"])
                    break


def _bounds(plan: Limits) -> Bounds:
    """Return the limits and budgets of a key or an account, as an operator gives them."""
    budgets: dict[str, int | None] = {f"{period}_nusd": budget for period, budget in plan.budgets.items()}
    return Bounds(limits=dict(plan.limits), budgets=budgets)


def _until_midnight(wall: float, *, ends_month: bool) -> float:
    """Return the seconds from a Unix time until its day (UTC) ends, or until its month does."""
    day = datetime.fromtimestamp(wall, UTC).date() + timedelta(1)
    if ends_month:
        day = (day.replace(day=28) + timedelta(4)).replace(day=1) if day.day > 1 else day
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() - wall


def _pairs(flat: list[bytes]) -> dict[str, str]:
    words = [word.decode() for word in flat]
    return dict(zip(words[::2], words[1::2], strict=True))


def _bug_of(entry: tuple[str, dict[str, Any] | bytes]) -> tuple[str, str]:
    """Return what a log line tells of a bug; empty if nothing."""
    where, event = entry
    if isinstance(event, bytes):
        line = json.loads(event)
        return where, f"500 {line.get('error')}" if line.get("status") == 500 else ""
    return where, f"{event}" if event.get("event") in BUGS else ""


class _Suffered(NamedTuple):
    """A fault in the transcript, which most runs need not have as text."""

    fault: Fault

    def __str__(self) -> str:
        fault = self.fault
        return {
            "refused": "the store refuses writes (READONLY)",
            "full": "the store refuses writes that need memory (OOM)",
            "slow": f"the store replies {fault.delay_s:g} s late",
            "gone": "the store is down",
            "failover": "the store is down, for a replica that lacks the last second",
            "disk_full": f"the disk has room for {fault.room} bytes",
            "disk_fails": "the disk refuses every write",
        }[fault.what]


class Played:
    """A history, what came of it, and what is wrong with that."""

    def __init__(self, history: History, outcome: Outcome) -> None:
        self.history, self.outcome = history, outcome
        self.record: Record | None = outcome.result
        if self.record is None or outcome.failure is not None:
            self.findings = [Finding("it_ends", repr(outcome.failure))]
            return
        left = outcome.left
        for name in ("tasks", "timers", "sockets", "files", "journal"):
            self.record.left += [
                f"{name}: {each}"
                for each in getattr(left, name)
                if each.partition(":")[0] not in self.record.refused  # ended at its start
            ]
        self.record.errors += outcome.errors
        self.findings = judge(self.record)


def played(history: History, *, is_traced: bool = True) -> Played:
    """Play a history in a world of its own. Without a transcript it takes a thirtieth less."""

    async def story(world: World) -> Record:
        return await Play(world, history).play()

    return Played(history, run(history.seed, story, max_turns=MAX_TURNS, is_traced=is_traced))
