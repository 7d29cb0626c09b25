"""What a provider can do wrong on the wire, each in words for the client and with its two verdicts.

`may_have_run` (in the problem): the provider may have done the work, so a client that repeats could pay twice.
`safe_to_repeat` (on the fault): we may ask again ourselves, because not one byte of the request was sent.
"""

import asyncio
import errno
import os
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
from meshproxy.http1.framing import after_sending

POOL_RETRY_AFTER_S = 1.0
# What this host lacks, not the provider: descriptors, memory, local ports (socket(2), connect(2)).
_OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


def cut_off() -> UpstreamError:
    """The connection was lost in the middle of a body."""
    return after_sending("The provider closed the connection in the middle of its answer.")


def unanswered() -> UpstreamError:
    """The connection was lost after the request was written and before an answer began."""
    return after_sending("The provider closed the connection without an answer.", phase=Phase.HEAD)


def too_large(limit_bytes: int) -> UpstreamError:
    """The whole body is larger than may be kept in memory."""
    return after_sending(f"The provider's answer is larger than {limit_bytes} bytes.", unreadable=True)


def encoded(coding: str) -> UpstreamError:
    """The body is compressed in a way that the gateway can't read, though it was asked for as it is."""
    message = f"The provider answered with content-encoding {coding[:64]!r}, which it wasn't asked for."
    return after_sending(message, unreadable=True)


def silent(timeout_s: float) -> UpstreamError:
    """No head of an answer within `timeout_s` of the request."""
    return _too_late(f"The provider did not begin to answer within {timeout_s:g} seconds.", Phase.HEAD)


def stalled(timeout_s: float) -> UpstreamError:
    """Not one byte of the body for `timeout_s`."""
    return _too_late(f"The provider sent nothing for {timeout_s:g} seconds in the middle of its answer.", Phase.BODY)


def connect_timeout(timeout_s: float) -> UpstreamError:
    """No connection within `timeout_s`."""
    problem = gateway_timeout(
        f"The provider could not be connected to within {timeout_s:g} seconds.", may_have_run=False
    )
    return UpstreamError(problem, safe_to_repeat=True, phase=Phase.CONNECT, reason="time-out")


def unreachable(error: Exception, phase: Phase = Phase.CONNECT) -> UpstreamError:
    """No connection at all: its name, its port or its certificate. Our network's addresses stay in the cause, for the log."""
    if _is_ours(error):
        problem = overloaded("The gateway can't open another connection.")
        return UpstreamError(problem, safe_to_repeat=True, phase=phase, reason=reason_of(error), source=Source.GATEWAY)
    problem = upstream_error(f"The provider can't be reached: {_told(error)}.", may_have_run=False)
    return UpstreamError(problem, safe_to_repeat=True, phase=phase, reason=reason_of(error))


def reason_of(error: BaseException) -> str:
    """The cause of a failed connection in words, with the system's name and number of it where it has one."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None)  # one that no OpenSSL call raised has none
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
    """All `limit` connections are in use and none became free in time."""
    message = f"All {limit} connections to the provider are in use."
    return UpstreamError(provider_not_available(message, POOL_RETRY_AFTER_S), safe_to_repeat=True, phase=Phase.CONNECT)


def closing() -> UpstreamError:
    """Our side is being shut down; the request was not sent."""
    return UpstreamError(overloaded("The gateway is shutting down."), safe_to_repeat=True, phase=Phase.CONNECT)


def dropped() -> UpstreamError:
    """The connection was closed by us with a request on it."""
    return after_sending("The gateway closed its connection to the provider.")


def _too_late(message: str, phase: Phase) -> UpstreamError:
    return UpstreamError(
        gateway_timeout(message, may_have_run=True), safe_to_repeat=False, phase=phase, reason="time-out"
    )


def _is_ours(error: Exception) -> bool:
    """Whether this host is out of something. A resolver that can't open a socket says only that it knows no such name, so a
    socket is tried.
    """
    if isinstance(error, socket.gaierror):
        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        except OSError as out:
            return out.errno in _OURS
        return False
    return isinstance(error, OSError) and error.errno in _OURS


def _told(error: Exception) -> str:
    """The cause as a client may hear of it."""
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
    """Where a streamed body goes. Called from the event loop as bytes arrive, and not once more after `Response.close()`.

    Exactly one of `end` and `fail` comes last. A sink may pause, resume and close its response from within a call.
    """

    def data(self, payload: bytes, frame: bytes | None) -> None:
        """Body bytes, never none. `frame`: the very object read from the socket, if it was whole chunks and nothing else."""

    def end(self) -> None:
        """The body is whole."""

    def fail(self, fault: UpstreamError) -> None:
        """The body will never be whole."""


class Flow(Protocol):
    """What a response needs of its connection while the body isn't whole."""

    sink: Sink

    def pause(self) -> None:
        """Read no more from the socket."""

    def resume(self) -> None:
        """Read on."""

    def abort(self) -> None:
        """Close the socket at once."""


class Response:
    """One answer of a provider. Names of headers are lower-case.

    It is its own connection's sink until `relay` or `read` names another.
    """

    def __init__(self, status: int, headers: list[tuple[str, str]], flow: Flow | None, max_bytes: int) -> None:
        self.status = status
        self.headers = headers
        self._flow = flow
        self._max_bytes = max_bytes
        self._early: list[tuple[bytes, bytes | None]] = []
        self._early_bytes = 0
        self._fault: UpstreamError | None = None
        self._listener: asyncio.Future[None] | None = None
        self._closed = False

    @classmethod
    def whole(cls, status: int, headers: list[tuple[str, str]], body: bytes) -> "Response":
        """A response that is all here, without a connection."""
        made = cls(status, headers, None, len(body))
        made.data(body, None)
        return made

    def header(self, name: str) -> str | None:
        """The first value of the header `name` (lower-case)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    async def read(self) -> bytes:
        """The whole body; UpstreamError if it breaks off or is larger than the settings allow."""
        if self._flow is None and self._fault is None and self._early_bytes <= self._max_bytes:  # it came with its head
            return b"".join([payload for payload, _ in self._early])
        whole = _Whole(self, self._max_bytes)
        self.relay(whole)
        try:
            return await whole.result
        except asyncio.CancelledError:
            self.close()
            raise

    def early(self, since: int = 0) -> list[bytes]:
        """What of the body has arrived before anyone took it, from the piece with the number `since` on."""
        return [payload for payload, _ in self._early[since:]]

    @property
    def goes_on(self) -> bool:
        """Whether more of the body may come before it is taken: it isn't over, and no more has come than is kept."""
        return self._flow is not None and self._early_bytes <= MAX_EARLY_BYTES

    @property
    def ended(self) -> bool:
        """Whether the body is over: whole, or broken off by `fault`."""
        return self._flow is None

    @property
    def fault(self) -> UpstreamError | None:
        """What broke the body off before anyone took it."""
        return self._fault

    async def hear(self, timeout_s: float) -> None:
        """Return when another piece of the body or its end has come, or after `timeout_s`. One caller at a time."""
        loop = asyncio.get_running_loop()
        self._listener = loop.create_future()
        timer = loop.call_later(timeout_s, self._tell)
        try:
            await self._listener
        finally:
            timer.cancel()
            self._listener = None

    def relay(self, sink: Sink) -> None:
        """Push the body to `sink` from now on. What has arrived is pushed, end or failure included, before this returns."""
        if self._early_bytes > MAX_EARLY_BYTES:
            self.resume()
        early, self._early, self._early_bytes = self._early, [], 0
        for payload, frame in early:
            if self._closed:
                return
            sink.data(payload, frame)
        if self._closed:
            return
        if self._flow is not None:
            self._flow.sink = sink
        elif self._fault is not None:
            sink.fail(self._fault)
        else:
            sink.end()

    def pause(self) -> None:
        """Read no more from the socket. What was read before still comes. Not counted as the provider's silence."""
        if self._flow is not None:
            self._flow.pause()

    def resume(self) -> None:
        """Read on after `pause`."""
        if self._flow is not None:
            self._flow.resume()

    def close(self) -> None:
        """Want no more. An unfinished answer's socket is closed at once, so that the provider stops; else does nothing."""
        self._closed = True
        self._early.clear()
        flow, self._flow = self._flow, None
        if flow is not None:
            flow.abort()

    def detach(self) -> None:
        """For the connection: the exchange is over, and the connection no longer this response's to touch."""
        self._flow = None

    def data(self, payload: bytes, frame: bytes | None) -> None:
        """Keep what arrives before anyone wants it."""
        self._early.append((payload, frame))
        self._early_bytes += len(payload)
        if self._early_bytes > MAX_EARLY_BYTES:
            self.pause()
        self._tell()

    def end(self) -> None:
        """The body was whole before anyone wanted it; being detached says so."""
        self._tell()

    def fail(self, fault: UpstreamError) -> None:
        """The body broke off before anyone wanted it."""
        self._fault = fault
        self._tell()

    def _tell(self) -> None:
        """Wake who listens."""
        if self._listener is not None and not self._listener.done():
            self._listener.set_result(None)


class _Whole:
    """The sink that `Response.read` waits for."""

    def __init__(self, response: Response, max_bytes: int) -> None:
        self.result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._response = response
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []

    def data(self, payload: bytes, frame: bytes | None) -> None:  # noqa: ARG002  # frames are for those who relay
        self._left -= len(payload)
        if self._left < 0:
            self._response.close()
            self.fail(too_large(self._max_bytes))
        else:
            self._pieces.append(payload)

    def end(self) -> None:
        if not self.result.done():
            self.result.set_result(b"".join(self._pieces))

    def fail(self, fault: UpstreamError) -> None:
        if not self.result.done():
            self.result.set_exception(fault)
