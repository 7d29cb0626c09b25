"""The ways in: TLS, the PROXY protocol, unix sockets, IPv6; and who the gateway takes its clients to be."""

import asyncio
import socket
import ssl

import aiohttp
import pytest
import trustme

from meshproxy.server.client_address import SIGNATURE
from tests.harness.clients import chat, chat_bytes, fetch, next_answer
from tests.harness.process import free_port
from tests.harness.waiting import until

MODES = pytest.mark.parametrize("workers", [1, 2])
PROXY_V1 = b"PROXY TCP4 203.0.113.7 127.0.0.1 56324 443\r\n"
PROXY_V2 = (
    SIGNATURE
    + b"\x21\x11\x00\x0c"
    + socket.inet_aton("203.0.113.8")
    + socket.inet_aton("127.0.0.1")
    + b"\x00\x01\x01\xbb"
)
PROXY_LOCAL = SIGNATURE + b"\x20\x00\x00\x00"


FORWARDED = ("X-Forwarded-For: 6.6.6.6, 203.0.113.7", "Forwarded: for=203.0.113.7")
TRUSTING, ELSEWHERE = {"trusted_proxies": ["127.0.0.0/8"]}, {"trusted_proxies": ["10.0.0.0/8"]}
PROXIED = {"proxy_protocol": True}

# what is set of the server, what stands before the request and in its head, and the client in the log; None: hung up on
CLIENTS = {
    "forwarded by a trusted proxy": (TRUSTING, b"", FORWARDED[:1], "203.0.113.7"),
    "forwarded by another": (ELSEWHERE, b"", FORWARDED, "127.0.0.1"),
    "the PROXY protocol, version 1": (PROXIED, PROXY_V1, (), "203.0.113.7"),
    "the PROXY protocol, version 2": (PROXIED, PROXY_V2, (), "203.0.113.8"),
    "the PROXY protocol, a check": (PROXIED, PROXY_LOCAL, (), "127.0.0.1"),
    "no PROXY header": (PROXIED, b"", (), None),
    "no PROXY header, two workers": ({**PROXIED, "workers": 2}, b"", (), None),
    "the PROXY protocol, two workers": ({**PROXIED, "workers": 2}, PROXY_V2, (), "203.0.113.8"),
    "the PROXY protocol, by a stranger": ({**PROXIED, **ELSEWHERE}, PROXY_V2, (), None),
}


async def client_logged(gateway):
    """The client of the last request."""
    await until(lambda: gateway.logged("request"), "the request's line")
    return gateway.logged("request")[-1]["client"]


async def status_of(gateway, caller, preface, *lines, tls=None):
    """The status of the answer to a request behind a preface; None if the connection is closed without one."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(preface)
    if tls is not None:
        await writer.drain()
        await writer.start_tls(tls, server_hostname="localhost")
    writer.write(chat_bytes(caller.auth, *lines))
    try:
        return (await next_answer(reader))[0]
    except (ConnectionError, asyncio.IncompleteReadError):
        return None
    finally:
        writer.close()


@pytest.mark.parametrize("way", CLIENTS)
async def test_the_client_is_who_may_say_so(site, way):
    settings, preface, lines, client = CLIENTS[way]
    gateway = await site.gateway(**settings)
    status = await status_of(gateway, await site.key(), preface, *lines)
    assert status == (None if client is None else 200)
    if client is not None:
        assert await client_logged(gateway) == client


async def post(url, caller, connector, **headers):
    async with aiohttp.ClientSession(connector=connector) as http:
        return (await chat(url, caller.auth, session=http, headers=headers)).status


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
    assert await post(url, caller, aiohttp.TCPConnector(ssl=context)) == 200
    before = await serial(gateway, context)
    issue(authority, tmp_path)
    gateway.send(1)
    await until(lambda: gateway.logged("reloaded"), "the reload")
    assert await serial(gateway, context) != before
    (tmp_path / "tls.key").write_text("nonsense")
    gateway.send(1)
    await until(lambda: gateway.logged("reload_failed"), "its refusal")
    assert await post(url, caller, aiohttp.TCPConnector(ssl=context)) == 200


async def serial(gateway, context):
    _, writer = await asyncio.open_connection(*gateway.address, ssl=context, server_hostname="localhost")
    certificate = writer.get_extra_info("peercert")
    writer.close()
    return certificate["serialNumber"]


async def test_tls_behind_the_proxy_protocol(site, tls):
    context, settings, _ = tls
    gateway = await site.gateway(**PROXIED, **settings)
    assert await status_of(gateway, await site.key(), PROXY_V2, tls=context) == 200
    assert await client_logged(gateway) == "203.0.113.8"


@pytest.mark.parametrize("key, fault", [("x.pem", "tls_cert: {}/x.pem"), ("none", "tls_key: {}/none")])
async def test_a_certificate_or_key_that_is_no_use_is_a_fault(site, tmp_path, key, fault):
    (tmp_path / "x.pem").write_text("nonsense")
    gateway = site.configure(tls_cert=str(tmp_path / "x.pem"), tls_key=str(tmp_path / key))
    gateway.launch()
    assert await gateway.exit() == 78
    assert gateway.noise[0].startswith(f"server.{fault.format(tmp_path)}"), gateway.noise


@MODES
async def test_unix_sockets(site, tmp_path, workers):
    path = tmp_path / "data.sock"
    gateway = await site.gateway(listen=f"unix:{path}", workers=workers)
    forwarded = {"X-Forwarded-For": "203.0.113.7"}
    assert await post("http://localhost", await site.key(), aiohttp.UnixConnector(str(path)), **forwarded) == 200
    assert await client_logged(gateway) == "203.0.113.7"


@MODES
async def test_ipv6(site, workers):
    gateway = await site.gateway(listen=f"[::1]:{free_port()}", workers=workers)
    assert (await site.chat(gateway, await site.key())).status == 200
    assert await client_logged(gateway) == "::1"


@MODES
async def test_the_admin_token_guards_all_but_the_probes(site, monkeypatch, workers):
    monkeypatch.setenv("ADMIN", "t0ken")
    gateway = site.configure(workers=workers, admin_token={"env": "ADMIN"})
    gateway.auth = {"authorization": "Bearer t0ken"}
    await gateway.started()
    pages = ("/readyz", "/healthz", "/metrics", "/status")
    found = {page: (await fetch("GET", gateway.admin + page)).status for page in pages}
    assert found == {"/readyz": 200, "/healthz": 200, "/metrics": 401, "/status": 401}
    assert (await fetch("GET", f"{gateway.admin}/metrics", headers=gateway.auth)).status == 200
