"""Clients over raw HTTP/1.1: each does what its plan says, and writes down what it saw."""

import asyncio
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple

from msgspec import Struct

from simulation.history import ENDINGS, OPTIONS, TURNS, Request
from simulation.invalid import spoiled
from simulation.provider import WORDS

PATIENCE_S: Final = 400.0  # for an answer; whoever gets none by then hung
SPAN: Final = "00f067aa0ba902b7"
STALL_S: Final = 90.0  # after which a client that reads nothing gives up; the gateway must have given it up before
SLOWLY_S: Final = 60.0  # in all; then a slow client reads on as any other
SLOWEST_S: Final = 3.0  # between two reads of a slow client
MOST_PARSED: Final = 256  # answers whose data and error are kept: a dozen rules ask for those of each
LONGEST_WAIT_MS: Final = 3_600_000  # after which a client that was told to wait doesn't come again
HALF_CLOSED_S: Final = 60.0  # that a client which has half-closed keeps its socket


class Sight(Struct):
    """What a client saw of one request. Times are the loop's.

    `ended`: "whole", "closed" (in the middle, or without an answer), "left" (by itself), "unconnected", "hung".
    `reused`: the connection had been used before. `times`: when bytes came, and how long the payload was then.
    `marker`: of it and its repeats alone; `text`: that in its text, if it is another.
    """

    request: Request
    marker: str
    request_id: str
    body: bytes
    began_at: float
    worker: int = 0
    sent_at: float | None = None
    status: int = 0
    headers: dict[str, str] = {}
    payload: bytes = b""
    times: list[tuple[float, int]] = []
    ended: str = ""
    ended_at: float = 0.0
    reused: bool = False
    again: bool = False
    text: str = ""

    @property
    def is_stream(self) -> bool:
        """Whether the answer is an event stream."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def error(self) -> dict[str, Any]:
        """The error of an envelope, or of the last event of a stream; empty if there is none."""
        if self.is_stream:
            told = [line for line in self.data if line != "[DONE]"]
            return _error(told[-1]) if told else {}
        return _error(self.payload) if self.status != 200 else {}

    @property
    def data(self) -> list[str]:
        """The data of each whole event."""
        return list(_data_of(self.payload))


@lru_cache(MOST_PARSED)
def _data_of(payload: bytes) -> tuple[str, ...]:
    *whole, _ = payload.decode(errors="replace").split("\n\n")
    return tuple(data for data in map(data_of, whole) if data is not None)


def data_of(event: str) -> str | None:
    """Return an event's data, of all its lines of it; None without one."""
    lines = [line[5:].removeprefix(" ") for line in event.split("\n") if line.startswith("data:")]
    return "\n".join(lines) if lines else None


@lru_cache(MOST_PARSED)
def _error(text: str | bytes) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    error = told.get("error") if isinstance(told, dict) else None
    return error if isinstance(error, dict) else {}


class Idle(NamedTuple):
    """A connection that a client kept without a request: to which worker, and from when until when."""

    worker: int
    since: float
    until: float


def trace_of(request_id: str) -> str:
    """Return the `traceparent` of a request with an Idempotency-Key, which says at its provider whose call it is."""
    return f"00-{request_id.encode().hex():0>32}-{SPAN}-01"


def body_of(request: Request, marker: str) -> bytes:
    """Return the body that a request sends."""
    words = "".join(WORDS[at % len(WORDS)] for at in range(request.prompt_words))
    ending = ENDINGS[request.ending][0] if request.ending else ""
    texts = [f"{marker}:{words}", *([ending] if ending else [])] if request.in_parts else [f"{marker}:{words}{ending}"]
    content: Any = [{"type": "text", "text": text} for text in texts] if request.in_parts else texts[0]
    turns = [message for name in request.turns for message, _ in TURNS[name]]
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [*turns, {"role": "user", "content": content}],
        **{name: OPTIONS[name][0] for name in request.options},
    }
    if request.stream:
        body["stream"] = True
    if request.include_usage:
        body["stream_options"] = {"include_usage": True}
    if request.n != 1:
        body["n"] = request.n
    optional = {"max_tokens": request.max_tokens, "timeout": request.timeout_s, "session_id": request.session or None}
    body |= {name: value for name, value in optional.items() if value is not None}
    if request.fallbacks:
        body["models"] = list(request.fallbacks)
    if request.tier:
        body["service_tier"] = request.tier
    if request.template:
        body["template"] = request.template
    if request.manner is not None:
        body["variables"] = {"manner": request.manner, "other": "unused"}
    return json.dumps(body, ensure_ascii=request.escaped).encode()


class Clients:
    """All clients of a history. `address` is of a worker, `secret` of a key, by their numbers."""

    def __init__(
        self,
        address: Callable[[int], tuple[str, int]],
        secret: Callable[[int], str],
        marker: Callable[[Request], str],
        text: Callable[[Request], str],
    ) -> None:
        self._address, self._secret, self._marker, self._text = address, secret, marker, text
        self.sights: list[Sight] = []
        self.idles: list[Idle] = []
        self._links: dict[str, tuple[asyncio.Lock, _Link | None]] = {}

    async def play(self, request: Request) -> None:
        """Send a request and follow its plan to the end, and once more if it `waits` and was told to."""
        sight = await self._ask(request, again=False)
        wait_ms = sight.headers.get("retry-after-ms")
        is_short = sight.status == 429 or sight.error.get("code") == "provider_not_available"
        if request.waits and is_short and wait_ms is not None and float(wait_ms) <= LONGEST_WAIT_MS:
            due = sight.ended_at + float(wait_ms) / 1000
            loop = asyncio.get_running_loop()
            await asyncio.sleep(max(0.0, due - loop.time()) + 1e-6)
            await self._ask(request, again=True)

    async def _ask(self, request: Request, *, again: bool) -> Sight:
        text = self._text(request)
        name = f"{request.name}-again" if again else request.name
        sight = Sight(
            request,
            self._marker(request),
            f"id-{name}",
            body_of(request, text),
            asyncio.get_running_loop().time(),
            request.worker,
            again=again,
            text=text,
        )
        sight.headers, sight.times = {}, []
        self.sights.append(sight)
        lock, _ = self._links.setdefault(request.connection, (asyncio.Lock(), None))
        if not request.connection:
            await self._on_a_link(sight, None)
            return sight
        async with lock:
            sight.began_at = asyncio.get_running_loop().time()
            link = self._links[request.connection][1]
            self._note_idle(link)
            kept = await self._on_a_link(sight, link if link is not None and not link.is_lost else None)
            self._links[request.connection] = lock, kept
        return sight

    async def _on_a_link(self, sight: Sight, link: "_Link | None") -> "_Link | None":
        """Exchange one request and its answer; return the connection if it can be used again."""
        loop = asyncio.get_running_loop()
        sight.reused = link is not None
        if link is not None:
            sight.worker = link.worker
        else:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    _, link = await loop.create_connection(_Link, *self._address(sight.request.worker))
            except OSError:
                sight.ended, sight.ended_at = "unconnected", loop.time()
                return None
            link.worker = sight.worker
        link.begin(sight)
        await self._send(sight, link)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await link.over.wait()
        except TimeoutError:
            sight.ended = "hung"
        sight.ended = sight.ended or "closed"
        sight.ended_at = loop.time()
        if (
            sight.ended == "whole"
            and not link.is_lost
            and sight.headers.get("connection", "") != "close"
            and sight.request.connection
        ):
            link.idle_since = loop.time()
            return link
        link.close()
        return None

    def _note_idle(self, link: "_Link | None") -> None:
        """Note for how long a connection had no request."""
        if link is not None:
            now = asyncio.get_running_loop().time()
            self.idles.append(Idle(link.worker, link.idle_since, now if link.lost_at is None else link.lost_at))

    async def fetch(self, worker: int, key: int, target: str, body: Any = None) -> tuple[int, Any]:
        """Return the status and JSON of another path's answer; status 0 if there is none."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {target} HTTP/1.1\r\nhost: mesh\r\nconnection: close\r\n"
        head += f"authorization: Bearer {self._secret(key)}\r\n"
        head += "" if body is None else f"content-type: application/json\r\ncontent-length: {len(data)}\r\n"
        try:
            reader, writer = await asyncio.open_connection(*self._address(worker))
            writer.write(head.encode() + b"\r\n" + data)
            got = await reader.read(-1)
        except OSError:
            return 0, None
        writer.close()
        head_bytes, _, payload = got.partition(b"\r\n\r\n")
        return (int(head_bytes.split(b" ")[1]), json.loads(payload)) if payload else (0, None)

    async def _send(self, sight: Sight, link: "_Link") -> None:
        request = sight.request
        headers = {
            "host": "mesh",
            "authorization": f"Bearer {self._secret(request.key)}",
            "content-type": "application/json",
            "x-request-id": sight.request_id,
        }
        if request.keyed:
            headers |= {"idempotency-key": request.named or sight.text, "traceparent": trace_of(sight.request_id)}
        line, headers, body = spoiled(request.invalid, headers, sight.body)
        head = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        data = "\r\n".join([*head, "", ""]).encode() + body
        size = -(-len(data) // request.sends_in)
        for at in range(0, len(data), size):
            if link.is_lost:
                return
            link.write(data[at : at + size])
            if at + size < len(data):
                await asyncio.sleep(0.003)
        sight.sent_at = asyncio.get_running_loop().time()
        if request.reads == "leaves":
            link.leave_in(request.after)

    def close(self) -> None:
        """Close the connections that are kept."""
        for _, link in self._links.values():
            self._note_idle(link)
            if link is not None:
                link.close()


class _Link(asyncio.Protocol):
    """One connection, and the answer that is being read from it."""

    def __init__(self) -> None:
        self.is_lost = False
        self.lost_at: float | None = None
        self.idle_since = 0.0
        self.worker = 0
        self.over = asyncio.Event()
        self._sight: Sight | None = None
        self._leaving: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def begin(self, sight: Sight) -> None:
        """Read the answer to another request from now on."""
        self._sight = sight
        self.over.clear()
        self._head = bytearray()
        self._left: int | None = None  # of the body or the chunk
        self._chunked = self._is_last = False
        self._in_head = True
        self._coded = bytearray()
        self._got = 0
        self._slept_s = 0.0
        if self.is_lost:
            self.over.set()

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self._transport.write(data)

    def leave_in(self, seconds: float) -> None:
        """Hang up after so long, unless the answer has come."""
        self._leaving = asyncio.get_running_loop().call_later(seconds, self._leave)

    def close(self) -> None:
        """Close the connection."""
        if self._leaving is not None:
            self._leaving.cancel()
        if self._sight is None or self._sight.ended != "left":
            self._transport.close()
        elif self._sight.request.reads == "half_closes":
            self._transport.write_eof()
            asyncio.get_running_loop().call_later(HALF_CLOSED_S, self._transport.abort)
        else:
            self._transport.abort()

    def _leave(self) -> None:
        if self._sight is not None and not self.over.is_set():
            self._end("left")

    def _end(self, how: str) -> None:
        assert self._sight is not None
        if not self._sight.ended:
            self._sight.ended = how
        self.over.set()

    def data_received(self, data: bytes) -> None:
        sight = self._sight
        if sight is None:
            return
        if self.over.is_set():
            if sight.ended == "whole":
                sight.ended = "overrun"
            return
        now = asyncio.get_running_loop().time()
        self._got += len(data)
        self._feed(sight, data)
        sight.times.append((now, len(sight.payload)))
        request = sight.request
        if self.over.is_set() or sight.again:
            return
        if request.reads in {"hangs_up", "half_closes"} and self._got >= request.after:
            self._end("left")
        elif request.reads == "stalls" and self._got >= request.after:
            self._transport.pause_reading()
            self.leave_in(STALL_S)
        elif request.reads == "slowly" and self._slept_s < SLOWLY_S:
            pause_s = min(len(data) / max(request.after, 1.0), SLOWEST_S)
            self._slept_s += pause_s
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(pause_s, self._resume)

    def _resume(self) -> None:
        if not self.is_lost and not self._transport.is_closing():
            self._transport.resume_reading()

    def _feed(self, sight: Sight, data: bytes) -> None:
        if self._in_head:
            self._head += data
            head, found, rest = bytes(self._head).partition(b"\r\n\r\n")
            if not found:
                return
            self._in_head = False
            status, *lines = head.decode("latin-1").split("\r\n")
            sight.status = int(status.split(" ")[1])
            sight.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            self._chunked = sight.headers.get("transfer-encoding") == "chunked"
            if "content-length" in sight.headers:
                self._left = int(sight.headers["content-length"])
            data = rest
        if self._chunked:
            self._coded += data
            self._decode(sight)
            return
        sight.payload += data
        if self._left is not None and len(sight.payload) >= self._left:
            self._end("whole" if len(sight.payload) == self._left else "overrun")

    def _decode(self, sight: Sight) -> None:
        """Take whole chunks out of what came, and as much as there is of the last one."""
        coded = self._coded
        while coded:
            if self._left is None:
                line, found, _ = bytes(coded[:64]).partition(b"\r\n")
                if not found:
                    return
                self._left = int(line, 16)
                del coded[: len(line) + 2]
                self._is_last = self._left == 0
            if self._left:
                piece = coded[: self._left]
                sight.payload += piece
                self._left -= len(piece)
                del coded[: len(piece)]
            if self._left == 0:
                if len(coded) < 2:
                    return
                del coded[:2]
                self._left = None
                if self._is_last:
                    self._end("overrun" if coded else "whole")
                    return

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.is_lost, self.lost_at = True, asyncio.get_running_loop().time()
        if self._sight is not None and not self.over.is_set():
            until_close = not self._in_head and not self._chunked and self._left is None
            self._end("whole" if until_close else "closed")
