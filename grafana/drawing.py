"""Panels as SVG, near enough to Grafana's to see what a dashboard will be like. Data comes as Prometheus' range results."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

Series = dict[str, Any]

CELL_W, CELL_H, GAP = 50, 30, 6  # of the grid of 24 columns, in pixels
PAPER, CARD, INK, FAINT = "#111217", "#181b1f", "#ccccdc", "#3a3d44"
COLORS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d", "#ffb357", "#ca95e5")
NAMED = {"green": "#73bf69", "yellow": "#f2cc0c", "red": "#f2495c"}
LEGENDS = 6  # names that find room under a plot
SPECTRAL = ("#1f2430", "#3f4aa8", "#3288bd", "#66c2a5", "#abdda4", "#fee08b", "#fdae61", "#f46d43", "#d53e4f")


def page(board: dict[str, Any], results: Sequence[Sequence[tuple[dict[str, Any], list[Series]]]]) -> str:
    """A whole dashboard. `results`: for each panel, each of its targets with what its query found."""
    places = [panel["gridPos"] for panel in board["panels"]]
    height = 40 + CELL_H * max(place["y"] + place["h"] for place in places)
    width = CELL_W * 24
    drawn = [_card(panel, found) for panel, found in zip(board["panels"], results, strict=True)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>{_text(12, 25, board["title"], size=16)}'
    )
    return "\n".join([head, *drawn, "</svg>\n"])


def shown(value: float, unit: str) -> str:
    """A number with its unit, as short as it can be."""
    match unit:
        case "percentunit":
            return f"{_short(value * 100)} %"
        case "s":
            return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
        case "bytes":
            return f"{value / 1_048_576:.3g} MiB"
        case "currencyUSD":
            return f"${value:.3g}"
        case "reqps" | "ops":
            return f"{_short(value)}/s"
        case _:
            return _short(value)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _card(panel: dict[str, Any], found: Sequence[tuple[dict[str, Any], list[Series]]]) -> str:
    place = panel["gridPos"]
    x, y = place["x"] * CELL_W + GAP / 2, 40 + place["y"] * CELL_H
    w, h = place["w"] * CELL_W - GAP, place["h"] * CELL_H - GAP
    draw = {"stat": _stat, "timeseries": _plot, "heatmap": _heatmap, "bargauge": _bars}[panel["type"]]
    named = [(_legend(target, one["metric"]), _points(one)) for target, series in found for one in series]
    inner = draw(panel, [item for item in named if item[1]], w, h)
    return (
        f'<g transform="translate({x:g} {y:g})"><rect width="{w}" height="{h}" rx="3" fill="{CARD}"/>'
        f"{_text(10, 18, panel['title'], size=12)}{inner}</g>"
    )


def _stat(panel: dict[str, Any], named: list[tuple[str, list[tuple[float, float]]]], w: float, h: float) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    if not named:
        return _text(w / 2, h / 2 + 20, "none", size=26, anchor="middle")
    legend, points = named[0]
    last = points[-1][1]
    steps = defaults["thresholds"]["steps"]
    color = NAMED[[step["color"] for step in steps if step["value"] is None or last >= step["value"]][-1]]
    most = max(value for _, value in points) or 1
    line = _path(_scaled(points, w, 26, most, h - 30))
    label = legend if legend.startswith("0") else ""
    return (
        f'<path d="{line}" fill="none" stroke="{color}" opacity=".45"/>'
        f"{_text(w / 2, h / 2 + 16, shown(last, defaults['unit']), size=28, anchor='middle', color=color)}"
        f"{_text(w - 10, 18, label, anchor='end')}"
    )


def _plot(panel: dict[str, Any], named: list[tuple[str, list[tuple[float, float]]]], w: float, h: float) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    named = sorted(named, key=lambda item: -sum(value for _, value in item[1]))
    layers = _stack(named) if stacked else [(name, points, []) for name, points in named]
    most = defaults.get("max") or _round_up(max((value for _, points, _ in layers for _, value in points), default=1))
    left, top, wide, high = 62, 30, w - 74, h - 66
    parts = [_grid(left, top, wide, high, most, defaults["unit"])]
    for index, (_, points, floor) in reversed(list(enumerate(layers))):
        color = COLORS[index % len(COLORS)]
        upper = _scaled(points, wide, high, most, top, left)
        if stacked:
            lower = _scaled(floor, wide, high, most, top, left) or [(left + wide, top + high), (left, top + high)]
            parts.append(
                f'<path d="{_path(upper)} {_path(lower[::-1]).replace("M", "L", 1)} Z" fill="{color}" opacity=".3"/>'
            )
        parts.append(f'<path d="{_path(upper)}" fill="none" stroke="{color}" stroke-width="1.3"/>')
    limit = defaults.get("thresholds", {}).get("steps", [{}])[-1].get("value")
    if limit is not None and limit <= most:
        y = top + high * (1 - limit / most)
        parts.append(f'<path d="M{left} {y:.1f}h{wide}" stroke="{NAMED["red"]}" stroke-dasharray="4 3"/>')
    return "".join(parts) + _legends([name for name, _ in named], left, h - 12, w)


def _heatmap(_panel: dict[str, Any], named: list[tuple[str, list[tuple[float, float]]]], w: float, h: float) -> str:
    """Cumulative buckets become cells; those above the highest that was hit are left out."""
    rows = sorted(((float(name.replace("+Inf", "inf")), points) for name, points in named), key=lambda row: row[0])
    counts = [rows[0][1], *(_minus(upper[1], lower[1]) for lower, upper in pairwise(rows))] if rows else []
    hit = [index for index, points in enumerate(counts) if any(value > 0 for _, value in points)]
    if not hit:
        return ""
    first, last = max(hit[0] - 1, 0), min(hit[-1] + 1, len(rows) - 1)
    left, top, wide, high = 62, 30, w - 74, h - 52
    most = max(value for points in counts for _, value in points)
    row_h = high / (last - first + 1)
    begin, end = counts[0][0][0], counts[0][-1][0]
    cell_w = wide / max(len(counts[0]), 1)
    parts = []
    for row in range(first, last + 1):
        y = top + high - (row - first + 1) * row_h
        for at, value in counts[row]:
            if value > 0:
                tone = SPECTRAL[min(int(math.sqrt(value / most) * len(SPECTRAL)), len(SPECTRAL) - 1)]
                x = left + (at - begin) / max(end - begin, 1) * (wide - cell_w)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_w:.1f}" height="{row_h - 1:.1f}" fill="{tone}"/>'
                )
        if (row - first) % max(1, (last - first + 1) // 7) == 0:
            edge = "more" if math.isinf(rows[row][0]) else shown(rows[row][0], "s")
            parts.append(_text(left - 6, y + row_h / 2 + 4, edge, anchor="end"))
    return "".join(parts)


def _bars(panel: dict[str, Any], named: list[tuple[str, list[tuple[float, float]]]], w: float, h: float) -> str:
    lasts = sorted(((points[-1][1], name) for name, points in named), reverse=True)
    most = max((value for value, _ in lasts), default=0) or 1
    unit = panel["fieldConfig"]["defaults"]["unit"]
    step = min((h - 40) / max(len(lasts), 1), 26)
    parts = []
    for index, (value, name) in enumerate(lasts):
        y = 32 + index * step
        parts.append(_text(150, y + step / 2 + 3, name, anchor="end"))
        parts.append(
            f'<rect x="158" y="{y:.1f}" width="{(w - 240) * value / most:.1f}" height="{step - 4:.1f}" fill="{COLORS[0]}"/>'
        )
        parts.append(_text(166 + (w - 240) * value / most, y + step / 2 + 3, shown(value, unit)))
    return "".join(parts)


def _points(series: Series) -> list[tuple[float, float]]:
    return [(at, float(value)) for at, value in series["values"] if math.isfinite(float(value))]


def _legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    text = str(target["legendFormat"])
    if text == "__auto":
        return ""
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def _stack(
    named: list[tuple[str, list[tuple[float, float]]]],
) -> list[tuple[str, list[tuple[float, float]], list[tuple[float, float]]]]:
    """Each series on top of those before it, with the line it stands on."""
    floor: dict[float, float] = {}
    layers = []
    for name, points in named:
        below = [(at, floor.get(at, 0.0)) for at, _ in points]
        above = [(at, floor.get(at, 0.0) + value) for at, value in points]
        floor.update(above)
        layers.append((name, above, below))
    return layers


def _minus(upper: list[tuple[float, float]], lower: list[tuple[float, float]]) -> list[tuple[float, float]]:
    known = dict(lower)
    return [(at, value - known.get(at, 0.0)) for at, value in upper]


def _scaled(
    points: list[tuple[float, float]], w: float, h: float, most: float, top: float, left: float = 0
) -> list[tuple[float, float]]:
    """In pixels."""
    if not points:
        return []
    begin, end = points[0][0], points[-1][0]
    span = max(end - begin, 1)
    return [(left + (at - begin) / span * w, top + h * (1 - min(max(value, 0) / most, 1))) for at, value in points]


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _grid(left: float, top: float, w: float, h: float, most: float, unit: str) -> str:
    parts = []
    for quarter in range(5):
        y = top + h * (1 - quarter / 4)
        parts.append(f'<path d="M{left} {y:.1f}h{w}" stroke="{FAINT}" stroke-width=".6"/>')
        parts.append(_text(left - 6, y + 4, shown(most * quarter / 4, unit), anchor="end"))
    return "".join(parts)


def _legends(names: list[str], x: float, y: float, w: float) -> str:
    parts = []
    for index, name in enumerate(names[:LEGENDS]):
        if not name or x + 7 * len(name) + 24 > w:
            break
        parts.append(f'<rect x="{x}" y="{y - 6}" width="10" height="4" fill="{COLORS[index % len(COLORS)]}"/>')
        parts.append(_text(x + 14, y, name))
        x += 7 * len(name) + 28
    return "".join(parts)


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8 times a power of ten."""
    if value <= 0:
        return 1
    ten = 10 ** math.floor(math.log10(value))
    return next(step * ten for step in (1, 2, 4, 8, 10) if step * ten >= value * 0.999)


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start", color: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
    )
