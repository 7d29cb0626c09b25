"""Values that fit their schemas, whatever the schemas are."""

import math
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.simulator.request import HARD_VALUES, value_for

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "left", "children"],
        }
    },
    "$ref": "#/$defs/node",
}


def made(schema, seed=1):
    return value_for(schema, Random(seed))


@pytest.mark.parametrize(
    "schema, expected",
    [
        ({"const": [1, {"a": None}]}, [1, {"a": None}]),
        ({"enum": ["only"]}, "only"),
        ({"type": "null"}, None),
        ({"type": "integer", "minimum": 7, "maximum": 7}, 7),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, 0.25),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5}, 4),
        ({"type": "integer", "minimum": 100, "multipleOf": 30}, 120),
        ({"type": "integer", "maximum": -100}, -101),
        ({"type": "string", "minLength": 40, "maxLength": 40, "format": "unknown"}, 40),
        ({"type": "string", "format": "uuid"}, "9b2f7c1e-4d3a-4b6e-8f10-2a5c6d7e8f90"),
        ({"type": "array", "items": {"const": 1}, "minItems": 3}, [1, 1, 1]),
        ({"type": "array", "items": {"const": 1}, "maxItems": 1}, [1]),
        ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False}, [1, 2]),
        ({"properties": {"a": {"const": 1}}}, {"a": 1}),
        ({"type": "object", "required": ["unlisted"]}, {"unlisted": ""}),
        ({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]}, {"a": 1, "b": 2}),
        ({"oneOf": [{"const": 1}]}, 1),
        ({"definitions": {"a/b": {"const": 5}}, "$ref": "#/definitions/a~1b"}, 5),
        ({"$ref": "#/nowhere"}, None),
    ],
)
def test_a_value_fits(schema, expected):
    value = made(schema)
    assert (len(value) if isinstance(value, str) and isinstance(expected, int) else value) == expected


def test_a_nullable_is_sometimes_null():
    schema = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert {str, type(None)} == {type(made(schema, seed)) for seed in range(50)}


@pytest.mark.parametrize("seed", range(20))
def test_a_recursive_schema_ends(seed):
    tree = made(TREE, seed)
    assert set(tree) == {"value", "left", "children"}
    assert len(msgspec.json.encode(tree)) < 200_000


def test_a_schema_without_a_finite_value_ends_too():
    schema = {"properties": {"me": {"$ref": "#"}}, "required": ["me"]}
    assert msgspec.json.encode(made(schema)).endswith(b"null" + b"}" * 41)


def test_arrays_of_arrays_are_bounded():
    schema = {"type": "integer"}
    for _ in range(4):
        schema = {"type": "array", "items": schema, "minItems": 1000}
    assert msgspec.json.encode(made(schema)).count(b",") < 20 * HARD_VALUES


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#"}]},
        {"enum": 3},
        {"type": "object", "properties": [1]},
        {"type": "integer", "minimum": "low"},
        {"type": "array", "minItems": "two"},
        {"anyOf": 5},
    ],
)
def test_what_is_no_schema_is_a_value_error(schema):
    with pytest.raises(ValueError, match="not a JSON Schema"):
        made(schema)


numbers = st.integers(-1000, 1000)


@given(st.tuples(numbers, numbers).map(sorted), st.sampled_from(["integer", "number"]), numbers)
def test_numbers_keep_within_their_bounds(bounds, kind, seed):
    low, high = bounds
    value = made({"type": kind, "minimum": low, "maximum": high}, seed)
    assert low <= value <= high
    assert kind == "number" or math.floor(value) == value


WORDS = ["type", "properties", "required", "items", "anyOf", "allOf", "$ref", "enum", "minimum", "multipleOf", "format"]
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(WORDS), inner),
)


@given(st.dictionaries(st.sampled_from(WORDS), json))
def test_whatever_comes_as_a_schema_it_is_a_value_or_a_value_error(schema):
    try:
        msgspec.json.encode(made(schema))
    except ValueError as error:
        assert "not a JSON Schema" in str(error)  # noqa: PT017 - either is right
