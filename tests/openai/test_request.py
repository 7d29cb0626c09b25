"""Requests in and out. What a body may be is in DESIGN section 2, "Request"."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from meshproxy.errors import Detail, ErrorResponse, GatewayError, Source
from meshproxy.openai.output import hides_reasoning
from meshproxy.openai.request import ChatRequest, decode_chat, encode_upstream, with_params

CAPS = {"max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens", "n_predict"}
KNOWN = {
    *CAPS,
    "frequency_penalty",
    "model",
    "models",
    "n",
    "presence_penalty",
    "seed",
    "session_id",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "template",
    "timeout",
    "tool_choice",
    "tools",
    "top_p",
    "transforms",
    "user",
    "variables",
}
MESSAGES = b'[ {"role": "user","content":"Hi \xc3\xa9"} ]'


def body(**members: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}], **members}).encode()


def raw_body(members: bytes) -> bytes:
    return b'{"messages":' + MESSAGES + b"," + members + b"}"


def refusal(text: bytes) -> ErrorResponse:
    with pytest.raises(GatewayError) as caught:
        decode_chat(text)
    assert (
        caught.value.source,
        caught.value.response.status,
        caught.value.response.code,
    ) == (Source.CLIENT, 422, "validation_error")
    return caught.value.response


def complaints(text: bytes) -> list[tuple[str, tuple[str | int, ...]]]:
    return [(detail.type, detail.loc) for detail in refusal(text).details]


def sent(request: ChatRequest, params: Mapping[str, bytes] | None = None, **options: Any) -> dict[str, Any]:
    given = {"model": "gpt-4o", "messages": request.messages or b"[]"} | options
    return json.loads(encode_upstream(with_params(request, params or {}), **given))


def raw_fields(request: ChatRequest) -> dict[str, bytes]:
    return {name: bytes(value) for name, value in request.fields.items()}


class TestDecode:
    def test_everything_a_request_can_say(self):
        request = decode_chat(
            body(
                model="openai/gpt-4o",
                template="greeting",
                variables={"city": "Bern"},
                session_id="s-1",
                stream=True,
                stream_options={"include_usage": True},
                max_tokens=10,
                max_completion_tokens=20,
                n=2,
                models=["a", "b"],
                transforms=["middle-out"],
                temperature=1,
                logit_bias={"50256": -100},
            )
        )
        assert (
            request.model,
            request.template,
            request.variables,
            request.session_id,
            request.stream,
            request.include_usage,
            request.max_tokens,
            request.n,
            request.models,
            request.transforms,
            request.message_count,
        ) == (
            "openai/gpt-4o",
            "greeting",
            {"city": "Bern"},
            "s-1",
            True,
            True,
            10,
            2,
            ("a", "b"),
            ("middle-out",),
            1,
        )
        assert list(request.fields) == [
            "stream",
            "stream_options",
            "n",
            "temperature",
            "logit_bias",
        ]

    def test_what_holds_when_nothing_is_said(self):
        expected = ChatRequest(fields={}, messages=MESSAGES, message_count=1, text_only=True, variables={})
        assert decode_chat(b'{"messages":' + MESSAGES + b"}") == expected

    @pytest.mark.parametrize(
        ("contents", "expected"),
        [
            (["a"], True),
            ([[{"type": "text", "text": "a"}]], False),
            ([None], False),
            (["a", []], False),
            (["a", "b"], True),
        ],
    )
    def test_whether_there_is_more_than_text(self, contents: list[Any], expected: bool):
        messages = [{"role": "user", "content": content} for content in contents]
        assert decode_chat(body(messages=messages)).text_only == expected

    def test_messages_and_fields_keep_their_bytes(self):
        text = b'"x" : [ 1.00, {"a":"\\u00e9"} ] ,"tools":[ {"type": "function"} ],"session_id":"s","template":"t"'
        request = decode_chat(raw_body(text))
        assert request.messages == MESSAGES
        assert raw_fields(request) == {"x": b'[ 1.00, {"a":"\\u00e9"} ]', "tools": b'[ {"type": "function"} ]'}

    def test_null_is_as_good_as_absent_for_what_the_gateway_knows(self):
        request = decode_chat(body(**dict.fromkeys(KNOWN)))
        assert decode_chat(body()) == request

    def test_null_of_an_unknown_field_is_passed_on(self):
        assert raw_fields(decode_chat(body(response_format=None))) == {"response_format": b"null"}

    @pytest.mark.parametrize("messages", [b"null", b"[]", b" [ ] "])
    def test_a_template_may_stand_for_messages(self, messages: bytes):
        request = decode_chat(b'{"template":"t","messages":' + messages + b"}")
        assert (request.messages, request.message_count) == (None, 0)

    @pytest.mark.parametrize("text", [b"{}", b'{"messages":null}', b'{"messages":[]}', b'{"template":null}'])
    def test_messages_are_missing(self, text: bytes):
        assert complaints(text) == [("missing", ("body", "messages"))]
        assert refusal(text).param == "messages"

    def test_ten_thousand_messages(self):
        messages = [{"role": "user", "content": "Hi"}] * 10_000
        assert decode_chat(body(messages=messages)).message_count == 10_000

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]},
            {"role": "assistant"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "tool", "content": "{}", "tool_call_id": "c"},
        ],
    )
    def test_shapes_of_a_message(self, message: dict[str, Any]):
        assert json.dumps([message]).encode() == decode_chat(body(messages=[message])).messages


class TestBounds:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", 0),
            ("temperature", 2.0),
            ("top_p", 0),
            ("top_p", 1),
            ("frequency_penalty", -2),
            ("presence_penalty", 2),
            ("n", 1),
            ("n", 128),
            ("seed", -(2**63)),
            ("seed", 2**63 - 1),
            ("user", "é" * 256),
            ("stop", "x"),
            ("stop", ["x", "y"]),
            ("tool_choice", "none"),
            ("tool_choice", "auto"),
            ("tool_choice", "required"),
            ("tool_choice", {"type": "function", "function": {"name": "f"}}),
            ("tools", []),
            ("stream_options", {"include_usage": None, "other": 1}),
        ],
    )
    def test_within(self, field: str, value: Any):
        assert list(decode_chat(body(**{field: value})).fields) == [field]

    @pytest.mark.parametrize(
        ("members", "expected"),
        [
            ({"max_tokens": 1}, 1),
            ({"max_completion_tokens": 2**31 - 1}, 2**31 - 1),
            ({"max_completion_tokens": 1, "max_tokens": 16384}, 1),
            ({"max_completion_tokens": 16384, "max_tokens": 1}, 1),
            ({"max_completion_tokens": None, "max_tokens": 5}, 5),
            ({"max_output_tokens": 7}, 7),
            ({"max_tokens": 5, "n_predict": 100_000}, 5),
            ({"max_tokens": 5, "max_new_tokens": 3}, 3),
            ({"n_predict": -1}, None),
            ({"max_tokens": 5, "max_output_tokens": 0}, 5),
            *(
                ({"max_tokens": cap, name: other}, 1)
                for name in (
                    *(
                        "num_predict",
                        "maxOutputTokens",
                        "max_tokens_to_sample",
                        "max_gen_len",
                        "maxTokens",
                        "num_tokens",
                    ),
                    *("max_completion_length", "max_generated_tokens", "MaxNewTokens", "n_tokens"),
                )
                for cap, other in ((1, 16384), (16384, 1), (1, -1))
            ),
            ({"maxOutputTokens": 9, "num_predict": 7, "max_output_tokens": None}, 7),
            ({}, None),
        ],
    )
    def test_the_smallest_cap_counts_by_whatever_name(self, members: dict[str, Any], expected: int | None):
        request = decode_chat(body(**members))
        assert (request.max_tokens, raw_fields(request)) == (expected, {})

    @pytest.mark.parametrize(
        "name",
        [
            *("max_prompt_tokens", "max_thinking_tokens", "max_tool_calls", "max_length", "truncate_prompt_tokens"),
            *("min_tokens", "max_context_length", "tokens", "max_" + "tokens" * 9),
        ],
    )
    def test_what_is_no_cap_on_output_is_left(self, name: str):
        request = decode_chat(body(**{name: 5}))
        assert (request.max_tokens, raw_fields(request)) == (None, {name: b"5"})

    @pytest.mark.parametrize(
        ("members", "expected"), [({"best_of": 8}, 8), ({"n": 2, "best_of": 5}, 5), ({"n": 3, "best_of": None}, 3)]
    )
    def test_every_choice_that_is_generated_counts(self, members: dict[str, Any], expected: int):
        assert decode_chat(body(**members)).n == expected

    @pytest.mark.parametrize(("value", "expected"), [(1.5, 1.5), (400, 400.0), (None, None)])
    def test_a_timeout(self, value: Any, expected: float | None):
        assert decode_chat(body(timeout=value)).timeout_s == expected

    def test_within_what_is_the_gateways_own(self):
        request = decode_chat(body(model="m" * 256, template="t" * 256, session_id="s" * 256, models=["m" * 256] * 32))
        actual = (request.model, request.template, request.session_id, request.models)
        assert actual == ("m" * 256, "t" * 256, "s" * 256, ("m" * 256,) * 32)

    @pytest.mark.parametrize(
        ("field", "value", "kind"),
        [
            ("temperature", -0.1, "greater_than_equal"),
            ("temperature", 2.1, "less_than_equal"),
            ("temperature", "1", "float_type"),
            ("temperature", True, "float_type"),
            ("temperature", 10**400, "number_out_of_range"),
            ("top_p", -0.1, "greater_than_equal"),
            ("top_p", 1.1, "less_than_equal"),
            ("frequency_penalty", -2.1, "greater_than_equal"),
            ("presence_penalty", 2.1, "less_than_equal"),
            ("n", 0, "greater_than_equal"),
            ("n", 129, "less_than_equal"),
            ("n", True, "int_type"),
            ("timeout", 0, "greater_than"),
            ("timeout", -1, "greater_than"),
            ("timeout", "1", "float_type"),
            ("n_predict", "1", "int_type"),
            ("maxOutputTokens", "16384", "int_type"),
            ("best_of", 0, "greater_than_equal"),
            ("max_tokens", 0, "greater_than_equal"),
            ("max_tokens", 2**31, "less_than_equal"),
            ("max_tokens", 10**30, "less_than_equal"),
            ("max_completion_tokens", 1.5, "int_from_float"),
            ("max_completion_tokens", -1, "greater_than_equal"),
            ("seed", 2**63, "less_than_equal"),
            ("seed", -(2**63) - 1, "greater_than_equal"),
            ("seed", 10**400, "less_than_equal"),
            ("user", "x" * 257, "string_too_long"),
            ("user", 7, "string_type"),
            ("session_id", "x" * 257, "string_too_long"),
            ("model", "", "string_too_short"),
            ("model", "x" * 257, "string_too_long"),
            ("template", "x" * 257, "string_too_long"),
            ("model", ["a"], "string_type"),
            ("template", 1, "string_type"),
            ("stream", "true", "bool_type"),
            ("stop", 1, "string_type"),
            ("tools", {}, "list_type"),
            ("tool_choice", "any", "literal_error"),
            ("tool_choice", 1, "string_type"),
            ("stream_options", True, "dict_type"),
            ("models", "a", "list_type"),
            ("models", ["a"] * 33, "too_long"),
            ("variables", ["a"], "dict_type"),
            ("messages", {}, "list_type"),
            ("messages", "Hi", "list_type"),
        ],
    )
    def test_without(self, field: str, value: Any, kind: str):
        assert complaints(body(**{field: value})) == [(kind, ("body", field))]

    @pytest.mark.parametrize(
        ("field", "value", "kind", "inside"),
        [
            ("messages", [{"role": "user"}, {"content": "x"}], "missing", (1, "role")),
            ("messages", [{"role": 1}], "string_type", (0, "role")),
            ("messages", ["Hi"], "dict_type", (0,)),
            ("messages", [{"role": "user", "content": 1}], "string_type", (0, "content")),
            ("messages", [{"role": "user", "content": {}}], "string_type", (0, "content")),
            ("messages", [{"role": "user", "content": [{}, "Hi"]}], "dict_type", (0, "content", 1)),
            ("stop", ["a", 1], "string_type", (1,)),
            ("tools", [{}, "f"], "dict_type", (1,)),
            ("transforms", ["middle-out", "other"], "literal_error", (1,)),
            ("models", ["a", ""], "string_too_short", (1,)),
            ("stream_options", {"include_usage": 1}, "bool_type", ("include_usage",)),
            ("variables", {"a": "x", "b": 1}, "string_type", ("b",)),
            ("variables", {"b" * 257: 1}, "string_type", ("b" * 256,)),
        ],
    )
    def test_without_and_where(self, field: str, value: Any, kind: str, inside: tuple[str | int, ...]):
        assert complaints(body(**{field: value})) == [(kind, ("body", field, *inside))]

    def test_all_that_is_wrong_is_told_at_once(self):
        response = refusal(b'{"temperature":3,"n":0,"variables":{"a":1,"b":null},"stream":1}')
        assert [(detail.type, detail.loc) for detail in response.details] == [
            ("less_than_equal", ("body", "temperature")),
            ("greater_than_equal", ("body", "n")),
            ("string_type", ("body", "variables", "a")),
            ("string_type", ("body", "variables", "b")),
            ("bool_type", ("body", "stream")),
            ("missing", ("body", "messages")),
        ]
        assert response.message == "Invalid request: temperature: Expected float <= 2.0 (and 5 more)"
        assert response.param == "temperature"

    def test_a_thousand_complaints_are_cut(self):
        assert len(refusal(body(variables=dict.fromkeys(map(str, range(1000)), 1))).details) == 32

    def test_a_template_that_is_wrong_leaves_no_messages_missing(self):
        assert complaints(b'{"template":1}') == [("string_type", ("body", "template"))]

    @pytest.mark.parametrize(
        ("text", "expected", "param"),
        [
            (
                body(tool_choice="any"),
                "tool_choice: Invalid enum value 'any': expected none, auto, required or an object",
                "tool_choice",
            ),
            (body(transforms=["x"]), "transforms[0]: Invalid enum value 'x': expected middle-out", "transforms[0]"),
            (b"{}", "messages: Field required: give messages, or a template that has some", "messages"),
            (b'{"x":"\xff"}', "JSON is not valid UTF-8 (byte 6)", None),
            (b"{", "Input data was truncated", None),
            pytest.param(
                body(x="x" * 1_048_576),
                "All but messages, tools, functions, response_format, prediction must fit into 1048576 bytes",
                None,
                id="large",
            ),
        ],
    )
    def test_what_is_wrong_is_told_in_words(self, text: bytes, expected: str, param: str | None):
        response = refusal(text)
        assert (response.message, response.param) == (f"Invalid request: {expected}", param)


class TestBadInput:
    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b" ",
            b"hello",
            b"{",
            b'{"messages":[}',
            b'{"messages":[]}x',
            b"{'messages':[]}",
            b'\xef\xbb\xbf{"messages":[]}',
            '{"messages":[]}'.encode("utf-16"),
            b'{"messages":[{"role":"user","content":"\xff"}]}',
            b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
            b'{"messages":[{"role":"user","content":"a\nb"}]}',
            b'{"x":NaN}',
            b'{"x":Infinity}',
            b'{"x":01}',
            b'{"\xff":1}',
            b'{"x":"\xff"}',
            pytest.param(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="deep in a field"),
            pytest.param(b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="deep messages"),
            pytest.param(
                b'{"messages":[{"role":"user","content":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}]}",
                id="deep content",
            ),
            pytest.param(b'{"x":' + b"[" * 100_000, id="deep and cut"),
        ],
    )
    def test_not_json(self, text: bytes):
        assert complaints(text) == [("json_invalid", ("body",))]

    @pytest.mark.parametrize(
        ("text", "param"),
        [
            (b'{"session_id":"\\ud800"}', "session_id"),
            (b'{"session_id":"\\udc00 and more"}', "session_id"),
            (b'{"model":"a \\\\ud800 and a \\ud83d\\ude00","user":"\\ud83d\\u0041"}', "user"),
            (
                b'{"messages":[{"role":"user","content":"x"},{"role":"user","content":"\\ud83d"}]}',
                "messages[1].content",
            ),
            (b'{"stop":["a","\\ud83d\\ud83d\\ude00"]}', "stop[1]"),
            (b'{"\\ud800":1}', None),
        ],
    )
    def test_half_a_surrogate_pair_is_named_with_its_field(self, text: bytes, param: str | None):
        response = refusal(text)
        where = f"{param}: " if param else ""
        message = f"Invalid request: {where}Half a surrogate pair is no character"
        assert (response.message, response.param, response.details[0].type) == (message, param, "string_unicode")

    @pytest.mark.parametrize("text", [b'{"user":"\\ud800', b'{"user":"\\ud800"} x'])
    def test_a_body_that_is_not_json_without_it_either(self, text: bytes):
        assert complaints(text) == [("json_invalid", ("body",))]

    @pytest.mark.parametrize("text", [b"[]", b"null", b'"x"', b"1", b"true", pytest.param(b"[" * 100_000, id="deep")])
    def test_json_but_not_an_object(self, text: bytes):
        assert complaints(text) == [("dict_type", ("body",))]

    def test_of_two_members_with_one_name_the_last_wins(self):
        request = decode_chat(raw_body(b'"max_tokens":1,"max_tokens":2,"x":1,"x":2,"model":"a","mod\\u0065l":"b"'))
        assert (request.max_tokens, request.model, raw_fields(request)) == (2, "b", {"x": b"2"})

    def test_the_first_of_two_members_with_one_name_may_be_invalid(self):
        request = decode_chat(raw_body(b'"n":"x","n":2,"num_predict":"x","num_predict":5'))
        assert (request.n, request.max_tokens, raw_fields(request)) == (2, 5, {"n": b"2"})

    def test_huge_numbers_of_unknown_fields_pass_as_they_are(self):
        number = b"9" * 10_000
        assert raw_fields(decode_chat(raw_body(b'"x":' + number + b',"y":1e999'))) == {"x": number, "y": b"1e999"}

    @pytest.mark.parametrize("name", ["seed", "n", "max_tokens", "temperature"])
    def test_huge_numbers_of_known_fields_are_out_of_range(self, name: str):
        assert complaints(raw_body(b'"%s":%s' % (name.encode(), b"9" * 10_000))) == [
            ("number_out_of_range", ("body", name))
        ]

    @pytest.mark.parametrize("name", ["messages", "tools", "functions", "response_format", "prediction"])
    def test_bulk_may_be_large(self, name: str):
        bulk = [{"role": "user", "content": "x" * 2_097_152}]
        request = decode_chat(body(**{name: bulk}))
        assert len(request.messages or b"") + len(bytes(request.fields.get(name, Raw()))) > 2_097_152

    @pytest.mark.parametrize(
        "member, value",
        [
            ("tools", b"[" + b"{}," * 2_000_000 + b"{}]"),
            ("messages", b"[" + b'{"role":"user","content":""},' * 300_000 + b'{"role":"user","content":"x"}]'),
        ],
    )
    def test_what_has_millions_of_elements_is_not_taken_apart(self, member: str, value: bytes):
        members = {"messages": b'[{"role":"user","content":"x"}]', member: value}
        text = b"{" + b",".join(b'"%b":%b' % (name.encode(), raw) for name, raw in members.items()) + b"}"
        with pytest.raises(GatewayError) as caught:
            decode_chat(text)
        assert [(d.type, d.loc) for d in caught.value.response.details] == [("too_long", ("body", member))]

    @pytest.mark.parametrize("bulk", [b"[]", b"[" + b"{}," * 400_000 + b"{}]"], ids=["no", "large"])
    def test_all_else_has_a_largest_size(self, bulk: bytes):
        text = b'{"template":"t","tools":' + bulk + b"}"
        largest = text.ljust(1_048_576 + len(bulk))
        assert decode_chat(largest).fields.keys() == {"tools"}
        assert complaints(largest + b" ") == [("too_long", ("body",))]

    @pytest.mark.parametrize(
        "members", [{"variables": {str(n): "" for n in range(200_000)}}, {str(n): n for n in range(200_000)}]
    )
    def test_a_hundred_thousand_members_are_too_many(self, members: dict[str, Any]):
        assert complaints(body(**members)) == [("too_long", ("body",))]

    def test_slots_in_variables_are_only_text(self):
        assert decode_chat(body(variables={"a": "{{b}}"})).variables == {"a": "{{b}}"}


class TestEncode:
    def test_the_provider_gets_the_bytes_of_messages_and_fields(self):
        request = decode_chat(raw_body(b'"x":[ 1.00 ],"temperature":1.0'))
        expected = b'{"model":"gpt-4o","messages":' + MESSAGES + b',"x":[ 1.00 ],"temperature":1.0}'
        assert encode_upstream(request, model="gpt-4o", messages=MESSAGES, native=False) == expected

    def test_mesh_s_own_fields_stay_here(self):
        request = decode_chat(
            body(
                template="t",
                variables={"a": "b"},
                session_id="s",
                timeout=3,
                cache=True,
                modality="text",
                image={"n": 1},
                async_mode=False,
                models=["m"],
                transforms=["middle-out"],
                model="x",
            )
        )
        assert sent(request).keys() == {"model", "messages"}

    def test_a_native_provider_gets_models_and_transforms(self):
        request = decode_chat(body(session_id="s", models=["a", "b"], transforms=["middle-out"]))
        actual = sent(request, native=True, models=["a", "b"])
        assert actual.keys() == {"model", "messages", "models", "transforms"}
        assert (actual["models"], actual["transforms"]) == (["a", "b"], ["middle-out"])

    def test_a_native_provider_isn_t_told_what_wasn_t_said(self):
        assert sent(decode_chat(body()), native=True).keys() == {"model", "messages"}

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (None, {"include_usage": True}),
            ({}, {"include_usage": True}),
            (
                {"include_usage": False, "include_obfuscation": False},
                {"include_usage": True, "include_obfuscation": False},
            ),
            ({"include_usage": None}, {"include_usage": True}),
            ({"include_usage": True, "x": 1}, {"include_usage": True, "x": 1}),
        ],
    )
    def test_a_stream_always_asks_for_usage(self, options: Any, expected: dict[str, Any]):
        assert sent(decode_chat(body(stream=True, stream_options=options)))["stream_options"] == expected

    @pytest.mark.parametrize("options", [None, {"include_usage": True}])
    def test_a_provider_that_refuses_stream_options_gets_none(self, options: Any):
        actual = sent(decode_chat(body(stream=True, stream_options=options)), stream_usage=False)
        assert actual.keys() == {"model", "messages", "stream"}

    def test_what_asks_for_usage_itself_keeps_its_bytes(self):
        options = b'"stream":true,"stream_options":{ "include_usage" : true }'
        expected = b'{"model":"m","messages":' + MESSAGES + b"," + options + b"}"
        assert encode_upstream(decode_chat(raw_body(options)), model="m", messages=MESSAGES) == expected

    def test_what_is_no_stream_asks_for_nothing(self):
        assert "stream_options" not in sent(decode_chat(body(stream=False)))

    def test_params_fill_what_the_request_lacks(self):
        request = decode_chat(body(temperature=0.5, top_p=None))
        params = {"temperature": b"1", "top_p": b"0.25", "seed": b"7", "stop": b"null"}
        actual = sent(request, params=params)
        assert (actual["temperature"], actual["top_p"], actual["seed"]) == (0.5, 0.25, 7)
        assert "stop" not in actual

    def test_params_can_t_change_the_shape_of_a_request(self):
        params = dict.fromkeys(
            (
                "model",
                "messages",
                "stream",
                "stream_options",
                "models",
                "transforms",
                "template",
                "variables",
                "session_id",
                "timeout",
                "cache",
            ),
            b"1",
        )
        assert sent(decode_chat(body()), params=params) == {
            "model": "gpt-4o",
            "messages": [{"role": "user", "content": "Hi"}],
        }

    @pytest.mark.parametrize(
        ("members", "params", "expected"),
        [
            ({}, {}, {"max_completion_tokens": 7}),
            ({"max_tokens": 9}, {}, {"max_completion_tokens": 7}),
            ({"max_completion_tokens": 9}, {}, {"max_completion_tokens": 7}),
            ({"max_tokens": 9, "max_completion_tokens": 9}, {}, {"max_completion_tokens": 7}),
            ({"n_predict": 9, "max_output_tokens": 8}, {}, {"max_completion_tokens": 7}),
            ({}, {"max_tokens": b"9"}, {"max_completion_tokens": 7}),
        ],
    )
    def test_one_cap_goes_out_under_one_name(self, members: Any, params: Any, expected: dict[str, int]):
        actual = sent(decode_chat(body(**members)), params=params, max_tokens=7)
        assert {name: value for name, value in actual.items() if "max" in name or "predict" in name} == expected

    def test_a_cap_leaves_the_other_fields(self):
        actual = sent(decode_chat(body(x=1, max_tokens=9)), max_tokens=7)
        assert actual.keys() == {"model", "messages", "x", "max_completion_tokens"}

    @pytest.mark.parametrize("members", [{"max_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 9}])
    def test_the_clients_cap_goes_where_the_provider_reads_it(self, members: Any):
        actual = sent(decode_chat(body(**members)), cap_field="max_tokens")
        assert (actual.keys(), actual["max_tokens"]) == ({"model", "messages", "max_tokens"}, 7)

    def test_encoding_twice_gives_the_same(self):
        request = decode_chat(body(stream=True, max_tokens=3))
        assert sent(request, max_tokens=2) == sent(request, max_tokens=2)
        assert raw_fields(request) == {"stream": b"true"}


class TestWithParams:
    def test_n_and_the_cap_of_params_count(self):
        request = with_params(decode_chat(body()), {"n": b"3", "max_tokens": b"9", "x": b"1"})
        assert (request.n, request.max_tokens, raw_fields(request)) == (
            3,
            9,
            {"n": b"3", "x": b"1"},
        )

    def test_the_request_wins(self):
        asked = decode_chat(body(n=2, max_tokens=5))
        assert asked == with_params(asked, {"n": b"3", "max_completion_tokens": b"9"})

    def test_a_cap_of_the_request_keeps_no_other_param_away(self):
        request = with_params(decode_chat(body(max_tokens=5)), {"temperature": b"1", "n": b"3"})
        assert (request.max_tokens, raw_fields(request)) == (5, {"temperature": b"1", "n": b"3"})

    @pytest.mark.parametrize(("one", "other"), [(b"9", b"7"), (b"7", b"9")])
    def test_of_two_caps_in_params_the_smaller_counts(self, one: bytes, other: bytes):
        request = with_params(decode_chat(body()), {"max_tokens": one, "max_completion_tokens": other})
        assert (request.max_tokens, raw_fields(request)) == (7, {})

    def test_a_param_that_is_nested_too_deeply_is_named(self):
        with pytest.raises(GatewayError) as caught:
            with_params(decode_chat(body()), {"tools": b'[{"a":' + b"[" * 100_000})
        expected = (Detail("json_invalid", ("params", "tools"), "JSON is nested too deeply"),)
        assert caught.value.response.details == expected

    def test_a_param_out_of_bounds_is_named(self):
        with pytest.raises(GatewayError) as caught:
            with_params(decode_chat(body()), {"n": b"0"})
        assert (Detail("greater_than_equal", ("params", "n"), "Expected int >= 1"),) == caught.value.response.details


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, False),
        ({"reasoning": {"exclude": True, "effort": "high"}}, True),
        ({"reasoning": {"exclude": True}}, True),
        ({"reasoning": {"effort": "low"}}, True),
        ({"reasoning": {"max_tokens": 2000}}, True),
        ({"reasoning": {"enabled": True}}, True),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": None}, False),
        ({"reasoning": []}, False),
        ({"include_reasoning": False}, True),
        ({"include_reasoning": True}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_format": "hidden"}, True),
        ({"reasoning_format": "parsed"}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"extra_body": {"google": {"thinking_config": {"thinking_budget": 800}}}}, True),
        ({"extra_body": {"google": {}}}, False),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False, "thinking_budget": 0}, False),
        ({"thinking_budget": 900}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False, "add_generation_prompt": True}}, False),
        ({"prompt_mode": "reasoning"}, True),
        ({"prompt_mode": None}, False),
    ],
)
def test_what_asks_for_reasoning_that_may_be_hidden(members: dict[str, Any], expected: bool):
    assert hides_reasoning(decode_chat(body(**members)).fields) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted(KNOWN | {"messages"}))
MESSAGE_LISTS = st.lists(
    st.fixed_dictionaries({"role": st.text()}, optional={"content": JSON, "name": JSON}), max_size=3
)


def decoded(text: bytes) -> ChatRequest | None:
    try:
        return decode_chat(text)
    except GatewayError as fault:
        response = fault.response
    assert response.status == 422
    assert response.details
    return None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_fault(text: bytes):
    decoded(text)


@given(st.binary(max_size=40), NAMES)
def test_any_bytes_in_a_field_are_a_request_or_a_fault(text: bytes, name: str):
    decoded(b'{"messages":[{"role":"user"}],"' + name.encode() + b'":' + text + b"}")


@given(st.dictionaries(NAMES | st.text(), JSON, max_size=6), MESSAGE_LISTS)
def test_any_values_are_a_request_that_goes_out_whole_or_a_fault(members: dict[str, Any], messages: list[Any]):
    members.setdefault("messages", messages)
    request = decoded(json.dumps(members).encode("utf-8", "surrogatepass"))
    if request is None:
        return
    actual = msgspec.json.decode(encode_upstream(request, model="m", messages=request.messages or b"[]", native=True))
    own = {"template", "variables", "session_id", "timeout", "cache", "modality", "image", "async_mode"}
    expected = {name for name, value in members.items() if name not in own | CAPS and value not in (None, [])}
    assert expected - {"model", "messages"} <= actual.keys()
    assert not own & actual.keys()
