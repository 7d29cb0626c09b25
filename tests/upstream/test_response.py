"""A body on its way to a sink: what is pushed, in which call, and that a closed response is silent."""

import asyncio

import pytest

from meshproxy.errors import UpstreamError
from meshproxy.upstream import response as module
from tests.harness.waiting import turns

STEP_BYTES = 100_000
BUFFERED_BYTES = 8_000_000  # the most that the kernel holds of a connection (tcp_wmem, tcp_rmem)
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_what_came_with_the_head_is_pushed_before_relay_returns(serve, provide, record):
    async def script(conversation):
        await conversation.answer(CHUNKED + b"5\r\nhello\r\n0\r\n\r\n")

    response = await provide((await serve(script)).url).post("/x", (), b"{}")
    sink = record()
    response.relay(sink)
    assert sink.calls == [("data", b"hello", None), ("end",)]


async def test_whole_chunks_are_pushed_with_the_frame_they_came_in(serve, provide, record):
    steps = asyncio.Queue()

    async def script(conversation):
        await conversation.answer(CHUNKED)
        while step := await steps.get():
            await conversation.send(step)

    response = await provide((await serve(script)).url).post("/x", (), b"{}")
    sink = record()
    response.relay(sink)
    steps.put_nowait(b"5\r\nhello\r\n1\r\n \r\n")
    await sink.begun
    steps.put_nowait(b"5\r\nworld\r\n0\r\n\r\n")
    await sink.over
    steps.put_nowait(b"")
    assert sink.calls == [("data", b"hello ", b"5\r\nhello\r\n1\r\n \r\n"), ("data", b"world", None), ("end",)]


async def test_status_and_headers(serve, provide):
    async def script(conversation):
        await conversation.answer(
            b"HTTP/1.1 307 Moved\r\nLocation: /y\r\nX-A: 1\r\nx-a: 2\r\ncontent-length: 0\r\n\r\n"
        )

    response = await provide((await serve(script)).url).post("/x", (), b"{}")
    assert (
        response.status,
        response.header("location"),
        response.header("x-a"),
        response.header("x-b"),
        await response.read(),
    ) == (307, "/y", "1", None, b"")


STREAM = b'data: {"id": "x"}\n\ndata: [DONE]\n\n'


def in_chunks(*parts):
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(in_chunks(STREAM), id="in one piece"),
        pytest.param(in_chunks(STREAM[:-7], STREAM[-7:]), id="in two"),
        pytest.param(in_chunks(*(STREAM[at : at + 1] for at in range(len(STREAM)))), id="in bytes"),
        pytest.param(in_chunks(STREAM) + b"5\r\nda", id="and broken off"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n" + STREAM,
            id="and shorter than it was to be",
        ),
    ],
)
async def test_a_stream_that_is_read_whole_ends_soon_after_its_done(serve, provide, monkeypatch, sent):
    monkeypatch.setattr(module, "LAST_BYTE_S", 0.01)

    async def script(conversation):
        await conversation.answer(sent)
        await conversation.until_closed()

    response = await provide((await serve(script)).url).post("/x", (), b"{}")
    async with asyncio.timeout(5):
        assert (await response.read()).startswith(STREAM)


@pytest.mark.parametrize("text", [b'{"content": "data: [DONE]', b'{"content": "a\\ndata: [DONE]', b"data: [DONE] not"])
async def test_what_only_looks_like_the_end_of_a_stream_ends_nothing(serve, provide, monkeypatch, text):
    monkeypatch.setattr(module, "LAST_BYTE_S", 0.0)
    rest = asyncio.Event()

    async def script(conversation):
        await conversation.answer(in_chunks(text))
        await rest.wait()
        await conversation.send(b'2\r\n"}\r\n0\r\n\r\n')

    response = await provide((await serve(script)).url).post("/x", (), b"{}")
    reading = asyncio.ensure_future(response.read())
    await turns(5)
    rest.set()
    assert await reading == text + b'"}'


async def test_a_response_closed_before_its_end_closes_the_socket_and_is_silent(serve, provide, record):
    async def script(conversation):
        await conversation.answer(CHUNKED + b"5\r\nhello\r\n")
        await conversation.until_closed()

    server = await serve(script)
    response = await provide(server.url).post("/x", (), b"{}")
    sink = record()
    response.relay(sink)
    await sink.begun
    response.close()
    response.close()
    response.pause()
    response.resume()
    await asyncio.gather(*server.tasks)
    assert ([call[1] for call in sink.calls], sink.last[0]) == ([b"hello"], "data")


async def test_a_response_closed_after_its_end_leaves_the_connection_alone(serve, provide):
    async def script(conversation):
        while True:
            await conversation.answer(CHUNKED + b"2\r\nok\r\n0\r\n\r\n")

    server = await serve(script)
    provider = provide(server.url)
    for _ in range(2):
        response = await provider.post("/x", (), b"{}")
        await response.read()
        response.close()
        response.pause()
    assert server.connections == 1


@pytest.mark.parametrize("early", [True, False])
async def test_a_sink_may_close_from_within_data(early, serve, provide, record):
    go = asyncio.Event()

    async def script(conversation):
        await conversation.answer(CHUNKED + (b"5\r\nhello\r\n" if early else b""))
        await go.wait()
        await conversation.send(b"5\r\nworld\r\n0\r\n\r\n")
        await conversation.until_closed()

    server = await serve(script)
    response = await provide(server.url).post("/x", (), b"{}")
    sink = record()
    heard = sink.data
    sink.data = lambda payload, frame: (heard(payload, frame), response.close())
    response.relay(sink)
    go.set()
    await asyncio.gather(*server.tasks)
    assert [call[1] for call in sink.calls] == [b"hello" if early else b"world"]


async def test_a_sink_may_pause_from_within_data(serve, provide, record):
    total = 4_000_000

    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        await conversation.send(b"x" * total)

    response = await provide((await serve(script)).url).post("/x", (), b"{}")
    sink = record()
    loop = asyncio.get_running_loop()
    heard, paused = sink.data, []

    def data(payload, frame):
        assert not paused
        heard(payload, frame)
        response.pause()
        paused.append(1)
        loop.call_soon(go_on)

    def go_on():
        paused.clear()
        response.resume()

    sink.data = data
    response.relay(sink)
    assert (await sink.over, len(sink.payload)) == (None, total)


async def test_little_is_read_before_someone_takes_the_body(serve, provide, record):
    """The provider can't fill our memory: its writes stop until a sink is there."""
    total = 40_000_000
    sent = []

    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        for _ in range(total // STEP_BYTES):
            await conversation.send(b"x" * STEP_BYTES)
            sent.append(STEP_BYTES)

    provider = provide((await serve(script)).url)
    response = await provider.post("/x", (), b"{}")
    await turns(2000)  # in which all of it could come
    before = sum(sent)
    sink = record()
    response.relay(sink)
    await sink.over
    assert (before < BUFFERED_BYTES, len(sink.payload)) == (True, total)


async def test_a_failure_before_the_relay_is_told_in_the_relay(serve, provide, record):
    async def script(conversation):
        await conversation.answer(CHUNKED + b"5\r\nhello\r\n")
        await conversation.hang_up()

    server = await serve(script)
    response = await provide(server.url).post("/x", (), b"{}")
    await asyncio.gather(*server.tasks)
    await turns()  # until the end of the connection was heard
    sink = record()
    response.relay(sink)
    assert sink.calls == [("data", b"hello", b"5\r\nhello\r\n"), ("fail", "upstream_error")]


@pytest.mark.parametrize("framed", [b"content-length: 3000\r\n\r\n", b"\r\n"])
async def test_a_body_that_is_read_whole_is_bounded(framed, serve, provide):
    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 200 OK\r\n" + framed + b"x" * 3000)
        await conversation.until_closed()

    server = await serve(script)
    response = await provide(server.url, max_response_bytes=2000).post("/x", (), b"{}")
    with pytest.raises(UpstreamError) as caught:
        await response.read()
    assert (
        caught.value.response.code,
        caught.value.response.may_have_run,
        caught.value.safe_to_repeat,
    ) == ("upstream_error", True, False)


async def test_a_read_that_is_cancelled_closes_the_socket(serve, provide):
    async def script(conversation):
        await conversation.answer(CHUNKED)
        await conversation.until_closed()

    server = await serve(script)
    response = await provide(server.url).post("/x", (), b"{}")
    reading = asyncio.create_task(response.read())
    await turns(1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asyncio.gather(*server.tasks)


async def test_what_comes_early_can_be_heard_and_is_still_pushed_whole(serve, provide, record):
    steps = asyncio.Queue()

    async def script(conversation):
        await conversation.answer(CHUNKED)
        while step := await steps.get():
            await conversation.send(step)

    response = await provide((await serve(script)).url).post("/x", (), b"{}")
    assert (response.early, response.may_receive_more, response.ended) == ([], True, False)
    await response.wait_for_more(0.0)
    steps.put_nowait(b"5\r\nhello\r\n")
    await response.wait_for_more(5.0)
    steps.put_nowait(b"5\r\nworld\r\n")
    await response.wait_for_more(5.0)
    assert [payload for payload, _ in response.early] == [b"hello", b"world"]
    steps.put_nowait(b"0\r\n\r\n")
    await response.wait_for_more(5.0)
    assert (response.may_receive_more, response.ended, response.error) == (False, True, None)
    sink = record()
    response.relay(sink)
    steps.put_nowait(b"")
    assert (sink.payload, sink.last) == (b"helloworld", ("end",))


async def test_that_it_broke_off_is_heard(serve, provide):
    async def script(conversation):
        await conversation.answer(CHUNKED)
        await conversation.send(b"zz\r\n")
        await conversation.until_closed()

    response = await provide((await serve(script)).url).post("/x", (), b"{}")
    while response.may_receive_more:
        await response.wait_for_more(5.0)
    assert (response.ended, response.error.response.code) == (True, "upstream_error")
