"""Where to cut bytes so that it hurts."""

import re
from collections.abc import Iterator
from itertools import islice

MAX_CUTS = 64  # a write; a long text would otherwise take minutes

_WIDE = rb"[\xc0-\xf7](?=[\x80-\xbf])"  # the first byte of a UTF-8 character of several
# After one byte of a chunk's size; within "data", CR LF, an event's end, a UTF-8 character.
_AWKWARD = re.compile(rb"\A[0-9a-f](?=[0-9a-f])|da(?=ta)|\r(?=\n)|\n(?=\r?\n)|" + _WIDE)


def halves(payload: bytes) -> tuple[bytes, bytes]:
    """Cut in two: within the first character of several bytes, else in the middle."""
    wide = re.search(_WIDE, payload)
    at = wide.end() if wide else len(payload) // 2
    return payload[:at], payload[at:]


def awkward_pieces(frames: bytes) -> Iterator[bytes]:
    """The same bytes, cut wherever a careless reader would stumble."""
    start = 0
    for found in islice(_AWKWARD.finditer(frames), MAX_CUTS):
        yield frames[start : found.end()]
        start = found.end()
    yield frames[start:]
