"""Counting, where it costs next to nothing: a counter is an attribute, a histogram a list of ints.

Children are bound once (`family.labels(...)`) and then only added to: no lock (a worker is one thread), no label work, no
allocation. `labels` is the one place where a label's value is admitted, see families.py.
"""

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Generic, TypeVar

from meshproxy.telemetry import families, process, snapshot
from meshproxy.telemetry.families import CLOSED, NONE, OTHER, Definition
from meshproxy.telemetry.snapshot import Exemplar, Family, Series

Clock = Callable[[], float]

_TRACE_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)  # W3C Trace Context, 3.2.2.3


class Counter:
    """A number that only grows. Family `_cost_usd_total` counts integers of nano-USD (families.Definition.per)."""

    __slots__ = ("labels", "value")

    def __init__(self, labels: tuple[str, ...], _edges: Sequence[float], _clock: Clock) -> None:
        self.labels = labels
        self.value: int | float = 0

    def inc(self, amount: float = 1) -> None:
        """Count `amount` (never negative) more."""
        self.value += amount

    def series(self) -> Series:
        """What it holds now."""
        return Series(self.labels, self.value)


class Gauge:
    """A number that goes up and down, or is read from where it is kept whenever it is asked for."""

    __slots__ = ("_read", "labels", "value")

    def __init__(self, labels: tuple[str, ...], _edges: Sequence[float], _clock: Clock) -> None:
        self.labels = labels
        self.value: int | float = 0
        self._read: Callable[[], float] | None = None

    def follow(self, read: Callable[[], float]) -> None:
        """From now on it is what `read` says at each snapshot; True is 1."""
        self._read = read

    def set(self, value: float) -> None:
        """It is `value` now; True is 1."""
        self.value = float(value)

    def inc(self, amount: float = 1) -> None:
        """Add `amount`."""
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        """Take `amount` away."""
        self.value -= amount

    def series(self) -> Series:
        """What it holds now."""
        if self._read is not None:
            self.value = float(self._read())
        return Series(self.labels, self.value)


class Histogram:
    """How many observations fell below each edge (edges included, as Prometheus' `le`), and their sum."""

    __slots__ = ("_clock", "_counts", "_edges", "_exemplars", "_sum", "labels")

    def __init__(self, labels: tuple[str, ...], edges: Sequence[float], clock: Clock) -> None:
        self.labels = labels
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0
        self._exemplars: dict[int, Exemplar] = {}
        self._clock = clock

    def observe(self, value: float) -> None:
        """Count one observation, in the family's unit."""
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def observe_traced(self, value: float, trace_id: str | None) -> None:
        """Count one observation, and keep its W3C trace id (32 hex digits; else ignored) as its bucket's exemplar."""
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value
        if trace_id is not None and _TRACE_ID.fullmatch(trace_id):
            self._exemplars[bisect_left(self._edges, value)] = Exemplar(trace_id, value, self._clock())

    def series(self) -> Series:
        """What it holds now; the lists are its own, so encode it before counting on."""
        return Series(self.labels, self._sum, self._counts, self._exemplars)


Child = TypeVar("Child", Counter, Gauge, Histogram)


class Vocabulary:
    """Which values each label may have: the configuration's models and upstreams, and the closed sets of families.py."""

    def __init__(self, models: Iterable[str], upstreams: Iterable[str], version: str) -> None:
        self._allowed: dict[str, frozenset[str]] = {**CLOSED, "version": frozenset({version})}
        self.extend(models, upstreams)

    def extend(self, models: Iterable[str], upstreams: Iterable[str]) -> None:
        """Admit a new configuration's names beside the old ones: a counter of a model that was removed stays."""
        self._allowed["model"] = self._allowed.get("model", frozenset({NONE})).union(models)
        self._allowed["upstream"] = self._allowed.get("upstream", frozenset[str]()).union(upstreams)

    def admit(self, labels: Sequence[str], values: Sequence[str]) -> tuple[str, ...]:
        """The values, with `other` in the place of each that is not allowed; ValueError if one is missing or too many."""
        return tuple(
            value if value in self._allowed[label] else OTHER for label, value in zip(labels, values, strict=True)
        )

    def combinations(self, labels: Sequence[str]) -> Iterable[tuple[str, ...]]:
        """Every label set there can be, but for those with `other`."""
        return product(*(sorted(self._allowed[label]) for label in labels))


class FamilyOf(Generic[Child]):
    """One family's children. Their number is bounded by its labels' vocabulary."""

    def __init__(
        self, kind: type[Child], definition: Definition, words: Vocabulary, edges: Sequence[float], clock: Clock
    ) -> None:
        self.definition = definition
        self._kind: type[Child] = kind
        self._words = words
        self._edges = tuple(edges)
        self._clock = clock
        self._children: dict[tuple[str, ...], Child] = {}
        self.preset()

    def labels(self, *values: str) -> Child:
        """The child of these label values, in the definition's order."""
        return self._children.get(values) or self._admitted(values)

    def preset(self) -> None:
        """Make every series of a family that is to be there from the start."""
        if self.definition.preset:
            only = self.definition.only
            for values in self._words.combinations(self.definition.labels):
                if not only or values[-1] in only:
                    self._admitted(values)

    def snapshot(self) -> Family:
        """All its series now."""
        return Family(self.definition.name, [child.series() for child in self._children.values()], self._edges)

    def _admitted(self, values: Sequence[str]) -> Child:
        allowed = self._words.admit(self.definition.labels, values)
        child = self._children.get(allowed)
        if child is None:
            child = self._children[allowed] = self._kind(allowed, self._edges, self._clock)
        return child


class Metrics:
    """All families of one worker. `edges` replaces a histogram's by family name, where it isn't None; `clock` (Unix seconds)
    dates exemplars.
    """

    def __init__(
        self,
        models: Iterable[str] = (),
        upstreams: Iterable[str] = (),
        *,
        version: str = "unknown",
        edges: Mapping[str, Sequence[float] | None] | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._words = Vocabulary(models, upstreams, version)
        self._edges = edges or {}
        self._clock = clock
        self._families: list[FamilyOf[Counter] | FamilyOf[Gauge] | FamilyOf[Histogram]] = []
        self.build_info = self._gauges(families.BUILD_INFO)
        self.workers = self._gauges(families.WORKERS)
        self.requests = self._counters(families.REQUESTS)
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
        self.build_info.labels(version).set(1)
        self.workers.labels().set(1)

    def reconfigure(self, models: Iterable[str], upstreams: Iterable[str]) -> None:
        """A reload brought new names: admit them. Series of removed ones stay until the process ends."""
        self._words.extend(models, upstreams)
        for family in self._families:
            family.preset()

    def snapshot(self) -> bytes:
        """Everything counted so far, and what the system says of this process, as msgpack (snapshot.decode)."""
        return snapshot.encode([*(family.snapshot() for family in self._families), *process.read()])

    def _counters(self, definition: Definition) -> FamilyOf[Counter]:
        family = FamilyOf(Counter, definition, self._words, (), self._clock)
        self._families.append(family)
        return family

    def _gauges(self, definition: Definition) -> FamilyOf[Gauge]:
        family = FamilyOf(Gauge, definition, self._words, (), self._clock)
        self._families.append(family)
        return family

    def _histograms(self, definition: Definition) -> FamilyOf[Histogram]:
        edges = sorted(self._edges.get(definition.name) or definition.edges)
        family = FamilyOf(Histogram, definition, self._words, edges, self._clock)
        self._families.append(family)
        return family
