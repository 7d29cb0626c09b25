"""The whole gateway on the loop that it runs on in production, and providers that answer what a test tells them to."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvloop


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}


class Scripted:
    """A provider on a port of its own. It answers every request alike: `status`, `headers` and `body` (JSON, text or bytes) after
    `delay_s`, whose end is that of the connection. `asked`: the bodies that it was sent.
    """

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body: Any = b""
        self.delay_s = 0.0
        self.asked: list[dict[str, Any]] = []
        self.url = ""

    def answers(self, status: int, body: Any, delay_s: float = 0.0, **headers: str) -> "Scripted":
        """Answer so from now on. Underscores in names of headers stand for hyphens."""
        self.status, self.body, self.delay_s = status, body, delay_s
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self

    async def play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection's only request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        self.asked.append(json.loads(await reader.readexactly(length)))
        await asyncio.sleep(self.delay_s)
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        headers = {"content-type": "application/json", "connection": "close", **self.headers}
        lines = [f"HTTP/1.1 {self.status} X", *(f"{name}: {value}" for name, value in headers.items() if value), "\r\n"]
        writer.write("\r\n".join(lines).encode() + body)
        writer.close()


@pytest.fixture
async def providers() -> AsyncIterator[Callable[[], Awaitable[Scripted]]]:
    """Start scripted providers."""
    async with AsyncExitStack() as stack:

        async def start() -> Scripted:
            provider = Scripted()
            server = await asyncio.start_server(provider.play, "127.0.0.1", 0)
            stack.callback(server.close)
            provider.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            return provider

        yield start
