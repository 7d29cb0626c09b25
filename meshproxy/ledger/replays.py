"""Idempotency-Keys: which request owns a key, and the parts of its answer, for repeats of the request.

A record has the key's owner and the state of the answer. The parts are a separate list named by the owner, so that a
reader never mixes two answers. Both expire; a running request's expire sooner than a finished answer's.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from meshproxy.ledger.records import AccountKeys
from meshproxy.ledger.store import Argument, Script, Store

State = Literal["claimed", "running", "finished", "lost", "conflict", "full"]
Conclusion = Literal["running", "finished", "lost", "failed"]

FAILED_TTL_MS = 10_000  # long enough for attached readers to see the failure

_STATES: tuple[State, ...] = ("claimed", "running", "finished", "lost", "conflict", "full")


class Claim(Struct, frozen=True):
    """The result of a claim: its state, and the owner's hold id (the claimant's own if the state is `claim_by`)."""

    state: State
    owner: str
    record: str
    parts: str
    account: str


class Replays:
    """The Idempotency-Keys of all accounts in one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._append = Script.load("append")
        self._claim = Script.load("claim")
        self._conclude = Script.load("conclude")

    async def claim(self, requested: Claim, digest: str, ttl_ms: int, *, most_keys: int, most_bytes: int) -> Claim:
        """Claim the Idempotency-Key of `requested` (made by `claim_by`) for a request body with this `body_digest`.

        `most_keys` and `most_bytes` bound one account; an account that has reached either gets the state `full`.
        """
        names = AccountKeys(requested.account)
        keys = [requested.record, names.replays, names.replay_sizes]
        args: list[Argument] = [requested.owner, digest, ttl_ms, most_keys, most_bytes]
        state, found = await self._store.run(self._claim, keys, args)
        owner = found.decode()
        return Claim(_STATES[state], owner, requested.record, names.replay_parts(owner), requested.account)

    @staticmethod
    def claim_by(account: str, key_id: str, name: str, owner: str) -> Claim:
        """Make the claim as it would be if `owner` has the key."""
        names = AccountKeys(account)
        record = names.replay(key_id, hashlib.sha256(name.encode()).hexdigest())
        return Claim("claimed", owner, record, names.replay_parts(owner), account)

    async def append(self, claim: Claim, parts: Sequence[bytes], ttl_ms: int) -> None:
        """Append parts of the answer."""
        keys = [claim.parts, AccountKeys(claim.account).replay_sizes]
        await self._store.run(self._append, keys, [ttl_ms, claim.owner, *parts])

    async def conclude(self, claim: Claim, state: Conclusion, ttl_ms: int) -> None:
        """Record the state of the answer."""
        names = AccountKeys(claim.account)
        keys = [claim.record, claim.parts, names.replays, names.replay_sizes]
        await self._store.run(self._conclude, keys, [claim.owner, state, ttl_ms])

    async def read(self, claim: Claim, start: int) -> tuple[str | None, list[bytes]]:
        """Return the state and the parts from `start` on. No parts follow `finished`. None: the record is gone."""
        (owner, state), parts = await asyncio.gather(
            self._store.execute("HMGET", claim.record, "owner", "state"),
            self._store.execute("LRANGE", claim.parts, start, -1),
        )
        return (state.decode() if owner == claim.owner.encode() else None), parts


def body_digest(body: bytes) -> str:
    """Return the SHA-256 (hex) that identifies a request's body."""
    return hashlib.sha256(body).hexdigest()
