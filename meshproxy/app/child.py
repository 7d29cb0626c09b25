"""A worker process of the supervisor: `python -m meshproxy.app.child CONTROL_FD LISTEN_FD`.

It serves the socket that it was given and does what it is told over the control socket. When the supervisor is gone, however
it went, the worker drains as after SIGTERM and exits.
"""

import contextlib
import signal
import socket
import sys
from pathlib import Path

import msgspec
import uvloop
from aiohttp import web

from meshproxy.app.application import application
from meshproxy.app.control import QUESTIONS, Control, Drain, Reload, ReloadFailed, Report, Reported, Start
from meshproxy.app.process import drain
from meshproxy.app.worker import Worker, request_log_to
from meshproxy.server.listener import Runner
from meshproxy.telemetry import logs


async def serve(control_fd: int, listen_fd: int) -> None:
    """Serve until told to drain."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the supervisor gets them too, and says what is to be done
    control = await Control.over(socket.socket(fileno=control_fd))
    start = msgspec.msgpack.decode(await control.receive(), type=Start)
    log = start.settings.log
    sink = logs.configure(log.level, log.format, sys.stderr.buffer)
    journal = Path(start.journal) if start.journal is not None else None
    worker = Worker(start.settings, start.secrets, request_log_to(sink, log), journal)
    await worker.start()
    runner = Runner(application(worker), worker.serve_chat)
    await runner.setup()
    site = web.SockSite(runner, socket.socket(fileno=listen_fd))
    await site.start()
    control.send(None)
    with contextlib.suppress(ConnectionError):
        await _obey(control, worker)
    await drain(worker, site)
    await runner.cleanup()
    await worker.stop()
    sink.close()


async def _obey(control: Control, worker: Worker) -> None:
    """Answer questions until told to drain."""
    while True:
        match QUESTIONS.decode(await control.receive()):
            case Report():
                control.send(Reported(worker.metrics.snapshot(), worker.not_ready(), worker.store.connected))
            case Reload(settings, secrets):
                control.send(worker.reload(settings, secrets))
            case ReloadFailed():
                worker.reload_failed()
                control.send(None)
            case Drain():
                return
            case Start():
                raise AssertionError("a worker starts once")


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
