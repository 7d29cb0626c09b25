"""What the proofs are made with: real servers in processes of their own that can be frozen and killed, hundreds of clients, and
books that are closed at the end. MESHPROXY_PROOF=full makes them large.
"""

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.harness.books import Books, Caller
from tests.harness.clients import Answer, chat
from tests.harness.mesh import model
from tests.harness.process import MESHPROXY, Gateway, Program, Tables, Valkey, free_port, listens

FULL = os.environ.get("MESHPROXY_PROOF") == "full"
FIGURES = os.environ.get("MESHPROXY_FIGURES")  # a file that takes the figures, if they are wanted
full_only = pytest.mark.skipif(not FULL, reason="MESHPROXY_PROOF=full asks for it")
INPUT_NUSD, OUTPUT_NUSD = 2_500, 10_000  # a token
PROMPT_ESTIMATE = 19  # what is held for a greeting; the provider counts 6
HOLD_TTL_S = 2.0


def scaled(small: int, full: int) -> int:
    """How many: in CI, and where the whole proof was asked for."""
    return full if FULL else small


def tables(home: Path, store_url: str, provider_url: str, models: dict[str, tuple[str, str]], **tables: Any) -> Tables:
    """The configuration of a proof. `models` are by upstream and name; other tables add to the usual ones."""
    usual: Tables = {
        "server": {"workers": 2, "max_in_flight": 20_000, "drain_s": 5},
        "log": {"level": "warning"},
        "redis": {"url": store_url, "journal": str(home / "journal" / "settlements"), "timeout_s": 2},
        "defaults": {"model": "fast", "requests_per_minute": 1_000_000, "tokens_per_minute": 1_000_000_000},
        "credits": {"hold_ttl_s": HOLD_TTL_S, "lease_output_tokens": 16},
        "upstreams": {
            "sim": {"kind": "simulator", "base_url": provider_url, "idle_timeout_s": 20},
            "drained": {"kind": "simulator", "base_url": provider_url, "on_disconnect": "drain"},
        },
        "models": {name: model(*route) for name, route in {"fast": ("sim", "sim/fast?tokens=8"), **models}.items()},
    }
    return {name: {**table, **tables.get(name, {})} for name, table in usual.items()}


class Client:
    """Many clients of one key."""

    def __init__(self, session: aiohttp.ClientSession, proxy: Gateway, caller: Caller) -> None:
        self._session, self._proxy, self._caller = session, proxy, caller

    async def chat(self, *, idempotency_key: str | None = None, **options: Any) -> Answer:
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        return await chat(self._proxy.url, self._caller.auth, session=self._session, headers=headers, **options)


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
    with Program(*MESHPROXY, "simulate", "--port", str(port), *pace, log=log) as program:
        program.wait_for(lambda: listens(port))
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def start_valkey(tmp_path: Path) -> Iterator[Callable[..., Valkey]]:
    """Start servers that the test may maltreat."""
    with ExitStack() as stack:

        def start(*options: str, name: str = "v", config: Path | None = None) -> Valkey:
            home = tmp_path / name
            home.mkdir()
            server = Valkey(home, *options, config=config)
            stack.callback(server.kill)
            return server

        yield start


@pytest.fixture
def valkey(start_valkey: Callable[..., Valkey]) -> Valkey:
    return start_valkey()


@pytest.fixture
def start_proxy(tmp_path: Path, provider: str, valkey: Valkey) -> Iterator[Callable[..., Gateway]]:
    """Start gateways over `valkey`; see `tables` for what may be said."""
    with ExitStack() as stack:

        def start(**options: Any) -> Gateway:
            proxy = Gateway(tmp_path, tables(tmp_path, valkey.url, provider, options.pop("models", {}), **options))
            stack.callback(proxy.end)
            proxy.start()
            return proxy

        yield start


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, provider: str) -> Iterator[Callable[..., tuple[Valkey, Gateway]]]:
    """Start a server and a gateway over it for all tests of a module, which have accounts of their own."""
    with ExitStack() as stack:

        def start(**options: Any) -> tuple[Valkey, Gateway]:
            home = tmp_path_factory.mktemp("shared")
            server = Valkey(home)
            stack.callback(server.kill)
            proxy = Gateway(home, tables(home, server.url, provider, options.pop("models", {}), **options))
            stack.callback(proxy.end)
            proxy.start()
            return server, proxy

        yield start


@pytest.fixture
async def books(valkey: Valkey) -> AsyncIterator[Books]:
    opened = await Books.open(valkey.url)
    yield opened
    await opened.close()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Connections for as many clients as there are."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as opened:
        yield opened
