"""Send an answer on its connection, byte by byte.

aiohttp parses the requests. Answers are written directly to its transport, because an HTTP server library refuses to
send the invalid answers that this module has to send. A body ends by chunks, by a length, or with the connection (RFC
9112, section 6). `ConnectionError` means that the client has closed the connection.
"""

import asyncio
import contextlib
import gzip
import re
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from email.utils import formatdate
from http import HTTPStatus
from itertools import chain, islice
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web
from msgspec import Struct

from meshproxy.simulator.answer import ComposedReply
from meshproxy.simulator.behaviour import Behaviour, SimulatorSettings
from meshproxy.simulator.dialects import Kind
from meshproxy.simulator.journal import Entry, ExchangeLog
from meshproxy.simulator.request import CompletionRequest, on_demand
from meshproxy.simulator.stream import BROKEN, Event, EventStream, completion, error_event

LOOK_S = 0.25  # between checks of whether a silent connection's client is still there
SPLIT_GAP_S = 0.001  # between two pieces: long enough for the client to read them one by one
JSON = ("content-type", "application/json")
EVENT_STREAM = ("content-type", "text/event-stream; charset=utf-8")
PAGE = ("content-type", "text/html; charset=utf-8")

MAX_CUTS = 64  # in one write; a long text would otherwise take minutes

_WIDE = rb"[\xc0-\xf7](?=[\x80-\xbf])"  # the first byte of a multi-byte UTF-8 character
# After one byte of a chunk's size; within "data", CR LF, an event's end, a UTF-8 character.
_AWKWARD = re.compile(rb"\A[0-9a-f](?=[0-9a-f])|da(?=ta)|\r(?=\n)|\n(?=\r?\n)|" + _WIDE)

Headers = Sequence[tuple[str, str]]


class Written(web.StreamResponse):
    """Tells aiohttp that the answer has been written already, and whether the connection stays open."""

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._goes_on = keep_alive

    @property
    def keep_alive(self) -> bool:
        """Return whether another request may follow on the connection."""
        return self._goes_on

    async def prepare(self, request: web.BaseRequest) -> None:
        """Do nothing: the answer has been written."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: the answer has been written."""


class Line:
    """One request's answer on the wire. `status`: the status that was sent, 0 before."""

    def __init__(self, request: web.Request, headers: Headers) -> None:
        self._transport = request.transport
        self._drain = request.writer.drain
        self._headers = headers
        self._modern = request.version >= HttpVersion11
        self._keep_alive = request.keep_alive and self._modern
        self._chunked = False
        self._held = b""
        self.status = 0

    def written(self) -> Written:
        """Return the response object that the handler returns to aiohttp."""
        return Written(self.status, keep_alive=self._keep_alive and self.status > 0)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer in one write."""
        self.head(status, headers, length=len(body))
        await self.write(body)

    def head(self, status: int, headers: Headers, *, length: int | None = None, chunked: bool = True) -> None:
        """Queue the head, which is sent with the next write.

        The body ends by its length if it has one, else by chunks, or for HTTP/1.0 with the connection.
        """
        self.status = status
        self._chunked = length is None and chunked and self._modern
        self._keep_alive = self._keep_alive and (length is not None or self._chunked)
        told = [("date", formatdate(usegmt=True)), *self._headers, *headers]
        if length is not None:
            told.append(("content-length", str(length)))
        if self._chunked:
            told.append(("transfer-encoding", "chunked"))
        if not self._keep_alive:
            told.append(("connection", "close"))
        lines = "".join(f"{name}: {value}\r\n" for name, value in told)
        self._held = f"HTTP/1.1 {status} {_PHRASES.get(status, 'Unknown')}\r\n{lines}\r\n".encode("latin-1")

    async def write(self, *payloads: bytes) -> None:
        """Send pieces of the body in one write. With chunked coding each piece is a chunk."""
        await self._send(b"".join(map(self._framed, payloads)))

    async def write_split(self, payload: bytes) -> None:
        """Send a piece of the body in two chunks and many writes."""
        for piece in awkward_pieces(b"".join(map(self._framed, halves(payload)))):
            await self._send(piece)
            await asyncio.sleep(SPLIT_GAP_S)

    async def end(self) -> None:
        """End the body correctly."""
        await self._send(b"0\r\n\r\n" if self._chunked else b"")

    async def garble(self) -> None:
        """Send invalid bytes instead of a chunk's size, and close the connection."""
        await self._send(b"this is no chunk size\r\n")
        self.close()

    def close(self) -> None:
        """Close the connection, even if the body is unfinished."""
        self._keep_alive = False
        self._connected().close()

    def reset(self) -> None:
        """Send RST instead of FIN: SO_LINGER with a time of zero discards unsent data (socket(7))."""
        self._keep_alive = False
        transport = self._connected()
        connection: Any = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    async def silence(self) -> None:
        """Send nothing more until the client closes the connection; then raise `ConnectionError`."""
        self._keep_alive = False
        while self._connected():  # noqa: ASYNC110 - only where handlers are not cancelled does it take a look
            await asyncio.sleep(LOOK_S)

    def _framed(self, payload: bytes) -> bytes:
        if not self._chunked:
            return payload
        return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""

    async def _send(self, data: bytes) -> None:
        self._connected().write(self._held + data)
        self._held = b""
        await self._drain()

    def _connected(self) -> asyncio.Transport:
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError
        return self._transport


_PHRASES = {int(status): status.phrase for status in HTTPStatus}


def halves(payload: bytes) -> tuple[bytes, bytes]:
    """Cut a body in two: within its first multi-byte character if it has one, else in the middle."""
    wide = re.search(_WIDE, payload)
    at = wide.end() if wide else len(payload) // 2
    return payload[:at], payload[at:]


def awkward_pieces(frames: bytes) -> Iterator[bytes]:
    """Cut bytes into pieces at the places where a careless parser fails."""
    start = 0
    for found in islice(_AWKWARD.finditer(frames), MAX_CUTS):
        yield frames[start : found.end()]
        start = found.end()
    yield frames[start:]


CUTTING = (
    "stall",
    "stall-mid",
    "die-mid-stream",
    "reset-mid-stream",
    "error-mid-stream",
    "end-early",
    "bad-chunk",
)
COMMENT_EVERY = 5  # events between two ": OPENROUTER PROCESSING" comments
REFUSALS: dict[str, Kind] = {
    "error-context": "context",
    "error-filter": "filter",
    "error-quota": "quota",
    "error-key": "key",
}
OUTRIGHT = ("error-html", "refuse", "reset")  # OpenRouter tries its next model after these
INSTEAD = ("error-html", "not-json", "empty", "redirect", "refuse", "reset", "stall-head")
BREAKING = (*CUTTING, "refuse", "reset", "stall-head")  # the answer has no correct end
REDIRECTED = "/_sim/redirected"

HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\r\n"
NONSENSE = b"<<this is {not JSON"


def refuse_on_demand(behaviour: Behaviour, journal: ExchangeLog) -> None:
    """Raise the requested `Refusal`: always, every Nth time, or the first N times."""
    numbers, retry_after_s = behaviour.numbers, behaviour.options.retry_after
    if refused := behaviour.one_of(REFUSALS):
        raise behaviour.dialect.refusal(REFUSALS[refused])
    if "error" in numbers:
        raise on_demand(numbers["error"], retry_after_s)
    if not numbers.keys() & {"flaky", "fail-first"}:
        return
    count = journal.count(behaviour.name)
    if "flaky" in numbers and count % numbers["flaky"] == 0:
        raise on_demand(500, retry_after_s)
    if count <= numbers.get("fail-first", 0):
        raise on_demand(503, retry_after_s)


async def misbehave(fault: str, line: Line, *, stream: bool) -> None:
    """Do one of `INSTEAD`."""
    kind = EVENT_STREAM if stream else JSON
    match fault:
        case "error-html":
            await line.answer(502, [PAGE], HTML)
        case "not-json":
            await line.answer(200, [kind], b"data: %b\n\n" % NONSENSE if stream else NONSENSE)
        case "empty":
            await line.answer(200, [kind], b"")
        case "redirect":
            await line.answer(302, [("location", REDIRECTED), PAGE], b"")
        case "refuse":
            line.close()
        case "reset":
            line.reset()
        case "stall-head":
            await line.silence()


def mangled(events: Iterable[Event], behaviour: Behaviour, last_words: bytes) -> Iterable[Event]:
    """Return the events as they will be sent, without those after a cut. `last_words`: the event with which
    error-mid-stream ends.
    """
    traits, options = behaviour.traits, behaviour.options
    if "huge-event" in traits:
        events = _with_huge_event(events, options.bytes)
    cutting = behaviour.one_of(CUTTING)
    if cutting:
        events = islice(events, 0 if cutting == "stall" else options.after)
    if cutting == "error-mid-stream":
        events = chain(events, [Event(options.after, 0, last_words)])
    for trait, change in _CHANGES.items():
        if trait in traits:
            events = _changed(events, change)
    if "split" in traits:
        events = _across_chunks(events)
    return _zipped(events) if "gzip" in traits else events


def _with_huge_event(events: Iterable[Event], size: int) -> Iterator[Event]:
    """Grow the second token's chunk to `size` bytes by an unknown member."""
    tokens = 0
    for event in events:
        tokens += event.tokens
        if event.tokens and tokens == 2:
            padding = b',"padding":' + msgspec.json.encode("x" * max(size - len(event.payload) - 13, 0))
            yield event._replace(payload=event.payload.removesuffix(b"}\n\n") + padding + b"}\n\n")
        else:
            yield event


def _changed(events: Iterable[Event], change: Callable[[int, bytes], bytes]) -> Iterator[Event]:
    return (event._replace(payload=change(number, event.payload)) for number, event in enumerate(events))


def _commented(number: int, payload: bytes) -> bytes:
    return payload if number % COMMENT_EVERY else b": OPENROUTER PROCESSING\n\n" + payload


def _identified(number: int, payload: bytes) -> bytes:
    """Add ids and event names to every event, and three fields without data at the start."""
    bare = b"" if number else b"retry: 3000\n\nevent: ping\n\nid: start\n\n"
    return b"%bevent: message\nid: %d\n%b" % (bare, number, payload)


def _with_crlf(_number: int, payload: bytes) -> bytes:
    return payload.replace(b"\n", b"\r\n")


def _with_bom(number: int, payload: bytes) -> bytes:
    return payload if number else b"\xef\xbb\xbf" + payload


_CHANGES = {"comments": _commented, "ids": _identified, "crlf": _with_crlf, "bom": _with_bom}


def _across_chunks(events: Iterable[Event]) -> Iterator[Event]:
    """Send the last byte of each event with the next one, so that no chunk ends where an event ends."""
    held, step = b"", 0
    for step, tokens, payload in events:
        whole = held + payload
        yield Event(step, tokens, whole[:-1])
        held = whole[-1:]
    yield Event(step, 0, held)


def _zipped(events: Iterable[Event]) -> Iterator[Event]:
    """Compress the events as one gzip stream, flushed after each event so that none is delayed."""
    press = zlib.compressobj(wbits=31)
    step = 0
    for step, tokens, payload in events:
        yield Event(step, tokens, press.compress(payload) + press.flush(zlib.Z_SYNC_FLUSH))
    yield Event(step, 0, press.flush())


BREATHE_EVERY = 64  # events sent without a wait before other streams get their turn


class Pace(Struct, frozen=True):
    """Seconds to the first token, and from each token to the next."""

    first_s: float
    interval_s: float

    def due_s(self, step: int) -> float:
        """Return the seconds after the start at which a token is due."""
        return self.first_s + step * self.interval_s


def pace_of(behaviour: Behaviour, settings: SimulatorSettings) -> Pace:
    """Return the pace: from the options, else from the behaviour's names, else from the settings."""
    first_s, interval_s = settings.first_token_s, 1 / settings.tokens_per_second
    if "fast" in behaviour.traits:
        first_s, interval_s = 0.0, 0.0
    if "slow" in behaviour.traits:
        interval_s = 1.0
    asked = behaviour.options
    return Pace(first_s if asked.ttft is None else asked.ttft, interval_s if asked.tps is None else 1 / asked.tps)


class Delivery(Struct):
    """Sends one reply in the form that the request asks for, with the faults of its behaviour."""

    line: Line
    reply: ComposedReply
    ask: CompletionRequest
    behaviour: Behaviour
    pace: Pace
    entry: Entry

    async def run(self) -> None:
        """Send the answer to its end, correct or not. Raises `ConnectionError` if the client closed the connection
        before.
        """
        try:
            await (self._stream() if self.ask.stream else self._unstreamed())
        finally:
            self._bill()
        match self.behaviour.one_of(CUTTING):
            case "stall" | "stall-mid":
                await self.line.silence()
            case "die-mid-stream":
                self.line.close()
            case "reset-mid-stream":
                self.line.reset()
            case "bad-chunk":
                await self.line.garble()
            case _:
                await self.line.end()

    def _bill(self) -> None:
        """Record what the provider bills. Thoughts that a stream doesn't show are generated before its first token."""
        reply = self.reply
        unseen = reply.thoughts if self.ask.stream and not reply.dialect.shows else 0
        self.entry.bill(
            prompt_tokens=reply.prompt_tokens + reply.dialect.citation_tokens,
            cached_tokens=reply.cached_tokens,
            completion_tokens=self.entry.tokens + unseen,
        )

    async def _stream(self) -> None:
        whole = EventStream(self.reply, self.ask, self.behaviour)
        events: Iterable[Event] = mangled(whole, self.behaviour, error_event(self.reply))
        length = None
        if "content-length-stream" in self.behaviour.traits:
            events = list(events)
            length = sum(len(event.payload) for event in events)
        self._head(length)
        await self.line.write()
        await (self._burst(events) if "burst" in self.behaviour.traits else self._paced(events))

    async def _unstreamed(self) -> None:
        body, broken = self._body(), self.behaviour.one_of(CUTTING)
        await asyncio.sleep(self.pace.due_s(self.reply.steps))
        self._head(None if broken in {"end-early", "bad-chunk"} else len(body))
        if broken:
            await self.line.write()
        if broken != "stall":
            unfinished = broken and broken != "error-mid-stream"
            await self._write(body[: len(body) // 2] if unfinished else body)
            self.entry.sent(self.reply.tokens)

    async def _paced(self, events: Iterable[Event]) -> None:
        loop, write = asyncio.get_running_loop(), self._write
        start_s = loop.time()
        for number, event in enumerate(events):
            wait_s = start_s + self.pace.due_s(event.step) - loop.time()
            if wait_s > 0 or number % BREATHE_EVERY == BREATHE_EVERY - 1:
                await asyncio.sleep(max(wait_s, 0))
            await write(event.payload)
            self.entry.sent(event.tokens)

    async def _burst(self, events: Iterable[Event]) -> None:
        whole = list(events)
        await asyncio.sleep(self.pace.first_s)
        await self.line.write(*(event.payload for event in whole))
        for event in whole:
            self.entry.sent(event.tokens)

    @property
    def _write(self) -> Callable[[bytes], Awaitable[None]]:
        return self.line.write_split if "split" in self.behaviour.traits else self.line.write

    def _body(self) -> bytes:
        if "error-mid-stream" in self.behaviour.traits:
            body = msgspec.json.encode(BROKEN)
        else:
            body = completion(self.reply, self.ask, self.behaviour)
        return gzip.compress(body, mtime=0) if "gzip" in self.behaviour.traits else body

    def _head(self, length: int | None) -> None:
        traits = self.behaviour.traits
        usual = EVENT_STREAM if self.ask.stream else JSON
        headers = [PAGE if "wrong-content-type" in traits else usual]
        if "gzip" in traits:
            headers.append(("content-encoding", "gzip"))
        until_close = "eof-delimited" in traits
        self.line.head(200, headers, length=None if until_close else length, chunked=not until_close)
