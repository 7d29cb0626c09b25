"""The closed family of errors: what a client is told (`ErrorResponse`), and what goes wrong in here (`GatewayError`).

A denial is an `ErrorResponse` returned as a value. A `GatewayError` is an exception that carries one, with the source it came
from, so that nobody has to guess whom to blame. The codes are a promise to users: docs/errors.md lists them.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from msgspec import Struct

MAX_RETRY_AFTER_S = 60.0  # the OpenAI SDKs sleep as told up to a minute and ignore what is longer


class Source(StrEnum):
    """Who caused a fault."""

    CLIENT = "client"
    UPSTREAM = "upstream"
    GATEWAY = "gateway"


class Detail(Struct, frozen=True):
    """One thing wrong with one field of a request."""

    type: str
    loc: tuple[str | int, ...]
    msg: str


class ErrorResponse(Struct, frozen=True):
    """What a client is told. `retry_after_s` is exact, in seconds; `may_have_run` says that a retry could pay twice.
    `provider_code` and `provider_error` are what the provider said, in its own code and as JSON.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    details: tuple[Detail, ...] = ()
    retry_after_s: float | None = None
    provider_error: Any = None
    may_have_run: bool = False
    provider_code: str | None = None

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error, which their SDKs show beside the code."""
        return _TYPES.get(self.status, "api_error")


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


class GatewayError(Exception):
    """Something broke. `source` says whose side; `problem` is what the client hears of it."""

    def __init__(self, source: Source, problem: ErrorResponse) -> None:
        super().__init__(problem.message)
        self.source = source
        self.problem = problem


class Phase(StrEnum):
    """How far an attempt came before it failed."""

    CONNECT = "connect"
    TLS = "tls"
    WRITE = "write"
    HEAD = "head"
    BODY = "body"


class UpstreamError(GatewayError):
    """An attempt at a provider failed.

    `safe_to_repeat`: another attempt may be made. `another_model`: an attempt with another model may be made, which may not
    refuse the request. `answered`: the status that the provider gave, if it gave one. `unreadable`: the provider answered, and
    the gateway could not read or keep the answer, so that it says nothing against the provider. `phase`, `reason` and `words`
    (the provider's own) are for the log.
    """

    def __init__(
        self,
        problem: ErrorResponse,
        *,
        safe_to_repeat: bool,
        answered: int | None = None,
        another_model: bool = False,
        unreadable: bool = False,
        phase: Phase = Phase.BODY,
        reason: str | None = None,
        words: str | None = None,
        source: Source = Source.UPSTREAM,
    ) -> None:
        super().__init__(source, problem)
        self.safe_to_repeat = safe_to_repeat
        self.answered = answered
        self.another_model = another_model
        self.unreadable = unreadable
        self.phase = phase
        self.reason = reason
        self.words = words


def unauthorized(message: str) -> ErrorResponse:
    """401: a key that is missing, malformed, unknown, revoked or expired."""
    return ErrorResponse(401, "unauthorized", message)


def forbidden(message: str, param: str | None = None) -> ErrorResponse:
    """403: a suspended key or account, or something that this key may not use."""
    return ErrorResponse(403, "forbidden", message, param)


def insufficient_credits(message: str) -> ErrorResponse:
    """402: the hold doesn't fit what the account has left."""
    return ErrorResponse(402, "insufficient_credits", message)


def spend_limit_exceeded(message: str) -> ErrorResponse:
    """402: a budget of the key or the session is spent."""
    return ErrorResponse(402, "spend_limit_exceeded", message)


def model_not_found(model: str, nearest: str | None = None) -> ErrorResponse:
    """404: no such model here. `nearest`: the name of one that there is, for who has mistyped it."""
    hint = f" Did you mean `{nearest}`?" if nearest else ""
    message = f"The model `{model[:128]}` does not exist or is not served here.{hint}"
    return ErrorResponse(404, "model_not_found", message, "model")


def template_not_found(name: str) -> ErrorResponse:
    """404: no such template among the account's own and the global ones."""
    return ErrorResponse(404, "template_not_found", f"There is no template `{name[:128]}`.", "template")


def not_found(message: str) -> ErrorResponse:
    """404: no such path or thing."""
    return ErrorResponse(404, "not_found", message)


def method_not_allowed(message: str) -> ErrorResponse:
    """405"""
    return ErrorResponse(405, "method_not_allowed", message)


def invalid_api_version(version: str, known: Sequence[str]) -> ErrorResponse:
    """400: a version of the API that there isn't."""
    message = f"The API version `{version[:32]}` is not known. Known: {', '.join(known)}."
    return ErrorResponse(400, "invalid_api_version", message)


def request_timeout(message: str) -> ErrorResponse:
    """408: the client took too long to send its request."""
    return ErrorResponse(408, "request_timeout", message)


def idempotency_conflict() -> ErrorResponse:
    """409: one Idempotency-Key, two bodies."""
    return ErrorResponse(409, "idempotency_conflict", "This Idempotency-Key was used before with another request body.")


def request_too_large(limit_bytes: int) -> ErrorResponse:
    """413"""
    return ErrorResponse(413, "request_too_large", f"The request body is larger than {limit_bytes} bytes.")


def unsupported_media_type(message: str) -> ErrorResponse:
    """415"""
    return ErrorResponse(415, "unsupported_media_type", message)


def invalid(message: str, *details: Detail, param: str | None = None) -> ErrorResponse:
    """422: the request can't be understood."""
    return ErrorResponse(422, "validation_error", message, param, details)


def rate_limit_exceeded(message: str, retry_after_s: float) -> ErrorResponse:
    """429: a bucket is empty for `retry_after_s` more seconds."""
    return ErrorResponse(429, "rate_limit_exceeded", message, retry_after_s=retry_after_s)


def upstream_error(message: str, *, may_have_run: bool, provider_error: Any = None) -> ErrorResponse:
    """502: the provider refused, reset, failed or talked nonsense."""
    return ErrorResponse(502, "upstream_error", message, provider_error=provider_error, may_have_run=may_have_run)


def provider_not_available(message: str, retry_after_s: float) -> ErrorResponse:
    """503: every attempt's breaker is open, or the provider says 429."""
    return ErrorResponse(503, "provider_not_available", message, retry_after_s=retry_after_s)


def overloaded(message: str, retry_after_s: float = 1.0, *, may_have_run: bool = False) -> ErrorResponse:
    """503: too many requests in flight here, or this instance is draining."""
    return ErrorResponse(503, "overloaded", message, retry_after_s=retry_after_s, may_have_run=may_have_run)


def ledger_unavailable(retry_after_s: float = 1.0) -> ErrorResponse:
    """503: Redis is lost, so nothing can be admitted."""
    return ErrorResponse(503, "ledger_unavailable", "The ledger can't be reached.", retry_after_s=retry_after_s)


def gateway_timeout(message: str, *, may_have_run: bool) -> ErrorResponse:
    """504: the provider took too long to connect, to begin or to go on."""
    return ErrorResponse(504, "gateway_timeout", message, may_have_run=may_have_run)


def internal_error() -> ErrorResponse:
    """500: our own fault. There should be none."""
    return ErrorResponse(
        500, "internal_error", "The gateway failed. The request id finds the reason in its log.", may_have_run=True
    )
