"""What a request wants: its body, decoded into types whose bounds are OpenAI's.

The first thing that is wrong is told with a 400. A null field is as good as absent; one that nobody knows is let through.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from meshproxy.upstream.simulator.refusals import Refusal
from meshproxy.wire.details import detail_of, name_of

MESHS_OWN = ("template", "variables", "session_id", "transforms", "models")
OPENROUTERS = ("session_id", "transforms", "models")

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Cap = Annotated[int, Meta(ge=1, le=2**53)]


class Message(Struct, frozen=True):
    """One message. `content`: the text, or parts, some of which have a `text`."""

    role: Literal["system", "assistant", "user", "function", "tool", "developer"]
    content: str | list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content, or its text parts one after another."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content or () if isinstance(part.get("text"), str))


class Function(Struct, frozen=True):
    """What a tool calls, or the one that `tool_choice` names. `parameters`: a JSON Schema."""

    name: str
    parameters: dict[str, Any] | None = None


class Tool(Struct, frozen=True):
    """A tool; without `function` for the kinds that are never called here."""

    type: str = ""
    function: Function | None = None


class ToolChoice(Struct, frozen=True):
    """The one tool that has to be called."""

    function: Function


class JsonSchema(Struct, frozen=True):
    """What a structured answer has to fit."""

    name: str
    schema: dict[str, Any] | None = None


class ResponseFormat(Struct, frozen=True):
    """Words, or JSON."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StreamOptions(Struct, frozen=True):
    """Whether a stream tells its usage."""

    include_usage: bool | None = None


class Ask(Struct, frozen=True, kw_only=True):
    """A chat completion. `models`: OpenRouter's fallbacks, after `model`; `given`: the names of all fields that came. Some fields
    are checked and change nothing.
    """

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    models: list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    max_tokens: Cap | None = None
    max_completion_tokens: Cap | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] = []
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat()
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1
    frequency_penalty: Penalty = 0
    presence_penalty: Penalty = 0
    transforms: list[str] = []
    user: str = ""
    given: frozenset[str] = frozenset()

    @property
    def include_usage(self) -> bool:
        """Whether a chunk of its own tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    def cap(self, names: tuple[str, ...]) -> int | None:
        """The cap under the first of these names that is there."""
        caps = {"max_completion_tokens": self.max_completion_tokens, "max_tokens": self.max_tokens}
        return next((caps[name] for name in names if caps[name] is not None), None)

    @property
    def last_words(self) -> str:
        """The text of the last user message, else of the last message."""
        users = [message for message in self.messages if message.role == "user"]
        return (users or self.messages)[-1].text

    @property
    def prompt_tokens(self) -> int:
        """Per message: a quarter of the UTF-8 bytes of its text, rounded up, and 3."""
        return sum(-(-len(message.text.encode()) // 4) + 3 for message in self.messages)


def decode_ask(body: bytes, *, openrouter: bool) -> Ask:
    """Raises `Refusal` (400) for what OpenAI would refuse."""
    fields = _members(body)
    for name in MESHS_OWN:
        if name in fields and not (openrouter and name in OPENROUTERS):
            raise Refusal(400, f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    if fields.get("model") is None:
        raise Refusal(400, "you must provide a model parameter")
    try:
        told = {name: value for name, value in fields.items() if value is not None}
        ask = msgspec.convert({**told, "given": frozenset(fields)}, Ask)
    except msgspec.ValidationError as error:
        raise _refusal_of(error) from None
    for refusal in _contradictions(ask):
        raise refusal
    return ask


def _members(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        message = "We could not parse the JSON body of your request. The OpenAI API expects a JSON payload."
        raise Refusal(400, message) from None


_CODES = {
    "missing": "missing_required_parameter",
    "literal_error": "invalid_value",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "less_than_equal": "{kind}_above_max_value",
    "greater_than_equal": "{kind}_below_min_value",
}


def _refusal_of(error: msgspec.ValidationError) -> Refusal:
    """OpenAI's code and place of what a type complains of."""
    detail = detail_of(error, ("body",))
    kind = "integer" if detail.msg.startswith("Expected int ") else "decimal"
    code = _CODES.get(detail.type, "invalid_type").format(kind=kind)
    return Refusal(400, f"Invalid '{name_of(detail)}': {detail.msg}.", param=name_of(detail), code=code)


def _contradictions(ask: Ask) -> Iterator[Refusal]:
    """What is only right beside, or without, something else."""
    for index, message in enumerate(ask.messages):
        place = f"messages[{index}]"
        if message.content is None and message.role != "assistant":
            yield _lacking(f"{place}.content", "invalid_type")
        if message.role == "tool" and message.tool_call_id is None:
            yield _lacking(f"{place}.tool_call_id", "missing_required_parameter")
    for index, tool in enumerate(ask.tools):
        if tool.type == "function" and tool.function is None:
            yield _lacking(f"tools[{index}].function", "invalid_type")
    if ask.response_format.type == "json_schema" and ask.response_format.json_schema is None:
        yield _lacking("response_format.json_schema", "invalid_type")
    if ask.stream_options is not None and not ask.stream:
        yield Refusal(400, "'stream_options' is only allowed when 'stream' is enabled.", param="stream_options")
    if ask.tool_choice is not None and not ask.tools:
        yield Refusal(400, "'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    if ask.max_tokens is not None and ask.max_completion_tokens is not None:
        both = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
        yield Refusal(400, both, param="max_tokens", code="invalid_parameter_combination")


def _lacking(param: str, code: str) -> Refusal:
    return Refusal(400, f"Missing required parameter: '{param}'.", param=param, code=code)
