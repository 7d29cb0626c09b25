"""A reply as server-sent events, in OpenAI's exact chunk shapes."""

from collections.abc import Iterator
from heapq import merge
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from meshproxy.upstream.simulator.ask import Ask
from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.completion import BROKEN, logprobs_of
from meshproxy.upstream.simulator.replies import FINGERPRINT, Choice, Reply

DONE = b"data: [DONE]\n\n"

Json = dict[str, Any]

encode = msgspec.json.encode


class Event(NamedTuple):
    """Bytes to send. `step`: due when so many tokens have followed the first one; `tokens`: how many it bears."""

    step: int
    tokens: int
    payload: bytes


class EventStream:
    """The whole stream of one reply, from the roles to [DONE]."""

    def __init__(self, reply: Reply, ask: Ask, behaviour: Behaviour) -> None:
        self._reply = reply
        self._common = _common(reply)
        self._logprobs = ask.logprobs
        self._tells = ask.include_usage and "no-usage" not in behaviour.traits
        self._every = "usage-every" in behaviour.traits
        self._early = self._tells and "usage-early" in behaviour.traits

    def __iter__(self) -> Iterator[Event]:
        choices, spoken = self._reply.choices, 0
        for choice in choices:
            yield Event(0, 0, self._chunk([_choice(choice.index, _opening(choice))], spoken))
        for step, tokens, told in merge(*map(self._tokens, choices), key=itemgetter(0)):
            spoken += tokens
            yield Event(step, tokens, self._chunk([told], spoken))
        step = max(self._reply.steps - 1, 0)
        for choice in choices:
            finish = _choice(choice.index, {}, finish=choice.finish)
            yield Event(step, 0, self._chunk([finish], spoken, tell=self._early and choice is choices[-1]))
        if self._tells and not self._early:
            yield Event(step, 0, self._chunk([], spoken, tell=True))
        yield Event(step, 0, DONE)

    def _tokens(self, choice: Choice) -> Iterator[tuple[int, int, Json]]:
        """How many tokens came before, how many this is, and a chunk's choice for it. Before a call's arguments comes its name,
        which is not counted.
        """
        named = 0
        for step, (kind, text) in enumerate(choice.tokens):
            if kind == named and named < len(choice.calls):
                identity, name = choice.calls[named]
                function = {"name": name, "arguments": ""}
                call = {"index": named, "id": identity, "type": "function", "function": function}
                yield step, 0, _choice(choice.index, {"tool_calls": [call]})
                named += 1
            delta: Json = {"content": text}
            if kind != "content":
                arguing = [{"index": kind, "function": {"arguments": text}}]
                delta = {kind: text} if isinstance(kind, str) else {"tool_calls": arguing}
            yield step, 1, _choice(choice.index, delta, logprobs=logprobs_of([text]) if self._logprobs else None)

    def _chunk(self, choices: list[Json], spoken: int, *, tell: bool = False) -> bytes:
        """`tell`: this is the chunk for the usage, which is null in the others, or absent if it isn't told at all."""
        chunk = {**self._common, "choices": choices}
        if tell or self._every:
            chunk["usage"] = self._reply.usage(spoken)
        elif self._tells:
            chunk["usage"] = None
        return b"data: %b\n\n" % encode(chunk)


def error_event(reply: Reply) -> bytes:
    """How OpenRouter tells that a stream broke after it had begun."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    return b"data: %b\n\n" % encode(_common(reply) | {"choices": [choice]} | BROKEN)


def _common(reply: Reply) -> Json:
    return {
        "id": reply.id,
        "object": "chat.completion.chunk",
        "created": reply.created,
        "model": reply.model,
        "service_tier": "default",
        "system_fingerprint": FINGERPRINT,
    }


def _choice(index: int, delta: Json, *, logprobs: Json | None = None, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _opening(choice: Choice) -> Json:
    """The first delta, which says whose turn it is."""
    begins = choice.tokens[0].kind if choice.tokens else "content"
    return {"role": "assistant", "content": "" if begins == "content" else None, "refusal": None}
