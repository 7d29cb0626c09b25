import pytest

from meshproxy.errors import Detail
from meshproxy.policy.template import check_params, merge_params

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
    assert merge_params(key, template) == expected


def test_no_params_cost_nothing():
    assert merge_params({}, None) is merge_params({}, {})


def test_what_shapes_an_answer_can_be_stored():
    every = {
        "audio": {"voice": "alloy", "format": "mp3"},
        "frequency_penalty": -2,
        "logit_bias": {"50256": -100},
        "logprobs": True,
        "max_completion_tokens": 5,
        "max_tokens": 5,
        "min_p": 0.1,
        "modalities": ["text", "audio"],
        "n": 128,
        "parallel_tool_calls": False,
        "presence_penalty": 2,
        "provider": {"order": ["a"]},
        "reasoning": {"effort": "low"},
        "reasoning_effort": "low",
        "repetition_penalty": 1.1,
        "response_format": {"type": "text"},
        "seed": 7,
        "service_tier": "flex",
        "stop": ["a"],
        "temperature": 2,
        "tool_choice": "none",
        "tools": [],
        "top_a": 0.1,
        "top_k": 40,
        "top_logprobs": 5,
        "top_p": 0.9,
        "verbosity": "low",
    }
    assert list(check_params(every, LOC)) == []


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "metadata", "model", "models", "session_id", "store", "stream", "stream_options", "template"),
        *("transforms", "user", "variables", "x", ""),
    ],
)
def test_what_is_the_requests_own_to_say_cannot(name):
    expected = [Detail("extra_forbidden", ("body", "params", name), "Not a request parameter that can be stored")]
    assert list(check_params({name: []}, LOC)) == expected


def test_every_fault_of_params_is_told_where_it_stands():
    expected = [
        Detail("extra_forbidden", ("body", "params", "x" * 64), "Not a request parameter that can be stored"),
        Detail("greater_than_equal", ("body", "params", "n"), "Expected int >= 1"),
        Detail("string_type", ("body", "params", "stop"), "Expected str or array or null, got int"),
    ]
    assert list(check_params({"x" * 65: 1, "n": 0, "stop": 1}, LOC)) == expected
