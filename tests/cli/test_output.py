import json

from meshproxy.cli.command_line import Output
from meshproxy.units import rfc3339

ROWS = [{"model": "a/b", "requests": 12, "cost_usd": "1.50"}, {"model": "c", "requests": 3, "cost_usd": None}]


def test_a_record_is_aligned_and_its_nested_names_are_joined(capsys):
    Output(as_json=False).print_record(
        {"id": "k1", "limits": {"burst": 5}, "models": ["a", "b"], "ok": True}, note="keep it"
    )
    assert (
        capsys.readouterr().out
        == "id            k1\nlimits.burst  5\nmodels        a, b\nok            yes\n\nkeep it\n"
    )


def test_a_record_as_json_is_one_line(capsys):
    Output(as_json=True).print_record({"key": "rsk_x", "limits": {"burst": None}}, note="not shown")
    assert capsys.readouterr().out == '{"key": "rsk_x", "limits": {"burst": null}}\n'


def test_rows_show_the_named_columns_with_numbers_on_the_right(capsys):
    Output(as_json=False).print_rows(ROWS, ["model", "requests", "cost_usd"], empty="nothing")
    assert (
        capsys.readouterr().out == "model  requests  cost_usd\na/b          12      1.50\nc             3         -\n"
    )


def test_rows_as_json_have_everything(capsys):
    Output(as_json=True).print_rows(ROWS, ["model"], empty="nothing")
    assert json.loads(capsys.readouterr().out) == ROWS


def test_no_rows(capsys):
    Output(as_json=False).print_rows([], ["model"], empty="no models")
    Output(as_json=True).print_rows([], ["model"], empty="no models")
    assert capsys.readouterr().out == "no models\n[]\n"


def test_a_terminal_is_never_sent_control_characters(capsys):
    Output(as_json=False).print_record({"name": "a\x1b[2J\nb"})
    assert capsys.readouterr().out == "name  a\\x1b[2J\\nb\n"


def test_failures_go_to_stderr(capsys):
    Output(as_json=False).print_error("not_found", "no such key")
    Output(as_json=True).print_error("not_found", "no such key")
    captured = capsys.readouterr()
    assert captured.out == ""
    plain, as_json = captured.err.splitlines()
    assert plain == "meshproxy: no such key"
    assert json.loads(as_json) == {"error": {"message": "no such key", "code": "not_found"}}


def test_every_fault_of_a_configuration_has_its_line(capsys):
    Output(as_json=False).print_faults(["server.a: bad", "server.b: worse"])
    Output(as_json=True).print_faults(["server.a: bad"])
    *plain, as_json = capsys.readouterr().err.splitlines()
    assert plain == ["server.a: bad", "server.b: worse"]
    assert json.loads(as_json) == {
        "error": {
            "message": "the configuration has 1 fault",
            "code": "unfit_configuration",
            "faults": ["server.a: bad"],
        }
    }


def test_times_are_rfc3339_in_utc():
    assert rfc3339(0) == "1970-01-01T00:00:00Z"
    assert rfc3339(None) is None
