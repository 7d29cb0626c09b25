import asyncio
import contextlib

import pytest

from meshproxy.config import Credits, Server, Settings
from meshproxy.errors import GatewayError, Source, ledger_unavailable
from meshproxy.gateway.in_flight import InFlight


class Looked:
    """A lease and a relay at once, which count what is done to them."""

    def __init__(self, error=None):
        self.kept, self.pinged = asyncio.Event(), asyncio.Event()
        self._error = error

    async def renew_deadline(self):
        self.kept.set()
        if self._error is not None:
            raise self._error

    def ping_if_silent(self, now, heartbeat_s):
        assert heartbeat_s == 0.004
        self.pinged.set()


@pytest.fixture
async def live():
    made = InFlight(asyncio.get_running_loop().time)
    settings = Settings(server=Server(heartbeat_s=0.004), credits=Credits(hold_ttl_s=0.012))
    pulse = asyncio.create_task(made.pulse(lambda: settings))
    yield made
    pulse.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await pulse


async def test_holds_are_kept_and_silent_streams_pinged(live):
    looked = Looked()
    live.leases.add(looked)
    live.relays.add(looked)
    async with asyncio.timeout(5):
        await looked.kept.wait()
        await looked.pinged.wait()


async def test_one_that_fails_does_not_stop_the_pulse(live):
    failing, other = Looked(GatewayError(Source.GATEWAY, ledger_unavailable())), Looked()
    live.leases |= {failing, other}
    async with asyncio.timeout(5):
        await failing.kept.wait()
        await other.kept.wait()
        other.kept.clear()
        await other.kept.wait()
