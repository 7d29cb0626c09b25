"""Every metric family, and the closed set of values of each label. Only data: metrics.py counts, exposition.py renders.

A label's value comes from the configuration (`model`, `upstream`) or from a set written here. Any other value becomes
`other`, so no input from a client or a provider can create a series.
"""

from functools import partial
from http import HTTPStatus
from typing import Literal

from msgspec import Struct

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["sum", "max", "min"]

OTHER = "other"
NONE = "none"  # the `model` label of a request without one: a refused key, GET /v1/models
PHASES = ("authenticate", "resolve", "admit", "attempt", "stream", "settle")

_UNREGISTERED = (499, 520, 521, 522, 523, 524, 525, 526, 529, 530)  # nginx's, Cloudflare's, and "overloaded"
_NO_STATUS = ("connect_error", "timeout", "reset", "protocol_error", "cancelled")  # attempts without an answer


def _split(text: str) -> frozenset[str]:
    return frozenset(text.split())


CAUSES = _split("gateway_timeout internal_error ledger_unavailable overloaded provider_not_available upstream_error")
_CREDIT_REASONS = _split("insufficient_credits spend_limit mid_stream")
_REFUSAL_REASONS = _split("negative no_number over_window cost")

CLOSED = {
    "route": _split(
        "/v1/chat/completions /v1/models /v1/models/free /v1/models/paid /v1/models/search /v1/models/{id}"
        " /v1/templates /v1/templates/{name} /v1/usage /v1/usage/events /v1/usage/events/{request_id} /v1/key /v1/balance /health"
    ),
    "code": frozenset(map(str, (*map(int, HTTPStatus), *_UNREGISTERED, *_NO_STATUS))),
    "stream": _split("true false"),
    "type": _split("prompt completion cached cache_write reasoning audio_prompt audio_completion cache_write_1h"),
    "limit": _split(
        "key_requests key_tokens account_requests account_tokens key_requests_per_day account_requests_per_day"
        " key_parallel_requests account_parallel_requests"
    ),
    "cause": CAUSES,
    "reason": _CREDIT_REASONS | _REFUSAL_REASONS,
    "phase": frozenset(PHASES),
    "op": _split(
        "admit settle renew balance grant append claim conclude beat put_template delete_template replace repoint sizes"
        " index_hours erase CONFIG INFO GET SET DEL EXISTS EXPIRE PEXPIRE PING TIME HDEL HGET HINCRBY HMGET HGETALL HSET HLEN"
        " HSCAN HVALS LRANGE SADD SISMEMBER SMEMBERS SREM XADD XRANGE XREVRANGE ZADD ZCARD ZREMRANGEBYSCORE"
    ),
    "kind": _split(
        "disconnected overflow"  # UNSENT
        " connection timeout protocol closed noscript error"
        " busy clusterdown loading masterdown misconf noreplicas oom readonly tryagain"
    ),
    "outcome": _split(
        "completed failed client_disconnected insufficient_credits rate_limited upstream_failed abandoned shutdown"
    ),
    "usage_source": _split("reported estimated drained none"),
    "state": _split("serving ejected open"),
    "budget": _split("total daily monthly"),
    "task": _split(
        "settle renew drain idempotency ledger-dial ledger-cluster-map reload pulse journal refusals instances loop-lag"
        " deadlines accept balances history watch store"
    ),
}


UNSENT = frozenset({"disconnected", "overflow"})  # kinds of error of the ledger's operations that have no duration


class Definition(Struct, frozen=True):
    """A metric family: kind, full name, help and labels.

    `edges`: a histogram's upper bounds, in its unit. `merge`: how the workers' gauges are merged. `per`: values are
    stored as integers of 1/per and divided when shown. `preset`: every series exists at zero from the start, so that a
    rate over the first event is right. `only`: the words that the last label has in this family, where its closed set
    has more.
    """

    kind: Kind
    name: str
    help: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    merge: Merge = "sum"
    per: int = 1
    preset: bool = False
    only: frozenset[str] = frozenset()


_counter = partial(Definition, "counter")
_gauge = partial(Definition, "gauge")
_histogram = partial(Definition, "histogram")

# Edges include the usual objectives exactly (.5, 1, 2, 5, 10, 30 s), so that a ratio of buckets is a service level.
_FIRST_TOKEN_EDGES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120)

BUILD_INFO = _gauge("meshproxy_build_info", "Always 1; the version is a label.", ("version",), merge="max")
WORKERS = _gauge("meshproxy_workers", "Worker processes that answered this scrape.", preset=True)
REQUESTS = _counter(
    "meshproxy_requests_total",
    "Requests answered, by route, served model, HTTP status and whether the answer was a stream.",
    ("route", "model", "code", "stream"),
)
FAILURES = _counter(
    "meshproxy_failures_total",
    "Chat completions that failed, by served model and error code: answers with a 5xx, and error events in streams.",
    ("model", "cause"),
)
REQUEST_DURATION = _histogram(
    "meshproxy_request_duration_seconds",
    "From the request's head received to the last byte of the answer written.",
    ("model", "stream"),
    (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600),
)
TIME_TO_FIRST_TOKEN = _histogram(
    "meshproxy_time_to_first_token_seconds",
    "From the request's head received to the first event of a stream written.",
    ("model",),
    _FIRST_TOKEN_EDGES,
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "meshproxy_time_per_output_token_seconds",
    "A stream's time after its first event, divided by its output tokens after the first.",
    ("model",),
    (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5),
)
STREAM_MAX_GAP = _histogram(
    "meshproxy_stream_max_gap_seconds",
    "The longest silence between two events of a stream, one observation a stream.",
    ("model",),
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 30, 60),
)
OVERHEAD = _histogram(
    "meshproxy_overhead_seconds",
    "Time spent in the gateway: request received to upstream sent, plus first upstream byte to first byte out.",
    ("stream",),
    (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
    preset=True,
)
TOKENS = _counter(
    "meshproxy_tokens_total",
    "Tokens settled, by model and type; cached and cache_write are parts of prompt, reasoning of completion.",
    ("model", "type"),
)
COST = _counter("meshproxy_cost_usd_total", "Cost settled in USD, by model.", ("model",), per=1_000_000_000)
RATE_LIMITED = _counter(
    "meshproxy_rate_limited_total", "Requests refused with 429, by the empty bucket.", ("limit",), preset=True
)
CREDIT_REJECTIONS = _counter(
    "meshproxy_credit_rejections_total",
    "Requests refused with 402, and streams ended (mid_stream) because credit ran out.",
    ("reason",),
    preset=True,
    only=_CREDIT_REASONS,
)
IN_FLIGHT = _gauge("meshproxy_in_flight_requests", "Requests being worked on, by phase.", ("phase",), preset=True)
IN_FLIGHT_LIMIT = _gauge(
    "meshproxy_in_flight_limit",
    "Requests that may be in flight before more are refused with 503, added up over the workers.",
    preset=True,
)
UPSTREAM_REQUESTS = _counter(
    "meshproxy_upstream_requests_total",
    "Attempts at an upstream, by HTTP status, or by what happened when there was none.",
    ("upstream", "code"),
)
UPSTREAM_TIME_TO_FIRST_TOKEN = _histogram(
    "meshproxy_upstream_time_to_first_token_seconds",
    "From the request sent to the upstream that served to the first event of its stream.",
    ("upstream",),
    _FIRST_TOKEN_EDGES,
)
UPSTREAM_REQUEST_DURATION = _histogram(
    "meshproxy_upstream_request_duration_seconds",
    "From the request sent to the upstream that was tried last to the end of its answer.",
    ("upstream",),
    (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600),
)
UPSTREAM_LATENCY = _histogram(
    "meshproxy_upstream_latency_seconds",
    "From the request sent to the upstream that served to the first event of its stream, or to the end of its whole answer.",
    ("upstream", "model", "stream"),
    _FIRST_TOKEN_EDGES,
)
UPSTREAM_STATE = _gauge(
    "meshproxy_upstream_state",
    "1 while the upstream is in this state in any worker: serving, ejected (tried after its equals) or open (its breaker is).",
    ("upstream", "state"),
    merge="max",
    preset=True,
)
BREAKER_OPEN = _gauge(
    "meshproxy_upstream_breaker_open",
    "1 while the upstream's circuit breaker is open in any worker.",
    ("upstream",),
    merge="max",
    preset=True,
)
CLIENT_DISCONNECTS = _counter(
    "meshproxy_client_disconnects_total",
    "Clients that hung up before their answer was complete, by phase.",
    ("phase",),
    preset=True,
)
LEDGER_OP_DURATION = _histogram(
    "meshproxy_ledger_op_duration_seconds",
    "Round trips to the ledger, pipelining included, by operation.",
    ("op",),
    (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2),
)
LEDGER_ERRORS = _counter(
    "meshproxy_ledger_errors_total", "Ledger operations that failed, by kind.", ("kind",), preset=True
)
LEDGER_CONNECTED = _gauge(
    "meshproxy_ledger_connected", "1 while every worker has its connection to the ledger.", merge="min", preset=True
)
JOURNAL_PENDING = _gauge("meshproxy_journal_pending", "Settlements on disk that wait for the ledger.", preset=True)
SETTLEMENTS = _counter(
    "meshproxy_settlements_total",
    "Holds settled, by how the request ended and where its usage came from.",
    ("outcome", "usage_source"),
)
USAGE_REFUSED = _counter(
    "meshproxy_usage_refused_total",
    "Reports of usage with numbers that can't be true, by upstream and what is wrong with them.",
    ("upstream", "reason"),
    preset=True,
    only=_REFUSAL_REASONS,
)
TASK_FAILURES = _counter(
    "meshproxy_task_failures_total", "Background tasks that raised, by name.", ("task",), preset=True
)
EVENT_LOOP_LAG = _histogram(
    "meshproxy_event_loop_lag_seconds",
    "How late the event loop wakes a timer, sampled in every worker.",
    (),
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
    preset=True,
)
CONFIG_GENERATION = _gauge(
    "meshproxy_config_generation",
    "Generation of the running configuration: 1 at start, one more a reload; the lowest of the workers.",
    merge="min",
    preset=True,
)
CONFIG_LAST_RELOAD_SUCCESSFUL = _gauge(
    "meshproxy_config_last_reload_successful",
    "1 if the last attempt to load a configuration succeeded in every worker.",
    merge="min",
    preset=True,
)

ACCOUNT_REQUESTS = _counter(
    "meshproxy_account_requests_total",
    "Requests answered, by account and HTTP status; with metrics.accounts alone.",
    ("account", "code"),
)
ACCOUNT_COST = _counter(
    "meshproxy_account_cost_usd_total",
    "Cost settled in USD, by account; with metrics.accounts alone.",
    ("account",),
    per=1_000_000_000,
)
ACCOUNT_BALANCE = _gauge(
    "meshproxy_account_balance_usd",
    "Credit in USD of the accounts that made requests, read from the ledger every few seconds; with metrics.accounts alone.",
    ("account",),
    merge="min",
    per=1_000_000_000,
)
ACCOUNT_BUDGET = _gauge(
    "meshproxy_account_budget_spent_ratio",
    "Spend as a share of the account's budget, read every few seconds (0: no budget any more); with metrics.accounts alone.",
    ("account", "budget"),
    merge="max",
)

OWN = tuple(family for family in tuple(globals().values()) if isinstance(family, Definition))  # all definitions above

# Standard process metrics of Prometheus client libraries, summed over the workers; the start is that of the oldest
# worker.
PROCESS = (
    _counter("process_cpu_seconds_total", "User and system CPU time of all workers in seconds."),
    _gauge("process_resident_memory_bytes", "Resident memory of all workers in bytes."),
    _gauge("process_virtual_memory_bytes", "Virtual memory of all workers in bytes."),
    _gauge("process_open_fds", "Open file descriptors of all workers."),
    _gauge("process_max_fds", "Largest number of open file descriptors, added up over the workers."),
    _gauge("process_start_time_seconds", "Start of the oldest worker in Unix seconds.", merge="min"),
)

BY_NAME = {definition.name: definition for definition in (*OWN, *PROCESS)}
