"""Where templates are kept: one hash of records by id and one of ids by name, for each owner and for the global ones."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import msgspec
from msgspec import Struct

from meshproxy.errors import Fault, Source, invalid
from meshproxy.ledger.cache import Cache
from meshproxy.ledger.keyspace import GLOBAL, AccountKeys
from meshproxy.ledger.scripts import Script
from meshproxy.ledger.store import Store, StoreError
from meshproxy.policy.template import Template

Record = TypeVar("Record")

MAX_TEMPLATES = 1000  # of one owner
MAX_OWNER_BYTES = 16_777_216  # of their JSON
LISTED_TOGETHER = 8  # of up to a megabyte each
MAX_CACHED_BYTES = 67_108_864  # of JSON, in one worker

MAX_CHANGES = 16  # attempts to change a record that others change too
FORMAT = 1  # of a record; one without a version is of the first

_VERSION = re.compile(rb'\{"v":(\d+),')
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_UUID = re.compile(r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}")


class Templates:
    """The templates of a store, cached as the directory's keys are. `clock` is monotonic, in seconds."""

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
        """The account's own template of this name or UUID, else the global one."""
        return await self._cache.get((account, name_or_id)) if _NAME.fullmatch(name_or_id) else None

    async def list(self, account: str) -> AsyncIterator[Template]:
        """The account's own and the global ones, by name. Only one of them is taken apart at a time, and the loop turns between:
        all together are 32 MB at most.
        """
        owners = [AccountKeys(owner) for owner in dict.fromkeys((account, GLOBAL))]
        names = await asyncio.gather(*(self._store.execute("HGETALL", owner.template_names) for owner in owners))
        found = sorted(
            (name, is_global, id_)
            for is_global, flat in enumerate(names)
            for name, id_ in zip(flat[::2], flat[1::2], strict=True)
        )
        for first in range(0, len(found), LISTED_TOGETHER):
            some = found[first : first + LISTED_TOGETHER]
            records = await asyncio.gather(
                *(self._store.execute("HGET", owners[is_global].templates, id_) for _, is_global, id_ in some)
            )
            for record in records:
                if record is not None:  # deleted meanwhile
                    yield decode(record, Template)
                    await asyncio.sleep(0)

    async def put(self, template: Template) -> bool:
        """Store a new template or a new version of one; False if another of this owner's has the name.

        Fault `validation_error` if the owner has as many as are allowed.
        """
        return await self._store_as(template) == b"stored"

    async def change(self, template: Template, change: Callable[[Template], Template]) -> Template | None:
        """Apply a change to the template as it is stored now, so that no concurrent change is undone; the new version, None if
        it was deleted. ValueError if another of its owner's has the name; Fault as of `put`.
        """
        key = _keys(template)[1]
        for _ in range(MAX_CHANGES):
            record = await self._store.execute("HGET", key, template.id)
            if record is None:
                return None
            changed = change(decode(record, Template))
            outcome = await self._store_as(changed, record)
            if outcome == b"taken":
                raise ValueError(f"There is a template `{changed.name}` already.")
            if outcome == b"stored":
                return changed
        raise StoreError("RACE", f"{template.id} was changed by others {MAX_CHANGES} times meanwhile")

    async def _store_as(self, template: Template, before: bytes = b"") -> bytes:
        """The outcome of put_template.lua; Fault if there is no room."""
        args = (template.id, template.name, encode(template), MAX_TEMPLATES, MAX_OWNER_BYTES, before)
        outcome = bytes(await self._store.run(self._put, _keys(template), args))
        self._cache.clear()
        if outcome == b"full":
            most = f"{MAX_TEMPLATES} templates and {MAX_OWNER_BYTES} bytes"
            raise Fault(Source.CLIENT, invalid(f"There is no room for this template: {most} in all are the most."))
        return outcome

    async def delete(self, template: Template) -> bool:
        """Remove a template; False if it was gone already."""
        removed = await self._store.run(self._delete, _keys(template), [template.id])
        self._cache.clear()
        return bool(removed)

    async def _fetch(self, key: tuple[str, str]) -> Template | None:
        account, name_or_id = key
        owners = [AccountKeys(account), AccountKeys(GLOBAL)]
        if _UUID.fullmatch(name_or_id):
            ids: list[bytes | None] = [name_or_id.lower().encode()] * 2
        else:
            ids = await asyncio.gather(*(self._store.execute("HGET", o.template_names, name_or_id) for o in owners))
        pairs = zip(owners, ids, strict=True)
        records = await asyncio.gather(*(self._store.execute("HGET", o.templates, found or b"") for o, found in pairs))
        return next((decode(record, Template) for record in records if record is not None), None)


def _keys(template: Template) -> list[str]:
    owner = AccountKeys(GLOBAL if template.owner is None else template.owner)
    return [owner.template_names, owner.templates]


def encode(record: Struct) -> bytes:
    """A record as it is stored: JSON, whose `v` is the version of its form."""
    text = msgspec.json.encode(record)
    return b'{"v":%d,%b' % (FORMAT, text[1:])


def decode(record: bytes, kind: type[Record]) -> Record:
    """A record of the directory; StoreError if it is none, or one of a newer version."""
    version = _VERSION.match(record)
    if version is not None and int(version[1]) > FORMAT:
        raise StoreError("RECORD", "a record of the directory is of a newer version")
    try:
        return msgspec.json.decode(record, type=kind)
    except msgspec.DecodeError as error:
        raise StoreError("RECORD", f"a record of the directory can't be read: {error}") from error
