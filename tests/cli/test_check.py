import json
import socket
from pathlib import Path

import pytest

from meshproxy.cli.command_line import main
from tests.cli.conftest import started

FILES = Path(__file__).parent.parent / "configurations"
REFUSED = {
    "ca-file": ["redis.url"],
    "certificate": ["server.tls_cert", "server.tls_key"],
    "default-model": ["defaults.model"],
    "empty-label": ["upstreams.local.base_url"],
    "four-faults": [
        "server.drain",
        "models.m.input_usd_per_mtok",
        "models.m.upstreams[0].upstream",
        "upstreams.local.api_key",
    ],
    "header-te": ["upstreams.local.headers.te"],
    "journal-nowhere": ["redis.journal"],
    "redis-port": ["redis.url"],
    "sentinel-without-service": ["redis.url"],
}
WARNED = {
    "built-in-default-model": "defaults.model",
    "one-endpoint": "upstreams.local.base_url",
    "price-of-a-token": "models.m.input_usd_per_mtok",
}
LABEL = "a" * 64
LONG_NAME = ".".join(["a" * 63] * 4)
LONG_PATH = "/" + "s" * 107

GOOD = """
[upstreams.openai]
kind = "openai"
base_url = "https://api.openai.com/v1"
api_key = { env = "CHECK_KEY" }
[models."openai/gpt-4o"]
upstreams = [ { upstream = "openai", model = "gpt-4o" } ]
input_usd_per_mtok = "2.50"
output_usd_per_mtok = "10.00"
"""


def test_ok(file, capsys, monkeypatch):
    monkeypatch.setenv("CHECK_KEY", "sk-secret")
    assert main(["check", "--config", file(GOOD)]) == 0
    assert capsys.readouterr() == ("ok\n", "")


def test_ok_as_json(file, capsys, monkeypatch):
    monkeypatch.setenv("CHECK_KEY", "sk-secret")
    monkeypatch.setenv("MESHPROXY_CONFIG", file(GOOD))
    assert main(["check", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"ok": True, "upstreams": ["openai"], "models": ["openai/gpt-4o"]}


def test_every_fault_is_told_with_the_nearest_name(file, capsys):
    assert main(["check", "--config", file("[server]\nlisen = ':1'\n[log]\nlevel = 'loud'\n")]) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith("server.lisen: unknown key, did you mean listen? (")
    assert first.endswith("/file:2)")
    assert second.startswith("log.level: invalid enum value 'loud'")


def test_a_secret_that_cannot_be_had_is_a_fault(file, capsys, monkeypatch):
    monkeypatch.delenv("CHECK_KEY", raising=False)
    path = file(GOOD)
    assert main(["check", "--config", path]) == 78
    assert (
        capsys.readouterr().err
        == f"upstreams.openai.api_key: the environment variable CHECK_KEY is not set ({path}:5)\n"
    )


def test_a_secret_file_that_is_not_text_is_a_fault(file, capsys, tmp_path):
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    assert main(["check", "--config", file(GOOD.replace('env = "CHECK_KEY"', f'file = "{tmp_path}/key"'))]) == 78
    assert "upstreams.openai.api_key" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path, capsys):
    assert main(["check", "--config", str(tmp_path / "none.toml")]) == 78
    assert capsys.readouterr().err == f"{tmp_path}/none.toml: can't be read (No such file or directory)\n"


def test_a_file_that_is_not_utf8_is_a_fault(tmp_path, capsys):
    (tmp_path / "x.toml").write_bytes(b"\xff")
    assert main(["check", "--config", str(tmp_path / "x.toml")]) == 78
    assert capsys.readouterr().err == f"{tmp_path}/x.toml: not UTF-8\n"


def test_without_a_file_it_is_wrong_usage(capsys, monkeypatch):
    monkeypatch.delenv("MESHPROXY_CONFIG", raising=False)
    assert main(["check"]) == 2
    assert "the following arguments are required: --config" in capsys.readouterr().err


def test_a_certificate_that_is_no_use(file, tmp_path, capsys):
    path = file(f'[server]\ntls_cert = "{tmp_path}/none.crt"\ntls_key = "{tmp_path}/none.key"\n')
    assert main(["check", "--config", path]) == 78
    told = [
        f"server.tls_{end}: {tmp_path}/none.{name} can't be read (No such file or directory) ({path}:{line})"
        for end, name, line in (("cert", "crt", 2), ("key", "key", 3))
    ]
    assert capsys.readouterr().err.splitlines() == told


def test_every_file_of_the_cases_is_here():
    assert {path.stem for path in FILES.iterdir()} == REFUSED.keys() | WARNED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_file_names_each_key_and_its_line(name, capsys):
    path = FILES / f"{name}.toml"
    assert main(["check", "--config", str(path)]) == 78
    faults = capsys.readouterr().err.splitlines()
    assert [fault.partition(": ")[0] for fault in faults] == REFUSED[name]
    lines = path.read_text().splitlines()
    for fault in faults:
        key = fault.partition(": ")[0].rpartition(".")[2]
        number = int(fault.rpartition(":")[2].removesuffix(")"))
        assert fault.endswith(f"({path}:{number})")
        assert key in lines[number - 1]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["header-te", "journal-nowhere"])
def test_serve_refuses_what_check_refuses_at_once(name, workers, file):
    text = (FILES / f"{name}.toml").read_text()
    with started("serve", "--config", file(f"{text}\n[server]\nworkers = {workers}\n")) as process:
        _, err = process.communicate(timeout=20)
        assert process.returncode == 78
    assert [line.partition(": ")[0] for line in err.splitlines()] == REFUSED[name]


@pytest.mark.parametrize("name", WARNED)
def test_a_warned_file_is_accepted_with_a_line_that_names_the_key(name, capsys):
    assert main(["check", "--config", str(FILES / f"{name}.toml")]) == 0
    captured = capsys.readouterr()
    assert captured.out == "ok\n"
    (line,) = captured.err.splitlines()
    assert line.startswith(f"warning: {WARNED[name]}: ")


def test_warnings_are_a_part_of_the_json(capsys):
    assert main(["check", "--json", "--config", str(FILES / "one-endpoint.toml")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (warning,) = json.loads(captured.out)["warnings"]
    assert warning.startswith("upstreams.local.base_url: ")


BASE = 'kind = "openai"\nbase_url = "{}"\n'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        *((f"[upstreams.a]\n{BASE.format(url)}", "upstreams.a.base_url") for url in (
            "http://.example", f"http://{LABEL}.example", f"http://{LONG_NAME}", "http://[::::]/v1", "http://h:0", "http://h:65536",
            "http://h..", "http://.",
        )),
        *((f"[upstreams.a]\n{BASE.format('http://h')}headers = {{ {name} = 'x' }}", f"upstreams.a.headers.{name}") for name in (
            "Connection", "keep-alive", "Proxy-Connection", "TE", "trailer", "Upgrade", "transfer-encoding", "expect", "Host",
        )),
        *((f"[redis]\nurl = '{url}'", "redis.url") for url in (
            "redis://h:99999", "redis://h:0", "redis://a..b", f"redis://{LABEL}", "redis://a,b", "redis://h/x", "redis+cluster://h/1",
            "redis+sentinel://a,,b/m", "redis+sentinel://a:x/m", "http://h", "redis://h?x=1", f"unix://{LONG_PATH}",
            "rediss://h?cert_file=/nonexistent", "rediss://h?ca_file=/dev/null", "redis://h?ca_file=/dev/null", "rediss://h?key_file=/k",
            "rediss://h?ca_file=%00",
        )),
        ("[redis]\njournal = '/dev/null/journal'", "redis.journal"),
        ("[redis]\njournal = '/proc/journal'", "redis.journal"),
        ("[server]\nadmin_token = { file = '/nonexistent' }", "server.admin_token"),
        ("[server]\nlisten = 'nosuch.invalid:1'", "server.listen"),
        ("[server]\nlisten = '192.0.2.1:1'", "server.listen"),
        ("[server]\nadmin_listen = 'unix:/nonexistent/admin.sock'", "server.admin_listen"),
        (f"[server]\nlisten = 'unix:{LONG_PATH}'", "server.listen"),
        ("[server]\nworkers = 257", "server.workers"),
        ("[redis]\nurl = { env = 'NO_SUCH_VARIABLE' }", "redis.url"),
        ("[redis]\npassword = { file = '/nonexistent' }", "redis.password"),
        ("[redis]\nurl = 'redis://:pw@h'\npassword = { env = 'PATH' }", "redis.password"),
        ("[redis]\nurl = 'embedded'\npassword = { env = 'PATH' }", "redis.password"),
        (f"[upstreams.a]\n{BASE.format('http://h')}headers = {{ b = {{ env = 'NO_SUCH' }} }}", "upstreams.a.headers.b"),
    ],
)  # fmt: skip
def test_what_serve_could_not_use_is_refused(text, key, file, capsys):
    assert main(["check", "--config", file(text)]) == 78
    (fault,) = capsys.readouterr().err.splitlines()
    assert fault.startswith(f"{key}: ")
    assert ":pw@" not in fault


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"[upstreams.a]\n{BASE.format('http://h/v1/models/')}", "upstreams.a.base_url"),
        (f"[upstreams.a]\n{BASE.format('https://api.openai.com')}", "upstreams.a.base_url"),
        (f"[upstreams.a]\n{BASE.format('https://api.groq.com/v1')}", "upstreams.a.base_url"),
        (
            f"[upstreams.a]\n{BASE.format('http://h')}headers = {{ api-key = 'hunter2hunter2' }}",
            "upstreams.a.headers.api-key",
        ),
        ("[server]\ncors_origins = ['*']", "server.cors_origins"),
        (
            GOOD.replace("CHECK_KEY", "PATH")
            + '[[models."openai/gpt-4o".price_tiers]]\nabove_prompt_tokens = 1\n'
            + 'input_usd_per_mtok = "0.000005"\noutput_usd_per_mtok = "10"',
            'models."openai/gpt-4o".price_tiers[0].input_usd_per_mtok',
        ),
        ("[server]\nlisten = ':8080'", "server.listen"),
        ("[server]\ntrusted_proxies = ['10.0.0.0/8', '0.0.0.0/0']", "server.trusted_proxies[1]"),
        (GOOD.replace("openai/gpt-4o", "openai/*").replace("CHECK_KEY", "PATH"), 'models."openai/*"'),
        (GOOD.replace('"gpt-4o"', '"*"').replace("CHECK_KEY", "PATH"), 'models."openai/gpt-4o".upstreams[0].model'),
        (
            GOOD.replace("CHECK_KEY", "PATH") + 'cached_input_usd_per_mtok = "0.00000125"',
            'models."openai/gpt-4o".cached_input_usd_per_mtok',
        ),
    ],
)
def test_a_likely_mistake_is_a_warning(text, key, file, capsys):
    assert main(["check", "--config", file(text)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {key}: ")
    assert "hunter2" not in line


def test_what_is_no_toml_has_the_file_and_the_line(file, capsys):
    path = file("[server]\nlisten 1")
    assert main(["check", "--config", path]) == 78
    told = capsys.readouterr().err
    assert told.startswith("not TOML: ")
    assert "line 2" in told
    assert told.endswith(f"({path})\n")


def test_a_bare_secret_is_told_what_to_write_instead(file, capsys):
    text = f'[upstreams.a]\n{BASE.format("http://h")}api_key = "sk-hunter2"'
    assert main(["check", "--config", file(text)]) == 78
    told = capsys.readouterr().err
    assert told.startswith(
        'upstreams.a.api_key: a secret must not be written here: use { env = "NAME" } or { file = "/path" }'
    )
    assert "hunter2" not in told


def test_the_journal_s_probe_leaves_nothing(file, tmp_path):
    text = f"[redis]\njournal = '{tmp_path}/made/for/it/journal'"
    assert main(["check", "--config", file(text)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_port_in_use_is_1_and_one_line(file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for workers in (1, 2):
            text = f"[server]\nlisten = '{address}'\nadmin_listen = '127.0.0.1:0'\nworkers = {workers}"
            with started("serve", "--config", file(text)) as process:
                _, err = process.communicate(timeout=20)
                assert process.returncode == 1
            assert err == f"meshproxy: Address already in use: {address}\n"
