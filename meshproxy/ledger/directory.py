"""Accounts, keys and templates: stored in Redis as JSON, and looked up through a cache in each worker.

A key's secret isn't stored. Its record is stored under the SHA-256 of the secret, so a look-up has no comparison whose
time could leak, and reading the store yields no secret. A secret has 256 random bits, so it needs no slow hash.

A change here (a revocation, a limit, a template) is seen by every worker within `ttl_s`, and by this one at once.
Look-ups return records of every status: policy decides what a status permits.
"""

import asyncio
import hashlib
import math
import re
import secrets
import string
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from meshproxy.errors import ErrorResponse, GatewayError, Source
from meshproxy.ledger.records import ACCOUNTS, AUDIT, KEY_IDS, AccountKeys, AuditEvent, decode, encode, key_record
from meshproxy.ledger.store import Contended, Script, Store, batches, pairs
from meshproxy.ledger.templates import Cache, Templates, attempts
from meshproxy.policy.principal import ACCOUNT_NAME, Account, Key, Principal, Status, check_account_name

TTL_S = 1.0
MAX_PRINCIPALS = 16_384  # cached in one worker
MAX_ROTATIONS = 8  # followed in one look-up
ROTATED = b'{"rotated_to":'  # the first bytes of the record of a rotated secret
RUNNING = 11  # index in balance.lua's reply: the account's running requests
BATCH = 500  # records whose commands share one write
SCANNED = 1000  # keys of the store that one call scans when an account is deleted
AUDIT_KEPT = 100_000  # events, roughly (XADD MAXLEN ~)
SECRET_PREFIX = "rsk_"  # noqa: S105 - a prefix is not a secret
SECRET_CHARACTERS = 43  # of base 62: 256 bits
ID_CHARACTERS = 16  # of base 62: 95 bits

_BASE_62 = string.ascii_letters + string.digits
_ID = re.compile(r"[A-Za-z0-9_]{1,64}")

Fields = Mapping[str, Any]
_ACTIONS: Mapping[Status, str] = {"active": "resume", "suspended": "suspend", "revoked": "revoke"}


class _Forward(Struct):
    """The fields read from a rotated secret's record.

    `rotated_to` is the digest of the secret that replaced it. `works_until`: Unix seconds; None in records of older
    releases, which end by their expiry alone.
    """

    id: str
    rotated_to: str
    works_until: float | None = None


class _StoredKey(Struct, frozen=True):
    """A key's record, and the digests on the way to it: the last one is its own, those before were rotated."""

    digests: list[str]
    record: bytes


class Directory:
    """Look-ups and changes. `clock` is monotonic, `wall_clock` is Unix time, both in seconds.

    `stale_s`: how much longer than `ttl_s` a cached key or template is served while the store is unavailable.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
        *,
        wall_clock: Callable[[], float] = time.time,
        ttl_s: float = TTL_S,
        stale_s: float = 0.0,
    ) -> None:
        self._store = store
        self._wall_clock = wall_clock
        self.templates = Templates(store, clock, ttl_s=ttl_s, stale_s=stale_s)
        self._replace = Script.load("replace")
        self._repoint = Script.load("repoint")
        self._erase = Script.load("erase")
        self._balance = Script.load("balance")
        self._principals: Cache[Principal] = Cache(
            self._fetch_principal, clock=clock, ttl_s=ttl_s, stale_s=stale_s, max_weight=MAX_PRINCIPALS
        )

    async def principal(self, secret: str) -> Principal | None:
        """Return the caller with this secret, whatever the key's status; None if it is unknown. Raises Unavailable."""
        return await self._principals.get(digest_of(secret))

    async def create_key(self, account: str, *, actor: str = "", **fields: Any) -> tuple[str, Key]:
        """Mint a key, and create its account if there is none. `fields` are those of policy.principal.Key.

        Returns the secret, which is stored nowhere, and the key. Raises ValueError for an invalid account name.
        """
        check_account_name(account)
        secret, created_at = mint_secret(), self._wall_clock()
        key = Key("key_" + _random(ID_CHARACTERS), account, created_at, hint=_hint(secret), **fields)
        await self._add(key, digest_of(secret))
        fields = _changes(Key(key.id, account, created_at), key)
        await self.append_audit_event(actor, "key.create", key.id, account, fields)
        return secret, key

    async def find_key(self, reference: str) -> Key | None:
        """Find a key by id, by an unambiguous beginning of an id, or by secret. None if there is none or several."""
        if reference.startswith(SECRET_PREFIX):
            return await self._key(digest_of(reference))
        if not _ID.fullmatch(reference):
            return None
        stored = await self._stored(reference)
        if stored is None:
            matches = await self._key_ids(f"{reference}*", enough=2)
            stored = await self._stored(next(iter(matches)).decode()) if len(matches) == 1 else None
        return None if stored is None else decode(stored.record, Key)

    async def list_keys(self, account: str | None = None) -> list[Key]:
        """Return the keys of one account or of all, oldest first."""
        if account is None:
            digests = await self._key_ids("*")
        else:
            digests = dict(pairs(await self._store.execute("HGETALL", AccountKeys(account).keys)))
        records = await self._values([key_record(digest.decode()) for digest in digests.values()])
        keys = []
        for key_id, record in zip(digests, records, strict=True):
            if record is not None and record.startswith(ROTATED):  # of an interrupted rotation
                stored = await self._stored(key_id.decode())
                record = None if stored is None else stored.record  # noqa: PLW2901 - the one in force
            if record is not None:
                keys.append(decode(record, Key))
        return sorted(keys, key=lambda key: (key.created_at, key.id))

    async def change_key(
        self, key_id: str, change: Callable[[Key], Key], *, actor: str = "", action: str = "key.update"
    ) -> Key | None:
        """Apply a change to a key's record as it is stored now, so that no concurrent change is undone.

        Returns the new record, or None if there is no such key. Exceptions of `change` pass through. Raises
        GatewayError `key_revoked` if the change would undo a revocation.
        """
        async for _ in attempts():
            stored = await self._stored(key_id)
            if stored is None:
                return None
            record = stored.record
            key = decode(record, Key)
            changed = change(key)
            if key.status == "revoked" and changed.status != "revoked":
                raise _revoked(key)
            if changed == key:
                return key
            if await self._store.run(
                self._replace, [key_record(stored.digests[-1])], [record, encode(changed, record)]
            ):
                self._principals.clear()
                await self.append_audit_event(actor, action, key.id, key.account, _changes(key, changed))
                return changed
        raise Contended(key_id)

    async def set_key_status(self, key_id: str, status: Status, *, actor: str = "") -> Key | None:
        """Suspend, resume ("active") or revoke a key. None: no such key. Raises as `change_key`."""
        action = f"key.{_ACTIONS[status]}"
        return await self.change_key(key_id, lambda key: replace(key, status=status), actor=actor, action=action)

    async def rotate_key(self, key_id: str, *, grace_s: float = 0, actor: str = "") -> tuple[str, Key] | None:
        """Give a key a new secret; the old one works for `grace_s` more. The key's id, limits, budgets and spend stay.

        Returns the secret, which is stored nowhere, and the key; None if there is no such key. Raises GatewayError
        `key_revoked` for a revoked key.

        The records and the indices are in different slots of a Cluster, so no script writes them together. The one
        write that rotates is the old secret's record: it then names the new one, and until when it works itself. If
        the process dies after it, the old secret still ends in time, and the next read by id completes the indices.
        """
        async for _ in attempts():
            stored = await self._stored(key_id)
            if stored is None:
                return None
            old, record = stored.digests[-1], stored.record
            key = decode(record, Key)
            if key.status == "revoked":
                raise _revoked(key)
            secret = mint_secret()
            new, key = digest_of(secret), replace(key, hint=_hint(secret))
            text = encode(key, record)
            await self._store.execute("SET", key_record(new), text)
            forward = b'{"rotated_to":"%b","works_until":%f,%b' % (new.encode(), self._wall_clock() + grace_s, text[1:])
            if await self._store.run(self._replace, [key_record(old)], [record, forward]):
                await self._finish_rotation(_StoredKey([old, new], text))
                await self.append_audit_event(actor, "key.rotate", key.id, key.account, {"grace_s": grace_s})
                return secret, key
            await self._store.execute("DEL", key_record(new))  # the record was changed: rotate the changed one
        raise Contended(key_id)

    async def _finish_rotation(self, stored: _StoredKey) -> None:
        """Point the indices to a rotated key's present record, and let the old secrets' records end with their grace.

        Concurrent rotations of a key may do this in any order: an index never goes back to an older digest.
        """
        *rotated, present = stored.digests
        key = decode(stored.record, Key)
        for index in (AccountKeys(key.account).keys, KEY_IDS):  # KEY_IDS last: `_stored` begins there
            await self._store.run(self._repoint, [index], [key.id, present, *rotated])
        for digest in rotated:
            record = await self._store.execute("GET", key_record(digest))
            until = None if record is None else decode(record, _Forward).works_until
            if until is not None:  # a time that isn't positive deletes the record now
                await self._store.execute("PEXPIRE", key_record(digest), int((until - self._wall_clock()) * 1000))
        self._principals.clear()

    async def account(self, name: str) -> Account | None:
        """Return an account's record, or None if there is no such account."""
        if not ACCOUNT_NAME.fullmatch(name):
            return None
        record = await self._store.execute("GET", AccountKeys(name).record)
        if record is None:  # an account that was only granted credit has no record
            is_known = await self._store.execute("SISMEMBER", ACCOUNTS, name)
            return Account(name) if is_known else None
        return decode(record, Account)

    async def list_accounts(self) -> list[Account]:
        """Return all accounts by name, including those that were only granted credit."""
        return await self.accounts(sorted(name.decode() for name in await self._store.execute("SMEMBERS", ACCOUNTS)))

    async def accounts(self, names: Sequence[str]) -> list[Account]:
        """Return the records of accounts that exist, in the order of their names."""
        records = await self._values([AccountKeys(name).record for name in names])
        pairs = zip(names, records, strict=True)
        return [Account(name) if record is None else decode(record, Account) for name, record in pairs]

    async def ensure_account(self, name: str, *, actor: str = "") -> Account:
        """Return an account, created if there is none. Raises ValueError for an invalid name."""
        check_account_name(name)
        made = await self._store.execute("SET", AccountKeys(name).record, encode(Account(name)), "NX")
        await self._store.execute("SADD", ACCOUNTS, name)
        if made is not None:
            await self.append_audit_event(actor, "account.create", name, name, {})
        return await self.account(name) or Account(name)

    async def change_account(
        self, name: str, change: Callable[[Account], Account], *, actor: str = "", action: str = "account.update"
    ) -> Account | None:
        """Apply a change to an account's record as stored now. Return the new record, None: no such account."""
        record_name = AccountKeys(name).record
        async for _ in attempts():
            record = await self._store.execute("GET", record_name)
            if record is None:
                if await self.account(name) is None:
                    return None
                await self.ensure_account(name, actor=actor)
                continue
            before = decode(record, Account)
            changed = change(before)
            if changed == before:
                return before
            if await self._store.run(self._replace, [record_name], [record, encode(changed, record)]):
                self._principals.clear()
                await self.append_audit_event(actor, action, name, name, _changes(before, changed))
                return changed
        raise Contended(name)

    async def set_account_status(self, name: str, status: Status, *, actor: str = "") -> Account | None:
        """Suspend or resume ("active") an account and all its keys. Return None if there is no such account."""
        action = f"account.{_ACTIONS[status]}"
        return await self.change_account(
            name, lambda account: replace(account, status=status), actor=actor, action=action
        )

    async def delete_account(self, name: str, *, actor: str = "") -> int | None:
        """Delete an account and everything that Redis has of it: keys, credit, history, usage, templates.

        Its name can be used again. Returns the number of deleted Redis keys; None if there is no such account. Raises
        GatewayError `account_busy` while its requests hold credit: suspend it, and delete it when they have ended.
        """
        if await self.account(name) is None:
            return None
        names = AccountKeys(name)
        balance = await self._store.run(self._balance, names.script_keys, [-1] * 10)  # also releases expired holds
        if balance[RUNNING]:
            message = f"{name} has requests in flight: suspend it, and delete it when they are over"
            raise client_error(409, "account_busy", message)
        ids = dict(pairs(await self._store.execute("HGETALL", names.keys)))
        for key_id, digest in ids.items():
            await self._store.execute("DEL", key_record(digest.decode()))
            await self._store.execute("HDEL", KEY_IDS, key_id)
        removed, cursor = len(ids), b"0"
        while True:
            args = (cursor, f"{names.root}*", SCANNED)
            cursor, count = await self._store.run(self._erase, [names.credit], args)
            removed += int(count)
            if cursor == b"0":
                break
        await self._store.execute("SREM", ACCOUNTS, name)
        self._principals.clear()
        await self.append_audit_event(actor, "account.delete", name, name, {"keys": len(ids)})
        return removed

    async def audit(self, limit: int = 1000) -> list[AuditEvent]:
        """Return the latest changes, newest first."""
        entries = await self._store.execute("XREVRANGE", AUDIT, "+", "-", "COUNT", limit)
        return [AuditEvent(**_texts(flat), at_ms=int(entry_id.partition(b"-")[0])) for entry_id, flat in entries]

    async def append_audit_event(self, actor: str, action: str, target: str, account: str, detail: Fields) -> None:
        """Append an audit event. `detail`: what changed, without secrets."""
        fields = ("actor", actor, "action", action, "target", target, "account", account)
        text = msgspec.json.encode(detail)
        await self._store.execute("XADD", AUDIT, "MAXLEN", "~", AUDIT_KEPT, "*", *fields, "detail", text, "v", 1)

    async def _add(self, key: Key, digest: str) -> None:
        """Store a new key, its record last: if this is interrupted, the key doesn't work and listings skip it."""
        names = AccountKeys(key.account)
        await asyncio.gather(
            self._store.execute("SET", names.record, encode(Account(key.account)), "NX"),
            self._store.execute("SADD", ACCOUNTS, key.account),
            self._store.execute("HSET", KEY_IDS, key.id, digest),
            self._store.execute("HSET", names.keys, key.id, digest),
        )
        await self._store.execute("SET", key_record(digest), encode(key))
        self._principals.forget(digest)

    async def _stored(self, key_id: str) -> _StoredKey | None:
        """Return a key's record by its whole id. Completes a rotation that was interrupted."""
        digest = await self._store.execute("HGET", KEY_IDS, key_id)
        stored = None if digest is None else await self._follow(digest.decode())
        if stored is not None and len(stored.digests) > 1:
            await self._finish_rotation(stored)
        return stored

    async def _follow(self, digest: str, *, of_secret: bool = False) -> _StoredKey | None:
        """Return a key's record, following rotations from `digest`. `of_secret`: only while that secret works."""
        digests = [digest]
        for _ in range(MAX_ROTATIONS):
            record: bytes | None = await self._store.execute("GET", key_record(digest))
            if record is None or not record.startswith(ROTATED):
                return None if record is None else _StoredKey(digests, record)
            forward = decode(record, _Forward)
            if of_secret and len(digests) == 1 and (forward.works_until or math.inf) <= self._wall_clock():
                return None
            digest = forward.rotated_to
            if not await self._store.execute("EXISTS", key_record(digest)):  # rotated again, and that grace has ended
                present = await self._store.execute("HGET", KEY_IDS, forward.id)
                if present is None:
                    return None
                digest = present.decode()
            digests.append(digest)
        return None

    async def _fetch_principal(self, digest: str) -> Principal | None:
        key = await self._key(digest)
        if key is None:
            return None
        return Principal(key, await self.account(key.account) or Account(key.account))

    async def _key(self, digest: str) -> Key | None:
        stored = await self._follow(digest, of_secret=True)
        return None if stored is None else decode(stored.record, Key)

    async def _key_ids(self, pattern: str, enough: int | None = None) -> dict[bytes, bytes]:
        """Return digests by key id. Stops once there are `enough`."""
        digests: dict[bytes, bytes] = {}
        cursor: bytes = b"0"
        while True:
            cursor, flat = await self._store.execute("HSCAN", KEY_IDS, cursor, "MATCH", pattern, "COUNT", BATCH)
            digests.update(pairs(flat))
            if cursor == b"0" or (enough is not None and len(digests) >= enough):
                return digests

    async def _values(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the values of these names, None for those that don't exist."""
        values: list[bytes | None] = []
        for batch in batches(names, BATCH):
            values += await asyncio.gather(*(self._store.execute("GET", name) for name in batch))
        return values


def client_error(status: int, code: str, message: str) -> GatewayError:
    """Build an error of who uses the directory."""
    return GatewayError(Source.CLIENT, ErrorResponse(status, code, message))


def _revoked(key: Key) -> GatewayError:
    return client_error(409, "key_revoked", f"{key.id} is revoked, which can't be taken back")


def _texts(flat: Sequence[bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in pairs(flat) if name != b"v"}


def _changes(before: Struct, after: Struct) -> dict[str, Any]:
    """Return the fields that differ, with their new values."""
    old, new = msgspec.to_builtins(before), msgspec.to_builtins(after)
    return {name: new.get(name) for name in {**old, **new} if old.get(name) != new.get(name)}


def _hint(secret: str) -> str:
    """Return the part of a secret that may be shown."""
    return f"{secret[:8]}...{secret[-4:]}"


def digest_of(secret: str) -> str:
    """Return the SHA-256 (hex) of a secret, under which its key's record is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def mint_secret() -> str:
    """Return a new secret."""
    return SECRET_PREFIX + _random(SECRET_CHARACTERS)


def _random(characters: int) -> str:
    return "".join(secrets.choice(_BASE_62) for _ in range(characters))
