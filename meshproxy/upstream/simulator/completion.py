"""A reply as one JSON object, in OpenAI's shape of an unstreamed chat completion."""

from collections.abc import Sequence
from typing import Any

import msgspec

from meshproxy.upstream.simulator.ask import Ask
from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.dialects import Dialect, fill
from meshproxy.upstream.simulator.replies import Choice, Reply

# How OpenRouter tells, under a 200, that a provider broke while it was answering.
BROKEN = {"error": {"code": 502, "message": "Provider disconnected unexpectedly"}}


def completion(reply: Reply, ask: Ask, behaviour: Behaviour) -> bytes:
    """The whole body."""
    told: dict[str, Any] = {
        "id": reply.id,
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [_choice(choice, reply.dialect, logprobs=ask.logprobs) for choice in reply.choices],
    }
    if "no-usage" not in behaviour.traits:
        told["usage"] = reply.usage(reply.tokens)
    whole = msgspec.json.encode(told | reply.dialect.common | reply.dialect.whole)
    return reply.dialect.lead[1].encode() + whole


def logprobs_of(tokens: Sequence[str]) -> dict[str, Any]:
    """OpenAI's logprobs object, with a likelihood that is plausible and always the same."""
    likely = {"logprob": -0.105, "top_logprobs": []}
    content = [{"token": token, "bytes": list(token.encode())} | likely for token in tokens]
    return {"content": content, "refusal": None}


def _choice(choice: Choice, dialect: Dialect, *, logprobs: bool) -> dict[str, Any]:
    content = None if choice.calls else choice.text("content")
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    thoughts = choice.text("reasoning_content")
    if thoughts and dialect.shows:
        message = {**fill(dialect.thoughts, {"text": thoughts}), **message}
    if choice.calls:
        arguments = map(choice.text, range(len(choice.calls)))
        message["tool_calls"] = [
            {"id": identity, "type": "function", "function": {"name": name, "arguments": text}}
            for (identity, name), text in zip(choice.calls, arguments, strict=True)
            if text
        ]
    return {
        **{name: fill(member, {"so_far": content}) for name, member in dialect.choice.items()},
        "index": choice.index,
        "message": message,
        "logprobs": logprobs_of([token.text for token in choice.tokens]) if logprobs and content else None,
        "finish_reason": choice.finish,
    }
