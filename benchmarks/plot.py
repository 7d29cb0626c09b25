"""The results as bars, in SVG of our own making: a panel for each question, a bar for each proxy."""

import math
from collections.abc import Mapping
from html import escape

from benchmarks.report import DIRECT
from benchmarks.suite import UNARY, Results, latency_key

WIDTH, MARGIN, BAR, GAP = 760, 16, 18, 5
LABEL_WIDTH, VALUE_WIDTH = 190, 60
OURS, OUR_COLOUR, COLOUR, FAR_COLOUR = "meshproxy", "#2f6fde", "#9aa5b1", "#e4b5a0"
FAR_OFF = 3  # times ours: where a bar is cut, and coloured so

PANELS = (
    (UNARY, "CPU for a whole answer, us", "us"),
    ("prompt_64k", "CPU for a whole answer with a prompt of 64 KiB, us", "us"),
    ("event_alone", "CPU for a relayed event, us", "us"),
    ("paced_200", "CPU for an event of 200 streams, their requests included, us", "us"),
    (latency_key(2000), "Latency of a whole answer at 2,000 a second, p99, ms", "p99_ms"),
)


def svg(results: Results) -> str:
    """The picture."""
    parts: list[str] = []
    y = MARGIN
    for case, title, key in PANELS:
        values = _values(results, case, key)
        if values:
            drawn, y = _panel(title, values, y)
            parts += drawn
    style = "text{font:13px system-ui,sans-serif;fill:#1f2933}.t{font-weight:600}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">'
        f"<title>What each proxy costs</title><style>{style}</style>"
        f'<rect width="{WIDTH}" height="{y}" rx="6" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _values(results: Results, case: str, key: str) -> dict[str, float]:
    by = results.get(case, {})
    values = {name: result.us if key == "us" else result.more.get(key) for name, result in by.items()}
    return {name: value for name, value in values.items() if value is not None and name != DIRECT}


def _panel(title: str, values: Mapping[str, float], y: int) -> tuple[list[str], int]:
    longest = min(max(values.values()), FAR_OFF * values.get(OURS, math.inf)) or 1.0
    scale = (WIDTH - 2 * MARGIN - LABEL_WIDTH - VALUE_WIDTH) / longest
    parts = [f'<text class="t" x="{MARGIN}" y="{y + 14}">{escape(title)}</text>']
    y += 24
    for name, value in values.items():
        long = max(min(value, longest) * scale, 1.0)
        middle = y + BAR - 4
        label = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
        colour = OUR_COLOUR if name.startswith(OURS) else FAR_COLOUR if value > longest else COLOUR
        parts += [
            f'<text x="{MARGIN + 12}" y="{middle}">{escape(name)}</text>',
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{long:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
            f'<text x="{LABEL_WIDTH + long + 6:.1f}" y="{middle}">{label}</text>',
        ]
        y += BAR + GAP
    return parts, y + MARGIN
