"""Log lines: rendered, redacted, and written by a thread, so that a blocked pipe never stops the event loop.

The thread writes FLUSH_INTERVAL_S after the first line of a batch, or at once when FLUSH_BYTES are waiting, when a line
is urgent, or at exit. If the pipe's reader stalls, MAX_BUFFERED_BYTES are kept; further lines are dropped and counted,
and a line reports the count when writing continues. SIGKILL loses one interval of lines.

The thread writes to the raw file: a thread blocked with a buffered file's lock would keep the interpreter from exiting.
Make a sink after forking, because threads don't survive a fork.
"""

import atexit
import json
import logging
import re
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Literal

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from meshproxy.telemetry.metrics import MAX_PENDING, Metrics
from meshproxy.units import rfc3339

FLUSH_INTERVAL_S = 0.1
FLUSH_BYTES = 524_288
MAX_BUFFERED_BYTES = 4_194_304
CLOSE_TIMEOUT_S = 2.0  # longest wait for a stalled reader at exit
LOG_INTERVAL_S = 10.0  # between two log lines of one kind of trouble, which may occur at every request
LEDGER_SLOW_S = 0.05  # of one round trip to the ledger, as in the alert MeshproxyLedgerSlow
LOST = frozenset({"connection", "disconnected", "closed"})  # kinds of error that `ledger_lost` is logged for

_log = structlog.get_logger("meshproxy.app")

# Keys of ours (rsk_...), of OpenAI and OpenRouter (sk-...), and bearer tokens. `sk-` counts only at the start of a word
# (task-1 is no key). A word also starts after a JSON escape or a colour code of the console.
_SECRET = re.compile(
    rb"rsk_[A-Za-z0-9_-]{4,}"
    rb"|(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9a-f]{4})|(?<=[0-9]m))sk-[A-Za-z0-9_-]{8,}"
    rb"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"
)


def redact(line: bytes) -> bytes:
    """Replace everything in a line that looks like a secret."""
    return _SECRET.sub(b"[redacted]", line)


class LineSink:
    """Writes whole lines of bytes, newline included, from any thread. Every line is redacted here, at the end."""

    def __init__(self, stream: BinaryIO, dropped_line: Callable[[int], bytes]) -> None:
        self._stream: Any = getattr(stream, "raw", stream)
        self._dropped_line = dropped_line
        self._dropped = 0
        self._lines: list[bytes] = []
        self._size = 0
        self._closed = False
        self._buffer_lock = threading.Lock()
        self._stream_lock = threading.Lock()
        self._filled = threading.Event()
        self._flush_now = threading.Event()
        self._writer = threading.Thread(target=self._drain, name="log-writer", daemon=True)
        self._writer.start()
        atexit.register(self.close)

    def write(self, line: bytes, *, urgent: bool = False) -> None:
        """Buffer a line. If the buffer is full, the line is dropped and counted.

        After close() it is written at once, or dropped while the thread still waits for the reader.
        """
        if b"sk" in line or b"earer " in line:  # else nothing in it looks like a secret
            line = redact(line)
        with self._buffer_lock:
            before = self._size
            after = before + len(line)
            if after > MAX_BUFFERED_BYTES:
                self._dropped += 1
                return
            if not self._lines:
                self._filled.set()
            self._lines.append(line)
            self._size = after
        if urgent or before < FLUSH_BYTES <= after:
            self._flush_now.set()  # once per batch: waking a thread costs as much as twenty lines
        if self._closed and not self._writer.is_alive():
            self._write_late()

    def flush(self) -> None:
        """Write the buffered lines in the calling thread. Blocks as long as the stream does."""
        with self._stream_lock:
            with self._buffer_lock:
                lines, self._lines, self._size = self._lines, [], 0
                dropped, self._dropped = self._dropped, 0
            if dropped:
                lines.append(self._dropped_line(dropped))
            if lines and not self._written(lines):
                self._dropped += dropped + len(lines)

    def close(self) -> None:
        """Write the rest and end the thread, waiting at most CLOSE_TIMEOUT_S for a stalled reader."""
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            self._filled.set()
            self._flush_now.set()
            self._writer.join(CLOSE_TIMEOUT_S)

    def _write_late(self) -> None:
        """Write the lines that came after close(), waiting once, at most CLOSE_TIMEOUT_S, for a stalled reader."""
        self._writer = threading.Thread(target=self.flush, name="log-writer", daemon=True)
        with suppress(RuntimeError):  # the interpreter is exiting and starts no more threads
            self._writer.start()
            self._writer.join(CLOSE_TIMEOUT_S)

    def _drain(self) -> None:
        while not self._closed:
            self._filled.wait()
            self._flush_now.wait(FLUSH_INTERVAL_S)
            self._flush_now.clear()
            self._filled.clear()  # cleared before the buffer is taken: a later line sets it again
            self.flush()
        self.flush()  # lines that came during the last write

    def _written(self, lines: list[bytes]) -> bool:
        """Write lines to the stream, and return whether that succeeded."""
        try:
            left = memoryview(b"".join(lines))
            while left:
                count = self._stream.write(left)
                if count is None:  # the file is non-blocking and full: another process that shares it has set that
                    select.select([], [self._stream], [], FLUSH_INTERVAL_S)
                left = left[count or 0 :]
            self._stream.flush()
        except (OSError, ValueError):  # the reader is gone or the stream closed: the caller counts the lines
            return False
        return True


Level = Literal["debug", "info", "warning", "error"]
Format = Literal["json", "console"]

LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_Render = Callable[[str, EventDict], bytes]


def configure(level: Level, format: Format, stream: BinaryIO) -> LineSink:  # noqa: A002 - the configuration's word
    """Send every log of the process to `stream`, from `level` up. To change it, call again and close() the old sink."""
    render = _renderer(format, colors=stream.isatty())
    sink = LineSink(stream, lambda count: render("warning", {"event": "log_lines_dropped", "count": count}))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _name,
            lambda _, method, event: ((render(method, event), method), {}),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *names: _LineLogger(sink, *names),
        cache_logger_on_first_use=False,  # so that a reload reaches the loggers of modules
    )
    logging.basicConfig(level=LEVELS[level], handlers=[_RecordHandler(sink, render)], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)  # RequestLog writes that line with more fields
    return sink


def set_level(level: Level) -> None:
    """Change the lowest level that is logged, from now on."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]))
    logging.getLogger().setLevel(LEVELS[level])


class RequestLog:
    """Writes one line per request.

    Without a sink (inside another program), or in the console format, the line is a structlog event like any other.
    `clock` returns Unix seconds.
    """

    def __init__(
        self,
        sink: LineSink | None = None,
        level: Level = "info",
        format: Format = "json",  # noqa: A002
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sink = sink if format == "json" else None
        self._level = LEVELS[level]
        self._clock = clock
        self._second = -1
        self._head = b""  # of the lines of this second

    def set_level(self, level: Level) -> None:
        """Change the lowest level that is written, from now on."""
        self._level = LEVELS[level]

    def write(self, fields: dict[str, Any]) -> None:
        """Log a finished request with its `status`: as a warning from 500 on, else as info."""
        level: Level = "warning" if fields["status"] >= 500 else "info"
        if LEVELS[level] < self._level:
            return
        if self._sink is None:
            shown = {name: value for name, value in fields.items() if value is not None}
            structlog.get_logger("request").log(LEVELS[level], "request", **shown)
            return
        now_ms = int(self._clock() * 1000)
        if now_ms // 1000 != self._second:
            self._second = now_ms // 1000
            self._head = time.strftime('{"timestamp":"%Y-%m-%dT%H:%M:%S', time.gmtime(self._second)).encode()
        line = b'%b.%03dZ","level":"%b","event":"request","logger":"request",%b\n'
        shown_level = b"warning" if level == "warning" else b"info"
        self._sink.write(line % (self._head, now_ms % 1000, shown_level, to_json(fields)[1:]))


def to_json(fields: dict[str, Any]) -> bytes:
    """Encode one JSON object without newlines. What JSON lacks (objects, lone surrogates, huge integers) is text."""
    try:
        return orjson.dumps(fields, default=repr)
    except TypeError:
        return json.dumps(fields, default=repr, skipkeys=True, separators=(",", ":")).encode("ascii")


class _LineLogger:
    """structlog's innermost logger, which takes rendered lines."""

    def __init__(self, sink: LineSink, name: str | None = None) -> None:
        self._sink = sink
        self.name = name

    def _put(self, line: bytes, method: str) -> None:
        self._sink.write(line, urgent=method in {"error", "critical"})

    msg = debug = info = warning = error = critical = _put


class _RecordHandler(logging.Handler):
    """A handler for the standard library's records (aiohttp, asyncio, warnings), in the same format."""

    def __init__(self, sink: LineSink, render: _Render) -> None:
        super().__init__()
        self._sink = sink
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event: EventDict = {"event": record.getMessage(), "logger": record.name}
        except (TypeError, ValueError):  # arguments that don't match the format
            event = {"event": str(record.msg), "logger": record.name}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        self._sink.write(self._render(record.levelname.lower(), event), urgent=record.levelno >= logging.ERROR)


def _name(logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if logger.name is not None:
        event.setdefault("logger", logger.name)
    return event


def _renderer(format: Format, *, colors: bool) -> _Render:  # noqa: A002
    return _json if format == "json" else _console(colors=colors)


def _json(method: str, event: EventDict) -> bytes:
    event = structlog.processors.format_exc_info(None, method, event)
    now = rfc3339(time.time(), "milliseconds")
    return to_json({"timestamp": now, "level": method, "event": event.pop("event", ""), **event}) + b"\n"


def _console(*, colors: bool) -> _Render:
    """Make the renderer for people. Unencodable characters are escaped."""
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0, sort_keys=False
    )

    def render(method: str, event: EventDict) -> bytes:
        text = renderer(None, method, {"timestamp": rfc3339(time.time(), "milliseconds"), "level": method, **event})
        return text.encode("utf-8", "backslashreplace") + b"\n"

    return render


class Throttle:
    """Decides when to log an event that occurs often: the first time at once, then with a count once per LOG_INTERVAL_S."""

    def __init__(self) -> None:
        self._quiet_until: dict[str, float] = {}  # by kind of event, from a closed set
        self._counts: Counter[str] = Counter()

    def due(self, kind: str) -> int:
        """Count one event. Return how many there were since the last line if another line is due, else 0."""
        self._counts[kind] += 1
        now = time.monotonic()
        if now < self._quiet_until.get(kind, 0.0):
            return 0
        self._quiet_until[kind] = now + LOG_INTERVAL_S
        return self._counts.pop(kind)


class LedgerRecorder:
    """Counts the ledger's operations, and logs that they are slow or fail."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._throttle = Throttle()
        self._worst_s = 0.0

    def record(self, op: str, seconds: float | None, error: str | None) -> None:
        """Record an operation: its seconds, None if it wasn't sent, and the kind of its error, None if it succeeded."""
        if seconds is not None:
            pending = self._metrics.pending
            pending += (self._metrics.ledger_op_duration[(op,)], seconds)
            if len(pending) >= MAX_PENDING:
                self._metrics.count_pending()
        if error is not None:
            self._metrics.ledger_errors.labels(error).inc()
            self._log_failed(op, error)
        elif seconds is not None and seconds >= LEDGER_SLOW_S:
            self._log_slow(op, seconds)

    def _log_slow(self, op: str, seconds: float) -> None:
        self._worst_s = max(self._worst_s, seconds)
        if count := self._throttle.due("slow"):
            _log.warning("ledger_slow", op=op, operations=count, worst_ms=round(self._worst_s * 1000, 3))
            self._worst_s = 0.0

    def _log_failed(self, op: str, kind: str) -> None:
        """Log an operation that failed while the connection lasts."""
        if kind not in LOST and kind != "noscript" and (count := self._throttle.due(kind)):
            _log.error("ledger_fails", kind=kind, op=op, operations=count)
