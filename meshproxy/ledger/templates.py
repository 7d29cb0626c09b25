"""Templates in the store, and `Cache`: a bounded, short-lived cache of look-ups.

With it a busy key costs one fetch per second, not one per request. Found and missing names are cached apart: a flood of
names that don't exist evicts only other such names. An entry's age counts from the start of its fetch, so an entry is
never older than its time to live.
"""

import asyncio
import random
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

import msgspec

from meshproxy.errors import GatewayError, Source, invalid
from meshproxy.ledger.records import GLOBAL, AccountKeys, decode, encode
from meshproxy.ledger.store import Contended, Script, Store, Unavailable, batches, pairs
from meshproxy.policy.template import UUID, Template
from meshproxy.units import backoff_s

MAX_UNKNOWN = 1024  # names cached as missing

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """A cache of look-ups.

    `fetch` returns one key's value from the store, None if there is none. `weigh` gives a value's weight.

    The weights of all values stay within `max_weight`. `stale_s`: while the store is unavailable, values this much
    older than `ttl_s` are still returned.
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
        self._changes = 0  # count of invalidations

    async def get(self, key: Hashable) -> Value | None:
        """Return the cached value while it is fresh, else fetch it. Raises what the fetch raises."""
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
        if changes == self._changes:  # otherwise the fetch may have seen the old state
            self._keep(key, value, now + self._ttl_s)
        return value

    def forget(self, key: Hashable) -> None:
        """Drop one key's entry: the next `get` fetches it."""
        self._changes += 1
        self._drop(key)

    def clear(self) -> None:
        """Drop all entries."""
        self._changes += 1
        self._known.clear()
        self._unknown.clear()
        self._weight = 0

    def _keep(self, key: Hashable, value: Value | None, fresh_until: float) -> None:
        """Cache a value or its absence, evicting the least recently used."""
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


MAX_TEMPLATES = 1000  # of one owner
MAX_OWNER_BYTES = 16_777_216  # of one owner's templates, as JSON
LISTED_TOGETHER = 8  # templates read together, of up to a megabyte each
MAX_CACHED_BYTES = 67_108_864  # of JSON, in one worker

MAX_CHANGES = 16  # attempts to change a record that others change too

FIRST_PAUSE_S = 0.002  # before the second attempt
MAX_PAUSE_S = 0.05

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


async def attempts() -> AsyncIterator[int]:
    """Yield the numbers of the attempts to change a record, with a random pause before each but the first."""
    for number in range(MAX_CHANGES):
        if number:
            pause_s = backoff_s(number, FIRST_PAUSE_S, MAX_PAUSE_S)
            await asyncio.sleep(random.uniform(0, pause_s))  # noqa: S311 - jitter is no secret
        yield number


class Templates:
    """The templates of a store, cached like the directory's keys. `clock` is monotonic, in seconds."""

    def __init__(self, store: Store, clock: Callable[[], float], *, ttl_s: float, stale_s: float) -> None:
        self._store = store
        self._put = Script.load("put_template")
        self._delete = Script.load("delete_template")
        self._cache: Cache[Template] = Cache(
            self._fetch,
            clock=clock,
            ttl_s=ttl_s,
            stale_s=stale_s,
            max_weight=MAX_CACHED_BYTES,
            weigh=lambda template: len(msgspec.json.encode(template)),
        )

    async def find(self, account: str, name_or_id: str) -> Template | None:
        """Return the account's own template of this name or UUID, else the global one."""
        return await self._cache.get((account, name_or_id)) if _NAME.fullmatch(name_or_id) else None

    async def list(self, account: str) -> AsyncIterator[Template]:
        """Yield the account's own templates and the global ones, by name.

        Decodes one template at a time and yields to the event loop between them: all together may be 32 MB.
        """
        owners = [AccountKeys(owner) for owner in dict.fromkeys((account, GLOBAL))]
        names = await asyncio.gather(*(self._store.execute("HGETALL", owner.template_names) for owner in owners))
        listed = sorted((name, is_global, id_) for is_global, flat in enumerate(names) for name, id_ in pairs(flat))
        for batch in batches(listed, LISTED_TOGETHER):
            records = await asyncio.gather(
                *(self._store.execute("HGET", owners[is_global].templates, id_) for _, is_global, id_ in batch)
            )
            for record in records:
                if record is not None:  # None: deleted meanwhile
                    yield decode(record, Template)
                    await asyncio.sleep(0)

    async def put(self, template: Template) -> bool:
        """Store a new template or a new version of one. Return False if another template of this owner has the name.

        Raises GatewayError `validation_error` if the owner has reached its bounds.
        """
        return await self._store_as(template) == b"stored"

    async def change(self, template: Template, change: Callable[[Template], Template]) -> Template | None:
        """Apply a change to the template as it is stored now, so that no concurrent change is undone.

        Returns the new version, or None if the template was deleted. Raises ValueError if another template of its owner
        has the name, and GatewayError as `put` does.
        """
        key = _keys(template)[1]
        async for _ in attempts():
            record = await self._store.execute("HGET", key, template.id)
            if record is None:
                return None
            changed = change(decode(record, Template))
            outcome = await self._store_as(changed, record)
            if outcome == b"taken":
                raise ValueError(f"There is a template `{changed.name}` already.")
            if outcome == b"stored":
                return changed
        raise Contended(template.id)

    async def _store_as(self, template: Template, before: bytes = b"") -> bytes:
        """Return the outcome of put_template.lua. Raises GatewayError if there is no room."""
        args = (template.id, template.name, encode(template, before), MAX_TEMPLATES, MAX_OWNER_BYTES, before)
        outcome = bytes(await self._store.run(self._put, _keys(template), args))
        self._cache.clear()
        if outcome == b"full":
            most = f"{MAX_TEMPLATES} templates and {MAX_OWNER_BYTES} bytes"
            raise GatewayError(
                Source.CLIENT, invalid(f"There is no room for this template: {most} in all are the most.")
            )
        return outcome

    async def delete(self, template: Template) -> bool:
        """Delete a template. Return False if there was none."""
        removed = await self._store.run(self._delete, _keys(template), [template.id])
        self._cache.clear()
        return bool(removed)

    async def _fetch(self, key: tuple[str, str]) -> Template | None:
        """Read a template by UUID or name: the account's own, else the global one."""
        account, name_or_id = key
        owners = [AccountKeys(account), AccountKeys(GLOBAL)]
        if re.fullmatch(UUID, name_or_id):
            ids: list[bytes | None] = [name_or_id.lower().encode()] * 2
        else:
            ids = await asyncio.gather(
                *(self._store.execute("HGET", owner.template_names, name_or_id) for owner in owners)
            )
        pairs = zip(owners, ids, strict=True)
        records = await asyncio.gather(
            *(self._store.execute("HGET", owner.templates, id_ or b"") for owner, id_ in pairs)
        )
        return next((decode(record, Template) for record in records if record is not None), None)


def _keys(template: Template) -> list[str]:
    owner = AccountKeys(GLOBAL if template.owner is None else template.owner)
    return [owner.template_names, owner.templates]
