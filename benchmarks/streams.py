"""The client of the streams: open-loop, on raw protocols. Streams begin by the clock, whatever became of earlier ones.

A read is scanned for the ends of events and of the answer, and never decoded. An event's cost here is of no consequence to
what is reported, which is the proxy's own CPU time; that the client keeps up is shown by the gaps of the direct run.
"""

import asyncio
import time
from array import array
from dataclasses import dataclass, field

CONNECTING = 100  # at once: a listener's backlog is finite


@dataclass
class Seen:
    """What all streams of a case saw. Times are seconds."""

    begun: int = 0
    ended: int = 0
    refused: int = 0
    cut: int = 0
    uneven: int = 0  # ended streams with another number of events than the upstream sent
    events: int = 0
    reads: int = 0
    first_event_s: "array[float]" = field(default_factory=lambda: array("d"))
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))

    def begin_anew(self) -> None:
        """Count events and gaps from now on, with streams under way."""
        self.events = self.reads = 0
        del self.gaps_s[:]


class Client(asyncio.Protocol):
    """A connection that is used for one stream after another."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._seen = pool.seen
        self._tail = b""
        self._begun_at = 0.0
        self._last_at = 0.0
        self._events = 0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, _exc: Exception | None) -> None:
        if self.busy:
            self._seen.cut += 1
            self._pool.ended(None)

    def begin(self) -> None:
        self.busy = True
        self._tail = b""
        self._last_at = 0.0
        self._events = 0
        self._begun_at = time.perf_counter()
        self._seen.begun += 1
        self.transport.write(self._pool.request)

    def data_received(self, data: bytes) -> None:
        seen = self._seen
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            seen.refused += 1
        seen.reads += 1
        events = data.count(b"\n\n") + (self._tail[-1:] == b"\n" == data[:1])
        if events:
            self._note(events)
        self._tail = (self._tail + data)[-5:] if len(data) < 5 else data[-5:]
        if self._tail == b"0\r\n\r\n":
            self.busy = False
            seen.ended += 1
            seen.uneven += self._events != self._pool.events
            self._pool.ended(self)

    def _note(self, events: int) -> None:
        seen = self._seen
        now = time.perf_counter()
        seen.events += events
        self._events += events
        if self._last_at:
            seen.gaps_s.append(now - self._last_at)
        else:
            seen.first_event_s.append(now - self._begun_at)
        self._last_at = now


class Pool:
    """Connections to one proxy, opened ahead, and streams begun on them. `events`: how many the upstream sends in each."""

    def __init__(self, port: int, request: bytes, events: int) -> None:
        self.request = request
        self.events = events
        self.seen = Seen()
        self._port = port
        self._idle: list[Client] = []
        self._clients: list[Client] = []
        self._running = 0
        self._all_ended = asyncio.Event()

    async def open(self, count: int) -> None:
        """Open `count` connections."""
        while (left := count - len(self._clients)) > 0:
            await asyncio.gather(*(self._connect() for _ in range(min(CONNECTING, left))))

    def begin(self) -> None:
        """Begin a stream, on a connection that was opened for it."""
        if not self._idle:
            self.seen.cut += 1  # the proxy is so late that no connection is free
            return
        self._running += 1
        self._idle.pop().begin()

    def ended(self, client: Client | None) -> None:
        self._running -= 1
        if client is not None:
            self._idle.append(client)
        if not self._running:
            self._all_ended.set()

    async def begin_spread(self, count: int, over_s: float) -> None:
        """Begin `count` streams, evenly spread over `over_s` from now on."""
        loop = asyncio.get_running_loop()
        start, done = loop.time(), 0
        while done < count:
            due = min(count, int((loop.time() - start) / over_s * count) + 1)
            for _ in range(due - done):
                self.begin()
            done = due
            await asyncio.sleep(0.001)

    async def wait(self, timeout_s: float) -> None:
        """Until every stream has ended, or for so long."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._running:
                    self._all_ended.clear()
                    await self._all_ended.wait()
        except TimeoutError:
            self.seen.cut += self._running

    def close(self) -> None:
        """Hang up, whatever is under way."""
        for client in self._clients:
            client.busy = False
            client.transport.abort()

    async def _connect(self) -> None:
        _, client = await asyncio.get_running_loop().create_connection(lambda: Client(self), "127.0.0.1", self._port)
        self._clients.append(client)
        self._idle.append(client)
