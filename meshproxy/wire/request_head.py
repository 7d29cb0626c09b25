"""The head of the request that nearly every client sends: a POST over HTTP/1.1 with a body of a known length.

It is read in the one way that RFC 9112 leaves open. Whatever is wrong, or merely unusual, is None here, and for a parser of all
of HTTP to judge: nothing is refused, and nothing is guessed.
"""

import re

MAX_HEAD_BYTES = 16_384
MAX_FIELDS = 128
MAX_LENGTH_DIGITS = 15

# One field line (RFC 9112, section 5) with the line end before it; the one behind it is looked at and left for the next. No
# control characters, no folding, no space before the colon.
_FIELD = re.compile(r"\r\n([!#$%&'*+\-.^_`|~0-9A-Za-z]++):[ \t]*+([\t\x20-\x7e]*+)(?=\r\n)")
_UNUSUAL = frozenset({"transfer-encoding", "expect", "upgrade"})
_CONNECTION = frozenset({"keep-alive", "close"})


def usual_head(head: bytes, request_line: bytes) -> dict[str, str] | None:
    """The fields of a head, by lower-case name, if it is a usual one for this request line (which ends in CRLF).

    It is usual if each line up to the empty one is a field, none comes twice, and among them are a host and the body's length.
    """
    if not (head.startswith(request_line) and head.endswith(b"\r\n\r\n") and head.isascii()):
        return None
    text = head.decode("ascii")
    fields = {name.lower(): value.rstrip(" \t") for name, value in _FIELD.findall(text)}
    is_usual = (
        len(fields) == text.count("\r\n") - 2 <= MAX_FIELDS
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
