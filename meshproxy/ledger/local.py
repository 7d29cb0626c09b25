"""Admission without Redis, for `redis.on_failure = "local"`: each worker enforces its share of every bucket, and admits credit
on a bounded allowance an account. What is spent so is settled when Redis is back (journal.py).
"""

import asyncio
import math
from collections.abc import Callable

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


class _Want(Struct, frozen=True):
    """One bucket that a request takes `count` from."""

    scope: Scope
    name: str
    kind: Kind
    per_minute: int
    size: int
    count: int


class _Bucket:
    """A token bucket on this worker's clock."""

    __slots__ = ("at", "level")

    def __init__(self, level: float, at: float) -> None:
        self.level = level
        self.at = at


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
        used = self._used_nusd.get(ask.account, 0)
        available = self._allowance_nusd // self._instances.count - used
        is_one_too_many = ask.account not in self._used_nusd and len(self._used_nusd) >= MAX_ACCOUNTS
        if ask.amount_nusd > available or is_one_too_many:
            return Denied("insufficient_credits", "credit", max(available, 0))
        now = self._clock()
        wants = [
            *_wants("key", ask.key_id, ask.key_limits, ask),
            *_wants("account", ask.account, ask.account_limits, ask),
        ]
        waits = [(self._wait_s(want, now), want) for want in wants]
        longest = max(waits, default=None, key=lambda wait: wait[0])
        if longest is not None and longest[0] > 0:
            retry_after_s = None if longest[0] == math.inf else longest[0]
            return Denied("rate_limit", f"{longest[1].scope} {longest[1].kind}", available, retry_after_s)
        for want in wants:
            self._bucket(want, now).level -= want.count
        self._used_nusd[ask.account] = used + ask.amount_nusd
        return Admitted(
            ask, ask.amount_nusd, available - ask.amount_nusd, tuple(self._state(want, now) for want in wants)
        )

    def take(self, account: str, amount_nusd: int) -> bool:
        """Take more of an account's allowance, if it is there."""
        used = self._used_nusd.get(account, 0)
        if used + amount_nusd > self._allowance_nusd // self._instances.count:
            return False
        self._used_nusd[account] = used + amount_nusd
        return True

    def settled(self, ask: Ask, settlement: Settlement) -> None:
        """A request that was admitted here is over: its allowance is what it really cost."""
        used = self._used_nusd.get(ask.account, 0)
        self._used_nusd[ask.account] = max(used + settlement.cost_nusd - ask.amount_nusd, 0)

    def forget(self) -> None:
        """Redis is back: it admits, and what was spent here is on its way to it."""
        self._used_nusd.clear()
        self._buckets.clear()

    def _bucket(self, want: _Want, now: float) -> _Bucket:
        """The bucket refilled up to now."""
        size = self._share(want.size)
        bucket = self._buckets.setdefault((want.scope, want.name, want.kind), _Bucket(size, now))
        bucket.level = min(size, bucket.level + (now - bucket.at) * self._share(want.per_minute) / 60)
        bucket.at = now
        return bucket

    def _wait_s(self, want: _Want, now: float) -> float:
        if want.per_minute == 0:
            return math.inf
        missing = min(want.count, self._share(want.size)) - self._bucket(want, now).level
        return missing * 60 / self._share(want.per_minute) if missing > 0 else 0.0

    def _state(self, want: _Want, now: float) -> BucketState:
        bucket = self._bucket(want, now)
        reset_s = (self._share(want.size) - bucket.level) * 60 / self._share(want.per_minute)
        return BucketState(want.scope, want.kind, want.per_minute, max(math.floor(bucket.level), 0), reset_s)

    def _share(self, whole: int) -> float:
        return max(whole / self._instances.count, 1.0)


def _wants(scope: Scope, name: str, limits: Limits, ask: Ask) -> list[_Want]:
    wants = []
    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    if requests is not None:
        wants.append(_Want(scope, name, "requests", requests, requests if limits.burst is None else limits.burst, 1))
    if tokens is not None:
        wants.append(_Want(scope, name, "tokens", tokens, tokens, ask.tokens))
    return wants
