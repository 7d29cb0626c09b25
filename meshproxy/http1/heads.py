"""Heads of HTTP/1.1 messages: a request's usual head for the fast path, and every response's head (RFC 9112). No I/O.

Parsing is strict: a request head that is unusual in any way gives None, and a response head that is invalid raises
UpstreamError. Heads are bounded in bytes, fields and interim answers.
"""

import re

from msgspec import Struct

from meshproxy.http1.framing import FIELD_TEXT, Body, Chunked, Sized, UntilEof, field_lines, malformed

MAX_HEAD_BYTES = 16_384
MAX_FIELDS = 128
MAX_LENGTH_DIGITS = 15

_UNUSUAL = frozenset({"transfer-encoding", "expect", "upgrade"})
_CONNECTION = frozenset({"keep-alive", "close"})


def parse_usual_head(head: bytes, request_line: bytes) -> dict[str, str] | None:
    """Return the fields of a usual request head by lower-case name; None for any other, which needs a full HTTP parser.

    Usual is: this request line (which ends in CRLF), ASCII, a host, the body's length, and no field twice.
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
    """Return whether an incomplete head may still become a usual one for this request line."""
    return len(beginning) <= MAX_HEAD_BYTES and beginning.startswith(request_line[: len(beginning)])


def _is_length(text: str) -> bool:
    return text.isdigit() and len(text) <= MAX_LENGTH_DIGITS


MAX_RESPONSE_HEAD_BYTES = 65_536
MAX_INTERIM_HEADS = 16  # 1xx responses before the final one

# Status codes outside 100..599 are invalid (RFC 9110, section 15). Some servers omit the space before an empty reason.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: " + FIELD_TEXT + rb")?\r\n")
_BEGINNING = b"HTTP/1."


class Head(Struct):
    """A response's head. Header names are lower-case; `keep_alive`: the connection may be used again after the body."""

    status: int
    headers: list[tuple[str, str]]
    body: Body
    keep_alive: bool


class HeadReader:
    """Collects bytes until a final response's head is complete. Can be reused for the next response."""

    def __init__(self) -> None:
        self._held = b""
        self._interim = 0

    def feed(self, data: bytes) -> tuple[Head, bytes] | None:
        """Return the head and the bytes after it; None until it is complete.

        Raises UpstreamError if it can't be a head.
        """
        if self._held:
            data = self._held + data
        while (end := data.find(b"\r\n\r\n", 0, MAX_RESPONSE_HEAD_BYTES)) >= 0:
            head = parse_head(data[: end + 4])
            data = data[end + 4 :]
            if head.status >= 200:
                self._held, self._interim = b"", 0
                return head, data
            self._count_interim(head.status)
        if len(data) >= MAX_RESPONSE_HEAD_BYTES:
            raise malformed("the head of its answer is too long")
        if not data.startswith(_BEGINNING[: len(data)]):
            raise malformed("this is no HTTP/1.1 answer")
        self._held = data
        return None

    def _count_interim(self, status: int) -> None:
        if status == 101:
            raise malformed("it switched protocols unasked")
        self._interim += 1
        if self._interim > MAX_INTERIM_HEADS:
            raise malformed("too many interim answers")


def parse_head(raw: bytes) -> Head:
    """Parse one head, from the status line to the empty line. Raises UpstreamError if it is invalid."""
    status_line = _STATUS_LINE.match(raw)
    if status_line is None:
        raise malformed("its answer has no valid status line")
    status, is_http_11 = int(status_line[2]), status_line[1] == b"1"
    headers = field_lines(raw.decode("latin-1"))
    if headers is None:
        raise malformed("the head of its answer has a line that is no header")
    codings, lengths, options = [], [], []
    for name, value in headers:
        if name == "content-length":
            lengths.append(value)
        elif name == "transfer-encoding":
            codings.append(value.lower())
        elif name == "connection":
            options += [option.strip() for option in value.lower().split(",")]
    body = _framing(status, codings, lengths, is_http_11=is_http_11)
    is_kept = "close" not in options and (is_http_11 or "keep-alive" in options)  # RFC 9112 section 9.3
    return Head(status, headers, body, is_kept and not body.until_eof)


def _framing(status: int, codings: list[str], lengths: list[str], *, is_http_11: bool) -> Body:
    """Return the body's framing for the response to a POST (RFC 9112, section 6.3)."""
    if codings and (lengths or not is_http_11 or codings != ["chunked"]):
        raise malformed("it says in two ways, or in none that is known, how long its answer is")
    if status < 200 or status in {204, 304}:
        return Sized(0)
    if codings:
        return Chunked()
    if lengths:
        return Sized(_length(lengths))
    return UntilEof()


def _length(values: list[str]) -> int:
    """Return the Content-Length, of decimal digits. Equal ones are one (RFC 9112, section 6.3, item 5)."""
    length, *others = {value.strip(" \t") for listed in values for value in listed.split(",")}
    if others or not (length.isascii() and length.isdigit()) or len(length) > MAX_LENGTH_DIGITS:
        raise malformed("its content-length is no number")
    return int(length)
