"""Answers that are no answers, and streams made worse: each trait changes the events on their way to the socket."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import msgspec

from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.chunks import Event
from meshproxy.upstream.simulator.dialects import Kind
from meshproxy.upstream.simulator.journal import Journal
from meshproxy.upstream.simulator.line import EVENT_STREAM, JSON, PAGE, Line
from meshproxy.upstream.simulator.refusals import on_demand

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
REFUSALS: dict[str, Kind] = {
    "error-context": "context",
    "error-filter": "filter",
    "error-quota": "quota",
    "error-key": "key",
}
OUTRIGHT = ("error-html", "refuse", "reset")  # OpenRouter would go on to its next model: nothing of an answer was seen
INSTEAD = ("error-html", "not-json", "empty", "redirect", "refuse", "reset", "stall-head")
BREAKING = (*CUTTING, "refuse", "reset", "stall-head")  # an answer that has no honest end
REDIRECTED = "/_sim/redirected"

HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\r\n"
NONSENSE = b"<<this is {not JSON"


def refuse_on_demand(behaviour: Behaviour, journal: Journal) -> None:
    """Raise the `Refusal` that was asked for: always, every Nth time, or the first N times."""
    numbers, retry_after_s = behaviour.numbers, behaviour.options.retry_after
    if refused := behaviour.one_of(REFUSALS):
        raise behaviour.dialect.refusal(REFUSALS[refused])
    if "error" in numbers:
        raise on_demand(numbers["error"], retry_after_s)
    if not numbers.keys() & {"flaky", "fail-first"}:
        return
    count = journal.count(behaviour.name)
    if "flaky" in numbers and count % numbers["flaky"] == 0:
        raise on_demand(500, retry_after_s)
    if count <= numbers.get("fail-first", 0):
        raise on_demand(503, retry_after_s)


async def misbehave(fault: str, line: Line, *, stream: bool) -> None:
    """One of `INSTEAD`."""
    kind = EVENT_STREAM if stream else JSON
    match fault:
        case "error-html":
            await line.answer(502, [PAGE], HTML)
        case "not-json":
            await line.answer(200, [kind], b"data: %b\n\n" % NONSENSE if stream else NONSENSE)
        case "empty":
            await line.answer(200, [kind], b"")
        case "redirect":
            await line.answer(302, [("location", REDIRECTED), PAGE], b"")
        case "refuse":
            line.close()
        case "reset":
            line.reset()
        case "stall-head":
            await line.silence()


def mangled(events: Iterable[Event], behaviour: Behaviour, last_words: bytes) -> Iterable[Event]:
    """The events as they will be sent, those after a cut left out. `last_words`: the event that error-mid-stream ends with."""
    traits, options = behaviour.traits, behaviour.options
    if "huge-event" in traits:
        events = _with_huge_event(events, options.bytes)
    cutting = behaviour.one_of(CUTTING)
    if cutting:
        events = islice(events, 0 if cutting == "stall" else options.after)
    if cutting == "error-mid-stream":
        events = chain(events, [Event(options.after, 0, last_words)])
    for trait, change in _CHANGES.items():
        if trait in traits:
            events = _changed(events, change)
    if "split" in traits:
        events = _across_chunks(events)
    return _zipped(events) if "gzip" in traits else events


def _with_huge_event(events: Iterable[Event], size: int) -> Iterator[Event]:
    """The second token's chunk grows to `size` bytes by a member that no client asked for."""
    tokens = 0
    for event in events:
        tokens += event.tokens
        if event.tokens and tokens == 2:
            padding = b',"padding":' + msgspec.json.encode("x" * max(size - len(event.payload) - 13, 0))
            yield event._replace(payload=event.payload.removesuffix(b"}\n\n") + padding + b"}\n\n")
        else:
            yield event


def _changed(events: Iterable[Event], change: Callable[[int, bytes], bytes]) -> Iterator[Event]:
    return (event._replace(payload=change(number, event.payload)) for number, event in enumerate(events))


def _commented(number: int, payload: bytes) -> bytes:
    return payload if number % COMMENT_EVERY else b": OPENROUTER PROCESSING\n\n" + payload


def _identified(number: int, payload: bytes) -> bytes:
    """Names and numbers on every event, and at the start three fields with no data beside them."""
    bare = b"" if number else b"retry: 3000\n\nevent: ping\n\nid: start\n\n"
    return b"%bevent: message\nid: %d\n%b" % (bare, number, payload)


def _with_crlf(_number: int, payload: bytes) -> bytes:
    return payload.replace(b"\n", b"\r\n")


def _with_bom(number: int, payload: bytes) -> bytes:
    return payload if number else b"\xef\xbb\xbf" + payload


_CHANGES = {"comments": _commented, "ids": _identified, "crlf": _with_crlf, "bom": _with_bom}


def _across_chunks(events: Iterable[Event]) -> Iterator[Event]:
    """The last byte of each event travels with the next one: no chunk ends where an event does."""
    held, step = b"", 0
    for step, tokens, payload in events:
        whole = held + payload
        yield Event(step, tokens, whole[:-1])
        held = whole[-1:]
    yield Event(step, 0, held)


def _zipped(events: Iterable[Event]) -> Iterator[Event]:
    """One gzip stream, flushed at every event so that none has to wait for the next."""
    press = zlib.compressobj(wbits=31)
    step = 0
    for step, tokens, payload in events:
        yield Event(step, tokens, press.compress(payload) + press.flush(zlib.Z_SYNC_FLUSH))
    yield Event(step, 0, press.flush())
