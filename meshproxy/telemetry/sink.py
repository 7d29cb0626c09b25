"""Where log lines go: a bounded buffer, emptied by a thread of its own, so that a stuck pipe never stops the event loop.

The thread writes FLUSH_INTERVAL_S after the first line of a batch, or at once when FLUSH_BYTES are waiting, when a line is
urgent, or at exit. If whoever reads the pipe stands still, MAX_BUFFERED_BYTES are kept, and what comes then is dropped and
counted: a line says how many when writing goes on. SIGKILL loses one interval of lines. Every line is redacted here, the
last place before it leaves.

The thread writes to the raw file: whoever holds a buffered one's lock while a reader stands still keeps the interpreter from its
end. Make it after a fork: a thread doesn't survive one.
"""

import atexit
import re
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

FLUSH_INTERVAL_S = 0.1
FLUSH_BYTES = 524_288
MAX_BUFFERED_BYTES = 4_194_304
CLOSE_TIMEOUT_S = 2.0  # what a stuck reader may cost at exit

# Keys of ours (rsk_...), of OpenAI and OpenRouter (sk-...), and whatever stood in an Authorization header. `sk-` counts only
# where a word begins (task-1 is no key), and a word also begins behind a JSON escape or a colour of the console.
_SECRET = re.compile(
    rb"rsk_[A-Za-z0-9_-]{4,}"
    rb"|(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9a-f]{4})|(?<=[0-9]m))sk-[A-Za-z0-9_-]{8,}"
    rb"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"
)


def redact(line: bytes) -> bytes:
    """The line without anything that looks like a secret."""
    if b"sk" in line or b"earer " in line:
        return _SECRET.sub(b"[redacted]", line)
    return line


class LineSink:
    """Takes whole lines of bytes, newline included, from any thread."""

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
        self._hurry = threading.Event()
        self._writer = threading.Thread(target=self._drain, name="log-writer", daemon=True)
        self._writer.start()
        atexit.register(self.close)

    def write(self, line: bytes, *, urgent: bool = False) -> None:
        """Buffer a line. It is dropped, and counted, if the buffer is full. After close() it is written at once, or dropped where
        the thread still waits for the reader.
        """
        line = redact(line)
        with self._buffer_lock:
            if self._size + len(line) > MAX_BUFFERED_BYTES:
                self._dropped += 1
                return
            if not self._lines:
                self._filled.set()
            self._lines.append(line)
            self._size += len(line)
            is_full = self._size >= FLUSH_BYTES > self._size - len(line)
        if urgent or is_full:
            self._hurry.set()  # once a batch: waking a thread costs as much as twenty lines
        if self._closed and not self._writer.is_alive():
            self._write_late()

    def flush(self) -> None:
        """Write what is buffered, in the calling thread. Blocks as long as the stream does."""
        with self._stream_lock:
            with self._buffer_lock:
                lines, self._lines, self._size = self._lines, [], 0
                dropped, self._dropped = self._dropped, 0
            if dropped:
                lines.append(self._dropped_line(dropped))
            if lines and not self._written(lines):
                self._dropped += dropped + len(lines)

    def close(self) -> None:
        """Write the rest and end the thread, waiting no longer than CLOSE_TIMEOUT_S for a stuck reader."""
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            self._filled.set()
            self._hurry.set()
            self._writer.join(CLOSE_TIMEOUT_S)

    def _write_late(self) -> None:
        """Write what came after close(), waiting no longer than CLOSE_TIMEOUT_S for a stuck reader: it is waited for once."""
        self._writer = threading.Thread(target=self.flush, name="log-writer", daemon=True)
        with suppress(RuntimeError):  # the interpreter is at its end, and starts no thread any more
            self._writer.start()
            self._writer.join(CLOSE_TIMEOUT_S)

    def _drain(self) -> None:
        while not self._closed:
            self._filled.wait()
            self._hurry.wait(FLUSH_INTERVAL_S)
            self._hurry.clear()
            self._filled.clear()  # before the buffer is taken: a line that comes after it sets it anew
            self.flush()
        self.flush()  # what came while the last batch was being written

    def _written(self, lines: list[bytes]) -> bool:
        try:
            left = memoryview(b"".join(lines))
            while left:
                count = self._stream.write(left)
                if (
                    count is None
                ):  # it doesn't block, and is full: another process that shares the file has seen to that
                    select.select([], [self._stream], [], FLUSH_INTERVAL_S)
                left = left[count or 0 :]
            self._stream.flush()
        except (OSError, ValueError):  # the reader is gone, or the stream closed: the lines are counted
            return False
        return True
