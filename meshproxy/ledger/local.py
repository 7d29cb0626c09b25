"""Admission without Redis, for `redis.on_failure = "local"`.

Each worker enforces its share of every bucket, and admits requests on a bounded allowance of credit for each account.
Their settlements go to the journal until Redis is back (journal.py).

Only settled money refills the allowance: what a request held or cost counts against it until Redis has charged it,
however often Redis is lost and found in between.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter

from msgspec import Struct

from meshproxy.ledger.records import BucketState, Denial, Hold, HoldRequest, Kind, Period, Scope, Settlement
from meshproxy.ledger.store import Script, Store, StoreError, Unavailable
from meshproxy.policy.principal import Limits

MAX_ACCOUNTS = 65_536  # known to one worker while Redis is lost; further accounts are denied
BUCKETS_OF_AN_ACCOUNT = 16  # its own and those of some keys; more buckets count as further accounts
PARALLEL_RETRY_S = 1.0
BEAT_S = 5.0
BEAT_RETRY_S = 1.0
KEPT_MS = int(3 * BEAT_S * 1000)  # a worker that missed three reports is no longer counted
WORKERS = "mesh:workers"  # sorted set: worker id by its last report (Unix seconds, Redis's clock)
LINE_BYTES = 2048  # bound on a settlement's line in the journal, without the session's name
SESSION_BYTES = 6  # bound on one character of the session's name, as JSON


class WorkerCount:
    """The number of workers that share the Redis, counted by their reports that they run.

    While Redis is lost, the last known number holds. A lower number holds only when it is told twice in a row: the first
    worker to report after a long outage is alone, until the others have reported too.

    Reports use Redis's TIME, so a host with a wrong clock is counted like the others and removes none of them.
    `at_least` is the number of workers on this host: the count is never lower.
    """

    def __init__(self, store: Store, worker: str, at_least: int = 1) -> None:
        self.count = at_least
        self._store = store
        self._worker = worker
        self._at_least = at_least
        self._told = 0  # in the last reply
        self._beat = Script.load("beat")

    async def beat(self) -> None:
        """Report that this worker runs, for its life: soon again if that fails, so that the others know it when Redis is back."""
        while True:
            pause_s = BEAT_S
            try:
                count = int(await self._store.run(self._beat, [WORKERS], [self._worker, KEPT_MS]))
                self.count, self._told = max(count, self._told, self._at_least), count
            except (Unavailable, StoreError):
                pause_s = BEAT_RETRY_S  # the last known number holds
            await asyncio.sleep(pause_s)


class _Bucket(Struct):
    """A worker's share of a token bucket, at the time `at` of its clock."""

    scope: Scope
    kind: Kind
    per: Period
    limit: int  # shared by all workers
    size: float
    rate: float  # per second
    level: float
    at: float

    def wait_s(self, count: int) -> float:
        """Return the seconds until the bucket admits `count`. A count above its size is admitted when it is full."""
        return math.inf if self.limit == 0 else max(min(count, self.size) - self.level, 0.0) / self.rate

    def state(self) -> BucketState:
        """Return the state that is shown to clients."""
        reset_s = (self.size - self.level) / self.rate
        return BucketState(self.scope, self.kind, self.limit, max(math.floor(self.level), 0), reset_s, self.per)

    @property
    def name_in_denial(self) -> str:
        """The bucket's name in a denial."""
        return f"{self.scope} {self.kind}{' per day' if self.per == 'day' else ''}"


class LocalAdmission:
    """What one worker may admit by itself.

    `clock` is monotonic, in seconds. `room_bytes` returns the room left in the journal, which must fit the settlement
    of everything admitted here.
    """

    def __init__(
        self, allowance_nusd: int, instances: WorkerCount, clock: Callable[[], float], room_bytes: Callable[[], int]
    ) -> None:
        self._allowance_nusd = allowance_nusd
        self._instances = instances
        self._clock = clock
        self._room_bytes = room_bytes
        # account and nano-USD by hold id: held, or spent and not yet charged
        self._owed: dict[str, tuple[str, int]] = {}
        self._used_nusd: dict[str, int] = {}  # the sums of `_owed` by account
        self._running: dict[str, HoldRequest] = {}  # by hold id
        self._parallel: Counter[str] = Counter()  # running requests by account, and by `account key`
        self._reserved_bytes = 0  # journal bytes reserved for the running requests
        self._buckets: dict[tuple[str, str, str, str], _Bucket] = {}

    def has_room(self, request: HoldRequest) -> bool:
        """Return whether the journal has room for one more settlement. Without room, no request may be admitted."""
        return self._reserved_bytes + _line_bytes(request) <= self._room_bytes()

    def admit(self, request: HoldRequest) -> Hold | Denial:
        """Hold the amount from the allowance and debit the local buckets, or return the denial."""
        available = self._available(request.account)
        known = max(len(self._used_nusd), len(self._buckets) // BUCKETS_OF_AN_ACCOUNT)
        has_no_place = request.account not in self._used_nusd and known >= MAX_ACCOUNTS
        amount_nusd = request.amount_within(available)
        if amount_nusd is None or has_no_place:
            return Denial("insufficient_credits", "credit", available, needed_nusd=request.amount_nusd)
        debits = [
            *self._debits_of("key", request.key_id, request.key_limits, request.tokens),
            *self._debits_of("account", request.account, request.account_limits, request.tokens),
        ]
        wait_s, slowest = max(
            ((bucket.wait_s(count), bucket) for bucket, count in debits), default=(0.0, None), key=itemgetter(0)
        )
        if slowest is not None and wait_s > 0:
            return Denial("rate_limit", slowest.name_in_denial, available, None if wait_s == math.inf else wait_s)
        if full := self._full(request):
            return Denial("rate_limit", full, available, PARALLEL_RETRY_S)
        for bucket, count in debits:
            bucket.level -= count
        self._set_owed(request.hold_id, request.account, amount_nusd)
        self._running[request.hold_id] = request
        self._parallel.update(_owners(request))
        self._reserved_bytes += _line_bytes(request)
        states = tuple(bucket.state() for bucket, _ in debits)
        return Hold(request, amount_nusd, available - amount_nusd, states)

    def hold_more(self, request: HoldRequest, amount_nusd: int) -> bool:
        """Hold more of the account's allowance for a request, if available. Redis may hold the first part of it."""
        if amount_nusd > self._available(request.account):
            return False
        self._set_owed(
            request.hold_id, request.account, self._owed.get(request.hold_id, (request.account, 0))[1] + amount_nusd
        )
        return True

    def settled_here(self, settlement: Settlement, held_by_redis_nusd: int) -> None:
        """Replace what a request held here by its cost beyond what Redis holds for it. Redis hasn't charged it yet."""
        request = self._running.pop(settlement.hold_id, None)
        if request is not None:
            self._reserved_bytes -= _line_bytes(request)
            for owner in _owners(request):
                self._parallel[owner] -= 1
                if not self._parallel[owner]:
                    del self._parallel[owner]
        if request is not None or settlement.hold_id in self._owed:
            amount = max(settlement.cost_nusd - held_by_redis_nusd, 0)
            self._set_owed(settlement.hold_id, settlement.account, amount)

    def charged(self, hold_id: str) -> None:
        """Return a request's amount to the allowance: Redis has charged it, or has a hold for it."""
        if hold_id in self._owed:
            self._set_owed(hold_id, self._owed[hold_id][0], 0)

    def count_journaled(self, settlements: Iterable[Settlement]) -> None:
        """Count what an earlier process's journal owes: a restart must not refill the allowance."""
        for settlement in settlements:
            if settlement.unheld:
                self._set_owed(settlement.hold_id, settlement.account, settlement.cost_nusd)

    def drop_buckets(self) -> None:
        """Drop the local buckets but not the allowance: Redis has written an admission, so its buckets are in force."""
        if self._buckets:
            self._buckets.clear()

    def _set_owed(self, hold_id: str, account: str, amount_nusd: int) -> None:
        """Set the amount that one request holds or has spent here."""
        used = self._used_nusd.get(account, 0) - self._owed.get(hold_id, (account, 0))[1] + amount_nusd
        if amount_nusd:
            self._owed[hold_id] = account, amount_nusd
        else:
            self._owed.pop(hold_id, None)
        if used:
            self._used_nusd[account] = used
        else:
            self._used_nusd.pop(account, None)

    def _available(self, account: str) -> int:
        return self._allowance_nusd // self._instances.count - self._used_nusd.get(account, 0)

    def _debits_of(self, scope: Scope, name: str, limits: Limits, tokens: int) -> Iterator[tuple[_Bucket, int]]:
        """Yield the buckets that have a limit, and what is taken from each."""
        requests_limit, tokens_limit, size = limits.requests_per_minute, limits.tokens_per_minute, limits.request_bucket
        if requests_limit is not None and size is not None:
            yield self._refilled(scope, name, "requests", requests_limit, size), 1
        if tokens_limit is not None:
            yield self._refilled(scope, name, "tokens", tokens_limit, tokens_limit), tokens
        if (daily := limits.requests_per_day) is not None:
            yield self._refilled(scope, name, "requests", daily, daily, "day"), 1

    def _refilled(self, scope: Scope, name: str, kind: Kind, limit: int, size: int, per: Period = "minute") -> _Bucket:
        """Return a bucket refilled up to now, sized to this worker's current share."""
        now, workers = self._clock(), self._instances.count
        full, rate = max(size / workers, 1.0), max(limit / workers, 1.0) / (86_400 if per == "day" else 60)
        old = self._buckets.get((scope, name, kind, per))
        level = full if old is None else min(full, old.level + (now - old.at) * rate)
        bucket = self._buckets[scope, name, kind, per] = _Bucket(scope, kind, per, limit, full, rate, level, now)
        return bucket

    def _full(self, request: HoldRequest) -> str | None:
        """Return the parallel limit of which this worker's share (at least one) is reached, None if none is."""
        account, key = _owners(request)
        for name_in_denial, owner, limits in (
            ("key", key, request.key_limits),
            ("account", account, request.account_limits),
        ):
            most = limits.max_parallel
            if most is not None and self._parallel[owner] >= min(most, max(most // self._instances.count, 1)):
                return f"{name_in_denial} parallel requests"
        return None


def _owners(request: HoldRequest) -> tuple[str, str]:
    """Return the two names that a running request counts for: its account and its key."""
    return request.account, f"{request.account} {request.key_id}"


def _line_bytes(request: HoldRequest) -> int:
    """Return the most bytes that a request's settlement takes in the journal."""
    return LINE_BYTES + SESSION_BYTES * len(request.session or "")
