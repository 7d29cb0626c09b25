"""Pictures of the dashboards without a Grafana: `python grafana/preview.py [SECONDS]` rehearses, runs the panels' own queries
against the Prometheus that watched, and draws what they return into docs/img.
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import rehearsal
from drawing import Series, page

SECONDS = 90.0
WARM_UP_S = 12.0  # until a rate over rehearsal.WINDOW is full
IMAGES = rehearsal.ROOT / "docs" / "img"
DASHBOARDS = sorted((rehearsal.ROOT / "grafana" / "dashboards").glob("*.json"))


def found(
    server: rehearsal.Prometheus, panel: dict[str, Any], start: float, end: float
) -> list[tuple[dict[str, Any], list[Series]]]:
    """Each target of a panel with the series that its query returns."""
    asked = [{**target, "expr": rehearsal.filled(target["expr"])} for target in panel["targets"]]
    return [(target, server.range(target["expr"], start, end, step_s=2)) for target in asked]


def draw(server: rehearsal.Prometheus, start: float, end: float) -> None:
    """One picture a dashboard."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        results = [found(server, panel, start, end) for panel in board["panels"]]
        (IMAGES / f"dashboard-{path.stem}.svg").write_text(page(board, results), encoding="utf-8")


def main(seconds: float) -> None:
    """Rehearse for so long, then draw."""
    with (
        tempfile.TemporaryDirectory() as directory,
        rehearsal.gateway() as gate,
        rehearsal.prometheus(Path(directory), gate.admin) as server,
    ):
        began_at, ended_at = asyncio.run(rehearsal.load(gate, seconds, trouble_every=10))
        draw(server, began_at + WARM_UP_S, ended_at)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
