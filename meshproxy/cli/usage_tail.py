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


class Row(Struct):
    """What an account did with a model: in the window, or in one request."""

    account: str
    model: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_nusd: int = 0

    def add(self, other: "Row") -> None:
        """Count it in."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cost_nusd += other.cost_nusd


class Tail:
    """Follows the streams of some accounts and remembers `window_s` of them."""

    def __init__(self, store: Store, accounts: Sequence[str], window_s: int) -> None:
        self.accounts = accounts[:MAX_ACCOUNTS]
        self.accounts_left_out = max(0, len(accounts) - MAX_ACCOUNTS)
        self._store = store
        self._window_ms = window_s * 1000
        self._last_ids: dict[str, str] = {}
        self._events: deque[tuple[int, Row]] = deque(maxlen=MAX_EVENTS_KEPT)  # when each was settled, and what it used

    async def read(self) -> list[Row]:
        """What the window holds now by account and model, the most expensive first."""
        seconds, micros = await self._store.execute("TIME")
        since_ms = int(seconds) * 1000 + int(micros) // 1000 - self._window_ms
        replies = [self._newest(account, since_ms) for account in self.accounts]  # issued together: one write
        for account, reply in zip(self.accounts, replies, strict=True):
            self._remember(account, await reply)
        rows: dict[tuple[str, str], Row] = {}
        for settled_ms, used in self._events:
            if settled_ms >= since_ms:
                rows.setdefault((used.account, used.model), Row(used.account, used.model)).add(used)
        return sorted(rows.values(), key=lambda row: (-row.cost_nusd, -row.requests, row.account, row.model))

    def _newest(self, account: str, since_ms: int) -> Any:
        last = self._last_ids.get(account)
        start = f"({last}" if last is not None else str(since_ms)
        return self._store.execute("XREVRANGE", AccountKeys(account).usage, "+", start, "COUNT", MAX_EVENTS_READ)

    def _remember(self, account: str, entries: Sequence[Any]) -> None:
        if entries:
            self._last_ids[account] = entries[0][0].decode()
        for _, flat in reversed(entries):
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            if fields[b"event"] == b"settled":
                counts = (int(fields[name]) for name in (b"prompt_tokens", b"completion_tokens", b"cost_nusd"))
                self._events.append((int(fields[b"settled_ms"]), Row(account, fields[b"model"].decode(), 1, *counts)))
