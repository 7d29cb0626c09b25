"""The whole thing, as somebody who tries it for the first time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

from meshproxy.cli.command_line import main
from meshproxy.cli.dev import greeting
from tests.cli.conftest import started

ENV = {name: value for name, value in os.environ.items() if name not in {"OPENAI_API_KEY", "OPENROUTER_API_KEY"}}
PLACE = {
    "base_url": "http://127.0.0.1:8080/v1",
    "admin_url": "http://127.0.0.1:8081/",
    "redis_url": "unix:///tmp/x/valkey.sock",
    "key": "rsk_secret",
    "account": "dev",
    "balance_usd": "25.00",
    "template": "greeter",
    "model": "openai/gpt-4o",
    "models": [],
}


def post(place, body):
    request = urllib.request.Request(
        f"{place['base_url']}/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {place['key']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def pasted(place, title):
    """The lines of the greeting under one of its titles."""
    return greeting(place).partition(f"# {title}\n")[2].partition("\n\n")[0]


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def test_everything_works_as_printed():
    with started("dev", "--port", "0", "--json", env=ENV) as process:
        place = json.loads(process.stdout.readline())
        assert (place["account"], place["balance_usd"], place["template"]) == ("dev", "25.00", "greeter")

        reply = post(place, {"model": "sim/fast", "template": "greeter", "variables": {"name": "Ada"}})
        assert "Ada" in reply["choices"][0]["message"]["content"]

        fast = {**place, "model": "sim/fast"}
        assert "Say hello." in output(sys.executable, "-c", pasted(fast, "Python: pip install openai"))
        if shutil.which("curl"):
            assert output("sh", "-c", pasted(fast, "curl, streaming")).endswith("data: [DONE]\n\n")
            assert (
                "Say hello." in json.loads(output("sh", "-c", pasted(fast, "curl")))["choices"][0]["message"]["content"]
            )
            assert "Ada" in output("sh", "-c", pasted(fast, "curl, a stored template"))

        command = [sys.executable, "-m", "meshproxy", "usage", "--json", "--redis", place["redis_url"]]
        assert json.loads(output(*command))[0]["requests"] >= 2

        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert place["key"] not in process.stderr.read()


def test_the_greeting_in_text():
    place = {**PLACE, "models": [f"model-{number}" for number in range(9)]}
    text = greeting(place)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# curl",
        "# curl, streaming",
        "# curl, a stored template",
        "# Python: pip install openai",
        "# Node: npm install openai, and save as hello.mjs",
        "# other commands, on this store",
    ]
    assert "  models    model-0, model-1, model-2, model-3, model-4\n            and 4 more" in text
    assert text.count("rsk_secret") == 6


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_node_lines_are_valid(tmp_path):
    (tmp_path / "hello.mjs").write_text(pasted(PLACE, "Node: npm install openai, and save as hello.mjs"))
    assert output("node", "--check", str(tmp_path / "hello.mjs")) == ""


def test_the_next_port_must_exist(capsys):
    assert main(["dev", "--port", "65535"]) == 2
    assert "the next port is needed too" in capsys.readouterr().err
