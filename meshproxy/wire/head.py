"""Heads of HTTP/1.1 messages, read in the one way that RFC 9112 leaves open: what isn't plainly right is None."""

import re

MAX_HEAD_BYTES = 16_384
MAX_FIELDS = 128
MAX_LENGTH_DIGITS = 15

# One field line (RFC 9112, section 5) with the line end before it; the one behind it is looked at and left for the next. No
# control characters, no folding, no space before the colon.
_FIELD = re.compile(r"\r\n([!#$%&'*+\-.^_`|~0-9A-Za-z]++):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)(?=\r\n)")
_UNUSUAL = frozenset({"transfer-encoding", "expect", "upgrade"})
_CONNECTION = frozenset({"keep-alive", "close"})


def field_lines(head: str) -> list[tuple[str, str]] | None:
    """The fields of a head with its first and its empty line, names in lower case, if every other line is one."""
    fields = [(name.lower(), value.rstrip(" \t")) for name, value in _FIELD.findall(head)]
    return fields if len(fields) == head.count("\r\n") - 2 else None


def usual_head(head: bytes, request_line: bytes) -> dict[str, str] | None:
    """The fields of the head that nearly every client sends, by lower-case name: of this request line (which ends in CRLF), in
    ASCII, with a host and its body's length, and no field twice. Any other is for a parser of all of HTTP to judge.
    """
    if not (head.startswith(request_line) and head.endswith(b"\r\n\r\n") and head.isascii()):
        return None
    lines = field_lines(head.decode("ascii"))
    if lines is None:
        return None
    fields = dict(lines)
    is_usual = (
        len(fields) == len(lines) <= MAX_FIELDS
        and "host" in fields
        and _is_length(fields.get("content-length", ""))
        and fields.get("connection", "close").lower() in _CONNECTION
        and _UNUSUAL.isdisjoint(fields)
    )
    return fields if is_usual else None


def may_become_usual(beginning: bytes, request_line: bytes) -> bool:
    """Whether a head that begins like this, and isn't all there, may still be one for this request line."""
    return len(beginning) <= MAX_HEAD_BYTES and beginning.startswith(request_line[: len(beginning)])


def _is_length(text: str) -> bool:
    return text.isdigit() and len(text) <= MAX_LENGTH_DIGITS
