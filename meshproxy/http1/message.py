"""Messages of HTTP/1.1 (RFC 9112): heads in both directions, field lines, and the framing of bodies. No I/O.

Each kind of framing is a `Body`: it is fed what the socket delivered, in pieces of any size, and returns the payload in
them. A payload is returned as it comes; only an unfinished line of the framing itself is kept, and its length is
bounded. A chunked body goes through the states of `_Phase`.

Parsing is strict: a request head that is unusual in any way gives None, and a response head that is invalid raises
UpstreamError. Heads are bounded in bytes, fields and interim answers.
"""

import re
import zlib
from enum import IntEnum
from typing import Final

from msgspec import Struct

from meshproxy.errors import Phase, UpstreamError, upstream_error

# One field line (RFC 9112, section 5) with the line end before it; the line end after it is left for the next match. No
# control characters, no folding, no space before the colon.
_FIELD = re.compile(r"\r\n([!#$%&'*+\-.^_`|~0-9A-Za-z]++):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)(?=\r\n)")
MAX_CHUNK_LINE_BYTES = 4096
MAX_EXTENSION_BYTES = 65_536  # of one body, all chunks together; the gateway reads no extension
MAX_TRAILER_BYTES = 16_384
# The most that one read of a compressed body may inflate to: as much as the largest event. Deflate reaches 1032:1
# (zlib.net, "Technical Details"), and a read is usually 64 KiB.
MAX_INFLATED_BYTES = 16_777_216
INFLATED: Final = frozenset({"gzip", "x-gzip", "deflate"})  # RFC 9110 section 8.4.1

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # RFC 9110 section 5.6.2
FIELD_TEXT = rb"[\t\x20-\x7e\x80-\xff]*+"  # field-content and the spaces around it, section 5.5

_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*+"'
_EXTENSIONS = rb"(?:[ \t]*+;[ \t]*+" + TOKEN + rb"(?:[ \t]*+=[ \t]*+(?:" + TOKEN + rb"|" + _QUOTED + rb"))?+)*+"
_PLAIN_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(" + _EXTENSIONS + rb")\r\n")


class Body:
    """The framing of one body.

    `done`: the body is complete. `surplus`: bytes came after its end. `whole`: the last piece fed was whole chunks and
    nothing else, so it can be passed on unchanged to a peer that is sent chunks. `until_eof`: the body ends only with
    the connection.
    """

    done = surplus = whole = until_eof = False

    def decode(self, data: bytes) -> bytes:
        """Return the payload in `data`, which may be empty. Raises UpstreamError if the framing is broken."""
        raise NotImplementedError


class UntilEof(Body):
    """A body with neither a length nor chunks: it ends with the connection."""

    until_eof = True

    def decode(self, data: bytes) -> bytes:
        """Return `data`: all of it is payload."""
        return data


class Sized(Body):
    """A body with a Content-Length."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0

    def decode(self, data: bytes) -> bytes:
        """Return `data` up to the body's length."""
        self._left -= len(data)
        if self._left > 0:
            return data
        self.done = True
        if self._left == 0:
            return data
        self.surplus = True
        return data[: self._left]


class _Phase(IntEnum):
    """The next part of a chunked body: a chunk's size line, its payload, the CRLF after that, or the trailers."""

    SIZE = 0
    PAYLOAD = 1
    CRLF = 2
    TRAILERS = 3


class Chunked(Body):
    """A body in chunks (RFC 9112, section 7.1). Extensions and trailers are checked and dropped."""

    def __init__(self) -> None:
        self._phase = _Phase.SIZE
        self._held = b""  # an unfinished line of the framing
        self._left = 0  # payload bytes missing from the current chunk
        self._extension_bytes = 0

    def decode(self, data: bytes) -> bytes:
        """Return the payloads of the chunks in `data`, joined. The usual read, of whole chunks, takes a fast path."""
        if self._phase != 0 or self._held:
            return self._decode(data, 0, [])
        size = len(data)
        # the payload's size if `data` is one chunk: its size line has as many hex digits as that of the whole read
        carried = size - (size.bit_length() + 3) // 4 - 4
        line = b"%x\r\n" % carried
        if data.startswith(line) and data.endswith(b"\r\n") and 0 < carried == size - len(line) - 2:
            self.whole = True
            return data[len(line) : -2]
        return self._decode_chunks(data)

    def _decode_chunks(self, data: bytes) -> bytes:
        """Decode whole chunks, and change to `_decode` at the first thing that isn't one."""
        payloads: list[bytes] = []
        position, size = 0, len(data)
        while position < size:
            line = _PLAIN_SIZE.match(data, position)
            if line is None:
                return self._decode(data, position, payloads)
            start = line.end()
            end = start + int(line[1], 16)
            if end == start and data[end:] == b"\r\n":  # the last chunk, without trailers
                self.done = True
                self.whole = False
                return b"".join(payloads)
            if end == start or data[end : end + 2] != b"\r\n":
                return self._decode(data, position, payloads)
            payloads.append(data[start:end])
            position = end + 2
        self.whole = True
        return payloads[0] if len(payloads) == 1 else b"".join(payloads)

    def _decode(self, data: bytes, position: int, payloads: list[bytes]) -> bytes:
        """Decode any framing, from `position` on."""
        self.whole = self._phase == _Phase.SIZE and not self._held
        if self._held:
            data, self._held = self._held + data, b""
        while not self.done:
            after = self._advance(data, position, payloads)
            if after == position:
                break
            position = after
        self.whole = self.whole and self._phase == _Phase.SIZE and position == len(data)
        if self.done:
            self.surplus = position < len(data)
        else:
            self._held = data[position:]
        return b"".join(payloads)

    def _advance(self, data: bytes, position: int, payloads: list[bytes]) -> int:
        """Process one piece of the framing at `position`. Return where the next begins; `position` if it is incomplete."""
        if self._phase == _Phase.PAYLOAD:
            return self._take_payload(data, position, payloads)
        if self._phase == _Phase.SIZE:
            return self._take_size(data, position)
        if self._phase == _Phase.CRLF:
            return self._take_crlf(data, position)
        return self._take_trailers(data, position)

    def _take_size(self, data: bytes, position: int) -> int:
        if data.find(b"\n", position, position + MAX_CHUNK_LINE_BYTES) < 0:
            if len(data) - position >= MAX_CHUNK_LINE_BYTES:
                raise malformed("a chunk's first line is too long")
            return position
        line = _SIZE.match(data, position)
        if line is None:
            raise malformed("a chunk doesn't begin with its size")
        self._count_extension(len(line[2]))
        self._left = int(line[1], 16)
        self._phase = _Phase.PAYLOAD if self._left else _Phase.TRAILERS
        return line.end()

    def _count_extension(self, size_bytes: int) -> None:
        if not size_bytes:
            return
        self.whole = False
        self._extension_bytes += size_bytes
        if self._extension_bytes > MAX_EXTENSION_BYTES:
            raise malformed("too many chunk extensions")

    def _take_payload(self, data: bytes, position: int, payloads: list[bytes]) -> int:
        piece = data[position : position + self._left]
        if not piece:
            return position
        payloads.append(piece)
        self._left -= len(piece)
        if self._left == 0:
            self._phase = _Phase.CRLF
        return position + len(piece)

    def _take_crlf(self, data: bytes, position: int) -> int:
        ending = data[position : position + 2]
        if not b"\r\n".startswith(ending):
            raise malformed("a chunk is longer than its size")
        if len(ending) < 2:
            return position
        self._phase = _Phase.SIZE
        return position + 2

    def _take_trailers(self, data: bytes, position: int) -> int:
        if data.startswith(b"\r\n", position):
            self.done = True
            return position + 2
        end = data.find(b"\r\n\r\n", position, position + MAX_TRAILER_BYTES) + 4
        if end < position + 4:
            if len(data) - position >= MAX_TRAILER_BYTES:
                raise malformed("its trailers are too long")
            return position
        if field_lines("\r\n" + data[position:end].decode("latin-1")) is None:
            raise malformed("its trailers can't be read")
        self.done = True
        return end


class Inflated(Body):
    """A body in gzip or deflate, sent although identity was requested: its payload is the inflated data.

    `framing` is the framing of the compressed bytes.
    """

    def __init__(self, framing: Body) -> None:
        self._framing = framing
        self._decompressor = zlib.decompressobj(_ANY_HEADER)
        self._begun = False
        self.done = framing.done
        self.until_eof = framing.until_eof

    def decode(self, data: bytes) -> bytes:
        """Return the inflated payload. Raises UpstreamError if it is corrupt or larger than MAX_INFLATED_BYTES."""
        packed = self._framing.decode(data)
        self.done, self.surplus = self._framing.done, self._framing.surplus
        if not packed:
            return b""
        try:
            return self._inflate(packed)
        except zlib.error as error:
            raise unreadable("its compression is broken") from error

    def _inflate(self, packed: bytes) -> bytes:
        if not self._begun:
            self._begun = True
            if not _has_header(packed):
                # deflate without zlib's header, as some servers send it
                self._decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
        pieces = []
        left = MAX_INFLATED_BYTES
        while packed:
            piece = self._decompressor.decompress(packed, left)
            pieces.append(piece)
            left -= len(piece)
            if self._decompressor.unconsumed_tail or left <= 0:
                raise unreadable("it inflates to more than is allowed")
            packed = self._decompressor.unused_data
            if packed:  # another member (RFC 1952 section 2.2), or padding, which is ignored
                if not packed.startswith(b"\x1f\x8b"):
                    break
                self._decompressor = zlib.decompressobj(_ANY_HEADER)
        return b"".join(pieces)


_ANY_HEADER: Final = zlib.MAX_WBITS | 32  # detects gzip's or zlib's header (zlib.net/manual.html, inflateInit2)


def _has_header(packed: bytes) -> bool:
    """Return whether the data begins as gzip (RFC 1952) or zlib (RFC 1950, section 2.2)."""
    return packed[:1] == b"\x1f" or (
        packed[0] & 0x0F == 8 and (len(packed) < 2 or int.from_bytes(packed[:2]) % 31 == 0)
    )


def field_lines(head: str) -> list[tuple[str, str]] | None:
    """Return the fields of a head, first and empty line included, with lower-case names; None if a line isn't a field."""
    fields = []
    for name, value in _FIELD.findall(head):
        fields.append((name.lower(), value.rstrip(" \t")))
    return fields if len(fields) == head.count("\r\n") - 2 else None


def after_sending(message: str, *, phase: Phase = Phase.BODY, unreadable: bool = False) -> UpstreamError:
    """Build the error for a failure after the request was sent: the provider may have done the work."""
    response = upstream_error(message, may_have_run=True)
    return UpstreamError(response, safe_to_repeat=False, phase=phase, unreadable=unreadable)


def malformed(what: str) -> UpstreamError:
    """Build the error for an answer that RFC 9112 doesn't allow. `what` completes the sentence."""
    return after_sending(f"The provider broke the HTTP protocol: {what}.")


def unreadable(what: str) -> UpstreamError:
    """Build the error for a body that the gateway can't read. `what` completes the sentence."""
    return after_sending(f"The provider's answer can't be read: {what}.", unreadable=True)


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
    length = fields.get("content-length", "")
    is_usual = (
        len(fields) == len(lines) <= MAX_FIELDS
        and "host" in fields
        and len(length) <= MAX_LENGTH_DIGITS
        and length.isdigit()
        and fields.get("connection", "close").lower() in _CONNECTION
        and _UNUSUAL.isdisjoint(fields)
    )
    return fields if is_usual else None


def may_become_usual(beginning: bytes, request_line: bytes) -> bool:
    """Return whether an incomplete head may still become a usual one for this request line."""
    return len(beginning) <= MAX_HEAD_BYTES and beginning.startswith(request_line[: len(beginning)])


MAX_RESPONSE_HEAD_BYTES = 65_536
MAX_INTERIM_HEADS = 16  # 1xx responses before the final one

# Status codes outside 100..599 are invalid (RFC 9110, section 15). Some servers omit the space before an empty reason.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: " + FIELD_TEXT + rb")?\r\n")
_BEGINNING = b"HTTP/1."


class Head(Struct):
    """A response's head.

    Header names are lower-case. `keep_alive`: the connection may be used again after the body. `coding`: the first
    Content-Encoding.
    """

    status: int
    headers: list[tuple[str, str]]
    body: Body
    keep_alive: bool
    coding: str | None


class HeadReader:
    """Collects bytes until a final response's head is complete. Can be reused for the next response."""

    __slots__ = ("_held", "_interim")

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
    content_coding: str | None = None
    for name, value in headers:
        if name == "content-length":
            lengths.append(value)
        elif name == "transfer-encoding":
            codings.append(value.lower())
        elif name == "connection":
            options += [option.strip() for option in value.lower().split(",")]
        elif name == "content-encoding" and content_coding is None:
            content_coding = value
    body = _framing(status, codings, lengths, is_http_11=is_http_11)
    is_kept = "close" not in options and (is_http_11 or "keep-alive" in options)  # RFC 9112 section 9.3
    return Head(status, headers, body, is_kept and not body.until_eof, content_coding)


def _framing(status: int, codings: list[str], lengths: list[str], *, is_http_11: bool) -> Body:
    """Return the body's framing for the response to a POST (RFC 9112, section 6.3)."""
    if codings and (lengths or not is_http_11 or codings != ["chunked"]):
        raise malformed("the length of its answer is given in two ways, or in none that is known")
    if status < 200 or status in {204, 304}:
        return Sized(0)
    if codings:
        return Chunked()
    if lengths:
        length, *others = set(lengths)  # equal ones are one (item 5)
        if others or "," in length:
            length, *others = {value.strip(" \t") for listed in lengths for value in listed.split(",")}
        if others or not (length.isascii() and length.isdigit()) or len(length) > MAX_LENGTH_DIGITS:
            raise malformed("its content-length is no number")
        return Sized(int(length))
    return UntilEof()
