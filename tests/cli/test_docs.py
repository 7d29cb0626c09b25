"""docs/cli.md names every command and every flag."""

from pathlib import Path

import pytest

from meshproxy.cli.command_line import COMMANDS, build_parser

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def commands(parser, path=()):
    """Every parser below, with the words that lead to it."""
    for action in parser._actions:
        if action.dest == "==SUPPRESS==":
            for name, below in (action.choices or {}).items():
                yield (*path, name), below
                yield from commands(below, (*path, name))


@pytest.mark.parametrize("family", COMMANDS)
def test_every_command_and_flag_is_documented(family):
    found = [(path, parser) for path, parser in commands(build_parser(family)) if path[0] == family]
    flags = {
        flag for _, parser in found for action in parser._actions for flag in action.option_strings if flag[:2] == "--"
    }
    paths = {" ".join(path) for path, parser in found if parser.get_default("run") is not None}
    assert sorted(path for path in paths if f"`{path}" not in TEXT) == []
    assert sorted(flag for flag in flags - {"--help"} if flag not in TEXT) == []
