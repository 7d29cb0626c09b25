"""Counting with prometheus-client, behind a vocabulary that bounds the labels.

Each worker has its own registry. `FamilyOf.labels` is the only place where a label's value is admitted: see
families.py. What each request counts is noted in `Metrics.pending`, and counted in bulk: docs/decisions/metrics.md.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from threading import Lock
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import Metric as CollectedMetric

from meshproxy.openai.usage import Usage
from meshproxy.telemetry import families
from meshproxy.telemetry.exposition import collected, encode
from meshproxy.telemetry.families import CLOSED, NONE, OTHER, Definition

MAX_PENDING = 4096  # items of `Metrics.pending`: about 170 whole answers or 130 streams

_TRACE_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)  # W3C Trace Context, 3.2.2.3


class TracedHistogram(Histogram):
    """A histogram that takes many observations at once, and can keep the trace id of one as an exemplar."""

    def observe_all(self, amounts: list[float]) -> None:
        """Count observations in bulk. Sorts the list."""
        self._sum.inc(sum(amounts))
        amounts.sort()
        below = 0
        for bucket, bound in zip(self._buckets, self._upper_bounds, strict=True):
            below, before = bisect_right(amounts, bound, below), below
            if below > before:
                bucket.inc(below - before)

    def observe_traced(self, value: float, trace_id: str) -> None:
        """Count one observation. A valid W3C trace id (32 hex digits) becomes its bucket's exemplar."""
        self.observe(value, {"trace_id": trace_id} if _TRACE_ID.fullmatch(trace_id) else None)


Metric = TypeVar("Metric", Counter, Gauge, TracedHistogram)


class Vocabulary:
    """The values that each label may have: the configured models and upstreams, and the closed sets of families.py."""

    def __init__(self, models: Iterable[str], upstreams: Iterable[str], version: str) -> None:
        self._allowed: dict[str, frozenset[str] | set[str]] = {**CLOSED, "version": frozenset({version})}
        self._accounts: set[str] = set()
        self._allowed["account"] = self._accounts
        self.extend(models, upstreams)

    def extend(self, models: Iterable[str], upstreams: Iterable[str]) -> None:
        """Admit a new configuration's names beside the old ones: the counters of a removed model stay."""
        self._allowed["model"] = frozenset({NONE}).union(self._allowed.get("model", ()), models)
        self._allowed["upstream"] = frozenset[str]().union(self._allowed.get("upstream", ()), upstreams)

    def add_account(self, name: str, most: int) -> bool:
        """Admit an account's name, unless there are `most` already. Return whether it is admitted now."""
        if name not in self._accounts and len(self._accounts) < most:
            self._accounts.add(name)
        return name in self._accounts

    def admit(self, labels: Sequence[str], values: Sequence[str]) -> tuple[str, ...]:
        """Return the values, with `other` for each that is not allowed. Raises ValueError if the count is wrong."""
        return tuple(
            value if value in self._allowed[label] else OTHER for label, value in zip(labels, values, strict=True)
        )

    def combinations(self, labels: Sequence[str]) -> Iterable[tuple[str, ...]]:
        """List every possible label set, except those with `other`."""
        return product(*(sorted(self._allowed[label]) for label in labels))


class FamilyOf(dict[tuple[str, ...], Metric]):
    """The children of one family of prometheus-client by their label values, in the definition's order.

    A child is made when it is first looked up. The vocabulary admits its label values, so that their number is bounded.
    """

    def __init__(self, metric: Metric, definition: Definition, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.definition = definition
        self._metric: Metric = metric
        self._vocabulary = vocabulary
        self.preset()

    def __missing__(self, values: tuple[str, ...]) -> Metric:
        """Return the child of label values that weren't looked up before, or that aren't allowed: then `other`'s."""
        allowed = self._vocabulary.admit(self.definition.labels, values)
        if allowed not in self:
            self[allowed] = self._metric.labels(*allowed) if allowed else self._metric
        return self[allowed]

    def labels(self, *values: str) -> Metric:
        """Return the child of these label values."""
        return self[values]

    def preset(self) -> None:
        """Create every series of a family that exists from the start."""
        if self.definition.preset:
            only = self.definition.only
            for values in self._vocabulary.combinations(self.definition.labels):
                if not only or values[-1] in only:
                    self[values]


class Metrics:
    """All families of one worker. `edges` replaces a histogram's edges by family name, where it isn't None.

    `pending` has what isn't counted yet: a counter or histogram, its amount, the next counter or histogram, its amount.
    Code that adds to it calls `count_pending` from MAX_PENDING items on. Collecting the registry counts all of it,
    collecting a single metric doesn't.
    """

    def __init__(
        self,
        models: Iterable[str] = (),
        upstreams: Iterable[str] = (),
        *,
        version: str = "unknown",
        edges: Mapping[str, Sequence[float] | None] | None = None,
    ) -> None:
        self._vocabulary = Vocabulary(models, upstreams, version)
        self._edges = edges or {}
        self.pending: list[Any] = []
        self._counting = Lock()  # the registry may be collected in another thread
        self.registry = CollectorRegistry()
        self.registry.register(self)  # first: it counts what is pending before any family is collected
        ProcessCollector(registry=self.registry)
        self._families: list[FamilyOf[Counter] | FamilyOf[Gauge] | FamilyOf[TracedHistogram]] = []
        self.build_info = self._gauges(families.BUILD_INFO)
        self.workers = self._gauges(families.WORKERS)
        self.requests = self._counters(families.REQUESTS)
        self.failures = self._counters(families.FAILURES)
        self.request_duration = self._histograms(families.REQUEST_DURATION)
        self.time_to_first_token = self._histograms(families.TIME_TO_FIRST_TOKEN)
        self.time_per_output_token = self._histograms(families.TIME_PER_OUTPUT_TOKEN)
        self.stream_max_gap = self._histograms(families.STREAM_MAX_GAP)
        self.overhead = self._histograms(families.OVERHEAD)
        self.tokens = self._counters(families.TOKENS)
        self.cost = self._counters(families.COST)
        self.rate_limited = self._counters(families.RATE_LIMITED)
        self.credit_rejections = self._counters(families.CREDIT_REJECTIONS)
        self.in_flight = self._gauges(families.IN_FLIGHT)
        self.in_flight_limit = self._gauges(families.IN_FLIGHT_LIMIT)
        self.upstream_requests = self._counters(families.UPSTREAM_REQUESTS)
        self.upstream_first_token = self._histograms(families.UPSTREAM_TIME_TO_FIRST_TOKEN)
        self.upstream_duration = self._histograms(families.UPSTREAM_REQUEST_DURATION)
        self.upstream_latency = self._histograms(families.UPSTREAM_LATENCY)
        self.upstream_state = self._gauges(families.UPSTREAM_STATE)
        self.breaker_open = self._gauges(families.BREAKER_OPEN)
        self.client_disconnects = self._counters(families.CLIENT_DISCONNECTS)
        self.ledger_op_duration = self._histograms(families.LEDGER_OP_DURATION)
        self.ledger_errors = self._counters(families.LEDGER_ERRORS)
        self.ledger_connected = self._gauges(families.LEDGER_CONNECTED)
        self.journal_pending = self._gauges(families.JOURNAL_PENDING)
        self.settlements = self._counters(families.SETTLEMENTS)
        self.usage_refused = self._counters(families.USAGE_REFUSED)
        self.task_failures = self._counters(families.TASK_FAILURES)
        self.event_loop_lag = self._histograms(families.EVENT_LOOP_LAG)
        self.config_generation = self._gauges(families.CONFIG_GENERATION)
        self.config_last_reload_successful = self._gauges(families.CONFIG_LAST_RELOAD_SUCCESSFUL)
        self.account_requests = self._counters(families.ACCOUNT_REQUESTS)
        self.account_cost = self._counters(families.ACCOUNT_COST)
        self.account_balance = self._gauges(families.ACCOUNT_BALANCE)
        self.account_budget = self._gauges(families.ACCOUNT_BUDGET)
        self.build_info.labels(version).set(1)
        self.workers.labels().set(1)

    def reconfigure(self, models: Iterable[str], upstreams: Iterable[str]) -> None:
        """Admit the new names of a reload. Series of removed names stay until the process ends."""
        self._vocabulary.extend(models, upstreams)
        for family in self._families:
            family.preset()

    def add_account(self, name: str, most: int) -> bool:
        """Let an account have series of its own, if `most` don't have theirs. Return whether it has."""
        return self._vocabulary.add_account(name, most)

    def count_pending(self) -> None:
        """Count what is pending."""
        with self._counting:
            noted = self.pending[:]
            del self.pending[: len(noted)]  # the list stays the same: it may be added to meanwhile
            amounts: dict[Counter | TracedHistogram, list[float]] = defaultdict(list)
            for metric, amount in zip(noted[::2], noted[1::2], strict=True):
                amounts[metric].append(amount)
            for metric, noted_amounts in amounts.items():
                if isinstance(metric, TracedHistogram):
                    metric.observe_all(noted_amounts)
                else:
                    metric.inc(sum(noted_amounts))

    def collect(self) -> Iterable[CollectedMetric]:
        """Count what is pending, as the registry's first collector. It has no families itself."""
        self.count_pending()
        return ()

    async def snapshot(self) -> bytes:
        """Encode all counts and the system's figures of this process as msgpack (see exposition.decode)."""
        return encode(await collected(self.registry))

    def _counters(self, definition: Definition) -> FamilyOf[Counter]:
        return self._family(definition, Counter(*_arguments(definition), registry=self.registry))

    def _gauges(self, definition: Definition) -> FamilyOf[Gauge]:
        return self._family(definition, Gauge(*_arguments(definition), registry=self.registry))

    def _histograms(self, definition: Definition) -> FamilyOf[TracedHistogram]:
        edges = sorted(self._edges.get(definition.name) or definition.edges)
        return self._family(definition, TracedHistogram(*_arguments(definition), buckets=edges, registry=self.registry))

    def _family(self, definition: Definition, metric: Metric) -> FamilyOf[Metric]:
        family = FamilyOf(metric, definition, self._vocabulary)
        self._families.append(family)
        return family


class ModelMetrics:
    """One model's metrics with their labels bound once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.duration = {stream: metrics.request_duration.labels(model, stream) for stream in ("true", "false")}
        self.first_token = metrics.time_to_first_token.labels(model)
        self.per_token = metrics.time_per_output_token.labels(model)
        self.max_gap = metrics.stream_max_gap.labels(model)
        self.tokens = [metrics.tokens.labels(model, kind) for kind in Usage.__struct_fields__]
        self.cost = metrics.cost.labels(model)


class UpstreamMetrics:
    """One upstream's metrics for one model, with their labels bound once."""

    def __init__(self, metrics: Metrics, upstream: str, model: str) -> None:
        self.duration = metrics.upstream_duration.labels(upstream)
        self.first_token = metrics.upstream_first_token.labels(upstream)
        self.latency = {
            stream: metrics.upstream_latency.labels(upstream, model, stream) for stream in ("true", "false")
        }


class AccountMetrics:
    """The metrics of accounts, for the first `most` that make requests in this worker; all others are counted as `other`.

    `names` are those that have theirs.
    """

    def __init__(self, metrics: Metrics, most: int) -> None:
        self.names: dict[str, None] = {}
        self._metrics = metrics
        self._most = most
        self._budgets: set[tuple[str, str]] = set()

    def count(self, account: str, status: int, cost_nusd: int) -> None:
        """Count a request of an account."""
        if account not in self.names and self._metrics.add_account(account, self._most):
            self.names[account] = None
        self._metrics.account_requests.labels(account, str(status)).inc()
        if cost_nusd:
            self._metrics.account_cost.labels(account).inc(cost_nusd)

    def note_balances(self, balances: Mapping[str, int]) -> None:
        """Show the balances of accounts, in nano-USD."""
        for account, balance_nusd in balances.items():
            self._metrics.account_balance.labels(account).set(balance_nusd)

    def note_budgets(self, shares: Mapping[tuple[str, str], float]) -> None:
        """Show the shares of budgets that are spent, by account and budget; 0 for a budget that is gone."""
        for account, budget in self._budgets | shares.keys():
            self._metrics.account_budget.labels(account, budget).set(shares.get((account, budget), 0.0))
        self._budgets = set(shares)


def _arguments(definition: Definition) -> tuple[str, str, tuple[str, ...]]:
    return definition.name, definition.help, definition.labels
