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

# Where the server's part matters most, tests run both ways: on the fast path, and with all requests through aiohttp's server.
# The others run so by `pytest --aiohttp-server`.
BOTH_WAYS = (
    "tests/e2e/",
    "tests/hostile/test_balancers.py",
    "tests/hostile/test_padding.py",
    "tests/hostile/test_requests.py",
    "tests/hostile/test_secrets.py",
    "tests/hostile/test_slow.py",
    "tests/compat/test_openai_async.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "set server.fast_path = false in every gateway: all requests go through aiohttp's server"
    parser.addoption("--aiohttp-server", action="store_true", help=told)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fast_path" not in metafunc.fixturenames or metafunc.config.getoption("--aiohttp-server"):
        return
    if metafunc.definition.path.relative_to(metafunc.config.rootpath).as_posix().startswith(BOTH_WAYS):
        metafunc.parametrize("fast_path", [True, False], ids=["fast", "aiohttp"], scope="session")


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


@pytest.fixture(scope="session")
def fast_path(request: pytest.FixtureRequest) -> bool:
    """`server.fast_path` of the gateways."""
    return not request.config.getoption("--aiohttp-server")


@pytest.fixture
async def start_mesh(store_server: str, simulator: Running, fast_path: bool) -> AsyncIterator[StartMesh]:
    """Start gateways with the tables that a test gives over the usual ones; see `serving` for what else may be said."""
    async with AsyncExitStack() as stack:

        async def start_one(**options: Any) -> Mesh:
            options["server"] = {"fast_path": fast_path, **options.get("server", {})}
            return await stack.enter_async_context(serving(store_server, simulator, **options))

        yield start_one


@pytest.fixture
async def mesh(start_mesh: StartMesh) -> Mesh:
    """A gateway with the usual settings."""
    return await start_mesh()
