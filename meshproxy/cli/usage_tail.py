"""The newest events of the usage streams, for `top`: what was settled in the last minutes, account by account.

Everything is bounded: so many accounts, so many events a reading, so many events kept. Whatever is left out is counted.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from meshproxy.ledger.connection import Store
from meshproxy.ledger.keyspace import AccountKeys

MAX_ACCOUNTS = 500
MAX_EVENTS_READ = 2_000  # of one account at a time
MAX_EVENTS_KEPT = 100_000


class Event(Struct, frozen=True):
    """One settled request."""

    settled_ms: int
    account: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost_nusd: int


class Row(Struct):
    """What an account did with a model in the window."""

    account: str
    model: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_nusd: int = 0


class Tail:
    """Follows the streams of some accounts and remembers `window_s` of them."""

    def __init__(self, store: Store, accounts: Sequence[str], window_s: int) -> None:
        self.accounts = accounts[:MAX_ACCOUNTS]
        self.accounts_left_out = max(0, len(accounts) - MAX_ACCOUNTS)
        self._store = store
        self._window_ms = window_s * 1000
        self._last_ids: dict[str, str] = {}
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS_KEPT)

    async def read(self) -> list[Row]:
        """What the window holds now by account and model, the most expensive first."""
        since_ms = await self._now_ms() - self._window_ms
        replies = [self._newest(account, since_ms) for account in self.accounts]  # issued together: one write
        for account, reply in zip(self.accounts, replies, strict=True):
            self._remember(account, await reply)
        rows = summed(event for event in self._events if event.settled_ms >= since_ms)
        return sorted(rows, key=lambda row: (-row.cost_nusd, -row.requests, row.account, row.model))

    async def _now_ms(self) -> int:
        seconds, micros = await self._store.execute("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def _newest(self, account: str, since_ms: int) -> Any:
        last = self._last_ids.get(account)
        start = f"({last}" if last is not None else str(since_ms)
        return self._store.execute("XREVRANGE", AccountKeys(account).usage, "+", start, "COUNT", MAX_EVENTS_READ)

    def _remember(self, account: str, entries: Sequence[Any]) -> None:
        if entries:
            self._last_ids[account] = entries[0][0].decode()
        for _, flat in reversed(entries):
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            if fields.get(b"event") == b"settled":
                self._events.append(_event(account, fields))


def summed(events: Any) -> list[Row]:
    """Events added up by account and model."""
    rows: dict[tuple[str, str], Row] = {}
    for event in events:
        row = rows.setdefault((event.account, event.model), Row(event.account, event.model))
        row.requests += 1
        row.prompt_tokens += event.prompt_tokens
        row.completion_tokens += event.completion_tokens
        row.cost_nusd += event.cost_nusd
    return list(rows.values())


def _event(account: str, fields: dict[bytes, bytes]) -> Event:
    return Event(
        settled_ms=int(fields[b"settled_ms"]),
        account=account,
        model=fields[b"model"].decode(),
        prompt_tokens=int(fields[b"prompt_tokens"]),
        completion_tokens=int(fields[b"completion_tokens"]),
        cost_nusd=int(fields[b"cost_nusd"]),
    )
