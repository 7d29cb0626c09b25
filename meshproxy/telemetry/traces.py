"""Spans for an OpenTelemetry collector, for those who ask for them: nothing of OpenTelemetry is imported until then."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from meshproxy.config import ConfigError, Tracing

if TYPE_CHECKING:
    from meshproxy.telemetry.otlp import OtlpTracer

NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


def require_extra(tracing: Tracing) -> None:
    """ConfigError if spans are asked for and what sends them isn't installed."""
    if tracing.endpoint is not None and not all(map(_is_installed, NEEDED)):
        raise ConfigError(["tracing.endpoint: needs the extra otel (in a checkout: pip install '.[otel]')"])


def open_tracer(tracing: Tracing, version: str) -> "OtlpTracer | None":
    """The tracer that the settings ask for; None if they ask for none. ConfigError without the extra."""
    if tracing.endpoint is None:
        return None
    require_extra(tracing)
    from meshproxy.telemetry.otlp import OtlpTracer  # noqa: PLC0415 - where it is asked for, and installed

    return OtlpTracer(tracing.endpoint, tracing.sample, version)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its package
        return False
