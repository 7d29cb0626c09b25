"""What systemd hears of a service of Type=notify, and how it hands over secrets."""

import asyncio
import os
import signal
import socket

import pytest

from tests.deploy.conftest import until


@pytest.fixture
def notifications(tmp_path):
    """The states that were sent, as they come."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


async def heard(sock):
    return (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 4096), 10)).decode().split("\n")[0]


@pytest.mark.parametrize("workers", [1, 2])
async def test_each_state_is_told_when_it_holds(site, notifications, tmp_path, workers):
    gateway = site.configure(workers=workers)
    await gateway.start(env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")})
    site.stack.push_async_callback(gateway.end)
    assert "READY=1" == await heard(notifications)
    await until(lambda: site.ready(gateway), "readiness")
    gateway.signal(signal.SIGHUP)
    assert ["RELOADING=1", "READY=1"] == [await heard(notifications), await heard(notifications)]
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
    (entry,) = site.provider.journal.entries
    assert ["Bearer sk-credential"] == [value for name, value in entry.headers if name.lower() == "authorization"]
