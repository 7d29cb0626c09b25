"""Settlements that Redis couldn't take, on disk until it can. Append-only, fsynced before an append is over, bounded, and
replayed as often as it takes: a settlement that is sent twice is charged once (settle.lua).

Each worker has a file of its own, the first `PATH.N` that nobody has locked; so the file that a dead worker leaves is found
and replayed by the one that takes its place. What lies in further files that nobody has locked (there were more workers once)
is moved to the first. A line is the CRC-32 of a settlement's JSON in hex, and that JSON.
"""

import asyncio
import fcntl
import os
import zlib
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from meshproxy.ledger.records import Settlement
from meshproxy.ledger.store import StoreError, Unavailable

MAX_FILES = 256  # workers on one machine
REPLAY_INTERVAL_S = 0.5
MAX_LOGGED_BYTES = 4096  # of a line that can't be read

_log = structlog.get_logger(__name__)


class JournalFull(Exception):
    """What is left over from Redis's absence has reached its bound; this settlement is lost, and the log has it."""


class Journal:
    """The file of one worker, and what it holds. `path` None: kept in memory alone, and lost with the process."""

    def __init__(self, path: Path | None, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pending: deque[Settlement] = deque()
        self._size = 0
        self._unwritten: list[bytes] = []
        self._writing = asyncio.Lock()
        self._file: int | None = None
        if path is not None:
            self._open(path)

    def __len__(self) -> int:
        return len(self._pending)

    async def append(self, settlement: Settlement) -> None:
        """Keep a settlement; on disk when this returns. JournalFull if there is no room."""
        line = _line(settlement)
        if self._size + len(line) > self._max_bytes:
            _log.error("settlement_lost", settlement=msgspec.to_builtins(settlement))
            raise JournalFull
        self._size += len(line)
        self._pending.append(settlement)
        self._unwritten.append(line)
        async with self._writing:
            lines, self._unwritten = self._unwritten, []
            if lines and self._file is not None:
                try:
                    await asyncio.to_thread(_write_through, self._file, b"".join(lines))
                except OSError:
                    self._unwritten = lines + self._unwritten  # it is kept in memory, and the next append tries again
                    raise

    async def replay(self, settle: Callable[[Settlement], Awaitable[bool]]) -> int:
        """Settle what is kept, oldest first, until it is empty or Redis is lost again; how many were. One that Redis refuses
        goes to the end, and is tried again the next time.
        """
        count = 0
        while self._pending:
            try:
                await settle(self._pending[0])
            except Unavailable:
                return count
            except StoreError as error:
                _log.error("settlement_refused", hold_id=self._pending[0].hold_id, reason=str(error))
                self._pending.rotate(-1)
                return count
            self._pending.popleft()
            count += 1
        async with self._writing:
            if not self._pending and self._size:
                self._size, self._unwritten = 0, []  # all of it is settled, also what was still on its way to disk
                if self._file is not None:
                    await asyncio.to_thread(_truncate, self._file)
        return count

    async def keep_replaying(self, settle: Callable[[Settlement], Awaitable[bool]]) -> None:
        """Run for the life of the worker."""
        while True:
            if self._pending:
                count = await self.replay(settle)
                if count:
                    _log.info("journal_replayed", settlements=count, left=len(self._pending))
            await asyncio.sleep(REPLAY_INTERVAL_S)

    def close(self) -> None:
        """Let the next worker have the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self, path: Path) -> None:
        """Take the first file that nobody has locked, and into it what lies in further ones; OSError if none can be had."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in range(MAX_FILES):
            name = f"{path}.{number}"
            if self._file is not None and not Path(name).exists():
                break
            file = _open_if_free(name)
            if file is None:
                continue
            settlements = _read(file)
            self._pending.extend(settlements)
            if self._file is None:
                self._file = file
            else:
                _write_through(self._file, b"".join(map(_line, settlements)))
                _truncate(file)
                os.close(file)
        if self._file is None:
            raise OSError(f"{path}: all {MAX_FILES} files are in use")
        self._size = os.fstat(self._file).st_size
        if self._pending:
            _log.info("journal_found", settlements=len(self._pending))


def _open_if_free(name: str) -> int | None:
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _read(file: int) -> list[Settlement]:
    """What a file holds. A line that a crash cut short is taken away, or the next one would be part of it."""
    data = os.pread(file, os.fstat(file).st_size, 0)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.ftruncate(file, len(whole))
    settlements = []
    for line in whole.splitlines():
        settlement = _parse(line)
        if settlement is None:
            _log.error("journal_line_broken", line=line[:MAX_LOGGED_BYTES].decode(errors="replace"))
        else:
            settlements.append(settlement)
    return settlements


def _line(settlement: Settlement) -> bytes:
    text = msgspec.json.encode(settlement)
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Settlement | None:
    """None for a line that isn't whole."""
    checksum, _, text = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(text):
            return None
        return msgspec.json.decode(text, type=Settlement)
    except (ValueError, msgspec.DecodeError):
        return None


def _write_through(file: int, data: bytes) -> None:
    """OSError, leaving the file as it was, if it can't be written."""
    size = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def _truncate(file: int) -> None:
    os.ftruncate(file, 0)
    os.fsync(file)
