"""Slots and the line for them: how many connections, whose turn it is, and that nobody who gives up takes a slot along."""

import asyncio

import pytest

from meshproxy.errors import UpstreamError
from tests.harness.waiting import turns

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Held:
    """Answers whose bodies end one by one, in the order of their requests, when the test says so."""

    def __init__(self):
        self.asked = asyncio.Queue()
        self.order = []
        self.peers = []

    async def __call__(self, conversation):
        while True:
            request = await conversation.request()
            self.order.append(request.split()[1].decode())
            self.peers.append(conversation.writer.get_extra_info("peername"))
            await conversation.send(ANSWER)
            release = asyncio.Event()
            self.asked.put_nowait(release)
            await release.wait()
            await conversation.send(b"ok")

    async def release_one(self):
        (await self.asked.get()).set()

    async def answered(self, post):
        """What a post gets when everything is released."""
        releasing = asyncio.create_task(self._release_all())
        try:
            async with asyncio.timeout(10):
                return await post
        finally:
            releasing.cancel()

    async def _release_all(self):
        while True:
            await self.release_one()


@pytest.fixture
def held():
    return Held


async def whole(provider, path):
    return await (await provider.post(path, (), b"{}")).read()


async def test_no_more_connections_than_the_limit_and_first_come_first_served(serve, provide, held):
    script = held()
    server = await serve(script)
    provider = provide(server.url, max_connections=1)
    posts = []
    for number in range(4):
        posts.append(asyncio.create_task(whole(provider, f"/{number}")))
        await turns()
    for _ in posts:
        await script.release_one()
    assert await asyncio.gather(*posts) == [b"ok"] * 4
    assert (script.order, server.connections) == (["/v1/0", "/v1/1", "/v1/2", "/v1/3"], 1)


async def test_who_waits_too_long_is_told_that_the_provider_is_not_available(serve, provide, held):
    script = held()
    provider = provide((await serve(script)).url, max_connections=1, connect_timeout_s=0.05)
    first = asyncio.create_task(whole(provider, "/1"))
    release = await script.asked.get()
    with pytest.raises(UpstreamError) as caught:
        await provider.post("/2", (), b"{}")
    response = caught.value.response
    assert (
        response.status,
        response.code,
        response.retry_after_s,
        caught.value.safe_to_repeat,
    ) == (503, "provider_not_available", 1.0, True)
    release.set()
    assert await first == b"ok"


async def test_who_gives_up_waiting_leaves_the_line(serve, provide, held):
    script = held()
    server = await serve(script)
    provider = provide(server.url, max_connections=1)
    first = asyncio.create_task(whole(provider, "/1"))
    release = await script.asked.get()
    second, third = [asyncio.create_task(whole(provider, path)) for path in ("/2", "/3")]
    await turns()
    second.cancel()
    release.set()
    await script.release_one()
    assert await asyncio.gather(first, third) == [b"ok", b"ok"]
    assert (second.cancelled(), script.order) == (True, ["/v1/1", "/v1/3"])


async def test_who_gives_up_when_it_is_their_turn_hands_the_connection_on(serve, provide, held, record):
    script = held()
    server = await serve(script)
    provider = provide(server.url, max_connections=1)
    response = await provider.post("/1", (), b"{}")
    second, third = [asyncio.create_task(whole(provider, path)) for path in ("/2", "/3")]
    await turns()
    sink = record()
    sink.end = second.cancel  # the connection was handed over just before the end is told
    response.relay(sink)
    await script.release_one()
    await script.release_one()
    assert await third == b"ok"
    assert (second.cancelled(), script.order, server.connections) == (True, ["/v1/1", "/v1/3"], 1)


async def test_the_slot_of_a_lost_connection_goes_to_the_first_in_line(serve, provide, held):
    script = held()
    server = await serve(script)
    provider = provide(server.url, max_connections=1)
    first = await provider.post("/1", (), b"{}")
    await script.asked.get()
    second = asyncio.create_task(whole(provider, "/2"))
    await turns()
    first.close()
    await script.release_one()
    assert (await second, server.connections) == (b"ok", 2)


@pytest.mark.parametrize("turn", range(6))
async def test_who_gives_up_with_a_slot_in_hand_hands_the_slot_on(serve, provide, held, turn):
    """In whichever turn, that in which it was given the slot among them."""
    script = held()
    server = await serve(script)
    provider = provide(server.url, max_connections=1)
    first = await provider.post("/1", (), b"{}")
    await script.asked.get()
    second, third = [asyncio.create_task(whole(provider, path)) for path in ("/2", "/3")]
    await turns()
    first.close()
    await turns(turn)
    second.cancel()
    assert await script.answered(third) == b"ok"
    assert await script.answered(whole(provider, "/4")) == b"ok"  # the slot is free again
    assert (second.cancelled(), script.order[-2:]) == (True, ["/v1/3", "/v1/4"])


async def test_the_connection_used_last_is_used_first(serve, provide, held):
    script = held()
    provider = provide((await serve(script)).url)
    posts = [asyncio.create_task(whole(provider, f"/{number}")) for number in range(2)]
    releases = [await script.asked.get() for _ in posts]
    last = script.peers[1]
    for number, release in enumerate(releases):
        release.set()
        await asyncio.wait([posts[script.order[number] == "/v1/1"]])
    for _ in range(3):
        await script.answered(whole(provider, "/3"))
    assert script.peers[2:] == [last] * 3


async def test_a_connection_that_fails_gives_its_slot_back(provide, unused_tcp_port):
    provider = provide(f"http://127.0.0.1:{unused_tcp_port}", max_connections=1)
    for _ in range(3):
        with pytest.raises(UpstreamError) as caught:
            await provider.post("/x", (), b"{}")
        assert caught.value.response.code == "upstream_error"


async def test_closing_ends_everything(serve, provide, held, record):
    script = held()
    server = await serve(script)
    provider = provide(server.url, max_connections=2)
    done = asyncio.create_task(whole(provider, "/0"))
    await script.release_one()
    await done
    streaming = await provider.post("/1", (), b"{}")
    sink = record()
    streaming.relay(sink)
    await script.asked.get()
    reading = asyncio.create_task(whole(provider, "/2"))
    await script.asked.get()
    waiting = asyncio.create_task(whole(provider, "/3"))
    await turns()
    await provider.close()
    outcomes = await asyncio.gather(reading, waiting, return_exceptions=True)
    with pytest.raises(UpstreamError) as caught:
        await provider.post("/4", (), b"{}")
    assert [fault.response.code for fault in (*outcomes, caught.value)] == [
        "upstream_error",
        "overloaded",
        "overloaded",
    ]
    assert sink.last == ("fail", "upstream_error")


async def test_closing_while_a_connection_is_made(serve, provide):
    server = await serve(lambda conversation: conversation.until_closed())
    provider = provide(server.url)
    post = asyncio.create_task(provider.post("/x", (), b"{}"))
    await turns(1)
    await provider.close()
    with pytest.raises(UpstreamError) as caught:
        await post
    assert (caught.value.response.code, caught.value.safe_to_repeat) == ("overloaded", True)
