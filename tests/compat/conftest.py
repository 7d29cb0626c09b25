"""One gateway for every client: `meshproxy serve` as a process of its own, over a real store and a simulated provider. Each test
gets a key of a new account, and when it ends nothing may be held for that account and nothing may be in flight.
"""

import asyncio
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import Balance
from meshproxy.ledger.store import Store
from meshproxy.money import parse_usd
from meshproxy.policy.template import Template
from meshproxy.simulator import Running, SimulatorSettings, start
from meshproxy.simulator.behaviour import TRAITS
from meshproxy.simulator.delivery import ReceivedRequest

PATIENCE_S = 20.0  # for what should take milliseconds
PRICES = 'input_usd_per_mtok = "2.50"\noutput_usd_per_mtok = "10.00"\ncontext_window = 128000\n'
FREE = 'input_usd_per_mtok = "0"\noutput_usd_per_mtok = "0"\n'
MODELS = {
    "openai/gpt-4o": [("simulated", "gpt-4o")],
    "vendor/family/model:free": [("simulated", "sim/tokens-8")],
    "falls-over": [("refused", "gpt-4o"), ("simulated", "gpt-4o")],
    "gone": [("refused", "gpt-4o")],
    "late": [("impatient", "sim/stall-head")],
    "free": [("simulated", "gpt-4o")],
    "begins-late": [("simulated", "sim/tokens-8?ttft=2")],
    "paced": [("simulated", "sim/tokens-8?tps=40")],
    # A breaker for each client:
    **{f"late-{number}": [("impatient", f"sim/stall-head?tag={number}")] for number in range(20)},
    **{f"dies-{number}": [("simulated", f"sim/die-mid-stream?tag={number}")] for number in range(20)},
    **{f"sim/{trait}": [("simulated", f"sim/{trait}")] for trait in TRAITS},
    **{
        f"sim/{name}": [("simulated", f"sim/{name}")]
        for name in ("error-400", "error-429", "error-500", "fail-first-1", "dialect-openai+error-context")
    },
}

T = TypeVar("T")

_numbers = itertools.count(1)


class Background:
    """An event loop in a thread of its own: the store's and the provider's."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, run there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Site:
    """What runs: the gateway's address, and the store and the provider to look into."""

    def __init__(self, background: Background, store: Store, simulator: Running, base_url: str, log: Path) -> None:
        self.base_url = base_url
        self.directory = Directory(store)
        self.ledger = Ledger(store)
        self.run = background.run
        self._simulator = simulator
        self._log = log

    def key(self, credit: str = "25.00", **fields: Any) -> "Caller":
        """Mint a key of a new account, which has so much credit."""
        secret, key = self.run(self.directory.create_key(f"compat-{next(_numbers)}", **fields))
        if parse_usd(credit):
            self.run(self.ledger.grant(key.account, parse_usd(credit)))
        return Caller(self, secret, key.account)

    def put_template(self, account: str, **fields: Any) -> None:
        template = Template(id=str(uuid.uuid4()), owner=account, created_at=0.0, updated_at=0.0, **fields)
        assert self.run(self.directory.put_template(template))

    def statuses(self, account: str) -> list[int]:
        """What the account's requests were answered with, in order, by the gateway's log."""
        lines = self._log.read_text().splitlines()
        told = [json.loads(line) for line in lines if f'"{account}"' in line and line.endswith("}")]
        return [line["status"] for line in told if line["event"] == "request" and line["account"] == account]

    @property
    def received(self) -> list[ReceivedRequest]:
        """What the provider was sent since `forget`."""

        async def entries() -> list[ReceivedRequest]:
            return list(self._simulator.history.requests)

        return self.run(entries())

    def forget(self) -> None:
        async def clear() -> None:
            self._simulator.history.clear()

        self.run(clear())


class Caller:
    """A key, and the account that pays for it."""

    def __init__(self, site: Site, secret: str, account: str) -> None:
        self.site = site
        self.secret = secret
        self.account = account

    @property
    def sent(self) -> Any:
        """The body of the only request that the provider got."""
        (entry,) = self.site.received
        return json.loads(entry.raw_body)

    def settled(self) -> Balance:
        """The account's credit, when nothing is held any more."""
        until(lambda: self._balance().held_nusd == 0)
        return self._balance()

    def _balance(self) -> Balance:
        return self.site.run(self.site.ledger.balance(self.account))


@pytest.fixture(scope="session")
def page_port() -> int:
    """A free port, where a page of an origin that the gateway knows may be served."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, page_port: int, fast_path: bool) -> Iterator[Site]:
    """The store, the provider and the gateway; the gateway must end with exit code 0."""
    background, embedded = Background(), Embedded()
    background.run(embedded.start())
    simulator = background.run(start(settings=SimulatorSettings(tokens_per_second=1e6, first_token_s=0)))
    store = background.run(connect(Redis(url=embedded.url)))
    folder = tmp_path_factory.mktemp("compat")
    told = configuration(embedded.url, simulator.base_url, page_port, fast_path=fast_path)
    (folder / "meshproxy.toml").write_text(told)
    log = folder / "gateway.log"
    with log.open("wb") as stderr:
        gateway = subprocess.Popen(
            [sys.executable, "-m", "meshproxy", "serve", "--config", folder / "meshproxy.toml"], stderr=stderr
        )
    try:
        until(lambda: _address(log) is not None or gateway.poll() is not None)
        assert gateway.poll() is None, log.read_text()
        yield Site(background, store, simulator, f"http://{_address(log)}/v1", log)
    finally:
        gateway.send_signal(signal.SIGTERM)
        gateway.wait(PATIENCE_S)
        background.run(store.close())
        background.run(simulator.close())
        background.run(embedded.stop())
        background.close()
    assert gateway.returncode == 0, log.read_text()


@pytest.fixture
def caller(site: Site) -> Iterator[Caller]:
    """A key of a new account with 25 USD, and a provider that has forgotten everything."""
    site.forget()
    caller = site.key()
    yield caller
    caller.settled()


@pytest.fixture(name="until")
def patiently() -> Callable[[Callable[[], bool]], None]:
    """Wait for something in another process or thread to come true."""
    return until


def configuration(redis_url: str, provider_url: str, page_port: int, *, fast_path: bool) -> str:
    """The gateway's TOML: a provider that is well, one that is given no time, and one that isn't there."""
    models = "".join(
        f'[models."{name}"]\nupstreams = [{_routes(routes)}]\n{FREE if name == "free" else PRICES}'
        for name, routes in MODELS.items()
    )
    return f"""
[server]
listen = "127.0.0.1:0"
admin_listen = "127.0.0.1:0"
workers = 1
fast_path = {str(fast_path).lower()}
max_body_bytes = 1048576
drain_s = 1
cors_origins = ["http://localhost:{page_port}"]
[redis]
url = "{redis_url}"
[upstreams.simulated]
kind = "simulator"
base_url = "{provider_url}"
[upstreams.impatient]
kind = "simulator"
base_url = "{provider_url}"
first_byte_timeout_s = 0.1
[upstreams.refused]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"
{models}"""


def _routes(routes: list[tuple[str, str]]) -> str:
    return ", ".join(f'{{ upstream = "{upstream}", model = "{model}" }}' for upstream, model in routes)


def until(condition: Callable[[], bool]) -> None:
    """Return when something in another process or thread has come true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def _address(log: Path) -> str | None:
    """Where the gateway listens, once it says so in its log."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    return next((line["data"] for line in lines if line["event"] == "serving"), None)
