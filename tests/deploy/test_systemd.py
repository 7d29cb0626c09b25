"""What systemd hears of a service of Type=notify, and how it hands over secrets."""

import asyncio
import json
import os
import signal
import socket
import sys

import pytest

from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from tests.deploy.conftest import until


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
    await gateway.start(env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")})
    site.stack.push_async_callback(gateway.end)
    assert "READY=1" == await heard(notifications)
    await until(lambda: site.ready(gateway), "readiness")
    gateway.signal(signal.SIGHUP)
    assert "RELOADING=1" == await heard(notifications)
    assert ["READY=1", "STATUS=reloaded, generation 2"] == await told(notifications)
    gateway.path.write_text(gateway.path.read_text().replace('"2.50"', '"-2.50"', 1))
    gateway.signal(signal.SIGHUP)
    assert "RELOADING=1" == await heard(notifications)
    ready, status = await told(notifications)
    cause = 'reload failed, generation 2 goes on: models."openai/gpt-4o".input_usd_per_mtok: '
    assert ("READY=1", True) == (ready, status.startswith(f"STATUS={cause}"))
    gateway.signal(signal.SIGTERM)
    assert "STOPPING=1" == await heard(notifications)
    assert 0 == await gateway.exit()


async def test_a_secret_is_a_credential_s_file(site, tmp_path):
    (tmp_path / "openai").write_text("sk-credential\n")
    gateway = site.configure()
    text = gateway.path.read_text()
    gateway.path.write_text(
        text.replace('kind = "simulator"', f'kind = "simulator"\napi_key = {{ file = "{tmp_path}/openai" }}', 1)
    )
    await site.started(gateway)
    caller = await site.key()
    async with site.http.post(
        f"{gateway.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hi"}]},
        headers=caller.auth,
    ) as answer:
        assert 200 == answer.status
    (entry,) = site.provider.history.requests
    assert ["Bearer sk-credential"] == [value for name, value in entry.headers if name.lower() == "authorization"]


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
        text = gateway.path.read_text().replace(f'url = "{site.redis}"', redis.format(url=server.url, dir=tmp_path))
        headers = f'headers = {{ "api-key" = {{ file = "{tmp_path}/azure" }} }}'
        gateway.path.write_text(text.replace('kind = "simulator"', f'kind = "simulator"\n{headers}'))
        env = {**os.environ, "STORE": with_password}
        await gateway.start(env=env)
        site.stack.push_async_callback(gateway.end)
        await until(lambda: site.ready(gateway), "readiness")
        minting = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "meshproxy",
                "keys",
                "create",
                "--account",
                "acme",
                "--config",
                str(gateway.path),
                "--json",
            ),
            env=env,
            stdout=asyncio.subprocess.PIPE,
        )
        key = json.loads((await minting.communicate())[0])["key"]
        store = await connect(Redis(url=with_password))
        await Ledger(store).grant("acme", 10**9)
        await store.close()
        async with site.http.post(
            f"{gateway.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "Hi"}]},
            headers={"authorization": f"Bearer {key}"},
        ) as answer:
            assert 200 == answer.status
        await gateway.end()
    (entry,) = site.provider.history.requests
    assert ["azure-credential"] == [value for name, value in entry.headers if name.lower() == "api-key"]
    told = json.dumps(gateway.lines) + "".join(gateway.noise)
    assert not any(secret in told for secret in ("p/w @1", "p%2Fw", "azure-credential"))
