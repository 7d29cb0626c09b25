"""The samples of a soak as lines over time, in SVG: `python -m tests.soak.plot soak.csv docs/soak.svg`."""

import csv
import sys
from pathlib import Path

WIDTH, HEIGHT, MARGIN, LEFT = 760, 110, 16, 70
PANELS = (
    ("rss_bytes", "memory, MiB", 2**20),
    ("descriptors", "descriptors", 1),
    ("tasks", "tasks", 1),
    ("redis_keys", "Redis keys", 1),
)


def svg(rows: list[dict[str, str]]) -> str:
    """A panel for each of what must not grow, from 0 up."""
    seconds = [float(row["seconds"]) for row in rows]
    parts, y = [], MARGIN
    for column, title, unit in PANELS:
        values = [float(row[column]) / unit for row in rows]
        parts += _panel(f"{title}: at most {max(values):.4g}, {values[-1]:.4g} at the end", seconds, values, y)
        y += HEIGHT + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img"><title>What a soak left over</title>'
        f"<style>text{{font:13px system-ui,sans-serif;fill:#1f2933}}polyline{{fill:none;stroke:#2f6fde}}</style>"
        f'<rect width="{WIDTH}" height="{y}" rx="6" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, seconds: list[float], values: list[float], y: int) -> list[str]:
    across, most, bottom = (WIDTH - LEFT - MARGIN) / seconds[-1], max(values) or 1, y + HEIGHT
    points = " ".join(
        f"{LEFT + at * across:.1f},{bottom - value / most * (HEIGHT - 24):.1f}"
        for at, value in zip(seconds, values, strict=True)
    )
    return [
        f'<text x="{MARGIN}" y="{y + 10}">{title}</text><text x="{MARGIN}" y="{bottom}">0</text>',
        f'<path d="M{LEFT} {bottom}H{WIDTH - MARGIN}" stroke="#9aa5b1"/><polyline points="{points}"/>',
    ]


if __name__ == "__main__":
    with Path(sys.argv[1]).open(newline="") as file:
        Path(sys.argv[2]).write_text(svg(list(csv.DictReader(file))))
