"""The whole gateway on the loop that it runs on in production, and providers that answer what a test tells them to."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import uvloop

from tests.harness.provider import Teller


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def providers() -> AsyncIterator[Callable[[], Awaitable[Teller]]]:
    """Start providers that answer as a test tells them to."""
    async with AsyncExitStack() as stack:

        async def start() -> Teller:
            teller = Teller()
            await teller.start()
            stack.callback(teller.close)
            return teller

        yield start
