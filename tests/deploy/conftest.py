"""`meshproxy serve` as processes of their own, as operators run it: started, signalled, killed, and put behind real balancers.
Everything is on loopback, every wait is bounded, and what a test started it ends.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from meshproxy.policy.principal import Limits
from meshproxy.simulator import Running
from tests.harness.books import Books, Caller
from tests.harness.clients import Answer, chat
from tests.harness.mesh import model
from tests.harness.process import Gateway, Tables
from tests.harness.waiting import until

ROOT = Path(__file__).parents[2]
PLENTY = Limits(requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000)


class Site:
    """A store, a provider, gateways, and somebody to call them."""

    def __init__(self, redis: str, provider: Running, home: Path, http: aiohttp.ClientSession, books: Books) -> None:
        self.redis = redis
        self.provider = provider
        self.home = home
        self.http = http
        self.books = books
        self.gateways: list[Gateway] = []

    async def key(self, credit: str = "25.00") -> Caller:
        return await self.books.key(credit=credit, limits=PLENTY)

    def configure(
        self, gateway: Gateway | None = None, *, level: str = "info", models: tuple[str, ...] = (), **server: Any
    ) -> Gateway:
        """Write the configuration of a gateway, a new one unless it is given."""
        tables: Tables = {
            "server": {**(gateway.tables["server"] if gateway else {}), "workers": 1, "drain_s": 10, **server},
            "log": {"level": level},
            "redis": {"url": self.redis},
            "upstreams": {"sim": {"kind": "simulator", "base_url": self.provider.base_url}},
            "models": {"openai/gpt-4o": model("sim", "sim/plain?tokens=8")}
            | {name: model("sim", name) for name in models},
        }
        if gateway is None:
            gateway = Gateway(self.home, tables, name=f"gateway-{len(self.gateways)}")
            self.gateways.append(gateway)
        else:
            gateway.configure(tables)
        return gateway

    async def gateway(self, **options: Any) -> Gateway:
        """A gateway that is ready."""
        return await self.configure(**options).started()

    async def chat(self, gateway: Gateway, caller: Caller, **fields: Any) -> Answer:
        """A chat completion."""
        return await chat(gateway.url, caller.auth, session=self.http, **fields)

    def stream(self, url: str, caller: Caller, model: str, into: Answer | None = None) -> asyncio.Task[Answer]:
        """A stream that is being read."""
        reading = chat(url, caller.auth, session=self.http, into=into, model=model, stream=True)
        return asyncio.create_task(reading)

    async def flowing(self, url: str, caller: Caller, model: str) -> tuple[Answer, asyncio.Task[Answer]]:
        """A stream whose first event has come."""
        stream = Answer()
        task = self.stream(url, caller, model, stream)
        await until(lambda: stream.times or task.done(), "the first event")
        assert stream.times, stream.broken or stream.status
        return stream, task

    async def settled(self, caller: Caller, count: int) -> list[dict[str, str]]:
        """The settled events of an account, once there are so many; nothing is held then."""
        return await self.books.settled(caller.account, count)


@asynccontextmanager
async def open_site(redis: str, provider: Running, home: Path) -> AsyncIterator[Site]:
    """A site, all of whose gateways are ended."""
    books = await Books.open(redis)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        site = Site(redis, provider, home, http, books)
        try:
            yield site
        finally:
            for gateway in site.gateways:
                gateway.end()
    await books.close()


@pytest.fixture
async def site(store_server: str, simulator: Running, tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(store_server, simulator, tmp_path) as site:
        yield site


def tell(line: str) -> None:
    """A figure, for `pytest -s`."""
    sys.stdout.write(f"\n{line}\n")
