import pytest

from meshproxy.errors import Detail
from meshproxy.policy.params import check_params, merge_params

LOC = ("body", "params")


@pytest.mark.parametrize(
    "key, template, expected",
    [
        ({}, None, {}),
        ({}, {}, {}),
        ({"temperature": 0.5}, None, {"temperature": b"0.5"}),
        ({}, {"stop": ["é"]}, {"stop": '["é"]'.encode()}),
        ({"temperature": 0.5}, {"temperature": 1, "seed": 7}, {"temperature": b"0.5", "seed": b"7"}),
        ({"max_tokens": 5}, {"max_completion_tokens": 9, "seed": 7}, {"max_tokens": b"5", "seed": b"7"}),
        ({"max_completion_tokens": 5}, {"max_tokens": 9}, {"max_completion_tokens": b"5"}),
        ({}, {"max_tokens": 9}, {"max_tokens": b"9"}),
        ({"seed": None}, {"seed": 7}, {}),
    ],
)
def test_the_keys_params_win_over_the_templates(key, template, expected):
    assert expected == merge_params(key, template)


def test_no_params_cost_nothing():
    assert merge_params({}, None) is merge_params({}, {})


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 2}, {"tools": [], "n": 128}, {"response_format": {"type": "text"}}]
)
def test_sound_params(params):
    assert [] == list(check_params(params, LOC))


def test_every_fault_of_params_is_told_where_it_stands():
    expected = [
        Detail("extra_forbidden", ("body", "params", "user"), "Not a request parameter that can be stored"),
        Detail("extra_forbidden", ("body", "params", "x" * 64), "Not a request parameter that can be stored"),
        ("greater_than_equal", ("body", "params", "n")),
        ("string_type", ("body", "params", "stop")),
    ]
    found = list(check_params({"user": "a", "x" * 100: 1, "n": 0, "stop": 1}, LOC))
    assert expected == [*found[:2], *((detail.type, detail.loc) for detail in found[2:])]
