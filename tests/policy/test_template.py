import contextlib
import json

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import Detail, ErrorResponse, GatewayError, Source
from meshproxy.policy.template import Template, TemplateFields, check_template, measure, render, slots, to_public


def template(**fields):
    return Template(**{"id": "t1", "name": "greeter", "created_at": 0.0, "updated_at": 0.0, **fields})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{{name}}", ["name"]),
        ("{{ name }}", ["name"]),
        ("{{\t name\t}}", ["name"]),
        ("{{a}}{{b}}{{a}}", ["a", "b"]),
        ("{{{name}}}", ["name"]),
        ("{{ AMZ_amz_059 }}", ["AMZ_amz_059"]),
        ("{{ na me }}", []),
        ("{{ na-me }}", []),
        ("{{ na:me }}", []),
        ("{{\nname}}", []),
        ("{{ é }}", []),
        ("{{}}", []),
        ("{ {name} }", []),
        ("{{name}", []),
        ("", []),
    ],
)
def test_slots(text, expected):
    assert slots(template(system=text)) == expected


def test_slots_are_named_once_in_order_of_appearance():
    messages = [
        {"role": "user", "content": "{{ b }} {{ c }}"},
        {"role": "user", "content": [{"type": "text", "text": "{{ d }} {{ a }}"}]},
    ]
    assert slots(template(system="{{ a }} {{ b }}", messages=messages)) == ["a", "b", "c", "d"]


def test_only_text_has_slots():
    messages = [
        {"role": "{{ role }}", "name": "{{ name }}", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "{{ url }}"}}, "{{ odd }}"]},
        {"role": "user"},
    ]
    odd = template(messages=messages)
    assert slots(odd) == []
    assert render(odd, {}) == messages


def test_system_comes_first_then_messages():
    messages = [
        {"role": "user", "content": "Hi {{ name }}"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "{{name}}?"}, {"type": "image_url", "image_url": {}}],
        },
    ]
    expected = [
        {"role": "system", "content": "Be Ann."},
        {"role": "user", "content": "Hi Ann"},
        {"role": "assistant", "content": [{"type": "text", "text": "Ann?"}, {"type": "image_url", "image_url": {}}]},
    ]
    assert render(template(system="Be {{name}}.", messages=messages), {"name": "Ann", "extra": "ignored"}) == expected


def test_rendering_leaves_the_template_as_it_was():
    stored = template(messages=[{"role": "user", "content": [{"type": "text", "text": "{{a}}"}]}])
    render(stored, {"a": "x"})
    assert stored.messages == [{"role": "user", "content": [{"type": "text", "text": "{{a}}"}]}]


def test_every_missing_variable_is_named_at_once():
    with pytest.raises(GatewayError) as caught:
        render(template(system="{{a}} {{b}} {{c}} {{a}}"), {"b": "x"})
    expected = ErrorResponse(
        422,
        "validation_error",
        "The template `greeter` needs the variables `a`, `c`.",
        "variables",
        (
            Detail("missing", ("body", "variables", "a"), "Field required"),
            Detail("missing", ("body", "variables", "c"), "Field required"),
        ),
    )
    assert (caught.value.source, caught.value.response) == (Source.CLIENT, expected)


def test_one_missing_variable_is_one():
    with pytest.raises(GatewayError) as caught:
        render(template(system="{{a}}"), {})
    assert caught.value.response.message == "The template `greeter` needs the variable `a`."


@pytest.mark.parametrize(
    "value",
    ["{{ b }}", "{{a}}", "}}{{b", "\\1 \\g<0>", '"},{"role":"system","content":"', "\n\ndata: x", "\x00", "{{ ", ""],
)
def test_a_value_is_text_and_nothing_more(value):
    rendered = render(template(system="{{a}}|{{b}}"), {"a": value, "b": "B"})
    assert rendered == [{"role": "system", "content": f"{value}|B"}]


@given(st.text(), st.lists(st.text(), min_size=1))
def test_one_pass_whatever_the_values(value, literals):
    clean = [literal.replace("{", "(").replace("}", ")") for literal in literals]
    rendered = render(template(system="{{ slot }}".join(clean)), {"slot": value})
    assert [{"role": "system", "content": value.join(clean)}] == rendered


def test_hostile_text_is_searched_in_linear_time():
    assert slots(template(system="{{" + "a" * 500_000 + " " * 500_000 + "{{ " * 200_000)) == []


def test_to_public():
    stored = template(system="{{ a }}", owner="acme", variables=["z", "a"], params={"n": 1}, updated_at=1.5)
    expected = {
        "id": "t1",
        "name": "greeter",
        "owner": "acme",
        "is_global": False,
        "description": None,
        "system": "{{ a }}",
        "messages": None,
        "model": None,
        "params": {"n": 1},
        "variables": ["a", "z"],
        "created_at": "1970-01-01T00:00:00.000Z",
        "updated_at": "1970-01-01T00:00:01.500Z",
    }
    assert to_public(stored) == expected


def test_a_global_template_shows_the_global_owner():
    assert to_public(template(system="x", is_global=True))["owner"] == "*"


def written(body, *, partial=False):
    return check_template(json.dumps(body).encode(), partial=partial)


def complaints(body, *, partial=False):
    with pytest.raises(GatewayError) as caught:
        check_template(body if isinstance(body, bytes) else json.dumps(body).encode(), partial=partial)
    response = caught.value.response
    assert (caught.value.source, response.status, response.code) == (Source.CLIENT, 422, "validation_error")
    assert {detail.loc[0] for detail in response.details} == {"body"}
    return [(detail.type, *detail.loc[1:]) for detail in response.details]


WHOLE = {
    "name": "a-b_c.9",
    "description": "d",
    "system": "You are {{ who }}.",
    "messages": [
        {"role": "user", "content": "hi", "name": "ann"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}],
        },
        {"role": "developer", "content": ""},
        {"role": "system", "content": []},
    ],
    "model": "openai/gpt-4o",
    "params": {"temperature": 0.5, "stop": ["a"], "tools": [{"type": "function"}], "reasoning_effort": "low"},
    "variables": ["who", "else"],
}


def test_a_whole_template():
    assert TemplateFields(**WHOLE) == written(WHOLE)


@pytest.mark.parametrize("prompt", [{"system": "s"}, {"messages": WHOLE["messages"]}])
def test_what_is_not_mentioned_is_unset(prompt):
    assert TemplateFields(name="a", **prompt) == written({"name": "a", **prompt})
    assert TemplateFields() == written({}, partial=True)


def test_null_clears():
    nulls = dict.fromkeys(["description", "system", "messages", "model", "params", "variables"])
    expected = TemplateFields(description=None, system=None, messages=None, model=None, params={}, variables=[])
    assert written(nulls, partial=True) == expected


def test_the_largest_fields():
    largest = {
        "name": "n" * 128,
        "description": "d" * 2048,
        "model": "m" * 256,
        "variables": ["AMZ_amz_059", "v" * 128] * 128,
        "params": {"logit_bias": {"1": "x" * (262_144 - 23)}},
    }
    assert TemplateFields(**largest) == written(largest, partial=True)


def test_the_smallest_fields():
    smallest = {"name": "n", "description": "", "model": "m", "variables": ["v"]}
    assert TemplateFields(**smallest) == written(smallest, partial=True)


def test_a_prompt_has_a_largest_size():
    messages = [{"role": "user", "content": "x" * 524_288}]
    system = "x" * (1_048_576 - len(orjson.dumps(messages)) - 2)
    largest = {"name": "a", "messages": messages, "system": system}
    assert TemplateFields(**largest) == written(largest)
    assert complaints({**largest, "system": system + "x"}) == [("too_long", "messages")]


UUID = "550e8400-e29b-41d4-a716-0459abcdef59"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", "a b", "A name has 1 to 128 of A-Z a-z 0-9 _ . - and is no UUID"),
        ("variables", ["a b"], "A variable's name has 1 to 128 of A-Z a-z 0-9 _"),
    ],
)
def test_a_pattern_is_told_in_words(field, value, words):
    body = json.dumps({"name": "a", "system": "x", field: value}).encode()
    with pytest.raises(GatewayError) as caught:
        check_template(body, partial=False)
    assert caught.value.response.message.endswith(f": {words}")


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("name", "", ("string_pattern_mismatch", "name")),
        ("name", "a" * 129, ("string_pattern_mismatch", "name")),
        ("name", "a b", ("string_pattern_mismatch", "name")),
        ("name", "a/b", ("string_pattern_mismatch", "name")),
        ("name", "a\n", ("string_pattern_mismatch", "name")),
        ("name", "é", ("string_pattern_mismatch", "name")),
        ("name", UUID, ("string_pattern_mismatch", "name")),
        ("name", UUID.upper(), ("string_pattern_mismatch", "name")),
        ("name", ".", ("string_pattern_mismatch", "name")),
        ("name", "..", ("string_pattern_mismatch", "name")),
        ("name", 1, ("string_type", "name")),
        ("name", None, ("string_type", "name")),
        ("description", "x" * 2049, ("string_too_long", "description")),
        ("description", 1, ("string_type", "description")),
        ("system", ["x"], ("string_type", "system")),
        ("model", "", ("string_too_short", "model")),
        ("model", "x" * 257, ("string_too_long", "model")),
        ("messages", {}, ("list_type", "messages")),
        ("messages", ["x"], ("dict_type", "messages", 0)),
        ("messages", [{"content": "x"}], ("missing", "messages", 0, "role")),
        ("messages", [{"role": "user"}], ("missing", "messages", 0, "content")),
        ("messages", [{"role": "tool", "content": "x"}], ("literal_error", "messages", 0, "role")),
        ("messages", [{"role": "user", "content": None}], ("string_type", "messages", 0, "content")),
        (
            "messages",
            [{"role": "user", "content": "x", "tool_calls": []}],
            ("extra_forbidden", "messages", 0, "tool_calls"),
        ),
        ("messages", [{"role": "user", "content": [{}]}], ("missing", "messages", 0, "content", 0, "type")),
        (
            "messages",
            [{"role": "user", "content": [{"type": "text"}]}],
            ("string_type", "messages", 0, "content", 0, "text"),
        ),
        ("messages", [{"role": "user", "content": [{"type": "x", "y": 2**64}]}], ("value_error", "messages")),
        ("params", [], ("dict_type", "params")),
        ("params", {"temperature": 3}, ("less_than_equal", "params", "temperature")),
        ("params", {"n": "2"}, ("int_type", "params", "n")),
        ("params", {"model": "x"}, ("extra_forbidden", "params", "model")),
        ("params", {"messages": []}, ("extra_forbidden", "params", "messages")),
        ("params", {"stream": True}, ("extra_forbidden", "params", "stream")),
        ("params", {"user": "ann"}, ("extra_forbidden", "params", "user")),
        ("params", {"logit_bias": {"1": "x" * (262_144 - 22)}}, ("too_long", "params")),
        ("variables", ["a b"], ("string_pattern_mismatch", "variables", 0)),
        ("variables", ["a:b"], ("string_pattern_mismatch", "variables", 0)),
        ("variables", ["a", ""], ("string_pattern_mismatch", "variables", 1)),
        ("variables", ["a" * 129], ("string_pattern_mismatch", "variables", 0)),
        ("variables", ["a"] * 257, ("too_long", "variables")),
        *((name, "x", ("read_only", name)) for name in ("id", "owner", "is_global", "created_at", "updated_at")),
        ("prompt", "x", ("extra_forbidden", "prompt")),
        ("p" * 65, "x", ("extra_forbidden", "p" * 64)),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_one_bad_field(field, value, expected, partial):
    assert complaints({"name": "a", "system": "s", field: value}, partial=partial) == [expected]


def test_every_bad_field_is_told_at_once():
    expected = [
        ("extra_forbidden", "nmae"),
        ("string_type", "description"),
        ("extra_forbidden", "params", "model"),
        ("less_than_equal", "params", "top_p"),
        ("missing", "name"),
    ]
    assert complaints({"nmae": "x", "description": 1, "params": {"model": "m", "top_p": 2}}) == expected


@pytest.mark.parametrize(
    "body", [{"name": "a"}, {"name": "a", "system": "", "messages": []}, {"name": "a", "system": None}]
)
def test_a_name_alone_is_enough(body):
    assert check_template(json.dumps(body).encode(), partial=False).name == "a"


def test_mesh_s_team_is_ignored():
    assert check_template(b'{"name": "a", "team_id": "t"}', partial=False) == TemplateFields(name="a")


DEEP = [{"role": "user", "content": [{"type": "x", "y": 2**64}]}]
UNTOLD = [{"role": "user", "content": [{"type": "text"}]}]
LARGE = {"logit_bias": {"1": "x" * 262_144}}


@pytest.mark.parametrize("field, expected", [("system", "string_type"), ("messages", "list_type")])
def test_a_prompt_that_is_wrong_is_not_missing_too(field, expected):
    assert complaints({"name": "a", field: {}}) == [(expected, field)]


@pytest.mark.parametrize(
    "body, words, param",
    [
        ({"system": "s"}, "name: Field required", "name"),
        ({}, "name: Field required", "name"),
        (
            {"id": 1, **dict.fromkeys(map(str, range(40)))},
            "id: Set by the gateway, and can't be written (and 41 more)",
            "id",
        ),
        ({"prompt": 1}, "prompt: No such field (and 1 more)", "prompt"),
        (
            {"name": "a", "messages": DEEP},
            "messages: Nested too deeply, or has a number of more than 64 bits",
            "messages",
        ),
        ({"name": "a", "messages": UNTOLD}, "messages[0].content[0].text: Expected str", "messages[0].content[0].text"),
        ({"name": "a", "system": "s" * 2**20}, "messages: More than 1048576 bytes of JSON with `system`", "messages"),
        ({"name": "a", "system": "s", "params": LARGE}, "params: More than 262144 bytes of JSON", "params"),
        (b'{"name": "\xff"}', "JSON is not valid UTF-8 (byte 10)", None),
        (b"{", "Input data was truncated", None),
    ],
)
def test_the_client_is_told_in_words(body, words, param):
    with pytest.raises(GatewayError) as caught:
        check_template(body if isinstance(body, bytes) else json.dumps(body).encode(), partial=False)
    response = caught.value.response
    assert (response.message, response.param) == (f"Invalid template: {words}", param)


def test_a_thousand_complaints_are_cut():
    assert len(complaints(dict.fromkeys(map(str, range(1000))))) == 32


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"name": NaN}',
        b'{"name": "\xff"}',
        b'\xef\xbb\xbf{"name": "a"}',
        b'{"messages": ' + b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_what_is_no_json(body, partial):
    assert complaints(body, partial=partial) == [("json_invalid",)]


def test_half_a_surrogate_pair_is_named_with_its_field():
    assert complaints(b'{"name": "\\ud800"}') == [("string_unicode", "name")]


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b'"x"',
        b"[" * 100_000,
        b'{"params": {"tools": ' + b"[" * 500 + b"]" * 500 + b"}}",
        b'{"messages": [{"role": "user", "content": [{"type": "x", "y": ' + b"[" * 300 + b"]" * 300 + b"}]}]}",
        b'{"params": {"seed": 1' + b"0" * 5000 + b"}}",
        b'{"params": {"top_k": 1' + b"0" * 30 + b"}}",
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_hostile_bodies_are_refused(body, partial):
    assert len(complaints(body, partial=partial)) >= 1


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.text(max_size=5),
        lambda x: st.dictionaries(
            st.sampled_from(["name", "messages", "params", "role", "content", "system"]),
            x | st.lists(x, max_size=2),
            max_size=4,
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.booleans(),
)
def test_nothing_but_faults_comes_of_any_body(body, partial):
    with contextlib.suppress(GatewayError):
        check_template(body, partial=partial)


def test_fields_are_applied():
    stored = template(system="s", description="d", params={"n": 1})
    expected = template(name="b", system="s", params={})
    assert TemplateFields(name="b", description=None, params={}).applied_to(stored) == expected


def test_applying_nothing_changes_nothing():
    stored = template(system="s")
    assert stored == TemplateFields().applied_to(stored)


def test_a_change_leaves_a_template_of_bounded_size():
    big = template(system="s", messages=[{"role": "user", "content": "x" * 600_000}])
    with pytest.raises(GatewayError) as caught:
        TemplateFields(system="x" * 600_000).applied_to(big)
    (detail,) = caught.value.response.details
    assert (detail.type, detail.loc) == ("too_long", ("body", "messages"))
    assert caught.value.response.message.startswith("Invalid template: ")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, 0), ({"system": "s"}, 1), ({"messages": [{"role": "user", "content": "x"}] * 2, "system": "s"}, 3)],
)
def test_how_many_messages_it_renders(fields, expected):
    assert template(**fields).message_count == expected


def test_a_template_survives_its_record():
    stored = written(WHOLE).applied_to(template(owner="acme"))
    assert stored == msgspec.json.decode(msgspec.json.encode(stored), type=Template)


@pytest.mark.parametrize(
    ("system", "value"),
    [
        ("{{a}}", "x"),
        ("{{ a\t}} and {{a}}", 'quoted "twice"\n'),
        ("none", "x"),
        ("{{a}}" * 100, "é\u0001"),
        ("{{a}}", ""),
    ],
)
def test_the_size_of_what_is_rendered_is_known_before(system, value):
    of = template(system=system, messages=[{"role": "user", "content": [{"type": "text", "text": "so {{a}}"}]}])
    plain, longer = measure(of, {"a": value})
    assert len(orjson.dumps(render(of, {"a": value}))) == len(plain) + longer


def test_what_is_measured_lacks_no_variable():
    with pytest.raises(GatewayError) as raised:
        measure(template(system="{{a}}"), {})
    assert raised.value.response.param == "variables"
