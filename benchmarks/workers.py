"""`python -m benchmarks.workers`: what a second worker brings where cores are idle.

Two workers, their clients, Redis and the upstream don't fit on two cores. So each worker is held to a fifth of one (CFS bandwidth
control: the kernel's Documentation/scheduler/sched-bwc.rst), and all the rest have the time they want: what the second worker
doesn't bring is what the two cost each other. Takes control groups, version 1 or 2, and root.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import cases, proxies
from benchmarks.processes import children

PERIOD_US = 10_000
QUOTA_US = 2_000
ROUNDS = 3
SECONDS = 5

CGROUPS = Path("/sys/fs/cgroup")


def main() -> int:
    """Whole answers a second with one worker and with two, in turns, and the ratio of the medians."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.workers",
        description="Measure what a second worker brings; takes half a minute, control groups and root.",
    ).parse_args()
    rates_by_workers: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for workers, rates in rates_by_workers.items():
            rates.append(_rate(workers))
            print(f"{workers} of a fifth of a core: {rates[-1]:.0f} requests/s", file=sys.stderr)
    one, two = (statistics.median(rates) for rates in rates_by_workers.values())
    print(f"one worker {one:.0f}/s, two {two:.0f}/s: {two / one:.2f} times as much")
    return 0


def _rate(workers: int) -> float:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshproxy-bench-")))
        behind = stack.enter_context(proxies.upstreams(directory))
        proxy = stack.enter_context(proxies.meshproxy(behind, directory, workers=workers))
        assert proxy.process is not None
        pids = [proxy.process.pid] if workers == 1 else children(proxy.process.pid)
        for number, pid in enumerate(pids):
            stack.enter_context(_held_back(f"meshproxy-bench-{number}", pid))
        return cases.unary(proxy, directory, SECONDS).more["per_s"]


@contextmanager
def _held_back(name: str, pid: int) -> Iterator[None]:
    """A control group for one process, gone when the process is: leave before it ends."""
    is_v2 = (CGROUPS / "cgroup.controllers").exists()
    root = CGROUPS if is_v2 else CGROUPS / "cpu"
    group = root / name
    group.mkdir()
    if is_v2:
        (group / "cpu.max").write_text(f"{QUOTA_US} {PERIOD_US}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US))
    (group / "cgroup.procs").write_text(str(pid))
    try:
        yield
    finally:
        (root / "cgroup.procs").write_text(str(pid))
        group.rmdir()


if __name__ == "__main__":
    sys.exit(main())
