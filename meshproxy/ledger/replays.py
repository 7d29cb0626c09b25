"""Idempotency keys: which request has one, and the answer it got, part by part, for whoever asks the same again.

A record says who owns the key and how far the answer is; the parts of the answer are a list of its own, named by the owner, so
that a reader never mixes two answers. Both vanish after their time to live, a running request's sooner than an answer's.
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

FAILED_TTL_MS = 10_000  # long enough for whoever is attached to hear of it

_STATES: tuple[State, ...] = ("claimed", "running", "finished", "lost", "conflict", "full")


class Claim(Struct, frozen=True):
    """What became of a claim: `state`, and the owner's id, which is the claimant's own if it was `claimed`."""

    state: State
    owner: str
    record: str
    parts: str
    account: str


class Replays:
    """The records of every account over one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._append = Script.load("append")
        self._claim = Script.load("claim")
        self._conclude = Script.load("conclude")

    async def claim(self, wanted: Claim, digest: str, ttl_ms: int, *, most_keys: int, most_bytes: int) -> Claim:
        """Claim the Idempotency-Key of a `claimed()` for a request body, by its `body_digest`. `most_keys`, `most_bytes`: of one
        account; where it has as many, the state is `full`.
        """
        names = AccountKeys(wanted.account)
        keys = [wanted.record, names.replays, names.replay_sizes]
        args: list[Argument] = [wanted.owner, digest, ttl_ms, most_keys, most_bytes]
        state, found = await self._store.run(self._claim, keys, args)
        owner = found.decode()
        return Claim(_STATES[state], owner, wanted.record, names.replay_parts(owner), wanted.account)

    @staticmethod
    def claimed(account: str, key_id: str, name: str, owner: str) -> Claim:
        """The claim that `owner` has, if it has one."""
        names = AccountKeys(account)
        record = names.replay(key_id, hashlib.sha256(name.encode()).hexdigest())
        return Claim("claimed", owner, record, names.replay_parts(owner), account)

    async def append(self, claim: Claim, parts: Sequence[bytes], ttl_ms: int) -> None:
        """Add parts of the answer."""
        keys = [claim.parts, AccountKeys(claim.account).replay_sizes]
        await self._store.run(self._append, keys, [ttl_ms, claim.owner, *parts])

    async def conclude(self, claim: Claim, state: Conclusion, ttl_ms: int) -> None:
        """Say how far the answer is."""
        names = AccountKeys(claim.account)
        keys = [claim.record, claim.parts, names.replays, names.replay_sizes]
        await self._store.run(self._conclude, keys, [claim.owner, state, ttl_ms])

    async def read(self, claim: Claim, start: int) -> tuple[str | None, list[bytes]]:
        """The state, and every part from `start` on: after `finished` there are no more. None: the record is gone."""
        (owner, state), parts = await asyncio.gather(
            self._store.execute("HMGET", claim.record, "owner", "state"),
            self._store.execute("LRANGE", claim.parts, start, -1),
        )
        return (state.decode() if owner == claim.owner.encode() else None), parts


def body_digest(body: bytes) -> str:
    """What is kept of a request's body, to know it again."""
    return hashlib.sha256(body).hexdigest()
