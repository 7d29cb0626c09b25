"""What one worker has counted, as bytes; and how many workers' counts become one answer.

Counters and histograms add up, also over workers that died: a sum that fell would look to Prometheus like a restart, and
every rate over it would be wrong. Gauges of the dead are forgotten. What a worker counted after its last report is lost
with it.
"""

import asyncio
import operator
from collections.abc import Callable, Iterable
from itertools import chain

import msgspec
from msgspec import Struct
from prometheus_client import Metric
from prometheus_client.registry import Collector

from meshproxy.telemetry.families import BY_NAME, Definition, Merge


class Exemplar(Struct, array_like=True, frozen=True):
    """The last traced observation of a bucket; `at` in Unix seconds."""

    trace_id: str
    value: float
    at: float


class Series(Struct, array_like=True):
    """One label set's value. For a histogram `value` is the sum, and `counts` are cumulative (Prometheus' `le`), the last one
    being +Inf; `exemplars` are by bucket.
    """

    labels: tuple[str, ...]
    value: float = 0.0
    counts: list[float] = []
    exemplars: dict[int, Exemplar] = {}


class Family(Struct, array_like=True):
    """All series of one family."""

    name: str
    series: list[Series]
    edges: tuple[float, ...] = ()

    @property
    def definition(self) -> Definition:
        """Its entry in families.py; KeyError for a name that is not there."""
        return BY_NAME[self.name]


Snapshot = list[Family]

_MERGERS: dict[Merge, Callable[[float, float], float]] = {"sum": operator.add, "max": max, "min": min}


async def collected(registry: Collector) -> Snapshot:
    """Read every family that families.py knows from a registry. The event loop runs between two families."""
    found = []
    for metric in registry.collect():
        definition = BY_NAME.get(f"{metric.name}_total" if metric.type == "counter" else metric.name)
        if definition is not None:
            found.append(_family(definition, metric))
        await asyncio.sleep(0)
    return found


def _family(definition: Definition, metric: Metric) -> Family:
    found: dict[tuple[str, ...], Series] = {}
    edges: dict[float, None] = {}
    for sample in metric.samples:
        labels = tuple(sample.labels[name] for name in definition.labels)
        series = found.setdefault(labels, Series(labels, counts=[], exemplars={}))
        if sample.name.endswith("_bucket"):
            edges[float(sample.labels["le"])] = None
            if sample.exemplar is not None:
                exemplar = sample.exemplar
                series.exemplars[len(series.counts)] = Exemplar(
                    exemplar.labels["trace_id"], exemplar.value, float(exemplar.timestamp or 0.0)
                )
            series.counts.append(sample.value)
        elif not sample.name.endswith(("_count", "_created")):  # the last bucket says the count
            series.value = sample.value
    return Family(definition.name, list(found.values()), tuple(edges)[:-1])


def encode(snapshot: Snapshot) -> bytes:
    """A snapshot's msgpack."""
    return msgspec.msgpack.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """The snapshot of its msgpack; msgspec.DecodeError if it is none. Families that this build doesn't know are left out."""
    return [family for family in msgspec.msgpack.decode(data, type=Snapshot) if family.name in BY_NAME]


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """One snapshot of many, none of which is changed. Where two disagree on a histogram's edges the first is believed."""
    merged: dict[str, Family] = {}
    totals: dict[tuple[str, tuple[str, ...]], Series] = {}
    for family in chain.from_iterable(snapshots):
        total = merged.setdefault(family.name, Family(family.name, [], family.edges))
        for series in family.series if total.edges == family.edges else ():
            known = totals.get((family.name, series.labels))
            if known is not None:
                _add(known, series, family.definition)
                continue
            copy = Series(series.labels, series.value, series.counts.copy(), series.exemplars.copy())
            totals[family.name, series.labels] = copy
            total.series.append(copy)
    return list(merged.values())


def _add(total: Series, series: Series, definition: Definition) -> None:
    total.value = _MERGERS[definition.merge](total.value, series.value)
    total.counts = [mine + theirs for mine, theirs in zip(total.counts, series.counts, strict=True)]
    for bucket, exemplar in series.exemplars.items():
        total.exemplars[bucket] = max(total.exemplars.get(bucket, exemplar), exemplar, key=lambda one: one.at)


class Fleet:
    """The last report of every worker, and what the dead ones left. One entry a living worker: bounded by their number."""

    def __init__(self) -> None:
        self._alive: dict[int, Snapshot] = {}
        self._departed: Snapshot = []

    def report(self, worker: int, data: bytes) -> None:
        """Take a worker's snapshot() in; `worker` is a number that is never used again after retire(), such as a pid."""
        self._alive[worker] = decode(data)

    def retire(self, worker: int) -> None:
        """A worker is gone: keep what it counted, forget its gauges. Twice, or for one that never reported: nothing."""
        last = self._alive.pop(worker, [])
        counted = [family for family in last if family.definition.kind != "gauge"]
        self._departed = merge([self._departed, counted])

    def merged(self) -> Snapshot:
        """One snapshot for all, in the order of the first reports' families."""
        return merge([*self._alive.values(), self._departed])
