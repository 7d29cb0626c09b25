"""A reply as server-sent events, in OpenAI's chunk format or as a dialect changes it."""

from collections.abc import Iterator, Sequence
from heapq import merge
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from meshproxy.simulator.answer import Choice, ComposedReply, Token
from meshproxy.simulator.behaviour import Behaviour
from meshproxy.simulator.dialects import PADDING, Dialect, Report, fill, put
from meshproxy.simulator.request import CompletionRequest

DONE = b"data: [DONE]\n\n"

# OpenRouter's error, with status 200, for a provider that failed while it was answering.
BROKEN = {"error": {"code": 502, "message": "Provider disconnected unexpectedly"}}

Json = dict[str, Any]
When = Literal["token", "finish", "own"]

encode = msgspec.json.encode


class Event(NamedTuple):
    """Bytes to send. `step`: the event is due this many tokens after the first one; `tokens`: the tokens that it
    contains.
    """

    step: int
    tokens: int
    payload: bytes


class EventStream:
    """The whole stream of one reply, from the roles to [DONE]."""

    def __init__(self, reply: ComposedReply, ask: CompletionRequest, behaviour: Behaviour) -> None:
        self._reply = reply
        self._dialect = reply.dialect
        self._common = _common(reply)
        self._logprobs = ask.logprobs
        self._reports = _reports(reply.dialect, ask, behaviour)
        self._null = any(report.asked and report.path == ("usage",) for report in self._reports)  # null in other chunks
        self._so_far: dict[int, str] = {}
        self._padded = 0

    def __iter__(self) -> Iterator[Event]:
        choices, spoken = self._reply.choices, 0
        lead = self._dialect.lead[0].encode()
        for event in self._dialect.first:
            yield Event(0, 0, lead + b"data: %b\n\n" % encode(event))
            lead = b""
        for choice in choices:
            yield Event(0, 0, lead + self._chunk([_choice(choice.index, _opening(choice))], spoken))
            lead = b""
        for step, shown, made, told in merge(*map(self._tokens, choices), key=itemgetter(0)):
            spoken += made
            if told is not None:
                yield Event(step, shown, self._chunk([told], spoken, extra=self._dialect.event if shown else {}))
        step = max(self._reply.steps - 1, 0)
        for choice in choices:
            finish = _choice(choice.index, self._dialect.finish_delta, finish=choice.finish)
            when: When = "finish" if choice is choices[-1] else "token"
            yield Event(step, 0, self._chunk([finish], spoken, when, extra=self._dialect.finish_event))
        if any(report.when == "own" for report in self._reports):
            yield Event(step, 0, self._chunk([], spoken, "own"))
        yield Event(step, 0, DONE)

    def _tokens(self, choice: Choice) -> Iterator[tuple[int, int, int, Json | None]]:
        """Yield for each token: how many tokens came before, how many are shown, how many are generated, and its choice
        in a chunk.

        The choice is None for thoughts that aren't shown. A call's name comes before its arguments, and is not counted.
        """
        named = 0
        for step, made, kind, text in _batches(choice.tokens, self._dialect.batch):
            if kind == "reasoning_content" and not self._dialect.shows:
                yield step, 0, made, None
                continue
            if kind == named and named < len(choice.calls):
                identity, name = choice.calls[named]
                function = {"name": name, "arguments": ""}
                call = {"index": named, "id": identity, "type": "function", "function": function}
                yield step, 0, 0, _choice(choice.index, {"tool_calls": [call]})
                named += 1
            logprobs = logprobs_of([text]) if self._logprobs else None
            delta = {**self._dialect.delta, **self._delta(choice, kind, text)}
            extra = fill(self._dialect.choice, {"so_far": self._so_far.get(choice.index, "")})
            yield step, made, made, {**_choice(choice.index, delta, logprobs=logprobs), **extra}

    def _delta(self, choice: Choice, kind: str | int, text: str) -> Json:
        if kind == "content":
            self._so_far[choice.index] = self._so_far.get(choice.index, "") + text
            return {"content": text}
        if kind == "reasoning_content":
            thought: Json = fill(self._dialect.thoughts, {"text": text})
            return thought
        return {"tool_calls": [{"index": kind, "function": {"arguments": text}}]}

    def _chunk(self, choices: list[Json], spoken: int, when: When = "token", *, extra: Json | None = None) -> bytes:
        """Return an event with the usage reports that are due in it; others have a null usage if `_null` is set."""
        chunk = {**self._common, "choices": choices}
        if self._null:
            chunk["usage"] = None
        for report in self._reports:
            if report.when in {when, "each"}:
                put(chunk, report.path, self._reply.usage(spoken))
        if extra:
            self._padded += 1
            chunk |= fill(extra, {"padding": PADDING[: 1 + self._padded * 7 % 16]})
        return b"data: %b\n\n" % encode(chunk)


def _reports(dialect: Dialect, ask: CompletionRequest, behaviour: Behaviour) -> list[Report]:
    """Return the usage reports that this stream contains."""
    told = [report for report in dialect.reports if ask.include_usage or not report.asked]
    if "no-usage" in behaviour.traits:
        told = []
    if "usage-early" in behaviour.traits:
        told = [replace(report, when="finish") for report in told]
    if "usage-every" in behaviour.traits:
        told.append(Report(when="each", asked=False))
    return told


def _batches(tokens: list[Token], size: int) -> Iterator[tuple[int, int, str | int, str]]:
    """Yield tokens in groups of one kind: the index of the last, their number, the kind, the text."""
    start = 0
    while start < len(tokens):
        kind, end = tokens[start].kind, start + 1
        while end < len(tokens) and end - start < size and tokens[end].kind == kind:
            end += 1
        yield end - 1, end - start, kind, "".join(token.text for token in tokens[start:end])
        start = end


def error_event(reply: ComposedReply) -> bytes:
    """Return OpenRouter's error event for a stream that broke after it had begun."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    return b"data: %b\n\n" % encode(_common(reply) | {"choices": [choice]} | BROKEN)


def _common(reply: ComposedReply) -> Json:
    return {
        "id": reply.id,
        "object": "chat.completion.chunk",
        "created": reply.created,
        "model": reply.model,
        **reply.dialect.common,
    }


def _choice(index: int, delta: Json, *, logprobs: Json | None = None, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _opening(choice: Choice) -> Json:
    """Return the first delta, which has the role."""
    begins = choice.tokens[0].kind if choice.tokens else "content"
    return {"role": "assistant", "content": "" if begins == "content" else None, "refusal": None}


def completion(reply: ComposedReply, ask: CompletionRequest, behaviour: Behaviour) -> bytes:
    """Return the whole body."""
    told: Json = {
        "id": reply.id,
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [_whole_choice(choice, reply.dialect, logprobs=ask.logprobs) for choice in reply.choices],
    }
    if "no-usage" not in behaviour.traits:
        told["usage"] = reply.usage(reply.tokens)
    whole = encode(told | reply.dialect.common | reply.dialect.whole)
    return reply.dialect.lead[1].encode() + whole


def logprobs_of(tokens: Sequence[str]) -> Json:
    """Return OpenAI's logprobs object, with a plausible and constant likelihood."""
    likely = {"logprob": -0.105, "top_logprobs": []}
    content = [{"token": token, "bytes": list(token.encode())} | likely for token in tokens]
    return {"content": content, "refusal": None}


def _whole_choice(choice: Choice, dialect: Dialect, *, logprobs: bool) -> Json:
    content = None if choice.calls else choice.text("content")
    message: Json = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
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
