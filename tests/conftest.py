"""A whole gateway to test: a real store, a real simulated provider, real sockets. Each test has a gateway of its own and leaves
nothing in it: no hold, no task, no request in flight.
"""

import asyncio
import itertools
import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any

import aiohttp
import hypothesis
import msgspec
import openai
import pytest
from aiohttp import web

from meshproxy.app.application import application, strictness
from meshproxy.app.worker import Worker
from meshproxy.config import Settings
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.records import AccountKeys, Balance
from meshproxy.ledger.store import Store, Unavailable
from meshproxy.money import parse_usd
from meshproxy.policy.principal import Key, Principal
from meshproxy.server.listener import Runner, listen
from meshproxy.simulator import Running, SimulatorSettings, start
from meshproxy.simulator.behaviour import TRAITS
from meshproxy.simulator.delivery import CUTTING
from meshproxy.simulator.journal import Entry

hypothesis.settings.register_profile(
    "house", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # a busy machine is no finding
hypothesis.settings.load_profile("house")

HELLO = [{"role": "user", "content": "Hello there"}]
PATIENCE_S = 10.0  # for what should take milliseconds
STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 418, 422, 429, 500, 502, 503, 504, 529)
PRICE = {"input_usd_per_mtok": "2.50", "output_usd_per_mtok": "10.00"}

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def store_server() -> Iterator[str]:
    """The URL of a real server that runs as long as the tests do, watched over by a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Embedded()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
    try:
        yield server.url
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Caller:
    """A key that was made for a test. `auth` is its header."""

    def __init__(self, secret: str, key: Key) -> None:
        self.secret = secret
        self.key = key
        self.account = key.account
        self.auth = {"authorization": f"Bearer {secret}"}


def free_port() -> int:
    """A port of loopback that nobody has, for a program that can't be told to take any: below those that the kernel gives to
    connections (ip_local_port_range), of which the other tests' thousands would take it meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)  # tests seed the other one alike
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Answer:
    """What an HTTP request came back with."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The envelope's error, after the envelope itself was found to be as it must."""
        assert self.headers["content-type"] == "application/json", self.body
        told = self.json
        assert told["request_id"] == told["error"]["request_id"] == self.headers["x-request-id"]
        assert {"message", "type", "param", "code", "request_id"} <= told["error"].keys()
        return told["error"]

    @property
    def code(self) -> str:
        return self.error["code"]

    @property
    def events(self) -> list[Any]:
        """The data of each event of a stream; `[DONE]` as that string."""
        lines = self.body.decode().split("\n")
        texts = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    @property
    def text(self) -> str:
        """What the model said in a stream."""
        chunks = [event for event in self.events if event != "[DONE]" and event.get("choices")]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def usage_events(store: Store, account: str) -> list[dict[str, str]]:
    """An account's usage stream, oldest first."""
    entries = await store.execute("XRANGE", AccountKeys(account).usage, "-", "+")
    events = [[word.decode() for word in flat] for _, flat in entries]
    return [dict(zip(words[::2], words[1::2], strict=True)) for words in events]


class Lines:
    """The request log, kept."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, fields: dict[str, Any]) -> None:
        self.lines.append(fields)


class Mesh:
    """A gateway that listens, and what a test wants of it."""

    def __init__(self, worker: Worker, simulator: Running, log: Lines, host: str, port: int) -> None:
        self.worker = worker
        self.simulator = simulator
        self.log = log
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"
        self.callers: list[Caller] = []
        self.http = aiohttp.ClientSession(self.url, auto_decompress=False)
        self._sdks: list[openai.AsyncOpenAI] = []

    async def key(self, account: str | None = None, credit: str = "25.00", **fields: Any) -> Caller:
        """Mint a key, of a new account unless it is named, and grant the account credit."""
        secret, key = await self.worker.directory.create_key(account or f"acme-{next(_numbers)}", **fields)
        if parse_usd(credit):
            await self.worker.ledger.grant(key.account, parse_usd(credit))
        self.callers.append(Caller(secret, key))
        return self.callers[-1]

    def sdk(self, caller: Caller | str, **options: Any) -> openai.AsyncOpenAI:
        """OpenAI's SDK, pointed at the gateway."""
        secret = caller if isinstance(caller, str) else caller.secret
        client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=secret, **{"max_retries": 0, **options})
        self._sdks.append(client)
        return client

    async def chat(self, caller: Caller, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        """POST a chat completion; `messages` are a greeting unless given."""
        return await self.post(caller, {"messages": HELLO, **fields}, headers=headers)

    async def stream(self, caller: Caller, **fields: Any) -> Answer:
        """A streamed chat completion, read to its end."""
        return await self.chat(caller, stream=True, **fields)

    async def post(self, caller: Caller, body: Any, *, headers: Mapping[str, str] | None = None) -> Answer:
        """POST a body, as JSON unless it is bytes already."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        told = {"content-type": "application/json", **caller.auth, **(headers or {})}
        return await self.request("POST", "/v1/chat/completions", data=data, headers=told)

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """Any request."""
        async with self.http.request(method, path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def raw(self, data: bytes) -> bytes:
        """Bytes to the gateway's socket, and all that comes back until it is closed."""
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        writer.write(data)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await reader.read(-1)
        finally:
            writer.close()

    async def get(self, caller: Caller, path: str) -> Any:
        """The JSON at a path, which is there."""
        answer = await self.request("GET", path, headers=caller.auth)
        assert answer.status == 200, answer.body
        return answer.json

    async def quiet(self) -> None:
        """Return when every request is over and settled."""
        async with asyncio.timeout(PATIENCE_S):
            while self.worker.recorder.in_flight or self._of_requests():
                await asyncio.sleep(0)

    def _of_requests(self) -> list[asyncio.Future[Any]]:
        """What is under way for requests; dialling the store is nobody's."""
        return [
            work
            for work in self.worker.tasks._running
            if not (isinstance(work, asyncio.Task) and work.get_name().startswith("ledger-"))
        ]

    async def snapshot(self, caller: Caller) -> dict[bytes, bytes]:
        """Everything that the store has of an account."""
        store = self.worker.store
        keys = sorted(await store.execute("KEYS", f"mesh:{{{caller.account}}}:*"))
        return {key: await store.execute("DUMP", key) for key in keys}

    async def _released(self, account: str) -> Balance:
        """An account's credit when nothing is held, which another process that served it may take a moment to settle."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with suppress(Unavailable):  # a connection that a fault has silenced isn't given up yet
                    balance = await self.worker.ledger.balance(account)
                    if not balance.held_nusd:
                        return balance
                await asyncio.sleep(0)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when something has come true."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0)

    async def balance(self, caller: Caller) -> Balance:
        """An account's credit, when everything is settled."""
        await self.quiet()
        return await self.worker.ledger.balance(caller.account)

    async def spent(self, caller: Caller) -> int:
        """What an account was charged, in nano-USD."""
        return (await self.balance(caller)).settled_nusd

    async def settlements(self, caller: Caller) -> list[dict[str, str]]:
        """The settled events of an account, oldest first."""
        await self.quiet()
        events = await usage_events(self.worker.store, caller.account)
        return [event for event in events if event["event"] == "settled"]

    async def settlement(self, caller: Caller) -> dict[str, str]:
        """The only one."""
        (event,) = await self.settlements(caller)
        return event

    async def principal(self, caller: Caller) -> Principal:
        principal = await self.worker.directory.principal(caller.secret)
        assert principal is not None
        return principal

    @property
    def received(self) -> list[Entry]:
        """What the provider was sent."""
        return list(self.simulator.journal.entries)

    @property
    def sent(self) -> dict[str, Any]:
        """The body of the only request that the provider was sent."""
        (entry,) = self.received
        return json.loads(entry.raw_body)

    async def close(self) -> None:
        """See to it that nothing is left."""
        for sdk in self._sdks:
            await sdk.close()
        await self.http.close()
        await self.quiet()
        for account in {caller.account for caller in self.callers}:
            balance = await self._released(account)
            assert balance.granted_nusd == balance.balance_nusd + balance.settled_nusd
            assert await self.worker.store.execute("HLEN", AccountKeys(account).holds) == 0
        assert not self.worker.live.leases
        assert not self.worker.live.relays
        bugs = [line for line in self.log.lines if line["status"] == 500]
        assert bugs == []


StartMesh = Callable[..., Awaitable[Mesh]]


@pytest.fixture
async def simulator() -> AsyncIterator[Running]:
    """A provider without any delay of its own."""
    running = await start(settings=SimulatorSettings(tokens_per_second=1e6, first_token_s=0))
    yield running
    await running.close()


@pytest.fixture
async def start_mesh(store_server: str, simulator: Running) -> AsyncIterator[StartMesh]:
    """Start gateways with the tables that a test gives over the usual ones. `send_buffer`: SO_SNDBUF of their sockets;
    `connected`: whether they can reach their store."""
    async with AsyncExitStack() as stack:

        async def start_one(*, send_buffer: int | None = None, connected: bool = True, **tables: Any) -> Mesh:
            worker_settings = settings_for(store_server, simulator.base_url, **tables)
            log = Lines()
            worker = Worker(worker_settings, {"sim": "sk-provider"}, log)  # type: ignore[arg-type]
            await worker.start()
            stack.push_async_callback(worker.stop)
            chat = (lambda worker=worker: worker.chat) if worker_settings.server.fast_path else None
            runner = Runner(application(worker), chat, strictness(worker), worker.loops)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            sock = listen("127.0.0.1:0")
            if send_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            await web.SockSite(runner, sock).start()
            mesh = Mesh(worker, simulator, log, *runner.addresses[0])
            stack.push_async_callback(mesh.close)
            await mesh.until(lambda: worker.store.connected == connected)
            return mesh

        yield start_one


@pytest.fixture
async def mesh(start_mesh: StartMesh) -> Mesh:
    """A gateway with the usual settings."""
    return await start_mesh()


def settings_for(redis_url: str, provider_url: str, **tables: Any) -> Settings:
    """Every fault of the simulator is a model by its own name, of eight tokens; `models` and other tables are added. Streams
    that are cut off are slow enough for a client to have seen their beginning.
    """
    usual: dict[str, Any] = {
        "redis": {"url": redis_url},
        "defaults": {"model": "openai/gpt-4o"},
        "upstreams": {
            "sim": {"kind": "openai", "base_url": provider_url},
            "router": {"kind": "openrouter", "base_url": provider_url, "headers": {"x-sim-kind": "openrouter"}},
            "refused": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"},
        },
        "models": {
            "openai/gpt-4o": model("sim", "gpt-4o"),
            "router/gpt-4o": model("router", "gpt-4o"),
            **{f"sim/{trait}": model("sim", f"sim/{trait}?tokens=8") for trait in TRAITS},
            **{f"sim/{trait}": model("sim", f"sim/{trait}?tokens=8&tps=200") for trait in CUTTING},
            **{f"sim/error-{status}": model("sim", f"sim/error-{status}") for status in STATUSES},
        },
    }
    for name, table in tables.items():
        usual[name] = {**usual.get(name, {}), **table}
    return msgspec.convert(usual, Settings)


def model(*route: str, **fields: Any) -> dict[str, Any]:
    """A model served by `upstream, name, upstream, name, ...` in order."""
    pairs = zip(route[::2], route[1::2], strict=True)
    routes = [{"upstream": upstream, "model": name} for upstream, name in pairs]
    return {"upstreams": routes, **PRICE, **fields}
