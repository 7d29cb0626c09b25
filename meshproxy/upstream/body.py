"""How the bytes of a response's body are told from their framing (RFC 9112 sections 6 and 7). No I/O.

Each kind of framing is a `Body` that is fed what the socket gave, in pieces of any size, and answers with the payload in
them. A payload is passed on as it comes: nothing is gathered but an unfinished line of the framing itself.
"""

import re
from enum import IntEnum
from typing import Final

from meshproxy.upstream.faults import malformed
from meshproxy.wire.head import field_lines

MAX_CHUNK_LINE_BYTES = 4096
MAX_EXTENSION_BYTES = 65_536  # of one body, all chunks together: extensions carry nothing that we read
MAX_TRAILER_BYTES = 16_384

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # RFC 9110 section 5.6.2
FIELD_TEXT = rb"[\t\x20-\x7e\x80-\xff]*+"  # field-content and the spaces around it, section 5.5

_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*+"'
_EXTENSIONS = rb"(?:[ \t]*+;[ \t]*+" + TOKEN + rb"(?:[ \t]*+=[ \t]*+(?:" + TOKEN + rb"|" + _QUOTED + rb"))?+)*+"
_PLAIN_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(" + _EXTENSIONS + rb")\r\n")


class Body:
    """The framing of one body.

    `done`: the framing says that the body is whole. `surplus`: bytes came after that. `whole`: what was fed last was whole
    chunks and nothing else, so that it can be passed on as it is to someone who is sent chunks. `until_eof`: only the end
    of the connection ends it.
    """

    __slots__ = ("done", "surplus", "whole")
    until_eof = False

    def __init__(self) -> None:
        self.done = self.surplus = self.whole = False

    def decode(self, data: bytes) -> bytes:
        """The payload in `data`, which may be none; UpstreamFault if the framing is broken."""
        raise NotImplementedError


class UntilEof(Body):
    """Neither a length nor chunks: the body ends with the connection."""

    __slots__ = ()
    until_eof = True

    def decode(self, data: bytes) -> bytes:
        """Everything is payload."""
        return data


class Sized(Body):
    """A body of `length` bytes."""

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        super().__init__()
        self._left = length
        self.done = length == 0

    def decode(self, data: bytes) -> bytes:
        """Everything is payload up to the length."""
        self._left -= len(data)
        if self._left > 0:
            return data
        self.done = True
        if self._left == 0:
            return data
        self.surplus = True
        return data[: self._left]


class _Phase(IntEnum):
    SIZE = 0
    PAYLOAD = 1
    CRLF = 2
    TRAILERS = 3


class Chunked(Body):
    """A body in chunks, with extensions and trailers, which are checked and left out."""

    __slots__ = ("_extension_bytes", "_held", "_left", "_phase")

    def __init__(self) -> None:
        super().__init__()
        self._phase = _Phase.SIZE
        self._held = b""  # an unfinished line of the framing
        self._left = 0  # payload bytes that the chunk at hand still lacks
        self._extension_bytes = 0

    def decode(self, data: bytes) -> bytes:
        """The payloads of the chunks in `data`, joined. The usual read, one whole chunk or some, takes a short way."""
        if self._phase != 0 or self._held:
            return self._decode(data, 0, [])
        size = len(data)
        # what it carries if it is one chunk, whose own size has as many digits as that of all of it
        carried = size - (size.bit_length() + 3) // 4 - 4
        line = b"%x\r\n" % carried
        if data.startswith(line) and data.endswith(b"\r\n") and 0 < carried == size - len(line) - 2:
            self.whole = True
            return data[len(line) : -2]
        return self._decode_chunks(data)

    def _decode_chunks(self, data: bytes) -> bytes:
        """The way of whole chunks and nothing else, for as long as that is what comes."""
        payloads: list[bytes] = []
        position, size = 0, len(data)
        while position < size:
            line = _PLAIN_SIZE.match(data, position)
            if line is None:
                return self._decode(data, position, payloads)
            start = line.end()
            end = start + int(line[1], 16)
            if end == start or data[end : end + 2] != b"\r\n":
                return self._decode(data, position, payloads)
            payloads.append(data[start:end])
            position = end + 2
        self.whole = True
        return payloads[0] if len(payloads) == 1 else b"".join(payloads)

    def _decode(self, data: bytes, position: int, payloads: list[bytes]) -> bytes:
        """The long way, from `position` on."""
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
        """Take one piece of the framing at `position`; where the next begins, or `position` if it isn't all there."""
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
