"""What a provider can do wrong on the wire, each in words for the client and with its two verdicts.

`may_have_run` (in the problem): the provider may have done the work, so a client that repeats could pay twice.
`safe_to_repeat` (on the fault): we may ask again ourselves, because not one byte of the request was sent.
"""

import socket
import ssl

from meshproxy.errors import UpstreamFault, gateway_timeout, overloaded, provider_not_available, upstream_error

POOL_RETRY_AFTER_S = 1.0


def malformed(what: str) -> UpstreamFault:
    """The answer is none that RFC 9112 allows: `what` completes the sentence."""
    return _after_sending(f"The provider broke the HTTP protocol: {what}.")


def cut_off() -> UpstreamFault:
    """The connection was lost in the middle of a body."""
    return _after_sending("The provider closed the connection in the middle of its answer.")


def unanswered() -> UpstreamFault:
    """The connection was lost after the request was written and before an answer began."""
    return _after_sending("The provider closed the connection without an answer.")


def too_large(limit_bytes: int) -> UpstreamFault:
    """The whole body is larger than may be kept in memory."""
    return _after_sending(f"The provider's answer is larger than {limit_bytes} bytes.")


def encoded(coding: str) -> UpstreamFault:
    """The body is compressed though it was asked for as it is, so that nobody here could read its usage."""
    return _after_sending(f"The provider answered with content-encoding {coding[:64]!r}, which it wasn't asked for.")


def silent(timeout_s: float) -> UpstreamFault:
    """No head of an answer within `timeout_s` of the request."""
    return _too_late(f"The provider did not begin to answer within {timeout_s:g} seconds.")


def stalled(timeout_s: float) -> UpstreamFault:
    """Not one byte of the body for `timeout_s`."""
    return _too_late(f"The provider sent nothing for {timeout_s:g} seconds in the middle of its answer.")


def connect_timeout(timeout_s: float) -> UpstreamFault:
    """No connection within `timeout_s`."""
    problem = gateway_timeout(
        f"The provider could not be connected to within {timeout_s:g} seconds.", may_have_run=False
    )
    return UpstreamFault(problem, safe_to_repeat=True)


def unreachable(error: Exception) -> UpstreamFault:
    """No connection at all: its name, its port or its certificate. Our network's addresses stay in the cause, for the log."""
    problem = upstream_error(f"The provider can't be reached: {_reason(error)}.", may_have_run=False)
    return UpstreamFault(problem, safe_to_repeat=True)


def exhausted(limit: int) -> UpstreamFault:
    """All `limit` connections are in use and none became free in time."""
    message = f"All {limit} connections to the provider are in use."
    return UpstreamFault(provider_not_available(message, POOL_RETRY_AFTER_S), safe_to_repeat=True)


def closing() -> UpstreamFault:
    """Our side is being shut down; the request was not sent."""
    return UpstreamFault(overloaded("The gateway is shutting down."), safe_to_repeat=True)


def dropped() -> UpstreamFault:
    """The connection was closed by us with a request on it."""
    return _after_sending("The gateway closed its connection to the provider.")


def _after_sending(message: str) -> UpstreamFault:
    return UpstreamFault(upstream_error(message, may_have_run=True), safe_to_repeat=False)


def _too_late(message: str) -> UpstreamFault:
    return UpstreamFault(gateway_timeout(message, may_have_run=True), safe_to_repeat=False)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate isn't valid ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return "the TLS handshake failed"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "its name can't be resolved"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    return "the connection failed"
