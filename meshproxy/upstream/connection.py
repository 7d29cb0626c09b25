"""One connection to a provider: an asyncio.Protocol that writes a request and pushes its answer.

One exchange at a time. States: idle, awaiting the head, in the body, then idle again or closed. A connection that
receives anything while idle, or more than the answer's framing allows, is closed and never reused: those bytes would be
taken for the next request's answer.

One timer watches the deadline. It is re-armed when it fires, not when bytes arrive.
"""

import asyncio
import select
import ssl
from collections.abc import Callable
from typing import NamedTuple, cast

from meshproxy.errors import UpstreamError
from meshproxy.http1.framing import INFLATED, Body, Inflated
from meshproxy.http1.heads import Head, HeadReader
from meshproxy.upstream import response as faults
from meshproxy.upstream.response import Response, Sink

IDENTITY = frozenset({"", "identity"})


class Timeouts(NamedTuple):
    """How long a provider may be silent, in seconds, and the largest answer that is kept whole."""

    first_byte_s: float
    idle_s: float
    keepalive_s: float
    max_response_bytes: int


class Connection(asyncio.Protocol):
    """One connection. `on_idle` is called when it can be used again; `on_lost` is called once, when it is closed."""

    __slots__ = (
        "_answer",
        "_body",
        "_deadline",
        "_head_reader",
        "_idle_s",
        "_keep_alive",
        "_loop",
        "_on_idle",
        "_on_lost",
        "_patience",
        "_paused",
        "_poll",
        "_response",
        "_timer",
        "_transport",
        "carried_by",
        "lost",
        "made",
        "sink",
        "usable",
    )
    sink: Sink

    def __init__(
        self, patience: Timeouts, on_idle: Callable[["Connection"], None], on_lost: Callable[["Connection"], None]
    ) -> None:
        self._patience = patience
        self._idle_s = patience.idle_s
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.made = False  # whether it was ever connected
        self.carried_by: asyncio.Transport | None = None  # the TCP transport below TLS; only it knows unsent bytes
        self.usable = False  # idle and not known to be closed
        self._transport: asyncio.Transport | None = None
        self._poll = select.poll()
        self._head_reader = HeadReader()
        self._answer: asyncio.Future[Response] | None = None  # set while the head is awaited
        self._body: Body | None = None  # set while in the body, with _response and sink
        self._response: Response | None = None
        self._keep_alive = False
        self._paused = False
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # Called by the provider and the response.

    def send(self, request: list[bytes]) -> "asyncio.Future[Response] | None":
        """Write a request; return the future of its answer or UpstreamError. None if the connection was dead."""
        transport = self._transport
        if transport is None or not self.usable or transport.is_closing():
            return None
        if len(request) == 1:
            transport.write(request[0])
        else:
            transport.writelines(request)
        if transport.is_closing():  # the first write failed: nothing was sent
            return None
        self.usable = False
        self._answer = self._loop.create_future()
        self._expect_within(self._patience.first_byte_s)
        return self._answer

    def has_unread_input(self) -> bool:
        """Return whether the idle socket has an end, a reset or bytes that the event loop hasn't delivered yet."""
        return bool(self._poll.poll(0))

    def abandon(self, answer: "asyncio.Future[Response]") -> None:
        """Give up an `answer` that isn't awaited any more. Closes the connection only if that exchange uses it."""
        if answer is self._answer:
            self.abort()
        elif not answer.cancelled() and answer.exception() is None:
            answer.result().close()

    def pause(self) -> None:
        """Stop reading from the socket."""
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Continue reading. The time-out for silence starts anew."""
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._deadline = self._loop.time() + self._idle_s
            self._transport.resume_reading()

    def abort(self, fault: UpstreamError | None = None) -> None:
        """Close the socket at once, and pass `fault` to the pending answer or to the sink of the body."""
        self.usable = False
        answer, self._answer = self._answer, None
        response, self._response, self._body = self._response, None, None
        if self._transport is not None:
            self._transport.abort()
        if response is not None:
            response.detach()
            if fault is not None:
                self.sink.fail(fault)
        elif answer is not None and not answer.done():
            answer.set_exception(fault or faults.dropped())

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Become idle, ready for the first request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        self.made = self.usable = True
        self._expect_within(self._patience.keepalive_s)

    def data_received(self, data: bytes) -> None:
        """Decode a read and push it to the sink. This is the hot path: one call for each read of a body."""
        body = self._body
        if body is None:
            self._receive_head(data)
            return
        self._deadline = self._loop.time() + self._idle_s
        try:
            payload = body.decode(data)
        except UpstreamError as fault:
            self.abort(fault)
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
            self.abort(self._loss())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 # the state decides which error it is
        """Fail what is pending and report the loss, once."""
        self._transport = None
        self.abort(self._loss())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.lost.set_result(None)
        self._on_lost(self)

    def _closed_cleanly(self) -> bool:
        """Return whether the provider ended the connection. A bare end of TCP under TLS may be forged (RFC 9112,
        9.8).
        """
        assert self._transport is not None  # noqa: S101 # only called from within the transport's callback
        tls = self._transport.get_extra_info("ssl_object")
        try:
            return tls is None or tls.read(1) == b""
        except ssl.SSLError as error:
            return isinstance(error, ssl.SSLZeroReturnError)

    def _loss(self) -> UpstreamError:
        return faults.cut_off() if self._answer is None else faults.unanswered()

    # Head, body, end.

    def _receive_head(self, data: bytes) -> None:
        """Feed the head reader, and begin the body once the head is complete."""
        answer = self._answer
        if answer is None or answer.done():  # idle, closing, or the request was cancelled
            self.abort()
            return
        try:
            result = self._head_reader.feed(data)
            if result is not None:
                self._begin_body(answer, *result)
        except UpstreamError as fault:
            self.abort(fault)

    def _begin_body(self, answer: "asyncio.Future[Response]", head: Head, rest: bytes) -> None:
        """Make the response, resolve the request's future, and decode what arrived behind the head."""
        response = Response(head.status, head.headers, self, self._patience.max_response_bytes)
        coding = response.header("content-encoding")
        body = head.body if coding is None else _decoded(head.body, coding, response)
        self._answer = None
        self._response = self.sink = response
        self._body = body
        self._keep_alive = head.keep_alive
        self._expect_within(self._idle_s)
        answer.set_result(response)
        if rest or body.done:
            self.data_received(rest)

    def _finish(self) -> None:
        """End a complete exchange. The connection is given back first, so that the sink's `end` may use it again."""
        response, body, transport = self._response, self._body, self._transport
        assert response is not None  # noqa: S101  # set and unset with the body
        assert body is not None  # noqa: S101
        assert transport is not None  # noqa: S101
        response.detach()
        self.resume()
        self._response = self._body = None
        unsent = transport.get_write_buffer_size() or (self.carried_by and self.carried_by.get_write_buffer_size())
        if not self._keep_alive or body.surplus or transport.is_closing() or unsent:
            self.abort()
        else:
            self.usable = True
            self._expect_within(self._patience.keepalive_s)
            self._on_idle(self)
        self.sink.end()

    # Deadlines.

    def _expect_within(self, timeout_s: float) -> None:
        """Set the deadline to `timeout_s` from now. A running timer is replaced only if it would fire too late."""
        self._deadline = deadline = self._loop.time() + timeout_s
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        """Act on a passed deadline: fail a silent exchange, or close an idle connection. Re-arm the timer otherwise."""
        if self._paused:
            self._deadline = self._loop.time() + self._idle_s
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._check_deadline)
            return
        self._timer = None
        if self._answer is not None:
            self.abort(faults.silent(self._patience.first_byte_s))
        elif self._body is not None:
            self.abort(faults.stalled(self._idle_s))
        else:
            self.abort()  # idle for keepalive_s


def _decoded(body: Body, coding: str, response: Response) -> Body:
    """Return the body with its content coding undone, and drop that header. Raises UpstreamError if unknown."""
    name = coding.strip().lower()
    if name in IDENTITY:
        return body
    if name not in INFLATED:
        raise faults.encoded(coding)
    response.headers = [header for header in response.headers if header[0] != "content-encoding"]
    return Inflated(body)
