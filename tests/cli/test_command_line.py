"""Exit codes and help, as a shell sees them."""

import json
import subprocess
import sys

import pytest

from meshproxy.cli.command_line import COMMANDS, main
from tests.cli.conftest import leaves


def meshproxy(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "meshproxy", *args], capture_output=True, text=True, timeout=20, env=env, check=False
    )


def test_help_names_every_command():
    ran = meshproxy("--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [name for name in COMMANDS if f"    {name} " not in ran.stdout] == []
    assert "examples:" in ran.stdout


def test_no_command_is_wrong_usage():
    ran = meshproxy()
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("usage: meshproxy")


def test_an_unknown_command_is_wrong_usage():
    ran = meshproxy("severe")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "invalid choice: 'severe'" in ran.stderr


def test_help_needs_no_heavy_library():
    code = (
        "import sys; from meshproxy.cli.command_line import build_parser; build_parser('healthcheck').format_help();"
        "print(sorted({'aiohttp', 'redis', 'asyncio.runners', 'orjson', 'structlog'} & set(sys.modules) - {'asyncio.runners'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_health_check_with_a_file_needs_no_heavy_library(tmp_path):
    """It runs every few seconds in each container."""
    file = tmp_path / "meshproxy.toml"
    file.write_text(f'[server]\nadmin_listen = "unix:{tmp_path}/nobody.sock"\n')
    code = (
        "import sys; from meshproxy.cli.command_line import main; main(sys.argv[1:]);"
        "print(sorted({'aiohttp', 'redis', 'prometheus_client'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "healthcheck", "--config", file], capture_output=True, text=True, check=True
    )
    assert ("doesn't answer" in ran.stderr, ran.stdout) == (True, "[]\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_examples_and_the_common_flags(name):
    for path, text in leaves(name):
        assert (path, "examples:" in text, "--config" in text, "--json" in text) == (path, True, True, True)


def test_a_family_alone_is_wrong_usage(capsys):
    assert main(["keys"]) == 2
    assert "create" in capsys.readouterr().err


def test_a_bad_configuration_is_78_for_every_command(file, capsys):
    path = file("[server]\nlisten = 1\n[redis]\nulr = 'x'\n")
    assert main(["healthcheck", "--config", path, "--json"]) == 78
    error = json.loads(capsys.readouterr().err)["error"]
    assert (error["code"], len(error["faults"])) == ("unfit_configuration", 2)


@pytest.mark.parametrize(
    "args",
    [
        "credits grant acme abc --json",
        "credits grant acme 0 --json",
        "keys create --json",
        "severe --json",
        "usage --by weather --json",
        "accounts delete acme --json",
    ],
)
def test_wrong_usage_is_json_with_json(capsys, args):
    assert main(args.split()) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.err)["error"]
    assert (captured.out, error["code"], bool(error["message"])) == ("", "usage", True)
