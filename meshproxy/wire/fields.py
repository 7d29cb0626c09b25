"""What each member of a chat completion request may be: its type and its bounds, which are OpenAI's
("Create chat completion", API reference) and ours.
"""

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Raw, Struct
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
    "max_tokens": _Cap,
    "messages": list[_Message],
    "model": _Name,
    "models": Annotated[list[_Name], Meta(max_length=MAX_MODELS)],
    "n": Annotated[int, Meta(ge=1, le=128)],
    "presence_penalty": _Penalty,
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "service_tier": _Label,
    "session_id": _Label,
    "stop": str | list[str],
    "stream": bool,
    "stream_options": _StreamOptions,
    "temperature": Annotated[float, Meta(ge=0, le=2)],
    "template": _Name,
    "tool_choice": Literal["none", "auto", "required"] | _Object,
    "tools": list[_Object],
    "top_p": Annotated[float, Meta(ge=0, le=1)],
    "transforms": list[Literal["middle-out"]],
    "user": _Label,
    "variables": dict[str, str],
}

# What to say of the members that take a choice of words.
ALLOWED: Final = {"tool_choice": "none, auto, required or an object", "transforms": "middle-out"}

DECODERS: Final = {name: Decoder(kind | None).decode for name, kind in FIELDS.items()}
