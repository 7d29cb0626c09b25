"""A worker process of the supervisor: `python -m meshproxy.app.child CONTROL_FD LISTEN_FD`.

It serves the socket that it was given and does what it is told over the control socket. When the supervisor is gone, however
it went, the worker drains as after SIGTERM and exits.
"""

# ruff: noqa: E402 - signals come before the imports, which take a while
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the supervisor gets them too, and says what is to be done

if __name__ == "__main__":
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)

import asyncio
import contextlib
import os
import socket
import sys

import msgspec
import uvloop

from meshproxy.app.control import MESSAGES, Ask, Control, Drain, Hurry, Prepare
from meshproxy.app.reload import Standing
from meshproxy.app.serving import Serving
from meshproxy.config import Unfit
from meshproxy.ledger.journal import SettlementsLost
from meshproxy.telemetry import logs


async def serve(control_fd: int, listen_fd: int) -> int:
    """Serve until the supervisor says to drain, or is gone; the exit code: 78 (EX_CONFIG) for a configuration that can't be
    served, whose faults the supervisor was sent.
    """
    control = await Control.over(socket.socket(fileno=control_fd))
    standing = msgspec.msgpack.decode(await control.receive(), type=Standing)
    sink = logs.configure(standing.settings.log.level, standing.settings.log.format, sys.stderr.buffer)
    serving = Serving(standing, socket.socket(fileno=listen_fd), sink)
    try:
        await serving.start()
    except Unfit as unfit:
        control.send(unfit.faults)
        await control.sent()
        sink.close()
        return os.EX_CONFIG
    control.send([])
    end = asyncio.Event()
    obeying = asyncio.create_task(_obey(control, serving, end), name="obey")
    await end.wait()
    try:
        await serving.stop()
    finally:
        obeying.cancel()
        sink.close()
    return os.EX_OK


async def _obey(control: Control, serving: Serving, end: asyncio.Event) -> None:
    """Answer questions and obey orders for as long as there is a supervisor."""
    try:
        with contextlib.suppress(ConnectionError):
            while True:
                match MESSAGES.decode(await control.receive()):
                    case Ask():
                        control.send(await serving.report())
                    case Prepare(standing):
                        control.send(await serving.prepare(standing))
                    case Standing() as standing:
                        control.send(await serving.apply(standing))
                    case Drain():
                        end.set()
                    case Hurry():
                        serving.hurry()
    finally:
        end.set()


if __name__ == "__main__":
    try:
        code = uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
    except SettlementsLost:  # the log has them
        code = os.EX_IOERR
    sys.exit(code)
