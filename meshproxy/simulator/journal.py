"""What the simulator has received and how each request ended: for tests to look at, over HTTP or in the process.

Bounded in number and in bytes: the oldest are forgotten first.
"""

from collections import deque
from itertools import count
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

MAX_ENTRIES = 1_000
MAX_BODY_BYTES = 1_048_576  # of one body: what is longer is kept up to here
MAX_KEPT_BYTES = 67_108_864  # of all bodies together
MAX_COUNTED = 1_000  # names of flaky and fail-first behaviours

OPEN, COMPLETED, CLIENT_CLOSED, BROKEN = "open", "completed", "client_closed", "broken"
TOTALS = ("requests", "streams", COMPLETED, CLIENT_CLOSED, BROKEN, "tokens")


class Entry(Struct, kw_only=True):
    """One request. `ended`: open, completed, client_closed (before the end), broken (by a fault that was asked for).

    `tokens` and `events` were written to the socket; `status` is 0 until the end, and stays so where no head was sent. What the
    provider bills is `billed`: the prompt and what was read from its cache, and the tokens that were made, shown or not.
    """

    number: int
    method: str
    path: str
    headers: list[tuple[str, str]]
    raw_body: bytes
    stream: bool = False
    model: str | None = None
    status: int = 0
    ended: str = OPEN
    tokens: int = 0
    events: int = 0
    billed: dict[str, int] = {}

    def bill(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        """What this answer costs at its provider, as it is now."""
        counts = {
            "prompt_tokens": prompt_tokens,
            "cached_tokens": cached_tokens,
            "completion_tokens": completion_tokens,
        }
        self.billed = counts

    def sent(self, tokens: int) -> None:
        """One more event is out."""
        self.tokens += tokens
        self.events += 1

    def told(self) -> dict[str, Any]:
        """The entry as JSON: `body` decoded where it is JSON, `body_text` as it came."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name != "raw_body"}
        return shown | {"body": _decoded(self.raw_body), "body_text": self.raw_body.decode(errors="replace")}


class ExchangeLog:
    """The last requests, the totals since it was cleared, and how often each flaky behaviour was asked for."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.open_requests = 0
        self.open_streams = 0
        self._numbers = count()
        self.clear()

    def clear(self) -> None:
        """Forget everything but what is open."""
        self.entries.clear()
        self.totals = dict.fromkeys(TOTALS, 0)
        self._counted: dict[str, int] = {}
        self._kept_bytes = 0

    def open(self, request: web.Request, body: bytes) -> Entry:
        """Note a request that has come."""
        entry = Entry(
            number=next(self._numbers),
            method=request.method,
            path=request.path_qs,
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.raw_headers],
            raw_body=body[:MAX_BODY_BYTES],
        )
        self._keep(entry)
        self.totals["requests"] += 1
        self.open_requests += 1
        return entry

    def streams(self, entry: Entry) -> None:
        """Note that it is a stream."""
        entry.stream = True
        self.totals["streams"] += 1
        self.open_streams += 1

    def close(self, entry: Entry, ended: str) -> None:
        """Note how a request ended."""
        entry.ended = ended
        self.open_requests -= 1
        self.open_streams -= entry.stream
        self.totals["tokens"] += entry.tokens
        self.totals[ended] += 1

    def count(self, name: str) -> int:
        """How often this has been counted, now included."""
        counted = self._counted.pop(name, 0) + 1
        if len(self._counted) >= MAX_COUNTED:
            del self._counted[next(iter(self._counted))]
        self._counted[name] = counted
        return counted

    def _keep(self, entry: Entry) -> None:
        self._kept_bytes += len(entry.raw_body)
        self.entries.append(entry)
        while len(self.entries) > MAX_ENTRIES or self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self.entries.popleft().raw_body)


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
