"""A merged snapshot in Prometheus' text format 0.0.4, or in OpenMetrics 1.0 with exemplars.

The process that answers a scrape may be the one that relays streams, so every LINES_PER_TURN lines the event loop runs.
"""

import asyncio
import math
from collections.abc import Iterator
from itertools import accumulate

from meshproxy.telemetry.snapshot import Exemplar, Series, Snapshot

LINES_PER_TURN = 200  # less than half a millisecond

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def content_type(*, openmetrics: bool) -> str:
    """The Content-Type of what render() gives."""
    media_type = "application/openmetrics-text; version=1.0.0" if openmetrics else "text/plain; version=0.0.4"
    return f"{media_type}; charset=utf-8"


def wants_openmetrics(accept: str) -> bool:
    """Whether an Accept header asks for OpenMetrics 1.0, as Prometheus does by default."""
    for media_range in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in media_range.split(";"))
        if media_type == "application/openmetrics-text" and "q=0" not in parameters:
            return True
    return False


async def render(snapshot: Snapshot, *, openmetrics: bool) -> bytes:
    """The whole text."""
    text = []
    for line in lines(snapshot, openmetrics=openmetrics):
        text.append(line)
        if len(text) % LINES_PER_TURN == 0:
            await asyncio.sleep(0)
    return "".join(text).encode()


def lines(snapshot: Snapshot, *, openmetrics: bool) -> Iterator[str]:
    """The text, line by line."""
    for family in snapshot:
        definition = family.definition
        name = definition.name.removesuffix("_total") if openmetrics else definition.name
        yield f"# HELP {name} {definition.help}\n"
        yield f"# TYPE {name} {definition.kind}\n"
        for series in family.series:
            labels = dict(zip(definition.labels, series.labels, strict=True))
            if definition.kind == "histogram":
                yield from _histogram(name, labels, family.edges, series, openmetrics=openmetrics)
            else:
                yield f"{definition.name}{_braced(labels)} {series.value / definition.per}\n"
    if openmetrics:
        yield "# EOF\n"


def _histogram(
    name: str, labels: dict[str, str], edges: tuple[float, ...], series: Series, *, openmetrics: bool
) -> Iterator[str]:
    """One series: its buckets, cumulative, their count and their sum."""
    for index, (edge, count) in enumerate(zip((*edges, math.inf), accumulate(series.counts), strict=True)):
        upper = {"le": "+Inf" if edge == math.inf else f"{float(edge)}"}
        exemplar = series.exemplars.get(index) if openmetrics else None
        yield f"{name}_bucket{_braced(labels | upper)} {float(count)}{_mark(exemplar)}\n"
    yield f"{name}_count{_braced(labels)} {float(sum(series.counts))}\n"
    yield f"{name}_sum{_braced(labels)} {float(series.value)}\n"


def _mark(exemplar: Exemplar | None) -> str:
    return "" if exemplar is None else f' # {{trace_id="{exemplar.trace_id}"}} {exemplar.value} {round(exemplar.at, 3)}'


def _braced(labels: dict[str, str]) -> str:
    told = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in sorted(labels.items()))
    return f"{{{told}}}" if told else ""
