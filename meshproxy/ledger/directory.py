"""Who exists: accounts, keys and templates, kept in Redis as JSON and looked up through a cache in the worker.

A key's secret is stored nowhere. Its record lies under the SHA-256 of the secret, so looking it up compares nothing that a clock
could measure, and whoever reads the store can't call as anybody. A secret has 256 random bits: it needs no slow hash.

What changes here (a revocation, a limit, a template) is seen by every worker within `ttl_s`, by this one at once. Records are
returned whatever their status: policy decides.
"""

import asyncio
import hashlib
import re
import secrets
import string
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from meshproxy.ledger.cache import Cache
from meshproxy.ledger.keyspace import ACCOUNTS, KEY_IDS, AccountKeys, key_record
from meshproxy.ledger.store import Store
from meshproxy.ledger.templates import Templates, decode
from meshproxy.policy.principal import Account, Key, Principal

__all__ = ["Directory", "check_account_name", "digest_of", "mint_secret"]

TTL_S = 1.0
MAX_PRINCIPALS = 16_384  # cached in one worker
BATCH = 500  # records read in one write
SECRET_PREFIX = "rsk_"  # noqa: S105 - how a secret begins is none
SECRET_CHARACTERS = 43  # of base 62: 256 bits
ID_CHARACTERS = 16  # of base 62: 95 bits

_BASE_62 = string.ascii_letters + string.digits
_ACCOUNT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ID = re.compile(r"[A-Za-z0-9_]{1,64}")

Record = TypeVar("Record", Account, Key)


class Directory:
    """Lookups and changes. `clock` is monotonic, `wall_clock` Unix time, both in seconds.

    `stale_s`: how much longer than `ttl_s` a known key or template is served while the store is unavailable.
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
        templates = Templates(store, clock, ttl_s=ttl_s, stale_s=stale_s)
        self.template, self.list_templates = templates.find, templates.list
        self.put_template, self.delete_template = templates.put, templates.delete
        self._principals: Cache[Principal] = Cache(
            self._fetch_principal, clock=clock, ttl_s=ttl_s, stale_s=stale_s, max_weight=MAX_PRINCIPALS
        )

    async def principal(self, secret: str) -> Principal | None:
        """Who calls with this secret, whatever the key's status; None for an unknown one. Raises Unavailable."""
        return await self._principals.get(digest_of(secret))

    async def create_key(self, account: str, **fields: Any) -> tuple[str, Key]:
        """Mint a key, and its account with its first key. `fields` are the record's own (policy.principal.Key). The secret is in
        this answer and nowhere else.
        """
        check_account_name(account)
        secret, created_at = mint_secret(), self._wall_clock()
        hint = f"{secret[:8]}...{secret[-4:]}"
        key = Key("key_" + _random(ID_CHARACTERS), account, created_at, hint=hint, **fields)
        await self._add(key, digest_of(secret))
        return secret, key

    async def find_key(self, wanted: str) -> Key | None:
        """The key of an id, of a beginning that no other id has, or of a secret; None if there is none or more than one."""
        if wanted.startswith(SECRET_PREFIX):
            return await self._key(digest_of(wanted))
        if not _ID.fullmatch(wanted):
            return None
        digest = await self._store.execute("HGET", KEY_IDS, wanted)
        if digest is None:
            matches = await self._key_ids(f"{wanted}*", enough=2)
            digest = next(iter(matches.values())) if len(matches) == 1 else None
        return None if digest is None else await self._key(digest.decode())

    async def list_keys(self, account: str | None = None) -> list[Key]:
        """The keys of one account or of all, oldest first."""
        if account is None:
            digests = list((await self._key_ids("*")).values())
        else:
            digests = await self._store.execute("HVALS", AccountKeys(account).keys)
        keys = await self._records([key_record(digest.decode()) for digest in digests], Key)
        return sorted(keys, key=lambda key: (key.created_at, key.id))

    async def update_key(self, key: Key) -> bool:
        """Replace a key's record; False if there is no such key."""
        digest = await self._store.execute("HGET", KEY_IDS, key.id)
        if digest is None:
            return False
        replaced = await self._store.execute("SET", key_record(digest.decode()), msgspec.json.encode(key), "XX")
        self._principals.forget(digest.decode())
        return replaced is not None

    async def account(self, name: str) -> Account | None:
        """An account's record."""
        if not _ACCOUNT_NAME.fullmatch(name):
            return None
        record = await self._store.execute("GET", AccountKeys(name).record)
        return None if record is None else decode(record, Account)

    async def list_accounts(self) -> list[Account]:
        """Every account, by name."""
        names = sorted(name.decode() for name in await self._store.execute("SMEMBERS", ACCOUNTS))
        return await self._records([AccountKeys(name).record for name in names], Account)

    async def put_account(self, account: Account) -> None:
        """Store an account's record, new or not. ValueError for a name that none may have."""
        check_account_name(account.name)
        await self._store.execute("SET", AccountKeys(account.name).record, msgspec.json.encode(account))
        await self._store.execute("SADD", ACCOUNTS, account.name)
        self._principals.clear()

    async def _add(self, key: Key, digest: str) -> None:
        """The record comes last: a key that this was interrupted in does not work, and listings pass it over."""
        names = AccountKeys(key.account)
        account = msgspec.json.encode(Account(key.account))
        commands = [
            self._store.execute("SET", names.record, account, "NX"),
            self._store.execute("SADD", ACCOUNTS, key.account),
            self._store.execute("HSET", KEY_IDS, key.id, digest),
            self._store.execute("HSET", names.keys, key.id, digest),
        ]
        await asyncio.gather(*commands)
        await self._store.execute("SET", key_record(digest), msgspec.json.encode(key))
        self._principals.forget(digest)

    async def _fetch_principal(self, digest: str) -> Principal | None:
        key = await self._key(digest)
        if key is None:
            return None
        return Principal(key, await self.account(key.account) or Account(key.account))

    async def _key(self, digest: str) -> Key | None:
        record = await self._store.execute("GET", key_record(digest))
        return None if record is None else decode(record, Key)

    async def _key_ids(self, pattern: str, enough: int | None = None) -> dict[bytes, bytes]:
        """Digests by key id; stops looking when there are `enough`."""
        found: dict[bytes, bytes] = {}
        cursor: bytes = b"0"
        while True:
            cursor, flat = await self._store.execute("HSCAN", KEY_IDS, cursor, "MATCH", pattern, "COUNT", BATCH)
            found.update(zip(flat[::2], flat[1::2], strict=True))
            if cursor == b"0" or (enough is not None and len(found) >= enough):
                return found

    async def _records(self, names: Sequence[str], kind: type[Record]) -> list[Record]:
        records: list[Record] = []
        for first in range(0, len(names), BATCH):
            replies = await asyncio.gather(*(self._store.execute("GET", name) for name in names[first : first + BATCH]))
            records += [decode(record, kind) for record in replies if record is not None]
        return records


def digest_of(secret: str) -> str:
    """What a key's record is stored under: the SHA-256 of its secret, in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def mint_secret() -> str:
    """A new secret."""
    return SECRET_PREFIX + _random(SECRET_CHARACTERS)


def check_account_name(name: str) -> None:
    """ValueError unless an account may have this name: it stands in key names, paths and logs."""
    if not _ACCOUNT_NAME.fullmatch(name):
        raise ValueError(
            f"{name[:80]!r}: an account's name has 1 to 64 letters, digits, `_`, `.` and `-`, and begins with a letter or digit"
        )


def _random(characters: int) -> str:
    return "".join(secrets.choice(_BASE_62) for _ in range(characters))
