"""What the tests of a whole gateway share. Each test has a gateway of its own, unless its folder says otherwise, and leaves
nothing in it: no hold, no task, no request in flight.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import hypothesis
import pytest

from meshproxy.ledger.embedded import Embedded
from meshproxy.simulator import Running, SimulatorSettings, start
from tests.harness.books import Background
from tests.harness.mesh import Mesh, StartMesh, serving

hypothesis.settings.register_profile(
    "house", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # a busy machine is no finding
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    """A loop for what outlives the loops of single tests."""
    loop = Background()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def store_server(background: Background) -> Iterator[str]:
    """The URL of a real server that runs as long as the tests do."""
    server = Embedded()
    background.run(server.start())
    yield server.url
    background.run(server.stop())


@pytest.fixture
async def simulator() -> AsyncIterator[Running]:
    """A provider without any delay of its own."""
    running = await start(settings=SimulatorSettings(tokens_per_second=1e6, first_token_s=0))
    yield running
    await running.close()


@pytest.fixture
async def start_mesh(store_server: str, simulator: Running) -> AsyncIterator[StartMesh]:
    """Start gateways with the tables that a test gives over the usual ones; see `serving` for what else may be said."""
    async with AsyncExitStack() as stack:

        async def start_one(**options: Any) -> Mesh:
            return await stack.enter_async_context(serving(store_server, simulator, **options))

        yield start_one


@pytest.fixture
async def mesh(start_mesh: StartMesh) -> Mesh:
    """A gateway with the usual settings."""
    return await start_mesh()
