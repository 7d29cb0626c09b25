"""When the bytes of an answer go out, and how the answer ends.

Pace is kept by an absolute schedule: token k is due at the start plus the time to the first token plus k intervals, so a late
one doesn't delay those after it.
"""

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Iterable

import msgspec
from msgspec import Struct

from meshproxy.upstream.simulator.ask import Ask
from meshproxy.upstream.simulator.behaviour import Behaviour, SimulatorSettings
from meshproxy.upstream.simulator.chunks import BROKEN, Event, EventStream, completion, error_event
from meshproxy.upstream.simulator.faults import CUTTING, mangled
from meshproxy.upstream.simulator.journal import Entry
from meshproxy.upstream.simulator.line import EVENT_STREAM, JSON, PAGE, Line
from meshproxy.upstream.simulator.replies import Reply

BREATHE_EVERY = 64  # events that needn't be waited for, before other streams get their turn


class Pace(Struct, frozen=True):
    """Seconds to the first token, and from one to the next."""

    first_s: float
    interval_s: float

    def due_s(self, step: int) -> float:
        """When a token is due, in seconds after the start."""
        return self.first_s + step * self.interval_s


def pace_of(behaviour: Behaviour, settings: SimulatorSettings) -> Pace:
    """Options before traits, traits before settings."""
    first_s, interval_s = settings.first_token_s, 1 / settings.tokens_per_second
    if "fast" in behaviour.traits:
        first_s, interval_s = 0.0, 0.0
    if "slow" in behaviour.traits:
        interval_s = 1.0
    asked = behaviour.options
    return Pace(first_s if asked.ttft is None else asked.ttft, interval_s if asked.tps is None else 1 / asked.tps)


class Delivery(Struct):
    """One reply on its way, the way the request wants it and the way its behaviour spoils it."""

    line: Line
    reply: Reply
    ask: Ask
    behaviour: Behaviour
    pace: Pace
    entry: Entry

    async def run(self) -> None:
        """Returns at the end, good or bad. `ConnectionError`: the client was gone before it."""
        try:
            await (self._stream() if self.ask.stream else self._unstreamed())
        finally:
            self._bill()
        match self.behaviour.one_of(CUTTING):
            case "stall" | "stall-mid":
                await self.line.silence()
            case "die-mid-stream":
                self.line.close()
            case "reset-mid-stream":
                self.line.reset()
            case "bad-chunk":
                await self.line.garble()
            case _:
                await self.line.end()

    def _bill(self) -> None:
        """Note what the provider bills: thoughts that a stream doesn't show come before its first token."""
        reply = self.reply
        unseen = reply.thoughts if self.ask.stream and not reply.dialect.shows else 0
        self.entry.bill(
            prompt_tokens=reply.prompt_tokens + reply.dialect.citation_tokens,
            cached_tokens=reply.cached_tokens,
            completion_tokens=self.entry.tokens + unseen,
        )

    async def _stream(self) -> None:
        whole = EventStream(self.reply, self.ask, self.behaviour)
        events: Iterable[Event] = mangled(whole, self.behaviour, error_event(self.reply))
        length = None
        if "content-length-stream" in self.behaviour.traits:
            events = list(events)
            length = sum(len(event.payload) for event in events)
        self._head(length)
        await self.line.write()
        await (self._burst(events) if "burst" in self.behaviour.traits else self._paced(events))

    async def _unstreamed(self) -> None:
        body, broken = self._body(), self.behaviour.one_of(CUTTING)
        await asyncio.sleep(self.pace.due_s(self.reply.steps))
        self._head(None if broken in {"end-early", "bad-chunk"} else len(body))
        if broken:
            await self.line.write()
        if broken != "stall":
            unfinished = broken and broken != "error-mid-stream"
            await self._write(body[: len(body) // 2] if unfinished else body)
            self.entry.sent(self.reply.tokens)

    async def _paced(self, events: Iterable[Event]) -> None:
        loop, write = asyncio.get_running_loop(), self._write
        start_s = loop.time()
        for number, event in enumerate(events):
            wait_s = start_s + self.pace.due_s(event.step) - loop.time()
            if wait_s > 0 or number % BREATHE_EVERY == BREATHE_EVERY - 1:
                await asyncio.sleep(max(wait_s, 0))
            await write(event.payload)
            self.entry.sent(event.tokens)

    async def _burst(self, events: Iterable[Event]) -> None:
        whole = list(events)
        await asyncio.sleep(self.pace.first_s)
        await self.line.write(*(event.payload for event in whole))
        for event in whole:
            self.entry.sent(event.tokens)

    @property
    def _write(self) -> Callable[[bytes], Awaitable[None]]:
        return self.line.write_split if "split" in self.behaviour.traits else self.line.write

    def _body(self) -> bytes:
        if "error-mid-stream" in self.behaviour.traits:
            body = msgspec.json.encode(BROKEN)
        else:
            body = completion(self.reply, self.ask, self.behaviour)
        return gzip.compress(body, mtime=0) if "gzip" in self.behaviour.traits else body

    def _head(self, length: int | None) -> None:
        traits = self.behaviour.traits
        usual = EVENT_STREAM if self.ask.stream else JSON
        headers = [PAGE if "wrong-content-type" in traits else usual]
        if "gzip" in traits:
            headers.append(("content-encoding", "gzip"))
        until_close = "eof-delimited" in traits
        self.line.head(200, headers, length=None if until_close else length, chunked=not until_close)
