import json

from meshproxy.cli.command_line import main

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
    assert first == "server.lisen: unknown key, did you mean listen?"
    assert second.startswith("log.level: invalid enum value 'loud'")


def test_a_secret_that_cannot_be_had_is_a_fault(file, capsys, monkeypatch):
    monkeypatch.delenv("CHECK_KEY", raising=False)
    assert main(["check", "--config", file(GOOD)]) == 78
    assert capsys.readouterr().err == "upstreams.openai.api_key: the environment has no CHECK_KEY\n"


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
    told = f"server.tls_cert: {tmp_path}/none.crt or {tmp_path}/none.key can't be read (No such file or directory)\n"
    assert capsys.readouterr().err == told
