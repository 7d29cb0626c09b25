"""Reaching a provider: addresses, names, TLS, and what each failure is called."""

import asyncio
import errno
import socket
import ssl

import pytest
import trustme

from meshproxy.errors import Phase, Source, UpstreamError
from meshproxy.policy.failover import is_upstream_failure
from meshproxy.upstream.provider import BaseUrl, verified_context
from meshproxy.upstream.response import unreachable
from tests.harness.waiting import turns

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


@pytest.fixture
def server_ssl(authority):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    context.set_alpn_protocols(["http/1.1"])
    return context


@pytest.fixture
def trusting(authority):
    context = verified_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize(
    "base_url, expected",
    [
        ("https://api.openai.com/v1", (True, "api.openai.com", 443, "/v1", "api.openai.com")),
        ("http://127.0.0.1:8000", (False, "127.0.0.1", 8000, "", "127.0.0.1:8000")),
        ("http://[::1]:8000/a/b/", (False, "::1", 8000, "/a/b", "[::1]:8000")),
        ("https://[::1]", (True, "::1", 443, "", "[::1]")),
        ("https://EXAMPLE.org:443/", (True, "example.org", 443, "", "example.org")),
        ("http://bücher.example", (False, "xn--bcher-kva.example", 80, "", "xn--bcher-kva.example")),
    ],
)
def test_addresses(base_url, expected):
    address = BaseUrl(base_url)
    assert (address.is_tls, address.host, address.port, address.path, address.authority) == expected


@pytest.mark.parametrize(
    "base_url",
    ["ftp://x", "https://", "https://user:secret@x", "https://x?a=b", "https://x#a", f"http://{'a' * 64}.example"],
)
def test_what_is_no_address(base_url):
    with pytest.raises(ValueError) as caught:
        BaseUrl(base_url)
    assert "secret" not in str(caught.value)


async def test_a_name_with_addresses_that_refuse_is_reached_at_the_one_that_answers(serve, provide):
    async def script(conversation):
        await conversation.answer(ANSWER)

    server = await serve(script)  # on 127.0.0.1 alone; localhost may be ::1 too
    provider = provide(server.url.replace("127.0.0.1", "localhost"))
    assert await (await provider.post("/x", (), b"{}")).read() == b"ok"


async def test_a_port_that_refuses(provide, unused_tcp_port):
    with pytest.raises(UpstreamError) as caught:
        await provide(f"http://127.0.0.1:{unused_tcp_port}").post("/x", (), b"{}")
    response = caught.value.response
    assert (
        response.status,
        response.code,
        response.may_have_run,
        caught.value.safe_to_repeat,
        response.message,
    ) == (502, "upstream_error", False, True, "The provider can't be reached: the connection was refused.")


@pytest.mark.parametrize(
    "error, words",
    [
        (socket.gaierror(-2, "Name or service not known"), "its name can't be resolved"),
        (OSError(113, "No route to 10.1.2.3"), "the connection failed"),
        (ssl.SSLError(1, "wrong version number"), "the TLS handshake failed"),
    ],
)
def test_failures_are_told_without_the_networks_addresses(error, words):
    fault = unreachable(error)
    assert (
        fault.response.message,
        fault.response.may_have_run,
        fault.safe_to_repeat,
    ) == (f"The provider can't be reached: {words}.", False, True)


async def test_tls(serve, provide, server_ssl, trusting):
    spoken = []

    async def script(conversation):
        spoken.append(conversation.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        while True:
            await conversation.answer(ANSWER)

    server = await serve(script, ssl=server_ssl)
    provider = provide(server.url.replace("http://127.0.0.1", "https://localhost"), ssl_context=trusting)
    bodies = [await (await provider.post("/x", (), b"{}")).read() for _ in range(3)]
    assert (bodies, spoken) == ([b"ok"] * 3, ["http/1.1"])


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_the_next_connection_resumes_the_session_of_the_last(serve, provide, server_ssl, trusting, version):
    resumed = []

    async def script(conversation):
        resumed.append(conversation.writer.get_extra_info("ssl_object").session_reused)
        await conversation.answer(ANSWER.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))

    server_ssl.minimum_version = server_ssl.maximum_version = version
    server = await serve(script, ssl=server_ssl)
    provider = provide(server.url.replace("http://127.0.0.1", "https://localhost"), ssl_context=trusting)
    for _ in range(3):
        assert await (await provider.post("/x", (), b"{}")).read() == b"ok"
    assert resumed == [False, True, True]


@pytest.mark.parametrize("host, trusted", [("localhost", False), ("127.0.0.1", True)])
async def test_a_certificate_of_an_unknown_authority_or_for_another_name(
    host, trusted, serve, provide, server_ssl, trusting
):
    server = await serve(lambda conversation: conversation.until_closed(), ssl=server_ssl)
    context = trusting if trusted else None
    provider = provide(server.url.replace("http://127.0.0.1", f"https://{host}"), ssl_context=context)
    with pytest.raises(UpstreamError) as caught:
        await provider.post("/x", (), b"{}")
    assert (
        caught.value.response.may_have_run,
        caught.value.safe_to_repeat,
        "its certificate isn't valid" in caught.value.response.message,
    ) == (False, True, True)


async def test_tls_to_a_port_that_speaks_none(serve, provide):
    server = await serve(lambda conversation: conversation.send(b"220 smtp.example ESMTP\r\n"))
    with pytest.raises(UpstreamError) as caught:
        await provide(server.url.replace("http:", "https:")).post("/x", (), b"{}")
    assert (caught.value.response.status, caught.value.safe_to_repeat) == (502, True)


async def test_a_handshake_that_never_ends_is_a_connect_timeout(serve, provide):
    server = await serve(lambda conversation: conversation.until_closed())
    with pytest.raises(UpstreamError) as caught:
        await provide(server.url.replace("http:", "https:"), connect_timeout_s=0.1).post("/x", (), b"{}")
    await asyncio.gather(*server.tasks)
    assert (
        caught.value.response.status,
        caught.value.response.code,
        caught.value.response.may_have_run,
        caught.value.safe_to_repeat,
    ) == (504, "gateway_timeout", False, True)


async def test_a_cancelled_connect_leaves_no_socket(serve, provide):
    taken = asyncio.Event()

    async def script(conversation):
        taken.set()
        await conversation.until_closed()

    server = await serve(script)
    provider = provide(server.url.replace("http:", "https:"), max_connections=1)
    for _ in range(2):  # it leaves no slot taken either
        taken.clear()
        post = asyncio.create_task(provider.post("/x", (), b"{}"))
        await taken.wait()
        post.cancel()
        with pytest.raises(asyncio.CancelledError):
            await post
    await asyncio.gather(*server.tasks)


@pytest.fixture
def relayed(serve, provide, server_ssl, trusting, record):
    """Start a provider that answers by a script over TLS. Return its server, the response and a sink whose body has begun."""

    async def start(script):
        server = await serve(script, ssl=server_ssl)
        provider = provide(server.url.replace("http://127.0.0.1", "https://localhost"), ssl_context=trusting)
        response = await provider.post("/x", (), b"{}")
        sink = record()
        response.relay(sink)
        await sink.begun
        return server, response, sink

    return start


@pytest.mark.parametrize("goodbye, outcome", [(True, None), (False, "upstream_error")])
async def test_under_tls_only_a_goodbye_ends_a_body_without_a_length(goodbye, outcome, relayed):
    """Otherwise an attacker on the way could cut a TCP connection, and the answer would look whole."""
    begun = asyncio.Event()

    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await begun.wait()
        if goodbye:
            await conversation.hang_up()
        else:
            conversation.writer.transport.abort()

    _, _, sink = await relayed(script)
    begun.set()
    fault = await sink.over
    assert (fault and fault.response.code, sink.payload) == (outcome, b"hello")


async def test_over_tls_a_pause_loses_nothing_that_came_before_a_reset(relayed):
    """As without TLS, where the kernel keeps it: a loop's TLS drops what it has read when the connection is lost."""
    paused = asyncio.Event()

    async def script(conversation):
        await conversation.answer(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")
        await paused.wait()
        await conversation.send(b"world")
        await conversation.reset()

    server, response, sink = await relayed(script)
    response.pause()
    paused.set()
    await asyncio.gather(*server.tasks)
    await turns()
    response.resume()
    await sink.over
    assert (sink.payload, sink.last) == (b"helloworld", ("end",))


async def test_over_tls_no_connection_is_kept_whose_request_is_still_being_sent(serve, provide, server_ssl, trusting):
    async def script(conversation):
        await conversation.reader.readuntil(b"\r\n\r\n")
        conversation.writer.write(ANSWER)  # and the body is never read
        await asyncio.Event().wait()

    server = await serve(script, ssl=server_ssl)
    url = server.url.replace("http://127.0.0.1", "https://localhost")
    provider = provide(url, ssl_context=trusting, first_byte_timeout_s=2)
    for _ in range(2):
        response = await provider.post("/x", (), b"x" * 16_000_000)
        assert await response.read() == b"ok"
    assert server.connections == 2


async def test_a_certificate_that_is_not_trusted_is_told_as_such(serve, provide, server_ssl):
    async def script(conversation):
        await conversation.until_closed()

    server = await serve(script, ssl=server_ssl)
    with pytest.raises(UpstreamError) as caught:
        await provide(server.url.replace("http://127.0.0.1", "https://localhost")).post("/x", (), b"{}")
    assert (caught.value.phase, caught.value.reason.startswith("certificate not valid: ")) == (Phase.TLS, True)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL])
def test_what_this_host_lacks_is_not_the_providers_fault(number):
    fault = unreachable(OSError(number, "out"))
    told = (fault.source, fault.response.code, is_upstream_failure(fault), errno.errorcode[number] in fault.reason)
    assert told == (Source.GATEWAY, "overloaded", False, True)
