"""One connection to a provider: an asyncio.Protocol that writes a request and pushes its answer.

One exchange at a time. A connection that receives anything while idle, or more than the answer's framing allows, is
closed and never reused: those bytes would be taken for the next request's answer. What each state means, and how long
it may last without a byte:

NEW        It isn't connected yet. The dialer's own time applies.
IDLE       It is connected, and has no request. Only now may a request be sent. keepalive_s.
WAITING    A request is written, and the head of its answer isn't complete. first_byte_s.
BODY       The head is complete, the body isn't. Then the connection is idle again. idle_s, except while we don't read.
LAST_BODY  The same, but then the connection is closed: the provider says so, or only its end delimits the body. idle_s.
CLOSED     It is closed, or will be in this turn of the event loop, and nothing is pending on it.

NEXT has each state's events and the state after them. Any other event closes the connection, which fails what is
pending. One timer watches the deadline. It is re-armed when it fires, not when bytes arrive.
"""

import asyncio
import select
import ssl
from collections.abc import Callable
from enum import IntEnum, auto
from typing import NamedTuple, cast

from meshproxy.errors import UpstreamError
from meshproxy.http1.message import INFLATED, Body, HeadReader, Inflated
from meshproxy.upstream import response as errors
from meshproxy.upstream.response import Response, Sink

IDENTITY = frozenset({"", "identity"})


class Timeouts(NamedTuple):
    """How long a provider may be silent, in seconds, and the largest answer that is kept whole."""

    first_byte_s: float
    idle_s: float
    keepalive_s: float
    max_response_bytes: int


class State(IntEnum):
    """What a connection is doing; see the module docstring. Looking up a number in a table calls no Python function."""

    NEW = auto()
    IDLE = auto()
    WAITING = auto()
    BODY = auto()
    LAST_BODY = auto()
    CLOSED = auto()


class Event(IntEnum):
    """What changes a connection's state."""

    CONNECTED = auto()
    SENT = auto()  # a request is written
    HEAD = auto()  # a head is complete, after whose body the connection may be kept
    LAST_HEAD = auto()  # a head is complete, after whose body the connection can't be kept
    END = auto()  # the body is complete
    DIRTY_END = auto()  # the body is complete, and more came after it or a part of the request isn't sent
    UNASKED = auto()  # bytes came that belong to no exchange
    BROKEN = auto()  # the answer can't be read
    EOF = auto()  # the provider sends no more
    LATE = auto()  # the deadline has passed
    ABORT = auto()  # the gateway gives the connection up
    LOST = auto()  # the connection is closed


_ENDS = dict.fromkeys((Event.EOF, Event.LATE, Event.ABORT, Event.LOST), State.CLOSED)
_ENDS_OF_ANSWERS = {**_ENDS, Event.BROKEN: State.CLOSED}
NEXT: dict[State, dict[Event, State]] = {
    State.NEW: {Event.CONNECTED: State.IDLE, Event.ABORT: State.CLOSED},
    State.IDLE: {Event.SENT: State.WAITING, Event.UNASKED: State.CLOSED, **_ENDS},
    State.WAITING: {
        Event.HEAD: State.BODY,
        Event.LAST_HEAD: State.LAST_BODY,
        Event.UNASKED: State.CLOSED,  # an answer to a request that was given up
        **_ENDS_OF_ANSWERS,
    },
    State.BODY: {Event.END: State.IDLE, Event.DIRTY_END: State.CLOSED, **_ENDS_OF_ANSWERS},
    State.LAST_BODY: {Event.END: State.CLOSED, Event.DIRTY_END: State.CLOSED, **_ENDS_OF_ANSWERS},
    # A dial that is given up may still connect, and the loop may deliver what it has read already.
    State.CLOSED: dict.fromkeys((Event.CONNECTED, Event.UNASKED, *_ENDS), State.CLOSED),
}


class Connection(asyncio.Protocol):
    """One connection. `on_idle` is called when it can be used again; `on_lost` is called once, when it is closed."""

    __slots__ = (
        "_answer",
        "_body",
        "_deadline",
        "_head_reader",
        "_loop",
        "_lost",
        "_on_idle",
        "_on_lost",
        "_paused",
        "_poll",
        "_response",
        "_timeouts",
        "_timer",
        "_transport",
        "carried_by",
        "sink",
        "state",
    )
    sink: Sink

    def __init__(
        self, timeouts: Timeouts, on_idle: Callable[["Connection"], None], on_lost: Callable[["Connection"], None]
    ) -> None:
        self._timeouts = timeouts
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self.state = State.NEW
        self._lost: asyncio.Future[None] | None = None  # see `close`
        self.carried_by: asyncio.Transport | None = None  # the TCP transport below TLS
        self._transport: asyncio.Transport | None = None
        self._poll: select.poll | None = (
            None  # made when the connection is used again: most long streams have a new one
        )
        self._head_reader = HeadReader()
        self._answer: asyncio.Future[Response] | None = None  # while waiting
        self._body: Body | None = None  # in a body, with _response and sink
        self._response: Response | None = None
        self._paused = False  # whether nothing is read from the socket
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def advance(self, event: Event, error: UpstreamError | None = None) -> None:
        """Enter the state after `event`, and set its deadline. An event that the table doesn't have here closes.

        On closing, `error` is passed to the pending answer or to the sink of the body.
        """
        before = self.state
        try:
            self.state = state = NEXT[before][event]
        except KeyError:
            self.state = state = State.CLOSED
            error = error or errors.dropped()
        if state is State.CLOSED:
            self._close(before, error)
            return
        timeouts = self._timeouts
        if state is State.IDLE:
            timeout_s = timeouts.keepalive_s
        else:
            timeout_s = timeouts.first_byte_s if state is State.WAITING else timeouts.idle_s
        self._deadline = deadline = self._loop.time() + timeout_s
        if self._timer is not None:  # a running timer is replaced only if it would fire too late
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._check_deadline)

    def _close(self, before: State, error: UpstreamError | None) -> None:
        """Close the socket at once, and end the exchange of the state `before`."""
        answer, self._answer = self._answer, None
        response, self._response, self._body = self._response, None, None
        if self._transport is not None:
            self._transport.abort()
        if before is State.WAITING:
            if answer is not None and not answer.done():
                answer.set_exception(error or errors.dropped())
        elif response is not None:
            response.flow = None
            if error is not None:
                self.sink.fail(error)

    # Called by the provider and the response.

    def send(self, request: list[bytes]) -> "asyncio.Future[Response] | None":
        """Write a request; return the future of its answer or UpstreamError. None if the connection was dead."""
        transport = self._transport
        if self.state is not State.IDLE or transport is None or transport.is_closing():
            return None
        if len(request) == 1:
            transport.write(request[0])
        else:
            transport.writelines(request)
        if transport.is_closing():  # the first write failed: nothing was sent
            return None
        self._answer = self._loop.create_future()
        self.advance(Event.SENT)
        return self._answer

    def has_unread_input(self) -> bool:
        """Return whether the idle socket has an end, a reset or bytes that the event loop hasn't delivered yet."""
        if self._poll is None:
            sock = None if self._transport is None else self._transport.get_extra_info("socket")
            if sock is None:
                return True
            self._poll = select.poll()
            self._poll.register(sock.fileno(), select.POLLIN)
        return bool(self._poll.poll(0))

    def abandon(self, answer: "asyncio.Future[Response]") -> bool:
        """Give up an `answer` that isn't awaited any more; return whether all of its request had left this process.

        Closes the connection only if that exchange uses it.
        """
        is_sent = answer is not self._answer or not self._has_unsent()
        if answer is self._answer:
            self.abort()
        elif not answer.cancelled() and answer.exception() is None:
            answer.result().close()
        return is_sent

    def pause(self) -> None:
        """Stop reading from the socket."""
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            if self.carried_by is not None:  # else TLS reads on, and drops what it has when the connection is lost
                self.carried_by.pause_reading()
            self._transport.pause_reading()

    def resume(self) -> None:
        """Continue reading. The time-out for silence starts anew."""
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._deadline = self._loop.time() + self._timeouts.idle_s
            self._transport.resume_reading()
            if self.carried_by is not None:
                self.carried_by.resume_reading()

    def abort(self, error: UpstreamError | None = None) -> None:
        """Close the socket at once, and pass `error` to the pending answer or to the sink of the body."""
        self.advance(Event.ABORT, error)

    def close(self) -> "asyncio.Future[None]":
        """Abort, because the gateway ends, and return a future that is done when the socket is closed."""
        self._lost = self._lost or self._loop.create_future()
        self.abort(errors.dropped())
        return self._lost

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Become idle, ready for the first request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.advance(Event.CONNECTED)

    def data_received(self, data: bytes) -> None:
        """Decode a read and push it to the sink. This is the hot path: one call for each read of a body."""
        body = self._body
        if body is None:
            self._receive_head(data)
            return
        self._deadline = self._loop.time() + self._timeouts.idle_s
        try:
            payload = body.decode(data)
        except UpstreamError as error:
            self.advance(Event.BROKEN, error)
            return
        if payload:
            self.sink.data(payload, data if body.whole else None)
        if body.done and self._body is body:  # the sink may have closed the response
            self._finish()

    def eof_received(self) -> None:
        """End a body that only the connection's end delimits; fail any other exchange. asyncio then closes."""
        if self._body is not None and self._body.until_eof and self._closed_cleanly():
            self._finish()
        else:
            self.advance(Event.EOF, self._loss())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 # the state decides which error it is
        """Fail what is pending and report the loss, once."""
        self._transport = None
        self.advance(Event.LOST, self._loss())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lost is not None:
            self._lost.set_result(None)
        self._on_lost(self)

    def _closed_cleanly(self) -> bool:
        """Return whether the provider ended the connection.

        A bare end of TCP under TLS may be forged (RFC 9112, 9.8).
        """
        assert self._transport is not None  # noqa: S101 # only called from within the transport's callback
        tls = self._transport.get_extra_info("ssl_object")
        try:
            return tls is None or tls.read(1) == b""
        except ssl.SSLError as error:
            return isinstance(error, ssl.SSLZeroReturnError)

    def _loss(self) -> UpstreamError:
        return errors.unanswered() if self.state is State.WAITING else errors.cut_off()

    # Head, body, end.

    def _receive_head(self, data: bytes) -> None:
        """Feed the head reader. Once the head is complete, resolve the request's future, and decode what came behind it."""
        answer = self._answer
        if answer is None or answer.done():  # idle, closed, or the request was cancelled
            self.advance(Event.UNASKED)
            return
        try:
            result = self._head_reader.feed(data)
            if result is None:
                return
            head, rest = result
            response = Response(head.status, head.headers, self, self._timeouts.max_response_bytes)
            body = head.body if head.coding is None else _decoded(head.body, head.coding, response)
        except UpstreamError as error:
            self.advance(Event.BROKEN, error)
            return
        self._answer = None
        self._response = self.sink = response
        self._body = body
        self.advance(Event.HEAD if head.keep_alive else Event.LAST_HEAD)
        answer.set_result(response)
        if rest or body.done:
            self.data_received(rest)

    def _finish(self) -> None:
        """End a complete exchange. The connection is given back first, so that the sink's `end` may use it again."""
        response, body, transport = self._response, self._body, self._transport
        if response is None or body is None or transport is None:  # not in a body
            return
        response.flow = None
        if self._paused:
            self.resume()
        self._response = self._body = None
        is_dirty = body.surplus or self._has_unsent() or transport.is_closing()
        self.advance(Event.DIRTY_END if is_dirty else Event.END)
        if self.state is State.IDLE:
            self._on_idle(self)
        self.sink.end()

    def _has_unsent(self) -> bool:
        """Return whether a part of the request is still in this process. To close the connection drops it."""
        transports = self._transport, self.carried_by
        return any(each is not None and each.get_write_buffer_size() for each in transports)

    # Deadlines.

    def _check_deadline(self) -> None:
        """Act on a passed deadline: fail a silent exchange, or close an idle connection. Re-arm the timer otherwise."""
        if self._paused:
            self._deadline = self._loop.time() + self._timeouts.idle_s
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._check_deadline)
            return
        self._timer = None
        if self.state is State.WAITING:
            error = errors.silent(self._timeouts.first_byte_s)
        else:
            error = errors.stalled(self._timeouts.idle_s)
        self.advance(Event.LATE, error)


def _decoded(body: Body, coding: str, response: Response) -> Body:
    """Return the body with its content coding undone, and drop that header. Raises UpstreamError if unknown."""
    name = coding.strip().lower()
    if name in IDENTITY:
        return body
    if name not in INFLATED:
        raise errors.encoded(coding)
    response.headers = [header for header in response.headers if header[0] != "content-encoding"]
    return Inflated(body)
