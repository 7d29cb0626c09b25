"""What the system says of this process: CPU, memory, file descriptors, from proc(5). Elsewhere than on Linux there is nothing to
read, and the families are empty.
"""

import os
import resource
from functools import cache
from pathlib import Path

from meshproxy.telemetry.snapshot import Family, Series

PROC = Path("/proc")


def read() -> list[Family]:
    """The process's families as of now."""
    try:
        stat = (PROC / "self/stat").read_text().rpartition(")")[2].split()  # from the third field on
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        values = {
            "process_cpu_seconds_total": (int(stat[11]) + int(stat[12])) / ticks_per_s,  # utime, stime
            "process_resident_memory_bytes": int(stat[21]) * resource.getpagesize(),
            "process_virtual_memory_bytes": int(stat[20]),
            "process_open_fds": len(list((PROC / "self/fd").iterdir())),
            "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "process_start_time_seconds": _booted_at() + int(stat[19]) / ticks_per_s,
        }
    except OSError:
        return []
    return [Family(name, [Series((), value)]) for name, value in values.items()]


@cache
def _booted_at() -> float:
    """Unix seconds, from the line `btime`. Read once: what came out anew each time would look like restarts."""
    return float((PROC / "stat").read_text().partition("\nbtime ")[2].split()[0])
