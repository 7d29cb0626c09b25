"""The embedded server answers, keeps nothing unless it is told to, and never outlives the one who started it."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.embedded import Embedded

ORPHAN = """
import asyncio, os, sys
from meshproxy.ledger.embedded import Embedded

async def main():
    server = Embedded()
    await server.start()
    print(server.process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_it_answers_on_a_private_socket_and_no_port():
    async with Embedded() as server:
        store = await connect(Redis(url=server.url))
        assert await store.execute("PING") == b"PONG"
        assert await store.execute("CONFIG", "GET", "port") == [b"port", b"0"]
        directory = Path(server.url.removeprefix("unix://")).parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        await store.close()
    assert not directory.exists()


async def test_stop_ends_the_process():
    server = Embedded()
    await server.start()
    pid = server.process.pid
    await server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_option_wins_over_ours(tmp_path):
    for expected in (b"1", b"2"):
        async with Embedded("--appendonly", "yes", "--dir", str(tmp_path)) as server:
            store = await connect(Redis(url=server.url))
            assert await store.execute("INCR", "starts") == int(expected)
            await store.close()


async def test_a_server_that_cannot_start_says_why():
    server = Embedded("--maxmemory", "nonsense")
    with pytest.raises(RuntimeError, match=r"(?s)did not start: .*maxmemory"):
        await server.start()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a stranger's child as only Linux can")
async def test_it_dies_with_its_parent():
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ORPHAN, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    pid = int(await parent.stdout.readline())
    watched = os.pidfd_open(pid)
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(watched, gone.set)  # readable once the process is gone
    try:
        parent.send_signal(signal.SIGKILL)
        await parent.wait()
        await asyncio.wait_for(gone.wait(), 5)
    finally:
        asyncio.get_running_loop().remove_reader(watched)
        os.close(watched)
