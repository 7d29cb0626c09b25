"""What is known of a history that was played: what clients saw, what providers billed, what the ledger says.

`View` is a record with what several of the judge's rules need of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from msgspec import Struct

from simulation.accounts import Limits
from simulation.client import Idle, Sight, trace_of
from simulation.history import DRAIN_S, History, Model, Request
from simulation.provider import Call

PROPAGATION_S: Final = 2.1  # two seconds and the way of a packet, after which an operator's change holds everywhere
HOP_S: Final = 0.1  # that a packet is under way at most (0.08), with the turns at its ends
LATENCY_S: Final = 1.0  # of the simulated wires, turns and the gateway's own timers
LAG_S: Final = 1.0  # of the store's replica: what a failover loses
RECOVERY_S: Final = 5.0  # after a fault of the store or a disk: until it is found again, and a journal replayed
PERIODS: Final = {"total": "", "daily": "%Y-%m-%d", "monthly": "%Y-%m"}  # of budgets, by what all of one have in common
STORE: Final = ("lost_reply", "refused", "slow", "gone", "failover", "clock", "full")  # what can befall the store


class Finding(NamedTuple):
    """What broke a rule."""

    rule: str
    words: str


class Book(Struct, frozen=True):
    """What the ledger says of an account at the end, by the keys that docs/ledger.md names.

    `sums`: the aggregates of hours and months, by key and field (`hour:2026-11-24T09` and `KEY MODEL SESSION METRIC`).
    `budgeted`: what is held of the budgets of keys and sessions.
    """

    balance: int = 0
    held: int = 0
    granted: int = 0
    settled: int = 0
    holds: int = 0
    running: int = 0
    events: tuple[dict[str, str], ...] = ()
    sums: dict[tuple[str, ...], int] = {}
    budgeted: dict[str, int] = {}


class Sample(NamedTuple):
    """An account's credit at a time, and the script that changed it."""

    at: float
    account: int
    balance: int
    held: int
    script: str = ""


class Done(NamedTuple):
    """An operator's change that was done: when it was begun and when it was answered, and whether it succeeded."""

    what: str
    began_at: float
    ended_at: float
    account: int = 0
    key: int = 0
    amount: int = 0
    ok: bool = True
    ref: str = ""

    def concerns(self, key: int, account: int) -> bool:
        """Whether it is a change of a key, or of an account, that a request with this key of this account has."""
        return self.account == account if self.what == "suspend_account" else self.key == key


class Trouble(NamedTuple):
    """A fault of the store or a disk, or an end of a worker, with the time in which it can be felt. None: of all workers."""

    what: str
    start: float
    end: float
    worker: int | None = None

    def loses(self, since: float, until: float) -> bool:
        """Whether it is a failover that loses what was written to the store between two times: the second before it."""
        return self.what == "failover" and since <= self.start <= until + LAG_S


class Look(NamedTuple):
    """What `GET /v1/key` said of an account's credit, in nano-USD, and when it was asked and answered.

    `key`: the number of the key that asked. `told`: the whole answer.
    """

    account: int
    began_at: float
    ended_at: float
    balance: int
    held: int
    available: int
    key: int = 0
    told: Mapping[str, Any] = {}


class Told(Struct, frozen=True):
    """What the API says of an account at the end: the events of its requests, and the rows of `/v1/usage`.

    Rows are by key, model and session.
    """

    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]


class Loss(NamedTuple):
    """A settlement that a process could neither send nor keep, from its log."""

    process: str
    request_id: str
    hold_id: str
    cost: int
    unheld: bool


class Beat(NamedTuple):
    """A worker's report that it runs: when, whose, and how many workers it was told. Its holds' ids begin with `worker`."""

    at: float
    worker: str
    told: int


class Drain(NamedTuple):
    """An instance that was told to end: its number, when that was, and when it had ended."""

    worker: int
    start: float
    end: float


class Record(Struct):
    """All that is known of a history that was played.

    `prices`: the models from each time on; `places`: the paths in the addresses of upstreams then.
    `left`: what should be gone and isn't. `errors`: exceptions that nothing
    handled, and lines of the log that tell of a bug. `unkept`: when a process's journal was first refused by its disk.
    `exits`: the exit codes of processes. `refused`: processes that didn't start. `logged`: the log's lines of requests. `failed`:
    those of attempts that failed. `drains`: those of the steps. `idles`: connections that clients kept without a request.
    `key_ids`: the ids of the keys, by number. `client`: the address of the clients. `quoted`: lines of the log that have
    a request's text.
    """

    history: History
    sights: list[Sight] = []
    calls: list[Call] = []
    books: dict[int, Book] = {}
    samples: list[Sample] = []
    changes: list[Done] = []
    troubles: list[Trouble] = []
    prices: list[tuple[float, Mapping[str, Model]]] = []
    places: list[Mapping[str, str]] = []
    left: list[str] = []
    errors: list[str] = []
    store_offset_s: float = 0.0  # the store's clock less the loop's
    looks: list[Look] = []
    told: dict[int, Told] = {}
    losses: list[Loss] = []
    unkept: list[tuple[float, str]] = []
    exits: list[tuple[str, int | None]] = []
    refused: list[str] = []
    logged: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    beats: list[Beat] = []
    drains: list[Drain] = []
    idles: list[Idle] = []
    key_ids: list[str] = []
    client: str = ""
    quoted: list[str] = []
    wall_offset_s: float = 0.0  # the gateway's clock less the loop's


class View:
    """A record, and what several rules need of it."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.history = record.history
        self.calls: dict[str, list[Call]] = {}
        for call in record.calls:
            self.calls.setdefault(call.marker, []).append(call)
        self._own: dict[str, list[Call]] = {}  # of requests with an Idempotency-Key, by what they are called in a trace
        for call in record.calls:
            self._own.setdefault(call.headers.get("traceparent", ""), []).append(call)
        self.settled: dict[str, list[dict[str, str]]] = {}
        for book in record.books.values():
            for event in book.events:
                if event["event"] == "settled":
                    self.settled.setdefault(event["request_id"], []).append(event)
        whats = {trouble.what for trouble in record.troubles}
        self.clock_jumps = "clock" in whats  # then `store_offset_s` holds only after the last jump
        self.first_jump = min((each.start for each in record.troubles if each.what == "clock"), default=math.inf)
        jumped_s = sum(fault.delay_s for fault in record.history.faults if fault.what == "clock")
        self.first_offset_s = record.store_offset_s - jumped_s  # the store's clock less the loop's, before it
        self.is_strict = not self.history.local
        self.moves_upstreams = any(event.places or event.routes for event in record.history.worker_events)
        self.lost: dict[str, int] = {}
        for loss in record.losses:
            self.lost[loss.request_id] = self.lost.get(loss.request_id, 0) + loss.cost

    def sight(self, request_id: str) -> Sight | None:
        """Return what the client saw of a request."""
        return next((sight for sight in self.record.sights if sight.request_id == request_id), None)

    def charge(self, sight: Sight) -> int:
        """Return what the account was charged for a request."""
        return sum(int(event["cost_nusd"]) for event in self.settled.get(sight.request_id, ()))

    def owed(self, sight: Sight) -> int:
        """Return what the account was charged, or is to be charged by hand after a loss that the log has whole."""
        return self.charge(sight) or self.lost.get(sight.request_id, 0)

    def feels(self, sight: Sight, *whats: str, before_s: float = 0.0, until: float | None = None) -> bool:
        """Whether one of these troubles (or any) can be felt by a request, or until a time by what goes on for it.

        A worker's end is felt by its own requests, and by those that have their Idempotency-Keys.
        """
        workers = self.workers(sight)
        return any(
            trouble.start <= (sight.ended_at if until is None else until) + LATENCY_S
            and trouble.end >= sight.began_at - before_s
            and trouble.worker in workers
            for trouble in self.record.troubles
            if not whats or trouble.what in whats
        )

    def workers(self, sight: Sight) -> set[int | None]:
        """Return the workers that a request may feel: its own, and those of its Idempotency-Key; None stands for all."""
        return {None, *(self.worker(other) for other in (self.group(sight) if sight.request.keyed else [sight]))}

    def worker(self, sight: Sight) -> int:
        """Return the number of the worker that got a request."""
        return sight.worker % self.history.workers

    def has_lost(self, done: Done) -> bool:
        """Whether a failover may have lost an operator's change: it loses the last second."""
        return any(
            trouble.what == "failover" and done.began_at <= trouble.start <= done.ended_at + LAG_S + HOP_S
            for trouble in self.record.troubles
        )

    def own_calls(self, sight: Sight) -> list[Call]:
        """Return the calls of a request, without those of others with its Idempotency-Key."""
        if sight.request.keyed:
            return self._own.get(trace_of(sight.request_id), [])
        return self.calls.get(sight.marker, [])

    def calls_for(self, sight: Sight) -> list[Call]:
        """Return the calls that a request's answer may come from: its own, or else those of its Idempotency-Key."""
        return self.own_calls(sight) or self.calls.get(sight.marker, [])

    def is_anothers(self, sight: Sight) -> bool:
        """Whether a request's answer may be that of another one with its Idempotency-Key: no provider was asked for it."""
        return len(self.group(sight)) > 1 and not (sight.request.keyed and self.own_calls(sight))

    def group(self, sight: Sight) -> list[Sight]:
        """Return the requests with the same body and Idempotency-Key, or this one alone."""
        return [other for other in self.record.sights if other.marker == sight.marker]

    def models(self, sight: Sight, name: str) -> list[Model]:
        """Return what a model was when a request was resolved: before and after a reload, where it may have been either."""
        return [self.record.prices[index][1][name] for index in self.configurations(sight)]

    def configurations(self, sight: Sight) -> list[int]:
        """Return the numbers of the configurations that may be a request's, which keeps the one that it begins with."""
        asked_at = [call.at for call in self.own_calls(sight) if call.at >= sight.began_at]
        resolved_by = min([sight.ended_at, *asked_at])
        found = []
        for index, (since, _) in enumerate(self.record.prices):
            ends = self.record.prices[index + 1][0] if index + 1 < len(self.record.prices) else math.inf
            drains = [trouble for trouble in self.record.troubles if trouble.what == "drained"]
            for drain in drains:  # a worker that ends reads no other configuration
                if drain.worker == self.worker(sight) and drain.start <= ends <= drain.end:
                    ends = drain.end
            if since <= resolved_by and ends + PROPAGATION_S >= sight.began_at:
                found.append(index)
        return found

    def place(self, index: int, upstream: str) -> str:
        """Return the path in an upstream's address by the configuration of a number."""
        return self.record.places[index].get(upstream, "") if self.record.places else ""

    def key(self, sight: Sight) -> int:
        """Return the number of the account of a request."""
        return self.history.keys[sight.request.key].account

    def plan(self, sight: Sight, scope: str) -> Limits:
        """Return the limits and budgets of a request's key or account, by that word."""
        return self.history.account(self.key(sight)) if scope == "account" else self.history.keys[sight.request.key]

    def is_of(self, scope: str, sight: Sight, other: Sight) -> bool:
        """Whether another request is of the same key, session or account: an account's keys share its sessions' names."""
        if scope == "key":
            return other.request.key == sight.request.key
        is_same = self.key(other) == self.key(sight)
        return is_same and (scope == "account" or other.request.session == sight.request.session)

    def budgets(self, sight: Sight) -> list[tuple[str, str, int]]:
        """Return the budgets that a request spends from: each's scope, its period and its amount."""
        key = self.history.keys[sight.request.key]
        found = [("key", period, budget) for period, budget in key.budgets.items()]
        if sight.request.session and key.session_budget_nusd is not None:
            found.append(("session", "total", key.session_budget_nusd))
        return found + [("account", *budget) for budget in self.plan(sight, "account").budgets.items()]

    def charge_of(self, sight: Sight, period: str, beside: Sight) -> int:
        """Return what a request was charged in the days or months of another one, for a budget of this period."""
        times = ((at + self.record.store_offset_s) * 1000 for at in (beside.began_at, beside.ended_at))
        periods = {date_of(at_ms, PERIODS[period]) for at_ms in times}
        return sum(
            int(event["cost_nusd"])
            for event in self.settled.get(sight.request_id, ())
            if self.clock_jumps or date_of(int(event["settled_ms"]), PERIODS[period]) in periods
        )


Rule = Callable[[View], Iterator[str]]


def date_of(unix_ms: float, form: str) -> str:
    """Return a Unix time in ms as a date (UTC) of a form; empty for an empty one."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime(form)


def marker_of(seed: int, request: Request) -> str:
    """Return what marks all text of a request; a repeat has that of what it repeats."""
    return f"mk{seed}{request.repeats or request.name}z"


def text_of(seed: int, request: Request) -> str:
    """Return the marker in a request's text, which it may have of another key's request with the same body."""
    return f"mk{seed}{request.text_of or request.repeats or request.name}z"


def cut_short(view: View, sight: Sight) -> bool:
    """Whether a request's worker was drained for `drain_s` when the request ended, or told to stop a second time.

    Repeats of an Idempotency-Key may read along at another worker.
    """
    workers = {view.worker(other) for other in view.group(sight)}
    for worker in workers:
        drains = [each for each in view.record.troubles if each.what == "drained" and each.worker == worker]
        for at, drain in enumerate(drains):
            again_at = min((later.start for later in drains[at + 1 :] if later.start < drain.end), default=math.inf)
            cut_at = min(drain.start + DRAIN_S, again_at)
            if cut_at <= sight.ended_at and sight.began_at <= min(drain.end, cut_at + LATENCY_S):
                return True
    return False
