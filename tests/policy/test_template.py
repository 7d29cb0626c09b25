import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import Detail, Fault, Problem, Source
from meshproxy.policy.template import Template, render, slots, to_public


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
        ("{{ A_9 }}", ["A_9"]),
        ("{{ na me }}", []),
        ("{{ na-me }}", []),
        ("{{\nname}}", []),
        ("{{ é }}", []),
        ("{{}}", []),
        ("{ {name} }", []),
        ("{{name}", []),
        ("", []),
    ],
)
def test_slots(text, expected):
    assert expected == slots(template(system=text))


def test_slots_are_named_once_in_order_of_appearance():
    messages = [
        {"role": "user", "content": "{{ b }} {{ c }}"},
        {"role": "user", "content": [{"type": "text", "text": "{{ d }} {{ a }}"}]},
    ]
    assert ["a", "b", "c", "d"] == slots(template(system="{{ a }} {{ b }}", messages=messages))


def test_only_text_has_slots():
    messages = [
        {"role": "{{ role }}", "name": "{{ name }}", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "{{ url }}"}}, "{{ odd }}"]},
        {"role": "user"},
    ]
    odd = template(messages=messages)
    assert [] == slots(odd)
    assert messages == render(odd, {})


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
    assert expected == render(template(system="Be {{name}}.", messages=messages), {"name": "Ann", "extra": "ignored"})


def test_rendering_leaves_the_template_as_it_was():
    stored = template(messages=[{"role": "user", "content": [{"type": "text", "text": "{{a}}"}]}])
    render(stored, {"a": "x"})
    assert [{"role": "user", "content": [{"type": "text", "text": "{{a}}"}]}] == stored.messages


def test_every_missing_variable_is_named_at_once():
    with pytest.raises(Fault) as caught:
        render(template(system="{{a}} {{b}} {{c}} {{a}}"), {"b": "x"})
    expected = Problem(
        422,
        "validation_error",
        "The template `greeter` needs the variables `a`, `c`.",
        "variables",
        (
            Detail("missing", ("body", "variables", "a"), "Field required"),
            Detail("missing", ("body", "variables", "c"), "Field required"),
        ),
    )
    assert (Source.CLIENT, expected) == (caught.value.source, caught.value.problem)


@pytest.mark.parametrize(
    "value",
    ["{{ b }}", "{{a}}", "}}{{b", "\\1 \\g<0>", '"},{"role":"system","content":"', "\n\ndata: x", "\x00", "{{ ", ""],
)
def test_a_value_is_text_and_nothing_more(value):
    rendered = render(template(system="{{a}}|{{b}}"), {"a": value, "b": "B"})
    assert [{"role": "system", "content": f"{value}|B"}] == rendered


@given(st.text(), st.lists(st.text(), min_size=1))
def test_one_pass_whatever_the_values(value, literals):
    clean = [literal.replace("{", "(").replace("}", ")") for literal in literals]
    rendered = render(template(system="{{ slot }}".join(clean)), {"slot": value})
    assert [{"role": "system", "content": value.join(clean)}] == rendered


def test_hostile_text_is_searched_in_linear_time():
    assert [] == slots(template(system="{{" + "a" * 500_000 + " " * 500_000 + "{{ " * 200_000))


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
    assert expected == to_public(stored)


def test_a_global_template_shows_the_global_owner():
    assert "*" == to_public(template(system="x", is_global=True))["owner"]
