"""What a client is told when something goes wrong, in the one envelope, as a body or as the last event of a stream; and what a
provider said when it did.
"""

import html
import math
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from meshproxy.errors import MAX_RETRY_AFTER_S, Problem

MAX_MESSAGE_CHARS: Final = 2000
MAX_PROVIDER_ERROR_BYTES: Final = 8192
MAX_TITLE_CHARS: Final = 200
MAX_SCANNED_BYTES: Final = 65_536  # of a provider's HTML
MAX_SHOWN_CHARS: Final = 4  # of a secret: less than the beginning that all of its kind have
CONCEALED: Final = "[redacted]"

_TITLE = re.compile(rb"<title[^>]{0,200}>(.{0,1000}?)</title", re.IGNORECASE | re.DOTALL)
_HTML = re.compile(rb"\s{0,64}(?:<!doctype html|<html)", re.IGNORECASE)


def envelope(problem: Problem, request_id: str) -> bytes:
    """The JSON body of an error, which both OpenAI's and Mesh's SDKs read."""
    error: dict[str, Any] = {
        "message": _text(problem.message),
        "type": problem.type,
        "param": None if problem.param is None else _text(problem.param),
        "code": problem.code,
        "request_id": request_id,
    }
    if problem.details:
        error["details"] = [
            {"type": detail.type, "loc": [_step(step) for step in detail.loc], "msg": _text(detail.msg)}
            for detail in problem.details
        ]
    if problem.retry_after_s is not None and math.isfinite(problem.retry_after_s):
        error["retry_after_seconds"] = _millis(problem.retry_after_s) / 1000
    if problem.provider_error is not None:
        error["provider_error"] = _bounded(problem.provider_error)
    return msgspec.json.encode({"error": error, "request_id": request_id})


def problem_headers(problem: Problem) -> list[tuple[str, str]]:
    """The headers that belong to an error's body. `x-should-retry` is what OpenAI's SDKs obey: a retry must not pay twice, wait
    for more than a minute, or repeat what can't succeed (they would repeat a 409).
    """
    headers = [("content-type", "application/json")]
    if problem.status == 401:
        headers.append(("www-authenticate", "Bearer"))  # RFC 9110, section 11.6.1
    wait_s = problem.retry_after_s
    if wait_s is not None and math.isfinite(wait_s):
        headers.append(("retry-after", str(max(1, math.ceil(_millis(wait_s) / 1000)))))
        headers.append(("retry-after-ms", str(_millis(wait_s))))
    pays_twice = problem.status >= 500 and problem.may_have_run
    too_long = wait_s is not None and not wait_s <= MAX_RETRY_AFTER_S
    if pays_twice or too_long or problem.status == 409:
        headers.append(("x-should-retry", "false"))
    return headers


def error_event(problem: Problem, request_id: str) -> bytes:
    """An error as the last event of a stream. JSON has no raw line ends, so nothing in it can begin another event."""
    return b"data: " + envelope(problem, request_id) + b"\n\n"


def provider_error(body: bytes, content_type: str | None = None) -> Any:
    """What a provider said of its error: the JSON value of its body, else the beginning of its text; a web page's title. None
    for an empty body.
    """
    if not body.strip():
        return None
    if len(body) <= MAX_PROVIDER_ERROR_BYTES:
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
    if "html" in (content_type or "").lower() or _HTML.match(body):
        return _page(body[:MAX_SCANNED_BYTES])
    return body[: 4 * MAX_MESSAGE_CHARS].decode(errors="replace")[:MAX_MESSAGE_CHARS]


def concealed(words: Any, secrets: Sequence[str]) -> Any:
    """A provider's words without any of the secrets, also where they were cut off in the middle of one."""
    if isinstance(words, str):
        return _without(words, secrets)
    try:
        text = msgspec.json.encode(words).decode()
    except (TypeError, ValueError, RecursionError):
        return words
    clean = _without(text, [msgspec.json.encode(secret).decode()[1:-1] for secret in secrets])
    return words if clean == text else msgspec.json.decode(clean)


def _without(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, CONCEALED)
        shown = next((size for size in range(len(secret) - 1, MAX_SHOWN_CHARS, -1) if text.endswith(secret[:size])), 0)
        text = text[:-shown] + CONCEALED if shown else text
    return text


def _page(body: bytes) -> str:
    found = _TITLE.search(body)
    title = " ".join(html.unescape(found[1].decode(errors="replace")).split()) if found else ""
    return f"A web page: {title[:MAX_TITLE_CHARS]}" if title else "A web page without a title"


def _bounded(value: Any) -> Any:
    """A provider's words as JSON of at most 8 KiB; if they are more, or no JSON, the beginning of their text."""
    try:
        encoded = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError):
        return _text(value) if isinstance(value, str) else "unreadable"
    if len(encoded) <= MAX_PROVIDER_ERROR_BYTES:
        return msgspec.Raw(encoded)
    return _text(value if isinstance(value, str) else encoded.decode())


def _text(value: str) -> str:
    """At most so many characters, of which each can be encoded."""
    return value[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()


def _step(step: str | int) -> str | int:
    return step if isinstance(step, int) else _text(step)


def _millis(seconds: float) -> int:
    """Milliseconds, rounded up; what is less than a microsecond is only a float's error."""
    return max(0, math.ceil(round(seconds * 1000, 3)))
