"""What the cases are run with: one Redis, `meshproxy serve` as a process with one worker, and a provider that plays the cases."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

from meshproxy.config import ConfigError, Redis, parse
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from meshproxy.money import parse_usd
from tests.cases.provider import Player, Provider

PATIENCE_S = 15.0  # for what should take milliseconds
POLL_S = 0.01
RICH_USD = "10000"
FOLDER = Path(__file__).parent

T = TypeVar("T")
Tables = dict[str, dict[str, Any]]  # a configuration: its tables by dotted name


def parameters(file: str) -> list[Any]:
    """Each case of a file as a parameter of a test."""
    return [pytest.param(case, id=case["name"]) for case in load(file)]


def load(file: str) -> list[dict[str, Any]]:
    """The cases of a file."""
    return json.loads((FOLDER / f"{file}.json").read_text())["cases"]


class Background:
    """An event loop in a thread of its own: the store's and the provider's."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def toml(tables: Tables) -> str:
    """A configuration as TOML."""
    text = ""
    for name, table in tables.items():
        text += f"[{name}]\n" + "".join(f"{key} = {_toml_value(value)}\n" for key, value in table.items())
    return text


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def refused(tables: Tables) -> str:
    """Why a configuration can't be used; empty if it can."""
    try:
        parse(toml(tables))
    except ConfigError as unfit:
        return str(unfit)
    return ""


class Gateway:
    """`meshproxy serve`. `url` is its data listener's, `admin` its admin listener's, `config` its file."""

    def __init__(self, folder: Path, redis_url: str, tables: Tables, flags: tuple[str, ...] = ()) -> None:
        server = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "workers": 1, "drain_s": 1}
        redis = {"url": redis_url, "journal": str(folder / "journal")}
        whole = {**tables, "server": {**server, **tables.get("server", {})}, "redis": redis}
        self.config = folder / "meshproxy.toml"
        self.config.write_text(toml(whole))
        self._log = folder / "log"
        command = [sys.executable, "-m", "meshproxy", "serve", "--config", str(folder / "meshproxy.toml"), *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MESHPROXY")}
        with self._log.open("wb") as stderr:
            self._process = subprocess.Popen(command, stderr=stderr, env=environment)
        deadline = time.monotonic() + PATIENCE_S
        while not (ready := [line for line in self.lines() if line["event"] == "serving"]):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(POLL_S)
        self.url = f"http://{ready[0]['data']}"
        self.admin = f"http://{ready[0]['admin']}"

    def lines(self) -> list[dict[str, Any]]:
        """The log so far."""
        whole = self._log.read_bytes().rpartition(b"\n")[0].splitlines()
        return [json.loads(line) for line in whole if line.startswith(b"{")]

    def kill(self) -> None:
        """End it without a word."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        assert code == 0, self._log.read_text()


class Caller:
    """A key, and the account that pays for it."""

    def __init__(self, gateway: Gateway, secret: str, account: str) -> None:
        self.gateway = gateway
        self.account = account
        self.auth = {"authorization": f"Bearer {secret}"} if secret else {}

    async def settled(self) -> dict[str, Decimal]:
        """`balance_usd` and `available_usd` of GET /v1/key, once nothing is held."""
        deadline = time.monotonic() + PATIENCE_S
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"{self.gateway.url}/v1/key", headers=self.auth) as response:
                    told = await response.json()
                if Decimal(told["held_usd"]) == 0:
                    return {name: Decimal(told[name]) for name in ("balance_usd", "available_usd")}
                assert time.monotonic() < deadline, f"still held: {told}"
                await asyncio.sleep(POLL_S)

    async def logged(self, count: int) -> list[dict[str, Any]]:
        """The log's lines of the account's requests, when there are so many."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            lines = [
                line
                for line in self.gateway.lines()
                if line["event"] == "request" and line.get("account") == self.account
            ]
            if len(lines) >= count:
                return lines
            assert time.monotonic() < deadline, f"{len(lines)} lines of {count}"
            await asyncio.sleep(POLL_S)


class Site:
    """Where the cases are run. A gateway is started by the first case that needs it and serves all that can share it."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self._home = home
        self._stack = stack
        self._gateways: dict[str, Gateway] = {}
        self._background = Background()
        stack.callback(self._background.close)
        self._redis = Embedded()
        self.run(self._redis.start())
        stack.callback(lambda: self.run(self._redis.stop()))
        self._store = self.run(connect(Redis(url=self._redis.url)))
        stack.callback(lambda: self.run(self._store.close()))
        self.provider = Provider()
        self.run(self.provider.start())
        stack.callback(lambda: self.run(self.provider.close()))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._background.run(work)

    def add(self, name: str, does: dict[str, Any], then: dict[str, Any] | None = None) -> str:
        """A player, and the base URL that it is found at."""
        self.provider.players[name] = Player(does, then)
        return self.provider.base_url(name)

    def gateway(self, name: str, tables: Tables, *flags: str) -> Gateway:
        """The gateway of a name, which is started with these tables if it isn't there."""
        if name not in self._gateways:
            folder = self._home / name
            folder.mkdir()
            gateway = Gateway(folder, self._redis.url, tables, flags)
            self._stack.callback(gateway.stop)
            self._gateways[name] = gateway
        return self._gateways[name]

    def key(self, gateway: Gateway, account: str, credit: str | None, **fields: Any) -> Caller:
        """A key of a new account with so much credit."""
        secret, _ = self.run(Directory(self._store).create_key(account, **fields))
        self.run(Ledger(self._store).grant(account, parse_usd(credit or RICH_USD)))
        return Caller(gateway, secret, account)

    def key_by_command(self, gateway: Gateway, account: str, credit: str | None, flags: list[str]) -> Caller:
        """As `key`, with the flags of `keys create`."""
        command = ["keys", "create", "--account", account, *flags, "--redis", self._redis.url, "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "meshproxy", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        self.run(Ledger(self._store).grant(account, parse_usd(credit or RICH_USD)))
        return Caller(gateway, json.loads(done.stdout)["key"], account)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path_factory.mktemp("cases"), stack)


class Exchange:
    """One request and what came of it. `broken`: the connection ended before the answer did."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Any = {}
        self.body = b""
        self.broken: BaseException | None = None
        self.took_s = 0.0
        self.pinged_s: float | None = None  # when there were a head and a comment

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def data(self) -> list[str]:
        """The data of each event."""
        return [line.removeprefix("data:").strip() for line in self.text.split("\n") if line.startswith("data:")]

    @property
    def events(self) -> list[Any]:
        """The events, those that are JSON."""
        told = []
        for text in self.data:
            try:
                told.append(json.loads(text))
            except ValueError:
                continue
        return told

    @property
    def error(self) -> dict[str, Any]:
        """The error of a body, or of a stream's last event."""
        told = self.json if isinstance(self.json, dict) else (self.events or [None])[-1]
        assert isinstance(told, dict), self.text[-500:]
        assert isinstance(told.get("error"), dict), self.text[-500:]
        return told["error"]

    @property
    def completed(self) -> bool:
        return self.broken is None and self.text.rstrip("\n").endswith("data: [DONE]")


async def exchange(
    url: str,
    method: str,
    *,
    headers: dict[str, str],
    body: bytes | None,
    timeout_s: float = 30,
    hangs_up_after_events: int | None = None,
) -> Exchange:
    """Make one request as a client that takes no compression."""
    told = Exchange()
    began = time.monotonic()
    usual = {"accept-encoding": "identity", **({} if body is None else {"content-type": "application/json"})}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(auto_decompress=False, timeout=timeout) as session:
        try:
            async with session.request(method, url, headers={**usual, **headers}, data=body) as response:
                told.status, told.headers = response.status, response.headers
                taken: list[bytes] = []
                last, seen = b"\n", 0
                async for piece in response.content.iter_any():
                    taken.append(piece)
                    if told.pinged_s is None and (b"\n:" in last + piece):
                        told.pinged_s = time.monotonic() - began
                    if hangs_up_after_events is not None:
                        seen += (last + piece).count(b"\ndata:") - last.count(b"\ndata:")
                        if seen >= hangs_up_after_events:
                            response.close()
                            break
                    last = (last + piece)[-6:]
                told.body = b"".join(taken)
        except (aiohttp.ClientError, TimeoutError) as error:
            told.broken = error
            told.body = told.body or b"".join(taken) if told.status else b""
    told.took_s = time.monotonic() - began
    return told
