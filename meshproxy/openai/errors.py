"""Errors as clients read them and as providers write them: details, the envelope, and parsing of a provider's error.

Detail types are pydantic's (`missing`, `string_type`, `greater_than_equal`, ...), which Mesh's SDKs know. A decoder
stops at its first error, so a caller that wants all of them decodes each field alone. What is kept of a provider's
error is bounded in size and depth. `without_secrets` and `without_quotes` clean it for clients and logs.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct, ValidationError
from msgspec.structs import replace

from meshproxy.errors import MAX_RETRY_AFTER_S, Detail, ErrorResponse, GatewayError, Source, invalid
from meshproxy.openai.usage import HALF_A_PAIR, decode_value

MAX_DETAIL_CHARS = 200
MAX_DETAILS = 32  # in one error
MAX_LOCATED_BYTES = 262_144  # of a body in which half a surrogate pair is looked for: that of many items takes 0.1 s

_PATH = re.compile(r" - at `\$(.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_MISMATCH = re.compile(r"Expected `(\w+)[^`]*`, got `(\w+)`")
_BOUND = re.compile(r"Expected `(\w+)` (of length )?(<=|>=|<|>|matching)")

_MISMATCH_TYPES = {
    "str": "string_type",
    "int": "int_type",
    "float": "float_type",
    "bool": "bool_type",
    "array": "list_type",
    "object": "dict_type",
}
_BOUNDS = {
    "<=": "less_than_equal",
    ">=": "greater_than_equal",
    "<": "less_than",
    ">": "greater_than",
    "matching": "string_pattern_mismatch",
}


def detail_of(error: Exception, loc: tuple[str | int, ...]) -> Detail:
    """Return the detail for an error in decoding the value at `loc`: msgspec's `DecodeError`, or `RecursionError`."""
    if isinstance(error, RecursionError):
        return Detail("json_invalid", loc, "JSON is nested too deeply")
    text, path = _split(str(error))
    field = _FIELD.match(text)
    if field:
        kind, message = ("missing", "Field required") if "missing" in field[1] else ("extra_forbidden", "No such field")
        return Detail(kind, (*loc, *path, field[2]), message)
    return Detail(_type_of(error, text), (*loc, *path), _readable(text))


def detail_of_body(error: Exception, body: bytes) -> Detail:
    """Return the detail for a body that can't be decoded.

    Half a surrogate pair, which JSON's grammar allows (RFC 8259, section 8.2), is named as such, with the field that has it.
    """
    text = (
        body.replace(rb"\\", b"//") if len(body) <= MAX_LOCATED_BYTES else b""
    )  # an escaped backslash begins no escape
    one, other = (HALF_A_PAIR.sub(mark, text) for mark in (b"1", b"2"))
    if one != other:
        try:
            steps = _first_difference(one, other)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # not JSON without them either
        else:
            return Detail("string_unicode", ("body", *steps), "Half a surrogate pair is no character")
    return detail_of(error, ("body",))


def _first_difference(one: bytes, other: bytes) -> list[str | int]:
    """Return the path of the first value in which two JSON texts of one shape differ, as deep as it is looked for."""
    one, other = (bytes(msgspec.json.decode(text, type=Raw)) for text in (one, other))
    steps: list[str | int] = []
    while len(steps) < MAX_NESTING and one[:1] in {b"{", b"["}:
        for (step, value), (_, changed) in zip(_items(one), _items(other), strict=False):
            one, other = bytes(value), bytes(changed)
            if one != other:
                steps.append(step)
                break
        else:
            break  # a name differs
    return steps


def _items(text: bytes) -> Iterable[tuple[str | int, Raw]]:
    if text[:1] == b"{":
        return msgspec.json.decode(text, type=dict[str, Raw]).items()
    return enumerate(msgspec.json.decode(text, type=list[Raw]))


def field_path(detail: Detail) -> str:
    """Return the path of a detail inside the body as OpenAI writes it: `messages[0].role`; empty for the body itself."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in detail.loc[1:])
    return "".join(steps).removeprefix(".")


def validation_error(details: Sequence[Detail], what: str) -> GatewayError:
    """Build the client's 422 for an invalid `what`, of at most MAX_DETAILS errors; its message is the first one's."""
    where = field_path(details[0])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    message = f"Invalid {what}: {where + ': ' if where else ''}{details[0].msg}{more}"
    return GatewayError(Source.CLIENT, invalid(message, *details[:MAX_DETAILS], param=where or None))


def _split(text: str) -> tuple[str, tuple[str | int, ...]]:
    found = _PATH.search(text)
    if found is None:
        return text, ()
    steps = (int(index) if index else name for name, index in _STEP.findall(found[1]))
    return text[: found.start()], tuple(steps)


def _type_of(error: Exception, text: str) -> str:
    if mismatch := _MISMATCH.match(text):
        expected, got = mismatch.groups()
        return "int_from_float" if (expected, got) == ("int", "float") else _MISMATCH_TYPES.get(expected, "value_error")
    if bound := _BOUND.match(text):
        expected, length, sign = bound.groups()
        if not length:
            return _BOUNDS[sign]
        return ("string_" if expected == "str" else "") + ("too_long" if sign.startswith("<") else "too_short")
    if text.startswith("Invalid enum value"):
        return "literal_error"
    if "out of range" in text:
        return "number_out_of_range"
    return "value_error" if isinstance(error, ValidationError) else "json_invalid"


def _readable(text: str) -> str:
    return text.replace("`", "").replace(" | ", " or ")[:MAX_DETAIL_CHARS]


MAX_MESSAGE_CHARS: Final = 2000
MAX_PROVIDER_ERROR_BYTES: Final = 8192
MAX_DECODED_BYTES: Final = 262_144  # of a provider's error: validators echo the prompt that they refuse
MAX_PROVIDER_ERROR_DEPTH: Final = 100  # clients' decoders read hundreds of levels: CPython 3.11's json 995
MAX_TITLE_CHARS: Final = 200
MAX_SCANNED_BYTES: Final = 65_536  # of a provider's HTML
MAX_CODE_CHARS: Final = 128
MAX_NESTING: Final = 4  # levels of objects in which a provider's message is looked for
MAX_SENTENCES: Final = 8  # items of a list of errors
MAX_QUOTED_BYTES: Final = 131_072  # of a request whose strings are removed from a provider's message
MIN_QUOTED_CHARS: Final = 24  # of a string's start: a message that quotes it is cut off there
MAX_SHOWN_CHARS: Final = 4  # of a secret: less than the prefix that all of its kind share
MIN_BEGINNING_CHARS: Final = (
    16  # of a secret's beginning in mid-text: more than `sk-ant-api03-`, which Anthropic's share
)
REDACTED: Final = "[redacted]"

_TITLE = re.compile(rb"<title[^>]{0,200}>(.{0,1000}?)</title", re.IGNORECASE | re.DOTALL)
_STRING: Final = re.compile(rb'"((?:[^"\\]|\\.){10,}+)"', re.DOTALL)  # long enough to be part of a prompt
# Where a message is looked for, in this order. `error_description`: RFC 6749, section 5.2.
_MESSAGE_FIELDS: Final = (
    *("message", "msg", "detail", "error_description", "error"),
    *("title", "errors", "text", "description", "reason"),
)
_BRACKET: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)  # a string, or a bracket outside one
_STEPS: Final = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
_HTML = re.compile(rb"\s{0,64}(?:<!doctype html|<html)", re.IGNORECASE)


def envelope(response: ErrorResponse, request_id: str) -> bytes:
    """Build the JSON body of an error, which both OpenAI's and Mesh's SDKs read."""
    error: dict[str, Any] = {
        "message": _text(response.message),
        "type": response.type,
        "param": None if response.param is None else _text(response.param),
        "code": response.code,
        "request_id": request_id,
    }
    if response.details:
        error["details"] = [
            {"type": detail.type, "loc": [_step(step) for step in detail.loc], "msg": _text(detail.msg)}
            for detail in response.details
        ]
    if response.retry_after_s is not None and math.isfinite(response.retry_after_s):
        error["retry_after_seconds"] = _whole_seconds(response.retry_after_s)
    if response.provider_code is not None:
        error["provider_code"] = _text(response.provider_code)
    if response.provider_error is not None:
        error["provider_error"] = _bounded(response.provider_error)
    return msgspec.json.encode({"error": error, "request_id": request_id})


def error_headers(response: ErrorResponse) -> list[tuple[str, str]]:
    """Build the headers of an error response.

    OpenAI's SDKs obey `x-should-retry`: a retry must not pay twice, wait for more than a minute, or repeat what can't
    succeed (they would retry a 409).
    """
    headers = [("content-type", "application/json")]
    if response.status == 401:
        headers.append(("www-authenticate", "Bearer"))  # RFC 9110, section 11.6.1
    wait_s = response.retry_after_s
    if wait_s is not None and math.isfinite(wait_s):
        headers.append(("retry-after", str(_whole_seconds(wait_s))))
        headers.append(("retry-after-ms", str(_millis(wait_s))))
    pays_twice = response.status >= 500 and response.may_have_run
    too_long = wait_s is not None and not wait_s <= MAX_RETRY_AFTER_S
    if pays_twice or too_long or response.status == 409:
        headers.append(("x-should-retry", "false"))
    return headers


def error_event(response: ErrorResponse, request_id: str) -> bytes:
    """Build the error event that ends a stream. JSON has no raw line ends, so nothing in it can begin another event."""
    return b"data: " + envelope(response, request_id) + b"\n\n"


def code_of_event(part: bytes) -> str | None:
    """Return the code of an error event that `error_event` built; None for any other part of a recorded stream.

    No provider's error is passed on as it came.
    """
    if not part.startswith(b'data: {"error":{'):
        return None
    try:
        return msgspec.json.decode(part.removeprefix(b"data: "), type=_Envelope).error.code
    except msgspec.DecodeError:
        return None


class _Code(Struct):
    code: str


class _Envelope(Struct):
    error: _Code


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


def _bounded(value: Any) -> Any:
    """Return a provider's error as a JSON object of at most 8 KiB.

    If it is larger, or no object, its beginning becomes the `message` of one, since Mesh's typed SDKs read only an
    object there. The limit of depth is our own, so that it is the same on every interpreter.
    """
    try:
        encoded = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError):
        return {"message": _text(value) if isinstance(value, str) else "unreadable"}
    if _depth(encoded[:MAX_PROVIDER_ERROR_BYTES]) > MAX_PROVIDER_ERROR_DEPTH:
        return {"message": "unreadable"}
    if len(encoded) <= MAX_PROVIDER_ERROR_BYTES and isinstance(value, dict):
        return msgspec.Raw(encoded)
    return {"message": _text(value if isinstance(value, str) else encoded.decode())}


def _depth(encoded: bytes) -> int:
    """Return the depth of nested objects and arrays in the beginning of a JSON text; 0 if it can't exceed the limit."""
    if encoded.count(b"[") + encoded.count(b"{") <= MAX_PROVIDER_ERROR_DEPTH:
        return 0  # too few brackets to exceed the limit
    deepest = depth = 0
    for token in _BRACKET.finditer(encoded):
        depth += _STEPS.get(token[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _text(value: str) -> str:
    """Return at most MAX_MESSAGE_CHARS characters, all of them encodable."""
    return value[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()


def _step(step: str | int) -> str | int:
    return step if isinstance(step, int) else _text(step)


def _whole_seconds(seconds: float) -> int:
    """Return the value of Retry-After: whole seconds, rounded up, at least one."""
    return max(1, math.ceil(_millis(seconds) / 1000))


def _millis(seconds: float) -> int:
    """Return milliseconds, rounded up; less than a microsecond over is taken for a float's error."""
    return max(0, math.ceil(round(seconds * 1000, 3)))
