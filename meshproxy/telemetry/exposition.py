"""A merged snapshot in Prometheus' text format, or in OpenMetrics with exemplars, written by prometheus_client.

It is written in pieces of at most SAMPLES_PER_PIECE lines, because the process that answers a scrape may be the one that
relays streams: between two pieces the event loop runs.
"""

import asyncio
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from meshproxy.telemetry.families import Definition
from meshproxy.telemetry.snapshot import Family, Series, Snapshot

SAMPLES_PER_PIECE = 100  # about half a millisecond of rendering

_END = b"# EOF\n"


def content_type(*, openmetrics: bool) -> str:
    """The Content-Type of what render() gives."""
    return CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE_PLAIN_0_0_4


def wants_openmetrics(accept: str) -> bool:
    """Whether an Accept header asks for OpenMetrics 1.0, as Prometheus does by default."""
    for media_range in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in media_range.split(";"))
        if media_type == "application/openmetrics-text" and "q=0" not in parameters:
            return True
    return False


async def render(snapshot: Snapshot, *, openmetrics: bool) -> bytes:
    """The whole text, letting the event loop run between pieces."""
    text = []
    for piece in pieces(snapshot, openmetrics=openmetrics):
        text.append(piece)
        await asyncio.sleep(0)
    return b"".join(text)


def pieces(snapshot: Snapshot, *, openmetrics: bool) -> Iterator[bytes]:
    """The text, piece by piece."""
    for family in snapshot:
        for index, batch in enumerate(_batches(family)):
            text = _text(_metric(family, batch), openmetrics=openmetrics)
            yield text if index == 0 else _without_head(text)
    if openmetrics:
        yield _END


class _One(Collector):
    """A registry of one family."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


def _batches(family: Family) -> Iterator[list[Series]]:
    """A family's series in batches of about SAMPLES_PER_PIECE lines; one empty batch if it has none."""
    lines = len(family.edges) + 3 if family.definition.kind == "histogram" else 1  # +Inf, _count, _sum
    size = max(1, SAMPLES_PER_PIECE // lines)
    for start in range(0, len(family.series) or 1, size):
        yield family.series[start : start + size]


def _text(metric: Metric, *, openmetrics: bool) -> bytes:
    if openmetrics:
        text: bytes = openmetrics_text(_One(metric))  # type: ignore[no-untyped-call]
        return text.removesuffix(_END)
    return plain_text(_One(metric))


def _without_head(text: bytes) -> bytes:
    """A later piece of a family, without the HELP and TYPE lines that its first piece had."""
    while text.startswith(b"# "):
        text = text.partition(b"\n")[2]
    return text


def _metric(family: Family, batch: list[Series]) -> Metric:
    definition = family.definition
    match definition.kind:
        case "counter":
            counters = CounterMetricFamily(definition.name, definition.help, labels=definition.labels)
            for series in batch:
                counters.add_metric(series.labels, _shown(series, definition))
            return counters
        case "gauge":
            gauges = GaugeMetricFamily(definition.name, definition.help, labels=definition.labels)
            for series in batch:
                gauges.add_metric(series.labels, _shown(series, definition))
            return gauges
        case "histogram":
            histograms = HistogramMetricFamily(definition.name, definition.help, labels=definition.labels)
            names = [*map(floatToGoString, family.edges), "+Inf"]
            for series in batch:
                histograms.add_metric(series.labels, _buckets(names, series), sum_value=series.value)
            return histograms


def _shown(series: Series, definition: Definition) -> float:
    return series.value / definition.per if definition.per != 1 else series.value


def _buckets(names: list[str], series: Series) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    """prometheus_client's buckets, cumulative."""
    buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
    for index, (name, count) in enumerate(zip(names, accumulate(series.counts), strict=True)):
        found = series.exemplars.get(index)
        if found is None:
            buckets.append((name, count))
        else:
            buckets.append((name, count, Exemplar({"trace_id": found.trace_id}, found.value, round(found.at, 3))))
    return buckets
