"""One gateway for every client: `meshproxy serve` as a process of its own, over a real store and a simulated provider. Each test
gets a key of a new account, and when it ends nothing may be held for that account and nothing may be in flight.
"""

import json
import socket
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from meshproxy.ledger.records import Balance
from meshproxy.policy.template import Template
from meshproxy.simulator import Running, SimulatorSettings, start
from meshproxy.simulator.behaviour import TRAITS
from meshproxy.simulator.delivery import ReceivedRequest
from tests.harness import books
from tests.harness.books import Background, Books
from tests.harness.mesh import model
from tests.harness.process import Gateway, Tables

FREE = {"input_usd_per_mtok": "0", "output_usd_per_mtok": "0"}
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


class Site:
    """What runs: the gateway's address, and the store and the provider to look into."""

    def __init__(self, background: Background, opened: Books, simulator: Running, gateway: Gateway) -> None:
        self.base_url = f"{gateway.url}/v1"
        self.run = background.run
        self.books = opened
        self._simulator = simulator
        self._gateway = gateway

    def key(self, credit: str = "25.00", **fields: Any) -> "Caller":
        """Mint a key of a new account, which has so much credit."""
        return Caller(self, self.run(self.books.key(credit=credit, **fields)))

    def put_template(self, account: str, **fields: Any) -> None:
        template = Template(id=str(uuid.uuid4()), owner=account, created_at=0.0, updated_at=0.0, **fields)
        assert self.run(self.books.directory.templates.put(template))

    def statuses(self, account: str) -> list[int]:
        """What the account's requests were answered with, in order, by the gateway's log."""
        return [line["status"] for line in self._gateway.logged("request", account=account)]

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


class Caller(books.Caller):
    """A key, and the account that pays for it."""

    def __init__(self, site: Site, caller: books.Caller) -> None:
        super().__init__(caller.secret, caller.key)
        self.site = site

    @property
    def sent(self) -> Any:
        """The body of the only request that the provider got."""
        (entry,) = self.site.received
        return json.loads(entry.raw_body)

    def settled(self) -> Balance:
        """The account's credit, when nothing is held any more."""
        return self.site.run(self.site.books.balanced(self.account))


@pytest.fixture(scope="session")
def page_port() -> int:
    """A free port, where a page of an origin that the gateway knows may be served."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def site(
    tmp_path_factory: pytest.TempPathFactory, background: Background, store_server: str, page_port: int, fast_path: bool
) -> Iterator[Site]:
    """The store, the provider and the gateway; the gateway must end with exit code 0."""
    simulator = background.run(start(settings=SimulatorSettings(tokens_per_second=1e6, first_token_s=0)))
    opened = background.run(Books.open(store_server))
    tables = configuration(store_server, simulator.base_url, page_port, fast_path=fast_path)
    gateway = Gateway(tmp_path_factory.mktemp("compat"), tables)
    try:
        gateway.start()
        yield Site(background, opened, simulator, gateway)
        assert gateway.stop() == 0, gateway.program.text
    finally:
        gateway.end()
        background.run(opened.close())
        background.run(simulator.close())


@pytest.fixture
def caller(site: Site) -> Iterator[Caller]:
    """A key of a new account with 25 USD, and a provider that has forgotten everything."""
    site.forget()
    caller = site.key()
    yield caller
    caller.settled()


def configuration(redis_url: str, provider_url: str, page_port: int, *, fast_path: bool) -> Tables:
    """The gateway's tables: a provider that is well, one that is given no time, and one that isn't there."""
    simulated = {"kind": "simulator", "base_url": provider_url}
    cors_origins = [f"http://localhost:{page_port}"]
    return {
        "server": {"fast_path": fast_path, "max_body_bytes": 1 << 20, "drain_s": 1, "cors_origins": cors_origins},
        "redis": {"url": redis_url},
        "upstreams": {
            "simulated": simulated,
            "impatient": {**simulated, "first_byte_timeout_s": 0.1},
            "refused": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"},
        },
        "models": {
            name: model(*(part for route in routes for part in route), context_window=128_000)
            | (FREE if name == "free" else {})
            for name, routes in MODELS.items()
        },
    }
