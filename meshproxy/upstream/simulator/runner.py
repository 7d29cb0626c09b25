"""A running simulator: for a command that does nothing else, and for those that need a provider beside them."""

from aiohttp import web

from meshproxy.upstream.simulator.app import Simulator
from meshproxy.upstream.simulator.behaviour import SimulatorSettings
from meshproxy.upstream.simulator.journal import Journal

CLOSE_S = 0.1  # what open streams get before they are cut
BACKLOG = 1024


class Running:
    """A simulator that listens. `base_url` is what an OpenAI client is given."""

    def __init__(self, runner: web.AppRunner, host: str, journal: Journal) -> None:
        self._runner = runner
        self.host = host
        self.port: int = runner.addresses[0][1]
        self.journal = journal

    @property
    def base_url(self) -> str:
        """With the /v1 that OpenAI's own has."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    async def close(self) -> None:
        """Stop listening and cut what is open."""
        await self._runner.cleanup()


async def start(host: str = "127.0.0.1", port: int = 0, settings: SimulatorSettings | None = None) -> Running:
    """Listen, on any free port if it is 0. Raises `OSError` where that can't be done."""
    simulator = Simulator(settings or SimulatorSettings())
    runner = web.AppRunner(
        simulator.application(), handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_S
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
    except BaseException:
        await runner.cleanup()
        raise
    return Running(runner, host, simulator.journal)
