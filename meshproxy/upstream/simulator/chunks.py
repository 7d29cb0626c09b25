"""A reply as server-sent events, in OpenAI's exact chunk shapes.

What all chunks of a stream have in common is encoded once; a token costs its own few bytes and one format.
"""

from collections.abc import Iterator
from heapq import merge
from operator import itemgetter
from typing import NamedTuple

import msgspec

from meshproxy.upstream.simulator.ask import Ask
from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.completion import broken_completion, logprobs_of
from meshproxy.upstream.simulator.deltas import Delta, deltas_of, opening_of
from meshproxy.upstream.simulator.replies import FINGERPRINT, Reply
from meshproxy.upstream.simulator.usage import reported

DONE = b"data: [DONE]\n\n"

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
        self._behaviour = behaviour
        self._logprobs = ask.logprobs
        self._head = _head(reply)
        self._tells = ask.include_usage and "no-usage" not in behaviour.traits
        self._every = "usage-every" in behaviour.traits
        self._early = self._tells and "usage-early" in behaviour.traits

    def __iter__(self) -> Iterator[Event]:
        for choice in self._reply.choices:
            yield Event(0, 0, self._chunk(_choice(choice.index, opening_of(choice)), self._usage_so_far(0)))
        spoken = 0
        for delta in merge(*map(deltas_of, self._reply.choices), key=itemgetter(0)):
            spoken += delta.tokens
            yield Event(delta.step, delta.tokens, self._chunk(self._told(delta), self._usage_so_far(spoken)))
        step = max(self._reply.steps - 1, 0)
        for payload in self._ends():
            yield Event(step, 0, payload)

    def _told(self, delta: Delta) -> bytes:
        if not (self._logprobs and delta.tokens):
            return _choice(delta.choice, delta.json)
        return _choice(delta.choice, delta.json, logprobs=encode(logprobs_of([delta.text])))

    def _ends(self) -> Iterator[bytes]:
        """The finish reasons, the usage where it is told, and [DONE]."""
        last = self._reply.choices[-1]
        for choice in self._reply.choices:
            usage = self._usage() if self._early and choice is last else self._usage_so_far(self._reply.tokens)
            yield self._chunk(_choice(choice.index, b"{}", finish=encode(choice.finish)), usage)
        if self._tells and not self._early:
            yield self._chunk(b"", self._usage())
        yield DONE

    def _chunk(self, choices: bytes, usage: bytes) -> bytes:
        return b'%b,"choices":[%b]%b}\n\n' % (self._head, choices, usage)

    def _usage(self) -> bytes:
        return b',"usage":' + encode(reported(self._reply.usage(), self._behaviour))

    def _usage_so_far(self, spoken: int) -> bytes:
        """The `usage` member of a chunk that isn't the one for usage."""
        if self._every:
            return b',"usage":' + encode(reported(self._reply.usage(spoken), self._behaviour))
        return b',"usage":null' if self._tells else b""


def error_event(reply: Reply) -> bytes:
    """How OpenRouter tells that a stream broke after it had begun."""
    choices = b'{"index":0,"delta":{"content":""},"finish_reason":"error"}'
    return b'%b,"choices":[%b],%b\n\n' % (_head(reply), choices, broken_completion().removeprefix(b"{"))


def _head(reply: Reply) -> bytes:
    common = {
        "id": reply.id,
        "object": "chat.completion.chunk",
        "created": reply.created,
        "model": reply.model,
        "service_tier": "default",
        "system_fingerprint": FINGERPRINT,
    }
    return b"data: " + encode(common)[:-1]


def _choice(index: int, delta: bytes, *, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
    return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, finish)
