"""Between the supervisor and a worker: a socket pair with one question and one answer at a time, each a frame of msgpack."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from typing import Any

import msgspec
import structlog
import uvloop
from msgspec import Struct

from meshproxy.app.application import DataListener
from meshproxy.app.reload import RunningConfig
from meshproxy.app.worker import Prepared, Worker
from meshproxy.config import ConfigError
from meshproxy.ledger.journal import SettlementsLost
from meshproxy.server.admin import WorkerStatus
from meshproxy.telemetry.exposition import MergedMetrics
from meshproxy.telemetry.logs import LineSink, RequestLog, configure, set_level

LENGTH_BYTES = 4  # ahead of each frame, big-endian


class ReportRequest(Struct, tag="ask", frozen=True):
    """How are you? The answer is a `Report`."""


class Prepare(Struct, tag="prepare", frozen=True):
    """Build what this needs, and go on as before. The answer is a list of what can't be built."""

    standing: RunningConfig


class Report(Struct, frozen=True):
    """How a worker is: its metrics (telemetry.snapshot), why it isn't ready, and whether it has the ledger."""

    snapshot: bytes
    not_ready: list[str]
    connected: bool


class Drain(Struct, tag="drain", frozen=True):
    """Stop being ready, let what runs end, and exit. There is no answer."""


class Hurry(Struct, tag="hurry", frozen=True):
    """End what runs now. There is no answer."""


Order = Drain | Hurry
# A Standing holds from now on, and the first one has the worker begin. The answer is a list of what keeps it from that.
Question = RunningConfig | Prepare | ReportRequest

MESSAGES: msgspec.msgpack.Decoder[Question | Order] = msgspec.msgpack.Decoder(Question | Order)


class Control:
    """One end of the pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._asking = asyncio.Lock()
        self._answer: asyncio.Task[bytes] | None = None

    @classmethod
    async def over(cls, sock: socket.socket) -> "Control":
        """The end that `sock` is."""
        return cls(*await asyncio.open_connection(sock=sock))

    async def ask(self, question: Question) -> bytes:
        """The answer to a question, still encoded. ConnectionError if the other end is gone.

        Whoever stops waiting leaves an answer behind, which the next one takes away first.
        """
        async with self._asking:
            if self._answer is not None:
                await asyncio.shield(self._answer)
            self.send(question)
            self._answer = asyncio.create_task(self.receive(), name="answer")
            answer = await asyncio.shield(self._answer)
            self._answer = None
            return answer

    def send(self, message: Any) -> None:
        """Send one frame. ConnectionError if the other end is known to be gone."""
        if self._writer.is_closing():
            raise ConnectionError("the other end is gone")
        data = msgspec.msgpack.encode(message)
        self._writer.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    async def sent(self) -> None:
        """Return when what was sent is on its way: for one who is about to exit."""
        with contextlib.suppress(ConnectionError):
            self._writer.close()
            await self._writer.wait_closed()

    async def receive(self) -> bytes:
        """The next frame. ConnectionError if the other end is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
            return await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the other end is gone") from error

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


GC_THRESHOLD = (
    20_000  # objects made before the youngest are looked through: a request makes some hundreds and keeps none
)

_log = structlog.get_logger("meshproxy.app")


class Serving:
    """Serves a socket. `up` is set once it does; `fleet` has what was counted. ConfigError if the certificate is no use."""

    def __init__(self, standing: RunningConfig, sock: socket.socket, sink: LineSink) -> None:
        settings = standing.settings
        self.standing = standing
        self.up = asyncio.Event()
        self.refused = asyncio.Event()  # never set: start() raises
        self.faults: list[str] = []
        self._prepared: Prepared | None = None
        self.fleet = MergedMetrics()
        self._request_log = RequestLog(sink, settings.log.level, settings.log.format)
        self.worker = Worker(settings, standing.secrets.upstreams, self._request_log, standing.journal)
        self._listener = DataListener(self.worker, sock)
        self._hurried = asyncio.Event()
        self._started_at = time.time()

    async def start(self) -> None:
        """Begin to serve. ConfigError for what a check of the configuration could not know, as a journal whose files are all
        in use.
        """
        try:
            await self.worker.start(self.standing.generation)
        except (OSError, ValueError) as error:
            raise ConfigError([str(error)]) from error
        if self.standing.reload_failed:
            self.worker.reload_failed()
        await self._listener.start()
        gc.collect()
        gc.set_threshold(GC_THRESHOLD, 20, 50)
        gc.freeze()  # what lives for the whole run need not be walked at each collection
        self.up.set()

    async def prepare(self, standing: RunningConfig) -> list[str]:
        """Build what this needs and serve on as before; what can't be built. Whatever goes wrong, a reload ends no worker."""
        try:
            # Not in the event loop: a TLS context alone takes 16 ms.
            self._prepared = await asyncio.to_thread(
                self.worker.prepare, standing.settings, standing.secrets.upstreams, standing.generation
            )
        except ConfigError as unfit:
            return unfit.faults
        except (OSError, ValueError) as error:
            return [str(error)]
        except Exception as error:  # noqa: BLE001 - a bug of ours: reported to the supervisor as a fault, with a traceback here
            _log.error("prepare_failed", exc_info=error)
            return [f"it can't be built ({type(error).__name__})"]
        return []

    async def apply(self, standing: RunningConfig) -> list[str]:
        """Let this hold from now on; what keeps it from that: then everything is as it was."""
        if standing.generation != self.standing.generation:
            if self._prepared is None or self._prepared.generation != standing.generation:
                faults = await self.prepare(standing)
                if faults:
                    return faults
            prepared, self._prepared = self._prepared, None
            assert prepared is not None  # noqa: S101 - prepared a line above
            settings = standing.settings
            self._listener.reload(settings.server)
            self.worker.reload(prepared)
            self._request_log.set_level(settings.log.level)
            set_level(settings.log.level)
        if standing.reload_failed:
            self.worker.reload_failed()
        self.standing = standing
        return []

    async def report(self) -> Report:
        """How the worker is."""
        return Report(await self.worker.metrics.snapshot(), self.worker.not_ready(), self.worker.store.connected)

    async def reports(self) -> dict[int, Report]:
        """How each worker is that says so in time, by its number."""
        return {1: await self.report()}

    def workers(self) -> list[WorkerStatus]:
        """The workers that are up."""
        state = "draining" if self.worker.stopping else "running"
        return [{"pid": os.getpid(), "state": state, "uptime_s": time.time() - self._started_at, "restarts": 0}]

    async def stop(self) -> None:
        """Drain, settle and end."""
        await self._listener.drain(self._hurried)
        await self._listener.close()
        await self.worker.stop()

    def hurry(self) -> None:
        """End what runs now, and wait for nothing in stop()."""
        self._hurried.set()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the supervisor gets them too, and says what is to be done

if __name__ == "__main__":
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


async def serve(control_fd: int, listen_fd: int) -> int:
    """Serve until the supervisor says to drain, or is gone; the exit code: 78 (EX_CONFIG) for a configuration that can't be
    served, whose faults the supervisor was sent.
    """
    control = await Control.over(socket.socket(fileno=control_fd))
    standing = msgspec.msgpack.decode(await control.receive(), type=RunningConfig)
    sink = configure(standing.settings.log.level, standing.settings.log.format, sys.stderr.buffer)
    serving = Serving(standing, socket.socket(fileno=listen_fd), sink)
    try:
        await serving.start()
    except ConfigError as unfit:
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
                    case ReportRequest():
                        control.send(await serving.report())
                    case Prepare(standing):
                        control.send(await serving.prepare(standing))
                    case RunningConfig() as standing:
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
