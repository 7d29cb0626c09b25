"""Admission without Redis, for `redis.on_failure = "local"`: each worker enforces its share of every bucket, and admits credit
on a bounded allowance an account. What is spent so is settled when Redis is back (journal.py).
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from operator import itemgetter

from msgspec import Struct

from meshproxy.ledger.records import Admitted, Ask, BucketState, Denied, Kind, Scope, Settlement
from meshproxy.ledger.store import Store, Unavailable
from meshproxy.policy.principal import Limits

MAX_ACCOUNTS = 65_536  # known to one worker while Redis is away; no others are admitted
BEAT_S = 5.0
WORKERS = "mesh:workers"  # sorted set: worker by its last heartbeat (Unix seconds)


class Instances:
    """How many workers share the Redis, by their heartbeats; the last known number while it is away."""

    def __init__(self, store: Store, worker: str, wall_clock: Callable[[], float]) -> None:
        self.count = 1
        self._store = store
        self._worker = worker
        self._wall_clock = wall_clock

    async def beat(self) -> None:
        """Run for the life of the worker."""
        while True:
            now = int(self._wall_clock())
            try:
                _, _, count = await asyncio.gather(
                    self._store.execute("ZADD", WORKERS, now, self._worker),
                    self._store.execute("ZREMRANGEBYSCORE", WORKERS, 0, int(now - 3 * BEAT_S)),
                    self._store.execute("ZCARD", WORKERS),
                )
                self.count = max(int(count), 1)
            except Unavailable:
                pass  # the last known number holds
            await asyncio.sleep(BEAT_S)


class _Bucket(Struct):
    """A worker's share of a token bucket, at a moment of its clock."""

    scope: Scope
    kind: Kind
    limit: int  # a minute, of all workers
    size: float
    rate: float  # a second
    level: float
    at: float

    def wait_s(self, count: int) -> float:
        """How long until it lets `count` through. More than it can hold gets through when it is full."""
        return math.inf if self.limit == 0 else max(min(count, self.size) - self.level, 0.0) / self.rate

    def state(self) -> BucketState:
        """What is told of it."""
        reset_s = (self.size - self.level) / self.rate
        return BucketState(self.scope, self.kind, self.limit, max(math.floor(self.level), 0), reset_s)


class LocalAdmission:
    """What one worker may admit by itself. `clock` is monotonic seconds."""

    def __init__(self, allowance_nusd: int, instances: Instances, clock: Callable[[], float]) -> None:
        self._allowance_nusd = allowance_nusd
        self._instances = instances
        self._clock = clock
        self._used_nusd: dict[str, int] = {}
        self._buckets: dict[tuple[str, str, str], _Bucket] = {}

    def admit(self, ask: Ask) -> Admitted | Denied:
        """Hold the amount from the allowance and take from the local buckets, or say why not."""
        available = self._available(ask.account)
        is_one_too_many = ask.account not in self._used_nusd and len(self._used_nusd) >= MAX_ACCOUNTS
        if ask.amount_nusd > available or is_one_too_many:
            return Denied("insufficient_credits", "credit", max(available, 0))
        wants = [
            *self._wants("key", ask.key_id, ask.key_limits, ask.tokens),
            *self._wants("account", ask.account, ask.account_limits, ask.tokens),
        ]
        wait_s, slowest = max(
            ((bucket.wait_s(count), bucket) for bucket, count in wants), default=(0.0, None), key=itemgetter(0)
        )
        if slowest is not None and wait_s > 0:
            return Denied(
                "rate_limit", f"{slowest.scope} {slowest.kind}", available, None if wait_s == math.inf else wait_s
            )
        for bucket, count in wants:
            bucket.level -= count
        self.take(ask.account, ask.amount_nusd)
        states = tuple(bucket.state() for bucket, _ in wants)
        return Admitted(ask, ask.amount_nusd, available - ask.amount_nusd, states)

    def take(self, account: str, amount_nusd: int) -> bool:
        """Take more of an account's allowance, if it is there."""
        if amount_nusd > self._available(account):
            return False
        self._used_nusd[account] = self._used_nusd.get(account, 0) + amount_nusd
        return True

    def settled(self, ask: Ask, settlement: Settlement) -> None:
        """A request that was admitted here is over: its allowance is what it really cost."""
        used = self._used_nusd.get(ask.account, 0)
        self._used_nusd[ask.account] = max(used + settlement.cost_nusd - ask.amount_nusd, 0)

    def forget(self) -> None:
        """Redis is back: it admits, and what was spent here is on its way to it."""
        self._used_nusd.clear()
        self._buckets.clear()

    def _available(self, account: str) -> int:
        return self._allowance_nusd // self._instances.count - self._used_nusd.get(account, 0)

    def _wants(self, scope: Scope, name: str, limits: Limits, tokens: int) -> Iterator[tuple[_Bucket, int]]:
        """The buckets that there are, and what is taken from each."""
        requests_limit, tokens_limit = limits.requests_per_minute, limits.tokens_per_minute
        if requests_limit is not None:
            size = requests_limit if limits.burst is None else limits.burst
            yield self._refilled(scope, name, "requests", requests_limit, size), 1
        if tokens_limit is not None:
            yield self._refilled(scope, name, "tokens", tokens_limit, tokens_limit), tokens

    def _refilled(self, scope: Scope, name: str, kind: Kind, limit: int, size: int) -> _Bucket:
        """A bucket as of now, as large as this worker's share is now."""
        now, sharers = self._clock(), self._instances.count
        full, rate = max(size / sharers, 1.0), max(limit / sharers, 1.0) / 60
        old = self._buckets.get((scope, name, kind))
        level = full if old is None else min(full, old.level + (now - old.at) * rate)
        bucket = self._buckets[scope, name, kind] = _Bucket(scope, kind, limit, full, rate, level, now)
        return bucket
