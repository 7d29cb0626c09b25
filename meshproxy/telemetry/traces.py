"""Spans for an OpenTelemetry collector. OpenTelemetry is imported only if `tracing.endpoint` is set."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from meshproxy.config import ConfigError, Tracing

if TYPE_CHECKING:
    from meshproxy.telemetry.otlp import OtlpTracer

NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


def require_extra(tracing: Tracing) -> None:
    """Raise ConfigError if spans are configured but the packages that send them aren't installed."""
    if tracing.endpoint is not None and not all(map(_is_installed, NEEDED)):
        raise ConfigError(["tracing.endpoint: needs the extra otel (in a checkout: pip install '.[otel]')"])


def open_tracer(tracing: Tracing, version: str) -> "OtlpTracer | None":
    """Make the configured tracer; None if none is configured. Raises ConfigError without the extra."""
    if tracing.endpoint is None:
        return None
    require_extra(tracing)
    from meshproxy.telemetry.otlp import OtlpTracer  # noqa: PLC0415 - an optional extra

    return OtlpTracer(tracing.endpoint, tracing.sample, version)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing too
        return False
