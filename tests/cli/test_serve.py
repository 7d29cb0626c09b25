import json
import os
import signal
import subprocess
import sys

import pytest

from meshproxy.cli.command_line import main
from tests.cli.conftest import started
from tests.harness.waiting import wait_until

CONFIG = """
[server]
listen = "127.0.0.1:0"
admin_listen = "unix:{admin}"
workers = 1
drain_s = 1
[redis]
url = "{redis}"
[upstreams.local]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
[models."openai/gpt-4o"]
upstreams = [ {{ upstream = "local", model = "gpt-4o" }} ]
input_usd_per_mtok = "2.50"
output_usd_per_mtok = "10.00"
"""


def test_serve_until_sigterm(store_server, tmp_path, file):
    path = file(CONFIG.format(admin=tmp_path / "admin.sock", redis=store_server))
    with started("serve", env={**os.environ, "MESHPROXY_CONFIG": path}) as process:
        assert json.loads(process.stderr.readline())["event"] == "serving"
        wait_until(lambda: main(["healthcheck", "--config", path]) == 0)  # it dials the store in the background
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_serve_with_closed_streams(store_server, tmp_path, file, workers):
    text = CONFIG.format(admin=tmp_path / "admin.sock", redis=store_server)
    path = file(text.replace("workers = 1", f"workers = {workers}"))
    command = ["sh", "-c", 'exec "$0" -m meshproxy serve --config "$1" <&- >&- 2>&-', sys.executable, path]
    with subprocess.Popen(command) as process:
        wait_until(lambda: process.poll() is None and main(["healthcheck", "--config", path]) == 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_bad_configuration_is_78(file, capsys):
    assert main(["serve", "--config", file("[server]\nlisen = 'x'\nworkers = -1\n")]) == 78
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["server.lisen", "server.workers"]


def test_without_a_configuration_it_is_wrong_usage(capsys, monkeypatch):
    monkeypatch.delenv("MESHPROXY_CONFIG", raising=False)
    assert main(["serve"]) == 2
    assert "the following arguments are required: --config" in capsys.readouterr().err
