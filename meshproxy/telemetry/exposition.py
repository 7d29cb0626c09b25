"""A merged snapshot as prometheus-client writes it: Prometheus' text format, or OpenMetrics with exemplars.

The process that answers a scrape may be the one that relays streams, so every SERIES_PER_TURN series the event loop runs.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from meshproxy.telemetry.snapshot import Family, Series, Snapshot

SERIES_PER_TURN = 10  # of a histogram some 200 lines: about a millisecond
END = b"# EOF\n"


class MergedMetrics(Collector):
    """The families of a merged snapshot, for any registry of prometheus-client. `read` gives the snapshot of the moment."""

    def __init__(self, read: Callable[[], Snapshot]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Give the families as prometheus-client has them."""
        return (_metric(family, family.series) for family in self._read())


async def render(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """Write the whole text in the format that an Accept header asks for; and the text's Content-Type."""
    encode, content_type = choose_encoder(accept)
    text = []
    for family in snapshot:
        for start in range(0, len(family.series) or 1, SERIES_PER_TURN):  # one part at least, for its head
            part = encode(_One(_metric(family, family.series[start : start + SERIES_PER_TURN])))
            text.append(_without_head(part) if start else part.removesuffix(END))
            await asyncio.sleep(0)
    if "openmetrics" in content_type:
        text.append(END)
    return b"".join(text), content_type


class _One(Collector):
    """One family or a part of it."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _without_head(part: bytes) -> bytes:
    """Leave out the lines of HELP and TYPE, which the family's first part has."""
    return b"".join(line for line in part.splitlines(keepends=True) if not line.startswith(b"#"))


def _metric(family: Family, series: list[Series]) -> Metric:
    definition = family.definition
    about = definition.name, definition.help
    if definition.kind == "histogram":
        histogram = HistogramMetricFamily(*about, labels=definition.labels)
        for one in series:
            histogram.add_metric(one.labels, list(_buckets(family.edges, one)), one.value)
        return histogram
    kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    metric = kind(*about, labels=definition.labels)
    for one in series:
        metric.add_metric(one.labels, one.value / definition.per)
    return metric


def _buckets(edges: Iterable[float], series: Series) -> Iterator[tuple[str, float] | tuple[str, float, Exemplar]]:
    """Give a histogram's buckets by upper bound, in prometheus-client's words, each with its exemplar if it has one."""
    bounds = (*map(str, map(float, edges)), "+Inf")
    for index, (bound, count) in enumerate(zip(bounds, series.counts, strict=True)):
        found = series.exemplars.get(index)
        if found is None:
            yield bound, count
        else:
            yield bound, count, Exemplar({"trace_id": found.trace_id}, found.value, found.at)
