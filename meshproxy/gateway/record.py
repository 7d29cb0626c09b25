"""Records of requests: the log line, metrics and span of each, and a line for each failed attempt.

Spans use the names of OpenTelemetry's semantic conventions for HTTP and generative AI, and our own under `meshproxy.`.
None of these records contains a prompt, an answer or a secret.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import astuple

from meshproxy.config import Upstream
from meshproxy.config.settings import DEFAULT_PORTS
from meshproxy.errors import Source, UpstreamError
from meshproxy.gateway.exchange import Exchange
from meshproxy.ledger.records import Denial
from meshproxy.openai.provider_errors import MAX_QUOTED_BYTES, without_quotes
from meshproxy.openai.request import CHAT_PATH, ChatRequest
from meshproxy.policy.catalog import Candidate
from meshproxy.policy.route_health import Window
from meshproxy.telemetry.families import CAUSES, PHASES
from meshproxy.telemetry.logs import RequestLog
from meshproxy.telemetry.metrics import MAX_PENDING, AccountMetrics, Metrics, ModelMetrics, UpstreamMetrics
from meshproxy.telemetry.spans import OtlpTracer
from meshproxy.units import NUSD_PER_USD, format_usd

Attribute = str | bool | int | float
Attributes = dict[str, Attribute | None]  # None: left out

SAMPLING: Final = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")  # numbers of a request
FAILED_OUTCOMES: Final = frozenset({"failed", "upstream_failed", "shutdown"})  # outcomes that the client didn't cause
GOOD_OUTCOMES: Final = frozenset({"completed", "replayed"})


class Spans:
    """Emits one span for each request, at its end. `upstreams` returns those of the running configuration."""

    def __init__(self, tracer: OtlpTracer, upstreams: Callable[[], Mapping[str, Upstream]]) -> None:
        self._tracer = tracer
        self._upstreams = upstreams

    def end(self, exchange: Exchange, route: str, now: float) -> None:
        """Emit the span of a finished request. `now` is monotonic seconds."""
        has_failed = exchange.status >= 500 or (exchange.status == 200 and exchange.outcome in FAILED_OUTCOMES)
        self._tracer.span(
            f"chat {exchange.model}".rstrip(),
            seconds=now - exchange.call.received_at,
            context=dict(exchange.call.forward),
            describe=lambda: self._attributes(exchange, route),
            error=_error_of(exchange) if has_failed else "",
        )

    def _attributes(self, exchange: Exchange, route: str) -> Mapping[str, Attribute]:
        """Return the span's attributes, without those that are None."""
        first_s = exchange.first_event_at - exchange.call.received_at
        attributes: Attributes = {
            "http.request.method": "POST",
            "http.route": route,
            "http.response.status_code": exchange.status or None,
            "gen_ai.operation.name": "chat",
            "gen_ai.response.time_to_first_chunk": first_s if exchange.first_event_at else None,
            "error.type": _error_of(exchange) or None,
            "meshproxy.request_id": exchange.call.request_id,
            "meshproxy.outcome": exchange.outcome,
            "meshproxy.attempts": exchange.attempts,
        }
        if exchange.principal is not None:
            key = exchange.principal.key
            attributes |= {"meshproxy.account": key.account, "meshproxy.key_id": key.id}
        if exchange.plan is not None:
            attributes |= _request_attributes(exchange.plan.request, exchange.plan.model)
        if exchange.candidate is not None:
            attributes |= self._attempt_attributes(exchange.candidate)
        if exchange.lease is not None:
            attributes |= _usage_attributes(exchange)
        return {name: attribute for name, attribute in attributes.items() if attribute is not None}

    def _attempt_attributes(self, candidate: Candidate) -> Attributes:
        upstream = self._upstreams().get(candidate.upstream)  # None if a reload has removed it
        url = urlsplit(upstream.base_url) if upstream is not None else None
        return {
            "gen_ai.provider.name": candidate.kind,
            "gen_ai.response.model": candidate.upstream_model,
            "meshproxy.model": candidate.model,
            "meshproxy.upstream": candidate.upstream,
            "server.address": url and url.hostname,
            "server.port": url and (url.port or DEFAULT_PORTS.get(url.scheme)),
        }


def _error_of(exchange: Exchange) -> str:
    """Return the error code that the client got, else the outcome; empty if the request ended well."""
    return exchange.code or ("" if exchange.outcome in GOOD_OUTCOMES else exchange.outcome)


def _request_attributes(request: ChatRequest, model: str) -> Attributes:
    fields = request.fields
    return {
        "gen_ai.request.model": model,
        "gen_ai.request.stream": request.stream,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.choice.count": request.n if request.n != 1 else None,
        "gen_ai.conversation.id": request.session_id or None,
        **{f"gen_ai.request.{name}": msgspec.json.decode(fields[name]) for name in SAMPLING if name in fields},
    }


def _usage_attributes(exchange: Exchange) -> Attributes:
    usage = exchange.usage
    return {
        "gen_ai.usage.input_tokens": usage.prompt,
        "gen_ai.usage.output_tokens": usage.completion,
        "gen_ai.usage.cache_read.input_tokens": usage.cached or None,
        "gen_ai.usage.cache_creation.input_tokens": usage.cache_write or None,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning or None,
        "meshproxy.usage_source": exchange.usage_source,
        "meshproxy.cost_usd": exchange.cost_nusd / NUSD_PER_USD,  # for charts, never for bills
    }


MAX_FAILURES = 50  # that a worker remembers for the status page
MAX_REFUSED = 64  # pairs of account and limit that a worker remembers for the status page
REFUSED_S = 60.0
MAX_MESSAGE_CHARS = 500  # of a provider's message, in one log line

_log = structlog.get_logger("meshproxy.gateway")


class Failure(Struct, frozen=True):
    """A request that failed, or an attempt at an upstream: for the status page. `at` is Unix seconds."""

    at: float
    request_id: str
    account: str
    model: str
    upstream: str
    status: int
    code: str


class Refused(Struct):
    """The refusals of one account by one limit, budget or bound: for the status page.

    `lately` is how many there were in about the last minute; `request_id` is the last one's, `at` its time (Unix
    seconds).
    """

    account: str
    refused_by: str
    lately: int = 0
    request_id: str = ""
    at: float = 0.0


class Refusals:
    """Counts refused requests by account and by what refused them: the latest MAX_REFUSED pairs of one worker."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: dict[tuple[str, str], tuple[Refused, Window]] = {}

    def note(self, account: str, refused_by: str, request_id: str) -> None:
        """Count one refusal."""
        pair = account, refused_by
        known = self._found.pop(pair) if pair in self._found else None
        refused, window = known or (Refused(*pair), Window(REFUSED_S))
        if len(self._found) >= MAX_REFUSED:
            oldest = next(iter(self._found))  # each refusal moves its pair to the end
            del self._found[oldest]
        self._found[pair] = refused, window
        window.add(self._clock(), marked=False)
        refused.request_id, refused.at = request_id, time.time()

    def lately(self) -> list[Refused]:
        """Return the pairs that were refused in about the last minute."""
        now = self._clock()
        for refused, window in self._found.values():
            window.advance(now)
            refused.lately = round(window.calls)
        return [refused for refused, _ in self._found.values() if refused.lately]


class Recorder:
    """Counts and logs the requests of one worker. `clock` is monotonic seconds."""

    def __init__(self, metrics: Metrics, request_log: RequestLog, clock: Callable[[], float]) -> None:
        self.spans: Spans | None = None
        self.accounts: AccountMetrics | None = None
        self.failures: deque[Failure] = deque(maxlen=MAX_FAILURES)
        self.last_errors: dict[str, Failure] = {}  # by upstream
        self.refusals = Refusals(clock)
        self._metrics = metrics
        self._request_log = request_log
        self._clock = clock
        self._models: dict[str, ModelMetrics] = {}
        self._upstreams: dict[tuple[str, str], UpstreamMetrics] = {}
        self._exchanges: set[Exchange] = set()  # in flight
        for phase in PHASES:  # counted at a scrape, so that a request needn't set gauges
            metrics.in_flight[(phase,)].set_function(partial(self._count_in, phase))
        self._overhead = {stream: metrics.overhead.labels(stream) for stream in ("true", "false")}

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return len(self._exchanges)

    def begin(self, exchange: Exchange) -> None:
        """Count a request as in flight."""
        self._exchanges.add(exchange)

    def end(self, exchange: Exchange) -> None:
        """Count and log a request that is over."""
        self._exchanges.discard(exchange)
        now = self._clock()
        stream = "true" if exchange.is_stream else "false"
        model = exchange.model
        self._count(exchange, model or "none", stream, now)
        if len(self._metrics.pending) >= MAX_PENDING:
            self._metrics.count_pending()
        self._request_log.write(self._line(exchange, model, stream == "true", now))
        if exchange.status >= 500 or exchange.outcome == "upstream_failed":
            upstream = exchange.candidate.upstream if exchange.candidate is not None else ""
            self.failures.append(
                _failure(exchange, model, upstream, exchange.status, exchange.code or exchange.outcome)
            )
        if exchange.refused_by is not None:
            self.refusals.note(exchange.account, exchange.refused_by, exchange.call.request_id)
        if self.accounts is not None and exchange.principal is not None:
            self.accounts.count(exchange.account, exchange.status, exchange.cost_nusd)
        if self.spans is not None:
            self.spans.end(exchange, CHAT_PATH, now)

    def shed(self, exchange: Exchange) -> None:
        """Count and log a request that was refused before it counted as in flight."""
        self._metrics.requests[CHAT_PATH, "none", str(exchange.status), "false"].inc()
        self._metrics.failures.labels("none", exchange.code).inc()
        self._request_log.write(self._line(exchange, "", stream=False, now=self._clock()))

    def count_denial(self, denial: Denial) -> None:
        """Count a denial of the ledger."""
        if denial.reason == "rate_limit":
            self._metrics.rate_limited.labels(denial.which.replace(" ", "_")).inc()
        else:
            self._metrics.credit_rejections.labels(denial.reason).inc()

    def attempted(self, upstream: str, code: str) -> None:
        """Count a provider's answer by its status, or by the kind of failure without one."""
        self._metrics.pending += (self._metrics.upstream_requests[upstream, code], 1)

    def attempt_failed(self, exchange: Exchange, candidate: Candidate, error: UpstreamError) -> None:
        """Log a failed attempt and its cause: the status or the operating system's reason, and the provider's message."""
        status = exchange.upstream_status or error.upstream_status or 0
        reason = error.reason or error.response.code
        self.last_errors[candidate.upstream] = _failure(exchange, candidate.model, candidate.upstream, status, reason)
        is_ours = error.source is Source.GATEWAY
        _log.log(
            logging.ERROR if is_ours else logging.WARNING,
            "attempt_failed",
            request_id=exchange.call.request_id,
            upstream=candidate.upstream,
            model=candidate.model,
            attempt=exchange.attempts,
            source=error.source.value,
            phase=error.phase.value,
            status=status or None,
            reason=error.reason or (error.response.message if error.provider_message is None else None),
            words=_without_prompt(exchange, error.provider_message) if error.provider_message is not None else None,
            upstream_request_id=exchange.upstream_request_id,
            duration_ms=round((self._clock() - exchange.sent_at) * 1000, 3),
        )

    def breaker_changed(self, upstream: str, is_open: bool) -> None:  # noqa: FBT001 - the gauge's value
        """Set the gauge and log that an upstream's breaker opened or closed."""
        self._metrics.breaker_open.labels(upstream).set(is_open)
        if is_open:
            _log.warning("breaker_opened", upstream=upstream)
        else:
            _log.info("breaker_closed", upstream=upstream)

    def log_bug(self, exchange: Exchange, error: BaseException) -> None:
        """Log an unexpected exception with its traceback."""
        _log.error("bug", request_id=exchange.call.request_id, exc_info=error)

    def _count(self, exchange: Exchange, model: str, stream: str, now: float) -> None:
        """Count a finished request: what is frequent in bulk, what is rare at once."""
        pending = self._metrics.pending
        pending += (self._metrics.requests[CHAT_PATH, model, str(exchange.status), stream], 1)
        received_at, trace_id = exchange.call.received_at, exchange.call.trace_id
        model_metrics = self._models.get(model) or self._model_metrics(model)
        if trace_id is None:
            pending += (model_metrics.duration[stream], now - received_at)
        else:
            model_metrics.duration[stream].observe_traced(now - received_at, trace_id)
        if exchange.sent_at and exchange.candidate is not None:
            served_by = exchange.candidate.upstream, model
            upstream_metrics = self._upstreams.get(served_by) or self._upstream_metrics(*served_by)
            duration_s = now - exchange.sent_at
            pending += (self._overhead[stream], exchange.overhead_s, upstream_metrics.duration, duration_s)
            if exchange.first_event_at:
                waited_s = exchange.first_event_at - exchange.sent_at
                pending += (upstream_metrics.first_token, waited_s, upstream_metrics.latency["true"], waited_s)
            elif exchange.complete and stream == "false":
                pending += (upstream_metrics.latency["false"], duration_s)
        if exchange.first_event_at:
            self._count_stream(exchange, model_metrics, received_at)
        if exchange.code in CAUSES:
            self._metrics.failures.labels(model, exchange.code).inc()
        if exchange.outcome == "client_disconnected":
            self._metrics.client_disconnects.labels(exchange.phase).inc()
        elif exchange.outcome == "insufficient_credits":
            self._metrics.credit_rejections.labels("mid_stream").inc()
        if exchange.lease is not None:
            self._count_usage(exchange, model_metrics)

    def _count_stream(self, exchange: Exchange, model_metrics: ModelMetrics, received_at: float) -> None:
        pending, trace_id = self._metrics.pending, exchange.call.trace_id
        first_token_s = exchange.first_event_at - received_at
        if trace_id is None:
            pending += (model_metrics.first_token, first_token_s)
        else:
            model_metrics.first_token.observe_traced(first_token_s, trace_id)
        pending += (model_metrics.max_gap, exchange.max_gap_s)
        if exchange.usage.completion > 1:
            streaming_s = exchange.last_event_at - exchange.first_event_at
            pending += (model_metrics.per_token, streaming_s / (exchange.usage.completion - 1))

    def _count_usage(self, exchange: Exchange, model_metrics: ModelMetrics) -> None:
        pending = self._metrics.pending
        settled = self._metrics.settlements[exchange.outcome, exchange.usage_source]
        pending += (settled, 1, model_metrics.cost, exchange.cost_nusd)
        for counter, tokens in zip(model_metrics.tokens, astuple(exchange.usage), strict=True):
            if tokens:
                pending += (counter, tokens)
        if exchange.refused_numbers:
            self._refused(exchange)
        if exchange.unlisted_model is not None:
            _log.warning(
                "served_unlisted_model",
                upstream=exchange.candidate.upstream if exchange.candidate is not None else "",
                served=exchange.unlisted_model[:256],
                billed=exchange.model,
                request_id=exchange.call.request_id,
            )

    def _refused(self, exchange: Exchange) -> None:
        """Count and log the reported numbers of a provider that can't be true."""
        upstream = exchange.candidate.upstream if exchange.candidate is not None else ""
        for reason in dict.fromkeys(refusal.reason for refusal in exchange.refused_numbers):
            self._metrics.usage_refused.labels(upstream, reason).inc()
            numbers = {refusal.name: refusal.value for refusal in exchange.refused_numbers if refusal.reason == reason}
            _log.warning(
                "usage_refused",
                upstream=upstream,
                reason=reason,
                numbers=numbers,
                model=exchange.model,
                request_id=exchange.call.request_id,
            )

    def _line(self, exchange: Exchange, model: str, stream: bool, now: float) -> dict[str, Any]:  # noqa: FBT001 - a field
        """Return the log line's fields: never a secret and never a prompt."""
        key = exchange.principal.key if exchange.principal is not None else None
        candidate = exchange.candidate
        received_at = exchange.call.received_at
        first_token_s = exchange.first_event_at - received_at
        return {
            "request_id": exchange.call.request_id,
            "client": exchange.call.client,
            "key_id": key.id if key is not None else None,
            "account": key.account if key is not None else None,
            "model": model or None,
            "upstream": candidate.upstream if candidate is not None else None,
            "attempts": exchange.attempts,
            "upstream_status": exchange.upstream_status or None,
            "upstream_request_id": exchange.upstream_request_id,
            "refused_by": exchange.refused_by,
            "status": exchange.status,
            "code": exchange.code or None,
            "stream": stream,
            "outcome": exchange.outcome,
            "prompt_tokens": exchange.usage.prompt,
            "completion_tokens": exchange.usage.completion,
            "cost_usd": format_usd(exchange.cost_nusd),
            "usage_source": exchange.usage_source,
            # whole microseconds: to round to three digits takes 0.8 us, to a whole number 0.1
            "ttft_ms": round(first_token_s * 1_000_000) / 1000 if exchange.first_event_at else None,
            "duration_ms": round((now - received_at) * 1_000_000) / 1000,
            "overhead_ms": round(exchange.overhead_s * 1_000_000) / 1000,
            "trace_id": exchange.call.trace_id,
        }

    def _count_in(self, phase: str) -> int:
        return sum(exchange.phase == phase for exchange in self._exchanges)

    def _upstream_metrics(self, upstream: str, model: str) -> UpstreamMetrics:
        made = self._upstreams[upstream, model] = UpstreamMetrics(self._metrics, upstream, model)
        return made

    def _model_metrics(self, model: str) -> ModelMetrics:
        made = self._models[model] = ModelMetrics(self._metrics, model)
        return made


def _without_prompt(exchange: Exchange, message: str) -> str:
    """Return a provider's message for the log: shortened, and without what it quotes of the request."""
    plan = exchange.plan
    if plan is not None:
        request = b",".join([*map(bytes, plan.request.fields.values()), plan.prompt.messages[:MAX_QUOTED_BYTES]])
        message = without_quotes(message, request)
    return message[:MAX_MESSAGE_CHARS]


def _failure(exchange: Exchange, model: str, upstream: str, status: int, code: str) -> Failure:
    return Failure(time.time(), exchange.call.request_id, exchange.account, model, upstream, status, code[:200])
