"""Whole answers as event streams and event streams as whole answers: for a provider that sends the one where the other was asked
for. The answer was paid for, so its form is no reason to lose it.
"""

import json
from typing import Any, Final, Literal

from meshproxy.wire.event import error_in, parse
from meshproxy.wire.usage import decode_members, decode_value

LOOK_BYTES: Final = 64  # of a body, to tell its form

_BOM: Final = b"\xef\xbb\xbf"
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")  # how a line of an event stream begins
_ONCE: Final = frozenset({"role", "id", "type", "name", "object", "format", "index"})  # said whole, however often

Form = Literal["stream", "json", "other"]


def form_of(beginning: bytes) -> Form | None:
    """Tell a body's form from its first bytes, whatever its content-type says; None while there are too few."""
    text = beginning.removeprefix(_BOM).lstrip()
    if text.startswith(b"{"):
        return "json"
    if text.startswith(_FIELDS):
        return "stream"
    return None if any(field.startswith(text) for field in _FIELDS) else "other"


def as_stream(body: bytes) -> bytes:
    """Return the events of a whole answer: one with all choices, one with the usage, and `[DONE]`."""
    members = {name: decode_value(raw) for name, raw in (decode_members(body) or {}).items()}
    usage = members.pop("usage", None)
    choices = members.pop("choices", None)
    deltas = [_delta(choice) for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    chunk = {**members, "object": "chat.completion.chunk", "choices": deltas}
    events = [chunk] if usage is None else [chunk, {**chunk, "choices": [], "usage": usage}]
    return b"".join([*(b"data: " + _encoded(event) + b"\n\n" for event in events), b"data: [DONE]\n\n"])


def as_whole(body: bytes) -> tuple[bytes, Any, bool]:
    """Return the whole answer that an event stream adds up to, the error in it, and whether it came to its end."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    done = False
    for event in body.removeprefix(_BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        parsed = parse(event)
        if parsed.data.startswith(b"[DONE]"):
            done = True
            break
        members = decode_members(parsed.data)
        if members is None:
            continue
        error = error_in(parsed, members)
        if error is not None:
            return b"", error, False
        values = {name: decode_value(raw) for name, raw in members.items()}
        for choice in _dicts(values.pop("choices", None)):
            _add_choice(choices, choice)
        whole.update({name: value for name, value in values.items() if value is not None})
    finished = done or any(choice.get("finish_reason") for choice in choices.values())
    whole["object"] = "chat.completion"
    whole["choices"] = [_finished(choice) for _, choice in sorted(choices.items())]
    return _encoded(whole), None, finished


class _Pieces(list[str]):
    """A string that grows."""


def _add_choice(choices: dict[int, dict[str, Any]], choice: dict[str, Any]) -> None:
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
    """Add a delta: texts grow, lists grow or are merged by their items' `index`, objects are merged."""
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
    """What was gathered, as JSON's own types. The `index` of a tool call is one of streams alone."""
    if isinstance(value, _Pieces):
        return "".join(value)
    if isinstance(value, dict):
        found = {name: _finished(item) for name, item in value.items()}
        for call in _dicts(found.get("tool_calls")):
            call.pop("index", None)
        return found
    return [_finished(item) for item in value] if isinstance(value, list) else value


def _delta(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    delta = dict(message) if isinstance(message, dict) else {}
    calls = _dicts(delta.get("tool_calls"))
    if calls:
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return {**{name: value for name, value in choice.items() if name != "message"}, "delta": delta}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _encoded(value: Any) -> bytes:
    """JSON in ASCII: lone surrogates stay what they were, and nothing in it can end an event."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")
