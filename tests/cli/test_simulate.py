import json
import signal
import socket
import urllib.request

from meshproxy.cli.command_line import main
from tests.cli.conftest import started


def test_it_serves_until_interrupted():
    with started("simulate", "--port", "0", "--json") as process:
        base_url = json.loads(process.stdout.readline())["base_url"]
        with urllib.request.urlopen(f"{base_url}/models", timeout=10) as response:
            assert json.load(response)["data"][0]["id"] == "gpt-4o"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["simulate", "--port", str(port), "--json"]) == 1
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "cannot_listen"


def test_a_pace_that_is_none(capsys):
    assert main(["simulate", "--port", "0", "--tokens-per-second", "0"]) == 2
    assert "tokens_per_second" in capsys.readouterr().err
    assert main(["simulate"]) == 2


def test_help_tells_every_fault(capsys):
    assert main(["simulate", "--help"]) == 0
    assert "  sim/die-mid-stream        closes the socket" in capsys.readouterr().out
