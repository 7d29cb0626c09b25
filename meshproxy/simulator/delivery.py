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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from email.utils import formatdate
from http import HTTPStatus
from itertools import islice
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web
from msgspec import Struct

from meshproxy.server.chat import WrittenResponse
from meshproxy.simulator.answer import ComposedReply
from meshproxy.simulator.behaviour import Behaviour, SimulatorSettings
from meshproxy.simulator.request import CompletionRequest
from meshproxy.simulator.stream import (
    CUTTING_FAULTS,
    PROVIDER_ERROR,
    Event,
    EventStream,
    completion,
    error_event,
    with_faults,
)

CHECK_INTERVAL_S = 0.25  # between checks of whether a silent connection's client is still there
SPLIT_GAP_S = 0.001  # between two pieces: long enough for the client to read them one by one
JSON = ("content-type", "application/json")
EVENT_STREAM = ("content-type", "text/event-stream; charset=utf-8")
PAGE = ("content-type", "text/html; charset=utf-8")

MAX_CUTS = 64  # in one write; a long text would otherwise take minutes

_WIDE = rb"[\xc0-\xf7](?=[\x80-\xbf])"  # the first byte of a multi-byte UTF-8 character
# After one byte of a chunk's size; within "data", CR LF, an event's end, a UTF-8 character.
_AWKWARD = re.compile(rb"\A[0-9a-f](?=[0-9a-f])|da(?=ta)|\r(?=\n)|\n(?=\r?\n)|" + _WIDE)

Headers = Sequence[tuple[str, str]]

OPEN, COMPLETED, CLIENT_CLOSED, BROKEN = "open", "completed", "client_closed", "broken"


class ReceivedRequest(Struct, kw_only=True):
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

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON: `body` decoded if it is JSON, `body_text` as received."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name != "raw_body"}
        return shown | {"body": _decoded(self.raw_body), "body_text": self.raw_body.decode(errors="replace")}


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


class AnswerWriter:
    """One request's answer on the wire. `status`: the status that was sent, 0 before."""

    def __init__(self, request: web.Request, headers: Headers) -> None:
        self._transport = request.transport
        self._drain = request.writer.drain
        self._headers = headers
        self._is_http11 = request.version >= HttpVersion11
        self._keep_alive = request.keep_alive and self._is_http11
        self._chunked = False
        self._unsent_head = b""
        self.status = 0

    def response(self) -> WrittenResponse:
        """Return the response object that the handler returns to aiohttp."""
        return WrittenResponse(keep_alive=self._keep_alive and self.status > 0)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer in one write."""
        self.head(status, headers, length=len(body))
        await self.write(body)

    def head(self, status: int, headers: Headers, *, length: int | None = None, chunked: bool = True) -> None:
        """Queue the head, which is sent with the next write.

        The body ends by its length if it has one, else by chunks, or for HTTP/1.0 with the connection.
        """
        self.status = status
        self._chunked = length is None and chunked and self._is_http11
        self._keep_alive = self._keep_alive and (length is not None or self._chunked)
        header_fields = [("date", formatdate(usegmt=True)), *self._headers, *headers]
        if length is not None:
            header_fields.append(("content-length", str(length)))
        if self._chunked:
            header_fields.append(("transfer-encoding", "chunked"))
        if not self._keep_alive:
            header_fields.append(("connection", "close"))
        lines = "".join(f"{name}: {value}\r\n" for name, value in header_fields)
        self._unsent_head = f"HTTP/1.1 {status} {_PHRASES.get(status, 'Unknown')}\r\n{lines}\r\n".encode("latin-1")

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

    async def write_bad_chunk(self) -> None:
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

    async def wait_for_close(self) -> None:
        """Send nothing more until the client closes the connection; then raise `ConnectionError`."""
        self._keep_alive = False
        while self._connected():  # noqa: ASYNC110 - needed only where handlers are not cancelled
            await asyncio.sleep(CHECK_INTERVAL_S)

    def _framed(self, payload: bytes) -> bytes:
        if not self._chunked:
            return payload
        return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""

    async def _send(self, data: bytes) -> None:
        self._connected().write(self._unsent_head + data)
        self._unsent_head = b""
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
    for cut in islice(_AWKWARD.finditer(frames), MAX_CUTS):
        yield frames[start : cut.end()]
        start = cut.end()
    yield frames[start:]


FAILING_FAULTS = ("error-html", "refuse", "reset")  # OpenRouter tries its next model after these
REPLACING_FAULTS = ("error-html", "not-json", "empty", "redirect", "refuse", "reset", "stall-head")
UNFINISHED_FAULTS = (*CUTTING_FAULTS, "refuse", "reset", "stall-head")  # the answer has no correct end
REDIRECTED = "/_sim/redirected"

HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\r\n"
NONSENSE = b"<<this is {not JSON"


async def apply_fault(fault: str, writer: AnswerWriter, *, stream: bool) -> None:
    """Do one of `REPLACING_FAULTS`."""
    kind = EVENT_STREAM if stream else JSON
    match fault:
        case "error-html":
            await writer.answer(502, [PAGE], HTML)
        case "not-json":
            await writer.answer(200, [kind], b"data: %b\n\n" % NONSENSE if stream else NONSENSE)
        case "empty":
            await writer.answer(200, [kind], b"")
        case "redirect":
            await writer.answer(302, [("location", REDIRECTED), PAGE], b"")
        case "refuse":
            writer.close()
        case "reset":
            writer.reset()
        case "stall-head":
            await writer.wait_for_close()


YIELD_EVERY = 64  # events sent without a wait before other streams get their turn


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
    options = behaviour.options
    first_s = first_s if options.ttft is None else options.ttft
    return Pace(first_s, interval_s if options.tps is None else 1 / options.tps)


class Delivery(Struct):
    """Sends one reply whole or as a stream, with the faults of its behaviour."""

    writer: AnswerWriter
    reply: ComposedReply
    request: CompletionRequest
    behaviour: Behaviour
    pace: Pace
    record: ReceivedRequest

    async def run(self) -> None:
        """Send the answer to its end, correct or not.

        Raises `ConnectionError` if the client closed the connection before.
        """
        try:
            await (self._stream() if self.request.stream else self._unstreamed())
        finally:
            self._bill()
        match self.behaviour.one_of(CUTTING_FAULTS):
            case "stall" | "stall-mid":
                await self.writer.wait_for_close()
            case "die-mid-stream":
                self.writer.close()
            case "reset-mid-stream":
                self.writer.reset()
            case "bad-chunk":
                await self.writer.write_bad_chunk()
            case _:
                await self.writer.end()

    def _bill(self) -> None:
        """Record what the provider bills. Thoughts that a stream doesn't show are generated before its first token."""
        reply = self.reply
        unseen = reply.reasoning_count if self.request.stream and not reply.dialect.shows_reasoning else 0
        self.record.bill(
            prompt_tokens=reply.prompt_tokens + reply.dialect.citation_tokens,
            cached_tokens=reply.cached_tokens,
            completion_tokens=self.record.tokens + unseen,
        )

    async def _stream(self) -> None:
        whole = EventStream(self.reply, self.request, self.behaviour)
        events: Iterable[Event] = with_faults(whole, self.behaviour, error_event(self.reply))
        length = None
        if "content-length-stream" in self.behaviour.traits:
            events = list(events)
            length = sum(len(event.payload) for event in events)
        self._head(length)
        await self.writer.write()
        await (self._write_burst(events) if "burst" in self.behaviour.traits else self._write_paced(events))

    async def _unstreamed(self) -> None:
        body, broken = self._body(), self.behaviour.one_of(CUTTING_FAULTS)
        await asyncio.sleep(self.pace.due_s(self.reply.steps))
        self._head(None if broken in {"end-early", "bad-chunk"} else len(body))
        if broken:
            await self.writer.write()
        if broken != "stall":
            unfinished = broken and broken != "error-mid-stream"
            await self._write(body[: len(body) // 2] if unfinished else body)
            self.record.sent(self.reply.tokens)

    async def _write_paced(self, events: Iterable[Event]) -> None:
        loop, write = asyncio.get_running_loop(), self._write
        start_s = loop.time()
        for number, event in enumerate(events):
            wait_s = start_s + self.pace.due_s(event.step) - loop.time()
            if wait_s > 0 or number % YIELD_EVERY == YIELD_EVERY - 1:
                await asyncio.sleep(max(wait_s, 0))
            await write(event.payload)
            self.record.sent(event.tokens)

    async def _write_burst(self, events: Iterable[Event]) -> None:
        whole = list(events)
        await asyncio.sleep(self.pace.first_s)
        await self.writer.write(*(event.payload for event in whole))
        for event in whole:
            self.record.sent(event.tokens)

    @property
    def _write(self) -> Callable[[bytes], Awaitable[None]]:
        return self.writer.write_split if "split" in self.behaviour.traits else self.writer.write

    def _body(self) -> bytes:
        if "error-mid-stream" in self.behaviour.traits:
            body = msgspec.json.encode(PROVIDER_ERROR)
        else:
            body = completion(self.reply, self.request, self.behaviour)
        return gzip.compress(body, mtime=0) if "gzip" in self.behaviour.traits else body

    def _head(self, length: int | None) -> None:
        traits = self.behaviour.traits
        usual = EVENT_STREAM if self.request.stream else JSON
        headers = [PAGE if "wrong-content-type" in traits else usual]
        if "gzip" in traits:
            headers.append(("content-encoding", "gzip"))
        until_close = "eof-delimited" in traits
        self.writer.head(200, headers, length=None if until_close else length, chunked=not until_close)
