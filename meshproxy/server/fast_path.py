"""One client's connection for as long as it asks for the main job in the usual form, which nearly every client does for life.

head -> body and answer, side by side -> head again, or closed. The first head of any other form (wire.head) hands the
connection over, as it is, to aiohttp's protocol, which knows all of HTTP: nothing is refused here.

There is a task for each request, and no timer: the listener looks at all connections' deadlines now and then.
"""

import asyncio
import math
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Protocol, cast

from meshproxy.http1.heads import MAX_HEAD_BYTES, may_become_usual, usual_head
from meshproxy.server.client_address import Source

REQUEST_LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"
KEEPALIVE_S = 3630.0  # longer than any balancer's, lest one sends a request into a connection that closes
LINGER_S = (
    10.0  # read on after an answer to half a body: closed at once, the answer would be lost in a reset (RFC 9112, 9.6)
)
MAX_AHEAD_BYTES = 65_536  # read of a body that nobody wants yet, or of requests behind the one being answered


class Host(Protocol):
    """The listener, as its connections know it."""

    def header_timeout_s(self) -> float:
        """How long a head may take, as of now."""

    def has_room(self, descriptor: int) -> bool:
        """Whether a new connection, of this descriptor, may stay."""

    def joined(self, connection: "ClientConnection") -> None:
        """A client is here."""

    def left(self, connection: "ClientConnection") -> None:
        """It is gone, or somebody else's."""

    def others(self, source: Source | None) -> asyncio.Protocol:
        """Who serves a connection that asks for anything unusual."""

    def serve(self, connection: "ClientConnection", fields: dict[str, str]) -> Coroutine[Any, Any, None]:
        """Answer one request, and say so (`answered`) however it went."""

    def too_late(self) -> bytes:
        """The answer to a head that didn't come in time."""


class ClientConnection(asyncio.Protocol):
    """See the charter. `source`: the client that a PROXY header told. `deadline`: loop time after which to `expire` it."""

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
        self._ahead = b""  # of a head that isn't all there, or of what comes behind a request
        self._body: list[bytes] = []
        self._left = 0  # bytes of the body that haven't come
        self._is_wanted = False  # whether the rest of the body is
        self._whole: asyncio.Future[None] | None = None  # for who waits until the body is whole
        self._room: asyncio.Future[None] | None = None  # for who waits until the client has caught up
        self._task: asyncio.Task[None] | None = None
        self._is_paused = False
        self._is_held = False  # whether the next request waits until the client has taken the answers before it
        self._keep_alive = True
        self.peer: str | None = None
        self.deadline = math.inf

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
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
        """Bytes of a head, of a body, or of what comes behind it."""
        if self._left:
            self._receive_body(data)
        elif self._task is not None or self._is_held:
            self._ahead += data
            self._pause_if(len(self._ahead) > MAX_AHEAD_BYTES)
        else:
            self._receive_head(self._ahead + data)

    def connection_lost(self, exc: BaseException | None) -> None:  # noqa: ARG002 - that it is lost says enough
        """The client is gone: nobody waits for the answer."""
        self._host.left(self)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """The client doesn't keep up."""
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        """It does again: go on with the stream, or with the request that came behind what wasn't taken."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)
        if self._is_held:
            self._is_held = False
            self._await_head()

    # What the listener asks.

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, or a part of the answer is still ours."""
        return self._task is not None or self._transport.get_write_buffer_size() > 0

    @property
    def is_idle(self) -> bool:
        """Whether neither a request nor a part of one is here."""
        return not (self.busy or self._ahead or self._left)

    @property
    def unsent_bytes(self) -> int:
        """How much was written that the client hasn't taken."""
        return self._transport.get_write_buffer_size()

    def interrupt(self) -> None:
        """Cancel the request that is being answered, if one is."""
        if self._task is not None:
            self._task.cancel()

    def expire(self) -> None:
        """Time is up: 408 for half a head; nothing for none, for a balancer that connects ahead would take it for an answer."""
        if self._ahead:
            self._transport.write(self._host.too_late())
        self.force_close()

    def force_close(self) -> None:
        """Hang up, once what was written is sent."""
        self.deadline = math.inf
        self._transport.close()

    def abort(self) -> None:
        """Hang up at once."""
        self._transport.abort()

    # What the request's handler asks.

    @property
    def transport(self) -> asyncio.Transport:
        """The way back to the client."""
        return self._transport

    async def drained(self) -> None:
        """Return when the client has caught up."""
        if self._room is not None:
            await self._room

    async def body(self, timeout_s: float) -> bytes:
        """The request's body; TimeoutError if the rest of it doesn't come in time."""
        self._is_wanted = True
        if self._left:
            self._resume()
            self._whole = self._loop.create_future()
            async with asyncio.timeout(timeout_s):
                await self._whole
        body, self._body = self._body, []
        return body[0] if len(body) == 1 else b"".join(body)

    def answered(self, *, keep_alive: bool) -> None:
        """The answer is written: go on with what was sent behind the request. What is left of its body is let run out."""
        self._task = None
        self._keep_alive = keep_alive
        if self._left:
            self._body, self._is_wanted = [], True
            self.deadline = self._loop.time() + LINGER_S
            self._resume()
        elif keep_alive:
            self._await_head()
        else:
            self.force_close()

    def _await_head(self) -> None:
        """Begin the next request, which may be here already. A client that sends requests and takes no answers is read no
        further: what is written to it would grow without end.
        """
        if self._room is not None:
            self._is_held = True
            self.deadline = math.inf  # the time-out for writing holds
            return
        self.deadline = self._loop.time() + KEEPALIVE_S
        if self._ahead:
            self._receive_head(self._ahead)
        if len(self._ahead) <= MAX_AHEAD_BYTES:  # else each request would let one more read in
            self._resume()

    def _receive_head(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        if end > 3:
            fields = usual_head(data[:end], REQUEST_LINE)
            if fields is not None:
                self._begin(fields, data[end:])
                return
        elif may_become_usual(data, REQUEST_LINE):
            self.deadline = min(self.deadline, self._loop.time() + self._host.header_timeout_s())
            self._ahead = data
            return
        self._hand_over(data)

    def _begin(self, fields: dict[str, str], rest: bytes) -> None:
        """A request is here: its answer may begin before its body is."""
        length = int(fields["content-length"])
        body = rest if len(rest) <= length else rest[:length]
        self._left = length - len(body)
        self._ahead = rest[length:]
        self._body = [body]
        self._is_wanted = False
        self.deadline = math.inf
        self._task = self._loop.create_task(self._host.serve(self, fields))

    def _receive_body(self, data: bytes) -> None:
        if len(data) > self._left:
            data, self._ahead = data[: self._left], data[self._left :]
        self._left -= len(data)
        if self._task is None:
            if not self._left:
                self.answered(keep_alive=self._keep_alive)
            return
        self._body.append(data)
        if self._left:
            self._pause_if(not self._is_wanted and sum(map(len, self._body)) > MAX_AHEAD_BYTES)
        elif self._whole is not None:
            whole, self._whole = self._whole, None
            if not whole.done():
                whole.set_result(None)

    def _hand_over(self, data: bytes) -> None:
        """From here on the connection is aiohttp's."""
        self._host.left(self)
        self._ahead = b""
        self._resume()
        other = self._host.others(self._source)
        self._transport.set_protocol(other)
        other.connection_made(self._transport)
        other.data_received(data)

    def _pause_if(self, is_too_much: bool) -> None:  # noqa: FBT001 - the condition of its name
        if is_too_much and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            with suppress(RuntimeError):  # it is closing
                self._transport.resume_reading()
