"""Real TCP servers on loopback that answer from a script, sinks that write down what they hear, and a count of what is left."""

import asyncio
import contextlib
import socket
import struct
from pathlib import Path

import pytest
import uvloop

from meshproxy import config
from meshproxy.upstream.provider import Provider
from tests.harness.waiting import turns


def pytest_asyncio_loop_factories(config, item):
    """Whatever opens sockets is tried on both loops, which differ in how their transports end."""
    loops = {"asyncio": asyncio.new_event_loop}
    if "nothing_left" in item.fixturenames:
        loops["uvloop"] = uvloop.new_event_loop
    return loops


def open_sockets():
    """The inodes of this process's TCP sockets. The loops' own sockets are of another family."""
    own = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(str(link.readlink()))
    lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]]
    return {inode for inode in (line.split()[9] for line in lines) if f"socket:[{inode}]" in own}


class Conversation:
    """The server's end of one connection."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    async def request(self):
        """One whole request, as it came."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head + await self.reader.readexactly(length)

    async def send(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, data):
        """Read one request, then send."""
        request = await self.request()
        await self.send(data)
        return request

    async def hang_up(self):
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def reset(self):
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def until_closed(self):
        """Wait until the client's end is gone."""
        with contextlib.suppress(OSError):
            while await self.reader.read(65536):
                pass


class Server:
    """A listener: `script` plays each connection; `connections` were taken, of which `closed` are over."""

    def __init__(self, script, port):
        self.script = script
        self.url = f"http://127.0.0.1:{port}/v1"
        self.connections = 0
        self.closed = 0
        self.tasks = []


@pytest.fixture
async def serve(nothing_left):
    """Start a server for a script; all stop when the test ends."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(script, ssl=None):
            async def play(reader, writer):
                server.connections += 1
                server.tasks.append(asyncio.current_task())
                try:
                    await script(Conversation(reader, writer))
                except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                    pass
                finally:
                    server.closed += 1
                    writer.transport.abort()

            listener = await asyncio.start_server(play, "127.0.0.1", 0, ssl=ssl)
            server = Server(script, listener.sockets[0].getsockname()[1])

            async def stop():
                listener.close()
                for task in server.tasks:
                    task.cancel()
                await asyncio.gather(*server.tasks)

            stack.push_async_callback(stop)
            return server

        yield start


@pytest.fixture
async def provide(nothing_left):
    """Make a provider of a URL and settings; all are closed when the test ends."""
    async with contextlib.AsyncExitStack() as stack:

        def make(base_url, api_key="sk-canary", ssl_context=None, **settings):
            upstream = config.Upstream(kind="openai", base_url=base_url, **settings)
            provider = Provider("openai", upstream, api_key, ssl_context=ssl_context)
            stack.push_async_callback(provider.close)
            return provider

        yield make


@pytest.fixture
async def nothing_left():
    """No task and no socket outlives a test."""
    before = open_sockets()
    yield
    await turns()  # in which closed transports let go of their sockets
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert left == []
    assert open_sockets() - before == set()


class Recorder:
    """A sink that writes down every call."""

    def __init__(self):
        self.calls = []
        self.over = asyncio.get_running_loop().create_future()
        self.begun = asyncio.get_running_loop().create_future()

    def data(self, payload, frame):
        self.calls.append(("data", payload, frame))
        if not self.begun.done():
            self.begun.set_result(None)

    def end(self):
        self.calls.append(("end",))
        self.over.set_result(None)

    def fail(self, fault):
        self.calls.append(("fail", fault.response.code))
        self.over.set_result(fault)

    @property
    def payload(self):
        return b"".join(call[1] for call in self.calls if call[0] == "data")

    @property
    def last(self):
        return self.calls[-1]


@pytest.fixture
def record():
    """Make sinks."""
    return Recorder
