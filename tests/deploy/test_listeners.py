"""The ways in: TLS, the PROXY protocol, unix sockets, IPv6; and who the gateway takes its clients to be."""

import asyncio
import socket
import ssl

import aiohttp
import pytest
import trustme

from meshproxy.server.client_address import SIGNATURE
from tests.deploy.conftest import free_port, until

MODES = pytest.mark.parametrize("workers", [1, 2])
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
PROXY_V1 = b"PROXY TCP4 203.0.113.7 127.0.0.1 56324 443\r\n"
PROXY_V2 = (
    SIGNATURE
    + b"\x21\x11\x00\x0c"
    + socket.inet_aton("203.0.113.8")
    + socket.inet_aton("127.0.0.1")
    + b"\x00\x01\x01\xbb"
)
PROXY_LOCAL = SIGNATURE + b"\x20\x00\x00\x00"


async def post(url, caller, *, connector=None, **headers):
    async with aiohttp.ClientSession(connector=connector) as http:
        told = {**caller.auth, **headers}
        async with http.post(f"{url}/v1/chat/completions", json=HELLO, headers=told) as answer:
            await answer.read()
            return answer.status


async def client_logged(gateway):
    """The client of the last request."""
    await until(lambda: gateway.logged("request"), "the request's line")
    return gateway.logged("request")[-1]["client"]


async def raw(gateway, caller, preface, tls=None):
    """The beginning of the answer to a request behind a preface."""
    host, port = gateway.listen.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(preface)
    if tls is not None:
        await writer.drain()
        await writer.start_tls(tls, server_hostname="localhost")
    body = b'{"messages": [{"role": "user", "content": "Hello"}]}'
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        f"content-type: application/json\r\nauthorization: {caller.auth['authorization']}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    try:
        return (await asyncio.wait_for(reader.read(), 5))[:15]
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_forwarded_for_is_believed_from_trusted_proxies(site):
    gateway = await site.gateway(trusted_proxies=["127.0.0.0/8"])
    caller = await site.key()
    await post(gateway.url, caller, **{"X-Forwarded-For": "6.6.6.6, 203.0.113.7"})
    assert "203.0.113.7" == await client_logged(gateway)


async def test_and_from_nobody_else(site):
    gateway = await site.gateway(trusted_proxies=["10.0.0.0/8"])
    caller = await site.key()
    await post(gateway.url, caller, **{"X-Forwarded-For": "203.0.113.7", "Forwarded": "for=203.0.113.7"})
    assert "127.0.0.1" == await client_logged(gateway)


@pytest.mark.parametrize(
    "preface, client", [(PROXY_V1, "203.0.113.7"), (PROXY_V2, "203.0.113.8"), (PROXY_LOCAL, "127.0.0.1")]
)
async def test_the_proxy_protocol_tells_the_client(site, preface, client):
    gateway = await site.gateway(proxy_protocol=True)
    assert b"HTTP/1.1 200 OK" == await raw(gateway, await site.key(), preface)
    assert client == await client_logged(gateway)


@MODES
async def test_without_its_header_a_connection_is_closed(site, workers):
    gateway = await site.gateway(proxy_protocol=True, workers=workers)
    caller = await site.key()
    assert b"" == await raw(gateway, caller, b"")
    assert b"HTTP/1.1 200 OK" == await raw(gateway, caller, PROXY_V2)


async def test_a_stranger_can_t_speak_for_others(site):
    gateway = await site.gateway(proxy_protocol=True, trusted_proxies=["10.0.0.0/8"])
    assert b"" == await raw(gateway, await site.key(), PROXY_V2)


@pytest.fixture
def tls(tmp_path):
    """A client's context, and the server's settings."""
    authority = trustme.CA()
    issue(authority, tmp_path)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    settings = {"tls_cert": str(tmp_path / "tls.crt"), "tls_key": str(tmp_path / "tls.key")}
    return context, settings, authority


def issue(authority, tmp_path):
    issued = authority.issue_cert("localhost", "127.0.0.1")
    (tmp_path / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    (tmp_path / "tls.key").write_bytes(issued.private_key_pem.bytes())


@MODES
async def test_tls_and_a_renewed_certificate(site, tls, tmp_path, workers):
    context, settings, authority = tls
    gateway = await site.gateway(workers=workers, **settings)
    caller = await site.key()
    url = f"https://{gateway.listen}"
    assert 200 == await post(url, caller, connector=aiohttp.TCPConnector(ssl=context))
    before = await serial(gateway, context)
    issue(authority, tmp_path)
    gateway.signal(1)
    await until(lambda: gateway.logged("reloaded"), "the reload")
    assert before != await serial(gateway, context)
    (tmp_path / "tls.key").write_text("nonsense")
    gateway.signal(1)
    await until(lambda: gateway.logged("reload_failed"), "its refusal")
    assert 200 == await post(url, caller, connector=aiohttp.TCPConnector(ssl=context))


async def serial(gateway, context):
    host, port = gateway.listen.split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")
    certificate = writer.get_extra_info("peercert")
    writer.close()
    return certificate["serialNumber"]


async def test_tls_behind_the_proxy_protocol(site, tls):
    context, settings, _ = tls
    gateway = await site.gateway(proxy_protocol=True, **settings)
    assert b"HTTP/1.1 200 OK" == await raw(gateway, await site.key(), PROXY_V2, context)
    assert "203.0.113.8" == await client_logged(gateway)


async def test_a_certificate_that_is_no_use_is_a_fault(site, tmp_path):
    (tmp_path / "x.pem").write_text("nonsense")
    gateway = site.configure(tls_cert=str(tmp_path / "x.pem"), tls_key=str(tmp_path / "x.pem"))
    await gateway.start()
    assert 78 == await gateway.exit()
    assert gateway.noise[0].startswith(f"server.tls_cert: {tmp_path}/x.pem"), gateway.noise


async def test_a_key_that_is_not_there_is_a_fault(site, tmp_path):
    (tmp_path / "x.pem").write_text("nonsense")
    gateway = site.configure(tls_cert=str(tmp_path / "x.pem"), tls_key=str(tmp_path / "none"))
    await gateway.start()
    assert 78 == await gateway.exit()
    assert gateway.noise[0].startswith(f"server.tls_key: {tmp_path}/none"), gateway.noise


@MODES
async def test_unix_sockets(site, tmp_path, workers):
    path = tmp_path / "data.sock"
    gateway = site.configure(listen=f"unix:{path}", workers=workers)
    await site.started(gateway)
    caller = await site.key()
    forwarded = {"X-Forwarded-For": "203.0.113.7"}
    assert 200 == await post("http://localhost", caller, connector=aiohttp.UnixConnector(str(path)), **forwarded)
    assert "203.0.113.7" == await client_logged(gateway)


@MODES
async def test_ipv6(site, workers):
    port = free_port()
    gateway = site.configure(listen=f"[::1]:{port}", workers=workers)
    await site.started(gateway)
    assert 200 == await post(f"http://[::1]:{port}", await site.key())
    assert "::1" == await client_logged(gateway)


@MODES
async def test_the_admin_token_guards_all_but_the_probes(site, monkeypatch, workers):
    monkeypatch.setenv("ADMIN", "t0ken")
    gateway = await site.gateway(workers=workers)
    gateway.signal(15)
    await gateway.exit()
    text = gateway.path.read_text().replace("[log]", 'admin_token = { env = "ADMIN" }\n[log]')
    gateway.path.write_text(text)
    await site.started(gateway)
    found = {}
    for path in ("/readyz", "/healthz", "/metrics", "/status"):
        async with site.http.get(gateway.admin + path) as answer:
            found[path] = answer.status
    assert {"/readyz": 200, "/healthz": 200, "/metrics": 401, "/status": 401} == found
    async with site.http.get(f"{gateway.admin}/metrics", headers={"authorization": "Bearer t0ken"}) as answer:
        assert 200 == answer.status
