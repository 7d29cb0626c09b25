"""One connection in each of its states: what ends an exchange, what is told of it, and when the connection lives on."""

import asyncio

import pytest

from meshproxy.errors import UpstreamError
from meshproxy.upstream.connection import Connection

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\n\r\n"


def verdict(fault):
    response = fault.response
    return response.status, response.code, response.may_have_run, fault.safe_to_repeat


FAILED = (502, "upstream_error", True, False)
TOO_LATE = (504, "gateway_timeout", True, False)


async def answered_each(conversation):
    while True:
        await conversation.answer(ANSWER)


async def test_a_connection_is_used_again(serve, provide):
    server = await serve(answered_each)
    provider = provide(server.url)
    bodies = [await (await provider.post("/x", (), b"{}")).read() for _ in range(3)]
    assert (bodies, server.connections) == ([b"ok"] * 3, 1)


@pytest.mark.parametrize(
    "answer, connections",
    [
        (ANSWER, 1),
        (CHUNKED + b"2\r\nok\r\n0\r\n\r\n", 1),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nok", 1),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", 2),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok", 2),
        (ANSWER + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", 2),
        (CHUNKED + b"2\r\nok\r\n0\r\n\r\n\r\n", 2),
    ],
)
async def test_what_keeps_a_connection(answer, connections, serve, provide):
    async def script(conversation):
        while True:
            await conversation.answer(answer)

    server = await serve(script)
    provider = provide(server.url)
    bodies = [await (await provider.post("/x", (), b"{}")).read() for _ in range(2)]
    assert (bodies, server.connections) == ([b"ok", b"ok"], connections)


async def test_bytes_on_an_idle_connection_are_never_the_next_answer(serve, provide):
    poisoned = asyncio.Event()

    async def script(conversation):
        await conversation.answer(ANSWER)
        await conversation.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        poisoned.set()
        await conversation.until_closed()

    server = await serve(script)
    provider = provide(server.url)
    await (await provider.post("/x", (), b"{}")).read()
    await poisoned.wait()
    poisoned.clear()
    assert (await (await provider.post("/x", (), b"{}")).read(), server.connections) == (b"ok", 2)
    await poisoned.wait()


async def test_an_idle_connection_that_the_provider_closed_is_not_used(serve, provide):
    closed = asyncio.Event()

    async def script(conversation):
        await conversation.answer(ANSWER)
        await conversation.hang_up()
        closed.set()

    server = await serve(script)
    provider = provide(server.url)
    for expected in (1, 2, 3):
        closed.clear()
        body = await (await provider.post("/x", (), b"{}")).read()
        assert (body, server.connections) == (b"ok", expected)
        await closed.wait()


async def test_a_request_that_was_written_is_not_repeated(serve, provide):
    requests = []

    async def script(conversation):
        requests.append(await conversation.answer(ANSWER))
        requests.append(await conversation.request())
        await conversation.hang_up()

    provider = provide((await serve(script)).url)
    await (await provider.post("/x", (), b"{}")).read()
    with pytest.raises(UpstreamError) as caught:
        await provider.post("/x", (), b"{}")
    assert (verdict(caught.value), len(requests)) == (FAILED, 2)


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200", b"HTTP/1.1 100 Continue\r\n\r\n"])
@pytest.mark.parametrize("end", ["hang_up", "reset"])
async def test_lost_before_a_head(begun, end, serve, provide):
    async def script(conversation):
        await conversation.answer(begun)
        await getattr(conversation, end)()

    provider = provide((await serve(script)).url)
    with pytest.raises(UpstreamError) as caught:
        await provider.post("/x", (), b"{}")
    assert verdict(caught.value) == FAILED


@pytest.mark.parametrize(
    "sent, end, outcome",
    [
        (SIZED + b"hel", "hang_up", FAILED),
        (SIZED + b"hel", "reset", FAILED),
        (CHUNKED + b"3\r\nhel\r\n", "hang_up", FAILED),
        (CHUNKED + b"5\r\nhel", "hang_up", FAILED),
        (CHUNKED + b"3\r\nhel\r\n0\r\n", "hang_up", FAILED),
        (CHUNKED + b"3\r\nhel\r\n", "reset", FAILED),
        (ENDLESS + b"hel", "hang_up", None),
        (ENDLESS + b"hel", "reset", FAILED),
    ],
)
async def test_lost_in_a_body(sent, end, outcome, serve, provide, record):
    begun = asyncio.Event()

    async def script(conversation):
        await conversation.answer(sent)
        await begun.wait()
        await getattr(conversation, end)()

    provider = provide((await serve(script)).url)
    response = await provider.post("/x", (), b"{}")
    sink = record()
    response.relay(sink)
    await sink.begun
    begun.set()
    fault = await sink.over
    assert (fault and verdict(fault), sink.payload) == (outcome, b"hel")


@pytest.mark.parametrize("rest", [b"zz\r\n", b"3\r\nhello\r\n"])
async def test_a_framing_that_breaks_in_the_body(rest, serve, provide, record):
    async def script(conversation):
        await conversation.answer(CHUNKED + rest)
        await conversation.until_closed()

    server = await serve(script)
    response = await provide(server.url).post("/x", (), b"{}")
    sink = record()
    response.relay(sink)
    assert verdict(await sink.over) == FAILED
    await asyncio.gather(*server.tasks)


async def test_a_broken_head_closes_the_connection(serve, provide):
    async def script(conversation):
        await conversation.answer(b"SSH-2.0-OpenSSH_9.6\r\n")
        await conversation.until_closed()

    server = await serve(script)
    with pytest.raises(UpstreamError) as caught:
        await provide(server.url).post("/x", (), b"{}")
    assert verdict(caught.value) == FAILED
    await asyncio.gather(*server.tasks)


async def test_no_head_in_time(serve, provide):
    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 100 Continue\r\n\r\n")
        await conversation.until_closed()

    server = await serve(script)
    with pytest.raises(UpstreamError) as caught:
        await provide(server.url, first_byte_timeout_s=0.05).post("/x", (), b"{}")
    assert verdict(caught.value) == TOO_LATE
    await asyncio.gather(*server.tasks)


async def test_a_body_that_stalls(serve, provide, record):
    async def script(conversation):
        await conversation.answer(SIZED + b"hel")
        await conversation.until_closed()

    server = await serve(script)
    response = await provide(server.url, idle_timeout_s=0.05).post("/x", (), b"{}")
    sink = record()
    response.relay(sink)
    assert (verdict(await sink.over), sink.payload) == (TOO_LATE, b"hel")
    await asyncio.gather(*server.tasks)


async def test_a_pause_of_ours_is_not_the_providers_silence(serve, provide, record):
    """Of two answers that stall alike, the one that we don't read outlives the one that we do."""
    go_on = asyncio.Event()

    async def script(conversation):
        await conversation.answer(SIZED + b"hel")
        await go_on.wait()
        await conversation.send(b"lo")
        await conversation.until_closed()

    provider = provide((await serve(script)).url, idle_timeout_s=0.05)
    paused, read = [await provider.post("/x", (), b"{}") for _ in range(2)]
    sinks = [record(), record()]
    paused.relay(sinks[0])
    paused.pause()
    read.relay(sinks[1])
    assert verdict(await sinks[1].over) == TOO_LATE
    go_on.set()
    paused.resume()
    assert (await sinks[0].over, sinks[0].payload) == (None, b"hello")


async def test_a_body_that_goes_on_has_all_the_time(serve, provide, record):
    """Bytes at a quarter of the idle time-out, for twice as long, paced by another answer that stalls for good."""
    turns = asyncio.Queue()

    async def script(conversation):
        request = await conversation.request()
        await conversation.send(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n")
        if b"/slow" in request:
            for letter in b"hello wo":
                await turns.get()
                await conversation.send(bytes([letter]))
        await conversation.until_closed()

    server = await serve(script)
    slow, pacer = provide(server.url, idle_timeout_s=0.4), provide(server.url, idle_timeout_s=0.1)
    sink = record()
    (await slow.post("/slow", (), b"{}")).relay(sink)
    for _ in range(8):
        with pytest.raises(UpstreamError):
            await (await pacer.post("/pacer", (), b"{}")).read()
        turns.put_nowait(None)
    assert (await sink.over, sink.payload) == (None, b"hello wo")


async def test_an_idle_connection_is_closed_after_its_time(serve, provide):
    async def script(conversation):
        await conversation.answer(ANSWER)
        await conversation.until_closed()

    server = await serve(script)
    provider = provide(server.url, keepalive_s=0.05)
    await (await provider.post("/x", (), b"{}")).read()
    await asyncio.gather(*server.tasks)
    assert server.closed == 1


async def test_an_answer_before_the_request_was_all_read(serve, provide):
    """A refusal that doesn't wait for a large body: it is heard, and the connection is not used again."""

    async def script(conversation):
        await conversation.reader.readuntil(b"\r\n\r\n")
        conversation.writer.transport.pause_reading()
        await conversation.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await asyncio.get_running_loop().create_future()

    server = await serve(script)
    provider = provide(server.url)
    answers = []
    for _ in range(2):
        response = await provider.post("/x", (), b"x" * 16_000_000)
        answers.append((response.status, await response.read()))
    assert (answers, server.connections) == ([(413, b"no")] * 2, 2)


async def test_an_answer_compressed_in_a_way_that_is_not_known_is_refused(serve, provide):
    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 2\r\n\r\nxx")
        await conversation.until_closed()

    server = await serve(script)
    with pytest.raises(UpstreamError) as caught:
        await provide(server.url).post("/x", (), b"{}")
    assert verdict(caught.value) == FAILED
    await asyncio.gather(*server.tasks)


async def test_identity_is_no_compression(serve, provide):
    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 200 OK\r\ncontent-encoding: Identity\r\ncontent-length: 2\r\n\r\nok")

    assert await (await provide((await serve(script)).url).post("/x", (), b"{}")).read() == b"ok"


async def test_a_cancelled_post_closes_its_connection_at_once(serve, provide):
    asked = asyncio.Event()

    async def script(conversation):
        await conversation.request()
        asked.set()
        await conversation.until_closed()

    server = await serve(script)
    post = asyncio.create_task(provide(server.url).post("/x", (), b"{}"))
    await asked.wait()
    post.cancel()
    with pytest.raises(asyncio.CancelledError):
        await post
    await asyncio.gather(*server.tasks)
    assert (server.connections, server.closed) == (1, 1)


async def test_a_post_cancelled_in_the_turn_of_its_answer_leaves_the_connection_to_whoever_has_it_now(
    serve, provide, monkeypatch
):
    """The answer was whole, so the connection is free and must survive the cancellation."""
    server = await serve(answered_each)
    provider = provide(server.url)
    post = asyncio.create_task(provider.post("/x", (), b"{}"))
    send = Connection.send

    def send_and_cancel(connection, request):
        answer = send(connection, request)
        answer.add_done_callback(lambda _: post.cancel())
        return answer

    monkeypatch.setattr(Connection, "send", send_and_cancel)
    with pytest.raises(asyncio.CancelledError):
        await post
    monkeypatch.undo()
    assert await (await provider.post("/x", (), b"{}")).read() == b"ok"
    assert server.connections == 1
