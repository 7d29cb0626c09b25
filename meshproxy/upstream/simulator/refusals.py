"""What the simulated provider says no with: OpenAI's error object, its codes, and for each status the words of
api.openai.com or OpenRouter, so that a gateway's tests see in `provider_error` what production shows.
"""

from typing import Any

import msgspec


class Refusal(Exception):
    """An answer that is an error: status, the four members of OpenAI's error object, and how long to wait, if that is told."""

    def __init__(
        self,
        status: int,
        message: Any,
        *,
        type: str | None = "invalid_request_error",  # noqa: A002 - the member's name on the wire
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = [] if retry_after_s is None else [("retry-after", f"{retry_after_s:g}")]
        self.error: dict[str, Any] = {"message": message, "type": type, "param": param, "code": code}
        self.more: dict[str, Any] = {}  # members of the error that only some providers have

    def body(self) -> bytes:
        """The JSON that OpenAI sends."""
        return msgspec.json.encode({"error": self.error})


def on_demand(status: int, retry_after_s: float) -> Refusal:
    """What `sim/error-STATUS` answers."""
    message, kind, code = _WORDS.get(status, _BROKEN if status >= 500 else _REFUSED)
    return Refusal(status, message, type=kind, code=code, retry_after_s=retry_after_s if status in _RETRIABLE else None)


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
