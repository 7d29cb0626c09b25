"""The scanner of a provider's event stream: it returns what may go to the client, and records usage, errors and output.

Events pass as the very bytes they came in. JSON is decoded only of events with usage or an error, or whose text can't
be found otherwise. Line ends become LF. Lines that OpenAI's SDKs can't handle (`id:`, `retry:`, an `event:` without
data, empty data) are dropped, and so is `[DONE]`: the relay writes its own after a good end. An incomplete event is
kept, up to `max_event_bytes`. The format: WHATWG HTML, "Server-sent events", 9.2.6.
"""

from collections.abc import Callable
from typing import Any, Final

from msgspec import Raw

from meshproxy.errors import UpstreamError, upstream_error
from meshproxy.openai.events import (
    FINISH_REASON,
    Shape,
    error_in,
    is_plain,
    joined,
    may_have,
    parse,
    shape_of,
    with_cost,
)
from meshproxy.openai.output import audio_tokens, escaped, pieces_tokens, read_output, text_tokens
from meshproxy.openai.usage import BOM, Report, decode_members, decode_text, decode_value, find_report

PING: Final = b": ping\n\n"
DONE: Final = b"data: [DONE]\n\n"
COST: Final = b": x-mesh-cost=%b\n\n"  # a comment: clients ignore it unless they look for it

MAX_EVENT_BYTES: Final = 16_777_216  # the default of the upstream's settings: providers send images in events
MAX_PLAIN_BYTES: Final = 16_384  # larger events take the slow path, so that the kept sample stays small
MAX_UNCOUNTED_BYTES: Final = 4096  # of text
FIRST_EVENTS: Final = 256  # added to the events seen when the share of events with a learned shape is computed
MAX_ENDINGS: Final = 128  # events with a finish reason that are kept: one for each choice that a request may ask for
# Learning a shape costs about as much as decoding: a stream of changing shapes pays an eighth more.
EVENTS_PER_SHAPE: Final = 8

_LF: Final = 10
_CR: Final = 13
_UNFINISHED: Final = b'"finish_reason":null'  # as OpenAI writes it, and most others
_NO_SHAPE: Final = Shape(b"\r", b"\n", padded=False)  # matches no event: one with a CR has no shape


class StreamScanner:
    """Scans one stream.

    `hide_usage`: hold back the usage-only event, for a client that didn't request it. `max_event_bytes` bounds one
    event; `audio_format` is the requested format of audio; `reads_tier`: look for the service tier.

    - `events`: data events seen, without `[DONE]`.
    - `report`: the usage reported, all events merged.
    - `done`: `[DONE]` was seen.
    - `error`: the provider's error; neither its event nor anything after it is forwarded.
    - `cost_so_far`: returns the cost so far in USD, for the usage event of a client that sees usage, once the answer has
      finished.
    - `written_cost`: the cost last written.
    - `service_tier`: the tier that the first event which names one names. OpenAI's chunks all do.
    - `tokens`: the output estimated from its text and the duration of its audio; `audio_tokens` is the audio's part.
    - `most`: an upper bound of `tokens` that costs nothing: text is kept uncounted, up to a bound, until `tokens` is
      read.

    Nearly all events of a stream differ only in their text. So the bytes around the text are learned, and an event of
    that shape isn't decoded.
    """

    __slots__ = (
        "_after",
        "_after_size",
        "_audio_chars",
        "_audio_format",
        "_before",
        "_begun",
        "_counted",
        "_cr",
        "_endings",
        "_finished",
        "_flush_at",
        "_held",
        "_hide_usage",
        "_max_event_bytes",
        "_messages",
        "_model",
        "_over",
        "_padded",
        "_pieces",
        "_plain",
        "_reads_tier",
        "_reported_at",
        "_sample",
        "_shapes_learned",
        "_text",
        "_text_at",
        "audio_tokens",
        "cost_so_far",
        "done",
        "error",
        "events",
        "most",
        "report",
        "service_tier",
        "written_cost",
    )

    def __init__(
        self,
        *,
        hide_usage: bool,
        max_event_bytes: int = MAX_EVENT_BYTES,
        audio_format: str | None = None,
        reads_tier: bool = False,
    ) -> None:
        self.events = 0
        self.audio_tokens = 0
        self.most = 0
        self.report: Report | None = None
        self.cost_so_far: Callable[[], str] | None = None
        self.written_cost: str | None = None
        self.service_tier: str | None = None
        self.done = False
        self.error: dict[str, Any] | None = None
        self._hide_usage = hide_usage
        self._max_event_bytes = max_event_bytes
        self._audio_format = audio_format
        self._reads_tier = reads_tier
        self._begun = False
        self._cr = False  # the last byte was CR: an LF that follows is part of it
        self._held = bytearray()  # an incomplete event
        self._plain = True  # nothing is held and the stream isn't over
        self._over = False
        self._finished = False
        self._endings: list[bytes] = []  # events with a finish reason
        self._sample = b""  # the first event that isn't large
        self._model: str | None = None
        self._counted = 0  # tokens of text that was counted and dropped
        self._audio_chars = 0  # base64 characters of audio
        self._messages: list[str] = []  # the last whole messages, counted if nothing else is
        self._text = bytearray()  # uncounted text, JSON-escaped
        self._pieces = 0  # pieces in `_text`
        self._flush_at = MAX_UNCOUNTED_BYTES  # the value of `most` at which the text is counted
        self._reported_at = -1  # `_counted` and uncounted bytes when the report came
        self._shapes_learned = 0
        self._learn(_NO_SHAPE)

    def feed(self, payload: bytes) -> bytes:
        """Return what may go to the client now: whole events only, and `payload` itself if it is unchanged.

        Raises UpstreamError for an event of more than `max_event_bytes`.
        """
        if self._plain:
            if self._has_shape(payload):
                return payload
            size = len(payload)
            if size <= MAX_PLAIN_BYTES and is_plain(payload, size):
                self.events += 1
                self._read(payload, payload[6:])
                if payload.rfind(_UNFINISHED) < 0:
                    self._look_for_finish(payload)
                return payload
        return self._scan(payload)

    @property
    def outdated(self) -> bool:
        """Whether text came after the report."""
        return self.report is not None and self._reported_at != self._counted + len(self._text)

    @property
    def tokens(self) -> int:
        """The estimated output tokens so far; `most` is the same after this."""
        self._count_text()
        return self.most

    def _count_text(self) -> None:
        """Count the text that is kept, drop it, and set `most` to the tokens."""
        if self._text:
            outdated = self.outdated
            self._counted += pieces_tokens(bytes(self._text), self._pieces)
            self._text.clear()
            self._pieces = 0
            self._reported_at = -1 if outdated else self._counted
        self.most = self._counted or sum(map(text_tokens, self._messages))
        self._flush_at = self.most + MAX_UNCOUNTED_BYTES

    def finish(self) -> bytes:
        """End the scan with the upstream's body. Return a last event that only lacks its blank line, else nothing."""
        held = bytes(self._held)
        self._held.clear()
        if self._over:
            return b""
        data = parse(held).data
        if not (data.startswith(b"[DONE]") or decode_members(data) is not None):
            return b""
        return self._event(held + b"\n\n")

    @property
    def complete(self) -> bool:
        """Whether the stream ended well: with `[DONE]`, or at least a finish reason. Valid at the end."""
        return self.done or self._finished

    @property
    def ended_choices(self) -> int:
        """The number of choices that have a finish reason. Decodes their last events; read it at the end."""
        indexes = set()
        for event in self._endings[:MAX_ENDINGS]:
            choices = decode_value((decode_members(parse(event).data) or {}).get("choices"))
            for choice in choices if isinstance(choices, list) else ():
                if isinstance(choice, dict) and choice.get("finish_reason"):
                    indexes.add(str(choice.get("index")))
        return len(indexes)

    @property
    def reported_model(self) -> str | None:
        """The model that the provider names. Decodes an event; valid at the end."""
        if self._model is None and self._sample:
            members = decode_members(parse(self._sample).data) or {}
            return decode_text(members.get("model"))
        return self._model

    def _scan(self, payload: bytes) -> bytes:
        """Return what may go to the client of a payload that isn't one plain event."""
        if self._over or not payload:
            return b""
        text = self._whole_events(self._with_lf(payload))
        out = text if self._are_plain(text) else self._by_event(text)
        self._plain = not self._held and not self._over
        return payload if out == payload else out

    def _are_plain(self, text: bytes) -> bool:
        """Return whether all of these whole events, which arrived in a burst, are plain. If so, count them."""
        if self._have_shape(text):
            return True
        if not text.startswith(b"data: {") or text.rfind(b'"error"') >= 0 or text.rfind(b'"usage"') >= 0:
            return False
        lines = text.split(b"\n")
        events = lines[:-1:2]
        count = len(events)
        if any(lines[1::2]) or text.count(b"\n\ndata: {") != count - 1 or len(text) > self._max_event_bytes:
            return False
        for event in events:
            self._count(event + b"\n\n")
        if text.count(_UNFINISHED) < text.count(b'"finish_reason"'):
            self._look_for_finish(text)
        return True

    def _have_shape(self, text: bytes) -> bool:
        """Return whether all of these events have the stream's usual shape. If so, count them."""
        if (
            self._padded
            or not (text.startswith(self._before) and text.endswith(self._after))
            or len(text) < self._text_at + self._after_size
        ):
            return False
        texts = text[self._text_at : -self._after_size].split(self._after + self._before)
        count = len(texts)
        joined_text = b"".join(texts)
        if (
            _LF in joined_text
            or _CR in joined_text
            or joined_text.count(b'"') != joined_text.count(b'\\"')
            or joined_text.find(b'\\\\"') >= 0
        ):
            return False
        self.events += count
        self._add(joined_text, count - texts.count(b""))
        return True

    def _has_shape(self, event: bytes) -> bool:
        """Return whether this is one event of the stream's usual shape. If so, count it. The hot path."""
        if not event.startswith(self._before):
            return False
        start = self._text_at
        end = event.find(b'"', start)
        if not event.startswith(self._after, end) or _CR in event:
            return False
        size = len(event)
        if event.find(b"\n") != size - 2:
            return False
        if self._padded:
            if event.find(b'"', end + self._after_size) != size - 4 or not event.endswith(b'"}\n\n'):
                return False
        elif size - end != self._after_size:
            return False
        self.events += 1
        if end > start:
            self._text += event[start:end]
            self._pieces += 1
            self.most += end - start
            if self.most > self._flush_at:
                self._count_text()
        return True

    def _learn(self, shape: Shape) -> None:
        self._before, self._after, self._padded = shape.before, shape.after, shape.padded
        self._text_at, self._after_size = len(shape.before), len(shape.after)

    def _by_event(self, text: bytes) -> bytes:
        """Scan whole events one by one."""
        forwarded = []
        start = 0
        while start < len(text) and not self._over:
            if text[start] == _LF:
                start += 1
                continue
            end = text.find(b"\n\n", start) + 2
            forwarded.append(self._event(text[start:end]))
            start = end
        return b"".join(forwarded)

    def _with_lf(self, payload: bytes) -> bytes:
        """Return the payload with CRLF and CR replaced by LF, without waiting for an LF that may follow a CR."""
        if self._cr and payload.startswith(b"\n"):
            payload = payload[1:]
        self._cr = payload.endswith(b"\r")
        return payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in payload else payload

    def _whole_events(self, text: bytes) -> bytes:
        """Return what is held and `text`, up to the last blank line; hold the rest."""
        held = self._held
        if not held and text.endswith(b"\n\n"):
            return text
        searched = max(len(held) - 1, 0)
        held += text
        last = held.rfind(b"\n\n", searched)
        end = last + 2 if last >= 0 else 0
        whole = bytes(held[:end])
        del held[:end]
        if len(held) > self._max_event_bytes:
            raise self._too_large()
        return whole

    def _event(self, event: bytes) -> bytes:
        """Return what the client gets of one event: `event` itself wherever possible."""
        size = len(event)
        if size > self._max_event_bytes:
            raise self._too_large()
        if self._has_shape(event):
            return event
        if is_plain(event, size):
            self.events += 1
            self._read(event, event[6:])
            self._look_for_finish(event)
            return event
        if not self._begun:
            self._begun = True
            if not self.events:
                event = event.removeprefix(BOM)
        return self._unusual_event(event)

    def _unusual_event(self, event: bytes) -> bytes:
        """Return what the client gets of an event that isn't plain.

        That is a comment, the end, an error, usage, or unusual lines.
        """
        parsed = parse(event)
        if not parsed.data:
            return joined(parsed.comments)
        if parsed.data.startswith(b"[DONE]"):
            self.done = self._over = True
            return b""
        self.events += 1
        suspect = may_have(parsed.data, b'"error"') or may_have(parsed.data, b'"usage"')
        members = decode_members(parsed.data) if suspect else None
        self.error = error_in(parsed, members)
        if self.error is not None:
            self._over = True
        out = joined(parsed.lines) if self.error is None else b""
        if out:
            self._read(out, parsed.data)  # before its usage, which includes this text
            self._look_for_finish(out)
        report = find_report(members) if members is not None else None
        if members is None or report is None:
            return out
        self._note_usage(report, members)
        usage_only = not decode_value(members.get("choices"))
        if usage_only and self._hide_usage:
            return b""
        if out and not self._hide_usage and (usage_only or self._finished) and self.cost_so_far is not None:
            self.written_cost = self.cost_so_far()
            return with_cost(parsed, members, self.written_cost)
        return out

    def _count(self, event: bytes) -> None:
        """Count one plain event of a burst."""
        if not self._has_shape(event):
            self.events += 1
            self._read(event, event[6:])

    def _read(self, event: bytes, data: bytes) -> None:
        """Count an event's output, and learn its shape for the events after it."""
        if not self._sample and len(event) <= MAX_PLAIN_BYTES:
            self._sample = event
        if self._reads_tier and may_have(data, b'"service_tier"'):
            self.service_tier = decode_text((decode_members(data) or {}).get("service_tier"))
            self._reads_tier = self.service_tier is None
        output = read_output(data)
        if output.audio_chars:
            self._audio_chars += output.audio_chars
            audio = audio_tokens(self._audio_chars, self._audio_format) - self.audio_tokens
            self.audio_tokens += audio
            self._counted += audio
            self.most += audio
        if output.messages and not output.texts and not self._counted and not self._text:
            self._messages = output.messages
            self.most = max(self.most, sum(map(len, output.messages)))
        if output.texts:
            self._add(b"".join([escaped(text) for text in output.texts]), output.pieces)
            if self._shapes_learned * EVENTS_PER_SHAPE < self.events + FIRST_EVENTS and event.startswith(b"data: {"):
                self._shapes_learned += 1
                shape = shape_of(event, output)
                if shape is not None:
                    self._learn(shape)

    def _add(self, text: bytes, pieces: int) -> None:
        self._text += text
        self._pieces += pieces
        self.most += len(text)
        if self.most > self._flush_at:
            self._count_text()

    def _look_for_finish(self, text: bytes) -> None:
        if FINISH_REASON.search(text) is not None:
            self._finished = True
            if len(self._endings) < MAX_ENDINGS:
                events = [event for event in text.split(b"\n\n") if FINISH_REASON.search(event) is not None]
                self._endings += [event for event in events if len(event) <= MAX_PLAIN_BYTES]

    def _note_usage(self, report: Report, members: dict[str, Raw]) -> None:
        """Merge a report, and note how much text it covers."""
        self.report = report.over(self.report)
        if report.counts_output:
            self._reported_at = self._counted + len(self._text)
        self._model = decode_text(members.get("model")) or self._model

    def _too_large(self) -> UpstreamError:
        self._over = True
        self._plain = False
        self._held.clear()
        response = upstream_error(
            f"The provider sent an event of more than {self._max_event_bytes} bytes.", may_have_run=True
        )
        return UpstreamError(response, safe_to_repeat=False, unreadable=True)
