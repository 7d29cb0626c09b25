"""What the cases are run with: one Redis, `meshproxy serve` as a process with one worker, and a provider that plays the cases."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from meshproxy.config import ConfigError, parse
from meshproxy.units import parse_usd
from tests.harness.books import Background, Books
from tests.harness.clients import fetch
from tests.harness.process import Gateway, Tables, toml
from tests.harness.provider import Player, Provider
from tests.harness.waiting import until

RICH_USD = "10000"
FOLDER = Path(__file__).parent


def parameters(file: str) -> list[Any]:
    """Each case of a file as a parameter of a test."""
    return [pytest.param(case, id=case["name"]) for case in load(file)]


def load(file: str) -> list[dict[str, Any]]:
    """The cases of a file."""
    return json.loads((FOLDER / f"{file}.json").read_text())["cases"]


def refused(tables: Tables) -> str:
    """Why a configuration can't be used; empty if it can."""
    try:
        parse(toml(tables))
    except ConfigError as unfit:
        return str(unfit)
    return ""


class Client:
    """A gateway's client: its key, and the account that pays for it."""

    def __init__(self, gateway: Gateway, secret: str, account: str) -> None:
        self.gateway = gateway
        self.account = account
        self.auth = {"authorization": f"Bearer {secret}"} if secret else {}

    async def settled(self) -> dict[str, Decimal]:
        """`balance_usd` and `available_usd` of GET /v1/key, once nothing is held."""

        async def unheld() -> dict[str, Any] | None:
            told = (await fetch("GET", f"{self.gateway.url}/v1/key", headers=self.auth)).json
            return told if Decimal(told["held_usd"]) == 0 else None

        told = await until(unheld, "nothing to be held")
        return {name: Decimal(told[name]) for name in ("balance_usd", "available_usd")}

    async def logged(self, count: int) -> list[dict[str, Any]]:
        """The log's lines of the account's requests, when there are so many."""

        def lines() -> list[dict[str, Any]]:
            return self.gateway.logged("request", account=self.account)

        await until(lambda: len(lines()) >= count, f"{count} lines")
        return lines()


class Site:
    """Where the cases are run. A gateway is started by the first case that needs it and serves all that can share it."""

    def __init__(self, home: Path, store_url: str, background: Background, stack: ExitStack) -> None:
        self._home = home
        self._store_url = store_url
        self._run = background.run
        self._stack = stack
        self._gateways: dict[str, Gateway] = {}
        self._books = self._run(Books.open(store_url))
        stack.callback(lambda: self._run(self._books.close()))
        self.provider = Provider()
        self._run(self.provider.start())
        stack.callback(lambda: self._run(self.provider.close()))

    def add(self, name: str, does: dict[str, Any], then: dict[str, Any] | None = None) -> str:
        """A player, and the base URL that it is found at."""
        self.provider.players[name] = Player(does, then)
        return self.provider.base_url(name)

    def gateway(self, name: str, tables: Tables, *flags: str, token: str = "") -> Gateway:
        """The gateway of a name, which is started with these tables if it isn't there."""
        if name not in self._gateways:
            folder = self._home / name
            folder.mkdir()
            server = {"drain_s": 1, **tables.get("server", {})}
            redis = {"url": self._store_url, "journal": str(folder / "journal")}
            gateway = Gateway(folder, {**tables, "server": server, "redis": redis}, flags=flags, token=token)
            self._stack.callback(_drained, gateway)
            gateway.start()
            self._gateways[name] = gateway
        return self._gateways[name]

    def client(self, gateway: Gateway, account: str, credit: str | None) -> Client:
        """One with a key of a new account with so much credit."""
        caller = self._run(self._books.key(account, credit or RICH_USD))
        return Client(gateway, caller.secret, account)

    def client_by_command(self, gateway: Gateway, account: str, credit: str | None, flags: list[str]) -> Client:
        """As `client`, with the flags of `keys create`."""
        secret = gateway.command("keys", "create", "--account", account, *flags)["key"]
        self._run(self._books.ledger.grant(account, parse_usd(credit or RICH_USD)))
        return Client(gateway, secret, account)


def _drained(gateway: Gateway) -> None:
    """End a gateway, which must end well unless a test has killed it."""
    assert not gateway.program.is_running or gateway.stop() == 0, gateway.program.text


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, store_server: str, background: Background) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path_factory.mktemp("cases"), store_server, background, stack)
