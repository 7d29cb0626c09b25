"""What a run replaces of the interpreter, and puts back: clocks, entropy, sockets, descriptors' limits, files.

`installed` is the context of a run. Functions are replaced where everybody looks them up (`time.monotonic`,
`os.urandom`, `socket.socket`), so that the code under test and the libraries below it need no word about it. `random`
itself is seeded, and gets its state back.

`Disk` is the file system below ROOT, in memory, with flock(2), a size at which it is full, and writes that end in the
middle. Files elsewhere are the real ones: scripts and modules are read from there.
"""

import asyncio
import contextlib
import datetime as dt
import errno
import fcntl
import gc
import os
import random
import resource
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator, MutableSet
from typing import Any

import aiohappyeyeballs.impl

from simulation.loop import PROCESS, Killed, SimLoop
from simulation.network import Poll, Socket

ROOT = "/simulated/"
FIRST_FILE = 1_000_000  # descriptors of the disk begin here
DESCRIPTORS = 4_096  # RLIMIT_NOFILE


class _File:
    def __init__(self) -> None:
        self.data = bytearray()
        self.lock: int | None = None  # the descriptor that has flock()


class Disk:
    """Files in memory. `room`: bytes that still fit (None: no bound). `is_failing`: writes and fsync raise EIO."""

    def __init__(self, loop: SimLoop) -> None:
        self.files: dict[str, _File] = {}
        self.folders = {ROOT.rstrip("/")}
        self.room: int | None = None
        self.is_failing = False
        self._loop = loop
        self._open: dict[int, _File] = {}
        self._next = FIRST_FILE
        self._tearing = False
        loop.close_file = self._close
        loop.torn = self._tear

    def lines(self) -> list[tuple[str, str]]:
        """List every line of every file, with the file's path."""
        return [
            (path, line)
            for path, file in sorted(self.files.items())
            for line in file.data.decode(errors="replace").splitlines()
        ]

    def _tear(self, is_torn: bool) -> None:  # noqa: FBT001 - its only argument
        self._tearing = is_torn

    def _close(self, fd: int) -> None:
        file = self._open.pop(fd, None)
        if file is not None and file.lock == fd:
            file.lock = None

    def patches(self) -> dict[tuple[Any, str], Any]:
        """Return the functions of `os` and `fcntl` that know these files, by module and name."""
        opened = self._open
        real = {name: getattr(os, name) for name in ("open", "close", "fstat", "pread", "ftruncate", "write", "fsync")}
        real_mkdir, real_stat, real_scandir, real_flock = os.mkdir, os.stat, os.scandir, fcntl.flock
        real_access = os.access

        def is_ours(path: Any) -> bool:
            return not isinstance(path, int) and f"{path}/".startswith(ROOT)

        def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if not is_ours(path):
                return int(real["open"](path, flags, *args, **options))
            file = self.files.get(str(path))
            if file is None:
                if not flags & os.O_CREAT:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
                file = self.files[str(path)] = _File()
            self._next += 1
            opened[self._next] = file
            PROCESS.get().files.add(self._next)
            return self._next

        def close(fd: int) -> None:
            if fd not in opened:
                if fd < FIRST_FILE:
                    real["close"](fd)
                return
            PROCESS.get().files.discard(fd)
            self._close(fd)

        def sized(size: int, mode: int = stat.S_IFREG | 0o600) -> os.stat_result:
            return os.stat_result((mode, 1, 0, 1, 0, 0, size, 0, 0, 0))

        def fstat(fd: int) -> os.stat_result:
            return sized(len(opened[fd].data)) if fd in opened else real["fstat"](fd)

        def stat_(path: Any, *args: Any, **options: Any) -> os.stat_result:
            if not is_ours(path):
                return real_stat(path, *args, **options)
            if str(path) in self.folders:
                return sized(0, stat.S_IFDIR | 0o700)
            if str(path) not in self.files:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return sized(len(self.files[str(path)].data))

        def pread(fd: int, size: int, offset: int) -> bytes:
            return bytes(opened[fd].data[offset : offset + size]) if fd in opened else real["pread"](fd, size, offset)

        def ftruncate(fd: int, size: int) -> None:
            if fd in opened:
                if self.room is not None:
                    self.room += max(0, len(opened[fd].data) - size)
                del opened[fd].data[size:]
            else:
                real["ftruncate"](fd, size)

        def write(fd: int, data: bytes) -> int:
            if fd not in opened:
                return int(real["write"](fd, data))
            if self.is_failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            file = opened[fd].data
            if self._tearing:
                file += data[: self._loop.rng.randrange(len(data) + 1)]
                raise Killed
            size = len(data)
            if self.room is not None:
                size = min(size, self.room)
                if not size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.room -= size
            file += data[:size]
            return size

        def fsync(fd: int) -> None:
            if fd not in opened:
                real["fsync"](fd)
            elif self.is_failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        def flock(fd: int, how: int) -> None:
            file = opened.get(fd)
            if file is None:
                real_flock(fd, how)
            elif how & fcntl.LOCK_UN:
                file.lock = None
            elif file.lock not in {None, fd}:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            else:
                file.lock = fd

        def mkdir(path: Any, *args: Any, **options: Any) -> None:
            if not is_ours(path):
                real_mkdir(path, *args, **options)
            elif str(path) in self.folders:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            elif str(path).rpartition("/")[0] not in self.folders:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            else:
                self.folders.add(str(path))

        def scandir(path: Any = ".") -> Any:
            return contextlib.nullcontext(iter(())) if is_ours(path) else real_scandir(path)

        def access(path: Any, *args: Any, **options: Any) -> bool:
            return is_ours(path) or real_access(path, *args, **options)

        ours = [access, open_, close, fstat, pread, ftruncate, write, fsync, mkdir, scandir]
        return {
            **{(os, function.__name__.rstrip("_")): function for function in ours},
            (os, "stat"): stat_,
            (fcntl, "flock"): flock,
        }


class _Datetime(dt.datetime):
    """`datetime` with the run's clock."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
        return dt.datetime.fromtimestamp(time.time(), tz)


class Ordered(MutableSet[Any]):
    """What `set` is in a run: in the order of insertion. A set's own order depends on addresses and on PYTHONHASHSEED."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._items = dict.fromkeys(items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, value: Any) -> None:
        """Add an item."""
        self._items[value] = None

    def discard(self, value: Any) -> None:
        """Remove an item, if it is there."""
        self._items.pop(value, None)

    def update(self, *others: Iterable[Any]) -> None:
        """Add the items of others."""
        for other in others:
            self._items.update(dict.fromkeys(other))

    def copy(self) -> "Ordered":
        """Return another one with the same items."""
        return Ordered(self._items)

    __hash__ = None  # type: ignore[assignment]


_CLOCKS = ("monotonic", "perf_counter", "time", "monotonic_ns", "time_ns")
_kept: list[tuple[Any, str]] = []  # found once: it takes a while
_with_sets: list[dict[str, Any]] = []  # the names of modules whose `set` is Ordered in a run, found once


def _kept_clocks() -> list[tuple[Any, str]]:
    """Find what kept a clock when it was imported: modules' names, and functions' `__defaults__` and `__kwdefaults__`."""
    if _kept:
        return _kept
    ours = [module for name, module in sys.modules.items() if name.startswith("meshproxy.")]
    _with_sets[:] = map(vars, (*ours, asyncio.tasks, aiohappyeyeballs.impl))
    for names in _with_sets:
        names["set"] = (
            set  # for good: a name that comes and goes would have each run specialize all its modules' code anew
        )
    clocks = {id(getattr(time, name)) for name in _CLOCKS}
    for module_name, module in list(sys.modules.items()):
        if module is time or module is dt or not hasattr(module, "__dict__"):
            continue
        is_ours = module_name.startswith("meshproxy.")
        for name, value in list(vars(module).items()):
            if id(value) in clocks or (is_ours and value is dt.datetime):
                _kept.append((module, name))
            elif is_ours and getattr(value, "__module__", None) == module_name:
                for function in [value, *vars(value).values()] if isinstance(value, type) else [value]:
                    if any(id(each) in clocks for each in getattr(function, "__defaults__", None) or ()):
                        _kept.append((function, "__defaults__"))
                    if any(id(each) in clocks for each in (getattr(function, "__kwdefaults__", None) or {}).values()):
                        _kept.append((function, "__kwdefaults__"))
    return _kept


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a run must not start threads or sleep")


@contextlib.contextmanager
def installed(loop: SimLoop, disk: Disk, others: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Have clocks, entropy, sockets and files be the run's within this block, and replace `others`, by owner and name."""
    if not _kept:
        gc.collect()
        gc.freeze()  # modules needn't be looked at after each run
    entropy = random.Random(loop.rng.getrandbits(64))
    replaced: dict[tuple[Any, str], Any] = {
        (time, "monotonic"): loop.time,
        (time, "perf_counter"): loop.time,
        (time, "time"): loop.wall,
        (time, "monotonic_ns"): lambda: int(loop.now * 1e9),
        (time, "perf_counter_ns"): lambda: int(loop.now * 1e9),
        (time, "time_ns"): lambda: int(loop.wall() * 1e9),
        (time, "sleep"): _never,
        (asyncio, "sleep"): loop.sleep,
        (asyncio.tasks, "sleep"): loop.sleep,
        (threading.Thread, "start"): _never,
        (os, "urandom"): entropy.randbytes,
        (random, "_urandom"): entropy.randbytes,
        (os, "getpid"): lambda: PROCESS.get().pid,
        (socket, "socket"): Socket,
        (socket, "socketpair"): lambda *_: loop.network.pair(),
        (socket, "getaddrinfo"): loop.network.found,
        (socket, "has_dualstack_ipv6"): lambda: False,
        (select, "poll"): Poll,
        (resource, "getrlimit"): lambda _: (DESCRIPTORS, DESCRIPTORS),
        (signal, "pthread_sigmask"): lambda *_: set(),
        (gc, "collect"): lambda *_: 0,  # 30 ms each, at every worker's start
        (gc, "set_threshold"): lambda *_: None,
        (gc, "freeze"): lambda: None,
        (os, "sched_getaffinity"): lambda _: {0, 1},
        **disk.patches(),
        **others,
    }
    virtual = {id(getattr(time, name)): replaced[time, name] for name in _CLOCKS}
    virtual[id(dt.datetime)] = _Datetime
    for owner, name in _kept_clocks():
        kept = getattr(owner, name)
        if isinstance(kept, tuple):  # values of default arguments
            replaced[owner, name] = tuple(virtual.get(id(each), each) for each in kept)
        elif isinstance(kept, dict):
            replaced[owner, name] = {key: virtual.get(id(each), each) for key, each in kept.items()}
        else:
            replaced[owner, name] = virtual[id(kept)]
    state, was_collecting, before = random.getstate(), gc.isenabled(), {}
    for (owner, name), value in replaced.items():
        before[owner, name] = getattr(owner, name)
        setattr(owner, name, value)
    for names in _with_sets:
        names["set"] = Ordered
    random.seed(loop.rng.getrandbits(64))
    gc.disable()  # what a collection finds depends on what was allocated before the run
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)
        for names in _with_sets:
            names["set"] = set
        random.setstate(state)
        if was_collecting:
            gc.enable()
