import asyncio
import json

import pytest
from aiohttp import web

from meshproxy.server.listener import Runner, Strictness
from meshproxy.server.sockets import listen

GET = b"GET /work HTTP/1.1\r\nhost: m\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: m\r\ncontent-length: 2\r\n\r\n{}"


class Served:
    """A listener of ours on a real socket. `refused`: the statuses of what was no request."""

    def __init__(self, header_timeout_s=10.0):
        self.refused = []
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()
        app = web.Application()
        app.router.add_get("/work", self._work)
        app.router.add_get("/bug", self._bug)
        self.runner = Runner(app, self._chat, Strictness(lambda: header_timeout_s, self.refused.append))

    async def _work(self, _request):
        return web.Response(body=b"fine")

    async def _bug(self, _request):
        raise RuntimeError("a bug")

    async def _chat(self, request):
        if await request.read() == b"{}":
            return web.Response(body=b"chat")
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def connect(self):
        return await asyncio.open_connection(*self.runner.addresses[0][:2])

    async def asked(self, data):
        """What comes back until the connection is closed."""
        reader, writer = await self.connect()
        writer.write(data)
        got = await asyncio.wait_for(reader.read(-1), 5)
        writer.close()
        return got


@pytest.fixture
async def start():
    started = []

    async def start_one(**options):
        served = Served(**options)
        await served.runner.setup()
        await web.SockSite(served.runner, listen("127.0.0.1:0")).start()
        started.append(served)
        return served

    yield start_one
    for served in started:
        await served.runner.cleanup()


async def test_the_chat_path_goes_past_the_router_and_others_through_it(start):
    served = await start()
    closing = b"connection: close\r\n\r\n"
    assert (await served.asked(POST.replace(b"\r\n\r\n", b"\r\n" + closing))).endswith(b"\r\n\r\nchat")
    assert (await served.asked(GET.replace(b"\r\n\r\n", b"\r\n" + closing))).endswith(b"\r\n\r\nfine")


async def test_a_connection_is_kept(start):
    served = await start()
    reader, writer = await served.connect()
    for request, answer in ((POST, b"chat"), (GET, b"fine"), (POST, b"chat")):
        writer.write(request)
        assert answer in await reader.readuntil(answer)
    assert (1, 0) == (served.runner.connected(), served.runner.busy())
    writer.close()


async def test_what_is_no_request_is_answered_in_the_envelope_and_hung_up_on(start):
    served = await start()
    got = await served.asked(b"GARBAGE\r\n\r\n")
    head, _, body = got.partition(b"\r\n\r\n")
    told = json.loads(body)
    assert b" 400 Bad Request\r\n" in head
    assert b"application/json" in head
    assert told["error"]["code"] == "bad_request"
    assert told["request_id"].encode() in head
    assert [400] == served.refused


async def test_a_bug_is_answered_in_the_envelope(start, caplog):
    served = await start()
    got = await served.asked(GET.replace(b"/work", b"/bug"))
    assert b" 500 Internal Server Error\r\n" in got
    assert "internal_error" == json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"]
    assert b"a bug" not in got
    assert "handler failed" in caplog.text


async def test_half_a_head_is_given_up(start):
    served = await start(header_timeout_s=0.05)
    got = await served.asked(b"GET /work HTTP/1.1\r\nhost:")
    assert b" 408 Request Timeout\r\n" in got
    assert "request_timeout" == json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"]


async def test_no_head_at_all_is_hung_up_on_without_a_word(start):
    served = await start(header_timeout_s=0.05)
    assert b"" == await served.asked(b"")


async def test_a_connection_between_requests_may_be_idle(start):
    served = await start(header_timeout_s=0.05)
    reader, writer = await served.connect()
    for _ in range(2):
        writer.write(GET)
        await reader.readuntil(b"fine")
        await asyncio.sleep(0.1)
    writer.close()


async def test_a_client_that_hangs_up_cancels_its_handler(start):
    served = await start()
    _, writer = await served.connect()
    writer.write(POST.replace(b"{}", b"[]"))
    await asyncio.wait_for(served.begun.wait(), 5)
    assert 1 == served.runner.busy()
    writer.transport.abort()
    await asyncio.wait_for(served.cancelled.wait(), 5)


async def test_at_the_end_idle_connections_are_closed_and_busy_ones_interrupted(start):
    served = await start()
    idle, idle_writer = await served.connect()
    idle_writer.write(GET)
    await idle.readuntil(b"fine")
    _, writer = await served.connect()
    writer.write(POST.replace(b"{}", b"[]"))
    await asyncio.wait_for(served.begun.wait(), 5)
    served.runner.close_idle()
    assert b"" == await asyncio.wait_for(idle.read(-1), 5)
    assert not served.cancelled.is_set()
    served.runner.interrupt()
    await asyncio.wait_for(served.cancelled.wait(), 5)
    for each in (idle_writer, writer):
        each.close()


async def test_a_listener_that_closes_says_so(start):
    served = await start()
    served.runner.closing = True
    assert b"connection: close" in (await served.asked(GET)).lower()
