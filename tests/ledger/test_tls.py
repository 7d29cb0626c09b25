"""rediss:// verifies who answers, by authority and by name."""

import asyncio
import ssl

import pytest
import trustme

from meshproxy.config import Redis
from meshproxy.ledger.connection import Unavailable, connect
from meshproxy.ledger.embedded import Embedded


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
async def port(authority):
    """A server for Redis's protocol behind TLS, whose certificate is for localhost."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with Embedded() as server:

        async def relay(reader, writer):
            there_reader, there_writer = await asyncio.open_unix_connection(server.url.removeprefix("unix://"))
            await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

        front = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        yield front.sockets[0].getsockname()[1]
        front.close()
        await front.wait_closed()


async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.fixture
def ca_file(authority, tmp_path):
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


async def test_a_known_authority_and_the_right_name(port, ca_file):
    store = await connect(Redis(url=f"rediss://localhost:{port}/1?ca_file={ca_file}"))
    assert await store.execute("SET", "x", "y" * 100_000) == b"OK"
    assert await store.execute("GET", "x") == b"y" * 100_000
    await store.close()


async def test_an_unknown_authority(port):
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=f"rediss://localhost:{port}"))
    assert "certificate verify failed" in caught.value.reason


async def test_a_ca_file_is_trusted_alone(port, ca_file, tmp_path, monkeypatch):
    """Not beside the system's authorities, which redis-py would add."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    system = await connect(Redis(url=f"rediss://localhost:{port}"))
    await system.close()
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=f"rediss://localhost:{port}?ca_file={other}"))
    assert "certificate verify failed" in caught.value.reason


async def test_another_name(port, ca_file):
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=f"rediss://127.0.0.1:{port}?ca_file={ca_file}"))
    assert "IP address mismatch" in caught.value.reason


async def test_a_server_without_tls(ca_file):
    async def hang_up(reader, writer):
        await reader.read(1)
        writer.write(b"-ERR Protocol error\r\n")
        writer.close()

    plain = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    with pytest.raises(Unavailable):
        await connect(Redis(url=f"rediss://localhost:{plain.sockets[0].getsockname()[1]}?ca_file={ca_file}"))
    plain.close()
    await plain.wait_closed()
