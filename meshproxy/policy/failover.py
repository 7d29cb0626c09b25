"""Classify a provider's refusal: the client's error, and whether another provider or another model may be tried.

A refusal is about the request, which the client can change, or about the gateway's account or configuration at the
provider, which it can't. The status alone doesn't show which, so these rules read the provider's code and message too.
docs/errors.md names the pages they come from.
"""

import math
import re
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from meshproxy.errors import (
    MAX_RETRY_AFTER_S,
    ErrorResponse,
    Phase,
    UpstreamError,
    provider_not_available,
    upstream_error,
)
from meshproxy.openai.provider_errors import ProviderError, parse_provider_error, provider_error

DEFAULT_RETRY_AFTER_S: Final = 1.0  # where a provider has no capacity and gives no wait
# Where our quota at the provider is spent: longer than any SDK waits by itself, since only the account's owner can act.
QUOTA_RETRY_AFTER_S: Final = 600.0
MAX_WAIT_S: Final = 86_400.0  # the longest wait taken from a provider: its longest limits are by day

_REFUSED_REQUEST = frozenset({400, 413, 422})
_MAY_BE_ABOUT_US = frozenset({400, 422})
_REFUSED_US = {  # about our account or configuration, which the caller can't change
    401: "The provider refused the gateway's credentials.",
    402: "The provider refused the gateway's account.",
    403: "The provider refused the gateway.",
    404: "The provider doesn't serve what the gateway asked for.",
}
# RFC 9110, section 15.6.4, and what Anthropic and Cloudflare send when overloaded: no work was done.
_NO_CAPACITY = frozenset({503, 529})
_MAY_HAVE_RUN = frozenset({408, 409})  # refused, perhaps after some work was done

_MODERATED = frozenset(
    {"content_filter", "content_policy_violation", "moderation_blocked", "responsibleaipolicyviolation"}
)
_TOO_LONG = frozenset(
    {"context_length_exceeded", "max_tokens_exceeded", "token_limit_exceeded", "string_above_max_length"}
)
_UNKNOWN_MODEL = frozenset({"model_not_found", "unknown_model", "invalid_model", "deploymentnotfound"})
_NO_CREDENTIALS = frozenset({"invalid_api_key", "invalid_authentication", "authentication_error"})
_OUT_OF_QUOTA = frozenset(
    {
        "insufficient_quota",
        "insufficient_balance",
        "credit_balance_exhausted",
        "billing_hard_limit_reached",
        "billing_not_active",
        "billing_error",  # docs.anthropic.com/en/api/errors
        "exceeded_current_quota_error",  # platform.moonshot.ai/docs, "Error codes"
    }
)

_MODERATED_WORDS = re.compile(
    r"\bflagged\b|moderation|content (?:management )?policy|violates? .{0,40}guidelines", re.IGNORECASE
)
_TOO_LONG_WORDS = re.compile(
    r"context (?:length|window|size|limit)|maximum (?:\w+ )?(?:length|tokens)|too (?:long|large|many tokens)|"
    r"\btokens?\b.{0,80}(?:exceeds?|(?:more|less|fewer) than|at most|<)|"
    r"(?:exceeds?|(?:more|less|fewer) than|at most).{0,80}\btokens?\b|reduce the length",
    re.IGNORECASE,
)
_UNSUPPORTED_WORDS = re.compile(
    r"(?:not|n't|un)[ _-]?support|not (?:permitted|allowed|enabled|implemented)|unrecogni[sz]ed|"
    r"unknown (?:parameter|field|argument|name)|extra (?:inputs?|fields?)|requires --|endpoints found that (?:support|can)",
    re.IGNORECASE,
)
_CREDENTIAL_WORDS = re.compile(
    r"(?:incorrect|invalid|expired|missing|no) api[ _-]?key|api[ _-]?key.{0,20} (?:not valid|invalid|expired|missing|not found)",
    re.IGNORECASE,
)
_CREDIT_WORDS = re.compile(
    r"credit balance|(?:insufficient|all available) (?:credits?|balance|funds|quota)|exceeded your current quota|"
    r"billing (?:hard limit|details)|(?:spend(?:ing)?|api usage) limit",
    re.IGNORECASE,
)
_MODEL_WORDS = re.compile(
    r"(?:model|deployment)\b.{0,80} (?:does not|doesn't) exist|model\b.{0,80} not found|"
    r"(?:unknown|invalid|no such) model\b(?: id| name)?\s*[:`'\"]",
    re.IGNORECASE,
)
_WAIT_WORDS = re.compile(
    r"(?:try again|retry) (?:in|after) ("
    r"(?:\d{1,6}(?:\.\d{1,9})? ?(?:milliseconds?|ms|minutes?|m|seconds?|s|hours?|h|days?|d) ?){1,4})",
    re.IGNORECASE,
)
_DURATION = re.compile(r"([\d.]+) ?(ms|mil|[smhd])", re.IGNORECASE)
_UNIT_S = {"ms": 0.001, "mil": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_CODE = re.compile(r"[A-Za-z0-9_.:/-]{1,128}", re.ASCII)

# The status assumed for an error that came without one, in a stream's event or under a 200, by its code or type.
_STATUS_OF: Final = {
    **dict.fromkeys((*_MODERATED, *_TOO_LONG, "invalid_request_error", "invalid_prompt", "badrequesterror"), 400),
    **dict.fromkeys((*_NO_CREDENTIALS,), 401),
    "permission_error": 403,
    "not_found_error": 404,
    **dict.fromkeys((*_UNKNOWN_MODEL,), 404),
    **dict.fromkeys((*_OUT_OF_QUOTA, "rate_limit_exceeded", "rate_limit_error", "resource_exhausted"), 429),
    **dict.fromkeys(("overloaded_error", "server_is_overloaded", "unavailable"), 529),
}


class Verdict(Struct, frozen=True):
    """The client's error if no other attempt succeeds, and which attempts may follow: any, or one with another model.

    `reported`: the provider's message, for the log.
    """

    response: ErrorResponse
    try_next: bool
    another_model: bool = False
    provider_message: str | None = None

    def to_error(self, upstream_status: int) -> UpstreamError:
        """Return the error of an attempt that was answered with this status."""
        return UpstreamError(
            self.response,
            safe_to_repeat=self.try_next,
            another_model=self.another_model,
            upstream_status=upstream_status,
            phase=Phase.HEAD,
            provider_message=self.provider_message,
        )


def classify_status(
    status: int,
    body: bytes,
    retry_after: str | None,
    *,
    retry_after_ms: str | None = None,
    content_type: str | None = None,
    now: float = 0.0,
) -> Verdict:
    """Classify an answer whose status isn't 200. `now` is Unix time in seconds, for a Retry-After that is a date."""
    reported = parse_provider_error(provider_error(body, content_type))
    return _verdict(status, reported, wait_of(retry_after, retry_after_ms, now))


def classify_error(
    error: Any, *, otherwise: str, wait_s: float | None = None, may_have_run: bool = False
) -> UpstreamError:
    """Classify an error that came with status 200 in place of an answer.

    It is treated as if it had the status that it names, or that its code implies. `otherwise`: the message for one with
    neither. `wait_s`: the wait of the answer's headers (see `wait_of`). `may_have_run`: the provider may bill for it
    whatever it names, as for all that it says with 200 after the work on a whole answer.
    """
    reported = parse_provider_error(error if isinstance(error, dict) else {"error": error})
    status = _status_of(reported)
    if status is not None:
        verdict = _verdict(status, reported, wait_s)
        if may_have_run and verdict.response.status >= 500:
            verdict = replace(verdict, response=replace(verdict.response, may_have_run=True))
        return verdict.to_error(status)
    response = _quoted(upstream_error(otherwise, may_have_run=True), reported)
    return UpstreamError(response, safe_to_repeat=True, upstream_status=200, provider_message=reported.message)


def stream_error(error: Any) -> UpstreamError:
    """Return the error of a stream whose provider failed after the first event."""
    reported = parse_provider_error(error)
    response = _quoted(upstream_error("The provider failed in the stream.", may_have_run=True), reported)
    return UpstreamError(response, safe_to_repeat=False, upstream_status=200, provider_message=reported.message)


def is_upstream_failure(error: UpstreamError) -> bool:
    """Return whether an error shows that the upstream itself is failing: unreachable, silent, broken off or failed.

    A lack of capacity, a refusal of the request or our account, an error inside the gateway, and an answer that the
    gateway can't read don't.
    """
    if error.unreadable:
        return False
    if error.upstream_status is None:
        return error.response.status != 503  # no connection was free, or the gateway is shutting down
    return error.upstream_status >= 500 or error.upstream_status == 200


def is_refusal(error: UpstreamError) -> bool:
    """Return whether the provider refused and did nothing, so that asking another one repeats no work.

    So it is where our account there or its configuration is wrong (401 to 404, a redirect), or where another model may take
    the request.
    """
    return error.another_model or (error.upstream_status is not None and 300 <= error.upstream_status <= 404)


def may_be_caused_by_request(error: UpstreamError) -> bool:
    """Return whether the request itself may have caused the error, which then says less about other requests."""
    return error.phase not in {Phase.CONNECT, Phase.TLS}


def requested_wait_s(error: UpstreamError) -> float:
    """Return the seconds for which the upstream asks for no requests, at most MAX_RETRY_AFTER_S; 0.0 without such a wish."""
    return min(error.response.retry_after_s or 0.0, MAX_RETRY_AFTER_S) if error.upstream_status is not None else 0.0


def ended_early() -> UpstreamError:
    """Return the error of a stream that ended without its last event."""
    response = upstream_error("The provider ended the stream early.", may_have_run=True)
    return UpstreamError(response, safe_to_repeat=False, upstream_status=200)


def error_to_report(errors: Sequence[UpstreamError]) -> UpstreamError:
    """Return the error to report to the client, out of all its attempts.

    The order: a refusal of the request, a request to wait, a failure, a refusal of the gateway, a failed connection.
    Among equals the last counts, but the first refusal (it is by the model that was requested), and the shortest wait.
    `may_have_run` is set if any attempt may have run, since a client's retry may then pay twice.
    """
    _, chosen = max(enumerate(errors), key=lambda numbered: _weight(*numbered))
    response = chosen.response
    if response.status >= 500 and not response.may_have_run and any(error.response.may_have_run for error in errors):
        chosen.response = replace(response, may_have_run=True)
    return chosen


def wait_of(retry_after: str | None, retry_after_ms: str | None = None, now: float = 0.0) -> float | None:
    """Return the seconds that an answer asks to wait, at most MAX_WAIT_S; None if it gives none.

    `now` is Unix time, for a date (RFC 9110, section 10.2.3); a date in the past means no wait.
    """
    for text, per_second in ((retry_after_ms, 1000), (retry_after, 1)):
        wait = _number(text)
        if wait is not None:
            return min(wait / per_second, MAX_WAIT_S)
    until = _date(retry_after)
    return None if until is None else min(max(until - now, 0.0), MAX_WAIT_S)


def _verdict(status: int, reported: ProviderError, wait_s: float | None) -> Verdict:
    """Classify an answer by its status, the provider's words and the wait that it asks for."""
    if status in _REFUSED_US or status in _REFUSED_REQUEST:
        status_of_ours = _blamed_on_us(status, reported)
        if status_of_ours is None:
            return _refused(status, reported)
        response = replace(upstream_error(_REFUSED_US[status_of_ours], may_have_run=False), provider_code=reported.code)
        return Verdict(response, try_next=True, provider_message=reported.message)
    if status == 429:
        return Verdict(_limited(reported, wait_s), try_next=True, provider_message=reported.message)
    if status in _NO_CAPACITY:
        full = ErrorResponse(502, "upstream_error", "The provider is overloaded.", retry_after_s=wait_s)
        return Verdict(_quoted(full, reported), try_next=True, provider_message=reported.message)
    if status >= 500 or status in _MAY_HAVE_RUN:
        failed = upstream_error(f"The provider failed with status {status}.", may_have_run=True)
        return Verdict(_quoted(failed, reported), try_next=True, provider_message=reported.message)
    message = f"The provider answered with status {status}, which makes no sense here."
    accepted = 200 <= status < 300  # it may have done the work, and another provider would do it again
    response = _quoted(upstream_error(message, may_have_run=accepted), reported)
    return Verdict(response, try_next=not accepted, provider_message=reported.message)


def _blamed_on_us(status: int, reported: ProviderError) -> int | None:
    """Return which of _REFUSED_US applies, if the refusal is about the gateway's account or configuration; else None."""
    code, message = (reported.code or "").lower(), reported.message or ""
    if status == 403:
        return None if _is_moderated(reported) else 403
    if status == 404:
        return None if _is_about_a_field(reported) or _UNSUPPORTED_WORDS.search(message) else 404
    if status in _REFUSED_US:
        return status
    if status in _MAY_BE_ABOUT_US:
        if code in _NO_CREDENTIALS or _CREDENTIAL_WORDS.search(message):
            return 401
        if code in _OUT_OF_QUOTA or _CREDIT_WORDS.search(message):
            return 402
        if code in _UNKNOWN_MODEL or (reported.param in {None, "model"} and _MODEL_WORDS.search(message)):
            return 404
    return None


def _is_moderated(reported: ProviderError) -> bool:
    return (
        reported.moderated
        or (reported.code or "").lower() in _MODERATED
        or _MODERATED_WORDS.search(reported.message or "") is not None
    )


def _is_about_a_field(reported: ProviderError) -> bool:
    """Return whether the refusal names a field that the client chose, other than the model."""
    return reported.param not in {None, "model"} and (reported.code or "").lower() not in _UNKNOWN_MODEL


def _refused(status: int, reported: ProviderError) -> Verdict:
    """Return the refusal of a request, with the provider's own message, status, code and param."""
    code = (
        reported.code if reported.code is not None and not reported.numeric and _CODE.fullmatch(reported.code) else None
    )
    response = ErrorResponse(
        status,
        code or "provider_refused",
        reported.message or "The provider refused the request.",
        reported.param,
        provider_error=reported.value,
        provider_code=reported.code,
    )
    return Verdict(
        response,
        try_next=False,
        another_model=_another_may_take_it(status, reported),
        provider_message=reported.message,
    )


def _another_may_take_it(status: int, reported: ProviderError) -> bool:
    """Return whether another model may accept the request: it is too long for this one, or needs a missing feature.

    A flagged request isn't offered elsewhere, and a malformed one would be refused everywhere.
    """
    if _is_moderated(reported):
        return False
    code, message = (reported.code or "").lower(), reported.message or ""
    return (
        status in {404, 413}
        or code in _TOO_LONG
        or code.startswith("unsupported")
        or _TOO_LONG_WORDS.search(message) is not None
        or _UNSUPPORTED_WORDS.search(message) is not None
    )


def _limited(reported: ProviderError, wait_s: float | None) -> ErrorResponse:
    """Return the error for a provider without capacity for us: for a while, or until the quota is paid for.

    The provider's message is left out, since it may name our organisation.
    """
    if wait_s is None:
        wait_s = reported.wait_s if reported.wait_s is not None else _wait_in_message_s(reported.message or "")
    is_quota = (reported.code or "").lower() in _OUT_OF_QUOTA or (reported.kind or "").lower() in _OUT_OF_QUOTA
    if is_quota or (wait_s is None and _CREDIT_WORDS.search(reported.message or "")):
        response = provider_not_available(
            "The gateway's quota at the provider is spent.", max(wait_s or 0.0, QUOTA_RETRY_AFTER_S)
        )
    else:
        response = provider_not_available("The provider has no capacity left.", wait_s or DEFAULT_RETRY_AFTER_S)
    return replace(response, provider_code=reported.code)


def _quoted(response: ErrorResponse, reported: ProviderError) -> ErrorResponse:
    """Return an error response with the provider's code and message added."""
    message = (
        response.message if reported.message is None else f"{response.message.removesuffix('.')}: {reported.message}"
    )
    return replace(response, message=message, provider_code=reported.code, provider_error=reported.value)


def _status_of(reported: ProviderError) -> int | None:
    """Return the status that an error names, or that its code or type implies; None without either."""
    if reported.numeric and reported.code is not None and reported.code.isdigit() and 400 <= int(reported.code) <= 599:
        return int(reported.code)
    known = (_STATUS_OF.get((name or "").lower()) for name in (reported.code, reported.kind))
    return next((status for status in known if status is not None), None)


def _weight(index: int, error: UpstreamError) -> tuple[int, float, int]:
    """Return the sort key of an error: `error_to_report` chooses the greatest."""
    response = error.response
    if response.status < 500:
        return 4, 0.0, -index
    if error.upstream_status is None:
        return (2 if response.may_have_run else 0), 0.0, index
    if response.status == 503:
        return 3, -(response.retry_after_s or 0.0), index
    return (1 if error.upstream_status in _REFUSED_US or error.upstream_status in _REFUSED_REQUEST else 2), 0.0, index


def _wait_in_message_s(message: str) -> float | None:
    """Return the seconds to wait that a message names; None if it names none.

    `Please try again in 7m12s.` (OpenAI, Groq), `Please retry in 34.07s.` (Gemini), `retry after 60 seconds` (Azure).
    """
    found = _WAIT_WORDS.search(message)
    if found is None:
        return None
    total = sum((_number(amount) or 0.0) * _UNIT_S[unit.lower()] for amount, unit in _DURATION.findall(found[1]))
    return min(total, MAX_WAIT_S)


def _date(text: str | None) -> float | None:
    """Return the Unix time of an HTTP date (RFC 9110, section 5.6.7)."""
    if not text or len(text) > 64:
        return None
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _number(text: str | None) -> float | None:
    """Return a number that is finite and not negative."""
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None
