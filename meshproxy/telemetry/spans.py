"""Spans for an OpenTelemetry collector, exported over OTLP/HTTP with OpenTelemetry's SDK.

The SDK is an optional extra, which takes a while to import: it is imported only where `tracing.endpoint` is set. It
queues at most 2,048 spans, drops more, and sends them by the hundred on its own thread. A failing collector affects no
request, and is logged at most once a minute.
"""
# ruff: noqa: PLC0415 - an optional extra

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec

from meshproxy.config import ConfigError, Tracing

Attributes = Mapping[str, str | bool | int | float]

NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
EXPORT_TIMEOUT_S = 5.0  # of one batch, retries included
FLUSH_S = 3.0  # longest wait for the collector at the end
LOG_INTERVAL_S = 60.0  # between two lines of the SDK in our log
# The SDK's loggers of failed exports and of dropped spans.
SDK_LOGGERS = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")


def require_extra(tracing: Tracing) -> None:
    """Raise ConfigError if spans are configured but the packages that send them aren't installed."""
    if tracing.endpoint is not None and not all(map(_is_installed, NEEDED)):
        raise ConfigError(["tracing.endpoint: needs the extra otel (in a checkout: pip install '.[otel]')"])


def open_tracer(tracing: Tracing, version: str) -> "OtlpTracer | None":
    """Make the configured tracer; None if none is configured. Raises ConfigError without the extra."""
    if tracing.endpoint is None:
        return None
    require_extra(tracing)
    return OtlpTracer(tracing.endpoint, tracing.sample, version)


class OtlpTracer:
    """Takes spans and exports sampled ones on the SDK's thread.

    `sample` is the share of traces that begin here; for others the parent decides. The environment's
    `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME` and `OTEL_EXPORTER_OTLP_HEADERS` apply.
    """

    def __init__(self, endpoint: str, sample: float, version: str) -> None:
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ours = {"service.name": "meshproxy", "service.version": version}
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample)),
            resource=Resource.create({**ours, **OTELResourceDetector().detect().attributes}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("meshproxy", version)
        self._propagator = TraceContextTextMapPropagator()
        self._context = context
        self._trace = trace
        self._rate_limit = _RateLimit()
        for name in SDK_LOGGERS:
            logging.getLogger(name).addFilter(self._rate_limit)

    def span(
        self, name: str, *, seconds: float, context: Mapping[str, str], describe: Callable[[], Attributes], error: str
    ) -> None:
        """Record a span that has just ended and took `seconds`.

        `context`: headers that may name its parent. `describe` is called only if the span is sampled. `error`: what
        went wrong on our side, "" if nothing.
        """
        trace, ended_ns = self._trace, time.time_ns()
        span = self._tracer.start_span(
            name,
            self._propagator.extract(context, self._context.Context()),
            trace.SpanKind.SERVER,
            start_time=ended_ns - int(seconds * 1e9),
        )
        if span.is_recording():
            span.set_attributes(describe())
            if error:
                span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        span.end(ended_ns)

    async def close(self) -> None:
        """Send the queued spans for at most FLUSH_S. The thread is a daemon: a collector can't delay the exit."""
        flush = threading.Thread(target=self._provider.shutdown, name="traces-flush", daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, FLUSH_S)
        for name in SDK_LOGGERS:
            logging.getLogger(name).removeFilter(self._rate_limit)


class _RateLimit(logging.Filter):
    """A filter that passes one record per LOG_INTERVAL_S."""

    def __init__(self) -> None:
        super().__init__()
        self._next_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - all records alike
        now = time.monotonic()
        if now < self._next_at:
            return False
        self._next_at = now + LOG_INTERVAL_S
        return True


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing too
        return False
