import io
import json
import re

import pytest

PROMPT = {"system": "Be {{ mood }}.", "messages": [{"role": "user", "content": "Greet {{ name }}, {{name}}!"}]}


@pytest.fixture
def file(file):
    return lambda fields: file(fields if isinstance(fields, str) else json.dumps(fields))


def test_put_makes_a_global_template(data, file):
    made = data(
        "templates", "put", "greeter", "--file", file({**PROMPT, "model": "a/b", "params": {"temperature": 0.2}})
    )
    assert re.fullmatch(r"[0-9a-f-]{36}", made["id"])
    expected = {
        "name": "greeter",
        "owner": "*",
        "is_global": True,
        "model": "a/b",
        "params": {"temperature": 0.2},
        "variables": ["mood", "name"],
    }
    assert {field: made[field] for field in expected} == expected
    assert data("templates", "show", "greeter") == made
    assert data("templates", "show", made["id"]) == made


def test_put_replaces_all_but_the_id(data, file):
    before = data("templates", "put", "greeter", "--file", file({**PROMPT, "model": "a/b"}))
    after = data("templates", "put", "greeter", "--global", "--file", file({"system": "Hello."}))
    assert (after["id"], after["created_at"]) == (before["id"], before["created_at"])
    assert (after["system"], after["messages"], after["model"], after["variables"]) == ("Hello.", None, None, [])


def test_what_show_prints_can_be_put_again(data, file):
    shown = data("templates", "put", "greeter", "--file", file(PROMPT))
    again = data("templates", "put", "other", "--account", "acme", "--file", file(shown))
    assert (again["name"], again["owner"], again["system"]) == ("other", "acme", shown["system"])
    assert again["id"] != shown["id"]


def test_put_from_stdin(data, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(PROMPT).encode())))
    assert data("templates", "put", "greeter", "--file", "-")["system"] == "Be {{ mood }}."


def test_an_account_finds_its_own_before_the_global_one(data, file):
    data("templates", "put", "greeter", "--file", file({"system": "global"}))
    data("templates", "put", "greeter", "--account", "acme", "--file", file({"system": "own"}))
    assert data("templates", "show", "greeter")["system"] == "global"
    assert data("templates", "show", "greeter", "--account", "acme")["system"] == "own"
    assert data("templates", "show", "greeter", "--account", "bolt")["system"] == "global"


def test_list(data, run, file):
    assert run("templates", "list") == (0, "no templates\n", "")
    data("templates", "put", "everyone", "--file", file(PROMPT))
    data("templates", "put", "mine", "--account", "acme", "--file", file(PROMPT))
    data("templates", "put", "theirs", "--account", "bolt", "--file", file(PROMPT))
    assert [each["name"] for each in data("templates", "list")] == ["everyone", "mine", "theirs"]
    assert [each["name"] for each in data("templates", "list", "--account", "acme")] == ["everyone", "mine"]
    head, line = run("templates", "list", "--account", "acme")[1].splitlines()[:2]
    assert head.split() == ["name", "owner", "model", "variables", "updated_at", "id"]
    assert line.split()[:3] == ["everyone", "*", "-"]


def test_delete_takes_the_owner_s_only(data, error, file):
    made = data("templates", "put", "greeter", "--file", file(PROMPT))
    data("keys", "create", "--account", "acme")
    assert error("templates", "delete", "greeter", "--account", "acme") == "template_not_found"
    assert data("templates", "delete", "greeter") == {"id": made["id"], "name": "greeter", "deleted": True}
    assert error("templates", "delete", "greeter") == "template_not_found"
    assert error("templates", "show", "greeter") == "template_not_found"


def test_render(data, run, file):
    data("templates", "put", "greeter", "--file", file(PROMPT))
    variables = ["--var", "name={{mood}}", "--var", "mood=kind", "--var", "unused=x"]
    assert data("templates", "render", "greeter", *variables) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Greet {{mood}}, {{mood}}!"},
    ]
    code, out, err = run("templates", "render", "greeter", *variables)
    assert (code, out, err) == (0, "[system]\nBe kind.\n\n[user]\nGreet {{mood}}, {{mood}}!\n\n", "")


def test_render_names_what_is_missing(run, data, file):
    data("templates", "put", "greeter", "--file", file(PROMPT))
    code, out, err = run("templates", "render", "greeter", "--var", "mood=kind", "--json")
    assert (code, out) == (1, "")
    assert json.loads(err)["error"]["details"] == [
        {"type": "missing", "loc": ["body", "variables", "name"], "msg": "Field required"}
    ]


@pytest.mark.parametrize(
    "fields, words",
    [
        ("{", "Invalid template"),
        ("[]", "Invalid template"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "Invalid template"),
        ({**PROMPT, "sistem": "x", "model": 5}, "  sistem: No such field\n"),
        ({**PROMPT, "params": {"temperature": 9}}, "temperature"),
    ],
)
def test_a_bad_file_says_all_that_is_wrong_and_stores_nothing(run, store, file, fields, words):
    code, out, err = run("templates", "put", "greeter", "--file", file(fields))
    assert (code, out) == (1, "")
    assert words in err
    assert store.keys() == []


def test_a_file_that_is_not_there(error, tmp_path):
    assert error("templates", "put", "greeter", "--file", str(tmp_path / "none.json")) == "unreadable"
