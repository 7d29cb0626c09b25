"""The wait for a stream's first event, over real sockets, the stream cut at every byte."""

import asyncio
import socket
import struct
import time

import pytest

from meshproxy import config
from meshproxy.errors import UpstreamError
from meshproxy.gateway.attempts import first_event
from meshproxy.upstream.provider import Provider
from tests.harness.waiting import turns

EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
ERROR = b'data: {"error":{"message":"no","code":%b}}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
HOLD_S = 5.0


class Upstream:
    """A server that sends what it is told to, and the answer that came of it."""

    def __init__(self, stack):
        self._stack = stack

    async def answer(self, *pieces, then="hold"):
        """The response whose body comes in these pieces; then its connection is ended, reset or held open."""
        self.pieces = asyncio.Queue()
        for piece in (*pieces, *([then] if then != "hold" else [])):
            self.pieces.put_nowait(piece)

        async def play(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD + b"connection: close\r\n\r\n")
            while isinstance(piece := await self.pieces.get(), bytes):
                writer.write(piece)
                await turns(1)
            if piece == "reset":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort() if piece == "reset" else writer.close()

        server = await asyncio.start_server(play, "127.0.0.1", 0)
        self._stack.append(server)
        port = server.sockets[0].getsockname()[1]
        provider = Provider("u", config.Upstream(kind="openai", base_url=f"http://127.0.0.1:{port}/v1"), None)
        self._stack.append(provider)
        return await provider.post("/chat/completions", (), b"{}")


@pytest.fixture
async def upstream():
    stack = []
    made = Upstream(stack)
    yield made
    made.pieces.put_nowait("end")
    for part in reversed(stack):
        closed = part.close()
        if closed is not None:
            await closed


async def begins(response, hold_s=HOLD_S):
    """The seconds that the first event took; the body is all there afterwards."""
    began = time.monotonic()
    async with asyncio.timeout(10):
        await first_event(response, hold_s, time.monotonic)
    return time.monotonic() - began


@pytest.mark.parametrize("before", [b"", b": PROCESSING\n\n", b"\xef\xbb\xbf", b"retry: 1\n\n"])
async def test_it_returns_with_the_first_event_and_takes_nothing(upstream, before):
    response = await upstream.answer(before + EVENT)
    assert await begins(response) < HOLD_S
    assert before + EVENT == b"".join(payload for payload, _ in response.early)


async def test_an_event_in_pieces_is_awaited_whole(upstream):
    for cut in range(1, len(EVENT)):
        response = await upstream.answer(b": hello\n\n" + EVENT[:cut], EVENT[cut:])
        assert await begins(response) < HOLD_S
        response.close()


async def test_comments_alone_are_no_beginning(upstream):
    response = await upstream.answer(b": PROCESSING\n\n", b": PROCESSING\n\n")
    assert await begins(response, 0.05) >= 0.05


async def test_a_provider_that_takes_its_time_is_not_waited_for_longer_than_the_hold(upstream):
    assert await begins(await upstream.answer(), 0.05) >= 0.05


async def test_no_hold_at_all(upstream):
    assert await begins(await upstream.answer(), 0.0) < HOLD_S


async def test_more_than_is_kept_is_not_waited_for(upstream):
    response = await upstream.answer(b'data: {"x":"' + b"x" * 200_000)
    assert await begins(response) < HOLD_S


@pytest.mark.parametrize("body", [EVENT, EVENT.rstrip(), b"data: [DONE]\n\n"])
async def test_a_body_that_is_over_but_has_something_is_the_relays(upstream, body):
    response = await upstream.answer(body, then="end")
    await begins(response)
    assert await response.read() == body


@pytest.mark.parametrize("body", [b"", b"\n\n", b": PROCESSING\n\n", b"event: x\n\n"])
async def test_a_body_that_is_over_with_nothing_in_it_is_a_fault(upstream, body):
    response = await upstream.answer(body, then="end")
    with pytest.raises(UpstreamError) as raised:
        await begins(response)
    error = raised.value
    assert (error.response.status, error.safe_to_repeat, error.upstream_status) == (502, True, 200)


@pytest.mark.parametrize("body", [b": PROCESSING\n\n", EVENT[:10]])
async def test_a_body_that_breaks_off_is_the_fault_it_broke_off_with(upstream, body):
    response = await upstream.answer(body)
    task = asyncio.create_task(begins(response))
    await turns(1)
    upstream.pieces.put_nowait("reset")
    with pytest.raises(UpstreamError) as raised:
        await task
    assert raised.value.upstream_status is None


@pytest.mark.parametrize(
    "code, expected",
    [
        (b"null", (502, True, 200)),
        (b'"server_error"', (502, True, 200)),
        (b"502", (502, True, 502)),
        (b"429", (503, True, 429)),
        (b"400", (400, False, 400)),
        (b"404", (502, True, 404)),
        (b"7", (502, True, 200)),
        (b"true", (502, True, 200)),
    ],
)
@pytest.mark.parametrize("then", ["hold", "end"])
async def test_an_error_event_is_taken_for_the_status_that_it_names(upstream, code, expected, then):
    response = await upstream.answer(ERROR % code, then=then)
    with pytest.raises(UpstreamError) as raised:
        await begins(response)
    error = raised.value
    assert (error.response.status, error.safe_to_repeat, error.upstream_status) == expected


async def test_whoever_waits_can_be_cancelled(upstream):
    response = await upstream.answer()
    task = asyncio.create_task(begins(response))
    await turns(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    upstream.pieces.put_nowait(EVENT)
    await begins(response)
