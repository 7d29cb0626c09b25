"""docs/cli.md names every command and every flag."""

import re
from pathlib import Path

import pytest

from meshproxy.cli.command_line import COMMANDS
from tests.cli.conftest import leaves

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", COMMANDS)
def test_every_command_and_flag_is_documented(family):
    for path, text in leaves(family):
        flags = set(re.findall(r"(?<![\w-])--[a-z-]+", text))
        assert f"`{' '.join(path)}" in TEXT
        assert sorted(flag for flag in flags - {"--help"} if flag not in TEXT) == []
