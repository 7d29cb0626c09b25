"""OpenAI's bounds on the fields of a request, as a table; the first field that breaks one is told with a 400."""

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any

from meshproxy.upstream.simulator import refusals

Check = Callable[[str, Any], None]

ROLES = ("system", "assistant", "user", "function", "tool", "developer")
MESHS_OWN = ("template", "variables", "session_id", "transforms", "models")
OPENROUTERS = frozenset({"models", "transforms", "session_id"})


def check_fields(fields: Mapping[str, Any], *, openrouter: bool) -> None:
    """Raise the `Refusal` for the first thing that is wrong. A null field is as good as absent."""
    for name in MESHS_OWN:
        if name in fields and not (openrouter and name in OPENROUTERS):
            raise refusals.unknown_parameter(name)
    _check_required(fields)
    for name, check in _CHECKS.items():
        if fields.get(name) is not None:
            check(name, fields[name])
    _check_together(fields)


def _check_required(fields: Mapping[str, Any]) -> None:
    if fields.get("model") is None:
        raise refusals.invalid("you must provide a model parameter")
    if fields.get("messages") is None:
        raise refusals.missing("messages")


def _check_together(fields: Mapping[str, Any]) -> None:
    """Fields that are only right beside, or without, one another."""
    if fields.get("stream_options") is not None and not fields.get("stream"):
        raise refusals.invalid(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
        )
    if fields.get("tool_choice") is not None and not fields.get("tools"):
        raise refusals.invalid("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice")
    if fields.get("max_tokens") is not None and fields.get("max_completion_tokens") is not None:
        raise refusals.invalid(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            "max_tokens",
            "invalid_parameter_combination",
        )


def _decimal(low: float, high: float) -> Check:
    return _number(int | float, "a decimal", low, high)


def _integer(low: int, high: int) -> Check:
    return _number(int, "an integer", low, high)


def _number(kind: type[int] | UnionType, expected: str, low: float, high: float) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise refusals.wrong_type(name, expected, value)
        if value > high:
            raise refusals.out_of_range(name, value, high, above=True)
        if value < low:
            raise refusals.out_of_range(name, value, low, above=False)

    return check


def _is(kind: type, expected: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise refusals.wrong_type(name, expected, value)

    return check


_object = _is(dict, "an object")
_boolean = _is(bool, "a boolean")
_string = _is(str, "a string")


def _objects(name: str, value: Any) -> None:
    _is(list, "an array of objects")(name, value)
    for index, item in enumerate(value):
        _object(f"{name}[{index}]", item)


def _messages(name: str, value: Any) -> None:
    _objects(name, value)
    if not value:
        message = (
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead."
        )
        raise refusals.invalid(message, name, "empty_array")
    for index, message in enumerate(value):
        _message(f"{name}[{index}]", message)


def _message(name: str, message: Mapping[str, Any]) -> None:
    if "role" not in message:
        raise refusals.missing(f"{name}.role")
    role, content = message["role"], message.get("content")
    _string(f"{name}.role", role)
    if role not in ROLES:
        raise refusals.wrong_value(f"{name}.role", role, ROLES)
    if content is None and role != "assistant":
        raise refusals.wrong_type(f"{name}.content", "one of a string or array of objects", None)
    if isinstance(content, list):
        _objects(f"{name}.content", content)
    elif content is not None:
        _is(str, "one of a string or array of objects")(f"{name}.content", content)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise refusals.missing(f"{name}.tool_call_id")


def _stop(name: str, value: Any) -> None:
    words = [value] if isinstance(value, str) else value
    _is(list, "one of a string or array of strings")(name, words)
    for index, word in enumerate(words):
        _string(f"{name}[{index}]", word)
    if len(words) > 4:
        raise refusals.invalid(
            "Invalid 'stop': array too long. Expected an array with maximum length 4.", name, "array_above_max_length"
        )


def _tools(name: str, value: Any) -> None:
    _objects(name, value)
    for index, tool in enumerate(value):
        if tool.get("type") == "function":
            _object(f"{name}[{index}].function", tool.get("function"))
            _string(f"{name}[{index}].function.name", tool["function"].get("name"))


def _tool_choice(name: str, value: Any) -> None:
    if isinstance(value, str):
        if value not in {"none", "auto", "required"}:
            raise refusals.wrong_value(name, value, ("none", "auto", "required"))
        return
    _object(name, value)


def _response_format(name: str, value: Any) -> None:
    _object(name, value)
    if value.get("type") not in {"text", "json_object", "json_schema"}:
        raise refusals.wrong_value(f"{name}.type", str(value.get("type")), ("json_object", "json_schema", "text"))
    if value["type"] == "json_schema":
        _object(f"{name}.json_schema", value.get("json_schema"))
        _string(f"{name}.json_schema.name", value["json_schema"].get("name"))


def _strings(name: str, value: Any) -> None:
    _is(list, "an array of strings")(name, value)
    for index, item in enumerate(value):
        _string(f"{name}[{index}]", item)


_CHECKS: dict[str, Check] = {
    "model": _string,
    "messages": _messages,
    "stream": _boolean,
    "stream_options": _object,
    "temperature": _decimal(0.0, 2.0),
    "top_p": _decimal(0.0, 1.0),
    "frequency_penalty": _decimal(-2.0, 2.0),
    "presence_penalty": _decimal(-2.0, 2.0),
    "n": _integer(1, 128),
    "max_tokens": _integer(1, 2**53),
    "max_completion_tokens": _integer(1, 2**53),
    "seed": _integer(-(2**63), 2**63 - 1),
    "logprobs": _boolean,
    "top_logprobs": _integer(0, 20),
    "stop": _stop,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _boolean,
    "response_format": _response_format,
    "user": _string,
    "models": _strings,
    "transforms": _strings,
}
