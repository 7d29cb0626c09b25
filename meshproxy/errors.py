"""The closed family of errors: `ErrorResponse`, which a client gets, and `GatewayError`, the exception that carries it.

Expected refusals are `ErrorResponse` values. A `GatewayError` has the `Source` that caused it: client, upstream or
gateway. The codes are a promise to users: docs/errors.md lists them.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from msgspec import Struct

MAX_RETRY_AFTER_S = 60.0  # the OpenAI SDKs obey waits up to a minute and ignore longer ones


class Source(StrEnum):
    """The side that caused an error."""

    CLIENT = "client"
    UPSTREAM = "upstream"
    GATEWAY = "gateway"


class Detail(Struct, frozen=True):
    """One error in one field of a request: pydantic's type, the path of the field, and a message."""

    type: str
    loc: tuple[str | int, ...]
    msg: str


class ErrorResponse(Struct, frozen=True):
    """The error that a client gets. `retry_after_s` is exact, in seconds.

    `may_have_run`: a provider may have done the work, so a retry could pay twice. `provider_code` and `provider_error`
    are the provider's own code and its error as JSON.
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
        """OpenAI's name for the kind of error, which their SDKs show beside the code."""
        return _TYPE_BY_STATUS.get(self.status) or ("api_error" if self.status >= 500 else "invalid_request_error")


_TYPE_BY_STATUS = {  # besides `invalid_request_error` for the others below 500, and `api_error` from 500 on
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class GatewayError(Exception):
    """A request failed. `source` is the side that caused it; `response` is the error response for the client."""

    def __init__(self, source: Source, response: ErrorResponse) -> None:
        super().__init__(response.message)
        self.source = source
        self.response = response


class Phase(StrEnum):
    """The phase in which an attempt failed."""

    CONNECT = "connect"
    TLS = "tls"
    HEAD = "head"
    BODY = "body"


class UpstreamError(GatewayError):
    """An attempt at a provider failed.

    `safe_to_repeat`: another attempt may be made. `another_model`: only an attempt with another model may be made,
    since this one refuses the request. `upstream_status`: the provider's status, if it gave one. `unreadable`: the provider
    answered, but the gateway could not read or keep the answer, so the provider isn't at fault. `phase`, `reason` and
    `provider_message` are for the log.
    """

    def __init__(
        self,
        response: ErrorResponse,
        *,
        safe_to_repeat: bool,
        upstream_status: int | None = None,
        another_model: bool = False,
        unreadable: bool = False,
        phase: Phase = Phase.BODY,
        reason: str | None = None,
        provider_message: str | None = None,
        source: Source = Source.UPSTREAM,
    ) -> None:
        super().__init__(source, response)
        self.safe_to_repeat = safe_to_repeat
        self.upstream_status = upstream_status
        self.another_model = another_model
        self.unreadable = unreadable
        self.phase = phase
        self.reason = reason
        self.provider_message = provider_message


def unauthorized(message: str) -> ErrorResponse:
    """Build 401: a key that is missing, malformed, unknown, revoked or expired."""
    return ErrorResponse(401, "unauthorized", message)


def forbidden(message: str, param: str | None = None) -> ErrorResponse:
    """Build 403: a suspended key or account, or something that this key may not use."""
    return ErrorResponse(403, "forbidden", message, param)


def insufficient_credits(message: str) -> ErrorResponse:
    """Build 402: the hold doesn't fit the account's available credit."""
    return ErrorResponse(402, "insufficient_credits", message)


def spend_limit_exceeded(message: str) -> ErrorResponse:
    """Build 402: a budget of the key, the session or the account leaves too little."""
    return ErrorResponse(402, "spend_limit_exceeded", message)


def model_not_found(model: str, nearest: str | None = None) -> ErrorResponse:
    """Build 404: no such model here. `nearest`: the most similar model id, for a typing error."""
    hint = f" Did you mean `{nearest}`?" if nearest else ""
    message = f"The model `{model[:128]}` does not exist or is not served here.{hint}"
    return ErrorResponse(404, "model_not_found", message, "model")


def template_not_found(name: str) -> ErrorResponse:
    """Build 404: no such template among the account's own and the global ones."""
    return ErrorResponse(404, "template_not_found", f"There is no template `{name[:128]}`.", "template")


def not_found(message: str) -> ErrorResponse:
    """Build 404: no such path or object."""
    return ErrorResponse(404, "not_found", message)


def method_not_allowed(message: str) -> ErrorResponse:
    """Build 405: the path has other methods."""
    return ErrorResponse(405, "method_not_allowed", message)


def invalid_api_version(version: str, known: Sequence[str]) -> ErrorResponse:
    """Build 400: an unknown version of the API."""
    message = f"The API version `{version[:32]}` is not known. Known: {', '.join(known)}."
    return ErrorResponse(400, "invalid_api_version", message)


def request_timeout(message: str) -> ErrorResponse:
    """Build 408: the client took too long to send its request."""
    return ErrorResponse(408, "request_timeout", message)


def idempotency_conflict() -> ErrorResponse:
    """Build 409: the same Idempotency-Key came with another body."""
    return ErrorResponse(409, "idempotency_conflict", "This Idempotency-Key was used before with another request body.")


def request_too_large(limit_bytes: int) -> ErrorResponse:
    """Build 413: the body exceeds the limit."""
    return ErrorResponse(413, "request_too_large", f"The request body is larger than {limit_bytes} bytes.")


def unsupported_media_type(message: str) -> ErrorResponse:
    """Build 415: the body's content type isn't accepted."""
    return ErrorResponse(415, "unsupported_media_type", message)


def invalid(message: str, *details: Detail, param: str | None = None, place: str = "body") -> ErrorResponse:
    """Build 422: the request is invalid; `details` names each error.

    Without details one is made of the message and `param`, which is in `place`: `body`, `query` or `header`.
    """
    loc = (place,) if param is None else (place, param)
    return ErrorResponse(422, "validation_error", message, param, details or (Detail("value_error", loc, message),))


def rate_limit_exceeded(message: str, retry_after_s: float) -> ErrorResponse:
    """Build 429: a bucket is empty for `retry_after_s` more seconds."""
    return ErrorResponse(429, "rate_limit_exceeded", message, retry_after_s=retry_after_s)


def upstream_error(message: str, *, may_have_run: bool, provider_error: Any = None) -> ErrorResponse:
    """Build 502: the provider refused, reset, failed or sent an invalid answer."""
    return ErrorResponse(502, "upstream_error", message, provider_error=provider_error, may_have_run=may_have_run)


def provider_not_available(message: str, retry_after_s: float) -> ErrorResponse:
    """Build 503: the breaker of every candidate is open, or the provider answers 429."""
    return ErrorResponse(503, "provider_not_available", message, retry_after_s=retry_after_s)


def overloaded(message: str, retry_after_s: float = 1.0, *, may_have_run: bool = False) -> ErrorResponse:
    """Build 503: too many requests in flight here, or this instance is draining."""
    return ErrorResponse(503, "overloaded", message, retry_after_s=retry_after_s, may_have_run=may_have_run)


def ledger_unavailable(retry_after_s: float = 1.0) -> ErrorResponse:
    """Build 503: Redis is lost, so no request can be admitted."""
    return ErrorResponse(503, "ledger_unavailable", "The ledger can't be reached.", retry_after_s=retry_after_s)


def gateway_timeout(message: str, *, may_have_run: bool) -> ErrorResponse:
    """Build 504: the provider took too long to connect, begin or continue, or the client's deadline has passed."""
    return ErrorResponse(504, "gateway_timeout", message, may_have_run=may_have_run)


def internal_error() -> ErrorResponse:
    """Build 500: a bug of the gateway."""
    return ErrorResponse(
        500, "internal_error", "The gateway failed. The request id finds the reason in its log.", may_have_run=True
    )
