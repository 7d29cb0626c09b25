"""What the simulated provider says no with: OpenAI's error object, its words and its codes.

Wording and codes follow what api.openai.com answers, so that a gateway's tests see in `provider_error` what production shows.
"""

from collections.abc import Sequence
from typing import Any

import msgspec


class Refusal(Exception):
    """An answer that is an error: status, the four members of OpenAI's error object, and extra headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002 - the member's name on the wire
        param: str | None = None,
        code: str | int | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = tuple(headers)
        self.error: dict[str, Any] = {"message": message, "type": type, "param": param, "code": code}

    def body(self) -> bytes:
        """The JSON that is sent."""
        return msgspec.json.encode({"error": self.error})


def wrong_type(param: str, expected: str, got: Any) -> Refusal:
    """400: a field of another JSON type than it should have."""
    message = f"Invalid type for '{param}': expected {expected}, but got {_named(got)} instead."
    return Refusal(400, message, param=param, code="invalid_type")


def wrong_value(param: str, got: str, supported: Sequence[str]) -> Refusal:
    """400: none of the values there are."""
    listed = ", ".join(f"'{value}'" for value in supported[:-1]) + f", and '{supported[-1]}'"
    message = f"Invalid value: '{got[:64]}'. Supported values are: {listed}."
    return Refusal(400, message, param=param, code="invalid_value")


def out_of_range(param: str, got: float, bound: float, *, above: bool) -> Refusal:
    """400: a number past one of its bounds."""
    kind = "integer" if isinstance(bound, int) else "decimal"
    side, sign = ("above maximum", "<=") if above else ("below minimum", ">=")
    message = f"Invalid '{param}': {kind} {side} value. Expected a value {sign} {bound:g}, but got {got:g} instead."
    return Refusal(400, message, param=param, code=f"{kind}_{'above_max' if above else 'below_min'}_value")


def missing(param: str) -> Refusal:
    """400: a required field isn't there."""
    return Refusal(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def unknown_parameter(param: str) -> Refusal:
    """400: a field that this provider doesn't have."""
    return Refusal(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """400: anything else that is wrong with a request."""
    return Refusal(400, message, param=param, code=code)


def not_json() -> Refusal:
    """400: the body can't be read."""
    return invalid(
        "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
        "correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON.)"
    )


def bad_key(token: str | None) -> Refusal:
    """401, with as much of the key as OpenAI shows back."""
    if token is None:
        return Refusal(401, "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`.")
    shown = f"{token[:4]}****{token[-4:]}" if len(token) > 12 else "****"
    return Refusal(401, f"Incorrect API key provided: {shown}.", code="invalid_api_key")


def no_such_model(model: str) -> Refusal:
    """404"""
    message = f"The model `{model[:128]}` does not exist or you do not have access to it."
    return Refusal(404, message, code="model_not_found")


def unknown_url(method: str, path: str) -> Refusal:
    """404 of a path."""
    message = f"Unknown request URL: {method} {path[:256]}. Please check the URL for typos."
    return Refusal(404, message, code="unknown_url")


def wrong_method(method: str, path: str) -> Refusal:
    """405"""
    message = f"Not allowed to {method} on {path[:256]}."
    return Refusal(405, message, code="method_not_supported")


def too_large(limit_bytes: int) -> Refusal:
    """413"""
    return Refusal(413, f"The request body is larger than {limit_bytes} bytes.", code="request_too_large")


def on_demand(status: int, retry_after_s: float) -> Refusal:
    """What `sim/error-STATUS` answers: the words OpenAI or OpenRouter use with that status."""
    message, kind, code = _WORDS.get(status, _BROKEN if status >= 500 else _REFUSED)
    headers = [("retry-after", f"{retry_after_s:g}")] if status in _RETRIABLE else []
    return Refusal(status, message, type=kind, code=code, headers=headers)


def _named(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a decimal"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


_RETRIABLE = frozenset({429, 503, 529})
_REFUSED = ("The simulated provider refuses this request, as asked.", "invalid_request_error", None)
_BROKEN = ("The server had an error while processing your request. Sorry about that!", "server_error", None)
_QUOTA = "You exceeded your current quota, please check your plan and billing details."
_WORDS: dict[int, tuple[str, str, str | None]] = {
    401: ("Incorrect API key provided: sk-s****fake.", "invalid_request_error", "invalid_api_key"),
    402: (_QUOTA, "insufficient_quota", "insufficient_quota"),
    403: ("Country, region, or territory not supported.", "request_forbidden", "unsupported_country_region_territory"),
    404: ("The model does not exist or you do not have access to it.", "invalid_request_error", "model_not_found"),
    408: ("Timed out reading the request.", "invalid_request_error", "request_timeout"),
    409: ("The resource was updated by another process.", "conflict_error", "conflict"),
    422: ("Unprocessable entity.", "invalid_request_error", "unprocessable_entity"),
    429: ("Rate limit reached for requests per min (RPM).", "requests", "rate_limit_exceeded"),
    503: ("That model is currently overloaded with other requests.", "server_error", "service_unavailable"),
    529: ("Overloaded.", "overloaded_error", "overloaded"),
}
