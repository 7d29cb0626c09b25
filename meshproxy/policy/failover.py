"""What a provider's refusal means: what the client is told of it, and whether another provider or another model may be asked.

A refusal is about the request, which the client can mend, or about the gateway's account and configuration at the provider,
which it can't. Statuses alone don't tell: the rules below go by the provider's code and words too, and docs/errors.md names the
pages that they are from.
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
from meshproxy.openai.errors import ProviderWords, provider_error, provider_words

DEFAULT_RETRY_AFTER_S: Final = 1.0  # where a provider is full and doesn't say for how long
# Where our account there has run out: longer than any SDK waits by itself, for only its owner can change that.
QUOTA_RETRY_AFTER_S: Final = 600.0
MAX_WAIT_S: Final = 86_400.0  # that a provider may ask for: limits by day are the longest

_REFUSED_REQUEST = frozenset({400, 413, 422})
_MAY_BE_ABOUT_US = frozenset({400, 422})
_REFUSED_US = {  # our account or our configuration there, which the caller can do nothing about
    401: "The provider refused the gateway's credentials.",
    402: "The provider refused the gateway's account.",
    403: "The provider refused the gateway.",
    404: "The provider doesn't serve what the gateway asked for.",
}
_FULL = frozenset(
    {503, 529}
)  # RFC 9110, 15.6.4, and Anthropic's and Cloudflare's word for overloaded: nothing was done
_IN_THE_MIDDLE = frozenset({408, 409})  # refused, but who knows after what

_MODERATED = frozenset(
    {"content_filter", "content_policy_violation", "moderation_blocked", "responsibleaipolicyviolation"}
)
_TOO_LONG = frozenset(
    {"context_length_exceeded", "max_tokens_exceeded", "token_limit_exceeded", "string_above_max_length"}
)
_UNKNOWN_MODEL = frozenset({"model_not_found", "unknown_model", "invalid_model", "deploymentnotfound"})
_NO_CREDENTIALS = frozenset({"invalid_api_key", "invalid_authentication", "authentication_error"})
_OUT_OF_QUOTA = frozenset(
    {"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached", "billing_not_active"}
)

_MODERATED_WORDS = re.compile(
    r"\bflagged\b|moderation|content (?:management )?policy|violates? .{0,40}guidelines", re.IGNORECASE
)
_TOO_LONG_WORDS = re.compile(
    r"context (?:length|window|size)|maximum (?:\w+ )?(?:length|tokens)|too (?:long|large|many tokens)",
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
    r"credit balance|insufficient (?:credits?|balance|funds|quota)|exceeded your current quota|billing hard limit",
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

# The status that an error without one is taken for, by its code or type: as an event of a stream, or under a 200.
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
    """What the client is told if nothing better comes; whether the next attempt may be made, or only one with another model.
    `words`: what the provider said, for the log.
    """

    problem: ErrorResponse
    try_next: bool
    another_model: bool = False
    words: str | None = None

    def fault(self, answered: int) -> UpstreamError:
        """The fault of an attempt that was answered with this status."""
        return UpstreamError(
            self.problem,
            safe_to_repeat=self.try_next,
            another_model=self.another_model,
            answered=answered,
            phase=Phase.HEAD,
            words=self.words,
        )


def after_status(
    status: int,
    body: bytes,
    retry_after: str | None,
    *,
    retry_after_ms: str | None = None,
    content_type: str | None = None,
    now: float = 0.0,
) -> Verdict:
    """Judge an answer whose status isn't 200. `now` is Unix time, for a Retry-After that is a date."""
    words = provider_words(provider_error(body, content_type))
    return _verdict(status, words, wait_of(retry_after, retry_after_ms, now))


def after_event(error: Any, *, otherwise: str) -> UpstreamError:
    """Judge an error that came with status 200, in the place of an answer: as if the provider had answered with the status that
    the error names or its code is known for. `otherwise`: the message for one that has neither.
    """
    words = provider_words(error if isinstance(error, dict) else {"error": error})
    status = _status_of(words)
    if status is not None:
        return _verdict(status, words, None).fault(status)
    problem = _quoted(upstream_error(otherwise, may_have_run=True), words)
    return UpstreamError(problem, safe_to_repeat=True, answered=200, words=words.message)


def in_stream(error: Any) -> UpstreamError:
    """Judge an error behind the first event of a stream."""
    words = provider_words(error)
    problem = _quoted(upstream_error("The provider failed in the stream.", may_have_run=True), words)
    return UpstreamError(problem, safe_to_repeat=False, answered=200, words=words.message)


def is_unwell(fault: UpstreamError) -> bool:
    """Whether a fault speaks against the upstream itself: it couldn't be reached, fell silent, broke off or failed. That it has
    no capacity, or refuses this request or our account, doesn't; neither does what never left the gateway, nor an answer
    that the gateway can't read.
    """
    if fault.unreadable:
        return False
    if fault.answered is None:
        return fault.problem.status != 503  # no connection was free, or the gateway is shutting down
    return fault.answered >= 500 or fault.answered == 200


def may_be_the_request(fault: UpstreamError) -> bool:
    """Whether the request itself may have caused the fault, so that it says less of how others' requests will do."""
    return fault.phase not in {Phase.CONNECT, Phase.TLS}


def asks_to_wait_s(fault: UpstreamError) -> float:
    """For how long the upstream should be spared, by its own word; at most MAX_RETRY_AFTER_S, 0.0 if it didn't ask."""
    return min(fault.problem.retry_after_s or 0.0, MAX_RETRY_AFTER_S) if fault.answered is not None else 0.0


def foremost(faults: Sequence[UpstreamError]) -> UpstreamError:
    """The fault to tell of, of all that a request met: a refusal of the request before a wait, a wait before a failure, a failure
    before a refusal of the gateway, and that before a connection that couldn't be made. Of equal ones the last, but the first
    refusal, which is by the model that was asked for, and the shortest wait. A client's retry may pay twice if any attempt may
    have run.
    """
    _, chosen = max(enumerate(faults), key=lambda numbered: _weight(*numbered))
    problem = chosen.problem
    if problem.status >= 500 and not problem.may_have_run and any(fault.problem.may_have_run for fault in faults):
        chosen.problem = replace(problem, may_have_run=True)
    return chosen


def wait_of(retry_after: str | None, retry_after_ms: str | None = None, now: float = 0.0) -> float | None:
    """Seconds that a provider asks to wait, at most MAX_WAIT_S; None if it doesn't say. `now` is Unix time, for a date
    (RFC 9110, section 10.2.3); one that is past asks for no wait.
    """
    for text, per_second in ((retry_after_ms, 1000), (retry_after, 1)):
        wait = _number(text)
        if wait is not None:
            return min(wait / per_second, MAX_WAIT_S)
    until = _date(retry_after)
    return None if until is None else min(max(until - now, 0.0), MAX_WAIT_S)


def _verdict(status: int, words: ProviderWords, wait_s: float | None) -> Verdict:
    if status in _REFUSED_US or status in _REFUSED_REQUEST:
        blamed = _about_us(status, words)
        if blamed is None:
            return _refused(status, words)
        problem = replace(upstream_error(_REFUSED_US[blamed], may_have_run=False), provider_code=words.code)
        return Verdict(problem, try_next=True, words=words.message)
    if status == 429:
        return Verdict(_limited(words, wait_s), try_next=True, words=words.message)
    if status in _FULL:
        full = ErrorResponse(502, "upstream_error", "The provider is overloaded.", retry_after_s=wait_s)
        return Verdict(_quoted(full, words), try_next=True, words=words.message)
    if status >= 500 or status in _IN_THE_MIDDLE:
        failed = upstream_error(f"The provider failed with status {status}.", may_have_run=True)
        return Verdict(_quoted(failed, words), try_next=True, words=words.message)
    nonsense = f"The provider answered with status {status}, which makes no sense here."
    accepted = 200 <= status < 300  # whatever it did, it did it: another would do it again
    problem = _quoted(upstream_error(nonsense, may_have_run=accepted), words)
    return Verdict(problem, try_next=not accepted, words=words.message)


def _about_us(status: int, words: ProviderWords) -> int | None:
    """Which of _REFUSED_US is meant, if the refusal is about the gateway's account or configuration at the provider."""
    code, said = (words.code or "").lower(), words.message or ""
    if status == 403:
        return None if _is_moderated(words) else 403
    if status == 404:
        return None if _is_about_a_field(words) or _UNSUPPORTED_WORDS.search(said) else 404
    if status in _REFUSED_US:
        return status
    if status in _MAY_BE_ABOUT_US:
        if code in _NO_CREDENTIALS or _CREDENTIAL_WORDS.search(said):
            return 401
        if code in _OUT_OF_QUOTA or _CREDIT_WORDS.search(said):
            return 402
        if code in _UNKNOWN_MODEL or (words.param in {None, "model"} and _MODEL_WORDS.search(said)):
            return 404
    return None


def _is_moderated(words: ProviderWords) -> bool:
    return (
        words.moderated
        or (words.code or "").lower() in _MODERATED
        or _MODERATED_WORDS.search(words.message or "") is not None
    )


def _is_about_a_field(words: ProviderWords) -> bool:
    """Whether it names a field that the client chose, which the model's name isn't."""
    return words.param not in {None, "model"} and (words.code or "").lower() not in _UNKNOWN_MODEL


def _refused(status: int, words: ProviderWords) -> Verdict:
    """The request was refused, in the provider's own words and with its own status, code and param."""
    code = words.code if words.code is not None and not words.numeric and _CODE.fullmatch(words.code) else None
    problem = ErrorResponse(
        status,
        code or "provider_refused",
        words.message or "The provider refused the request.",
        words.param,
        provider_error=words.value,
        provider_code=words.code,
    )
    return Verdict(problem, try_next=False, another_model=_another_may_take_it(status, words), words=words.message)


def _another_may_take_it(status: int, words: ProviderWords) -> bool:
    """Whether another model may take what this one refused: it is too long for it, or uses what it doesn't support. What was
    flagged isn't offered elsewhere, and what is malformed would be refused everywhere.
    """
    if _is_moderated(words):
        return False
    code, said = (words.code or "").lower(), words.message or ""
    return (
        status in {404, 413}
        or code in _TOO_LONG
        or code.startswith("unsupported")
        or _TOO_LONG_WORDS.search(said) is not None
        or _UNSUPPORTED_WORDS.search(said) is not None
    )


def _limited(words: ProviderWords, wait_s: float | None) -> ErrorResponse:
    """The provider has no capacity for us: for a moment, or until somebody pays. Its words may name our organisation."""
    if wait_s is None:
        wait_s = words.wait_s if words.wait_s is not None else _spoken_wait_s(words.message or "")
    by_code = (words.code or "").lower() in _OUT_OF_QUOTA or (words.kind or "").lower() in _OUT_OF_QUOTA
    if by_code or (wait_s is None and _CREDIT_WORDS.search(words.message or "")):
        problem = provider_not_available(
            "The gateway's quota at the provider is spent.", max(wait_s or 0.0, QUOTA_RETRY_AFTER_S)
        )
    else:
        problem = provider_not_available("The provider has no capacity left.", wait_s or DEFAULT_RETRY_AFTER_S)
    return replace(problem, provider_code=words.code)


def _quoted(problem: ErrorResponse, words: ProviderWords) -> ErrorResponse:
    """A problem with what the provider said of it."""
    message = problem.message if words.message is None else f"{problem.message.removesuffix('.')}: {words.message}"
    return replace(problem, message=message, provider_code=words.code, provider_error=words.value)


def _status_of(words: ProviderWords) -> int | None:
    if words.numeric and words.code is not None and words.code.isdigit() and 400 <= int(words.code) <= 599:
        return int(words.code)
    known = (_STATUS_OF.get((name or "").lower()) for name in (words.code, words.kind))
    return next((status for status in known if status is not None), None)


def _weight(index: int, fault: UpstreamError) -> tuple[int, float, int]:
    problem = fault.problem
    if problem.status < 500:
        return 4, 0.0, -index
    if fault.answered is None:
        return (2 if problem.may_have_run else 0), 0.0, index
    if problem.status == 503:
        return 3, -(problem.retry_after_s or 0.0), index
    return (1 if fault.answered in _REFUSED_US or fault.answered in _REFUSED_REQUEST else 2), 0.0, index


def _spoken_wait_s(message: str) -> float | None:
    """`Please try again in 7m12s.` (OpenAI, Groq), `Please retry in 34.07s.` (Gemini), `retry after 60 seconds` (Azure)."""
    found = _WAIT_WORDS.search(message)
    if found is None:
        return None
    total = sum((_number(amount) or 0.0) * _UNIT_S[unit.lower()] for amount, unit in _DURATION.findall(found[1]))
    return min(total, MAX_WAIT_S)


def _date(text: str | None) -> float | None:
    """Unix time of an HTTP date (RFC 9110, section 5.6.7)."""
    if not text or len(text) > 64:
        return None
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _number(text: str | None) -> float | None:
    """A count that is finite and not negative."""
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None
