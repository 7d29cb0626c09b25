"""The page about the simulator names all there is, and nothing else."""

import re
from pathlib import Path

from meshproxy.simulator.behaviour import DIALECT_NAMES, FAMILIES, PREFIX, TRAITS, Options

PAGE = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()


def test_every_name_is_documented():
    rows = "".join(re.findall(r"^\| (`sim/.*?) \|", PAGE, re.MULTILINE))
    assert {PREFIX + name for name in TRAITS | FAMILIES | DIALECT_NAMES} == set(re.findall(r"`(sim/[\w-]+)`", rows))


def test_every_option_is_documented():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(Options.__struct_fields__)
