"""A client's connection while it sends chat completions in the usual form, as nearly every client does.

The first head of any other form (http1.message) hands the connection over, as it is, to aiohttp's protocol, which handles
all of HTTP: nothing is refused here. Each request has a task, and none has a timer: the listener checks the deadlines
of all connections regularly. What each state means, and its deadline:

IDLE         No byte of a request has arrived. KEEPALIVE_S; for a connection's first head, header_timeout_s.
HEAD         A part of a head has arrived, and may become a usual one. header_timeout_s from its first byte.
RECEIVING    The handler runs, and a part of the request's body is missing. No deadline: the handler has its own.
ANSWERING    The handler runs, and the request is complete. What follows it is kept, up to MAX_AHEAD_BYTES. None.
SKIPPING     The answer is written, and the rest of the body is dropped. Then the next request is read. LINGER_S.
LINGERING    The answer is written, and the rest of the body is dropped. Then the connection is closed. LINGER_S.
HELD         The answer is written. The next request waits until the client has taken it. None: write_timeout_s applies.
HANDED_OVER  aiohttp's protocol has the connection, for good.
CLOSED       It is closed, or will be when everything written is sent. A handler that still runs is being cancelled.

NEXT has each state's events and the state after them. Any other event closes the connection. Flow control is no state:
reading may be paused, and the client may be behind with taking what is written, in several of them.
"""

import asyncio
import math
import socket
from collections.abc import Coroutine
from contextlib import suppress
from enum import IntEnum, auto
from typing import Any, Protocol, cast

from meshproxy.http1.message import MAX_HEAD_BYTES, may_become_usual, parse_usual_head
from meshproxy.server.client_address import ProxiedClient

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

    def others(self, source: ProxiedClient | None) -> asyncio.Protocol:
        """Return the protocol for a connection whose request is unusual."""

    def handler(self) -> "Handler":
        """Return what answers the next request."""

    def too_late(self) -> bytes:
        """Return the answer to a head that didn't arrive in time."""


class Handler(Protocol):
    """The handler of the requests of these connections."""

    def serve(self, connection: "ClientConnection", fields: dict[str, str]) -> Coroutine[Any, Any, None]:
        """Answer one request, and call the connection's `answered` whatever happened."""


class State(IntEnum):
    """What a connection is doing; see the module docstring. Looking up a number in a table calls no Python function."""

    IDLE = auto()
    HEAD = auto()
    RECEIVING = auto()
    ANSWERING = auto()
    SKIPPING = auto()
    LINGERING = auto()
    HELD = auto()
    HANDED_OVER = auto()
    CLOSED = auto()


class Event(IntEnum):
    """What changes a connection's state."""

    HEAD_BEGUN = auto()  # more of a head arrived, and it isn't complete
    REQUEST_BEGUN = auto()  # a usual head is complete, and its body isn't
    REQUEST = auto()  # a usual head is complete, and its body is
    OTHER_FORM = auto()  # a head that isn't usual
    BODY_END = auto()  # the last bytes of a body arrived
    ANSWERED = auto()  # the handler is done, and the connection may be kept
    ANSWERED_LAST = auto()  # the handler is done, and the connection can't be kept
    TAKEN = auto()  # the client has taken what was written to it
    LATE = auto()  # the deadline has passed
    CLOSE = auto()  # the listener closes the connection
    LOST = auto()  # the connection is closed


_ENDS = {Event.CLOSE: State.CLOSED, Event.LOST: State.CLOSED}
_HEADS = {
    Event.HEAD_BEGUN: State.HEAD,
    Event.REQUEST_BEGUN: State.RECEIVING,
    Event.REQUEST: State.ANSWERING,
    Event.OTHER_FORM: State.HANDED_OVER,
    Event.LATE: State.CLOSED,
    **_ENDS,
}
NEXT: dict[State, dict[Event, State]] = {
    State.IDLE: _HEADS,
    State.HEAD: _HEADS,
    State.RECEIVING: {
        Event.BODY_END: State.ANSWERING,
        Event.ANSWERED: State.SKIPPING,
        Event.ANSWERED_LAST: State.LINGERING,
        **_ENDS,
    },
    State.ANSWERING: {Event.ANSWERED: State.HELD, Event.ANSWERED_LAST: State.CLOSED, **_ENDS},
    State.SKIPPING: {Event.BODY_END: State.HELD, Event.LATE: State.CLOSED, **_ENDS},
    State.LINGERING: {Event.BODY_END: State.CLOSED, Event.LATE: State.CLOSED, **_ENDS},
    State.HELD: {Event.TAKEN: State.IDLE, **_ENDS},
    State.HANDED_OVER: {},
    # The handler may end after its client has gone, and the listener may find a passed deadline.
    State.CLOSED: dict.fromkeys((Event.ANSWERED, Event.ANSWERED_LAST, Event.LATE, *_ENDS), State.CLOSED),
}


class ClientConnection(asyncio.Protocol):
    """One connection. `source`: the client named by a PROXY header. `deadline`: the loop time to `expire` it at."""

    __slots__ = (
        "_ahead",
        "_body",
        "_host",
        "_is_paused",
        "_left",
        "_loop",
        "_room",
        "_source",
        "_task",
        "_whole",
        "deadline",
        "peer",
        "state",
        "transport",
    )
    transport: asyncio.Transport

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop, source: ProxiedClient | None) -> None:
        self._host = host
        self._loop = loop
        self._source = source
        self._ahead = b""  # an incomplete head, or what follows a request
        # One buffer: a list of a client's tiny pieces would take many times as much.
        self._body: bytes | bytearray = b""
        self._left = 0  # bytes of the body not received yet
        self._whole: asyncio.Future[None] | None = None  # the handler waits for it: resolved when the body is complete
        self._room: asyncio.Future[None] | None = None  # resolved when the client has taken enough
        self._task: asyncio.Task[None] | None = None  # runs the handler
        self._is_paused = False  # whether nothing is read from the client
        self.state = State.IDLE
        self.peer: str | None = None
        self.deadline = math.inf

    def advance(self, event: Event) -> None:
        """Enter the state after `event`, and set its deadline. An event that the table doesn't have here closes."""
        before = self.state
        try:
            self.state = state = NEXT[before][event]
        except KeyError:
            self.state = state = State.CLOSED
        if state is State.IDLE:
            self.deadline = self._loop.time() + KEEPALIVE_S
        elif state is State.HEAD:
            self.deadline = min(self.deadline, self._loop.time() + self._host.header_timeout_s())
        elif state is State.SKIPPING or state is State.LINGERING:
            self.deadline = self._loop.time() + LINGER_S
        else:
            self.deadline = math.inf
            if state is State.CLOSED and before is not state and event is not Event.LOST:
                self.transport.close()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Await the first head; close the connection at once if there is no room."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        name = self._source or transport.get_extra_info("peername")
        self.peer = name[0] if isinstance(name, tuple) else None
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.deadline = self._loop.time() + self._host.header_timeout_s()
        self._host.joined(self)
        if sock is not None and not self._host.has_room(sock.fileno()):
            self.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a head, of a body, or of what follows it."""
        state = self.state
        if state is State.IDLE or state is State.HEAD:
            self._receive_head(self._ahead + data)
        elif state is State.ANSWERING or state is State.HELD:
            self._ahead += data
            self._pause_if(len(self._ahead) > MAX_AHEAD_BYTES)
        elif state is not State.CLOSED:
            self._receive_body(data)

    def connection_lost(self, exc: BaseException | None) -> None:  # noqa: ARG002 - the reason doesn't matter
        """Cancel the request: the client is gone. A stream that goes on without it waits for it no longer."""
        self._host.left(self)
        self.advance(Event.LOST)
        self.interrupt()
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def pause_writing(self) -> None:
        """Note that the client doesn't keep up."""
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        """Continue the stream, or the next request that waited for the client."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)
        if self.state is State.HELD:
            self._await_head()

    # Called by the listener.

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, or a part of the answer isn't sent."""
        return self._task is not None or self.transport.get_write_buffer_size() > 0

    @property
    def is_idle(self) -> bool:
        """Whether no request, not even a part of one, has been received."""
        return self.state is State.IDLE and not self.busy

    @property
    def unsent_bytes(self) -> int:
        """Bytes written that the client hasn't taken."""
        return self.transport.get_write_buffer_size()

    def interrupt(self) -> None:
        """Cancel the request that is being answered, if there is one."""
        if self._task is not None:
            self._task.cancel()

    def expire(self) -> None:
        """Close a connection whose deadline has passed: with 408 if it has begun a head.

        Nothing is sent if it hasn't begun: a balancer that connects ahead of requests would take the 408 for an answer.
        """
        if self.state is State.HEAD:
            self.transport.write(self._host.too_late())
        self.advance(Event.LATE)

    def force_close(self) -> None:
        """Close the connection once everything written is sent."""
        self.advance(Event.CLOSE)

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()
        self.advance(Event.CLOSE)

    # Called by the request's handler.

    async def drained(self) -> None:
        """Wait until the client has caught up."""
        if self._room is not None:
            await self._room

    async def body(self, timeout_s: float) -> bytes:
        """Return the request's body. Raises TimeoutError if the rest doesn't arrive in time."""
        if self._left:  # also where the connection is being closed: the handler will be cancelled
            self._resume()
            self._whole = self._loop.create_future()
            async with asyncio.timeout(timeout_s):
                await self._whole
        body, self._body = self._body, b""
        return bytes(body)

    def answered(self, *, keep_alive: bool) -> None:
        """Continue with the next request, after an answer. The rest of an unread body is read and dropped first."""
        self._task = None
        self.advance(Event.ANSWERED if keep_alive else Event.ANSWERED_LAST)
        if self.state is State.HELD:
            self._await_head()
        elif self.state is not State.CLOSED:
            self._body = b""
            self._resume()

    def _await_head(self) -> None:
        """Await the next request, which may be received already, once the client has taken the answers.

        Stop reading from a client that sends requests and takes no answers: what is written to it would grow without
        bound.
        """
        if self._room is not None:
            return
        self.advance(Event.TAKEN)
        if self._ahead:
            self._receive_head(self._ahead)
        if self._is_paused and len(self._ahead) <= MAX_AHEAD_BYTES:  # otherwise each request would let one more be read
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
            self._ahead = data
            self.advance(Event.HEAD_BEGUN)
            return
        self._hand_over(data)

    def _begin(self, fields: dict[str, str], rest: bytes) -> None:
        """Start the handler of a request. Its answer may begin before its body is complete."""
        length = int(fields["content-length"])
        body = rest if len(rest) <= length else rest[:length]
        self._left = length - len(body)
        self._ahead = rest[length:]
        self._body = body
        self._whole = None
        self.advance(Event.REQUEST_BEGUN if self._left else Event.REQUEST)
        self._task = self._loop.create_task(self._host.handler().serve(self, fields))

    def _receive_body(self, data: bytes) -> None:
        """Keep bytes of the body, and wake the handler when it is complete. Drop them after the answer."""
        if len(data) > self._left:
            data, self._ahead = data[: self._left], data[self._left :]
        self._left -= len(data)
        if self.state is State.RECEIVING:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += data
            self._pause_if(self._left > 0 and self._whole is None and len(self._body) > MAX_AHEAD_BYTES)
        if self._left:
            return
        self.advance(Event.BODY_END)
        if self.state is State.HELD:
            self._await_head()
        elif self._whole is not None and not self._whole.done():
            self._whole.set_result(None)

    def _hand_over(self, data: bytes) -> None:
        """Give the connection to aiohttp's protocol, for good."""
        self.advance(Event.OTHER_FORM)
        self._host.left(self)
        self._ahead = b""
        self._resume()
        other = self._host.others(self._source)
        self.transport.set_protocol(other)
        other.connection_made(self.transport)
        other.data_received(data)

    def _pause_if(self, is_too_much: bool) -> None:  # noqa: FBT001 - the condition in its name
        if is_too_much and not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            with suppress(RuntimeError):  # closing already
                self.transport.resume_reading()
