"""`meshproxy serve` as processes of their own, as operators run it: started, signalled, killed, and put behind real balancers.
Everything is on loopback, every wait is bounded, and what a test started it ends.
"""

import asyncio
import contextlib
import itertools
import json
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.money import parse_usd
from meshproxy.policy.principal import Limits
from meshproxy.simulator import Running
from tests.harness.books import Caller, usage_events
from tests.harness.process import free_port

PATIENCE_S = 20.0  # for what should take a second
ROOT = Path(__file__).parents[2]
CONFIG = """
[server]
listen = "{listen}"
admin_listen = "{admin}"
{server}
[log]
level = "{level}"
[redis]
url = "{redis}"
[upstreams.sim]
kind = "simulator"
base_url = "{provider}"
[models."openai/gpt-4o"]
upstreams = [ {{ upstream = "sim", model = "sim/plain?tokens=8" }} ]
input_usd_per_mtok = "2.50"
output_usd_per_mtok = "10.00"
{models}
"""
PLENTY = Limits(requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000)
MODEL = """
[models."{name}"]
upstreams = [ {{ upstream = "sim", model = "{name}" }} ]
input_usd_per_mtok = "2.50"
output_usd_per_mtok = "10.00"
"""

_accounts = itertools.count(1)


async def until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """What a condition gives once that is true; a condition may be a coroutine function."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(0.01)


class Stream:
    """One streamed answer, event by event, and when each came."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Any = {}
        self.events: list[str] = []
        self.times: list[float] = []
        self.started_at = time.monotonic()
        self.broken = ""

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.broken and self.events[-1:] == ["[DONE]"]

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.events[-1])["error"]

    @property
    def first_event_s(self) -> float:
        return self.times[0] - self.started_at

    @property
    def max_gap_s(self) -> float:
        return max((after - before for before, after in itertools.pairwise(self.times)), default=0.0)

    async def read(self, http: aiohttp.ClientSession, url: str, caller: Caller, model: str) -> "Stream":
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello there"}]}
        try:
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=caller.auth) as response:
                self.status, self.headers = response.status, response.headers
                async for line in response.content:
                    if line.startswith(b"data: "):
                        self.times.append(time.monotonic())
                        self.events.append(line[6:].decode().strip())
        except aiohttp.ClientError as error:
            self.broken = repr(error)
        return self


class Gateway:
    """One `meshproxy serve`."""

    def __init__(self, path: Path, listen: str, admin: str) -> None:
        self.path = path
        self.listen = listen
        self.admin = f"http://{admin}"
        self.lines: list[dict[str, Any]] = []
        self.noise: list[str] = []

    @property
    def url(self) -> str:
        return f"http://{self.listen}"

    async def start(self, **options: Any) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "meshproxy", "serve", "--config", str(self.path)),
            stderr=asyncio.subprocess.PIPE,
            **options,
        )
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.noise.append(line.decode())

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    async def exit(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code, and the whole log read."""
        async with asyncio.timeout(timeout_s):
            code = await self.process.wait()
            await self._listening
        return code

    async def end(self) -> None:
        """For the end of a test: whatever it did, nothing is left running."""
        if self.process.returncode is None:
            self.process.terminate()
            await asyncio.sleep(0.02)  # or the two signals would be one
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await self.exit(5)
        if self.process.returncode is None:
            self.process.kill()
            await self.exit()


class Site:
    """A store, a provider, gateways, and somebody to call them."""

    def __init__(self, redis: str, provider: Running, tmp_path: Path, stack: AsyncExitStack) -> None:
        self.redis = redis
        self.provider = provider
        self.tmp_path = tmp_path
        self.stack = stack
        self.gateways: list[Gateway] = []

    async def open(self) -> None:
        self.store = await connect(Redis(url=self.redis))
        self.stack.push_async_callback(self.store.close)
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self.stack.push_async_callback(self.http.close)
        self.ledger = Ledger(self.store)

    async def key(self, credit: str = "25.00") -> Caller:
        secret, key = await Directory(self.store).create_key(f"ops-{next(_accounts)}", limits=PLENTY)
        await self.ledger.grant(key.account, parse_usd(credit))
        return Caller(secret, key)

    def configure(
        self, gateway: Gateway | None = None, *, level: str = "info", models: tuple[str, ...] = (), **server: Any
    ) -> Gateway:
        """Write the configuration of a gateway, a new one unless it is given."""
        listen = server.pop("listen", gateway.listen if gateway else f"127.0.0.1:{free_port()}")
        admin = server.pop(
            "admin_listen", gateway.admin.removeprefix("http://") if gateway else f"127.0.0.1:{free_port()}"
        )
        if gateway is None:
            gateway = Gateway(self.tmp_path / f"gateway-{len(self.gateways)}.toml", listen, admin)
            self.gateways.append(gateway)
        table = {"workers": 1, "drain_s": 10, **server}
        gateway.path.write_text(
            CONFIG.format(
                listen=listen,
                admin=admin,
                server="\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items()),
                level=level,
                redis=self.redis,
                provider=self.provider.base_url,
                models="".join(MODEL.format(name=name) for name in models),
            )
        )
        return gateway

    async def gateway(self, **options: Any) -> Gateway:
        """A gateway that is ready."""
        gateway = self.configure(**options)
        await self.started(gateway)
        return gateway

    async def started(self, gateway: Gateway) -> None:
        """Start a configured gateway, or start it again."""
        await gateway.start()
        self.stack.push_async_callback(gateway.end)
        await until(lambda: self.ready(gateway), "readiness")

    async def ready(self, gateway: Gateway) -> bool:
        return await self.probe(gateway) == 200

    async def probe(self, gateway: Gateway) -> int:
        """The status of /readyz; 0 if nobody answers."""
        try:
            async with self.http.get(f"{gateway.admin}/readyz") as response:
                return response.status
        except aiohttp.ClientError:
            return 0

    async def status(self, gateway: Gateway) -> dict[str, Any]:
        async with self.http.get(f"{gateway.admin}/status") as response:
            return await response.json()

    async def metric(self, gateway: Gateway, name: str) -> float:
        """The sum of a family's samples, or the one of a whole name with labels."""
        async with self.http.get(f"{gateway.admin}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def stream(self, url: str, caller: Caller, model: str) -> asyncio.Task[Stream]:
        """A stream that is being read."""
        return asyncio.create_task(Stream().read(self.http, url, caller, model))

    async def flowing(self, url: str, caller: Caller, model: str) -> tuple[Stream, asyncio.Task[Stream]]:
        """A stream whose first event has come."""
        stream = Stream()
        task = asyncio.create_task(stream.read(self.http, url, caller, model))
        await until(lambda: stream.events or task.done(), "the first event")
        assert stream.events, stream.broken or stream.status
        return stream, task

    async def settled(self, caller: Caller, count: int) -> list[dict[str, str]]:
        """The settled events of an account, once there are so many; nothing is held then."""

        async def events() -> list[dict[str, str]] | None:
            found = [event for event in await usage_events(self.store, caller.account) if event["event"] == "settled"]
            return found if len(found) >= count else None

        found = await until(events, f"{count} settlements")
        balance = await self.ledger.balance(caller.account)
        assert balance.held_nusd == 0
        assert balance.granted_nusd == balance.balance_nusd + balance.settled_nusd
        return found


@pytest.fixture
async def site(store_server: str, simulator: Running, tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        site = Site(store_server, simulator, tmp_path, stack)
        await site.open()
        yield site


@asynccontextmanager
async def running(*command: str, ready: Callable[[], Awaitable[bool]]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another program, from when it is ready until the block ends."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None
    said = asyncio.create_task(process.stdout.read())
    try:
        await until(lambda: True if process.returncode is not None else ready(), command[0])
        assert process.returncode is None, (await said).decode()
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
            await said


async def accepts(port: int) -> bool:
    """Whether somebody listens at a port of loopback."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def tell(line: str) -> None:
    """A figure, for `pytest -s`."""
    print(f"\n{line}")


def program(name: str) -> str:
    """The path of a Debian program; the test is skipped where it isn't installed."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed (apt-get install {name})")
    return path
