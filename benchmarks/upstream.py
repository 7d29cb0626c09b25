"""The provider of the streams: `python -m benchmarks.upstream PORT`, a raw protocol on uvloop that knows one kind of answer.

The model says what is wanted: `sse-100x10` is 100 events 10 ms apart, `sse-100x0` 100 events at once. Every event is the
same bytes in a chunk of its own, as OpenAI sends them, and many streams are served by one timer: at tick t all those streams
get an event whose turn it is. At the end come a finish event, a usage event and [DONE].
"""

import argparse
import asyncio
import re

import uvloop

CHUNK = (
    b'data: {"id":"chatcmpl-BlJh2mVnyTqCkSgW0aXeUdRfPz","object":"chat.completion.chunk","created":1764000000,'
    b'"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_07871e2ad8","choices":'
)
EVENT = CHUNK + b'[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
ENDING = (
    CHUNK + b'[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n',
    CHUNK + b'[],"usage":{"prompt_tokens":12,"completion_tokens":100,"total_tokens":112,'
    b'"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,'
    b'"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}\n\n',
    b"data: [DONE]\n\n",
)
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nopenai-processing-ms: 210\r\n"
    b"openai-version: 2020-10-01\r\nx-request-id: req_0123456789abcdef\r\ntransfer-encoding: chunked\r\n\r\n"
)

_WANTED = re.compile(rb'"model" ?: ?"sse-(\d+)x(\d+)"')
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def frame(payload: bytes) -> bytes:
    """A chunk (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


FRAME = frame(EVENT)
END = b"".join(map(frame, ENDING)) + b"0\r\n\r\n"


class Wheel:
    """Streams of one pace: a slot for each millisecond of the interval, all the streams of a slot served at once."""

    def __init__(self, interval_ms: int) -> None:
        self._slots: list[dict[Stream, None]] = [{} for _ in range(interval_ms)]
        self._tick = 0
        self._next_slot = 0
        self._loop = asyncio.get_running_loop()
        self._began_at = self._loop.time()
        self._turn()

    def add(self, stream: "Stream") -> None:
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        self._slots[self._next_slot][stream] = None
        stream.slot = self._slots[self._next_slot]

    def _turn(self) -> None:
        for stream in tuple(self._slots[self._tick % len(self._slots)]):
            stream.step()
        self._tick += 1
        self._loop.call_at(self._began_at + self._tick / 1000, self._turn)


class Stream(asyncio.Protocol):
    """One connection, one answer at a time."""

    def __init__(self, wheels: dict[int, Wheel]) -> None:
        self._wheels = wheels
        self._received = b""
        self._left = 0
        self.slot: dict[Stream, None] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, _exc: Exception | None) -> None:
        self.slot.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not blank or length is None or len(body) < int(length[1]):
            return
        self._received = b""
        wanted = _WANTED.search(body)
        assert wanted is not None, body
        self._begin(int(wanted[1]), int(wanted[2]))

    def step(self) -> None:
        """Send the next event, or the end."""
        if self._left:
            self._left -= 1
            self._transport.write(FRAME)
        else:
            del self.slot[self]
            self._transport.write(END)

    def _begin(self, events: int, interval_ms: int) -> None:
        if interval_ms == 0:
            self._transport.write(HEAD + FRAME * events + END)
            return
        self._transport.write(HEAD + FRAME)
        self._left = events - 1
        wheel = self._wheels.get(interval_ms)
        if wheel is None:
            wheel = self._wheels[interval_ms] = Wheel(interval_ms)
        wheel.add(self)


async def serve(port: int) -> None:
    """Serve until killed."""
    wheels: dict[int, Wheel] = {}
    server = await asyncio.get_running_loop().create_server(lambda: Stream(wheels), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.upstream", description="A provider that streams events."
    )
    parser.add_argument("port", type=int, help="to listen at, on loopback")
    uvloop.run(serve(parser.parse_args().port))
