"""What a span says of a request, in the names of OpenTelemetry's semantic conventions for HTTP and generative AI, and in our own
under `meshproxy.`. Never a prompt, an answer or a secret.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from meshproxy.config import Upstream
from meshproxy.gateway.exchange import Exchange
from meshproxy.money import NUSD_PER_USD
from meshproxy.policy.catalog import Attempt
from meshproxy.wire.chat import ChatRequest

if TYPE_CHECKING:
    from meshproxy.telemetry.otlp import OtlpTracer

Fact = str | bool | int | float
Facts = dict[str, Fact | None]  # None: not told

SAMPLING: Final = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")  # numbers of a request
BROKEN: Final = frozenset({"failed", "upstream_failed", "shutdown"})  # ends of a stream that are no client's doing
FINE: Final = frozenset({"completed", "replayed"})


class Spans:
    """One span for each request, made at its end. `upstreams`: those of the running configuration."""

    def __init__(self, tracer: "OtlpTracer", upstreams: Callable[[], Mapping[str, Upstream]]) -> None:
        self._tracer = tracer
        self._upstreams = upstreams

    def end(self, exchange: Exchange, route: str, now: float) -> None:
        """A request is over. `now` is monotonic seconds."""
        broke = exchange.status >= 500 or (exchange.status == 200 and exchange.outcome in BROKEN)
        self._tracer.span(
            f"chat {exchange.model}".rstrip(),
            seconds=now - exchange.call.received_at,
            context=dict(exchange.call.forward),
            describe=lambda: self._facts(exchange, route),
            error=_error_of(exchange) if broke else "",
        )

    def _facts(self, exchange: Exchange, route: str) -> Mapping[str, Fact]:
        first_s = exchange.first_event_at - exchange.call.received_at
        facts: Facts = {
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
            facts |= {"meshproxy.account": key.account, "meshproxy.key_id": key.id}
        if exchange.plan is not None:
            facts |= _of_request(exchange.plan.request, exchange.plan.model)
        if exchange.attempt is not None:
            facts |= self._of_attempt(exchange.attempt)
        if exchange.lease is not None:
            facts |= _of_usage(exchange)
        return {name: fact for name, fact in facts.items() if fact is not None}

    def _of_attempt(self, attempt: Attempt) -> Facts:
        upstream = self._upstreams().get(attempt.upstream)  # None if a reload took it away meanwhile
        url = urlsplit(upstream.base_url) if upstream is not None else None
        return {
            "gen_ai.provider.name": attempt.kind,
            "gen_ai.response.model": attempt.upstream_model,
            "meshproxy.model": attempt.model,
            "meshproxy.upstream": attempt.upstream,
            "server.address": url and url.hostname,
            "server.port": url and (url.port or (443 if url.scheme == "https" else 80)),
        }


def _error_of(exchange: Exchange) -> str:
    """The code that the client was told, else the way the request ended; empty if it ended well."""
    return exchange.code or ("" if exchange.outcome in FINE else exchange.outcome)


def _of_request(request: ChatRequest, model: str) -> Facts:
    fields = request.fields
    return {
        "gen_ai.request.model": model,
        "gen_ai.request.stream": request.stream,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.choice.count": request.n if request.n != 1 else None,
        "gen_ai.conversation.id": request.session_id or None,
        **{f"gen_ai.request.{name}": msgspec.json.decode(fields[name]) for name in SAMPLING if name in fields},
    }


def _of_usage(exchange: Exchange) -> Facts:
    usage = exchange.usage
    return {
        "gen_ai.usage.input_tokens": usage.prompt,
        "gen_ai.usage.output_tokens": usage.completion,
        "gen_ai.usage.cache_read.input_tokens": usage.cached or None,
        "gen_ai.usage.cache_creation.input_tokens": usage.cache_write or None,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning or None,
        "meshproxy.usage_source": exchange.usage_source,
        "meshproxy.cost_usd": exchange.cost_nusd / NUSD_PER_USD,  # to filter and to chart by: bills are made elsewhere
    }
