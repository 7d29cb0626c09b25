"""Which tools the simulated model calls."""

from meshproxy.upstream.simulator.ask import Ask, Function, ToolChoice
from meshproxy.upstream.simulator.refusals import Refusal


def called(ask: Ask) -> list[Function]:
    """The functions to call; none means words. A tool's result, as the last message, is always answered with words."""
    functions = [tool.function for tool in ask.tools if tool.function is not None]
    if ask.messages[-1].role == "tool" or ask.tool_choice == "none":
        return []
    if isinstance(ask.tool_choice, ToolChoice):
        return [_named(ask.tool_choice.function.name, functions)]
    mentioned = [function for function in functions if _as_words(function.name) in _as_words(ask.last_words)]
    if ask.tool_choice == "required":
        mentioned = mentioned or functions[:1]
    return mentioned if ask.parallel_tool_calls else mentioned[:1]


def _named(name: str, functions: list[Function]) -> Function:
    for function in functions:
        if function.name == name:
            return function
    raise Refusal(400, f"Tool choice '{name}' not found in 'tools' parameter.", param="tool_choice")


def _as_words(text: str) -> str:
    """get_weather and "get weather" are the same."""
    return text.lower().replace("_", " ")
