"""What goes on the wire to a provider, what may never, and what is asked again."""

import asyncio
import gc
import weakref

import pytest

from meshproxy import config
from meshproxy.errors import GatewayError, Source, UpstreamError
from meshproxy.upstream.connection import Connection
from meshproxy.upstream.provider import Provider

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture
async def asked(serve):
    """A server that answers everything, and the requests that it read."""
    requests = []

    async def script(conversation):
        while True:
            requests.append(await conversation.answer(ANSWER))

    server = await serve(script)
    server.requests = requests
    return server


async def whole(provider, path="/chat/completions", headers=(), body=b"{}"):
    return await (await provider.post(path, headers, body)).read()


async def test_a_request_byte_for_byte(asked, provide):
    provider = provide(asked.url, headers={"X-Extra": "1"})
    await whole(provider, headers=[("HTTP-Referer", "https://a.example"), ("x-title", "caf\xe9")], body=b'{"a":1}')
    host = asked.url.split("/")[2].encode()
    assert asked.requests == [
        b"POST /v1/chat/completions HTTP/1.1\r\n"
        b"host: " + host + b"\r\n"
        b"user-agent: meshproxy\r\n"
        b"accept-encoding: identity\r\n"
        b"content-type: application/json\r\n"
        b"authorization: Bearer sk-canary\r\n"
        b"x-extra: 1\r\n"
        b"http-referer: https://a.example\r\n"
        b"x-title: caf\xe9\r\n"
        b"content-length: 7\r\n"
        b"\r\n"
        b'{"a":1}'
    ]


async def test_without_a_key_there_is_no_authorization(asked, provide):
    await whole(provide(asked.url, api_key=None))
    assert [b"authorization" in request for request in asked.requests] == [False]


async def test_the_configuration_may_say_headers_otherwise(asked, provide):
    await whole(provide(asked.url, api_key=None, headers={"User-Agent": "us", "Authorization": "Basic eA=="}))
    assert [
        (b"user-agent: us\r\n" in request, b"authorization: Basic eA==\r\n" in request, b"meshproxy" in request)
        for request in asked.requests
    ] == [(True, True, False)]


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 3_000_000])
async def test_bodies_of_any_size(size, asked, provide):
    provider = provide(asked.url)
    body = b"x" * size
    assert [await whole(provider, body=body) for _ in range(2)] == [b"ok", b"ok"]
    assert [request.partition(b"\r\n\r\n")[2] for request in asked.requests] == [body, body]
    assert asked.connections == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("x-title", "a\r\nx-evil: 1"),
        ("x-title", "a\n"),
        ("x-title", "a\r"),
        ("x-title", "a\x00b"),
        ("x-title", "a\x7f"),
        ("x-title", "caf\u0119"),
        ("x-title\r\nx-evil", "1"),
        ("x title", "1"),
        ("x:title", "1"),
        ("", "1"),
        ("x-\xe9", "1"),
        ("Content-Length", "0"),
        ("transfer-encoding", "chunked"),
        ("Host", "evil.example"),
        ("connection", "close"),
        ("Authorization", "Bearer other"),
        ("accept-encoding", "gzip"),
        ("content-type", "text/plain"),
        ("expect", "100-continue"),
    ],
)
async def test_headers_that_are_not_passed_on(name, value, asked, provide):
    with pytest.raises(GatewayError) as caught:
        await whole(provide(asked.url), headers=[("x-fine", "1"), (name, value)])
    assert (
        caught.value.source,
        caught.value.response.code,
        asked.connections,
    ) == (Source.CLIENT, "validation_error", 0)


@pytest.mark.parametrize(
    "headers, api_key",
    [({"a b": "c"}, None), ({"a": "b\r\nc: d"}, None), ({"Content-Length": "1"}, None), ({}, "sk-canary\r\nx: y")],
)
def test_settings_that_no_request_could_carry(headers, api_key):
    settings = config.Upstream(kind="openai", base_url="http://127.0.0.1", headers=headers)
    with pytest.raises(ValueError) as caught:
        Provider("openai", settings, api_key)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("path", ["/a b", "/a\r\nx: y", "/\xe9"])
async def test_paths_that_are_none(path, asked, provide):
    with pytest.raises(ValueError):
        await whole(provide(asked.url), path=path)
    assert asked.connections == 0


class Path(str):
    """One that can be seen to be kept."""

    __slots__ = ("__weakref__",)


async def test_many_paths_are_not_all_remembered(asked, provide):
    provider = provide(asked.url)
    kept = weakref.WeakSet()
    for number in range(40):
        path = Path(f"/{number}")
        kept.add(path)
        await whole(provider, path=path)
        del path
    gc.collect()
    assert (len(asked.requests), len(kept)) == (40, 16)


async def test_a_redirect_is_an_answer_like_any_other(serve, provide):
    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 308 Moved\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")

    server = await serve(script)
    response = await provide(server.url).post("/x", (), b"{}")
    assert (response.status, await response.read(), server.connections) == (308, b"", 1)


@pytest.mark.parametrize("idle", [1, 4])
async def test_connections_that_turn_out_dead_are_all_passed_over(asked, provide, monkeypatch, idle):
    """Closing them before a byte was written harms nobody, so the request goes out on a fresh one."""
    provider = provide(asked.url)
    await asyncio.gather(*(whole(provider) for _ in range(idle)))
    monkeypatch.setattr(Connection, "has_unread_input", Connection.abort)  # dies unseen
    assert await whole(provider) == b"ok"
    assert (asked.connections, len(asked.requests)) == (idle + 1, idle + 1)


@pytest.mark.parametrize(("size", "is_sent"), [(20, True), (50_000_000, False)])
async def test_a_request_that_is_given_up_in_its_body_was_not_sent(serve, provide, size, is_sent):
    begun = asyncio.Event()

    async def script(conversation):
        await conversation.reader.readuntil(b"\r\n\r\n")
        conversation.writer.transport.pause_reading()
        begun.set()
        await asyncio.Event().wait()

    told = []
    server = await serve(script)
    task = asyncio.create_task(provide(server.url).post("/x", (), b"a" * size, told.append))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == [True, is_sent]


async def test_the_key_is_in_no_fault(serve, provide, unused_tcp_port):
    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 nonsense sk-canary\r\n\r\n")

    server = await serve(script)
    words = []
    for url in (server.url, f"http://127.0.0.1:{unused_tcp_port}", f"https://{server.url[7:]}"):
        with pytest.raises(UpstreamError) as caught:
            await provide(url, connect_timeout_s=0.1).post("/x", (), b"{}")
        words.append(f"{caught.value!r} {caught.value.response} {caught.value.__cause__!r}")
    assert ["canary" in text for text in words] == [False] * 3


async def test_a_thousand_requests_leave_nothing(asked, provide):
    provider = provide(asked.url, max_connections=8)
    bodies = await asyncio.gather(*(whole(provider) for _ in range(1000)))
    assert (set(bodies), len(asked.requests), asked.connections <= 8) == ({b"ok"}, 1000, True)
