"""The data listener of one worker: from its socket to the worker's handlers, until it is drained."""

import asyncio
import contextlib
import socket
from collections.abc import Callable

import structlog

from meshproxy.app.application import application, strictness
from meshproxy.app.worker import Worker
from meshproxy.config import Server, Unfit
from meshproxy.server.listener import Runner
from meshproxy.server.sites import ProxiedSite, Site
from meshproxy.server.tls import load_certificate, server_context

LINGER_S = 0.1  # what a connection that was accepted last gets to send its request
POLL_S = 0.02  # how often a drain looks whether it is done; an event would cost every request
GOODBYE_S = 2.0  # what the last errors and terminal events get to leave

_log = structlog.get_logger("meshproxy.app")


class DataListener:
    """Serves one socket with one worker."""

    def __init__(self, worker: Worker, sock: socket.socket) -> None:
        self._worker = worker
        self._sock = sock
        self._tls = server_context(worker.settings.server)
        chat = (lambda: worker.chat) if worker.settings.server.fast_path else None
        self._strictness = strictness(worker)
        self._runner = Runner(application(worker), chat, self._strictness, worker.loops)

    async def start(self) -> None:
        """Accept connections."""
        await self._runner.setup()
        server = self._runner.server
        assert server is not None  # noqa: S101 - set up a line above
        worker = self._worker
        if self._worker.settings.server.proxy_protocol:
            self._site: Site = ProxiedSite(
                self._sock,
                server,
                self._tls,
                lambda: worker.chat.trusted_proxies,
                worker.loops,
                self._strictness.has_room,
            )
        else:
            self._site = Site(self._sock, server, self._tls)
        await self._site.start()

    def reload(self, server: Server) -> None:
        """Show another certificate from now on. It was checked a moment ago; if it is no use by now, the old one stays."""
        if self._tls is None:
            return
        try:
            load_certificate(self._tls, server)
        except Unfit as unfit:
            _log.error("certificate_not_loaded", faults=unfit.faults)

    async def drain(self, hurry: asyncio.Event) -> None:
        """SIGTERM: not ready at once; accept until the balancer has noticed; then let what runs come to its end, up to drain_s;
        then tell the rest that it is over. Answers say `Connection: close` from the beginning, so that clients which a
        balancer's health checks don't move come back through it. `hurry`: wait for nothing and nobody.
        """
        worker, server = self._worker, self._worker.settings.server
        _log.info("draining", in_flight=worker.recorder.in_flight)
        worker.stopping = worker.gateway.draining = self._runner.closing = True
        await wait(hurry, server.drain_grace_s)
        await self._site.stop()
        if self._runner.connected():
            await wait(hurry, LINGER_S)
        self._runner.close_idle()
        await _until(self._is_done, server.drain_s, hurry)
        await self._end()

    async def _end(self) -> None:
        """Streams get their terminal event, whole answers become errors, and all of it gets a moment to be sent."""
        left = self._worker.recorder.in_flight
        if left:
            _log.warning("drain_cut_short", in_flight=left)
        self._worker.gateway.shut_down()
        await _until(lambda: not self._worker.live.relays, GOODBYE_S)
        self._runner.interrupt()
        await _until(self._is_done, GOODBYE_S)

    async def close(self) -> None:
        """Close what is left."""
        await self._runner.cleanup()

    def _is_done(self) -> bool:
        return not self._worker.recorder.in_flight and not self._runner.busy()


async def wait(event: asyncio.Event, timeout_s: float) -> None:
    """Return when the event is set, or time is up."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


async def _until(condition: Callable[[], bool], timeout_s: float, hurry: asyncio.Event | None = None) -> None:
    """Return when the condition holds, time is up, or there is a hurry."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    while not condition() and clock() < deadline and not (hurry is not None and hurry.is_set()):  # noqa: ASYNC110 - see POLL_S
        await asyncio.sleep(POLL_S)
