"""Hostile clients, against the whole gateway on the loop that it runs on in production; as `meshproxy serve` where its memory and
its time are measured.
"""

import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop

from tests.harness.mesh import tables_for
from tests.harness.process import Gateway


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def alone(store_server, simulator, fast_path, tmp_path) -> Iterator[Callable[..., Awaitable[Gateway]]]:
    """Start a gateway in a process of its own."""
    started = []

    async def start(**tables: Any) -> Gateway:
        tables["server"] = {"fast_path": fast_path, **tables.get("server", {})}
        usual = {"log": {"level": "error"}, "redis": {"url": store_server}, **tables}
        gateway = Gateway(
            tmp_path, tables_for(store_server, simulator.base_url, **usual), name=f"gateway-{len(started)}"
        )
        started.append(gateway)
        return await gateway.started()

    yield start
    for gateway in started:
        gateway.end()


@pytest.fixture
def measured(capsys):
    """Show a figure, also where a test passes."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"  {line}\n")

    return show
