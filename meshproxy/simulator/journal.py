"""Records of the requests that the simulator received and of how each ended, for tests to read.

The records are bounded in number and in bytes: the oldest are dropped first.
"""

from collections import deque
from itertools import count
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

MAX_ENTRIES = 1_000
MAX_BODY_BYTES = 1_048_576  # of one body; a longer one is cut
MAX_KEPT_BYTES = 67_108_864  # of all bodies together
MAX_COUNTED = 1_000  # counted names of flaky and fail-first behaviours

OPEN, COMPLETED, CLIENT_CLOSED, BROKEN = "open", "completed", "client_closed", "broken"
TOTALS = ("requests", "streams", COMPLETED, CLIENT_CLOSED, BROKEN, "tokens")


class Entry(Struct, kw_only=True):
    """One request.

    `ended`: open, completed, client_closed (before the end) or broken (by a requested fault). `tokens` and `events`
    were written to the socket. `status` is 0 until the end, and stays 0 if no head was sent. `billed` is what the
    provider bills: the prompt with its cached tokens, and the generated tokens, shown or not.
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
        """Record what this answer costs at its provider so far."""
        counts = {
            "prompt_tokens": prompt_tokens,
            "cached_tokens": cached_tokens,
            "completion_tokens": completion_tokens,
        }
        self.billed = counts

    def sent(self, tokens: int) -> None:
        """Count one more event as sent."""
        self.tokens += tokens
        self.events += 1

    def told(self) -> dict[str, Any]:
        """Return the entry as JSON: `body` decoded if it is JSON, `body_text` as received."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name != "raw_body"}
        return shown | {"body": _decoded(self.raw_body), "body_text": self.raw_body.decode(errors="replace")}


class ExchangeLog:
    """The last requests, totals since they were cleared, and how often each flaky behaviour was requested."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.open_requests = 0
        self.open_streams = 0
        self._numbers = count()
        self.clear()

    def clear(self) -> None:
        """Delete all records except those of open requests."""
        self.entries.clear()
        self.totals = dict.fromkeys(TOTALS, 0)
        self._counted: dict[str, int] = {}
        self._kept_bytes = 0

    def open(self, request: web.Request, body: bytes) -> Entry:
        """Record a request that has arrived."""
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
        """Record that the request's answer is a stream."""
        entry.stream = True
        self.totals["streams"] += 1
        self.open_streams += 1

    def close(self, entry: Entry, ended: str) -> None:
        """Record how a request ended."""
        entry.ended = ended
        self.open_requests -= 1
        self.open_streams -= entry.stream
        self.totals["tokens"] += entry.tokens
        self.totals[ended] += 1

    def count(self, name: str) -> int:
        """Count this name once more and return its count."""
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
