"""What systemd hears of a service of Type=notify, and how it hands over secrets."""

import asyncio
import json
import signal
import socket

import pytest

from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from tests.harness.clients import chat
from tests.harness.waiting import until


@pytest.fixture
def notifications(tmp_path):
    """The states that were sent, as they come."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


async def heard(sock):
    return (await told(sock))[0]


async def told(sock):
    """The lines of the next datagram."""
    return (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 4096), 10)).decode().split("\n")


@pytest.mark.parametrize("workers", [1, 2])
async def test_each_state_is_told_when_it_holds(site, notifications, tmp_path, workers):
    gateway = site.configure(workers=workers)
    gateway.launch(env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
    assert await heard(notifications) == "READY=1"
    await until(gateway.is_ready, "readiness")
    gateway.send(signal.SIGHUP)
    assert await heard(notifications) == "RELOADING=1"
    assert await told(notifications) == ["READY=1", "STATUS=reloaded, generation 2"]
    gateway.replace('"2.50"', '"-2.50"')
    gateway.send(signal.SIGHUP)
    assert await heard(notifications) == "RELOADING=1"
    ready, status = await told(notifications)
    cause = 'reload failed, generation 2 goes on: models."openai/gpt-4o".input_usd_per_mtok: '
    assert (ready, status.startswith(f"STATUS={cause}")) == ("READY=1", True)
    gateway.send(signal.SIGTERM)
    assert await heard(notifications) == "STOPPING=1"
    assert await gateway.exit() == 0


async def test_a_secret_is_a_credential_s_file(site, tmp_path):
    (tmp_path / "openai").write_text("sk-credential\n")
    gateway = site.configure()
    gateway.replace('kind = "simulator"', f'kind = "simulator"\napi_key = {{ file = "{tmp_path}/openai" }}')
    await gateway.started()
    assert (await site.chat(gateway, await site.key())).status == 200
    (entry,) = site.provider.history.requests
    assert [value for name, value in entry.headers if name.lower() == "authorization"] == ["Bearer sk-credential"]


@pytest.mark.parametrize(
    "redis", ["url = {{ env = 'STORE' }}", "url = '{url}'\npassword = {{ file = '{dir}/password' }}"]
)
async def test_the_store_s_password_and_a_header_are_secrets_too(site, tmp_path, redis):
    (tmp_path / "password").write_text("p/w @1\n")
    (tmp_path / "azure").write_text("azure-credential\n")
    async with Embedded() as server:
        store = await connect(Redis(url=server.url))
        await store.execute("CONFIG", "SET", "requirepass", "p/w @1")
        await store.close()
        with_password = server.url.replace("unix://", "unix://:p%2Fw%20%401@")
        gateway = site.configure(workers=2)
        gateway.replace(f'url = "{site.redis}"', redis.format(url=server.url, dir=tmp_path))
        headers = f'headers = {{ "api-key" = {{ file = "{tmp_path}/azure" }} }}'
        gateway.replace('kind = "simulator"', f'kind = "simulator"\n{headers}')
        await gateway.started(env={"STORE": with_password})
        key = gateway.command("keys", "create", "--account", "acme", env={"STORE": with_password})["key"]
        store = await connect(Redis(url=with_password))
        await Ledger(store).grant("acme", 10**9)
        await store.close()
        assert (await chat(gateway.url, {"authorization": f"Bearer {key}"})).status == 200
        gateway.end()
    (entry,) = site.provider.history.requests
    assert [value for name, value in entry.headers if name.lower() == "api-key"] == ["azure-credential"]
    told = json.dumps(gateway.lines) + "".join(gateway.noise)
    assert not any(secret in told for secret in ("p/w @1", "p%2Fw", "azure-credential"))
