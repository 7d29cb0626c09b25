"""Streams made worse: each trait changes the events on their way to the socket."""

import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice

import msgspec

from meshproxy.upstream.simulator.behaviour import Behaviour, Options
from meshproxy.upstream.simulator.chunks import Event

CUTTING = (
    "stall",
    "stall-mid",
    "die-mid-stream",
    "reset-mid-stream",
    "error-mid-stream",
    "end-early",
    "bad-chunk",
)
COMMENT_EVERY = 5  # events between two ": OPENROUTER PROCESSING" comments

Events = Iterator[Event]


def mangled(events: Events, behaviour: Behaviour, last_words: bytes) -> Events:
    """The events as they will be sent, those after a cut left out. `last_words`: the event that error-mid-stream ends with."""
    cutting = behaviour.one_of(CUTTING)
    if "huge-event" in behaviour.traits:
        events = _with_huge_event(events, behaviour.options)
    if cutting:
        events = islice(events, 0 if cutting == "stall" else behaviour.options.after)
    if cutting == "error-mid-stream":
        events = chain(events, [Event(behaviour.options.after, 0, last_words)])
    for trait, mangle in _MANGLES.items():
        if trait in behaviour.traits:
            events = mangle(events)
    return events


def zipped(events: Events) -> Events:
    """One gzip stream, flushed at every event so that none has to wait for the next."""
    press = zlib.compressobj(wbits=31)
    step = 0
    for step, tokens, payload in events:
        yield Event(step, tokens, press.compress(payload) + press.flush(zlib.Z_SYNC_FLUSH))
    yield Event(step, 0, press.flush())


def _with_huge_event(events: Events, options: Options) -> Events:
    """The second token's chunk grows to `bytes` bytes by a member that no client asked for."""
    tokens = 0
    for event in events:
        tokens += event.tokens
        if event.tokens and tokens == 2:
            padding = b',"padding":' + msgspec.json.encode("x" * max(options.bytes - len(event.payload) - 13, 0))
            yield event._replace(payload=event.payload.removesuffix(b"}\n\n") + padding + b"}\n\n")
        else:
            yield event


def _commented(events: Events) -> Events:
    for number, event in enumerate(events):
        comment = b": OPENROUTER PROCESSING\n\n" if number % COMMENT_EVERY == 0 else b""
        yield event._replace(payload=comment + event.payload)


def _identified(events: Events) -> Events:
    """Names and numbers on every event, and at the start three fields with no data beside them."""
    bare = b"retry: 3000\n\nevent: ping\n\nid: start\n\n"
    for number, event in enumerate(events):
        named = b"event: message\nid: %d\n" % number + event.payload
        yield event._replace(payload=named if number else bare + named)


def _with_crlf(events: Events) -> Events:
    return (event._replace(payload=event.payload.replace(b"\n", b"\r\n")) for event in events)


def _with_bom(events: Events) -> Events:
    for number, event in enumerate(events):
        yield event if number else event._replace(payload=b"\xef\xbb\xbf" + event.payload)


def _across_chunks(events: Events) -> Events:
    """The last byte of each event travels with the next one: no chunk ends where an event does."""
    held, step = b"", 0
    for step, tokens, payload in events:
        whole = held + payload
        yield Event(step, tokens, whole[:-1])
        held = whole[-1:]
    yield Event(step, 0, held)


_MANGLES: dict[str, Callable[[Events], Events]] = {
    "comments": _commented,
    "ids": _identified,
    "crlf": _with_crlf,
    "bom": _with_bom,
    "split": _across_chunks,
    "gzip": zipped,
}
