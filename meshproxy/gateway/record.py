"""Record: the last phase of every request, its metrics, its one log line, and its span where spans are asked for."""

import logging
from collections.abc import Callable
from typing import Any

import structlog
from msgspec.structs import astuple
from prometheus_client import Counter, Gauge

from meshproxy.errors import Source, UpstreamFault
from meshproxy.gateway.exchange import Exchange
from meshproxy.gateway.spans import Spans
from meshproxy.ledger.records import Denied
from meshproxy.money import format_usd
from meshproxy.policy.catalog import Attempt
from meshproxy.telemetry.families import PHASES
from meshproxy.telemetry.logs import RequestLog
from meshproxy.telemetry.metrics import Metrics
from meshproxy.wire.headers import upstream_request_id
from meshproxy.wire.replies import MAX_QUOTED_BYTES, without_quotes
from meshproxy.wire.usage import Usage

MAX_WORDS_CHARS = 500  # of a provider, in one line of the log
ROUTE = "/v1/chat/completions"

_log = structlog.get_logger("meshproxy.gateway")


class _OfModel:
    """One model's metrics, bound once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.duration = {stream: metrics.request_duration.labels(model, stream) for stream in ("true", "false")}
        self.first_token = metrics.time_to_first_token.labels(model)
        self.per_token = metrics.time_per_output_token.labels(model)
        self.max_gap = metrics.stream_max_gap.labels(model)
        self.tokens = [metrics.tokens.labels(model, kind) for kind in Usage.__struct_fields__]
        self.cost = metrics.cost.labels(model)


class _OfUpstream:
    """One upstream's metrics, bound once."""

    def __init__(self, metrics: Metrics, upstream: str) -> None:
        self.duration = metrics.upstream_duration.labels(upstream)
        self.first_token = metrics.upstream_first_token.labels(upstream)


class Recorder:
    """Counts requests in and out. `clock` is monotonic seconds."""

    def __init__(self, metrics: Metrics, request_log: RequestLog, clock: Callable[[], float]) -> None:
        self.in_flight = 0
        self.spans: Spans | None = None
        self._metrics = metrics
        self._request_log = request_log
        self._clock = clock
        self._models: dict[str, _OfModel] = {}
        self._upstreams: dict[str, _OfUpstream] = {}
        self._requests: dict[tuple[str, int, str], Counter] = {}
        self._phases: dict[str, Gauge] = {phase: metrics.in_flight.labels(phase) for phase in PHASES}
        self._overhead = {stream: metrics.overhead.labels(stream) for stream in ("true", "false")}

    def begin(self, exchange: Exchange) -> None:
        """A request came in."""
        self.in_flight += 1
        self._phases[exchange.phase].inc()

    def enter(self, exchange: Exchange, phase: str) -> None:
        """A request goes on to another phase."""
        self._phases[exchange.phase].dec()
        exchange.phase = phase
        self._phases[phase].inc()

    def end(self, exchange: Exchange) -> None:
        """A request is over: count it and log it."""
        self.in_flight -= 1
        self._phases[exchange.phase].dec()
        now = self._clock()
        stream = "true" if exchange.plan is not None and exchange.plan.request.stream else "false"
        model = exchange.model
        self._count(exchange, model or "none", stream, now)
        self._request_log.write(self._line(exchange, model, stream == "true", now))
        if self.spans is not None:
            self.spans.end(exchange, ROUTE, now)

    def shed(self, exchange: Exchange) -> None:
        """Count and log a request that was turned away before it counted as in flight."""
        self._request_counter("none", exchange.status, "false").inc()
        self._request_log.write(self._line(exchange, "", stream=False, now=self._clock()))

    def denied(self, denied: Denied) -> None:
        """The ledger said no."""
        if denied.reason == "rate_limit":
            self._metrics.rate_limited.labels(denied.which.replace(" ", "_")).inc()
        else:
            self._metrics.credit_rejections.labels(denied.reason).inc()

    def attempted(self, upstream: str, code: str) -> None:
        """A provider answered with a status, or failed without one."""
        self._metrics.upstream_requests.labels(upstream, code).inc()

    def attempt_failed(self, exchange: Exchange, attempt: Attempt, fault: UpstreamFault) -> None:
        """Log an attempt that failed, and why: its status or the system's reason, and the provider's words."""
        response = exchange.response
        ours = fault.source is Source.GATEWAY
        _log.log(
            logging.ERROR if ours else logging.WARNING,
            "attempt_failed",
            request_id=exchange.call.request_id,
            upstream=attempt.upstream,
            model=attempt.model,
            attempt=exchange.attempts,
            source=fault.source.value,
            phase=fault.phase.value,
            status=response.status if response is not None else fault.answered,
            reason=fault.reason or (fault.problem.message if fault.words is None else None),
            words=_without_prompt(exchange, fault.words) if fault.words is not None else None,
            upstream_request_id=upstream_request_id(response.headers) if response is not None else None,
            duration_ms=_ms(self._clock() - exchange.sent_at),
        )

    def breaker_changed(self, upstream: str, is_open: bool) -> None:  # noqa: FBT001 - the gauge's value
        """An upstream's breaker opened or closed."""
        self._metrics.breaker_open.labels(upstream).set(is_open)
        if is_open:
            _log.warning("breaker_opened", upstream=upstream)
        else:
            _log.info("breaker_closed", upstream=upstream)

    def bug(self, exchange: Exchange, error: BaseException) -> None:
        """Something went wrong that nobody foresaw."""
        _log.error("bug", request_id=exchange.call.request_id, exc_info=error)

    def _count(self, exchange: Exchange, model: str, stream: str, now: float) -> None:
        self._request_counter(model, exchange.status, stream).inc()
        received_at = exchange.call.received_at
        of_model = self._of_model(model)
        of_model.duration[stream].observe_traced(now - received_at, exchange.call.trace_id)
        if exchange.sent_at and exchange.attempt is not None:
            self._overhead[stream].observe(exchange.overhead_s)
            of_upstream = self._upstreams.get(exchange.attempt.upstream) or self._of_upstream(exchange.attempt.upstream)
            of_upstream.duration.observe(now - exchange.sent_at)
            if exchange.first_event_at:
                of_upstream.first_token.observe(exchange.first_event_at - exchange.sent_at)
        if exchange.first_event_at:
            self._count_stream(exchange, of_model, received_at)
        if exchange.outcome == "client_disconnected":
            self._metrics.client_disconnects.labels(exchange.phase).inc()
        elif exchange.outcome == "insufficient_credits":
            self._metrics.credit_rejections.labels("mid_stream").inc()
        if exchange.lease is not None:
            self._count_usage(exchange, of_model)

    def _count_stream(self, exchange: Exchange, of_model: _OfModel, received_at: float) -> None:
        of_model.first_token.observe_traced(exchange.first_event_at - received_at, exchange.call.trace_id)
        of_model.max_gap.observe(exchange.max_gap_s)
        if exchange.usage.completion > 1:
            spent_s = exchange.last_event_at - exchange.first_event_at
            of_model.per_token.observe(spent_s / (exchange.usage.completion - 1))

    def _count_usage(self, exchange: Exchange, of_model: _OfModel) -> None:
        self._metrics.settlements.labels(exchange.outcome, exchange.usage_source).inc()
        if exchange.refused:
            self._refused(exchange)
        if exchange.unlisted_model is not None:
            _log.warning(
                "served_unlisted_model",
                upstream=exchange.attempt.upstream if exchange.attempt is not None else "",
                served=exchange.unlisted_model[:256],
                billed=exchange.model,
                request_id=exchange.call.request_id,
            )
        for counter, amount in zip(of_model.tokens, astuple(exchange.usage), strict=True):
            if amount:
                counter.inc(amount)
        of_model.cost.inc(exchange.cost_nusd)

    def _refused(self, exchange: Exchange) -> None:
        """Count and log what a provider reported that can't be true."""
        upstream = exchange.attempt.upstream if exchange.attempt is not None else ""
        for reason in dict.fromkeys(refusal.reason for refusal in exchange.refused):
            self._metrics.usage_refused.labels(upstream, reason).inc()
            numbers = {refusal.name: refusal.value for refusal in exchange.refused if refusal.reason == reason}
            _log.warning(
                "usage_refused",
                upstream=upstream,
                reason=reason,
                numbers=numbers,
                model=exchange.model,
                request_id=exchange.call.request_id,
            )

    def _line(self, exchange: Exchange, model: str, stream: bool, now: float) -> dict[str, Any]:  # noqa: FBT001 - a field
        """The log line's fields: never a secret and never a prompt."""
        key = exchange.principal.key if exchange.principal is not None else None
        attempt = exchange.attempt
        received_at = exchange.call.received_at
        response = exchange.response
        return {
            "request_id": exchange.call.request_id,
            "client": exchange.call.client,
            "key_id": key.id if key is not None else None,
            "account": key.account if key is not None else None,
            "model": model or None,
            "upstream": attempt.upstream if attempt is not None else None,
            "attempts": exchange.attempts,
            "upstream_status": response.status if response is not None else None,
            "upstream_request_id": upstream_request_id(response.headers) if response is not None else None,
            "refused_by": exchange.refused_by,
            "status": exchange.status,
            "code": exchange.code or None,
            "stream": stream,
            "outcome": exchange.outcome,
            "prompt_tokens": exchange.usage.prompt,
            "completion_tokens": exchange.usage.completion,
            "cost_usd": format_usd(exchange.cost_nusd),
            "usage_source": exchange.usage_source,
            "ttft_ms": _ms(exchange.first_event_at - received_at) if exchange.first_event_at else None,
            "duration_ms": _ms(now - received_at),
            "overhead_ms": _ms(exchange.overhead_s),
            "trace_id": exchange.call.trace_id,
        }

    def _request_counter(self, model: str, status: int, stream: str) -> Counter:
        key = (model, status, stream)
        counter = self._requests.get(key)
        if counter is None:
            counter = self._requests[key] = self._metrics.requests.labels(ROUTE, model, str(status), stream)
        return counter

    def _of_upstream(self, upstream: str) -> _OfUpstream:
        made = self._upstreams[upstream] = _OfUpstream(self._metrics, upstream)
        return made

    def _of_model(self, model: str) -> _OfModel:
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = _OfModel(self._metrics, model)
        return found


def _without_prompt(exchange: Exchange, words: str) -> str:
    """A provider's words as they may be logged: bounded, and without what they repeat of the request."""
    plan = exchange.plan
    if plan is not None:
        request = b",".join([*map(bytes, plan.request.fields.values()), plan.prompt.messages[:MAX_QUOTED_BYTES]])
        words = without_quotes(words, request)
    return words[:MAX_WORDS_CHARS]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
