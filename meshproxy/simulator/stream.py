"""A reply as server-sent events, in OpenAI's chunk format or as a dialect and the requested faults change it."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import chain, islice
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from meshproxy.simulator.answer import Choice, ComposedReply, Token
from meshproxy.simulator.behaviour import Behaviour
from meshproxy.simulator.dialects import PADDING, Dialect, Report, fill, set_at
from meshproxy.simulator.request import CompletionRequest

DONE = b"data: [DONE]\n\n"

# OpenRouter's error, with status 200, for a provider that failed while it was answering.
PROVIDER_ERROR = {"error": {"code": 502, "message": "Provider disconnected unexpectedly"}}

Json = dict[str, Any]
When = Literal["token", "finish", "own"]

encode = msgspec.json.encode


class Event(NamedTuple):
    """Bytes to send.

    `step`: the event is due this many tokens after the first one. `tokens`: the tokens that it contains.
    """

    step: int
    tokens: int
    payload: bytes


class EventStream:
    """The whole stream of one reply, from the roles to [DONE]."""

    def __init__(self, reply: ComposedReply, request: CompletionRequest, behaviour: Behaviour) -> None:
        self._reply = reply
        self._dialect = reply.dialect
        self._common = _common(reply)
        self._logprobs = request.logprobs
        self._reports = _reports(reply.dialect, request, behaviour)
        # whether chunks without a report have `"usage": null`
        self._null_usage = any(report.on_request and report.path == ("usage",) for report in self._reports)
        self._text_so_far: dict[int, str] = {}
        self._padded = 0

    def __iter__(self) -> Iterator[Event]:
        choices, generated = self._reply.choices, 0
        preamble = self._dialect.preamble[0].encode()
        for event in self._dialect.first:
            yield Event(0, 0, preamble + b"data: %b\n\n" % encode(event))
            preamble = b""
        for choice in choices:
            yield Event(0, 0, preamble + self._chunk([_choice(choice.index, _opening(choice))], generated))
            preamble = b""
        for step, shown, made, choice_json in merge(*map(self._tokens, choices), key=itemgetter(0)):
            generated += made
            if choice_json is not None:
                yield Event(
                    step, shown, self._chunk([choice_json], generated, extra=self._dialect.event if shown else {})
                )
        step = max(self._reply.steps - 1, 0)
        for choice in choices:
            finish = _choice(choice.index, self._dialect.finish_delta, finish=choice.finish)
            when: When = "finish" if choice is choices[-1] else "token"
            yield Event(step, 0, self._chunk([finish], generated, when, extra=self._dialect.finish_event))
        if any(report.when == "own" for report in self._reports):
            yield Event(step, 0, self._chunk([], generated, "own"))
        yield Event(step, 0, DONE)

    def _tokens(self, choice: Choice) -> Iterator[tuple[int, int, int, Json | None]]:
        """Yield the deltas of a choice.

        For each: how many tokens came before, how many are shown, how many are generated, and the choice in a chunk.

        The choice is None for thoughts that aren't shown. A call's name comes before its arguments, and is not counted.
        """
        named_calls = 0
        for step, made, kind, text in _grouped(choice.tokens, self._dialect.tokens_per_event):
            if kind == "reasoning_content" and not self._dialect.shows_reasoning:
                yield step, 0, made, None
                continue
            if kind == named_calls and named_calls < len(choice.calls):
                identity, name = choice.calls[named_calls]
                function = {"name": name, "arguments": ""}
                call = {"index": named_calls, "id": identity, "type": "function", "function": function}
                yield step, 0, 0, _choice(choice.index, {"tool_calls": [call]})
                named_calls += 1
            logprobs = logprobs_for([text]) if self._logprobs else None
            delta = {**self._dialect.delta, **self._delta(choice, kind, text)}
            extra = fill(self._dialect.choice, {"so_far": self._text_so_far.get(choice.index, "")})
            yield step, made, made, {**_choice(choice.index, delta, logprobs=logprobs), **extra}

    def _delta(self, choice: Choice, kind: str | int, text: str) -> Json:
        if kind == "content":
            self._text_so_far[choice.index] = self._text_so_far.get(choice.index, "") + text
            return {"content": text}
        if kind == "reasoning_content":
            thought: Json = fill(self._dialect.reasoning, {"text": text})
            return thought
        return {"tool_calls": [{"index": kind, "function": {"arguments": text}}]}

    def _chunk(self, choices: list[Json], generated: int, when: When = "token", *, extra: Json | None = None) -> bytes:
        """Return an event with the usage reports that are due in it; others have a null usage if `_null_usage` is set."""
        chunk = {**self._common, "choices": choices}
        if self._null_usage:
            chunk["usage"] = None
        for report in self._reports:
            if report.when in {when, "each"}:
                set_at(chunk, report.path, self._reply.usage(generated))
        if extra:
            self._padded += 1
            chunk |= fill(extra, {"padding": PADDING[: 1 + self._padded * 7 % 16]})
        return b"data: %b\n\n" % encode(chunk)


def _reports(dialect: Dialect, request: CompletionRequest, behaviour: Behaviour) -> list[Report]:
    """Return the usage reports that this stream contains."""
    reports = [report for report in dialect.reports if request.include_usage or not report.on_request]
    if "no-usage" in behaviour.traits:
        reports = []
    if "usage-early" in behaviour.traits:
        reports = [replace(report, when="finish") for report in reports]
    if "usage-every" in behaviour.traits:
        reports.append(Report(when="each", on_request=False))
    return reports


def _grouped(tokens: list[Token], size: int) -> Iterator[tuple[int, int, str | int, str]]:
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
    return b"data: %b\n\n" % encode(_common(reply) | {"choices": [choice]} | PROVIDER_ERROR)


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


def completion(reply: ComposedReply, request: CompletionRequest, behaviour: Behaviour) -> bytes:
    """Return the whole body."""
    body: Json = {
        "id": reply.id,
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [_whole_choice(choice, reply.dialect, logprobs=request.logprobs) for choice in reply.choices],
    }
    if "no-usage" not in behaviour.traits:
        body["usage"] = reply.usage(reply.tokens)
    return reply.dialect.preamble[1].encode() + encode(body | reply.dialect.common | reply.dialect.whole)


def logprobs_for(tokens: Sequence[str]) -> Json:
    """Return OpenAI's logprobs object, with a plausible and constant likelihood."""
    likely = {"logprob": -0.105, "top_logprobs": []}
    content = [{"token": token, "bytes": list(token.encode())} | likely for token in tokens]
    return {"content": content, "refusal": None}


def _whole_choice(choice: Choice, dialect: Dialect, *, logprobs: bool) -> Json:
    content = None if choice.calls else choice.text("content")
    message: Json = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    reasoning = choice.text("reasoning_content")
    if reasoning and dialect.shows_reasoning:
        message = {**fill(dialect.reasoning, {"text": reasoning}), **message}
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
        "logprobs": logprobs_for([token.text for token in choice.tokens]) if logprobs and content else None,
        "finish_reason": choice.finish,
    }


# Faults that end a stream before its last event.
CUTTING_FAULTS = (
    "stall",
    "stall-mid",
    "die-mid-stream",
    "reset-mid-stream",
    "error-mid-stream",
    "end-early",
    "bad-chunk",
)
COMMENT_EVERY = 5  # events between two ": OPENROUTER PROCESSING" comments


def with_faults(events: Iterable[Event], behaviour: Behaviour, last_event: bytes) -> Iterable[Event]:
    """Return the events as the behaviour's faults change them, without those after a cut.

    `last_event`: the event with which error-mid-stream ends.
    """
    traits, options = behaviour.traits, behaviour.options
    if "huge-event" in traits:
        events = _with_huge_event(events, options.bytes)
    cutting = behaviour.one_of(CUTTING_FAULTS)
    if cutting:
        events = islice(events, 0 if cutting == "stall" else options.after)
    if cutting == "error-mid-stream":
        events = chain(events, [Event(options.after, 0, last_event)])
    for trait, change in _CHANGES.items():
        if trait in traits:
            events = _changed(events, change)
    if "split" in traits:
        events = _across_chunks(events)
    return _compressed(events) if "gzip" in traits else events


def _with_huge_event(events: Iterable[Event], size: int) -> Iterator[Event]:
    """Grow the second token's chunk to `size` bytes by an unknown member."""
    tokens = 0
    for event in events:
        tokens += event.tokens
        if event.tokens and tokens == 2:
            padding = b',"padding":' + encode("x" * max(size - len(event.payload) - 13, 0))
            yield event._replace(payload=event.payload.removesuffix(b"}\n\n") + padding + b"}\n\n")
        else:
            yield event


def _changed(events: Iterable[Event], change: Callable[[int, bytes], bytes]) -> Iterator[Event]:
    return (event._replace(payload=change(number, event.payload)) for number, event in enumerate(events))


def _commented(number: int, payload: bytes) -> bytes:
    return payload if number % COMMENT_EVERY else b": OPENROUTER PROCESSING\n\n" + payload


def _identified(number: int, payload: bytes) -> bytes:
    """Add ids and event names to every event, and three fields without data at the start."""
    bare = b"" if number else b"retry: 3000\n\nevent: ping\n\nid: start\n\n"
    return b"%bevent: message\nid: %d\n%b" % (bare, number, payload)


def _with_crlf(_number: int, payload: bytes) -> bytes:
    return payload.replace(b"\n", b"\r\n")


def _with_bom(number: int, payload: bytes) -> bytes:
    return payload if number else b"\xef\xbb\xbf" + payload


_CHANGES = {"comments": _commented, "ids": _identified, "crlf": _with_crlf, "bom": _with_bom}


def _across_chunks(events: Iterable[Event]) -> Iterator[Event]:
    """Send the last byte of each event with the next one, so that no chunk ends where an event ends."""
    held, step = b"", 0
    for step, tokens, payload in events:
        whole = held + payload
        yield Event(step, tokens, whole[:-1])
        held = whole[-1:]
    yield Event(step, 0, held)


def _compressed(events: Iterable[Event]) -> Iterator[Event]:
    """Compress the events as one gzip stream, flushed after each event so that none is delayed."""
    press = zlib.compressobj(wbits=31)
    step = 0
    for step, tokens, payload in events:
        yield Event(step, tokens, press.compress(payload) + press.flush(zlib.Z_SYNC_FLUSH))
    yield Event(step, 0, press.flush())
