"""The status page's figures, taken from a merged snapshot, so that the page and Prometheus can't disagree."""

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypedDict

from meshproxy.telemetry import families
from meshproxy.telemetry.families import Definition
from meshproxy.telemetry.snapshot import Family, Snapshot

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
    by_code = found.by(families.REQUESTS, "code")
    in_flight = found.by(families.IN_FLIGHT, "phase")
    ledger = found.distribution(families.LEDGER_OP_DURATION)
    return {
        "config": {
            "generation": found.gauge(families.CONFIG_GENERATION),
            "last_reload_successful": found.gauge(families.CONFIG_LAST_RELOAD_SUCCESSFUL) > 0,
        },
        "requests": {
            "total": sum(by_code.values()),
            "client_errors": sum(count for code, count in by_code.items() if code.startswith("4")),
            "server_errors": sum(count for code, count in by_code.items() if code.startswith("5")),
        },
        "in_flight": {phase: in_flight[phase] for phase in families.PHASES},
        "request_duration": found.distribution(families.REQUEST_DURATION),
        "time_to_first_token": found.distribution(families.TIME_TO_FIRST_TOKEN),
        "upstreams": _upstreams(found),
        "ledger": {
            "ops": sum(ledger["counts"]),
            "errors": sum(found.by(families.LEDGER_ERRORS, "kind", lambda labels: labels[0] != "noscript").values()),
            "duration": ledger,
        },
        "models": _models(found),
        "event_loop_lag": found.distribution(families.EVENT_LOOP_LAG),
    }


class _Found:
    """A snapshot's families by definition, in whole numbers of what each is stored in."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._families = {family.name: family for family in snapshot}

    def by(
        self, definition: Definition, label: str, where: Callable[[tuple[str, ...]], bool] = lambda _labels: True
    ) -> dict[str, int]:
        """Its values added up by one label, but for series whose labels aren't `where` they should; 0 for every other."""
        position = definition.labels.index(label)
        totals: dict[str, int] = defaultdict(int)
        for series in self._family(definition).series:
            if where(series.labels):
                totals[series.labels[position]] += int(series.value)
        return totals

    def gauge(self, definition: Definition) -> int:
        """The value of a family without labels; 0 if nobody set it."""
        return int(next((series.value for series in self._family(definition).series), 0))

    def distribution(self, definition: Definition) -> Distribution:
        family = self._family(definition)
        columns = zip(*(series.counts for series in family.series), strict=True)
        cumulative = [int(sum(column)) for column in columns] or [0] * (len(family.edges) + 1)
        counts = [above - below for below, above in pairwise((0, *cumulative))]
        return {"edges": list(family.edges), "counts": counts}

    def _family(self, definition: Definition) -> Family:
        return self._families.get(definition.name) or Family(definition.name, [], definition.edges)


def _upstreams(found: _Found) -> list[dict[str, Any]]:
    """Every upstream that has a breaker."""
    requests = found.by(families.UPSTREAM_REQUESTS, "upstream")
    errors = found.by(families.UPSTREAM_REQUESTS, "upstream", lambda labels: _is_error(labels[1]))
    breakers = found.by(families.BREAKER_OPEN, "upstream")
    return [
        {"name": name, "requests": requests[name], "errors": errors[name], "breaker_open": breakers[name] > 0}
        for name in sorted(breakers)
    ]


def _is_error(code: str) -> bool:
    """Whether an attempt wasn't answered with 2xx to 4xx but 429."""
    return code != "cancelled" and (code == "429" or code[0] not in "234")


def _models(found: _Found) -> list[dict[str, Any]]:
    requests = found.by(families.REQUESTS, "model", lambda labels: labels[1] != families.NONE)
    tokens = found.by(families.TOKENS, "model", lambda labels: labels[1] in {"prompt", "completion"})  # others: parts
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
