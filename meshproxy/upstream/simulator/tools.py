"""Whether the simulated model calls a tool, which, and with what."""

from random import Random
from typing import Any

import msgspec
from msgspec import Struct

from meshproxy.upstream.simulator import refusals
from meshproxy.upstream.simulator.ask import Ask
from meshproxy.upstream.simulator.prose import tokenize
from meshproxy.upstream.simulator.schema import value_for


class Call(Struct):
    """A call of one tool. `arguments`: JSON, cut into tokens."""

    id: str
    name: str
    arguments: list[str]


def calls_for(ask: Ask, rng: Random) -> list[Call]:
    """The calls to answer with; none means words. A tool's result, as the last message, is always answered with words."""
    if ask.last_role == "tool":
        return []
    return [_call(function, rng) for function in _chosen(ask)]


def is_forced(ask: Ask) -> bool:
    """Whether one tool was named in tool_choice; OpenAI then finishes with "stop"."""
    return isinstance(ask.tool_choice, dict)


def _chosen(ask: Ask) -> list[dict[str, Any]]:
    functions = [tool["function"] for tool in ask.tools if tool.get("type") == "function"]
    if not functions or ask.tool_choice == "none":
        return []
    if isinstance(ask.tool_choice, dict):
        return [_forced(ask.tool_choice, functions)]
    mentioned = [function for function in functions if _is_mentioned(function["name"], ask.last_words)]
    if not mentioned and ask.tool_choice == "required":
        mentioned = functions[:1]
    return mentioned if ask.parallel_tool_calls else mentioned[:1]


def _forced(choice: dict[str, Any], functions: list[dict[str, Any]]) -> dict[str, Any]:
    named = choice.get("function")
    name = named.get("name") if isinstance(named, dict) else None
    for function in functions:
        if function["name"] == name:
            return function
    raise refusals.invalid(f"Tool choice '{name}' not found in 'tools' parameter.", "tool_choice")


def _is_mentioned(name: str, words: str) -> bool:
    """By its name, or by its name as words: get_weather, get weather."""
    lowered = words.lower()
    return name.lower() in lowered or name.lower().replace("_", " ") in lowered


def _call(function: dict[str, Any], rng: Random) -> Call:
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    try:
        arguments = value_for(schema, rng)
    except ValueError as error:
        message = f"Invalid schema for function '{function['name'][:64]}': {error}."
        raise refusals.invalid(message, "tools", "invalid_function_parameters") from error
    identity = f"call_{rng.getrandbits(96):024x}"
    return Call(identity, function["name"], tokenize(msgspec.json.encode(arguments).decode()))
