"""The connection an answer goes out on, to the byte.

aiohttp reads the requests; answers are written on its transport by hand, since most of what a simulated provider has to do
wrong is what a well-made server library refuses to do. A body's end is told by chunks, by a length, or by the end of the
connection (RFC 9112, section 6). `ConnectionError` says that the client is gone.
"""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from email.utils import formatdate
from http import HTTPStatus
from itertools import islice
from typing import Any

from aiohttp import HttpVersion11, web

LOOK_S = 0.25  # how often a silent connection looks whether its client is still there
SPLIT_GAP_S = 0.001  # between two awkward pieces: long enough to be read one by one
JSON = ("content-type", "application/json")
EVENT_STREAM = ("content-type", "text/event-stream; charset=utf-8")
PAGE = ("content-type", "text/html; charset=utf-8")

MAX_CUTS = 64  # a write; a long text would otherwise take minutes

_WIDE = rb"[\xc0-\xf7](?=[\x80-\xbf])"  # the first byte of a UTF-8 character of several
# After one byte of a chunk's size; within "data", CR LF, an event's end, a UTF-8 character.
_AWKWARD = re.compile(rb"\A[0-9a-f](?=[0-9a-f])|da(?=ta)|\r(?=\n)|\n(?=\r?\n)|" + _WIDE)

Headers = Sequence[tuple[str, str]]


class Written(web.StreamResponse):
    """Tells aiohttp that the answer is on the wire already, and whether the connection goes on."""

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._goes_on = keep_alive

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow."""
        return self._goes_on

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to do."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to do."""


class Line:
    """One request's answer. `status`: as sent, 0 before."""

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
        """What the handler returns to aiohttp."""
        return Written(self.status, keep_alive=self._keep_alive and self.status > 0)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer in one write."""
        self.head(status, headers, length=len(body))
        await self.write(body)

    def head(self, status: int, headers: Headers, *, length: int | None = None, chunked: bool = True) -> None:
        """The head, sent with what is written next. The body's end is told by its length, else by chunks, which HTTP/1.0 doesn't
        know, else by the end of the connection.
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
        """Pieces of the body in one write, each a chunk of its own where there are chunks."""
        await self._send(b"".join(map(self._framed, payloads)))

    async def write_split(self, payload: bytes) -> None:
        """A piece of the body in two chunks and many writes."""
        for piece in awkward_pieces(b"".join(map(self._framed, halves(payload)))):
            await self._send(piece)
            await asyncio.sleep(SPLIT_GAP_S)

    async def end(self) -> None:
        """The honest end of the body."""
        await self._send(b"0\r\n\r\n" if self._chunked else b"")

    async def garble(self) -> None:
        """Bytes where a chunk's size should be, and the end of the connection."""
        await self._send(b"this is no chunk size\r\n")
        self.close()

    def close(self) -> None:
        """The connection's end, whatever is unfinished."""
        self._keep_alive = False
        self._connected().close()

    def reset(self) -> None:
        """RST instead of FIN: what lingers is thrown away (socket(7), SO_LINGER with a time of zero)."""
        self._keep_alive = False
        transport = self._connected()
        connection: Any = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    async def silence(self) -> None:
        """Nothing more, until the client gives up: then `ConnectionError`."""
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
    """Cut in two: within the first character of several bytes, else in the middle."""
    wide = re.search(_WIDE, payload)
    at = wide.end() if wide else len(payload) // 2
    return payload[:at], payload[at:]


def awkward_pieces(frames: bytes) -> Iterator[bytes]:
    """The same bytes, cut wherever a careless reader would stumble."""
    start = 0
    for found in islice(_AWKWARD.finditer(frames), MAX_CUTS):
        yield frames[start : found.end()]
        start = found.end()
    yield frames[start:]
