"""What the system says of this process: CPU, memory, file descriptors. Read from /proc by prometheus_client's collector;
elsewhere than on Linux there is nothing to read, and the families are empty.
"""

from functools import cache

from prometheus_client import ProcessCollector

from meshproxy.telemetry.families import PROCESS
from meshproxy.telemetry.snapshot import Family, Series

_NAMES = frozenset(definition.name for definition in PROCESS)


def read() -> list[Family]:
    """The process's families as of now."""
    samples = [sample for metric in _collector().collect() for sample in metric.samples]
    return [Family(sample.name, [Series((), sample.value)]) for sample in samples if sample.name in _NAMES]


@cache
def _collector() -> ProcessCollector:
    return ProcessCollector(registry=None)
