"""One event of a provider's stream: whether it is plain, and if not, what its lines say. Nothing of the stream around it."""

import re
from typing import Any, Final

from msgspec import Raw, Struct
from msgspec.json import encode

from meshproxy.wire.output import Output, escaped
from meshproxy.wire.usage import decode_text, decode_value

FINISH_REASON: Final = re.compile(rb'"finish_reason"\s*:\s*"[^"]')

_LF: Final = 10
_CR: Final = 13
_NULL_MEMBER: Final = (b":null", b": null")
# OpenAI pads events to hide the length of their text (`stream_options.include_obfuscation` of the API reference).
_PADDING: Final = b'"obfuscation":"'
_PADDED_END: Final = re.compile(rb'"obfuscation":"[A-Za-z0-9]*"\}\n\n')


class Shape(Struct, frozen=True):
    """The bytes of a stream's usual event around the one text in it. `padded`: after `after` comes padding of any length."""

    before: bytes
    after: bytes
    padded: bool


def shape_of(event: bytes, output: Output) -> Shape | None:
    """Learn the shape of a plain event. None if it has no text or several, or ends its choice."""
    if len(output.texts) != 1 or output.audio_chars or FINISH_REASON.search(event) is not None:
        return None
    text = b'"%b"' % escaped(output.texts[0])
    at = event.find(text)
    if at < 0 or event.rfind(text) != at:  # escaped in another way, or also elsewhere: perhaps a copy
        return None
    after = event[at + len(text) - 1 :]
    padding = _PADDED_END.search(after)
    if padding is None:
        return Shape(event[: at + 1], after, padded=False)
    if padding.end() != len(after):
        return None
    return Shape(event[: at + 1], after[: padding.start() + len(_PADDING)], padded=True)


class Event(Struct):
    """One parsed event: its data, its `event:` name, and its lines without those that are dropped."""

    data: bytes
    name: bytes
    lines: list[bytes]
    comments: list[bytes]


def is_plain(event: bytes, size: int) -> bool:
    """Whether this is one whole event of one line of data, with neither usage nor an error in it.

    A quote inside a JSON string is escaped, so text that only speaks of "usage" doesn't look like a member of that name. This
    runs for every event of every stream: `rfind` and `in` with an integer are what is cheapest on bytes.
    """
    return (
        event.startswith(b"data: {")
        and event.find(b"\n") == size - 2
        and event[-1] == _LF
        and _CR not in event
        and event.rfind(b'"error"') < 0
        and ((at := event.rfind(b'"usage"')) < 0 or _only_null(event, b'"usage"', at))
    )


def bears(text: bytes, member: bytes) -> bool:
    """Whether a member may be there and not null."""
    at = text.rfind(member)
    return at >= 0 and not _only_null(text, member, at)


def _only_null(text: bytes, member: bytes, at: int) -> bool:
    """Whether the member found at `at` is null, and the only one of its name: what some providers put on every event."""
    return text.startswith(_NULL_MEMBER, at + len(member)) and text.find(member, 0, at) < 0


def parse(event: bytes) -> Event:
    """An event of whole lines that end in LF."""
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
    """The event of these lines; nothing where there are none."""
    return b"\n".join(lines) + b"\n\n" if lines else b""


def with_cost(event: Event, members: dict[str, Raw], cost_usd: str) -> bytes:
    """The event with the member `cost` beside its `usage`, a decimal string as Mesh's SDKs read it."""
    cost = b'"cost":"%b"' % cost_usd.encode()
    if "cost" not in members and event.data.endswith(b"}"):
        data = b"%b,%b}" % (event.data[:-1].replace(b"\n", b" "), cost)
    else:
        own = [b"%b:%b" % (encode(name), bytes(value)) for name, value in members.items() if name != "cost"]
        data = b"{%b}" % b",".join([*own, cost])
    return joined([*(line for line in event.lines if not line.startswith(b"data")), b"data: " + data])


def error_in(event: Event, members: dict[str, Raw] | None) -> dict[str, Any] | None:
    """The error of an event: the member `error` (OpenAI, OpenRouter), an object that calls itself one (vLLM), or whatever the
    data of an `event: error` is.
    """
    members = members or {}
    error = decode_value(members.get("error"))
    if not error and (event.name == b"error" or decode_text(members.get("object")) == "error"):
        error = decode_value(event.data) or event.data.decode(errors="replace")
    if not error:
        return None
    return error if isinstance(error, dict) else {"message": str(error)}
