"""A client's connection as long as it sends chat completions in the usual form, which nearly every client always does.

States: awaiting a head; then body and answer, side by side; then a head again, or closed. The first head of any other
form (http1.heads) hands the connection over, as it is, to aiohttp's protocol, which handles all of HTTP: nothing is
refused here.

Each request has a task, and none has a timer: the listener checks the deadlines of all connections regularly.
"""

import asyncio
import math
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Protocol, cast

from meshproxy.http1.heads import MAX_HEAD_BYTES, may_become_usual, parse_usual_head
from meshproxy.server.client_address import Source

REQUEST_LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"
KEEPALIVE_S = 3630.0  # longer than any balancer's: else a balancer may send a request on a closing connection
# Read on after answering half a body: closed at once, the answer would be lost in a reset (RFC 9112, 9.6).
LINGER_S = 10.0
MAX_AHEAD_BYTES = 65_536  # of a body that isn't wanted yet, or of requests behind the current one


class Host(Protocol):
    """The listener, as its connections use it."""

    def header_timeout_s(self) -> float:
        """Return how long a head may take."""

    def has_room(self, descriptor: int) -> bool:
        """Return whether a new connection with this descriptor may stay."""

    def joined(self, connection: "ClientConnection") -> None:
        """Add a new connection."""

    def left(self, connection: "ClientConnection") -> None:
        """Remove a connection that is closed or handed over."""

    def others(self, source: Source | None) -> asyncio.Protocol:
        """Return the protocol for a connection whose request is unusual."""

    def serve(self, connection: "ClientConnection", fields: dict[str, str]) -> Coroutine[Any, Any, None]:
        """Answer one request, and call `answered` whatever happened."""

    def too_late(self) -> bytes:
        """Return the answer to a head that didn't arrive in time."""


class ClientConnection(asyncio.Protocol):
    """One connection. `source`: the client named by a PROXY header. `deadline`: the loop time to `expire` it at."""

    __slots__ = (
        "_ahead",
        "_body",
        "_host",
        "_is_held",
        "_is_paused",
        "_is_wanted",
        "_keep_alive",
        "_left",
        "_loop",
        "_room",
        "_source",
        "_task",
        "_transport",
        "_whole",
        "deadline",
        "peer",
    )
    _transport: asyncio.Transport

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop, source: Source | None) -> None:
        self._host = host
        self._loop = loop
        self._source = source
        self._ahead = b""  # an incomplete head, or what follows a request
        self._body: bytes | bytearray = (
            b""  # one buffer: a list of a client's tiny pieces would take many times as much
        )
        self._left = 0  # bytes of the body not received yet
        self._is_wanted = False  # whether the handler waits for the body
        self._whole: asyncio.Future[None] | None = None  # resolved when the body is complete
        self._room: asyncio.Future[None] | None = None  # resolved when the client has caught up
        self._task: asyncio.Task[None] | None = None
        self._is_paused = False
        self._is_held = False  # whether the next request waits until the client has taken the answers before it
        self._keep_alive = True
        self.peer: str | None = None
        self.deadline = math.inf

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Await the first head; close the connection at once if there is no room."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        name = self._source or transport.get_extra_info("peername")
        self.peer = name[0] if isinstance(name, tuple) else None
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.deadline = self._loop.time() + self._host.header_timeout_s()
        self._host.joined(self)
        if sock is not None and not self._host.has_room(sock.fileno()):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a head, of a body, or of what follows it."""
        if self._left:
            self._receive_body(data)
        elif self._task is not None or self._is_held:
            self._ahead += data
            self._pause_if(len(self._ahead) > MAX_AHEAD_BYTES)
        else:
            self._receive_head(self._ahead + data)

    def connection_lost(self, exc: BaseException | None) -> None:  # noqa: ARG002 - the reason doesn't matter
        """Cancel the request: the client is gone."""
        self._host.left(self)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """Note that the client doesn't keep up."""
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        """Continue the stream, or the next request that waited for the client."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)
        if self._is_held:
            self._is_held = False
            self._await_head()

    # Called by the listener.

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, or a part of the answer isn't sent."""
        return self._task is not None or self._transport.get_write_buffer_size() > 0

    @property
    def is_idle(self) -> bool:
        """Whether no request, not even a part of one, has been received."""
        return not (self.busy or self._ahead or self._left)

    @property
    def unsent_bytes(self) -> int:
        """Bytes written that the client hasn't taken."""
        return self._transport.get_write_buffer_size()

    def interrupt(self) -> None:
        """Cancel the request that is being answered, if there is one."""
        if self._task is not None:
            self._task.cancel()

    def expire(self) -> None:
        """Close a connection whose head is late: with 408 if it has begun.

        Nothing is sent if it hasn't begun: a balancer that connects ahead of requests would take the 408 for an answer.
        """
        if self._ahead:
            self._transport.write(self._host.too_late())
        self.force_close()

    def force_close(self) -> None:
        """Close the connection once everything written is sent."""
        self.deadline = math.inf
        self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    # Called by the request's handler.

    @property
    def transport(self) -> asyncio.Transport:
        """The transport to the client."""
        return self._transport

    async def drained(self) -> None:
        """Wait until the client has caught up."""
        if self._room is not None:
            await self._room

    async def body(self, timeout_s: float) -> bytes:
        """Return the request's body. Raises TimeoutError if the rest doesn't arrive in time."""
        self._is_wanted = True
        if self._left:
            self._resume()
            self._whole = self._loop.create_future()
            async with asyncio.timeout(timeout_s):
                await self._whole
        body, self._body = self._body, b""
        return bytes(body)

    def answered(self, *, keep_alive: bool) -> None:
        """Continue with the next request, after an answer. The rest of an unread body is read and dropped first."""
        self._task = None
        self._keep_alive = keep_alive
        if self._left:
            self._body, self._is_wanted = b"", True
            self.deadline = self._loop.time() + LINGER_S
            self._resume()
        elif keep_alive:
            self._await_head()
        else:
            self.force_close()

    def _await_head(self) -> None:
        """Await the next request, which may be received already.

        Stop reading from a client that sends requests and takes no answers: what is written to it would grow without
        bound.
        """
        if self._room is not None:
            self._is_held = True
            self.deadline = math.inf  # the write time-out applies
            return
        self.deadline = self._loop.time() + KEEPALIVE_S
        if self._ahead:
            self._receive_head(self._ahead)
        if len(self._ahead) <= MAX_AHEAD_BYTES:  # otherwise each request would let one more be read
            self._resume()

    def _receive_head(self, data: bytes) -> None:
        """Start the request if the head is complete and usual; keep an incomplete one; hand over any other."""
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        if end > 3:
            fields = parse_usual_head(data[:end], REQUEST_LINE)
            if fields is not None:
                self._begin(fields, data[end:])
                return
        elif may_become_usual(data, REQUEST_LINE):
            self.deadline = min(self.deadline, self._loop.time() + self._host.header_timeout_s())
            self._ahead = data
            return
        self._hand_over(data)

    def _begin(self, fields: dict[str, str], rest: bytes) -> None:
        """Start the handler of a request. Its answer may begin before its body is complete."""
        length = int(fields["content-length"])
        body = rest if len(rest) <= length else rest[:length]
        self._left = length - len(body)
        self._ahead = rest[length:]
        self._body = body
        self._is_wanted = False
        self.deadline = math.inf
        self._task = self._loop.create_task(self._host.serve(self, fields))

    def _receive_body(self, data: bytes) -> None:
        """Keep bytes of the body, and wake the handler when it is complete. Drop them after the answer."""
        if len(data) > self._left:
            data, self._ahead = data[: self._left], data[self._left :]
        self._left -= len(data)
        if self._task is None:
            if not self._left:
                self.answered(keep_alive=self._keep_alive)
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += data
        if self._left:
            self._pause_if(not self._is_wanted and len(self._body) > MAX_AHEAD_BYTES)
        elif self._whole is not None:
            whole, self._whole = self._whole, None
            if not whole.done():
                whole.set_result(None)

    def _hand_over(self, data: bytes) -> None:
        """Give the connection to aiohttp's protocol, for good."""
        self._host.left(self)
        self._ahead = b""
        self._resume()
        other = self._host.others(self._source)
        self._transport.set_protocol(other)
        other.connection_made(self._transport)
        other.data_received(data)

    def _pause_if(self, is_too_much: bool) -> None:  # noqa: FBT001 - the condition in its name
        if is_too_much and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            with suppress(RuntimeError):  # closing already
                self._transport.resume_reading()
