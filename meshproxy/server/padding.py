"""Padding of streamed events: behind TLS the size of a record tells the size of its event, and so of its token, from which what
a conversation is about can be guessed (arXiv 2511.03675). A comment behind every event fills it up to a size that doesn't
depend on the token.

What this hides are sizes. It hides neither when an event comes nor how many there are.
"""

from meshproxy.gateway.call import Downstream, Passing

STEP_BYTES = 128
MAX_LEVEL_BYTES = 1024  # larger events (tool calls, logprobs) get to the next multiple of it, and raise nothing

_COMMENT = b": %b\n\n"
_SHORTEST = len(_COMMENT % b"")
_FILLING = b"." * MAX_LEVEL_BYTES


class PaddedStream(Passing):
    """A `Downstream` whose every write is as large as the largest before it, rounded up to a step: of a stream's sizes only
    the few moments are seen at which its largest event grows by a step.
    """

    __slots__ = ("_level",)

    def __init__(self, downstream: Downstream) -> None:
        super().__init__(downstream)
        self._level = STEP_BYTES

    def write(self, payload: bytes, frame: bytes | None = None) -> None:  # noqa: ARG002 - its frame doesn't fit any more
        """Send whole events, and a comment behind them."""
        size = len(payload) + _SHORTEST
        if size > MAX_LEVEL_BYTES:
            target = _up(size, MAX_LEVEL_BYTES)
        else:
            target = self._level = max(self._level, _up(size, STEP_BYTES))
        self._downstream.write(payload + _COMMENT % _FILLING[: target - size])


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
