"""A bounded, short-lived memory of lookups in the store, so that a busy key costs a fetch a second and not one a request.

What is found and what is not are remembered apart: a flood of names that don't exist pushes out each other and nothing else.
Age counts from the moment a fetch was asked for, so an entry is never older than its time to live.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

from meshproxy.ledger.store import Unavailable

MAX_UNKNOWN = 1024  # names remembered as not there

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """`fetch` asks the store for one key's value; None: there is none. Its weight counts towards `max_weight`.

    `stale_s`: while the store is unavailable, values this much older than `ttl_s` are still given out.
    """

    def __init__(
        self,
        fetch: Callable[[Any], Awaitable[Value | None]],
        *,
        clock: Callable[[], float],
        ttl_s: float,
        max_weight: int,
        stale_s: float = 0.0,
        weigh: Callable[[Value], int] = lambda _: 1,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_weight = max_weight
        self._stale_s = stale_s
        self._weigh = weigh
        self._weight = 0
        self._known: OrderedDict[Hashable, tuple[float, Value, int]] = OrderedDict()  # fresh until, value, weight
        self._unknown: OrderedDict[Hashable, float] = OrderedDict()  # fresh until
        self._changes = 0  # of which this worker knows

    async def get(self, key: Hashable) -> Value | None:
        """The remembered value while it is fresh, else the fetched one. Raises what the fetch raises."""
        now, changes = self._clock(), self._changes
        entry = self._known.get(key)
        if entry is not None and entry[0] > now:
            self._known.move_to_end(key)
            return entry[1]
        if self._unknown.get(key, 0.0) > now:
            return None
        try:
            value = await self._fetch(key)
        except Unavailable:
            entry = self._known.get(key)
            if entry is not None and entry[0] + self._stale_s > self._clock():
                return entry[1]
            raise
        if changes == self._changes:  # else the fetch may have seen the old state
            self._keep(key, value, now + self._ttl_s)
        return value

    def forget(self, key: Hashable) -> None:
        """It changed: ask the store next time."""
        self._changes += 1
        self._drop(key)

    def clear(self) -> None:
        """Anything may have changed."""
        self._changes += 1
        self._known.clear()
        self._unknown.clear()
        self._weight = 0

    def _keep(self, key: Hashable, value: Value | None, fresh_until: float) -> None:
        self._drop(key)
        if value is None:
            self._unknown[key] = fresh_until
            if len(self._unknown) > MAX_UNKNOWN:
                self._unknown.popitem(last=False)
            return
        weight = self._weigh(value)
        self._known[key] = (fresh_until, value, weight)
        self._weight += weight
        while self._weight > self._max_weight:
            self._weight -= self._known.popitem(last=False)[1][2]

    def _drop(self, key: Hashable) -> None:
        self._unknown.pop(key, None)
        entry = self._known.pop(key, None)
        if entry is not None:
            self._weight -= entry[2]
