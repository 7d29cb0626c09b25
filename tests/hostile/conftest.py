"""Hostile clients, against the whole gateway on the loop that it runs on in production; in a process of its own where its
memory and its time are measured.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import uvloop

from tests.harness.mesh import settings_for

ROOT = Path(__file__).parent.parent.parent
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PATIENCE_S = 20.0


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}


class Alone:
    """A gateway's process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    @property
    def rss_bytes(self) -> int:
        return int(self._proc("statm").split()[1]) * PAGE_BYTES

    @property
    def cpu_s(self) -> float:
        user, system = self._proc("stat").rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / TICKS_PER_S

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    async def living(self) -> dict[str, int]:
        """How much there is in it of what must not grow."""
        self._process.stdin.write(b"look\n")
        return json.loads(await self._process.stdout.readline())

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """A blocking connection."""
        client = socket.socket()
        client.settimeout(PATIENCE_S)
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(("127.0.0.1", self.port))
        return client

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self._process.pid}/{name}").read_text()


@pytest.fixture
async def alone(store_server, simulator, fast_path) -> AsyncIterator:
    async with AsyncExitStack() as stack:

        async def start(*, descriptors=None, **tables) -> Alone:
            tables["server"] = {"fast_path": fast_path, **tables.get("server", {})}
            return await stack.enter_async_context(running(store_server, simulator, descriptors, tables))

        yield start


@pytest.fixture
def measured(capsys):
    """Show a figure, also where a test passes."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"  {line}\n")

    return show


@asynccontextmanager
async def running(store_url, simulator, descriptors, tables) -> AsyncIterator[Alone]:
    settings = msgspec.to_builtins(settings_for(store_url, simulator.base_url, **tables))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).parent / "alone.py"),
        json.dumps({"settings": settings, "descriptors": descriptors}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            port = int(await process.stdout.readline())
        yield Alone(process, port)
        process.stdin.close()
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
