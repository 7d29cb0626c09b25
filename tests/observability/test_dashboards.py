"""The dashboards are what the script writes, and are made as Grafana wants them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meshproxy.telemetry.families import BY_NAME

GRAFANA = Path(__file__).parents[2] / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
BOARDS = [json.loads(path.read_text()) for path in FILES]
RECORDING = (GRAFANA.parent / "deploy" / "prometheus" / "recording.yml").read_text()
every_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])


def test_the_files_are_what_the_script_writes(tmp_path):
    subprocess.run([sys.executable, GRAFANA / "build.py", tmp_path], check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {path.name: path.read_text() for path in FILES} == written


def test_there_is_one_for_each_question():
    names = ["latency", "ledger", "limits", "money", "process", "slo", "tenants", "traffic", "upstreams"]
    assert [path.stem for path in FILES] == names
    assert [f"meshproxy-{name}" for name in names] == [board["uid"] for board in BOARDS]


@every_board
def test_panels_have_their_own_place_and_number(board):
    panels = board["panels"]
    assert list(range(1, len(panels) + 1)) == [panel["id"] for panel in panels]
    taken = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert cells & taken == set()
        assert place["x"] + place["w"] <= 24
        taken |= cells


@every_board
def test_every_panel_takes_the_chosen_data_source(board):
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {"${datasource}"}
    assert {target["datasource"]["uid"] for panel in board["panels"] for target in panel["targets"]} == {
        "${datasource}"
    }
    used = set(re.findall(r"\$(\w+)", json.dumps([panel["targets"] for panel in board["panels"]])))
    assert used - variables.keys() - {"__rate_interval", "__range"} == set()


@every_board
def test_queries_name_what_there_is(board):
    for panel in board["panels"]:
        for target in panel["targets"]:
            text = re.sub(r"\{[^}]*\}", "", target["expr"])
            families = set(re.findall(r"(?<![\w:])(?:meshproxy|process)_\w+", text))
            assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in families} - BY_NAME.keys() == set()
            assert {name for name in re.findall(r"job:\w+:\w+", text) if f"record: {name}\n" not in RECORDING} == set()
            assert "rate(" not in target["expr"] or "[$__rate_interval]" in target["expr"]


def test_every_family_is_shown_somewhere():
    text = "".join(path.read_text() for path in FILES)
    unseen = {name for name in BY_NAME if name not in text}
    assert unseen == {"process_virtual_memory_bytes", "process_max_fds"}


@pytest.mark.parametrize("path", sorted((GRAFANA / "provisioning").rglob("*.yml")), ids=lambda path: path.stem)
def test_provisioning_is_yaml(path):
    assert yaml.safe_load(path.read_text())["apiVersion"] == 1
