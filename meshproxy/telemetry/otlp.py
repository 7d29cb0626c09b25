"""The tracer that exports spans over OTLP/HTTP with OpenTelemetry's SDK. It is imported only where an endpoint is set.

The SDK queues at most 2,048 spans, drops more, and sends them by the hundred on its own thread. A failing collector
affects no request, and is logged at most once a minute.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Attributes = Mapping[str, str | bool | int | float]

EXPORT_TIMEOUT_S = 5.0  # of one batch, retries included
FLUSH_S = 3.0  # longest wait for the collector at the end
LOG_INTERVAL_S = 60.0  # between two lines of the SDK in our log
SDK_LOGGERS = (OTLPSpanExporter.__module__, "opentelemetry.sdk._shared_internal")  # failed exports, dropped spans


class OtlpTracer:
    """Takes spans and exports sampled ones on the SDK's thread.

    `sample` is the share of traces that begin here; for others the parent decides. The environment's
    `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME` and `OTEL_EXPORTER_OTLP_HEADERS` apply.
    """

    def __init__(self, endpoint: str, sample: float, version: str) -> None:
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
        ended_ns = time.time_ns()
        span = self._tracer.start_span(
            name,
            self._propagator.extract(context, Context()),
            SpanKind.SERVER,
            start_time=ended_ns - int(seconds * 1e9),
        )
        if span.is_recording():
            span.set_attributes(describe())
            if error:
                span.set_status(Status(StatusCode.ERROR, error))
        span.end(ended_ns)

    async def close(self) -> None:
        """Send the queued spans for at most FLUSH_S. The thread is a daemon: a collector can't delay the exit."""
        flush = threading.Thread(target=self._provider.shutdown, name="traces-flush", daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, FLUSH_S)
        for name in SDK_LOGGERS:
            logging.getLogger(name).removeFilter(self._rate_limit)


class _RateLimit(logging.Filter):
    """A filter that passes one record per QUIET_S."""

    def __init__(self) -> None:
        super().__init__()
        self._next_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - all records alike
        now = time.monotonic()
        if now < self._next_at:
            return False
        self._next_at = now + LOG_INTERVAL_S
        return True
