"""What a provider says a request used, and the right to disbelieve it."""

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw, Struct
from msgspec.json import Decoder

from meshproxy.errors import UpstreamFault, upstream_error


class Usage(Struct, frozen=True):
    """Tokens of one request. `cached`, `cache_write` and `audio_prompt` are parts of `prompt`; `reasoning` and
    `audio_completion` are parts of `completion` (OpenAI, "The usage object" of the chat completion reference).
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0
    audio_prompt: int = 0
    audio_completion: int = 0

    @property
    def total(self) -> int:
        """Prompt and completion together."""
        return self.prompt + self.completion


class Reply(Struct, frozen=True):
    """What the gateway reads of a whole (unary) answer. `error` is what some providers send with a 200 (OpenRouter)."""

    usage: Usage | None = None
    model: str | None = None
    error: Any = None


_Count = Annotated[int, Meta(ge=0, le=2**53)]


class _PromptDetails(Struct):
    cached_tokens: _Count | None = None
    cache_write_tokens: _Count | None = None
    audio_tokens: _Count | None = None


class _CompletionDetails(Struct):
    reasoning_tokens: _Count | None = None
    audio_tokens: _Count | None = None


class _Report(Struct):
    prompt_tokens: _Count
    completion_tokens: _Count
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


_REPORT: Final = Decoder(_Report | None)
_MEMBERS: Final = Decoder(dict[str, Raw])


def decode_usage(raw: bytes | Raw) -> Usage | None:
    """The usage in OpenAI's or OpenRouter's JSON object. None: there is none, or it can't be true: a count that is negative or
    no integer, or parts that are larger than their whole.
    """
    try:
        report = _REPORT.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return None
    if report is None:
        return None
    prompt = report.prompt_tokens_details or _PromptDetails()
    completion = report.completion_tokens_details or _CompletionDetails()
    usage = Usage(
        prompt=report.prompt_tokens,
        completion=report.completion_tokens,
        cached=prompt.cached_tokens or 0,
        cache_write=prompt.cache_write_tokens or 0,
        reasoning=completion.reasoning_tokens or 0,
        audio_prompt=prompt.audio_tokens or 0,
        audio_completion=completion.audio_tokens or 0,
    )
    return usage if _adds_up(usage) else None


def decode_reply(body: bytes) -> Reply:
    """Usage, model and error of a whole answer; UpstreamFault if it is no JSON object."""
    members = decode_members(body)
    if members is None:
        problem = upstream_error("The provider's answer is not a JSON object.", may_have_run=True)
        raise UpstreamFault(problem, safe_to_repeat=False)
    return Reply(
        usage=decode_usage(members["usage"]) if "usage" in members else None,
        model=decode_text(members.get("model")),
        error=decode_value(members.get("error")),
    )


def output_bytes(body: bytes) -> int:
    """How much text a whole answer's choices have, in bytes: what an estimate goes by where no usage was reported."""
    choices = decode_value((decode_members(body) or {}).get("choices"))
    values = [choice.get("message") for choice in choices or () if isinstance(choice, dict)]
    size = 0
    while values:  # no recursion: a provider may nest as deep as it likes
        value = values.pop()
        if isinstance(value, str):
            size += len(value.encode())
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
    return size


def decode_members(text: bytes | Raw) -> dict[str, Raw] | None:
    """The members of a provider's JSON object as their own bytes; None if it is anything else."""
    try:
        return _MEMBERS.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decode_value(raw: bytes | Raw | None) -> Any:
    """A provider's JSON value; None for what is none."""
    try:
        return None if raw is None else msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decode_text(raw: bytes | Raw | None) -> str | None:
    """A provider's JSON string; None for anything else."""
    value = decode_value(raw)
    return value if isinstance(value, str) else None


def _adds_up(usage: Usage) -> bool:
    """Whether the parts fit into their wholes. What was read from a cache wasn't written to it, and audio isn't reasoning;
    but audio may be cached.
    """
    return (
        usage.cached + usage.cache_write <= usage.prompt
        and usage.audio_prompt <= usage.prompt
        and usage.reasoning + usage.audio_completion <= usage.completion
    )
