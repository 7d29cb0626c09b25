"""What a provider can do wrong on the wire, each in words for the client and with its two verdicts.

`may_have_run` (in the problem): the provider may have done the work, so a client that repeats could pay twice.
`safe_to_repeat` (on the fault): we may ask again ourselves, because not one byte of the request was sent.
"""

import errno
import os
import socket
import ssl
from typing import Final

from meshproxy.errors import (
    Phase,
    Source,
    UpstreamFault,
    gateway_timeout,
    overloaded,
    provider_not_available,
    upstream_error,
)

POOL_RETRY_AFTER_S = 1.0
# What this host lacks, not the provider: descriptors, memory, local ports (socket(2), connect(2)).
_OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


def malformed(what: str) -> UpstreamFault:
    """The answer is none that RFC 9112 allows: `what` completes the sentence."""
    return _after_sending(f"The provider broke the HTTP protocol: {what}.")


def cut_off() -> UpstreamFault:
    """The connection was lost in the middle of a body."""
    return _after_sending("The provider closed the connection in the middle of its answer.")


def unanswered() -> UpstreamFault:
    """The connection was lost after the request was written and before an answer began."""
    return _after_sending("The provider closed the connection without an answer.", phase=Phase.HEAD)


def too_large(limit_bytes: int) -> UpstreamFault:
    """The whole body is larger than may be kept in memory."""
    return _after_sending(f"The provider's answer is larger than {limit_bytes} bytes.", unreadable=True)


def encoded(coding: str) -> UpstreamFault:
    """The body is compressed in a way that the gateway can't read, though it was asked for as it is."""
    message = f"The provider answered with content-encoding {coding[:64]!r}, which it wasn't asked for."
    return _after_sending(message, unreadable=True)


def unreadable(what: str) -> UpstreamFault:
    """The body can't be read by the gateway: `what` completes the sentence."""
    return _after_sending(f"The provider's answer can't be read: {what}.", unreadable=True)


def silent(timeout_s: float) -> UpstreamFault:
    """No head of an answer within `timeout_s` of the request."""
    return _too_late(f"The provider did not begin to answer within {timeout_s:g} seconds.", Phase.HEAD)


def stalled(timeout_s: float) -> UpstreamFault:
    """Not one byte of the body for `timeout_s`."""
    return _too_late(f"The provider sent nothing for {timeout_s:g} seconds in the middle of its answer.", Phase.BODY)


def connect_timeout(timeout_s: float) -> UpstreamFault:
    """No connection within `timeout_s`."""
    problem = gateway_timeout(
        f"The provider could not be connected to within {timeout_s:g} seconds.", may_have_run=False
    )
    return UpstreamFault(problem, safe_to_repeat=True, phase=Phase.CONNECT, reason="time-out")


def unreachable(error: Exception, phase: Phase = Phase.CONNECT) -> UpstreamFault:
    """No connection at all: its name, its port or its certificate. Our network's addresses stay in the cause, for the log."""
    if _is_ours(error):
        problem = overloaded("The gateway can't open another connection.")
        return UpstreamFault(problem, safe_to_repeat=True, phase=phase, reason=reason_of(error), source=Source.GATEWAY)
    problem = upstream_error(f"The provider can't be reached: {_told(error)}.", may_have_run=False)
    return UpstreamFault(problem, safe_to_repeat=True, phase=phase, reason=reason_of(error))


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


def exhausted(limit: int) -> UpstreamFault:
    """All `limit` connections are in use and none became free in time."""
    message = f"All {limit} connections to the provider are in use."
    return UpstreamFault(provider_not_available(message, POOL_RETRY_AFTER_S), safe_to_repeat=True, phase=Phase.CONNECT)


def closing() -> UpstreamFault:
    """Our side is being shut down; the request was not sent."""
    return UpstreamFault(overloaded("The gateway is shutting down."), safe_to_repeat=True, phase=Phase.CONNECT)


def dropped() -> UpstreamFault:
    """The connection was closed by us with a request on it."""
    return _after_sending("The gateway closed its connection to the provider.")


def _after_sending(message: str, *, phase: Phase = Phase.BODY, unreadable: bool = False) -> UpstreamFault:
    problem = upstream_error(message, may_have_run=True)
    return UpstreamFault(problem, safe_to_repeat=False, phase=phase, unreadable=unreadable)


def _too_late(message: str, phase: Phase) -> UpstreamFault:
    return UpstreamFault(
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
