"""Errors as clients read them: the details of what is invalid, and the envelope.

Detail types are pydantic's (`missing`, `string_type`, `greater_than_equal`, ...), which Mesh's SDKs know. A decoder
stops at its first error, so a caller that wants all of them decodes each field alone. What is passed on of a provider's
error is bounded in size and depth.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct, ValidationError

from meshproxy.errors import MAX_RETRY_AFTER_S, Detail, ErrorResponse, GatewayError, Source, invalid
from meshproxy.openai.usage import HALF_A_PAIR

MAX_DETAIL_CHARS = 200
MAX_DETAILS = 32  # in one error
MAX_LOCATED_BYTES = 262_144  # of a body in which half a surrogate pair is looked for: that of many items takes 0.1 s
MAX_LOCATED_STEPS = 4  # of the path to it, as in messages[0].content[0].text

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
    while len(steps) < MAX_LOCATED_STEPS and one[:1] in {b"{", b"["}:
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
MAX_PROVIDER_ERROR_DEPTH: Final = 100  # clients' decoders read hundreds of levels: CPython 3.11's json 995

_BRACKET: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)  # a string, or a bracket outside one
_STEPS: Final = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


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
