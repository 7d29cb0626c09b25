"""A worker process of the supervisor: `python -m meshproxy.app.child CONTROL_FD LISTEN_FD`.

It serves the socket that it was given and does what it is told over the control socket. When the supervisor is gone, however
it went, the worker drains as after SIGTERM and exits.
"""

import asyncio
import contextlib
import signal
import socket
import sys
from pathlib import Path

import msgspec
import uvloop

from meshproxy.app.control import QUESTIONS, Control, Drain, Hurry, Reload, ReloadFailed, Report, Reported, Start
from meshproxy.app.data_listener import DataListener
from meshproxy.app.worker import Worker, request_log_to
from meshproxy.telemetry import logs
from meshproxy.telemetry.logs import RequestLog


class Child:
    """What this process is: a worker behind a listener, and the end that it is told to come to."""

    def __init__(self, worker: Worker, listener: DataListener, request_log: RequestLog) -> None:
        self.worker = worker
        self.listener = listener
        self._request_log = request_log
        self.end = asyncio.Event()
        self.hurry = asyncio.Event()

    async def obey(self, control: Control) -> None:
        """Answer questions and do as told for as long as there is a supervisor."""
        try:
            with contextlib.suppress(ConnectionError):
                while True:
                    self._hear(control, await control.receive())
        finally:
            self.end.set()

    def _hear(self, control: Control, message: bytes) -> None:
        worker = self.worker
        match QUESTIONS.decode(message):
            case Report():
                control.send(Reported(worker.metrics.snapshot(), worker.not_ready(), worker.store.connected))
            case Reload() as swap:
                self._reload(swap)
                control.send(None)
            case ReloadFailed():
                worker.reload_failed()
                control.send(None)
            case Drain():
                self.end.set()
            case Hurry():
                self.hurry.set()
            case Start():
                raise AssertionError("a worker starts once")

    def _reload(self, swap: Reload) -> None:
        self.listener.reload(swap.settings.server)
        self.worker.reload(swap.settings, swap.secrets, swap.generation)
        logs.set_level(swap.settings.log.level)
        self._request_log.set_level(swap.settings.log.level)


async def serve(control_fd: int, listen_fd: int) -> None:
    """Serve until told to drain, or until there is nobody left to tell."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the supervisor gets them too, and says what is to be done
    control = await Control.over(socket.socket(fileno=control_fd))
    start = msgspec.msgpack.decode(await control.receive(), type=Start)
    log = start.settings.log
    sink = logs.configure(log.level, log.format, sys.stderr.buffer)
    request_log = request_log_to(sink, log)
    worker = Worker(start.settings, start.secrets, request_log, Path(start.journal) if start.journal else None)
    await worker.start(start.generation)
    if start.reload_failed:
        worker.reload_failed()
    listener = DataListener(worker, socket.socket(fileno=listen_fd))
    await listener.start()
    child = Child(worker, listener, request_log)
    control.send(None)
    obeying = asyncio.create_task(child.obey(control), name="obey")
    await child.end.wait()
    await listener.drain(child.hurry)
    await listener.close()
    await worker.stop()
    obeying.cancel()
    sink.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
