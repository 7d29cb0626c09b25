"""A bounded, short-lived memory of lookups in the store, so that a busy key costs one fetch a second and not one a request.

What is found and what is not are remembered apart: a flood of names that don't exist pushes out each other and nothing else.
Age counts from the moment a fetch was asked for, so an entry is never older than its time to live. Those who miss the same entry
together share one fetch, which goes on if the first of them is cancelled.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from enum import Enum
from typing import Any, Generic, TypeVar

from meshproxy.ledger.store import Unavailable

MAX_UNKNOWN = 1024  # names remembered as not there

Value = TypeVar("Value")


class Miss(Enum):
    """The third answer beside a value and None: not known here, ask the store."""

    MISS = "miss"


MISS = Miss.MISS


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
        self._flights: dict[Hashable, asyncio.Task[Value | None]] = {}  # no more than requests in flight

    def peek(self, key: Hashable) -> Value | Miss | None:
        """The remembered value while it is fresh."""
        entry = self._known.get(key)
        if entry is not None:
            if entry[0] > self._clock():
                self._known.move_to_end(key)
                return entry[1]
        elif self._unknown.get(key, 0.0) > self._clock():
            return None
        return MISS

    async def get(self, key: Hashable) -> Value | None:
        """The remembered or fetched value. Raises what the fetch raises."""
        value = self.peek(key)
        if value is not MISS:
            return value
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._refresh(key), name="ledger-lookup")
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._landed(key, done))
        try:
            return await asyncio.shield(flight)
        except Unavailable:
            entry = self._known.get(key)
            if entry is not None and entry[0] + self._stale_s > self._clock():
                return entry[1]
            raise

    def forget(self, key: Hashable) -> None:
        """Ask the store next time. A fetch under way may have seen the old state, so its result is not kept."""
        self._drop(key)
        self._unknown.pop(key, None)
        self._flights.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        for key in {*self._known, *self._unknown, *self._flights}:
            self.forget(key)

    async def _refresh(self, key: Hashable) -> Value | None:
        fresh_until = self._clock() + self._ttl_s
        value = await self._fetch(key)
        if self._flights.get(key) is asyncio.current_task():
            self._keep(key, value, fresh_until)
        return value

    def _keep(self, key: Hashable, value: Value | None, fresh_until: float) -> None:
        self._drop(key)
        self._unknown.pop(key, None)
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
        entry = self._known.pop(key, None)
        if entry is not None:
            self._weight -= entry[2]

    def _landed(self, key: Hashable, flight: "asyncio.Task[Value | None]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # counts as seen, should every waiter be gone
