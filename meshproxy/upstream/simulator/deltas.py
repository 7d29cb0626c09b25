"""One choice, piece by piece: the `delta` objects of its chunks."""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from meshproxy.upstream.simulator.replies import Choice
from meshproxy.upstream.simulator.tools import Call

encode = msgspec.json.encode


class Delta(NamedTuple):
    """`json`: the delta object. `step`: the tokens of its choice before it; `tokens`: its own; `text`: the token itself."""

    step: int
    tokens: int
    choice: int
    json: bytes
    text: str


def opening_of(choice: Choice) -> bytes:
    """The first delta, which says whose turn it is."""
    content = None if choice.calls or choice.thoughts else ""
    return encode({"role": "assistant", "content": content, "refusal": None})


def deltas_of(choice: Choice) -> Iterator[Delta]:
    """Thoughts, content, calls: a token each; a call's name comes before its arguments and is not counted."""
    step = 0
    for name, tokens in ((b"reasoning_content", choice.thoughts), (b"content", choice.content)):
        for token in tokens:
            yield Delta(step, 1, choice.index, b'{"%b":%b}' % (name, encode(token)), token)
            step += 1
    for position, call in enumerate(choice.calls):
        yield Delta(step, 0, choice.index, _naming(position, call), "")
        for token in call.arguments:
            yield Delta(step, 1, choice.index, _arguing(position, token), token)
            step += 1


def _naming(position: int, call: Call) -> bytes:
    function = {"name": call.name, "arguments": ""}
    return encode({"tool_calls": [{"index": position, "id": call.id, "type": "function", "function": function}]})


def _arguing(position: int, token: str) -> bytes:
    return b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (position, encode(token))
