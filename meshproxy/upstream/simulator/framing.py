"""How a body's end is told (RFC 9112, section 6): by chunks, by a length, or by the end of the connection; and where to cut
bytes so that it hurts.
"""

import re
from collections.abc import Iterator

from msgspec import Struct

MAX_CUTS = 64  # a write; a long text would otherwise take minutes

# After one byte of a chunk's size; within "data", CR LF, an event's end, a UTF-8 character.
_AWKWARD = re.compile(rb"\A[0-9a-f](?=[0-9a-f])|da(?=ta)|\r(?=\n)|\n(?=\r?\n)|[\xc0-\xf7](?=[\x80-\xbf])")


class Framing(Struct, frozen=True):
    """`header`: what tells it; `chunked`: whether payloads are wrapped; `keeps_alive`: whether the connection survives."""

    header: tuple[str, str]
    chunked: bool = False
    keeps_alive: bool = True

    def frame(self, payload: bytes) -> bytes:
        """The bytes on the wire for a piece of the body."""
        if not self.chunked:
            return payload
        return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""

    @property
    def end(self) -> bytes:
        """The bytes on the wire for the body's end."""
        return b"0\r\n\r\n" if self.chunked else b""


CHUNKED = Framing(("transfer-encoding", "chunked"), chunked=True)
UNTIL_CLOSE = Framing(("connection", "close"), keeps_alive=False)


def sized(length: int) -> Framing:
    """A body whose length is told before it."""
    return Framing(("content-length", str(length)))


def halves(payload: bytes) -> tuple[bytes, bytes]:
    """Cut in two: within the first character of several bytes, else in the middle."""
    wide = re.search(rb"[\xc0-\xf7](?=[\x80-\xbf])", payload)
    at = wide.end() if wide else len(payload) // 2
    return payload[:at], payload[at:]


def awkward_pieces(frames: bytes) -> Iterator[bytes]:
    """The same bytes, cut wherever a careless reader would stumble."""
    start = 0
    for cuts, found in enumerate(_AWKWARD.finditer(frames)):
        if cuts == MAX_CUTS:
            break
        yield frames[start : found.end()]
        start = found.end()
    yield frames[start:]
