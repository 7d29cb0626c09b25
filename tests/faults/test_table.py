"""The table is whole, and it is the documentation's."""

from pathlib import Path

from tests.faults.phases import PHASES
from tests.faults.table import TABLE, kept, legend, pairs, table

DOC = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_every_phase_has_its_row():
    assert {(leg, phase) for leg, phases in PHASES.items() for phase in phases} == TABLE.keys()


def test_the_tables_of_the_documentation_are_these():
    text = DOC.read_text()
    assert [made for made in (table(), legend(), pairs(), kept()) if made not in text] == []
