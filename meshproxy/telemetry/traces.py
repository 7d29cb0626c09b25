"""Spans for an OpenTelemetry collector, for those who ask for them: nothing of OpenTelemetry is imported until then."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Protocol

from meshproxy.config import Tracing, Unfit

Attributes = Mapping[str, str | bool | int | float]

NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


class Tracer(Protocol):
    """Takes spans, and sends some of them on a thread of its own."""

    def span(
        self, name: str, *, seconds: float, context: Mapping[str, str], describe: Callable[[], Attributes], error: str
    ) -> None:
        """What has just ended, and took so long. `context`: the headers that may say whose child it is; `describe` is asked only
        if the span is sampled; `error`: what went wrong on our side, empty if nothing did.
        """

    async def close(self) -> None:
        """Send what waits, within bounds."""


def require_extra(tracing: Tracing) -> None:
    """Unfit if spans are asked for and what sends them isn't installed."""
    if tracing.endpoint is not None and not all(map(_is_installed, NEEDED)):
        raise Unfit(["tracing.endpoint: needs the extra otel (pip install 'meshproxy[otel]')"])


def open_tracer(tracing: Tracing, version: str) -> Tracer | None:
    """The tracer that the settings ask for; None if they ask for none. Unfit without the extra."""
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
