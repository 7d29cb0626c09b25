"""A worker process of the supervisor: `python -m meshproxy.app.child CONTROL_FD LISTEN_FD`.

It serves the socket that it was given and does what it is told over the control socket. When the supervisor is gone, however
it went, the worker drains as after SIGTERM and exits.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys

import msgspec
import uvloop

from meshproxy.app.control import MESSAGES, Ask, Control, Drain, Hurry
from meshproxy.app.reload import Standing
from meshproxy.app.serving import Serving
from meshproxy.ledger.journal import SettlementsLost
from meshproxy.telemetry import logs


async def serve(control_fd: int, listen_fd: int) -> None:
    """Serve until told to drain, or until there is nobody left to tell."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the supervisor gets them too, and says what is to be done
    control = await Control.over(socket.socket(fileno=control_fd))
    standing = msgspec.msgpack.decode(await control.receive(), type=Standing)
    sink = logs.configure(standing.settings.log.level, standing.settings.log.format, sys.stderr.buffer)
    serving = Serving(standing, socket.socket(fileno=listen_fd), sink)
    await serving.start()
    control.send(None)
    end = asyncio.Event()
    obeying = asyncio.create_task(_obey(control, serving, end), name="obey")
    await end.wait()
    try:
        await serving.stop()
    finally:
        obeying.cancel()
        sink.close()


async def _obey(control: Control, serving: Serving, end: asyncio.Event) -> None:
    """Answer questions and do as told for as long as there is a supervisor."""
    try:
        with contextlib.suppress(ConnectionError):
            while True:
                match MESSAGES.decode(await control.receive()):
                    case Ask():
                        control.send(await serving.report())
                    case Standing() as standing:
                        await serving.apply(standing)
                        control.send(None)
                    case Drain():
                        end.set()
                    case Hurry():
                        serving.hurry()
    finally:
        end.set()


if __name__ == "__main__":
    try:
        uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
    except SettlementsLost:  # the log has them
        sys.exit(os.EX_IOERR)
