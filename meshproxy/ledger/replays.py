"""Idempotency-Keys: which request owns a key, and the parts of its answer, for repeats of the request.

A record has the key's owner and the state of the answer. The parts are a separate list named by the owner, so that a
reader never mixes two answers. Both expire; a running request's expire sooner than a finished answer's.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

from msgspec import Struct

from meshproxy.errors import GatewayError
from meshproxy.ledger.records import AccountKeys
from meshproxy.ledger.store import Argument, Script, Store, StoreError

State = Literal["claimed", "running", "finished", "lost", "conflict", "full"]
Conclusion = Literal["running", "finished", "lost", "failed"]

CHARGED_S = 15.0  # from a settlement to the record's final state, beyond which its worker has died or lost Redis
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

    async def append(self, claim: Claim, parts: Sequence[bytes], ttl_ms: int, start: int = 0) -> bool:
        """Append parts of the answer, the first of which has the number `start`; return False if some before are missing."""
        keys = [claim.parts, AccountKeys(claim.account).replay_sizes]
        args: list[Argument] = [ttl_ms, claim.owner, start, *parts]
        return bool(await self._store.run(self._append, keys, args) > 0)

    async def conclude(self, claim: Claim, state: Conclusion, ttl_ms: int, parts: int = 0) -> None:
        """Record the state of the answer, which has so many parts. One that isn't whole any more is lost, not finished."""
        names = AccountKeys(claim.account)
        keys = [claim.record, claim.parts, names.replays, names.replay_sizes]
        await self._store.run(self._conclude, keys, [claim.owner, state, ttl_ms, parts])

    async def read(self, claim: Claim, start: int) -> tuple[str | None, list[bytes]]:
        """Return the state and the parts from `start` on. No parts follow `finished`. None: the record is gone."""
        (owner, state), parts = await asyncio.gather(
            self._store.execute("HMGET", claim.record, "owner", "state"),
            self._store.execute("LRANGE", claim.parts, start, -1),
        )
        return (state.decode() if owner == claim.owner.encode() else None), parts


class Answer:
    """The recorded answer of the first request, read from Redis once for all requests of this worker that wait."""

    def __init__(self, claim: Claim, body_digest: str, replays: Replays, clock: Callable[[], float]) -> None:
        self.body_digest = body_digest
        self.parts: list[bytes] = []
        self.state: str | None = "running"
        self.waiting = 0
        self.is_followed = False
        self.record = claim.record
        self._claim = claim
        self._replays = replays
        self._clock = clock
        self._charged_at: float | None = None
        self._error: GatewayError | StoreError | None = None
        self._changed: asyncio.Future[None] | None = None

    async def follow(self, pause_s: Callable[[], float]) -> None:
        """Read new parts while requests wait for them. `pause_s` returns the current pause between two reads."""
        try:
            while self.waiting and self.state == "running":
                state, parts = await self._replays.read(self._claim, len(self.parts))
                self.parts += parts
                self.state = self._state_of(state)
                if parts or self.state != "running":
                    self._wake()
                if self.state == "running":
                    await asyncio.sleep(pause_s())
        except (GatewayError, StoreError) as error:
            self._error = error
        finally:
            self._wake()

    async def after(self, count: int, client_timeout_s: float) -> list[bytes] | None:
        """Return the parts after the first `count`; an empty list after `client_timeout_s` without new ones; None at the end.

        Raises LookupError if no more will come because the request failed or its record is gone; Unavailable and
        StoreError.
        """
        if len(self.parts) == count and self.state == "running" and self._error is None:
            if self._changed is None:
                self._changed = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._changed], timeout=client_timeout_s)
        if len(self.parts) > count:
            return self.parts[count:]
        if self._error is not None:
            raise self._error
        if self.state == "running":
            return []
        if self.state == "finished":
            return None
        raise LookupError

    def _state_of(self, state: str | None) -> str | None:
        """Return the record's state; `charged` counts as `running` for CHARGED_S, then as `lost`: its worker has died."""
        if state != "charged":
            return state
        if self._charged_at is None:
            self._charged_at = self._clock()
        return "running" if self._clock() - self._charged_at < CHARGED_S else "lost"

    def _wake(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.set_result(None)


def body_digest(body: bytes) -> str:
    """Return the SHA-256 (hex) that identifies a request's body."""
    return hashlib.sha256(body).hexdigest()
