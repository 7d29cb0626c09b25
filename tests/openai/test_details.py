"""The words of msgspec are not ours: these tests notice when a new version changes them."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, Struct

from meshproxy.errors import Detail
from meshproxy.openai.errors import detail_of, field_path


class Message(Struct, forbid_unknown_fields=True):
    role: str


def detail(kind: Any, text: bytes) -> Detail:
    with pytest.raises(msgspec.DecodeError) as caught:
        msgspec.json.decode(text, type=kind)
    return detail_of(caught.value, ("body", "field"))


class Talk(Struct):
    said: list[str]


HERE = ("body", "field")
STR = "Expected str, got int"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (str, b"1", Detail("string_type", HERE, "Expected str, got int")),
        (str | None, b"1", Detail("string_type", HERE, "Expected str or null, got int")),
        (int, b'"1"', Detail("int_type", HERE, "Expected int, got str")),
        (int, b"1.5", Detail("int_from_float", HERE, "Expected int, got float")),
        (float, b"true", Detail("float_type", HERE, "Expected float, got bool")),
        (float, b"1e999", Detail("number_out_of_range", HERE, "Number out of range")),
        (bool, b"1", Detail("bool_type", HERE, "Expected bool, got int")),
        (list[str], b"{}", Detail("list_type", HERE, "Expected array, got object")),
        (list[str], b'["a", 2]', Detail("string_type", (*HERE, 1), "Expected str, got int")),
        (dict[str, str], b"[]", Detail("dict_type", HERE, "Expected object, got array")),
        (Annotated[int, Meta(ge=1)], b"0", Detail("greater_than_equal", HERE, "Expected int >= 1")),
        (Annotated[int, Meta(gt=1)], b"1", Detail("greater_than_equal", HERE, "Expected int >= 2")),
        (Annotated[float, Meta(le=2)], b"3", Detail("less_than_equal", HERE, "Expected float <= 2.0")),
        (Annotated[float, Meta(lt=2)], b"3", Detail("less_than", HERE, "Expected float < 2.0")),
        (Annotated[float, Meta(gt=2)], b"1", Detail("greater_than", HERE, "Expected float > 2.0")),
        (Annotated[str, Meta(max_length=2)], b'"abc"', Detail("string_too_long", HERE, "Expected str of length <= 2")),
        (Annotated[str, Meta(min_length=1)], b'""', Detail("string_too_short", HERE, "Expected str of length >= 1")),
        (Annotated[list[int], Meta(max_length=0)], b"[1]", Detail("too_long", HERE, "Expected array of length <= 0")),
        (Annotated[list[int], Meta(min_length=1)], b"[]", Detail("too_short", HERE, "Expected array of length >= 1")),
        (
            Annotated[str, Meta(pattern="a")],
            b'"b"',
            Detail("string_pattern_mismatch", HERE, "Expected str matching regex 'a'"),
        ),
        (Literal["a"], b'"b"', Detail("literal_error", HERE, "Invalid enum value 'b'")),
        (
            Annotated[int, Meta(multiple_of=2)],
            b"3",
            Detail("value_error", HERE, "Expected int that's a multiple of 2"),
        ),
        (datetime, b"1", Detail("value_error", HERE, "Expected datetime, got int")),
        (datetime, b'"x"', Detail("value_error", HERE, "Invalid RFC3339 encoded datetime")),
        (Message | None, b'{"role":null}', Detail("string_type", (*HERE, "role"), "Expected str, got null")),
        (
            list[list[Message]],
            b"[" + b"[]," * 12 + b'[{"role":1}]]',
            Detail("string_type", (*HERE, 12, 0, "role"), STR),
        ),
        (Talk, b'{"said":["a",1]}', Detail("string_type", (*HERE, "said", 1), STR)),
        (list[Message], b'[{"role": 1}]', Detail("string_type", (*HERE, 0, "role"), "Expected str, got int")),
        (list[Message], b'[{"role":"a"}, {}]', Detail("missing", (*HERE, 1, "role"), "Field required")),
        (Message, b'{"role":"a", "b c": 1}', Detail("extra_forbidden", (*HERE, "b c"), "No such field")),
        (Message, b'{"role":"a", "": 1}', Detail("extra_forbidden", (*HERE, ""), "No such field")),
        (Message, b'{"role":"a", "missing": 1}', Detail("extra_forbidden", (*HERE, "missing"), "No such field")),
        (str, b'"a', Detail("json_invalid", HERE, "Input data was truncated")),
        (str, b"nul", Detail("json_invalid", HERE, "Input data was truncated")),
        (str, b"nuts", Detail("json_invalid", HERE, "JSON is malformed: invalid character (byte 4)")),
    ],
)
def test_a_complaint_becomes_a_detail(kind: Any, text: bytes, expected: Detail):
    assert detail(kind, text) == expected


def test_python_s_own_limit_is_bad_json_too():
    assert Detail("json_invalid", HERE, "JSON is nested too deeply") == detail_of(RecursionError("deep"), HERE)


def test_a_client_s_words_in_a_complaint_are_cut():
    actual = detail(Literal["a"], b'"' + b"x" * 10_000 + b'"')
    assert actual.msg == ("Invalid enum value '" + "x" * 180)


@pytest.mark.parametrize(
    ("loc", "expected"),
    [
        (("body",), ""),
        (("body", "temperature"), "temperature"),
        (("body", "messages", 0, "role"), "messages[0].role"),
        (("body", "variables", "city"), "variables.city"),
    ],
)
def test_the_place_of_a_detail_reads_as_a_path(loc: tuple[str | int, ...], expected: str):
    assert field_path(Detail("missing", loc, "")) == expected
