"""`Response`, one answer of a provider, and the errors of a provider on the wire.

Each error has a message for the client and two verdicts. `may_have_run` (in the error response): the provider may have
done the work, so a client that repeats could pay twice. `safe_to_repeat` (in the error): the gateway may repeat the
request itself, because no byte of it was sent.

A body is pushed to a sink. Until `relay` or `read` sets one, the response keeps up to MAX_EARLY_BYTES and then pauses
the socket.
"""

import asyncio
import errno
import os
import re
import socket
import ssl
from typing import Final, Protocol

from meshproxy.errors import (
    Phase,
    Source,
    UpstreamError,
    gateway_timeout,
    overloaded,
    provider_not_available,
    upstream_error,
)
from meshproxy.http1.message import after_sending

POOL_RETRY_AFTER_S = 1.0
LAST_BYTE_S: Final = 2.0  # for the end of a body after `[DONE]`; then its connection is closed
_DONE: Final = re.compile(rb"[\r\n]data: ?\[DONE\][\r\n]")  # a string in JSON has no line ends
_DONE_BYTES: Final = 14  # that it has at most, but for the last one
# Resources that this host lacks, not the provider: descriptors, memory, local ports (socket(2), connect(2)).
_LOCAL_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


def cut_off() -> UpstreamError:
    """Make the error for a connection lost in the middle of a body."""
    return after_sending("The provider closed the connection in the middle of its answer.")


def unanswered() -> UpstreamError:
    """Make the error for a connection lost after the request was written and before the answer's head."""
    return after_sending("The provider closed the connection without an answer.", phase=Phase.HEAD)


def too_large(limit_bytes: int) -> UpstreamError:
    """Make the error for a body that is larger than may be kept in memory."""
    return after_sending(f"The provider's answer is larger than {limit_bytes} bytes.", unreadable=True)


def encoded(coding: str) -> UpstreamError:
    """Make the error for a body in a content coding that the gateway can't decode and didn't ask for."""
    message = f"The provider answered with content-encoding {coding[:64]!r}, which it wasn't asked for."
    return after_sending(message, unreadable=True)


def silent(timeout_s: float) -> UpstreamError:
    """Make the error for no head of an answer within `timeout_s` of the request."""
    return _too_late(f"The provider did not begin to answer within {timeout_s:g} seconds.", Phase.HEAD)


def stalled(timeout_s: float) -> UpstreamError:
    """Make the error for no byte of the body for `timeout_s`."""
    return _too_late(f"The provider sent nothing for {timeout_s:g} seconds in the middle of its answer.", Phase.BODY)


def connect_timeout(timeout_s: float) -> UpstreamError:
    """Make the error for no connection within `timeout_s`."""
    response = gateway_timeout(
        f"The provider could not be connected to within {timeout_s:g} seconds.", may_have_run=False
    )
    return UpstreamError(response, safe_to_repeat=True, phase=Phase.CONNECT, reason="time-out")


def unreachable(error: Exception, phase: Phase = Phase.CONNECT) -> UpstreamError:
    """Make the error for a failed connection: name, port or certificate. Internal addresses stay in its cause."""
    if _is_local(error):
        response = overloaded("The gateway can't open another connection.")
        return UpstreamError(response, safe_to_repeat=True, phase=phase, reason=reason_of(error), source=Source.GATEWAY)
    response = upstream_error(f"The provider can't be reached: {_client_message(error)}.", may_have_run=False)
    return UpstreamError(response, safe_to_repeat=True, phase=phase, reason=reason_of(error))


def reason_of(error: BaseException) -> str:
    """Describe the cause of a failed connection, with the system's error name and number where there are any."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None)  # only errors of OpenSSL calls have a reason
        return f"TLS handshake failed: {reason or 'the connection was closed'}"
    if isinstance(error, socket.gaierror):
        return f"unknown host: {error.strerror or 'the name has no address'}"
    if isinstance(error, UnicodeError):
        return "unknown host: the name isn't valid"
    if isinstance(error, OSError) and error.errno is not None:
        name = errno.errorcode.get(error.errno, "errno")
        return f"{os.strerror(error.errno).lower()} ({name} {error.errno})"
    return "the connection failed"


def exhausted(limit: int) -> UpstreamError:
    """Make the error for all `limit` connections being in use for too long."""
    message = f"All {limit} connections to the provider are in use."
    return UpstreamError(provider_not_available(message, POOL_RETRY_AFTER_S), safe_to_repeat=True, phase=Phase.CONNECT)


def closing() -> UpstreamError:
    """Make the error for a request that wasn't sent because the gateway is shutting down."""
    return UpstreamError(overloaded("The gateway is shutting down."), safe_to_repeat=True, phase=Phase.CONNECT)


def dropped() -> UpstreamError:
    """Make the error for a connection that the gateway itself closed with a request on it."""
    return after_sending("The gateway closed its connection to the provider.")


def _too_late(message: str, phase: Phase) -> UpstreamError:
    return UpstreamError(
        gateway_timeout(message, may_have_run=True), safe_to_repeat=False, phase=phase, reason="time-out"
    )


def _is_local(error: Exception) -> bool:
    """Return whether this host lacks a resource.

    A resolver that can't open a socket only reports an unknown name, so this function tries to open one.
    """
    if isinstance(error, socket.gaierror):
        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        except OSError as out:
            return out.errno in _LOCAL_ERRNOS
        return False
    return isinstance(error, OSError) and error.errno in _LOCAL_ERRNOS


def _client_message(error: Exception) -> str:
    """Describe the cause as the client may see it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate isn't valid ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return "the TLS handshake failed"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "its name can't be resolved"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    return "the connection failed"


MAX_EARLY_BYTES = 65_536


class Sink(Protocol):
    """The receiver of a streamed body.

    It is called from the event loop as bytes arrive, and never after `Response.close()`. The last call is either `end`
    or `fail`. A sink may pause, resume and close its response from within a call.
    """

    def data(self, payload: bytes, frame: bytes | None) -> None:
        """Take body bytes, at least one. `frame` is the object read from the socket, if it was exactly whole chunks."""

    def end(self) -> None:
        """Note that the body is complete."""

    def fail(self, error: UpstreamError) -> None:
        """Note that the body broke off."""


class Flow(Protocol):
    """The part of a connection that a response uses while its body isn't complete."""

    sink: Sink

    def pause(self) -> None:
        """Stop reading from the socket."""

    def resume(self) -> None:
        """Continue reading."""

    def abort(self) -> None:
        """Close the socket at once."""


class Response:
    """One answer of a provider. Header names are lower-case. It is its own sink until `relay` or `read` sets one.

    `flow` is its connection, which sets it to None when the body is over. `early`: the pieces of the body that arrived
    before a sink was set, as (payload, frame); see `Sink.data`.
    """

    __slots__ = ("_closed", "_early_bytes", "_error", "_listener", "_max_bytes", "early", "flow", "headers", "status")

    def __init__(self, status: int, headers: list[tuple[str, str]], flow: Flow | None, max_bytes: int) -> None:
        self.status = status
        self.headers = headers
        self.flow = flow
        self._max_bytes = max_bytes
        self.early: list[tuple[bytes, bytes | None]] = []
        self._early_bytes = 0
        self._error: UpstreamError | None = None
        self._listener: asyncio.Future[None] | None = None
        self._closed = False

    @classmethod
    def whole(cls, status: int, headers: list[tuple[str, str]], body: bytes) -> "Response":
        """Make a complete response without a connection."""
        made = cls(status, headers, None, len(body))
        made.data(body, None)
        return made

    def header(self, name: str) -> str | None:
        """Return the first value of the header `name` (lower-case)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    async def read(self) -> bytes:
        """Return the whole body. Raises UpstreamError if it breaks off or is larger than the settings allow.

        An event stream is whole after its `[DONE]`: the end of its body is awaited for LAST_BYTE_S.
        """
        # usual for small answers: the body came with its head
        if self.flow is None and self._error is None and self._early_bytes <= self._max_bytes:
            return self.early[0][0] if len(self.early) == 1 else b"".join([payload for payload, _ in self.early])
        whole = _WholeBody(self, self._max_bytes)
        self.relay(whole)
        try:
            return await whole.result
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            whole.stop_waiting()

    @property
    def may_receive_more(self) -> bool:
        """Whether more of the body may arrive unasked: it isn't over, and at most MAX_EARLY_BYTES are kept."""
        return self.flow is not None and self._early_bytes <= MAX_EARLY_BYTES

    @property
    def ended(self) -> bool:
        """Whether the body is over: complete, or broken off by `error`."""
        return self.flow is None

    @property
    def error(self) -> UpstreamError | None:
        """What broke the body off before a sink was set."""
        return self._error

    async def wait_for_more(self, timeout_s: float) -> None:
        """Wait for another piece of the body or its end, at most `timeout_s`. One caller at a time."""
        loop = asyncio.get_running_loop()
        self._listener = loop.create_future()
        timer = loop.call_later(timeout_s, self._wake_listener)
        try:
            await self._listener
        finally:
            timer.cancel()
            self._listener = None

    def relay(self, sink: Sink) -> None:
        """Push the body to `sink` from now on. What has arrived, even its end, is pushed before this returns."""
        if self._early_bytes > MAX_EARLY_BYTES:
            self.resume()
        early, self.early, self._early_bytes = self.early, [], 0
        for payload, frame in early:
            if self._closed:
                return
            sink.data(payload, frame)
        if self._closed:
            return
        if self.flow is not None:
            self.flow.sink = sink
        elif self._error is not None:
            sink.fail(self._error)
        else:
            sink.end()

    def pause(self) -> None:
        """Stop reading from the socket. Bytes already read still arrive. A pause isn't the provider's silence."""
        if self.flow is not None:
            self.flow.pause()

    def resume(self) -> None:
        """Continue reading after `pause`."""
        if self.flow is not None:
            self.flow.resume()

    def close(self) -> None:
        """Give up the rest of the body. An unfinished answer's socket is closed at once, so that the provider stops."""
        self._closed = True
        self.early.clear()
        flow, self.flow = self.flow, None
        if flow is not None:
            flow.abort()

    def data(self, payload: bytes, frame: bytes | None) -> None:
        """Keep body bytes that arrive before a sink is set."""
        self.early.append((payload, frame))
        self._early_bytes += len(payload)
        if self._early_bytes > MAX_EARLY_BYTES:
            self.pause()
        if self._listener is not None:
            self._wake_listener()

    def end(self) -> None:
        """Note that the body is complete before a sink is set."""
        if self._listener is not None:
            self._wake_listener()

    def fail(self, error: UpstreamError) -> None:
        """Note that the body broke off before a sink was set."""
        self._error = error
        self._wake_listener()

    def _wake_listener(self) -> None:
        """Wake the listener of `wait_for_more`."""
        if self._listener is not None and not self._listener.done():
            self._listener.set_result(None)


class _WholeBody:
    """The sink behind `Response.read`."""

    def __init__(self, response: Response, max_bytes: int) -> None:
        self.result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._response = response
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._tail = b""
        self._timer: asyncio.TimerHandle | None = None  # from `[DONE]` on

    def data(self, payload: bytes, frame: bytes | None) -> None:  # noqa: ARG002 # only a relay uses frames
        self._left -= len(payload)
        if self._left < 0:
            self._response.close()
            self.fail(too_large(self._max_bytes))
        else:
            self._pieces.append(payload)
            joined = self._tail + payload
            self._tail = joined[-_DONE_BYTES:]
            if self._timer is None and b"[DONE]" in joined and _DONE.search(joined):
                self._timer = asyncio.get_running_loop().call_later(LAST_BYTE_S, self._stop)

    def _stop(self) -> None:
        """Close a body that doesn't end after its `[DONE]`."""
        self._response.close()
        self.end()

    def stop_waiting(self) -> None:
        """Cancel the timer of `[DONE]`, once the result is there or isn't wanted."""
        if self._timer is not None:
            self._timer.cancel()

    def end(self) -> None:
        if not self.result.done():
            self.result.set_result(b"".join(self._pieces))

    def fail(self, error: UpstreamError) -> None:
        if self._timer is not None and self._left >= 0:
            self.end()  # a stream is complete after its `[DONE]`
        elif not self.result.done():
            self.result.set_exception(error)
