"""docs/metrics.md tells what is there: every family, its labels and their words, every edge."""

import re
from pathlib import Path

import pytest

from meshproxy.openai.request import CHAT_PATH
from meshproxy.server.api import ROUTES
from meshproxy.telemetry.families import CLOSED, OWN, PROCESS

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line.startswith("| `")]
ROW_OF = {cells[0].strip("` "): cells for cells in ROWS if len(cells) == 5}
TWO = {cells[0].strip("` "): cells[1] for cells in ROWS if len(cells) == 2}


def words(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_no_family_is_missing_and_none_is_made_up():
    assert [definition.name for definition in (*OWN, *PROCESS)] == list(ROW_OF)


@pytest.mark.parametrize("definition", [*OWN, *PROCESS], ids=lambda definition: definition.name)
def test_a_family_is_told_as_it_is(definition):
    _, kind, labels, about, watch = ROW_OF[definition.name]
    assert (definition.kind, list(definition.labels), definition.help) == (kind, words(labels), about)
    assert watch


@pytest.mark.parametrize("definition", [d for d in OWN if d.edges], ids=lambda definition: definition.name)
def test_edges_are_told(definition):
    assert list(definition.edges) == [float(edge) for edge in TWO[definition.name].split(", ")]


def test_every_label_is_told():
    of_the_configuration = {"model", "upstream", "version", "account"}
    labels = {label for definition in OWN for label in definition.labels}
    assert of_the_configuration | (TWO.keys() & CLOSED.keys()) == labels


def test_every_path_of_the_data_listener_is_a_route():
    assert {CHAT_PATH, "/health", *(route.path.replace(":.+", "") for route in ROUTES)} == CLOSED["route"]


def test_every_code_of_a_5xx_is_a_cause():
    errors = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    assert set(re.findall(r"^\| 5\d\d \| `(\w+)`", errors, re.MULTILINE)) == CLOSED["cause"]


@pytest.mark.parametrize("label", sorted(CLOSED))
def test_the_words_of_a_label_are_told(label):
    expected = sorted(word for word in CLOSED[label] if not word.isdigit())
    assert sorted(words(TWO[label])) == expected
