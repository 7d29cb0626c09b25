"""One worker's counts as a snapshot, the merged snapshot of all workers, and its two forms: exposition and status page.

Counters and histograms are summed, including those of workers that ended: Prometheus would take a falling sum for a
restart, and every rate over it would be wrong. Gauges of ended workers are dropped. What a worker counted after its
last report is lost with it.
"""

import asyncio
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any, TypedDict

import msgspec
from msgspec import Struct
from prometheus_client import Metric, samples
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from meshproxy.telemetry import families
from meshproxy.telemetry.families import BY_NAME, Definition, Merge


class Exemplar(Struct, array_like=True, frozen=True):
    """The last traced observation of a bucket. `at` is Unix seconds."""

    trace_id: str
    value: float
    at: float


class Series(Struct, array_like=True):
    """The value of one label set.

    For a histogram `value` is the sum; `counts` are cumulative (Prometheus' `le`), the last one +Inf; `exemplars` are
    by bucket index.
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
        """The family's entry in families.py. Raises KeyError for an unknown name."""
        return BY_NAME[self.name]


Snapshot = list[Family]

_MERGERS: dict[Merge, Callable[[float, float], float]] = {"sum": operator.add, "max": max, "min": min}


async def collected(registry: Collector) -> Snapshot:
    """Read every family of families.py from a registry. The event loop runs between two families."""
    found = []
    for metric in registry.collect():
        definition = BY_NAME.get(f"{metric.name}_total" if metric.type == "counter" else metric.name)
        if definition is not None:
            found.append(_family(definition, metric))
        await asyncio.sleep(0)
    return found


def _family(definition: Definition, metric: Metric) -> Family:
    """Convert one of prometheus-client's metrics to a Family."""
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
        elif not sample.name.endswith(("_count", "_created")):  # the last bucket has the count
            series.value = sample.value
    return Family(definition.name, list(found.values()), tuple(edges)[:-1])


def encode(snapshot: Snapshot) -> bytes:
    """Encode a snapshot as msgpack."""
    return msgspec.msgpack.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """Decode a snapshot from msgpack, without families that this build doesn't know. Raises msgspec.DecodeError."""
    return [family for family in msgspec.msgpack.decode(data, type=Snapshot) if family.name in BY_NAME]


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Merge snapshots into a new one. Histograms whose edges differ from the first's are left out."""
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


class MergedMetrics:
    """The last report of every living worker (bounded by their number), and the sum of those that ended."""

    def __init__(self) -> None:
        self._alive: dict[int, Snapshot] = {}
        self._departed: Snapshot = []

    def report(self, worker: int, data: bytes) -> None:
        """Store a worker's snapshot(). `worker` is a number that is never reused after retire(), for example a pid."""
        self._alive[worker] = decode(data)

    def retire(self, worker: int) -> None:
        """Keep the counts of a worker that ended, and drop its gauges. Does nothing for an unknown worker."""
        last = self._alive.pop(worker, [])
        counted = [family for family in last if family.definition.kind != "gauge"]
        self._departed = merge([self._departed, counted])

    def merged(self) -> Snapshot:
        """Merge all reports into one snapshot, families in the order of the first report."""
        return merge([*self._alive.values(), self._departed])


TOP_MODELS = 10


class Distribution(TypedDict):
    """A histogram summed over all its labels, since the process started. Counts are per bucket, the last one +Inf."""

    edges: list[float]
    counts: list[int]


class Summary(TypedDict):
    """The status page's figures: counters since the start. The page computes rates and percentiles from two polls."""

    config: dict[str, Any]  # generation, last_reload_successful
    requests: dict[str, int]  # total, client_errors (4xx), server_errors (5xx), unpaid (402), limited (429)
    in_flight: dict[str, int]  # by phase
    request_duration: Distribution
    time_to_first_token: Distribution
    upstreams: list[
        dict[str, Any]
    ]  # name, requests, errors, breaker_open, state, first_token and duration: Distribution
    ledger: dict[str, Any]  # ops, errors, duration: Distribution
    models: list[dict[str, Any]]  # the TOP_MODELS by requests: model, requests, tokens, cost_usd
    event_loop_lag: Distribution


def summarize(snapshot: Snapshot) -> Summary:
    """Compute the status page's figures from a snapshot."""
    found = _SnapshotReader(snapshot)
    by_code = found.by(families.REQUESTS, "code")
    in_flight = found.by(families.IN_FLIGHT, "phase")
    ledger = found.distribution(families.LEDGER_OP_DURATION)
    ledger_errors = found.by(families.LEDGER_ERRORS, "kind", lambda labels: labels[0] != "noscript")
    return {
        "config": {
            "generation": found.gauge(families.CONFIG_GENERATION),
            "last_reload_successful": found.gauge(families.CONFIG_LAST_RELOAD_SUCCESSFUL) > 0,
        },
        "requests": {
            "total": sum(by_code.values()),
            "client_errors": sum(count for code, count in by_code.items() if code.startswith("4")),
            "server_errors": sum(count for code, count in by_code.items() if code.startswith("5")),
            "unpaid": by_code["402"],
            "limited": by_code["429"],
        },
        "in_flight": {phase: in_flight[phase] for phase in families.PHASES},
        "request_duration": found.distribution(families.REQUEST_DURATION),
        "time_to_first_token": found.distribution(families.TIME_TO_FIRST_TOKEN),
        "upstreams": _upstreams(found),
        "ledger": {
            "ops": sum(ledger["counts"]) + sum(ledger_errors[kind] for kind in families.UNSENT),
            "errors": sum(ledger_errors.values()),
            "duration": ledger,
        },
        "models": _models(found),
        "event_loop_lag": found.distribution(families.EVENT_LOOP_LAG),
    }


class _SnapshotReader:
    """A snapshot's families by definition. Values are whole numbers in the stored unit."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._families = {family.name: family for family in snapshot}

    def by(
        self, definition: Definition, label: str, where: Callable[[tuple[str, ...]], bool] = lambda _labels: True
    ) -> dict[str, int]:
        """Sum a family's values by one label. `where` filters series by their labels. A missing label value is 0."""
        position = definition.labels.index(label)
        totals: dict[str, int] = defaultdict(int)
        for series in self._family(definition).series:
            if where(series.labels):
                totals[series.labels[position]] += int(series.value)
        return totals

    def gauge(self, definition: Definition) -> int:
        """Return the value of a family without labels, 0 if it isn't set."""
        return int(next((series.value for series in self._family(definition).series), 0))

    def distribution(self, definition: Definition, label: str | None = None) -> Distribution:
        """Return a histogram over all its series, or over those whose first label has this value."""
        family = self._family(definition)
        chosen = [series for series in family.series if label is None or series.labels[0] == label]
        columns = zip(*(series.counts for series in chosen), strict=True)
        edges = family.edges or definition.edges
        cumulative = [int(sum(column)) for column in columns] or [0] * (len(edges) + 1)
        counts = [above - below for below, above in pairwise((0, *cumulative))]
        return {"edges": list(edges), "counts": counts}

    def series(self, definition: Definition) -> list[Series]:
        """Return a family's series."""
        return self._family(definition).series

    def _family(self, definition: Definition) -> Family:
        return self._families.get(definition.name) or Family(definition.name, [], definition.edges)


def _upstreams(found: _SnapshotReader) -> list[dict[str, Any]]:
    """List every upstream that has a breaker."""
    requests = found.by(families.UPSTREAM_REQUESTS, "upstream")
    errors = found.by(families.UPSTREAM_REQUESTS, "upstream", lambda labels: _is_error(labels[1]))
    breakers = found.by(families.BREAKER_OPEN, "upstream")
    states = {series.labels for series in found.series(families.UPSTREAM_STATE) if series.value > 0}
    return [
        {
            "name": name,
            "requests": requests[name],
            "errors": errors[name],
            "breaker_open": breakers[name] > 0,
            "state": next((state for state in ("open", "ejected") if (name, state) in states), "serving"),
            "first_token": found.distribution(families.UPSTREAM_TIME_TO_FIRST_TOKEN, name),
            "duration": found.distribution(families.UPSTREAM_REQUEST_DURATION, name),
        }
        for name in sorted(breakers)
    ]


def _is_error(code: str) -> bool:
    """Return whether an attempt counts as an error: 429, or anything but 2xx to 4xx and `cancelled`."""
    return code != "cancelled" and (code == "429" or code[0] not in "234")


def _models(found: _SnapshotReader) -> list[dict[str, Any]]:
    """List the models with most requests."""
    requests = found.by(families.REQUESTS, "model", lambda labels: labels[1] != families.NONE)
    # the other types are parts of these two
    tokens = found.by(families.TOKENS, "model", lambda labels: labels[1] in {"prompt", "completion"})
    cost = found.by(families.COST, "model")
    served = sorted(requests, key=lambda name: (-requests[name], name))[:TOP_MODELS]
    return [
        {
            "model": name,
            "requests": requests[name],
            "tokens": tokens[name],
            "cost_usd": f"{cost[name] / families.COST.per:.6f}",
        }
        for name in served
    ]


SERIES_PER_TURN = 10  # rendered between two turns of the event loop: 200 lines of a histogram, about 1 ms
END = b"# EOF\n"


class MetricsCollector(Collector):
    """A merged snapshot as a Collector for any registry of prometheus-client. `read` returns the current snapshot."""

    def __init__(self, read: Callable[[], Snapshot]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Yield the families as prometheus-client's metrics."""
        return (_metric(family, family.series) for family in self._read())


async def render(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """Render a snapshot in the format that an Accept header asks for. Return the text and its Content-Type."""
    encode, content_type = choose_encoder(accept)
    text = []
    for family in snapshot:
        for start in range(0, len(family.series) or 1, SERIES_PER_TURN):  # at least one part, for HELP and TYPE
            part = encode(_SingleMetric(_metric(family, family.series[start : start + SERIES_PER_TURN])))
            text.append(_without_head(part) if start else part.removesuffix(END))
            await asyncio.sleep(0)
    if "openmetrics" in content_type:
        text.append(END)
    return b"".join(text), content_type


class _SingleMetric(Collector):
    """A Collector of one family or a part of it."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _without_head(part: bytes) -> bytes:
    """Remove the lines of HELP and TYPE: the family's first part has them."""
    return b"".join(line for line in part.splitlines(keepends=True) if not line.startswith(b"#"))


def _metric(family: Family, series: list[Series]) -> Metric:
    """Convert a Family, with these series of it, to one of prometheus-client's metrics."""
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


def _buckets(
    edges: Iterable[float], series: Series
) -> Iterator[tuple[str, float] | tuple[str, float, samples.Exemplar]]:
    """Yield a histogram's buckets by upper bound as prometheus-client takes them, with exemplars."""
    bounds = (*map(str, map(float, edges)), "+Inf")
    for index, (bound, count) in enumerate(zip(bounds, series.counts, strict=True)):
        found = series.exemplars.get(index)
        if found is None:
            yield bound, count
        else:
            yield bound, count, samples.Exemplar({"trace_id": found.trace_id}, found.value, found.at)
