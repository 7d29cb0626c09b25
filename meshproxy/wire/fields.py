"""What each member of a chat completion request may be: its type and its bounds, which are OpenAI's
("Create chat completion", API reference) and ours.
"""

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.json import Decoder

MAX_NAME_CHARS = 256  # of a model, a template, a user, a session
MAX_MODELS = 32  # fallbacks that one request may name
MAX_TOKENS = 2**31 - 1  # a bound for arithmetic; no model comes near

_Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
_Label = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
_Cap = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class _Object(Struct, gc=False):
    """Any JSON object; its members are skipped."""


class _Message(Struct, gc=False):
    role: str
    content: str | list[_Object] | None = None
    images: Raw | UnsetType = UNSET  # beside the text, as base64 (Ollama, "Generate a chat completion")


class _StreamOptions(Struct, gc=False):
    include_usage: bool | None = None


class Bulk(Struct, gc=False):
    """The members that may be large: they are passed on whole, or are lists of what is skipped."""

    messages: Raw = Raw()
    tools: Raw = Raw()
    functions: Raw = Raw()
    response_format: Raw = Raw()
    prediction: Raw = Raw()


FIELDS: Final[dict[str, Any]] = {
    "frequency_penalty": _Penalty,
    "max_completion_tokens": _Cap,
    "max_new_tokens": int,
    "max_output_tokens": int,
    "max_tokens": _Cap,
    "messages": list[_Message],
    "model": _Name,
    "models": Annotated[list[_Name], Meta(max_length=MAX_MODELS)],
    "n": Annotated[int, Meta(ge=1, le=128)],
    "n_predict": int,
    "presence_penalty": _Penalty,
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "service_tier": _Label,
    "session_id": _Label,
    "stop": str | list[str],
    "stream": bool,
    "stream_options": _StreamOptions,
    "temperature": Annotated[float, Meta(ge=0, le=2)],
    "template": _Name,
    "timeout": Annotated[float, Meta(gt=0)],
    "tool_choice": Literal["none", "auto", "required"] | _Object,
    "tools": list[_Object],
    "top_p": Annotated[float, Meta(ge=0, le=1)],
    "transforms": list[Literal["middle-out"]],
    "user": _Label,
    "variables": dict[str, str],
}

# Names of the cap on output. One effective cap goes out under one of the first two. The others are read too, because a provider
# that knows one lets it win: llama.cpp reads `n_predict` before `max_tokens` (tools/server/README.md), Text Generation Inference
# has `max_new_tokens`, and OpenAI's Responses API `max_output_tokens`. Of those a value below 1 is no cap (llama.cpp's -1).
CAPS: Final[tuple[str, ...]] = (
    "max_completion_tokens",
    "max_tokens",
    "max_output_tokens",
    "max_new_tokens",
    "n_predict",
)

# Members of Mesh's own requests that neither the gateway nor a provider reads (Mesh's SDKs, "chat.completions.create").
UNREAD: Final = frozenset({"async_mode", "cache", "image", "modality"})

# Members that steer an answer and are no part of its prompt.
STEERING: Final = FIELDS.keys() - {"messages", "tools"}

# Ways in which a client asks for reasoning that is billed and may not be shown: where in a request, and the value that asks for
# it, or in HIDING_UNLESS the only one that doesn't. (OpenRouter, "Reasoning Tokens"; OpenAI, "Reasoning models": never shown;
# Groq, "Reasoning"; Anthropic, "OpenAI SDK compatibility" and "Extended thinking"; Gemini API, "OpenAI compatibility".)
HIDING: Final[tuple[tuple[tuple[str, ...], Any], ...]] = (
    (("reasoning", "exclude"), True),
    (("reasoning", "enabled"), True),
    (("include_reasoning",), False),
    (("reasoning_format",), "hidden"),
)
HIDING_UNLESS: Final[tuple[tuple[tuple[str, ...], Any], ...]] = (
    (("reasoning", "effort"), "none"),
    (("reasoning", "max_tokens"), 0),
    (("reasoning_effort",), "none"),
    (("thinking", "type"), "disabled"),
    (("thinking_config",), {}),
    (("google", "thinking_config"), {}),
    (("extra_body", "google", "thinking_config"), {}),
)
HIDING_MEMBERS: Final = frozenset(path[0] for path, _ in HIDING + HIDING_UNLESS)

# What to say of the members that take a choice of words.
ALLOWED: Final = {"tool_choice": "none, auto, required or an object", "transforms": "middle-out"}

DECODERS: Final = {name: Decoder(kind | None).decode for name, kind in FIELDS.items()}
