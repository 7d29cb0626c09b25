"""The journal keeps settlements on disk while Redis can't take them.

It is append-only, bounded, and fsynced before `append` returns. Replay may send a settlement twice: it is charged once
(settle.lua).

Each worker has its own file: the first `PATH.N` that isn't locked. So the file of a dead worker is found and replayed
by its successor. The contents of further unlocked files (of a time with more workers) are moved to the first. A line is
the CRC-32 of a settlement's JSON in hex and that JSON, whose `v` is the version of the format.

A settlement that can't be kept (no room, or no disk until the process ends) is logged whole as `settlement_lost` and
counted in `lost`.
"""

import asyncio
import contextlib
import fcntl
import os
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import structlog

from meshproxy.ledger.records import Settlement
from meshproxy.ledger.store import StoreError, Unavailable

MAX_FILES = 256  # workers on one machine
REPLAY_INTERVAL_S = 0.5
MAX_LOGGED_BYTES = 4096  # of an unreadable line
TRIED_BYTES = 2048  # about what a settlement takes
FORMAT = 1  # version of a line's JSON; a line without `v` is version 1

_log = structlog.get_logger(__name__)


class SettlementsLost(Exception):
    """The process ends with settlements that neither Redis nor the disk took. The log has each of them whole."""


class JournalFull(Exception):
    """The journal has reached its bound. This settlement is lost; the log has it whole."""


class _Version(msgspec.Struct):
    """The format version of a line."""

    v: int = 1


class Journal:
    """The file of one worker and the settlements in it.

    `path` None: settlements are kept in memory only and are lost with the process. `lost` counts the settlements that
    could not be kept.
    """

    def __init__(self, path: Path | None, max_bytes: int) -> None:
        self.lost = 0
        self._max_bytes = max_bytes
        self._pending: deque[Settlement] = deque()
        self._size = 0
        self._unwritten: list[Settlement] = []
        self._disk_failed = False
        self._closed = False
        self._writing = asyncio.Lock()
        self._file: int | None = None
        if path is not None:
            try:
                self._open(path)
            except OSError:
                if self._file is not None:
                    os.close(self._file)  # and unlock it for a worker whose disk works
                raise

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[Settlement]:
        return iter(self._pending)

    @property
    def room_bytes(self) -> int:
        """How many more bytes fit; 0 while the disk refuses writes."""
        return 0 if self._disk_failed else self._max_bytes - self._size

    async def append(self, settlement: Settlement) -> None:
        """Keep a settlement. When this returns, it is on disk.

        Raises JournalFull if there is no room. Raises OSError if the disk refuses it: it is then kept in memory until
        the disk takes it.
        """
        line = _line(settlement)
        if self._size + len(line) > self._max_bytes:
            self._mark_lost(settlement)
            raise JournalFull
        self._size += len(line)
        self._pending.append(settlement)
        self._unwritten.append(settlement)
        await self._write()

    async def replay(self, settle: Callable[[Settlement], Awaitable[bool]]) -> int:
        """Settle what is kept, oldest first, until nothing is left or Redis is lost. Return how many were settled.

        A settlement that Redis refuses moves to the end and is tried again in the next replay.
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
                # all are settled, also those that aren't on disk
                self._size, self._unwritten = 0, []
                if self._file is not None:
                    try:
                        await _in_thread(partial(_truncate, self._file))
                    except OSError as error:  # what stays in the file is charged once, also if it is sent again
                        _log.error("journal_not_written", reason=error.strerror, settlements=0)
                        self._disk_failed = True
        return count

    async def keep_replaying(self, settle: Callable[[Settlement], Awaitable[bool]]) -> None:
        """Replay whenever settlements are pending, for the life of the worker."""
        while True:
            if self._pending:
                count = await self.replay(settle)
                if count:
                    _log.info("journal_replayed", settlements=count, left=len(self._pending))
            if self._disk_failed:
                with contextlib.suppress(OSError):
                    await self._write()
            await asyncio.sleep(REPLAY_INTERVAL_S)

    def close(self) -> int:
        """Write what the disk hasn't taken yet, then unlock the file for the next worker.

        What the disk still refuses is logged whole. Returns how many settlements this journal has lost.
        """
        if self._closed:
            return self.lost
        self._closed = True
        unkept = list(self._pending) if self._file is None else list(self._not_on_disk())
        if self._file is not None:
            try:
                if unkept:
                    _write_through(self._file, b"".join(map(_line, unkept)))
                unkept = []
            except OSError as error:
                _log.error("journal_not_written", reason=error.strerror, settlements=len(unkept))
            os.close(self._file)
        for settlement in unkept:
            self._mark_lost(settlement)
        return self.lost

    async def _write(self) -> None:
        """Write what isn't on disk yet. Settlements that arrive together share one fsync.

        If there is nothing to write and the disk refused the last write, try whether it takes one now.
        """
        async with self._writing:
            unwritten = list(self._unwritten)  # they stay there until the disk has them
            if self._file is not None and (unwritten or self._disk_failed):
                try:
                    if unwritten:
                        await _in_thread(partial(_write_through, self._file, b"".join(map(_line, unwritten))))
                    else:
                        await _in_thread(partial(_try_write, self._file))
                except OSError as error:
                    if not self._disk_failed:
                        _log.error("journal_not_written", reason=error.strerror, settlements=len(self._unwritten))
                    self._disk_failed = True
                    raise
                self._disk_failed = False
            del self._unwritten[: len(unwritten)]

    def _not_on_disk(self) -> Iterator[Settlement]:
        """Return the pending settlements that aren't on disk."""
        pending = {settlement.hold_id for settlement in self._pending}
        return (settlement for settlement in self._unwritten if settlement.hold_id in pending)

    def _mark_lost(self, settlement: Settlement) -> None:
        """Log a settlement whole, because it can't be kept: an operator can charge it by hand."""
        self.lost += 1
        _log.error("settlement_lost", settlement=msgspec.to_builtins(settlement))

    def _open(self, path: Path) -> None:
        """Lock the first free file, and move other free files' contents into it. Raises OSError if none is free."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in range(MAX_FILES):
            name = f"{path}.{number}"
            if self._file is not None and not Path(name).exists():
                break
            file = _open_if_free(name)
            if file is None:
                continue
            try:
                settlements = _read(file)
            except NotImplementedError:
                _log.warning("journal_of_a_newer_version", path=name)  # only the newer version can settle it
                os.close(file)
                continue
            self._pending.extend(settlements)
            if self._file is None:
                self._file = file
                continue
            try:
                _write_through(self._file, b"".join(map(_line, settlements)))
                _truncate(file)
            finally:
                os.close(file)
        if self._file is None:
            raise OSError(f"{path}: all {MAX_FILES} files are in use")
        self._size = os.fstat(self._file).st_size
        if self._pending:
            _log.info("journal_found", settlements=len(self._pending))


def other_journals(path: Path) -> list[Path]:
    """Find unlocked, non-empty journals of other Redis servers beside the one at `path` (`STATE/REDIS/journal`).

    Their settlements are made only by a worker whose configuration names their Redis or their path.
    """
    journals = []
    for other in sorted(path.parent.parent.glob(f"*/{path.name}.*"))[:MAX_FILES]:
        if other.parent != path.parent and other.stat().st_size:
            file = _open_if_free(str(other))
            if file is not None:
                os.close(file)
                journals.append(other)
    return journals


def _open_if_free(name: str) -> int | None:
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _read(file: int) -> list[Settlement]:
    """Read a file's settlements. Removes an incomplete last line (of a crash), so that the next isn't appended to it."""
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
    text = b'{"v":%d,%b' % (FORMAT, msgspec.json.encode(settlement)[1:])
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Settlement | None:
    """Parse a line. Return None if it is damaged. Raises NotImplementedError for a newer format."""
    checksum, _, text = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(text):
            return None
        if msgspec.json.decode(text, type=_Version).v > FORMAT:
            raise NotImplementedError
        return msgspec.json.decode(text, type=Settlement)
    except (ValueError, msgspec.DecodeError):
        return None


async def _in_thread(change: Callable[[], None]) -> None:
    """Change a file in a thread. If this is cancelled, it waits for the thread: nothing else may change the file meanwhile."""
    changing = asyncio.ensure_future(asyncio.to_thread(change))
    try:
        await asyncio.shield(changing)
    except asyncio.CancelledError:
        await asyncio.wait({changing})
        if not changing.cancelled():
            changing.exception()  # the caller keeps what it doesn't know to be on disk
        raise


def _write_through(file: int, data: bytes) -> None:
    """Append to a file and fsync it. If this raises OSError, the file is as it was."""
    size = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def _try_write(file: int) -> None:
    """Append as much as a settlement takes, fsync it, and remove it. Raises OSError if the disk refuses any of it.

    It has no end of a line: if a crash leaves it, it is removed as an incomplete last line.
    """
    size = os.fstat(file).st_size
    _write_through(file, b" " * TRIED_BYTES)
    os.ftruncate(file, size)
    os.fsync(file)


def _truncate(file: int) -> None:
    os.ftruncate(file, 0)
    os.fsync(file)
