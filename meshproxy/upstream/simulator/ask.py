"""What a request wants: its body, decoded and checked."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from meshproxy.upstream.simulator import refusals
from meshproxy.upstream.simulator.checks import check_fields


class Ask(Struct, frozen=True, kw_only=True):
    """A chat completion that passed every check. `models`: OpenRouter's fallbacks, after `model`."""

    model: str
    models: tuple[str, ...]
    messages: list[dict[str, Any]]
    stream: bool
    include_usage: bool
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    seed: int | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    response_format: dict[str, Any]
    logprobs: bool

    @property
    def last_role(self) -> str:
        """Whose turn it was last."""
        return str(self.messages[-1]["role"])

    @property
    def last_words(self) -> str:
        """The text of the last user message, else of the last message."""
        users = [message for message in self.messages if message["role"] == "user"]
        return text_of((users or self.messages)[-1])

    @property
    def prompt_tokens(self) -> int:
        """Per message: a quarter of the UTF-8 bytes of its text, rounded up, and 3."""
        return sum(-(-len(text_of(message).encode()) // 4) + 3 for message in self.messages)


def decode_ask(body: bytes, *, openrouter: bool) -> Ask:
    """Raises `Refusal` (400) for what OpenAI would refuse."""
    fields = _decode(body)
    check_fields(fields, openrouter=openrouter)

    def get(name: str, default: Any) -> Any:
        value = fields.get(name)
        return default if value is None else value

    stop = get("stop", ())
    return Ask(
        model=fields["model"],
        models=tuple(get("models", ())),
        messages=fields["messages"],
        stream=get("stream", False),
        include_usage=get("stream_options", {}).get("include_usage") is True,
        n=get("n", 1),
        max_tokens=get("max_completion_tokens", get("max_tokens", None)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=get("seed", None),
        tools=get("tools", []),
        tool_choice=get("tool_choice", "auto"),
        parallel_tool_calls=get("parallel_tool_calls", True),
        response_format=get("response_format", {"type": "text"}),
        logprobs=get("logprobs", False),
    )


def text_of(message: Mapping[str, Any]) -> str:
    """A message's text: its content, or its content's text parts one after another."""
    content = message.get("content")
    return content if isinstance(content, str) else "".join(_texts(content or []))


def _texts(parts: list[dict[str, Any]]) -> Iterator[str]:
    return (part["text"] for part in parts if isinstance(part.get("text"), str))


def _decode(body: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise refusals.not_json() from None
    if not isinstance(fields, dict):
        raise refusals.not_json()
    return fields
