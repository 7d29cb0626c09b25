"""The status page's figures, taken from a merged snapshot, so that the page and Prometheus can't disagree."""

from collections import defaultdict
from typing import Any, TypedDict

from meshproxy.telemetry import families
from meshproxy.telemetry.families import Definition
from meshproxy.telemetry.snapshot import Series, Snapshot

TOP_MODELS = 10


class Distribution(TypedDict):
    """A histogram over all its labels, growing from the process's start; counts are per bucket, the last one +Inf."""

    edges: list[float]
    counts: list[int]


class Summary(TypedDict):
    """Counters since the start. The page makes rates and percentiles from two polls."""

    config: dict[str, Any]  # generation, last_reload_successful
    requests: dict[str, int]  # total, client_errors (4xx), server_errors (5xx)
    in_flight: dict[str, int]  # by phase
    request_duration: Distribution
    time_to_first_token: Distribution
    upstreams: list[dict[str, Any]]  # name, requests, errors, breaker_open
    ledger: dict[str, Any]  # ops, errors, duration: Distribution
    models: list[dict[str, Any]]  # the TOP_MODELS by requests: model, requests, tokens, cost_usd
    event_loop_lag: Distribution


def summarize(snapshot: Snapshot) -> Summary:
    """What the page shows of the counted."""
    found = _Found(snapshot)
    ledger = found.distribution(families.LEDGER_OP_DURATION)
    return {
        "config": {
            "generation": int(found.gauge(families.CONFIG_GENERATION)),
            "last_reload_successful": found.gauge(families.CONFIG_LAST_RELOAD_SUCCESSFUL) > 0,
        },
        "requests": _requests(found),
        "in_flight": {phase: int(found.by(families.IN_FLIGHT, "phase").get(phase, 0)) for phase in families.PHASES},
        "request_duration": found.distribution(families.REQUEST_DURATION),
        "time_to_first_token": found.distribution(families.TIME_TO_FIRST_TOKEN),
        "upstreams": _upstreams(found),
        "ledger": {
            "ops": sum(ledger["counts"]),
            "errors": int(
                sum(count for kind, count in found.by(families.LEDGER_ERRORS, "kind").items() if kind != "noscript")
            ),
            "duration": ledger,
        },
        "models": _models(found),
        "event_loop_lag": found.distribution(families.EVENT_LOOP_LAG),
    }


class _Found:
    """A snapshot's families by definition."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._families = {family.name: family for family in snapshot}

    def series(self, definition: Definition) -> list[Series]:
        family = self._families.get(definition.name)
        return family.series if family else []

    def by(self, definition: Definition, label: str) -> dict[str, float]:
        """Its values added up by one label."""
        position = definition.labels.index(label)
        totals: dict[str, float] = defaultdict(float)
        for series in self.series(definition):
            totals[series.labels[position]] += series.value / definition.per
        return totals

    def gauge(self, definition: Definition) -> float:
        """The value of a family without labels; 0 if nobody set it."""
        return next((series.value for series in self.series(definition)), 0)

    def distribution(self, definition: Definition) -> Distribution:
        family = self._families.get(definition.name)
        edges = list(family.edges if family else definition.edges)
        columns = zip(*(series.counts for series in self.series(definition)), strict=True)
        return {"edges": edges, "counts": [sum(column) for column in columns] or [0] * (len(edges) + 1)}


def _requests(found: _Found) -> dict[str, int]:
    by_code = found.by(families.REQUESTS, "code")
    return {
        "total": int(sum(by_code.values())),
        "client_errors": int(sum(count for code, count in by_code.items() if code.startswith("4"))),
        "server_errors": int(sum(count for code, count in by_code.items() if code.startswith("5"))),
    }


def _upstreams(found: _Found) -> list[dict[str, Any]]:
    """Every upstream that has a breaker. An attempt that the upstream didn't answer with 2xx to 4xx but 429 is an error."""
    requests = found.by(families.UPSTREAM_REQUESTS, "upstream")
    breakers = found.by(families.BREAKER_OPEN, "upstream")
    errors: dict[str, int] = defaultdict(int)
    for series in found.series(families.UPSTREAM_REQUESTS):
        name, code = series.labels
        if code != "cancelled" and (code == "429" or code[0] not in "234"):
            errors[name] += int(series.value)
    return [
        {"name": name, "requests": int(requests[name]), "errors": errors[name], "breaker_open": breakers[name] > 0}
        for name in sorted(breakers)
    ]


def _models(found: _Found) -> list[dict[str, Any]]:
    requests = found.by(families.REQUESTS, "model")
    tokens = _total_tokens(found)
    cost = found.by(families.COST, "model")
    served = sorted((name for name in requests if name != families.NONE), key=lambda name: (-requests[name], name))
    return [
        {"model": name, "requests": int(requests[name]), "tokens": tokens[name], "cost_usd": f"{cost[name]:.6f}"}
        for name in served[:TOP_MODELS]
    ]


def _total_tokens(found: _Found) -> dict[str, int]:
    """Prompt and completion alone: the other types are parts of them."""
    totals: dict[str, int] = defaultdict(int)
    for series in found.series(families.TOKENS):
        model, kind = series.labels
        if kind in {"prompt", "completion"}:
            totals[model] += int(series.value)
    return totals
