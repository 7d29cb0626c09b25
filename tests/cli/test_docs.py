"""docs/cli.md names every command and every flag."""

from pathlib import Path

import pytest

from meshproxy.cli.command_line import COMMANDS, build_parser
from tests.cli.conftest import leaves

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", COMMANDS)
def test_every_command_and_flag_is_documented(family):
    for path, parser in leaves([family], build_parser(family)):
        flags = {flag for action in parser._actions for flag in action.option_strings if flag[:2] == "--"}
        assert f"`{' '.join(path)}" in TEXT
        assert sorted(flag for flag in flags - {"--help"} if flag not in TEXT) == []
