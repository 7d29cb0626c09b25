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
from meshproxy.upstream.simulator.completion import BROKEN, logprobs_of
from meshproxy.upstream.simulator.replies import FINGERPRINT, Call, Choice, Reply

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
        self._logprobs = ask.logprobs
        self._head = _head(reply)
        self._tells = ask.include_usage and "no-usage" not in behaviour.traits
        self._every = "usage-every" in behaviour.traits
        self._early = self._tells and "usage-early" in behaviour.traits

    def __iter__(self) -> Iterator[Event]:
        choices, spoken = self._reply.choices, 0
        for choice in choices:
            yield Event(0, 0, self._chunk(_choice(choice.index, _opening(choice)), spoken))
        for step, tokens, told in merge(*map(self._deltas, choices), key=itemgetter(0)):
            spoken += tokens
            yield Event(step, tokens, self._chunk(told, spoken))
        step = max(self._reply.steps - 1, 0)
        for choice in choices:
            finish = _choice(choice.index, b"{}", finish=encode(choice.finish))
            yield Event(step, 0, self._chunk(finish, spoken, tell=self._early and choice is choices[-1]))
        if self._tells and not self._early:
            yield Event(step, 0, self._chunk(b"", spoken, tell=True))
        yield Event(step, 0, DONE)

    def _deltas(self, choice: Choice) -> Iterator[tuple[int, int, bytes]]:
        """Thoughts, content, calls: a token each; a call's name comes before its arguments and is not counted. Yields the
        tokens of the choice before it, its own, and the chunk's choice.
        """
        step = 0
        for name, tokens in ((b"reasoning_content", choice.thoughts), (b"content", choice.content)):
            for token in tokens:
                yield step, 1, self._token(choice.index, token, b'{"%b":%b}' % (name, encode(token)))
                step += 1
        for position, call in enumerate(choice.calls):
            yield step, 0, _choice(choice.index, _naming(position, call))
            for token in call.arguments:
                delta = b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (position, encode(token))
                yield step, 1, self._token(choice.index, token, delta)
                step += 1

    def _token(self, index: int, token: str, delta: bytes) -> bytes:
        return _choice(index, delta, logprobs=encode(logprobs_of([token])) if self._logprobs else b"null")

    def _chunk(self, choices: bytes, spoken: int, *, tell: bool = False) -> bytes:
        """`tell`: this is the chunk for the usage, which is null in the others, or absent if it isn't told at all."""
        usage = b',"usage":null' if self._tells else b""
        if tell or self._every:
            usage = b',"usage":' + encode(self._reply.usage(spoken))
        return b'%b,"choices":[%b]%b}\n\n' % (self._head, choices, usage)


def error_event(reply: Reply) -> bytes:
    """How OpenRouter tells that a stream broke after it had begun."""
    choices = b'{"index":0,"delta":{"content":""},"finish_reason":"error"}'
    return b'%b,"choices":[%b],"error":%b}\n\n' % (_head(reply), choices, encode(BROKEN["error"]))


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


def _opening(choice: Choice) -> bytes:
    """The first delta, which says whose turn it is."""
    content = None if choice.calls or choice.thoughts else ""
    return encode({"role": "assistant", "content": content, "refusal": None})


def _naming(position: int, call: Call) -> bytes:
    function = {"name": call.name, "arguments": ""}
    return encode({"tool_calls": [{"index": position, "id": call.id, "type": "function", "function": function}]})
