"""Processes that this run started, each on its core: what they have cost so far, and how they end.

CPU time is utime + stime of /proc/PID/stat, which the kernel keeps to the nanosecond and tells in ticks of 10 ms: what is
reported is that of a process and its children, never that of another on the same core.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

PROXY_CORE = 0
OTHER_CORE = 1  # upstreams, Redis and the clients

READY_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 5.0

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Process:
    """A child process pinned to `core`. Entering waits for its ports, leaving ends it and its children."""

    def __init__(
        self,
        argv: Sequence[str],
        core: int,
        ports: Sequence[int],
        *,
        stderr: Path | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        ready_within_s: float = READY_TIMEOUT_S,
    ) -> None:
        self._ports = ports
        self._ready_within_s = ready_within_s
        self._what = " ".join(argv)
        self._log = stderr or Path(os.devnull)
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(  # it outlives this function: __exit__ ends it
                ["taskset", "-c", str(core), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=cwd,
                env=env,
            )

    def __enter__(self) -> Self:
        try:
            for port in self._ports:
                self._wait_for(port)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._child.pid

    def cpu_s(self) -> float:
        """Seconds of CPU that the process and its living children have used."""
        return sum(_cpu_s(pid) for pid in _family(self.pid))

    def rss_bytes(self) -> int:
        """Resident memory of the process and its children that isn't shared with a file."""
        return sum(_rss_anon_bytes(pid) for pid in _family(self.pid))

    def stop(self) -> None:
        """SIGTERM; SIGKILL for one that doesn't listen."""
        self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + self._ready_within_s
        while self._child.poll() is None and time.monotonic() < deadline:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        tail = self._log.read_text(errors="replace")[-2000:] if self._log.is_file() else ""
        raise RuntimeError(f"{self._what}: did not come up on port {port}\n{tail}")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 without a listener."""
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def program(name: str) -> str:
    """Return where a program is; Debian keeps servers in sbin, which isn't on everyone's path."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin") or name


class Core:
    """How busy a core was since this was made, whoever used it."""

    def __init__(self, number: int) -> None:
        self._name = f"cpu{number}"
        self._before = self._busy_s()
        self._since = time.monotonic()

    def busy(self) -> float:
        """The share of the time that it wasn't idle."""
        return (self._busy_s() - self._before) / (time.monotonic() - self._since)

    def _busy_s(self) -> float:
        for line in Path("/proc/stat").read_text().splitlines():
            name, *ticks = line.split()
            if name == self._name:
                user, nice, system, _idle, _iowait, irq, softirq = map(int, ticks[:7])
                return (user + nice + system + irq + softirq) / _TICKS_PER_S
        raise RuntimeError(f"there is no {self._name} here")


def children(pid: int) -> list[int]:
    """Return the living processes that any thread of one has started: a Go program forks from whichever thread it is on."""
    lists = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return sorted(int(child) for text in lists for child in text.split())


def _family(pid: int) -> Iterator[int]:
    yield pid
    for child in children(pid):
        yield from _family(child)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _rss_anon_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
