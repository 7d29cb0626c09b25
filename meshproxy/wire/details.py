"""What a typed decoder complains of, as the details that a client is shown.

The types are those of pydantic (`missing`, `string_type`, `greater_than_equal`, ...), which Mesh's SDKs know. A decoder stops
at its first complaint, so whoever wants all of them decodes each field alone.
"""

import re

from msgspec import ValidationError

from meshproxy.errors import Detail

MAX_MESSAGE_CHARS = 200

_PATH = re.compile(r" - at `\$(.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_MISMATCH = re.compile(r"Expected `(\w+)[^`]*`, got `(\w+)`")
_BOUND = re.compile(r"Expected `(\w+)` (of length )?(<=|>=|<|>|matching)")

_TYPES = {
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
    """The detail of a complaint about the value at `loc`: msgspec's `DecodeError` or Python's `RecursionError`."""
    if isinstance(error, RecursionError):
        return Detail("json_invalid", loc, "JSON is nested too deeply")
    text, path = _split(str(error))
    field = _FIELD.match(text)
    if field:
        kind, message = ("missing", "Field required") if "missing" in field[1] else ("extra_forbidden", "No such field")
        return Detail(kind, (*loc, *path, field[2]), message)
    return Detail(_type_of(error, text), (*loc, *path), _readable(text))


def name_of(detail: Detail) -> str:
    """The place of a detail inside the body as OpenAI writes it: `messages[0].role`; empty for the body itself."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in detail.loc[1:])
    return "".join(steps).removeprefix(".")


def _split(text: str) -> tuple[str, tuple[str | int, ...]]:
    found = _PATH.search(text)
    if found is None:
        return text, ()
    steps = (int(index) if index else name for name, index in _STEP.findall(found[1]))
    return text[: found.start()], tuple(steps)


def _type_of(error: Exception, text: str) -> str:
    if mismatch := _MISMATCH.match(text):
        expected, got = mismatch.groups()
        return "int_from_float" if (expected, got) == ("int", "float") else _TYPES.get(expected, "value_error")
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
    return text.replace("`", "").replace(" | ", " or ")[:MAX_MESSAGE_CHARS]
