"""A worker as a process of its own, and the protocol between it and the supervisor.

The supervisor and a worker share a socket pair. Each message is a frame: its length, then msgpack. One request is
answered at a time; commands have no answer. `RunningWorker` is a worker with its listener, also used alone in one process.
"""

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
from meshproxy.gateway.record import Failure, Refused
from meshproxy.ledger.journal import SettlementsLost
from meshproxy.server.admin import WorkerStatus
from meshproxy.telemetry.exposition import MergedMetrics
from meshproxy.telemetry.logs import LineSink, RequestLog, configure, set_level

LENGTH_BYTES = 4  # before each frame, big-endian


class ReportRequest(Struct, tag="report", frozen=True):
    """A request for a `Report`."""


class Prepare(Struct, tag="prepare", frozen=True):
    """A request to build a configuration without serving it. The answer lists the faults that prevent it."""

    config: RunningConfig


class Report(Struct, frozen=True):
    """What a worker reports to the supervisor.

    Its metrics (Metrics.snapshot), why it isn't ready, whether the ledger is connected, the latest failures, and which
    accounts were refused lately.
    """

    snapshot: bytes
    not_ready: list[str]
    connected: bool
    failures: list[Failure] = []
    last_errors: dict[str, Failure] = {}
    refused: list[Refused] = []


class Drain(Struct, tag="drain", frozen=True):
    """The command to become not ready, let running requests end, and exit."""


class Interrupt(Struct, tag="interrupt", frozen=True):
    """The command to end running requests now."""


Command = Drain | Interrupt
# A RunningConfig is put in force; the first one starts the worker. The answer lists what prevents that.
Request = RunningConfig | Prepare | ReportRequest

MESSAGES: msgspec.msgpack.Decoder[Request | Command] = msgspec.msgpack.Decoder(Request | Command)


class ControlChannel:
    """One end of the socket pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()
        self._answer: asyncio.Task[bytes] | None = None

    @classmethod
    async def from_socket(cls, sock: socket.socket) -> "ControlChannel":
        """Make the end that uses `sock`."""
        return cls(*await asyncio.open_connection(sock=sock))

    async def request(self, message: Request) -> bytes:
        """Send a request and return the answer, still encoded. Raises ConnectionError if the other end is gone.

        A caller that stops waiting leaves its answer behind; the next call reads and drops that answer first.
        """
        async with self._lock:
            if self._answer is not None:
                await asyncio.shield(self._answer)
            self.send(message)
            self._answer = asyncio.create_task(self.receive(), name="answer")
            answer = await asyncio.shield(self._answer)
            self._answer = None
            return answer

    def send(self, message: Any) -> None:
        """Send one frame. Raises ConnectionError if the other end is known to be gone."""
        if self._writer.is_closing():
            raise ConnectionError("the other end is gone")
        data = msgspec.msgpack.encode(message)
        self._writer.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    async def flush_and_close(self) -> None:
        """Wait until everything sent is written, and close the socket."""
        with contextlib.suppress(ConnectionError):
            self._writer.close()
            await self._writer.wait_closed()

    async def receive(self) -> bytes:
        """Return the next frame. Raises ConnectionError if the other end is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
            return await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the other end is gone") from error

    def close(self) -> None:
        """Close the socket."""
        self._writer.close()


# Objects made before the youngest generation is collected: a request makes some hundreds and keeps none.
GC_THRESHOLD = 20_000

_log = structlog.get_logger("meshproxy.app")


class RunningWorker:
    """One worker that serves a socket. `up` is set once it does; `metrics` has its metrics.

    Raises ConfigError if the certificate can't be used.
    """

    def __init__(self, config: RunningConfig, sock: socket.socket, sink: LineSink) -> None:
        settings = config.settings
        self.config = config
        self.up = asyncio.Event()
        self.rejected = asyncio.Event()  # never set: start() raises
        self.faults: list[str] = []
        self._prepared: Prepared | None = None
        self.metrics = MergedMetrics()
        self._request_log = RequestLog(sink, settings.log.level, settings.log.format)
        self.worker = Worker(settings, config.secrets.upstreams, self._request_log, config.journal)
        self._listener = DataListener(self.worker, sock)
        self._interrupted = asyncio.Event()
        self._started_at = time.time()

    async def start(self) -> None:
        """Start serving. Raises ConfigError for faults that only the start shows, such as a journal without a free file."""
        try:
            await self.worker.start(self.config.generation)
        except (OSError, ValueError) as error:
            raise ConfigError([str(error)]) from error
        if self.config.reload_failed:
            self.worker.reload_failed()
        await self._listener.start()
        gc.collect()
        gc.set_threshold(GC_THRESHOLD, 20, 50)
        gc.freeze()  # objects that live for the whole run needn't be scanned at each collection
        self.up.set()

    async def prepare(self, config: RunningConfig) -> list[str]:
        """Build a configuration without serving it, and return the faults that prevent it. No error here ends the worker."""
        try:
            # Not in the event loop: a TLS context alone takes 16 ms.
            self._prepared = await asyncio.to_thread(
                self.worker.prepare, config.settings, config.secrets.upstreams, config.generation
            )
        except ConfigError as error:
            return error.faults
        except (OSError, ValueError) as error:
            return [str(error)]
        except Exception as error:  # noqa: BLE001 - a bug: reported to the supervisor as a fault, with a traceback here
            _log.error("prepare_failed", exc_info=error)
            return [f"it can't be built ({type(error).__name__})"]
        return []

    async def apply(self, config: RunningConfig) -> list[str]:
        """Put this configuration in force. If something prevents that, return it and change nothing."""
        if config.generation != self.config.generation:
            if self._prepared is None or self._prepared.generation != config.generation:
                faults = await self.prepare(config)
                if faults:
                    return faults
            prepared, self._prepared = self._prepared, None
            assert prepared is not None  # noqa: S101 - prepared above
            settings = config.settings
            self._listener.reload(settings.server)
            self.worker.reload(prepared)
            self._request_log.set_level(settings.log.level)
            set_level(settings.log.level)
        if config.reload_failed:
            self.worker.reload_failed()
        self.config = config
        return []

    async def report(self) -> Report:
        """Return the worker's report."""
        recorder = self.worker.recorder
        return Report(
            await self.worker.metrics.snapshot(),
            self.worker.not_ready(),
            self.worker.store.connected,
            list(recorder.failures),
            recorder.last_errors,
            recorder.refusals.lately(),
        )

    async def reports(self) -> dict[int, Report]:
        """Return the worker's report by its number, as a supervisor does for several."""
        return {1: await self.report()}

    def workers(self) -> list[WorkerStatus]:
        """List the worker, as a supervisor does for several."""
        state = "draining" if self.worker.stopping else "running"
        return [{"pid": os.getpid(), "state": state, "uptime_s": time.time() - self._started_at, "restarts": 0}]

    async def stop(self) -> None:
        """Drain, settle and close everything."""
        await self._listener.drain(self._interrupted)
        await self._listener.close()
        await self.worker.stop()

    def interrupt(self) -> None:
        """End running requests now, and skip the waits of stop()."""
        self._interrupted.set()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the supervisor gets them too, and sends commands

if __name__ == "__main__":
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


async def serve(control_fd: int, listen_fd: int) -> int:
    """Serve until the supervisor sends `Drain` or is gone. Return the exit code.

    The code is 78 (EX_CONFIG) for a configuration that can't be served; its faults are sent to the supervisor.
    """
    control = await ControlChannel.from_socket(socket.socket(fileno=control_fd))
    config = msgspec.msgpack.decode(await control.receive(), type=RunningConfig)
    sink = configure(config.settings.log.level, config.settings.log.format, sys.stderr.buffer)
    serving = RunningWorker(config, socket.socket(fileno=listen_fd), sink)
    try:
        await serving.start()
    except ConfigError as error:
        control.send(error.faults)
        await control.flush_and_close()
        sink.close()
        return os.EX_CONFIG
    control.send([])
    end = asyncio.Event()
    commands = asyncio.create_task(_serve_supervisor(control, serving, end), name="commands")
    await end.wait()
    try:
        await serving.stop()
    finally:
        commands.cancel()
        sink.close()
    return os.EX_OK


async def _serve_supervisor(control: ControlChannel, serving: RunningWorker, end: asyncio.Event) -> None:
    """Answer the supervisor's requests and obey its commands until it is gone."""
    try:
        with contextlib.suppress(ConnectionError):
            while True:
                match MESSAGES.decode(await control.receive()):
                    case ReportRequest():
                        control.send(await serving.report())
                    case Prepare(config):
                        control.send(await serving.prepare(config))
                    case RunningConfig() as config:
                        control.send(await serving.apply(config))
                    case Drain():
                        end.set()
                    case Interrupt():
                        serving.interrupt()
    finally:
        end.set()


if __name__ == "__main__":
    try:
        code = uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
    except SettlementsLost:  # they are in the log
        code = os.EX_IOERR
    sys.exit(code)
