"""One event of a provider's stream: its kind and its parts; and conversion between whole answers and event streams.

No state of a stream is kept here: see `event_stream`.
"""

import json
import re
from typing import Any, Final, Literal, NamedTuple

from msgspec import Raw, Struct
from msgspec.json import encode

from meshproxy.openai.output import Output, escaped, read_output
from meshproxy.openai.usage import BOM, Report, decode_members, decode_text, decode_value, find_report

FINISH_REASON: Final = re.compile(rb'"finish_reason"\s*:\s*"[^"]')

_LF: Final = 10
_CR: Final = 13
_NULL_MEMBER: Final = (b":null", b": null")
# OpenAI pads events to hide the length of their text (`stream_options.include_obfuscation` of the API reference).
_PADDING: Final = b'"obfuscation":"'
_PADDED_END: Final = re.compile(rb'"obfuscation":"[A-Za-z0-9]*"\}\n\n')


class Shape(Struct, frozen=True):
    """The bytes of a stream's usual event around its one text. `padded`: padding of any length follows `after`."""

    before: bytes
    after: bytes
    padded: bool


def shape_of(event: bytes, output: Output) -> Shape | None:
    """Learn the shape of a plain event. None if it has no text or several, or ends its choice."""
    if len(output.texts) != 1 or output.audio_chars or FINISH_REASON.search(event) is not None:
        return None
    text = b'"%b"' % escaped(output.texts[0])
    at = event.find(text)
    if at < 0 or event.rfind(text) != at:  # escaped in another way, or in the event twice, perhaps as a copy
        return None
    after = event[at + len(text) - 1 :]
    padding = _PADDED_END.search(after)
    if padding is None:
        return Shape(event[: at + 1], after, padded=False)
    if padding.end() != len(after):
        return None
    return Shape(event[: at + 1], after[: padding.start() + len(_PADDING)], padded=True)


class Event(Struct):
    """One parsed event: its data, its `event:` name, its lines without the dropped ones, and its comments."""

    data: bytes
    name: bytes
    lines: list[bytes]
    comments: list[bytes]


def is_plain(event: bytes, size: int) -> bool:
    """Return whether this is one whole event, of one data line, with neither usage nor an error.

    A quote inside a JSON string is escaped, so a text that mentions "usage" doesn't look like a member of that name.
    This runs for every event of every stream: `rfind`, and `in` with an integer, are the cheapest operations on bytes.
    """
    return (
        event.startswith(b"data: {")
        and event.find(b"\n") == size - 2
        and event[-1] == _LF
        and _CR not in event
        and event.rfind(b'"error"') < 0
        and ((at := event.rfind(b'"usage"')) < 0 or _only_null(event, b'"usage"', at))
    )


def begins_plainly(payload: bytes) -> bool:
    """Return whether a stream's first bytes begin with a whole plain event."""
    size = payload.find(b"\n\n") + 2
    return is_plain(payload if size == len(payload) else payload[:size], size)


def may_have(text: bytes, member: bytes) -> bool:
    """Return whether a member may be present and not null."""
    at = text.rfind(member)
    return at >= 0 and not _only_null(text, member, at)


def _only_null(text: bytes, member: bytes, at: int) -> bool:
    """Return whether the member at `at` is null and alone of its name: some providers write that in every event."""
    return text.startswith(_NULL_MEMBER, at + len(member)) and text.find(member, 0, at) < 0


def parse(event: bytes) -> Event:
    """Parse an event of whole lines that end in LF."""
    data: list[bytes] = []
    name = b""
    lines: list[bytes] = []
    comments: list[bytes] = []
    for line in event.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.strip()
        elif line.startswith(b":"):
            comments.append(line)
        else:
            continue
        lines.append(line)
    return Event(b"\n".join(data).strip(), name, lines, comments)


def joined(lines: list[bytes]) -> bytes:
    """Join these lines into an event; empty if there are none."""
    return b"\n".join(lines) + b"\n\n" if lines else b""


def with_cost(event: Event, members: dict[str, Raw], cost_usd: str) -> bytes:
    """Return the event with a member `cost` beside its `usage`: a decimal string in USD, as Mesh's SDKs read it."""
    cost = b'"cost":"%b"' % cost_usd.encode()
    if "cost" not in members and event.data.endswith(b"}"):
        data = b"%b,%b}" % (event.data[:-1].replace(b"\n", b" "), cost)
    else:
        own = [b"%b:%b" % (encode(name), bytes(value)) for name, value in members.items() if name != "cost"]
        data = b"{%b}" % b",".join([*own, cost])
    return joined([*(line for line in event.lines if not line.startswith(b"data")), b"data: " + data])


def error_in(event: Event, members: dict[str, Raw] | None) -> dict[str, Any] | None:
    """Return the error of an event; None without one.

    It is the member `error` (OpenAI, OpenRouter), an object whose `object` is `error` (vLLM), or the data of an `event:
    error`.
    """
    members = members or {}
    error = decode_value(members.get("error"))
    if not error and (event.name == b"error" or decode_text(members.get("object")) == "error"):
        error = decode_value(event.data) or event.data.decode(errors="replace")
    if not error:
        return None
    return error if isinstance(error, dict) else {"message": str(error)}


FORM_BYTES: Final = 64  # of a body, enough to recognise its form

_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")  # the beginnings of an event stream's lines
_ONCE: Final = frozenset({"role", "id", "type", "name", "object", "format", "index"})  # sent whole, even if repeated

Form = Literal["stream", "json", "other"]


def form_of(beginning: bytes) -> Form | None:
    """Return a body's form by its first bytes, whatever its content type; None while there are too few."""
    if BOM.startswith(beginning):
        return None
    text = beginning.removeprefix(BOM).lstrip()
    if text.startswith(b"{"):
        return "json"
    if text.startswith(_FIELDS):
        return "stream"
    return None if any(field.startswith(text) for field in _FIELDS) else "other"


def as_stream(body: bytes) -> bytes:
    """Convert a whole answer into events: one with all choices, one with the usage, and `[DONE]`."""
    members = {name: decode_value(raw) for name, raw in (decode_members(body) or {}).items()}
    usage = members.pop("usage", None)
    choices = members.pop("choices", None)
    deltas = [_delta(choice) for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    chunk = {**members, "object": "chat.completion.chunk", "choices": deltas}
    events = [chunk] if usage is None else [chunk, {**chunk, "choices": [], "usage": usage}]
    return b"".join([*(b"data: " + _encoded(event) + b"\n\n" for event in events), b"data: [DONE]\n\n"])


class Whole(NamedTuple):
    """A whole answer made of an event stream.

    `error` is the error in the stream, `is_complete` whether it came to its end. `report`: the reports of usage in it, the
    last one over those before. `is_outdated`: text came after the last.
    """

    body: bytes
    error: Any
    is_complete: bool
    report: Report | None = None
    is_outdated: bool = False


def as_whole(body: bytes) -> Whole:
    """Merge an event stream into a whole answer. Zeros of a later report don't replace the numbers of an earlier one."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    report: Report | None = None
    done = is_outdated = False
    for event in body.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        parsed = parse(event)
        if parsed.data.startswith(b"[DONE]"):
            done = True
            break
        members = decode_members(parsed.data)
        error = error_in(parsed, members)
        if error is not None:
            return Whole(b"", error, is_complete=False)
        if members is None:
            continue
        found = find_report(members)
        if found is not None:
            report = found.over(report)
        if found is not None and found.counts_output:
            is_outdated = False
        elif not is_outdated and read_output(parsed.data).texts:
            is_outdated = True
        values = {name: decode_value(raw) for name, raw in members.items()}
        usage = values.get("usage")
        if isinstance(usage, dict) and isinstance(whole.get("usage"), dict):
            values["usage"] = whole["usage"] | {name: value for name, value in usage.items() if value}
        for choice in _dicts(values.pop("choices", None)):
            _add_choice(choices, choice)
        whole.update({name: value for name, value in values.items() if value is not None})
    finished = done or any(choice.get("finish_reason") for choice in choices.values())
    whole["object"] = "chat.completion"
    whole["choices"] = [_finished(choice) for _, choice in sorted(choices.items())]
    return Whole(_encoded(whole), None, finished, report, is_outdated)


class _Pieces(list[str]):
    """A string that grows by pieces."""


def _add_choice(choices: dict[int, dict[str, Any]], choice: dict[str, Any]) -> None:
    """Merge a choice of one event into the choices so far."""
    index = choice.get("index")
    index = index if isinstance(index, int) else 0
    known = choices.setdefault(index, {"index": index, "message": {"role": "assistant", "content": None}})
    for name, value in choice.items():
        if name == "delta" and isinstance(value, dict):
            _merge(known["message"], value)
        elif name == "logprobs" and isinstance(value, dict):
            known["logprobs"] = known.get("logprobs") or {}
            _merge(known["logprobs"], value)
        elif value is not None and name != "delta":
            known[name] = value


def _merge(known: dict[str, Any], delta: dict[str, Any]) -> None:
    """Merge a delta: texts are appended, lists are appended or merged by their items' `index`, objects are merged."""
    for name, value in delta.items():
        old = known.get(name)
        if value is None:
            known.setdefault(name, None)
        elif isinstance(value, str) and name not in _ONCE:
            if not isinstance(old, _Pieces):
                known[name] = old = _Pieces()
            old.append(value)
        elif isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        elif isinstance(value, dict):
            known[name] = {}
            _merge(known[name], value)
        elif isinstance(value, list):
            if not isinstance(old, list) or isinstance(old, _Pieces):
                known[name] = old = []
            _extend(old, value)
        else:
            known[name] = value


def _extend(known: list[Any], items: list[Any]) -> None:
    """Extend a list; an item with an `index` is merged into the known item of that index."""
    places = {item["index"]: item for item in known if isinstance(item, dict) and isinstance(item.get("index"), int)}
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("index"), int):
            place = places.get(item["index"])
            if place is None:
                place = places[item["index"]] = {}
                known.append(place)
            _merge(place, item)
        else:
            known.append(item)


def _finished(value: Any) -> Any:
    """Return the merged value as plain JSON types. A tool call's `index` is dropped: only streams have it."""
    if isinstance(value, _Pieces):
        return "".join(value)
    if isinstance(value, dict):
        found = {name: _finished(item) for name, item in value.items()}
        for call in _dicts(found.get("tool_calls")):
            call.pop("index", None)
        return found
    return [_finished(item) for item in value] if isinstance(value, list) else value


def _delta(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a whole answer's choice as a streamed one."""
    message = choice.get("message")
    delta = dict(message) if isinstance(message, dict) else {}
    calls = _dicts(delta.get("tool_calls"))
    if calls:
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return {**{name: value for name, value in choice.items() if name != "message"}, "delta": delta}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _encoded(value: Any) -> bytes:
    """Encode JSON in ASCII: lone surrogates are kept as they are, and nothing in it can end an event."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")
