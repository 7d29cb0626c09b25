"""A real Prometheus scrapes a real gateway under load of every kind, and every query of every panel finds something."""

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "grafana"))

import rehearsal  # noqa: E402 - a script's module, beside the package

LOAD_S = 14.0
BOARDS = [json.loads(path.read_text()) for path in sorted((ROOT / "grafana" / "dashboards").glob("*.json"))]


class Scene:
    def __init__(self, gate, server, began_at, ended_at):
        self.gate, self.server = gate, server
        self.began_at, self.ended_at = began_at, ended_at + 2.0  # the last scrape


@pytest.fixture(scope="module")
def scene(tmp_path_factory, prometheus):
    directory = tmp_path_factory.mktemp("prometheus")
    with rehearsal.gateway() as gate, rehearsal.prometheus(directory, gate.admin) as server:
        yield Scene(gate, server, *asyncio.run(rehearsal.load(gate, LOAD_S)))


def test_every_query_of_every_panel_returns_data(scene):
    silent = [
        f"{board['uid']} / {panel['title']}: {target['expr']}"
        for board in BOARDS
        for panel, target in rehearsal.queries(board)
        if not _has_numbers(scene.server.range(target["expr"], scene.began_at, scene.ended_at))
    ]
    assert silent == []


def test_every_rule_can_be_evaluated(scene):
    rules = [rule for group in scene.server.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 47
    assert {rule["name"]: rule["lastError"] for rule in rules if rule["health"] == "err"} == {}


def test_exemplars_lead_to_traces(scene):
    found = scene.server.get(
        "query_exemplars",
        query="meshproxy_time_to_first_token_seconds_bucket",
        start=scene.began_at,
        end=scene.ended_at,
    )
    assert {rehearsal.TRACE_ID} == {item["labels"]["trace_id"] for series in found for item in series["exemplars"]}


def test_what_was_scraped_is_clean(scene, promtool):
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=scene.gate.metrics(), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_scrape_is_openmetrics_where_that_is_asked_for(scene):
    text = scene.gate.metrics("application/openmetrics-text;version=1.0.0")
    assert text.endswith("# EOF\n")
    assert f'# {{trace_id="{rehearsal.TRACE_ID}"}}' in text


def _has_numbers(series):
    return any(math.isfinite(float(value)) for one in series for _, value in one["values"])
