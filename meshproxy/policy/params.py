"""Request parameters that a key or a template brings: which there may be, within the bounds of a request's own, and who wins."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from meshproxy.errors import Detail, Fault
from meshproxy.wire.chat import decode_chat
from meshproxy.wire.fields import CAPS

# What shapes an answer and nothing else. Who asks, what is asked, how it is delivered and whether the provider keeps it
# (`user`, `messages`, `model`, `stream`, `store`, `metadata`, ...) is the request's own to say.
ALLOWED: Final = frozenset(
    {
        "audio",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_p",
        "modalities",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "provider",
        "reasoning",
        "reasoning_effort",
        "repetition_penalty",
        "response_format",
        "seed",
        "service_tier",
        "stop",
        "temperature",
        "tool_choice",
        "tools",
        "top_a",
        "top_k",
        "top_logprobs",
        "top_p",
        "verbosity",
    }
)

_NONE: Final[Mapping[str, bytes]] = MappingProxyType({})
_ANY_MESSAGES: Final = [{"role": "user"}]


def check_params(params: Mapping[str, Any], loc: tuple[str, ...]) -> Iterator[Detail]:
    """What is wrong with params that stand at `loc`: names that none may have, and values that no request may have."""
    for name in params:
        if name not in ALLOWED:
            yield Detail("extra_forbidden", (*loc, name[:64]), "Not a request parameter that can be stored")
    known = {name: value for name, value in params.items() if name in ALLOWED}
    try:
        decode_chat(msgspec.json.encode({"messages": _ANY_MESSAGES, **known}))
    except Fault as fault:
        for detail in fault.problem.details:
            yield Detail(detail.type, (*loc, *detail.loc[1:]), detail.msg)


def merge_params(key: Mapping[str, Any], template: Mapping[str, Any] | None) -> Mapping[str, bytes]:
    """The params of a key over those of a template, each value as JSON; of the two names of the output cap one is enough."""
    if not template:
        return _encoded(key) if key else _NONE
    capped = any(name in key for name in CAPS)
    return _encoded({**{name: value for name, value in template.items() if not (capped and name in CAPS)}, **key})


def _encoded(params: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: msgspec.json.encode(value) for name, value in params.items() if value is not None}
