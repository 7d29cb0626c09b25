"""Errors as providers write them: parsed, and cleaned of our secrets for clients and of prompts for logs."""

import html
import re
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from meshproxy.errors import ErrorResponse
from meshproxy.openai.errors import MAX_MESSAGE_CHARS
from meshproxy.openai.usage import decode_value

MAX_DECODED_BYTES: Final = 262_144  # of a provider's error: validators echo the prompt that they refuse
MAX_TITLE_CHARS: Final = 200
MAX_SCANNED_BYTES: Final = 65_536  # of a provider's HTML
MAX_CODE_CHARS: Final = 128
MAX_NESTING: Final = 4  # levels of objects in which a provider's message is looked for
MAX_SENTENCES: Final = 8  # items of a list of errors
MAX_QUOTED_BYTES: Final = 131_072  # of a request whose strings are removed from a provider's message
MIN_QUOTED_CHARS: Final = 24  # of a string's start: a message that quotes it is cut off there
MAX_SHOWN_CHARS: Final = 4  # of a secret: less than the prefix that all of its kind share
MIN_BEGINNING_CHARS: Final = 16  # of a secret's beginning in mid-text: more than Anthropic's `sk-ant-api03-`
REDACTED: Final = "[redacted]"

_TITLE = re.compile(rb"<title[^>]{0,200}>(.{0,1000}?)</title", re.IGNORECASE | re.DOTALL)
_HTML = re.compile(rb"\s{0,64}(?:<!doctype html|<html)", re.IGNORECASE)
_STRING: Final = re.compile(rb'"((?:[^"\\]|\\.){10,}+)"', re.DOTALL)  # long enough to be part of a prompt
# Where a message is looked for, in this order. `error_description`: RFC 6749, section 5.2.
_MESSAGE_FIELDS: Final = (
    *("message", "msg", "detail", "error_description", "error"),
    *("title", "errors", "text", "description", "reason"),
)


def provider_error(body: bytes, content_type: str | None = None) -> Any:
    """Decode a provider's error body: its JSON, else the beginning of its text or a web page's title; None if empty.

    JSON is read as generously as an answer: a byte order mark, NaN and lone surrogates are forgiven.
    """
    if not body.strip():
        return None
    if len(body) <= MAX_DECODED_BYTES:
        value = decode_value(body)
        if value is not None or body.strip() == b"null":
            return value
    if "html" in (content_type or "").lower() or _HTML.match(body):
        return _page(body[:MAX_SCANNED_BYTES])
    return body[: 4 * MAX_MESSAGE_CHARS].decode(errors="replace")[:MAX_MESSAGE_CHARS]


class ProviderError(Struct, frozen=True):
    """A provider's error, parsed.

    `value`: all of it, as an object. `message`, `code`, `kind` (its `type`), `param`: the text found for each.
    `numeric`: the code is a mere number. `moderated`: it gives reasons for which the request was flagged. `wait_s`: the
    wait it asks for in its body.
    """

    value: dict[str, Any] | None = None
    message: str | None = None
    code: str | None = None
    kind: str | None = None
    param: str | None = None
    numeric: bool = False
    moderated: bool = False
    wait_s: float | None = None


def parse_provider_error(value: Any) -> ProviderError:
    """Parse a provider's error; `value` is its decoded JSON or its text.

    The shapes are OpenAI's `{"error": {...}}`, the same as the only item of a list (Gemini), a bare object (vLLM,
    Mistral), an `error` that is a string (xAI, Ollama), FastAPI's `detail`, and OpenRouter's `metadata.raw` with
    another provider's error.
    """
    if value is None:
        return ProviderError()
    whole = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
    if not isinstance(whole, dict):
        sentence = _sentence(whole) or str(whole)[:MAX_MESSAGE_CHARS]
        return ProviderError({"message": sentence}, sentence)
    inner = whole["error"] if isinstance(whole.get("error"), dict) else whole
    found = inner.get("metadata")
    metadata: dict[str, Any] = found if isinstance(found, dict) else {}
    code, numeric = _code(inner, whole)
    words = ProviderError(
        whole,
        _sentence(inner) or _sentence(whole),
        code,
        _of_text(inner.get("type")) or _of_text(whole.get("type")),
        _of_text(inner.get("param")) or _place(inner) or _place(whole),
        numeric,
        moderated=bool(metadata.get("reasons") or metadata.get("flagged_input")),
        wait_s=_wait_of_details(inner.get("details")),
    )
    return _with_raw(words, metadata.get("raw"))


def conceal_secrets(words: Any, secrets: Sequence[str]) -> Any:
    """Return a provider's words without the secrets, also where one is cut off: at the end of a text, or half way."""
    try:
        return _concealed(words, secrets)
    except RecursionError:
        return REDACTED


def without_secrets(response: ErrorResponse, secrets: Sequence[str]) -> ErrorResponse:
    """Return an error response in which the provider's words contain none of the secrets."""
    if not secrets:
        return response
    return replace(
        response,
        message=conceal_secrets(response.message, secrets),
        param=conceal_secrets(response.param, secrets),
        code=conceal_secrets(response.code, secrets),
        provider_code=conceal_secrets(response.provider_code, secrets),
        provider_error=conceal_secrets(response.provider_error, secrets),
    )


def without_quotes(words: str, request: bytes) -> str:
    """Return a provider's message without the request's strings that it quotes, in whole or from their beginning.

    This keeps prompts out of the log. `request` is JSON, of which the first MAX_QUOTED_BYTES are searched.
    """
    for found in _STRING.finditer(request[:MAX_QUOTED_BYTES]):
        quoted = found[1].decode(errors="replace")
        for text in {quoted, quoted.replace('\\"', '"').replace("\\n", "\n").replace("\\\\", "\\")}:
            if text in words:
                words = words.replace(text, REDACTED)
            elif text[:MIN_QUOTED_CHARS] in words:
                words = words[: words.index(text[:MIN_QUOTED_CHARS])] + REDACTED
    return words


def _concealed(words: Any, secrets: Sequence[str]) -> Any:
    if isinstance(words, str):
        return _without(words, secrets)
    if isinstance(words, dict):
        return {_concealed(name, secrets): _concealed(value, secrets) for name, value in words.items()}
    if isinstance(words, list):
        return [_concealed(value, secrets) for value in words]
    return words


def _without(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = _without_beginnings(text, secret)
        shown = next((size for size in range(len(secret) - 1, MAX_SHOWN_CHARS, -1) if text.endswith(secret[:size])), 0)
        text = text[:-shown] + REDACTED if shown else text
    return text


def _without_beginnings(text: str, secret: str) -> str:
    """Replace a secret in a text, and its beginning of at least MIN_BEGINNING_CHARS or three quarters of it."""
    least = secret[: min(-(-len(secret) * 3 // 4), MIN_BEGINNING_CHARS)]
    kept: list[str] = []
    at = 0
    while (begin := text.find(least, at)) >= 0:
        kept += (text[at:begin], REDACTED)
        at = begin + next(size for size in range(len(secret), 0, -1) if text.startswith(secret[:size], begin))
    return "".join((*kept, text[at:]))


def _sentence(value: Any, depth: int = 0) -> str | None:
    """Return the first human-readable message in an error's JSON."""
    if isinstance(value, str):
        return value.strip()[:MAX_MESSAGE_CHARS] or None
    if depth >= MAX_NESTING:
        return None
    if isinstance(value, list):
        sentences = [sentence for item in value[:MAX_SENTENCES] if (sentence := _sentence(item, depth + 1))]
        return "; ".join(sentences)[:MAX_MESSAGE_CHARS] or None
    if isinstance(value, dict):
        return next((found for name in _MESSAGE_FIELDS if (found := _sentence(value.get(name), depth + 1))), None)
    return None


def _code(inner: dict[str, Any], whole: dict[str, Any]) -> tuple[str | None, bool]:
    """Return the provider's code, and whether it is a mere number. Google's textual code is called `status`."""
    for code in (inner.get("code"), whole.get("code")):
        if isinstance(code, str) and code.strip():
            return code.strip()[:MAX_CODE_CHARS], code.strip().isdigit()
        if isinstance(code, int | float) and not isinstance(code, bool):
            return f"{code:g}"[:MAX_CODE_CHARS], True
    return _of_text(inner.get("status")), False


def _place(value: dict[str, Any]) -> str | None:
    """Return the first field named in FastAPI's `detail`."""
    holder = value.get("message") if isinstance(value.get("message"), dict) else value
    detail = holder.get("detail")  # type: ignore[union-attr]  # holder is a dict either way
    first = detail[0] if isinstance(detail, list) and detail else None
    loc = first.get("loc") if isinstance(first, dict) else None
    steps = [str(step) for step in loc[:MAX_SENTENCES]] if isinstance(loc, list) else []
    return ".".join(steps[1:] if steps[:1] == ["body"] else steps)[:MAX_CODE_CHARS] or None


def _wait_of_details(details: Any) -> float | None:
    """Return the `retryDelay` of Google's RetryInfo in seconds (google.rpc.RetryInfo in error_details.proto)."""
    for detail in details[:MAX_SENTENCES] if isinstance(details, list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        if isinstance(delay, str) and (found := re.fullmatch(r"(\d{1,6}(?:\.\d{1,9})?)s", delay)):
            return float(found[1])
    return None


def _with_raw(words: ProviderError, raw: Any) -> ProviderError:
    """Add the message of the provider behind OpenRouter, which says more than `Provider returned error`.

    Source: https://openrouter.ai/docs/api/reference/errors-and-debugging, "Provider Errors".
    """
    if isinstance(raw, str):
        raw = provider_error(raw.encode(errors="replace"))
    if raw is None:
        return words
    inner = parse_provider_error({"error": raw} if isinstance(raw, str) else raw)
    if inner.message is None or inner.message == words.message:
        return words
    has_code = inner.code is not None and not inner.numeric
    return replace(
        words,
        message=f"{words.message}: {inner.message}"[:MAX_MESSAGE_CHARS] if words.message else inner.message,
        code=inner.code if has_code else words.code,
        numeric=False if has_code else words.numeric,
        kind=words.kind or inner.kind,
        param=words.param or inner.param,
        wait_s=words.wait_s if words.wait_s is not None else inner.wait_s,
    )


def _of_text(value: Any) -> str | None:
    return value.strip()[:MAX_CODE_CHARS] or None if isinstance(value, str) else None


def _page(body: bytes) -> str:
    found = _TITLE.search(body)
    title = " ".join(html.unescape(found[1].decode(errors="replace")).split()) if found else ""
    return f"A web page: {title[:MAX_TITLE_CHARS]}" if title else "A web page without a title"
