"""The scanner of a provider's event stream: what may go to the client now, and what was seen on the way.

Events pass as the very bytes they came in. No JSON is decoded but that of an event which bears usage or an error. Lines end
in LF; what OpenAI's SDKs choke on (`id:`, `retry:`, an `event:` without data, empty data) is dropped; `[DONE]` is swallowed,
for whoever relays writes it after a good end. The format: WHATWG HTML, "Server-sent events", 9.2.6.
"""

import re
from typing import Any, Final

from msgspec import Raw

from meshproxy.errors import UpstreamFault, upstream_error
from meshproxy.wire.event import bears, error_in, is_plain, joined, parse
from meshproxy.wire.usage import Report, decode_members, decode_text, decode_value, find_report

PING: Final = b": ping\n\n"
DONE: Final = b"data: [DONE]\n\n"

MAX_EVENT_BYTES: Final = 1_048_576  # an event larger than this is no event of a chat
MAX_PLAIN_BYTES: Final = 16_384  # larger ones take the slow path, so that the one that is kept stays small

_BOM: Final = b"\xef\xbb\xbf"
_LF: Final = 10
_UNFINISHED: Final = b'"finish_reason":null'  # as OpenAI writes it, and most others
_FINISH_REASON: Final = re.compile(rb'"finish_reason"\s*:\s*"[^"]')


class StreamScanner:
    """One stream's scanner. `hide_usage` holds back the usage-only event, for a client that didn't ask for it.

    `events`: data events seen, without `[DONE]`. `report`: what was reported, all events together. `done`: `[DONE]` was seen.
    `error`: what the provider sent instead of going on; neither that event nor anything after it is forwarded.

    `tokens` estimates the output so far: one for each event, and one for every 4 bytes by which an event is larger than the
    smallest one seen (its envelope), where that is more. So it is right where an event is one token of ordinary length, about
    right where a provider puts several tokens of English into one event, up to a third too low for batched Chinese or
    Japanese (3 bytes a token), and several times too high for escaped text and for logprobs.
    """

    __slots__ = (
        "_begun",
        "_cr",
        "_envelope",
        "_finished",
        "_held",
        "_hide_usage",
        "_model",
        "_over",
        "_plain",
        "_sample",
        "done",
        "error",
        "events",
        "report",
        "tokens",
    )

    def __init__(self, *, hide_usage: bool) -> None:
        self.events = 0
        self.tokens = 0
        self.report: Report | None = None
        self.done = False
        self.error: dict[str, Any] | None = None
        self._hide_usage = hide_usage
        self._begun = False
        self._cr = False  # the last byte was CR, so an LF that follows belongs to it
        self._held = bytearray()  # the beginning of an event
        self._plain = True  # nothing is held and the stream isn't over
        self._over = False
        self._envelope = MAX_EVENT_BYTES
        self._finished = False
        self._sample = b""  # the first event that isn't large
        self._model: str | None = None

    def feed(self, payload: bytes) -> bytes:
        """What may go to the client now: whole events only, and `payload` itself (the same object) when it is nothing else.

        UpstreamFault for an event of more than 1 MiB.
        """
        size = len(payload)
        if self._plain and size <= MAX_PLAIN_BYTES and is_plain(payload, size):
            self.events += 1
            if size < self._envelope:  # noqa: PLR1730 - min() costs a fifth of the whole call
                self._envelope = size
            self.tokens += (size - self._envelope) // 4 or 1
            if self.events == 1:
                self._sample = payload
            if payload.rfind(_UNFINISHED) < 0:
                self._look_for_finish(payload)
            return payload
        return self._scan(payload)

    def finish(self) -> bytes:
        """The upstream's body has ended: what may still go out, which is an event that only lacks its blank line."""
        held = bytes(self._held)
        self._held.clear()
        data = parse(held).data
        if self._over or not (data.startswith(b"[DONE]") or decode_members(data) is not None):
            return b""
        return self._event(held + b"\n\n")

    @property
    def complete(self) -> bool:
        """Whether the stream came to a good end: `[DONE]`, or at least a finish reason. Ask at the end."""
        return self.done or self._finished

    @property
    def reported_model(self) -> str | None:
        """The model that the provider says it used. Decodes an event; ask at the end."""
        if self._model is None and self._sample:
            members = decode_members(parse(self._sample).data) or {}
            return decode_text(members.get("model"))
        return self._model

    def _scan(self, payload: bytes) -> bytes:
        if self._over or not payload:
            return b""
        text = self._whole_events(self._with_lf(payload))
        out = text if self._are_plain(text) else self._by_event(text)
        self._plain = not self._held and not self._over
        return payload if out == payload else out

    def _are_plain(self, text: bytes) -> bool:
        """Whether these whole events, as they come in a burst, are plain every one of them. If so they are counted."""
        if not text.startswith(b"data: {") or text.rfind(b'"error"') >= 0 or text.rfind(b'"usage"') >= 0:
            return False
        lines = text.split(b"\n")
        events = lines[:-1:2]
        count = len(events)
        if any(lines[1::2]) or text.count(b"\n\ndata: {") != count - 1 or len(text) > MAX_EVENT_BYTES:
            return False
        self.events += count
        for event in events:
            self._count(event, len(event) + 2)
        if text.count(_UNFINISHED) < text.count(b'"finish_reason"'):
            self._look_for_finish(text)
        return True

    def _by_event(self, text: bytes) -> bytes:
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
        """CRLF and CR as LF, without waiting for an LF that may follow a CR."""
        if self._cr and payload.startswith(b"\n"):
            payload = payload[1:]
        self._cr = payload.endswith(b"\r")
        return payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in payload else payload

    def _whole_events(self, text: bytes) -> bytes:
        """What is held and `text`, up to the last blank line; the rest is held."""
        held = self._held
        if not held and text.endswith(b"\n\n"):
            return text
        searched = max(len(held) - 1, 0)
        held += text
        last = held.rfind(b"\n\n", searched)
        end = last + 2 if last >= 0 else 0
        whole = bytes(held[:end])
        del held[:end]
        if len(held) > MAX_EVENT_BYTES:
            raise self._too_large()
        return whole

    def _event(self, event: bytes) -> bytes:
        """What the client gets of one event, which is `event` itself wherever it can be."""
        size = len(event)
        if size > MAX_EVENT_BYTES:
            raise self._too_large()
        if is_plain(event, size):
            self.events += 1
            self._count(event, size)
            self._look_for_finish(event)
            return event
        if not self._begun:
            self._begun = True
            if not self.events:
                event = event.removeprefix(_BOM)
        return self._odd_event(event)

    def _odd_event(self, event: bytes) -> bytes:
        parsed = parse(event)
        if not parsed.data:
            return joined(parsed.comments)
        if parsed.data.startswith(b"[DONE]"):
            self.done = self._over = True
            return b""
        self.events += 1
        suspect = bears(parsed.data, b'"error"') or bears(parsed.data, b'"usage"')
        members = decode_members(parsed.data) if suspect else None
        self.error = error_in(parsed, members)
        if self.error is not None:
            self._over = True
        usage_only = members is not None and self._note_usage(members)
        if self.error is not None or (usage_only and self._hide_usage):
            return b""
        out = joined(parsed.lines)
        if not usage_only:
            self._count(out, len(out))
            self._look_for_finish(out)
        return out

    def _count(self, event: bytes, size: int) -> None:
        if size < self._envelope:  # noqa: PLR1730 - as in feed()
            self._envelope = size
        self.tokens += (size - self._envelope) // 4 or 1
        if not self._sample and size <= MAX_PLAIN_BYTES:
            self._sample = event

    def _look_for_finish(self, event: bytes) -> None:
        self._finished = self._finished or _FINISH_REASON.search(event) is not None

    def _note_usage(self, members: dict[str, Raw]) -> bool:
        """Note the usage of an event; whether the event has nothing else."""
        report = find_report(members)
        if report is None:
            return False
        self.report = report.over(self.report)
        self._model = decode_text(members.get("model")) or self._model
        return not decode_value(members.get("choices"))

    def _too_large(self) -> UpstreamFault:
        self._over = True
        self._plain = False
        self._held.clear()
        problem = upstream_error(f"The provider sent an event of more than {MAX_EVENT_BYTES} bytes.", may_have_run=True)
        return UpstreamFault(problem, safe_to_repeat=False)
