"""A master that Sentinel names, and the next one after a failover."""

import asyncio
import signal
from contextlib import ExitStack
from functools import partial

import pytest
import redis

from meshproxy.config import Redis
from meshproxy.ledger.connection import Unavailable, connect
from tests.harness.waiting import until
from tests.ledger.conftest import binary, eventually, free_ports, spawn

pytestmark = pytest.mark.xdist_group("sentinel")


@pytest.fixture
def trio(tmp_path):
    """A Sentinel's port, the master it watches, and the port of that one's replica."""
    sentinel, master, replica = free_ports(3)
    (tmp_path / "sentinel.conf").write_text(
        f"port {sentinel}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 3000\n"
    )
    with ExitStack() as stack:
        start = partial(spawn, stack, binary("valkey"), cwd=tmp_path)
        common = ("--bind", "127.0.0.1", "--save", "", "--repl-diskless-sync-delay", "0")
        master_process = start("--port", master, *common)
        start("--port", replica, "--replicaof", f"127.0.0.1 {master}", *common)
        admin = stack.enter_context(redis.Redis(port=replica))
        eventually(lambda: admin.info("replication")["master_link_status"] == "up")
        start("sentinel.conf", "--sentinel")
        watcher = stack.enter_context(redis.Redis(port=sentinel))
        eventually(lambda: watcher.sentinel_masters()["mymaster"]["num-slaves"] == 1)
        yield sentinel, master_process, replica


async def test_the_master_is_found_and_after_its_death_the_next(trio):
    sentinel, master_process, replica = trio
    nobody, no_sentinel = "127.0.0.1:1", f"127.0.0.1:{replica}"
    store = await connect(Redis(url=f"redis+sentinel://{nobody},{no_sentinel},127.0.0.1:{sentinel}/mymaster/2"))
    assert await store.execute("SET", "x", 1) == b"OK"
    assert await store.execute("WAIT", 1, 1000) == 1
    master_process.send_signal(signal.SIGKILL)
    await until(lambda: not store.connected)
    with pytest.raises(Unavailable):
        await store.execute("GET", "x")
    await until(lambda: store.connected)
    assert await store.execute("GET", "x") == b"1"
    assert f":{replica}".encode() in await store.execute("CLIENT", "INFO")
    assert await store.execute("INCR", "x") == 2
    await store.close()


async def test_a_master_that_nobody_knows():
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=f"redis+sentinel://127.0.0.1:{free_ports(1)[0]}/mymaster"))
    assert "no Sentinel names a master mymaster" in caught.value.reason


async def test_sentinels_that_say_nothing_are_asked_once_each():
    """Without redis-py's retries, whose pauses would be longer than a request may wait."""
    calls = []

    async def say_nothing(reader, writer):
        calls.append(1)
        await reader.read()
        writer.close()

    mute = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    host = f"127.0.0.1:{mute.sockets[0].getsockname()[1]}"
    started = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable):
        await connect(Redis(url=f"redis+sentinel://{host},{host}/mymaster", timeout_s=0.1))
    assert (len(calls), 0.15 < asyncio.get_running_loop().time() - started < 1) == (2, True)
    mute.close()
    await mute.wait_closed()
