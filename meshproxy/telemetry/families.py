"""Every metric family, and the closed set each label is drawn from. Data alone: metrics.py counts, exposition.py renders.

A label's value comes from the configuration (`model`, `upstream`) or from a set written here. Whatever else is offered
becomes `other`, so nothing that a client or a provider sends can make a series.
"""

from http import HTTPStatus
from typing import Literal

from msgspec import Struct

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["sum", "max", "min"]

OTHER = "other"
NONE = "none"  # the model of a request that has none: a refused key, GET /v1/models
PHASES = ("authenticate", "resolve", "admit", "attempt", "stream", "settle")

_UNREGISTERED = (499, 520, 521, 522, 523, 524, 525, 526, 529, 530)  # nginx's, Cloudflare's, and "overloaded"
_STATUSES = (*(int(status) for status in HTTPStatus), *_UNREGISTERED)
_NO_STATUS = ("connect_error", "timeout", "reset", "protocol_error", "cancelled")  # an attempt that got no answer

CLOSED: dict[str, frozenset[str]] = {
    "route": frozenset(
        {
            "/v1/chat/completions",
            "/v1/models",
            "/v1/models/{id}",
            "/v1/templates",
            "/v1/templates/{name}",
            "/v1/usage",
            "/v1/key",
        }
    ),
    "code": frozenset({*map(str, _STATUSES), *_NO_STATUS}),
    "stream": frozenset({"true", "false"}),
    "type": frozenset(
        {"prompt", "completion", "cached", "cache_write", "reasoning", "audio_prompt", "audio_completion"}
    ),
    "limit": frozenset({"key_requests", "key_tokens", "account_requests", "account_tokens"}),
    "reason": frozenset({"insufficient_credits", "spend_limit", "mid_stream"}),
    "phase": frozenset(PHASES),
    "op": frozenset(
        {
            *("admit", "settle", "renew", "balance", "grant", "claim", "conclude"),  # the scripts
            *("put_template", "delete_template"),
            *("GET", "SET", "DEL", "PEXPIRE", "PING", "TIME"),
            *("HGET", "HMGET", "HGETALL", "HSET", "HLEN", "HSCAN", "HVALS", "LRANGE", "RPUSH", "SADD", "SMEMBERS"),
            *("XREVRANGE", "ZADD", "ZCARD", "ZREMRANGEBYSCORE"),
        }
    ),
    "kind": frozenset(
        {
            *("connection", "timeout", "overflow", "protocol", "closed"),
            *("busy", "clusterdown", "loading", "masterdown", "misconf", "noreplicas", "oom", "readonly", "tryagain"),
            *("noscript", "error"),
        }
    ),
    "outcome": frozenset(
        {
            "completed",
            "failed",
            "client_disconnected",
            "insufficient_credits",
            "rate_limited",
            "upstream_failed",
            "abandoned",
            "shutdown",
        }
    ),
    "usage_source": frozenset({"reported", "estimated", "drained", "none"}),
    "task": frozenset({"settle", "renew", "drain", "idempotency", "ledger-dial", "ledger-cluster-map", "reload"}),
}


class Definition(Struct, frozen=True):
    """A family: its whole name, kind, help and labels. `edges` are a histogram's upper bounds in its unit; `merge` says
    how the workers' gauges become one; `per`: stored in integers of 1/per, divided when shown; `preset`: every series
    is there at zero from the start, so that a rate over the first event is right.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    merge: Merge = "sum"
    per: int = 1
    preset: bool = False


# Edges hold the usual objectives exactly (.5, 1, 2, 5, 10, 30 s), so that a ratio of buckets is a service level.
REQUEST_EDGES = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600)
FIRST_TOKEN_EDGES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120)
PER_TOKEN_EDGES = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
GAP_EDGES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 30, 60)
OVERHEAD_EDGES = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
LEDGER_EDGES = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2)
LAG_EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

BUILD_INFO = Definition(
    "meshproxy_build_info", "gauge", "Always 1; the label tells the version.", ("version",), merge="max"
)
WORKERS = Definition("meshproxy_workers", "gauge", "Worker processes that answered this scrape.", preset=True)
REQUESTS = Definition(
    "meshproxy_requests_total",
    "counter",
    "Requests answered, by route, served model, HTTP status and whether the answer was a stream.",
    ("route", "model", "code", "stream"),
)
REQUEST_DURATION = Definition(
    "meshproxy_request_duration_seconds",
    "histogram",
    "From the request's head received to the last byte of the answer written.",
    ("model", "stream"),
    REQUEST_EDGES,
)
TIME_TO_FIRST_TOKEN = Definition(
    "meshproxy_time_to_first_token_seconds",
    "histogram",
    "From the request's head received to the first event of a stream written.",
    ("model",),
    FIRST_TOKEN_EDGES,
)
TIME_PER_OUTPUT_TOKEN = Definition(
    "meshproxy_time_per_output_token_seconds",
    "histogram",
    "A stream's time after its first event, divided by its output tokens after the first.",
    ("model",),
    PER_TOKEN_EDGES,
)
STREAM_MAX_GAP = Definition(
    "meshproxy_stream_max_gap_seconds",
    "histogram",
    "The longest silence between two events of a stream, one observation a stream.",
    ("model",),
    GAP_EDGES,
)
OVERHEAD = Definition(
    "meshproxy_overhead_seconds",
    "histogram",
    "Time spent in the gateway: request received to upstream sent, plus first upstream byte to first byte out.",
    ("stream",),
    OVERHEAD_EDGES,
    preset=True,
)
TOKENS = Definition(
    "meshproxy_tokens_total",
    "counter",
    "Tokens settled, by model and type; cached and cache_write are parts of prompt, reasoning of completion.",
    ("model", "type"),
)
COST = Definition(
    "meshproxy_cost_usd_total", "counter", "Cost settled in USD, by model.", ("model",), per=1_000_000_000
)
RATE_LIMITED = Definition(
    "meshproxy_rate_limited_total",
    "counter",
    "Requests refused with 429, by the empty bucket.",
    ("limit",),
    preset=True,
)
CREDIT_REJECTIONS = Definition(
    "meshproxy_credit_rejections_total",
    "counter",
    "Requests refused with 402, and streams ended (mid_stream) because credit ran out.",
    ("reason",),
    preset=True,
)
IN_FLIGHT = Definition(
    "meshproxy_in_flight_requests", "gauge", "Requests being worked on, by phase.", ("phase",), preset=True
)
UPSTREAM_REQUESTS = Definition(
    "meshproxy_upstream_requests_total",
    "counter",
    "Attempts at an upstream, by HTTP status, or by what happened when there was none.",
    ("upstream", "code"),
)
BREAKER_OPEN = Definition(
    "meshproxy_upstream_breaker_open",
    "gauge",
    "1 while the upstream's circuit breaker is open in any worker.",
    ("upstream",),
    merge="max",
    preset=True,
)
IN_FLIGHT_LIMIT = Definition(
    "meshproxy_in_flight_limit",
    "gauge",
    "Requests that may be in flight before more are refused with 503, added up over the workers.",
    preset=True,
)
CLIENT_DISCONNECTS = Definition(
    "meshproxy_client_disconnects_total",
    "counter",
    "Clients that hung up before their answer was complete, by phase.",
    ("phase",),
    preset=True,
)
LEDGER_OP_DURATION = Definition(
    "meshproxy_ledger_op_duration_seconds",
    "histogram",
    "Round trips to the ledger, pipelining included, by operation.",
    ("op",),
    LEDGER_EDGES,
)
LEDGER_ERRORS = Definition(
    "meshproxy_ledger_errors_total", "counter", "Ledger operations that failed, by kind.", ("kind",), preset=True
)
LEDGER_CONNECTED = Definition(
    "meshproxy_ledger_connected",
    "gauge",
    "1 while every worker has its connection to the ledger.",
    merge="min",
    preset=True,
)
JOURNAL_PENDING = Definition(
    "meshproxy_journal_pending",
    "gauge",
    "Settlements on disk that wait for the ledger.",
    preset=True,
)
SETTLEMENTS = Definition(
    "meshproxy_settlements_total",
    "counter",
    "Holds settled, by how the request ended and where its usage came from.",
    ("outcome", "usage_source"),
)
TASK_FAILURES = Definition(
    "meshproxy_task_failures_total", "counter", "Background tasks that raised, by name.", ("task",), preset=True
)
EVENT_LOOP_LAG = Definition(
    "meshproxy_event_loop_lag_seconds",
    "histogram",
    "How late the event loop wakes a timer, sampled in every worker.",
    (),
    LAG_EDGES,
    preset=True,
)
CONFIG_GENERATION = Definition(
    "meshproxy_config_generation",
    "gauge",
    "Generation of the running configuration: 1 at start, one more a reload; the lowest of the workers.",
    merge="min",
    preset=True,
)
CONFIG_LAST_RELOAD_SUCCESSFUL = Definition(
    "meshproxy_config_last_reload_successful",
    "gauge",
    "1 if the last attempt to load a configuration succeeded in every worker.",
    merge="min",
    preset=True,
)

OWN = (
    BUILD_INFO,
    WORKERS,
    REQUESTS,
    REQUEST_DURATION,
    TIME_TO_FIRST_TOKEN,
    TIME_PER_OUTPUT_TOKEN,
    STREAM_MAX_GAP,
    OVERHEAD,
    TOKENS,
    COST,
    RATE_LIMITED,
    CREDIT_REJECTIONS,
    IN_FLIGHT,
    IN_FLIGHT_LIMIT,
    UPSTREAM_REQUESTS,
    BREAKER_OPEN,
    CLIENT_DISCONNECTS,
    LEDGER_OP_DURATION,
    LEDGER_ERRORS,
    LEDGER_CONNECTED,
    JOURNAL_PENDING,
    SETTLEMENTS,
    TASK_FAILURES,
    EVENT_LOOP_LAG,
    CONFIG_GENERATION,
    CONFIG_LAST_RELOAD_SUCCESSFUL,
)

# prometheus_client's names for the process (its ProcessCollector), summed over the workers; the oldest start counts.
PROCESS = (
    Definition("process_cpu_seconds_total", "counter", "User and system CPU time of all workers in seconds."),
    Definition("process_resident_memory_bytes", "gauge", "Resident memory of all workers in bytes."),
    Definition("process_virtual_memory_bytes", "gauge", "Virtual memory of all workers in bytes."),
    Definition("process_open_fds", "gauge", "Open file descriptors of all workers."),
    Definition("process_max_fds", "gauge", "Largest number of open file descriptors, added up over the workers."),
    Definition("process_start_time_seconds", "gauge", "Start of the oldest worker in Unix seconds.", merge="min"),
)

BY_NAME = {definition.name: definition for definition in (*OWN, *PROCESS)}
