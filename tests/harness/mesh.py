"""A gateway in the test's own process: a real store, a real simulated provider, real sockets."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import openai
from aiohttp import web

from meshproxy.app.application import application, connection_limits
from meshproxy.app.worker import Worker
from meshproxy.config import Settings
from meshproxy.ledger.records import Balance
from meshproxy.policy.principal import Principal
from meshproxy.server.listener import Runner, listen
from meshproxy.simulator import Running
from meshproxy.simulator.behaviour import TRAITS
from meshproxy.simulator.delivery import ReceivedRequest
from meshproxy.simulator.stream import CUTTING_FAULTS
from meshproxy.telemetry.exposition import decode
from tests.harness.books import Books, Caller
from tests.harness.clients import CHAT, HELLO, Answer
from tests.harness.process import Tables
from tests.harness.waiting import PATIENCE_S, until

STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 418, 422, 429, 500, 502, 503, 504, 529)
PRICE = {"input_usd_per_mtok": "2.50", "output_usd_per_mtok": "10.00"}


class Lines:
    """The request log, kept."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, fields: dict[str, Any]) -> None:
        self.lines.append(fields)


class Mesh:
    """A gateway that listens, and what a test wants of it."""

    def __init__(self, worker: Worker, simulator: Running, log: Lines, runner: Runner) -> None:
        self.worker = worker
        self.simulator = simulator
        self.log = log
        self.interrupt = runner.interrupt  # cancels every handler
        self.host, self.port = runner.addresses[0]
        self.url = f"http://{self.host}:{self.port}"
        self.callers: list[Caller] = []
        self.books = Books(worker.store, worker.ledger, worker.directory)
        self.http = aiohttp.ClientSession(self.url, auto_decompress=False)
        self._sdks: list[openai.AsyncOpenAI] = []

    async def key(self, account: str | None = None, credit: str = "25.00", **fields: Any) -> Caller:
        """Mint a key, of a new account unless it is named, and grant the account credit."""
        self.callers.append(await self.books.key(account, credit, **fields))
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
        return await self.request("POST", CHAT, data=data, headers=told)

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
        await self.until(lambda: not self.worker.recorder.in_flight and not self.spawned())

    def spawned(self) -> int:
        """How much is under way for requests; dialling the store is nobody's."""
        return sum(
            not (isinstance(work, asyncio.Task) and work.get_name().startswith("ledger-")) for work in self.worker.tasks
        )

    async def snapshot(self, caller: Caller) -> dict[bytes, bytes]:
        """Everything that the store has of an account."""
        store = self.worker.store
        keys = sorted(await store.execute("KEYS", f"mesh:{{{caller.account}}}:*"))
        return {key: await store.execute("DUMP", key) for key in keys}

    async def until(self, condition: Callable[[], Any]) -> None:
        """Return when something has come true on this loop."""
        await until(condition, timeout_s=PATIENCE_S, poll_s=0)

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
        return await self.books.events(caller.account, "settled")

    async def settlement(self, caller: Caller) -> dict[str, str]:
        """The only one."""
        (event,) = await self.settlements(caller)
        return event

    async def counted(self, route: str | None = None) -> Counter[str]:
        """How many answers the metrics have, of one route or of all, by status."""
        counted: Counter[str] = Counter()
        for family in decode(await self.worker.metrics.snapshot()):
            for series in family.series if family.name == "meshproxy_requests_total" else ():
                if route in (None, series.labels[0]):
                    counted[series.labels[2]] += int(series.value)
        return +counted

    async def principal(self, caller: Caller) -> Principal:
        principal = await self.worker.directory.principal(caller.secret)
        assert principal is not None
        return principal

    @property
    def received(self) -> list[ReceivedRequest]:
        """What the provider was sent."""
        return list(self.simulator.history.requests)

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
            await self.books.balanced(account)
        assert not self.worker.live.leases
        assert not self.worker.live.relays
        bugs = [line for line in self.log.lines if line["status"] == 500]
        assert bugs == []


StartMesh = Callable[..., Awaitable[Mesh]]


@asynccontextmanager
async def serving(
    redis_url: str, simulator: Running, *, send_buffer: int | None = None, connected: bool = True, **tables: Any
) -> AsyncIterator[Mesh]:
    """A gateway with these tables over the usual ones. `send_buffer`: SO_SNDBUF of its sockets; `connected`: whether it can reach
    its store.
    """
    settings = settings_for(redis_url, simulator.base_url, **tables)
    log = Lines()
    worker = Worker(settings, {"sim": "sk-provider"}, log)  # type: ignore[arg-type]
    await worker.start()
    chat = (lambda: worker.chat) if settings.server.fast_path else None
    runner = Runner(application(worker), chat, connection_limits(worker), worker.loops)
    try:
        await runner.setup()
        sock = listen("127.0.0.1:0")
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        await web.SockSite(runner, sock).start()
        mesh = Mesh(worker, simulator, log, runner)
        await mesh.until(lambda: worker.store.connected == connected)
        try:
            yield mesh
        finally:
            await mesh.close()
    finally:
        await runner.cleanup()
        await worker.stop()


def settings_for(redis_url: str, provider_url: str, **tables: Any) -> Settings:
    """The settings of `tables_for`."""
    return msgspec.convert(tables_for(redis_url, provider_url, **tables), Settings)


def tables_for(redis_url: str, provider_url: str, **tables: Any) -> Tables:
    """Every fault of the simulator is a model by its own name, of eight tokens; `models` and other tables are added. Streams
    that are cut off are slow enough for a client to have seen their beginning.
    """
    usual: Tables = {
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
            **{f"sim/{trait}": model("sim", f"sim/{trait}?tokens=8&tps=200") for trait in CUTTING_FAULTS},
            **{f"sim/error-{status}": model("sim", f"sim/error-{status}") for status in STATUSES},
        },
    }
    for name, table in tables.items():
        usual[name] = {**usual.get(name, {}), **table}
    return usual


def model(*route: str, **fields: Any) -> dict[str, Any]:
    """A model served by `upstream, name, upstream, name, ...` in order."""
    pairs = zip(route[::2], route[1::2], strict=True)
    routes = [{"upstream": upstream, "model": name} for upstream, name in pairs]
    return {"upstreams": routes, **PRICE, **fields}
