"""A running simulator, and three ways to talk to it: OpenAI's SDK, aiohttp, and a bare socket."""

import asyncio
import json
from dataclasses import dataclass, field

import aiohttp
import pytest
import uvloop
from openai import AsyncOpenAI

from meshproxy.simulator import Running, start
from tests.harness.waiting import PATIENCE_S

HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
async def simulator():
    running = await start()
    yield running
    await running.close()


@pytest.fixture
async def sdk(simulator: Running):
    async with AsyncOpenAI(base_url=simulator.base_url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(simulator: Running):
    root = f"http://{simulator.host}:{simulator.port}"
    async with aiohttp.ClientSession(root, auto_decompress=False) as session:
        yield session


@dataclass
class Answer:
    """What came over a bare socket, read by read."""

    reads: list[bytes] = field(default_factory=list)
    broken: type[BaseException] | None = None

    @property
    def head(self) -> bytes:
        return b"".join(self.reads).partition(b"\r\n\r\n")[0]

    @property
    def status(self) -> int:
        return int(self.head.split()[1]) if self.head else 0

    @property
    def body(self) -> bytes:
        return b"".join(self.reads).partition(b"\r\n\r\n")[2]

    @property
    def content(self) -> bytes:
        """The body out of its chunks, as far as they are whole."""
        rest, content = self.body, b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            if not size.isalnum() or len(rest) < int(size, 16):
                break
            content, rest = content + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return content


@dataclass
class Wire:
    """A bare connection to the simulator."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def ask(self, *, version: str = "1.1", headers: dict[str, str] | None = None, **fields: object) -> None:
        body = json.dumps({"model": "sim/fast", "messages": HELLO, **fields}).encode()
        lines = {"host": "sim", "content-length": str(len(body)), **(headers or {})}
        told = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.writer.write(f"POST /v1/chat/completions HTTP/{version}\r\n{told}\r\n".encode() + body)

    async def to_the_end(self) -> Answer:
        answer = Answer()
        try:
            while read := await self.reader.read(65536):
                answer.reads.append(read)
        except ConnectionResetError as error:
            answer.broken = type(error)
        return answer

    async def until(self, mark: bytes) -> Answer:
        answer = Answer()
        async with asyncio.timeout(PATIENCE_S):
            while mark not in b"".join(answer.reads):
                read = await self.reader.read(65536)
                assert read, f"it ended without {mark!r}"
                answer.reads.append(read)
        return answer


@pytest.fixture
async def wire(simulator: Running):
    reader, writer = await asyncio.open_connection(simulator.host, simulator.port)
    yield Wire(reader, writer)
    writer.close()


def pytest_asyncio_loop_factories(config, item):
    """What a bare socket sees is tried on both loops, which differ in how their transports close and reset."""
    loops = {"asyncio": asyncio.new_event_loop}
    if "wire" in item.fixturenames:
        loops["uvloop"] = uvloop.new_event_loop
    return loops
