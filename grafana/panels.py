"""The words that dashboards are made of: a panel is a plain dict in Grafana's JSON model, without its place.

Every query filters by the variables `$job` and `$instance`, written once here as `S` (and `M` where a series has a model).
"""

from collections.abc import Sequence
from typing import Any

Panel = dict[str, Any]

SCHEMA_VERSION = 41  # Grafana 12's; older ones read it too, newer ones migrate it on load
COLUMNS = 24
S = 'job=~"$job",instance=~"$instance"'
M = S + ',model=~"$model"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GREEN, YELLOW, RED = "green", "yellow", "red"


def rate(family: str, by: str = "", where: str = S) -> str:
    """A counter's rate, added up over the instances, by the labels named."""
    return f"sum{_by(by)} (rate({family}{{{where}}}[$__rate_interval]))"


def total(family: str, by: str = "", where: str = S) -> str:
    """A gauge added up over the instances, by the labels named."""
    return f"sum{_by(by)} ({family}{{{where}}})"


def share(part: str, whole: str) -> str:
    """One query divided by another; nothing where that is zero."""
    return f"{part} / ({whole} > 0)"


def quantile(rank: float, family: str, by: str = "", where: str = S) -> str:
    """A histogram's quantile over all instances, by the labels named."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({rank}, sum by ({labels}) (rate({family}_bucket{{{where}}}[$__rate_interval])))"


def quantiles(family: str, where: str = S) -> list[tuple[str, str]]:
    """The three that tell a latency's story, each with its legend."""
    return [(quantile(rank, family, where=where), f"p{rank * 100:g}") for rank in (0.5, 0.95, 0.99)]


def lines(
    title: str,
    queries: Sequence[tuple[str, str]],
    *,
    unit: str = "short",
    about: str = "",
    width: int = 12,
    stacked: bool = False,
    most: float | None = None,
    limit: float | None = None,
) -> Panel:
    """Time series. `queries` are pairs of PromQL and legend; `limit` is drawn as a red line."""
    custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 25 if stacked else 8, "showPoints": "never"}
    custom["stacking"] = {"mode": "normal" if stacked else "none", "group": "A"}
    defaults: dict[str, Any] = {"unit": unit, "min": 0, "custom": custom}
    if most is not None:
        defaults["max"] = most
    if limit is not None:
        custom["thresholdsStyle"] = {"mode": "line"}
        defaults["thresholds"] = _thresholds((None, "transparent"), (limit, RED))
    options = {
        "legend": {"displayMode": "table", "placement": "right", "calcs": ["mean", "max"]},
        "tooltip": {"mode": "multi"},
    }
    return _panel("timeseries", title, about, width, 8, queries, defaults, options)


def figure(
    title: str,
    query: str,
    *,
    unit: str = "short",
    about: str = "",
    steps: Sequence[tuple[float | None, str]] = ((None, GREEN),),
    width: int = 4,
    legend: str = "",
) -> Panel:
    """One number, with the line that led to it; `steps` colour it from a value upwards."""
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "value"}
    defaults = {"unit": unit, "thresholds": _thresholds(*steps), "noValue": "none"}
    return _panel("stat", title, about, width, 4, [(query, legend)], defaults, options)


def heatmap(title: str, family: str, *, where: str = S, about: str = "", width: int = 12) -> Panel:
    """How a histogram's observations spread, over time."""
    query = f"sum by (le) (increase({family}_bucket{{{where}}}[$__rate_interval]))"
    options = {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Spectral", "scale": "exponential", "exponent": 0.5, "steps": 64},
        "yAxis": {"unit": "s"},
        "cellGap": 1,
        "tooltip": {"mode": "single", "yHistogram": True},
    }
    panel = _panel("heatmap", title, about, width, 8, [(query, "{{le}}")], {"unit": "s"}, options)
    panel["targets"][0]["format"] = "heatmap"
    return panel


def bars(title: str, query: str, legend: str, *, unit: str = "short", about: str = "", width: int = 12) -> Panel:
    """The largest of something, as of now."""
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal", "displayMode": "basic"}
    return _panel("bargauge", title, about, width, 8, [(query, legend)], {"unit": unit, "min": 0}, options)


def board(
    name: str, title: str, about: str, panels: Sequence[Panel], *, models: bool = False, accounts: bool = False
) -> dict[str, Any]:
    """A dashboard: its panels laid out left to right, in rows as high as their highest."""
    variables = [_variable("job", "meshproxy_build_info"), _variable("instance", 'meshproxy_build_info{job=~"$job"}')]
    if models:
        variables.append(_variable("model", 'meshproxy_requests_total{job=~"$job"}'))
    if accounts:
        variables.append(_variable("account", 'meshproxy_account_requests_total{job=~"$job"}'))
    return {
        "uid": f"meshproxy-{name}",
        "title": f"meshproxy / {title}",
        "description": about,
        "tags": ["meshproxy"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "links": [_link()],
        "templating": {"list": [_datasource_variable(), *variables]},
        "annotations": {"list": [_reloads()]},
        "panels": _placed(panels),
    }


def _panel(
    kind: str,
    title: str,
    about: str,
    width: int,
    height: int,
    queries: Sequence[tuple[str, str]],
    defaults: dict[str, Any],
    options: dict[str, Any],
) -> Panel:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": expr,
            "legendFormat": legend or "__auto",
            "exemplar": False,
        }
        for index, (expr, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def _placed(panels: Sequence[Panel]) -> list[Panel]:
    placed: list[Panel] = []
    x = y = row = 0
    for number, panel in enumerate(panels, 1):
        width, height = panel["gridPos"]["w"], panel["gridPos"]["h"]
        if x + width > COLUMNS:
            x, y, row = 0, y + row, 0
        placed.append({"id": number, **panel, "gridPos": {"x": x, "y": y, "w": width, "h": height}})
        x, row = x + width, max(row, height)
    return placed


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def _thresholds(*steps: tuple[float | None, str]) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "current": {},
    }


def _variable(label: str, series: str) -> dict[str, Any]:
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({series}, {label})", "refId": label},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _link() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "meshproxy",
        "tags": ["meshproxy"],
        "asDropdown": True,
        "keepTime": True,
        "includeVars": True,
    }


def _reloads() -> dict[str, Any]:
    """A mark where the configuration changed."""
    return {
        "name": "Configuration",
        "enable": True,
        "datasource": DATASOURCE,
        "iconColor": "blue",
        "expr": f"changes(meshproxy_config_generation{{{S}}}[$__rate_interval]) > 0",
        "titleFormat": "{{instance}} has a new configuration",
        "useValueForTime": False,
    }
