"""A provider over HTTP/1.1 that does with each call what its plan says, and writes down what it billed: the truth.

It finds the plan by the marker in the last message of the request. What a dialect's numbers mean is told in
docs/providers.md.
"""

import asyncio
import gzip
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate, parsedate_to_datetime
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from simulation.history import ENDINGS, OPTIONS, TURNS, Answer, Outage, Request

WORDS: Final = (
    " the",
    " river",
    " is",
    " old",
    ",",
    " and",
    " nobody",
    " knows",
    " its",
    " age",
)  # a token of o200k_base each
TOKENS_BESIDE_WORDS: Final = 15  # of a prompt: its marker, its message's frame, the reply's beginning
TOKENS_OF_A_MESSAGE: Final = 4  # beside its words, of each further message
CITATION_TOKENS: Final = 5  # Perplexity's, beside the prompt
CREATED: Final = 1_764_000_000  # when the first answer was made
USD_TOKENS: Final = 250_000  # of which any kind costs a dollar, by the provider's own figure
ABSURD: Final = 10_000_000
BOM: Final = b"\xef\xbb\xbf"
GZIP: Final = b"\x1f\x8b"
GZIP_TRAILER_BYTES: Final = 8  # RFC 1952, section 2.3
FAILURE: Final = 502  # the code of an error that comes with status 200
LIMIT_BYTES: Final = 1 << 22
UNASKED: Final = frozenset(
    {"openrouter", "mistral", "xai", "perplexity", "moonshot", "groq"}
)  # report whether asked or not
RUNNING: Final = frozenset({"perplexity", "vllm", "gemini"})  # report in every event
AT_THE_FINISH: Final = frozenset({"mistral", "moonshot", "groq", "xai"})  # report in the finishing event
FILTERS: Final = {name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")}


class Bill(Struct, frozen=True):
    """Tokens that a provider bills; `cached` are some of `prompt`, and `reasoning` some of `completion`.

    `cost_nusd`: its own figure, if it tells one.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    cost_nusd: int | None = None
    reasoning: int = 0


class Call(Struct):
    """One call, as its provider saw it. Times are the loop's.

    `bill`: what its report says, by the dialect's rules; `is_true`: which parts of the report can be believed
    ("prompt", "completion"). `shown`: tokens of text in all of the answer. `shown_sent`, `shown_begun`: in what was
    sent, and in what was sent at least in part. `reported`: a report went out; `outdated`: text went out after the
    last one. `tier`: the service tier that it names. `complete`: all that makes an answer whole went out; `broke_down`: an
    error event in its place. `ended`: "whole", "cut" (by plan), "closed" (the gateway closed), "error". `lines`: the data
    of a stream's events, and `lines_at` when each of them went out. `others`: its comments and names of events, each with
    the number of lines before it.
    `last_at`: when its head or the last of its bytes went out. `sent_bytes`: those of the body that it could write.
    """

    marker: str  # of its request; `text`: the one in the request's text, if it is another
    upstream: str
    number: int
    at: float
    answer: Answer
    body: dict[str, Any]
    headers: dict[str, str]
    raw: bytes = b""  # the bytes of `body`
    made: int = 0
    shown: int = 0
    tier: str = ""
    bill: Bill = Bill()
    is_true: frozenset[str] = frozenset()
    shown_sent: int = 0
    shown_begun: int = 0
    reported: bool = False
    outdated: bool = False
    complete: bool = False
    broke_down: bool = False
    head_sent: bool = False
    events_sent: int = 0
    sent_bytes: int = 0
    noted_bytes: int = 0  # of those events
    lines: list[str] = []
    lines_at: list[float] = []
    others: list[tuple[int, str]] = []
    body_bytes: bytes = b""
    last_at: float = 0.0
    ended: str = ""
    ended_at: float = 0.0
    text: str = ""
    dated_wait_s: float = 0.0  # until the date that an error tells, when it is sent
    place: str = ""  # in the path
    created: int = CREATED  # no two answers are the same

    @property
    def said(self) -> str:
        """The marker in the request's text."""
        return self.text or self.marker

    @property
    def wait_s(self) -> float | None:
        """The wait that an error asks for."""
        return self.dated_wait_s if self.answer.dated else self.answer.wait_s


class Event(Struct, frozen=True):
    """One event of a stream: its bytes, the tokens of text in it, and whether it has a report, or ends the stream."""

    data: bytes
    tokens: int = 0
    has_report: bool = False
    is_done: bool = False
    is_error: bool = False
    is_line: bool = False  # it has one of the call's `lines`


class Provider:
    """The server.

    `plans` has the request of each marker; `calls` fills as they come. `price`: the tokens of a prompt by its words.
    `twins` has the markers of requests with another's text, by the trace of each.
    """

    def __init__(self, plans: Mapping[str, Request], twins: Mapping[str, str]) -> None:
        self._plans, self._twins = plans, twins
        self.calls: list[Call] = []
        self._outages: list[tuple[float, Outage]] = []
        self._links: dict[_Link, None] = {}  # a set would have the order of addresses

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Link(self), host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Close every connection."""
        self._server.close()
        for link in list(self._links):
            link.end()
        await asyncio.sleep(0)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    def fail(self, outage: Outage) -> None:
        """Answer every call to an upstream as an outage says, from now on and as long as it lasts."""
        self._outages.append((asyncio.get_running_loop().time() + outage.for_s, outage))

    def call(self, upstream: str, headers: dict[str, str], raw: bytes) -> Call:
        """Note a call, and decide what becomes of it."""
        body = json.loads(raw)
        text = marker_of(body)
        marker = self._twins.get(headers.get("traceparent", ""), text)
        request = self._plans.get(marker)
        number, now = sum(call.marker == marker for call in self.calls), asyncio.get_running_loop().time()
        answer = next(
            (outage.answer for until, outage in self._outages if outage.upstream == upstream and now < until), None
        )
        if answer is None and request is not None:
            answer = request.answers[min(number, len(request.answers) - 1)]
        answer = answer or Answer(status=500, error="failed")
        call = Call(marker, upstream, number, now, answer, body, headers, raw=raw, lines=[], lines_at=[], text=text)
        call.created += len(self.calls)
        self.calls.append(call)
        return call


class _Link(asyncio.Protocol):
    """One connection of the gateway's."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self._may_write = asyncio.Event()
        self._may_write.set()
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._provider._links[self] = None
        self._task = asyncio.get_running_loop().create_task(self._serve(), name="provider")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._news.set()

    def eof_received(self) -> bool:
        self.is_lost = True
        self._news.set()
        self._may_write.set()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.eof_received()
        self._provider._links.pop(self, None)
        del exc

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def end(self) -> None:
        """Stop serving."""
        self._task.cancel()
        self._transport.abort()

    async def _serve(self) -> None:
        while (head := await self._until(b"\r\n\r\n")) is not None:
            lines = head.decode("latin-1").split("\r\n")
            headers = {
                name.strip().lower(): value.strip()
                for name, _, value in (line.partition(":") for line in lines[1:] if line)
            }
            raw = await self._take(int(headers.get("content-length", 0)))
            if raw is None:
                return
            upstream, _, place = lines[0].split(" ")[1].split("/")[1].partition(".")
            call = self._provider.call(upstream, headers, raw)
            call.place = place
            await self._answer(call)
            call.ended_at = asyncio.get_running_loop().time()
            if call.ended not in {"whole", "error"} or self._transport.is_closing():
                return

    async def _until(self, mark: bytes) -> bytes | None:
        while (at := self._buffer.find(mark)) < 0:
            if self.is_lost or len(self._buffer) > LIMIT_BYTES:
                return None
            self._news.clear()
            await self._news.wait()
        return await self._take(at + len(mark))

    async def _take(self, size: int) -> bytes | None:
        while len(self._buffer) < size:
            if self.is_lost:
                return None
            self._news.clear()
            await self._news.wait()
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def _sleep(self, seconds: float) -> None:
        """Sleep, or until the gateway has closed."""
        self._news.clear()
        if seconds <= 0 or self.is_lost:
            await asyncio.sleep(0)
            return
        waiting = asyncio.get_running_loop().call_later(seconds, self._news.set)
        try:
            await self._news.wait()
        finally:
            waiting.cancel()

    async def _answer(self, call: Call) -> None:
        answer = call.answer
        await self._sleep(answer.delay_s)
        if self.is_lost:
            call.ended = "closed"
            return
        streams = bool(call.body.get("stream")) != answer.other_shape
        if answer.error:
            now = time.time()
            status, headers, body = error_of(answer, call.said, call.headers, now)
            call.body_bytes = body
            if answer.dated:
                call.dated_wait_s = parsedate_to_datetime(headers["retry-after"]).timestamp() - now
            await self._send(call, status, headers, [Event(body)], "length")
            call.ended = "error"
            return
        make = Making(call)
        events = make.events() if streams else [make.whole()]
        gzipped = answer.gzip and answer.lie != "early"  # in one piece a report is at its end
        if gzipped:
            events = [
                Event(
                    gzip.compress(b"".join(event.data for event in events), mtime=0),
                    call.shown,
                    any(event.has_report for event in events),
                    is_done=True,
                )
            ]
        headers = {}
        if answer.content_type is not None:
            headers["content-type"] = answer.content_type or ("text/event-stream" if streams else "application/json")
        if gzipped:
            headers["content-encoding"] = "gzip"
        await self._send(
            call, 200, headers, events, answer.framing if streams or answer.framing != "chunked" else "length"
        )

    async def _send(self, call: Call, status: int, headers: dict[str, str], events: list[Event], framing: str) -> None:
        """Send a head and a body, as far as the plan goes."""
        answer = call.answer
        if framing == "chunked":
            headers["transfer-encoding"] = "chunked"
        elif framing == "length":
            headers["content-length"] = str(sum(len(event.data) for event in events))
        else:
            headers["connection"] = "close"
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        parts = [_chunk(event.data) if framing == "chunked" else event.data for event in events]
        last = b"0\r\n\r\n" if framing == "chunked" else b""
        total = sum(map(len, parts))
        breaks = answer.end in {"resets", "closes", "stalls"} and not answer.error
        limit = int(total * min(answer.at, 1.0)) if breaks else total
        if breaks and limit == total:
            limit -= 1
        if not breaks or answer.at:
            self._transport.write(f"HTTP/1.1 {status} Played\r\n{head}\r\n".encode())
            call.head_sent, call.last_at = True, asyncio.get_running_loop().time()
        if answer.pause_s:
            await self._sleep(answer.pause_s)
        sent = 0
        for piece, gap in _pieces(parts, answer):
            if gap and sent:
                await self._sleep(answer.gap_s)
            piece = piece[: limit - sent]  # noqa: PLW2901 - the rest isn't sent
            if self.is_lost or not piece:
                break
            self._transport.write(piece)
            sent += len(piece)
            call.sent_bytes = sent
            before = call.events_sent
            _note_sent(call, events, parts, sent)
            now = call.last_at = asyncio.get_running_loop().time()
            call.lines_at += [now for event in events[before : call.events_sent] if event.is_line]
            await self._may_write.wait()
        if self.is_lost and sent < total:
            call.ended = "closed"
        elif not breaks:
            if framing != "length":  # else its end is known
                await self._sleep(answer.lingers_s)
            self._transport.write(last)
            call.ended = "whole"
            if framing == "close" or self.is_lost:
                self._transport.close()
        else:
            await self._break(call)

    async def _break(self, call: Call) -> None:
        call.ended = "cut"
        await self._sleep(call.answer.gap_s)
        if call.answer.end == "resets":
            self._transport.abort()
        elif call.answer.end == "closes":
            self._transport.close()
        else:
            while not self.is_lost:
                self._news.clear()
                await self._news.wait()


def _pieces(parts: list[bytes], answer: Answer) -> Iterator[tuple[bytes, bool]]:
    """Return what is written at once, and whether a pause comes before it.

    With `pieces` every border is so far within an event.
    """
    k = answer.pieces
    if not k:
        for part in parts:
            yield part, bool(answer.gap_s)
        return
    kept = b""
    for part in parts:
        yield kept + part[:k], bool(answer.gap_s)
        kept = part[k:]
    yield kept, bool(answer.gap_s)


def _note_sent(call: Call, events: list[Event], parts: list[bytes], sent: int) -> None:
    """Note what the first `sent` bytes of an answer say, beside what is noted of them already."""
    at, known = call.noted_bytes, call.events_sent
    call.shown_begun = call.shown_sent
    for event, part in zip(events[known:], parts[known:], strict=True):
        if at >= sent:
            break
        call.shown_begun += event.tokens
        at += len(part)
        says_nothing = (len(part) > len(event.data)) * 2  # the end of a chunk
        says_nothing += event.data.startswith(GZIP) * GZIP_TRAILER_BYTES + event.data.endswith(
            b"\r\n"
        )  # CR ends a line
        if at - says_nothing > sent:
            break
        call.shown_sent += event.tokens
        call.events_sent += 1
        call.noted_bytes = at
        if event.has_report:
            call.reported, call.outdated = True, False
        elif event.tokens:
            call.outdated = True
        call.complete = call.complete or event.is_done
        call.broke_down = call.broke_down or event.is_error


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def marker_of(body: dict[str, Any]) -> str:
    """Return the marker in a request's last message."""
    return text_in(body["messages"][-1]).partition(":")[0]


def text_in(message: Mapping[str, Any]) -> str:
    """Return the text of a message's content, also of one in parts."""
    content = message["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def prompt_tokens(body: dict[str, Any]) -> int:
    """Return what a provider counts for a request's messages and fields. The last message begins with its marker."""
    *others, last = body["messages"]
    text = text_in(last)
    total = TOKENS_BESIDE_WORDS + TOKENS_OF_A_MESSAGE * len(others)
    total += sum(tokens for name, (_, tokens) in OPTIONS.items() if name in body)
    for ending, tokens in ENDINGS.values():
        if text.endswith(ending):
            text, total = text.removesuffix(ending), total + tokens
    total += len(text.split()) - 1
    known = [turn for turns in TURNS.values() for turn in turns] if others else []
    for message in others:
        total += next((tokens for turn, tokens in known if turn == message), len(text_in(message).split()))
    return total


class Making:
    """Makes the answer to one call, and notes on it what is in it."""

    def __init__(self, call: Call) -> None:
        self._call, self._answer, body = call, call.answer, call.body
        answer = self._answer
        self._form = answer.form.split("+")
        caps = [body[name] for name in ("max_tokens", "max_completion_tokens") if isinstance(body.get(name), int)]
        wanted = answer.words + answer.hidden
        made = min([wanted, *caps]) if answer.heeds_cap else wanted
        self._hidden = min(answer.hidden, made)
        self._words = made - self._hidden
        self._finish = "length" if made < wanted else "stop"
        self._n = max(1, body.get("n") or 1)
        self._prompt = prompt_tokens(body)
        call.tier = body.get("service_tier", "") if answer.tier == "asked" else answer.tier
        self._base = {"id": f"chatcmpl-{call.said}", "created": call.created, "model": "up-model"}
        if call.tier and answer.dialect != "anthropic":
            self._base["service_tier"] = call.tier
        if answer.bulk:
            self._base["bulk"] = "-" * answer.bulk
        call.made, call.shown = made * self._n, self._words * self._n
        call.bill, call.is_true = self._billed()

    def _billed(self) -> tuple[Bill, frozenset[str]]:
        """Return what the report means, and the parts of it that are to be believed."""
        answer = self._answer
        both = frozenset({"prompt", "completion"})
        lie = answer.lie
        if lie in {"none", "zeros"} or answer.dialect == "tgi":
            return Bill(), frozenset()
        stream_options = self._call.body.get("stream_options") or {}
        streams = bool(self._call.body.get("stream")) != answer.other_shape
        if streams and answer.dialect not in UNASKED and not stream_options.get("include_usage"):
            return Bill(), frozenset()
        output = self._call.made
        prompt, cached, cost = self._prompt, self._cached, None
        if answer.dialect == "perplexity" and lie not in PLAIN_LIES:
            prompt += CITATION_TOKENS
        if answer.dialect in {"openrouter", "xai"} and lie not in PLAIN_LIES:
            cost = (prompt + output) * 1_000_000_000 // USD_TOKENS
        if lie in {"absurd", "negative", "words", "no_completion"}:
            return Bill(prompt, 0), frozenset({"prompt"})
        if lie == "no_prompt":
            return Bill(0, 0, output), frozenset({"completion"})
        reasoning = self._hidden * self._n
        if answer.dialect == "deepseek" or (answer.dialect == "gemini" and not self._words):
            reasoning = 0  # its reports have no such number; Gemini's total has it only beside text
        if lie == "early" and streams:
            return Bill(prompt, cached, output, cost, reasoning), frozenset({"prompt"})
        return Bill(prompt, cached, output, cost, reasoning), both

    @property
    def _cached(self) -> int:
        answer = self._answer
        if answer.lie in PLAIN_LIES or answer.dialect in {"mistral", "perplexity", "vllm", "ollama", "groq", "gemini"}:
            return 0
        return self._prompt - 3 if answer.dialect == "anthropic" and answer.cached else min(answer.cached, self._prompt)

    def usage(self, shown: int, *, hidden: int | None = None) -> dict[str, Any]:
        """Return the report after so many tokens of text, in the dialect and with the lie."""
        answer, prompt, cached = self._answer, self._prompt, self._cached
        hidden = self._hidden * self._n if hidden is None else hidden
        lie, dialect = answer.lie, answer.dialect
        named = {"service_tier": self._call.tier} if self._call.tier and dialect == "anthropic" else {}
        if lie == "zeros":
            return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        if lie in PLAIN_LIES:
            plain: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": shown + hidden, **named}
            worse = {"absurd": ABSURD, "negative": -5, "words": "many"}
            if lie in worse:
                plain["completion_tokens"] = worse[lie]
            else:
                plain.pop("prompt_tokens" if lie == "no_prompt" else "completion_tokens")
            return plain
        completion = shown if dialect in {"gemini", "xai", "perplexity"} else shown + hidden
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + shown + hidden,
            **named,
        }
        if dialect == "perplexity":
            usage |= {"citation_tokens": CITATION_TOKENS, "num_search_queries": 0, "reasoning_tokens": hidden}
            usage["total_tokens"] = prompt + shown
        elif dialect == "anthropic":
            usage |= {"prompt_tokens": prompt - cached, "total_tokens": prompt - cached + shown + hidden}
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        elif dialect == "deepseek":
            usage |= {"prompt_cache_hit_tokens": cached, "prompt_cache_miss_tokens": prompt - cached}
        elif dialect == "moonshot":
            usage["cached_tokens"] = cached
        elif dialect in {"openai", "azure", "openrouter", "xai", "tgi"}:
            usage["prompt_tokens_details"] = {"cached_tokens": cached, "audio_tokens": 0}
            usage["completion_tokens_details"] = {"reasoning_tokens": hidden, "audio_tokens": 0}
        ticks = (prompt + shown + hidden) * 10_000_000_000 // USD_TOKENS
        if dialect == "openrouter":
            usage |= {"cost": (prompt + shown + hidden) / USD_TOKENS, "is_byok": False}
        elif dialect == "xai":
            usage["cost_in_usd_ticks"] = ticks
        if lie in {"floats", "strings"}:
            as_told: Callable[[int], Any] = float if lie == "floats" else str
            usage |= {name: as_told(usage[name]) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return usage

    def whole(self) -> Event:
        """Make an answer that isn't streamed."""
        kind = self._answer.kind
        text = self._text(0, self._words)
        message: dict[str, Any] = {"role": "assistant", "content": text if kind == "text" else None}
        if kind != "text":
            message |= self._delta(text, first=True)
        choices = [{"index": index, "message": message, "finish_reason": self._finish} for index in range(self._n)]
        answer = {**self._base, "object": "chat.completion", "choices": choices}
        reports = self._call.is_true or self._answer.lie == "zeros"
        if reports:
            self._put(answer, self.usage(self._words * self._n))
        data = json.dumps(answer).encode()
        if self._answer.dialect == "deepseek":
            data = b"\n" * self._answer.comments + data
        if "bom" in self._form:
            data = BOM + data
        self._call.body_bytes = data
        return Event(data, self._call.shown, bool(self._call.is_true), is_done=True)

    def events(self) -> list[Event]:
        """Make a stream."""
        made = [replace(event, data=self._formed(event.data)) for event in self._events()]
        if made and "bom" in self._form:
            made[0] = replace(made[0], data=BOM + made[0].data)
        return made

    def _formed(self, data: bytes) -> bytes:
        """Return an event's bytes in the answer's form."""
        if "bare" in self._form:
            data = re.sub(rb"^data: ", b"data:", data, flags=re.MULTILINE)
        ends = b"\r\n" if "crlf" in self._form else b"\r" if "cr" in self._form else b"\n"
        return data.replace(b"\n", ends)

    def _events(self) -> list[Event]:
        answer, call = self._answer, self._call
        made: list[Event] = [Event(b": keep-alive\n\n")] * answer.comments
        call.others = [(0, ": keep-alive")] * answer.comments
        if answer.comments == 1:
            made.append(Event(b"retry: 3000\n\n"))
        if answer.dialect == "azure":
            made.append(
                self._event(
                    {"choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": FILTERS}]}
                )
            )
        dated = bool(call.is_true) or (answer.lie == "zeros" and bool(call.body.get("stream_options")))
        steps = list(range(0, self._words, answer.per_event))
        done = 0
        for step, index in itertools.product(steps, range(self._n)):
            count = min(answer.per_event, self._words - step)
            done += count
            event = self._chunk_of(index, self._delta(self._text(step, count), first=step == 0))
            running = dated and answer.dialect in RUNNING and answer.lie in {"true", "floats", "strings", "twice"}
            if running:
                event["usage"] = self.usage(done, hidden=0)
            made.append(self._event(event, count, has_report=running))
            if answer.lie == "early" and dated and index == self._n - 1 and step == steps[len(steps) // 2]:
                made.append(self._event({"choices": [], "usage": self.usage(done)}, has_report=True))
        for index in range(self._n):
            last = self._chunk_of(index, {}, self._finish)
            reports = dated and answer.dialect in AT_THE_FINISH and index == self._n - 1 and answer.lie != "early"
            if reports:
                self._put(last, self.usage(self._words * self._n))
            made.append(self._event(last, has_report=reports))
        if dated and answer.lie != "early" and (answer.dialect not in AT_THE_FINISH or answer.lie == "twice"):
            usage = {"choices": [], "usage": self.usage(self._words * self._n)}
            made += [self._event(usage, has_report=True) for _ in range(2 if answer.lie == "twice" else 1)]
        if dated and answer.lie == "zeros_after":
            made.append(
                self._event({"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}})
            )
        if answer.end == "error_event":
            made = made[: int(len(made) * answer.at)]
            words = f"broke down for {_echo(answer, call.headers)}"
            error = {"message": words, "type": "server_error", "code": FAILURE}
            made.append(Event(b"data: " + json.dumps({"error": error}).encode() + b"\n\n", is_error=True))
            return made
        if answer.end == "ends_early":  # in order, but before its finish
            return made[: min(int(len(made) * answer.at), len(made) - self._n - 2)] if len(made) > self._n + 2 else []
        done_event = Event(b"data: [DONE]\n\n", is_done=True)
        if answer.end != "no_done":
            made += [done_event] * (2 if answer.end == "done_twice" else 1)
        if answer.end == "late_error":
            made.append(Event(b'data: {"error": {"message": "too late", "code": 500}}\n\n'))
        return made

    def _event(self, members: dict[str, Any], tokens: int = 0, *, has_report: bool = False) -> Event:
        text = json.dumps({**self._base, "object": "chat.completion.chunk", **members})
        if "lines" in self._form:
            text = text.replace(', "choices"', ',\n"choices"', 1)
        self._call.lines.append(text)
        more = b""
        if self._answer.comments == 1 and tokens and not has_report:
            more = b"\nevent: chunk\nid: %d" % len(self._call.lines)
            self._call.others.append((len(self._call.lines), "event: chunk"))
        data = text.replace("\n", "\ndata: ").encode()
        return Event(b"data: " + data + more + b"\n\n", tokens, has_report, is_line=True)

    def _chunk_of(self, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish}
        chunk: dict[str, Any] = {"choices": [choice]}
        if self._answer.dialect == "azure":
            choice["content_filter_results"] = FILTERS
        elif self._answer.dialect == "openai":
            chunk["obfuscation"] = "xQ3JXdhVOWfbZ"
        elif self._answer.dialect == "perplexity":
            chunk["search_results"] = [{"title": "A page", "url": "https://pages.example/one"}] * 3
        return chunk

    def _delta(self, text: str, *, first: bool) -> dict[str, Any]:
        kind, dialect = self._answer.kind, self._answer.dialect
        role = {"role": "assistant"} if first else {}
        if kind == "text":
            return {**role, "content": text}
        if kind == "refusal":
            return {**role, "refusal": text}
        if kind == "tool":
            function = {"arguments": text, **({"name": "look_up"} if first else {})}
            return {**role, "tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]}
        if dialect == "openrouter":
            return {
                **role,
                "content": "",
                "reasoning": text,
                "reasoning_details": [{"type": "reasoning.text", "text": text}],
            }
        return {**role, ("reasoning" if dialect in {"ollama", "groq"} else "reasoning_content"): text}

    def _text(self, start: int, count: int) -> str:
        return "".join(WORDS[at % len(WORDS)] for at in range(start, start + count))

    def _put(self, chunk: dict[str, Any], usage: dict[str, Any]) -> None:
        """Put a report where the dialect has it."""
        if self._answer.dialect == "groq":
            chunk["x_groq"] = {"usage": usage}
        elif self._answer.dialect == "moonshot":
            chunk["choices"][0]["usage"] = usage
        else:
            chunk["usage"] = usage


PLAIN_LIES: Final = frozenset(
    {"absurd", "negative", "words", "no_prompt", "no_completion"}
)  # in a report of two numbers


def _echo(answer: Answer, sent: Mapping[str, str]) -> str:
    """Return the secret that a provider got, as it repeats it in an error: whole, or cut off at the end of its message."""
    secret = sent.get("api-key", "")
    return secret if answer.words % 2 else secret[: len(secret) // 2 + 2]


def error_of(
    answer: Answer, marker: str, sent: Mapping[str, str], now: float = 0.0
) -> tuple[int, dict[str, str], bytes]:
    """Return an error's status, headers and body, at a Unix time."""
    headers = {"content-type": "application/json"}
    if answer.wait_s is not None:
        headers["retry-after"] = formatdate(now + answer.wait_s, usegmt=True) if answer.dated else f"{answer.wait_s:g}"
    if answer.error == "page":
        return 200, {"content-type": "text/html"}, b"<html><title>Welcome</title></html>"
    if answer.error == "empty":
        return 200, headers, b""
    message, code, param = {
        "failed": ("The server had an error.", None, None),
        "busy": ("Overloaded.", None, None),
        "limit": ("Rate limit reached.", "rate_limit_exceeded", None),
        "quota": ("You exceeded your current quota.", "insufficient_quota", None),
        "key": ("Incorrect API key provided.", "invalid_api_key", None),
        "permission": ("Country not supported.", "unsupported_country_region_territory", None),
        "model": ("The model does not exist.", "model_not_found", "model"),
        "context": ("This model's maximum context length is 8192 tokens.", "context_length_exceeded", "messages"),
        "parameter": ("Unsupported parameter.", "unsupported_parameter", "top_k"),
        "large": ("The request is too large.", None, None),
        "credit": ("Insufficient credits.", None, None),  # OpenRouter's
        "balance": ("Your credit balance is too low to access the API.", None, None),  # Anthropic's
        "bad_key": ("API key not valid. Please pass a valid API key.", None, None),  # Gemini's
        "flagged": ("Your input was flagged by moderation.", None, None),  # OpenRouter's, as is the next one
        "endpoint": ("No endpoints found that support tool use.", None, None),
    }[answer.error]
    error: dict[str, Any] = {
        "message": f"{message} {marker} {_echo(answer, sent)}",
        "type": "an_error",
        "param": param,
        "code": code,
    }
    if answer.status == 200:
        error["code"] = FAILURE
    if answer.dialect == "gemini":
        return (
            answer.status,
            headers,
            json.dumps([{"error": error}]).encode() if answer.status != 200 else json.dumps({"error": error}).encode(),
        )
    return answer.status, headers, json.dumps({"error": error}).encode()
