import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import UpstreamFault, upstream_error
from meshproxy.wire.usage import Reply, Usage, decode_reply, decode_usage, decode_value, output_bytes


def report(**members: Any) -> bytes:
    return json.dumps({"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18, **members}).encode()


def test_the_total_is_prompt_and_completion():
    assert [usage.total for usage in (Usage(), Usage(prompt=10, completion=8, cached=4))] == [0, 18]


DEEP = pytest.param(b'{"a":' + b"[" * 100_000, id="deep")


class TestDecodeUsage:
    def test_openai_s_shape(self):
        expected = Usage(prompt=10, completion=8, cached=4, reasoning=5, audio_prompt=2, audio_completion=3)
        actual = decode_usage(
            report(
                prompt_tokens_details={"cached_tokens": 4, "audio_tokens": 2},
                completion_tokens_details={"reasoning_tokens": 5, "audio_tokens": 3, "accepted_prediction_tokens": 0},
            )
        )
        assert expected == actual

    def test_openrouter_s_shape(self):
        expected = Usage(prompt=10, completion=8, cached=4, cache_write=6)
        actual = decode_usage(
            report(cost=0.00014, is_byok=False, prompt_tokens_details={"cached_tokens": 4, "cache_write_tokens": 6})
        )
        assert expected == actual

    @pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None, "reasoning_tokens": None}])
    def test_details_may_be_missing(self, details: Any):
        assert decode_usage(report(prompt_tokens_details=details, completion_tokens_details=details)) == Usage(10, 8)

    @pytest.mark.parametrize("count", [0, 2**53])
    def test_a_count_has_bounds(self, count: int):
        assert Usage(count, count) == decode_usage(report(prompt_tokens=count, completion_tokens=count))

    @pytest.mark.parametrize("text", [b"null", b"{}", b"[]", b"7", b'"x"', b"", b"{", b"\xff", DEEP])
    def test_what_is_no_usage(self, text: bytes):
        assert decode_usage(text) is None

    @pytest.mark.parametrize("count", [-1, 1.5, "7", None, True, 2**53 + 1, 10**30])
    @pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
    def test_a_count_that_can_t_be_true(self, name: str, count: Any):
        assert decode_usage(report(**{name: count})) is None

    @pytest.mark.parametrize(
        ("whole", "parts"),
        [
            ("prompt", {"cached_tokens": 11}),
            ("prompt", {"cache_write_tokens": 11}),
            ("prompt", {"cached_tokens": 6, "cache_write_tokens": 5}),
            ("prompt", {"audio_tokens": 11}),
            ("prompt", {"cached_tokens": -1}),
            ("completion", {"reasoning_tokens": 9}),
            ("completion", {"audio_tokens": 9}),
            ("completion", {"reasoning_tokens": 4, "audio_tokens": 5}),
            ("completion", {"reasoning_tokens": 1.5}),
        ],
    )
    def test_parts_that_don_t_fit_their_whole(self, whole: str, parts: dict[str, Any]):
        assert decode_usage(report(**{f"{whole}_tokens_details": parts})) is None

    def test_parts_that_fill_their_whole(self):
        parts = {"cached_tokens": 4, "cache_write_tokens": 6, "audio_tokens": 10}
        expected = Usage(prompt=10, completion=8, cached=4, cache_write=6, audio_prompt=10)
        assert expected == decode_usage(report(prompt_tokens_details=parts))


class TestDecodeReply:
    def test_a_whole_answer(self):
        body = (
            b'{"id":"x","model":"gpt-4o-2024","choices":[{"message":{"content":"\xc3\xa9"}}],"usage":' + report() + b"}"
        )
        assert Reply(usage=Usage(10, 8), model="gpt-4o-2024") == decode_reply(body)

    @pytest.mark.parametrize(
        "body",
        [
            b'{"model":"\xff","error":"\xff"}',
            b"{}",
            b'{"usage":null,"model":null,"error":null}',
            b'{"usage":[],"model":7}',
        ],
    )
    def test_an_answer_that_says_nothing(self, body: bytes):
        assert Reply() == decode_reply(body)

    def test_an_error_with_a_200(self):
        assert Reply(error={"code": 502}) == decode_reply(b'{"error":{"code":502}}')

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"[]",
            b"null",
            b"<html>",
            b'{"a":',
            b"\xff",
            b'{"\xff":1}',
            pytest.param(b'{"a":' + b"[" * 100_000, id="deep"),
        ],
    )
    def test_what_is_no_json_object(self, body: bytes):
        with pytest.raises(UpstreamFault) as caught:
            decode_reply(body)
        problem = upstream_error("The provider's answer is not a JSON object.", may_have_run=True)
        assert (problem, False) == (caught.value.problem, caught.value.safe_to_repeat)

    @given(st.binary(max_size=100))
    def test_any_bytes_are_a_reply_or_a_fault(self, body: bytes):
        try:
            decode_reply(b'{"usage":' + body + b"}")
        except UpstreamFault as fault:
            problem = fault.problem
        else:
            return
        assert problem.status == 502


@pytest.mark.parametrize("raw", [None, b"", b"{", b"x", b'"\xff"', DEEP])
def test_what_is_no_json_has_no_value(raw: bytes | None):
    assert decode_value(raw) is None


def message(value: Any) -> bytes:
    return json.dumps({"choices": [{"message": value}]}).encode()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (message({"content": "four"}), 4),
        (message({"content": "\u00e9\u20ac", "refusal": None}), 5),
        (message({"content": "\U0001f600"}), 4),
        (message({"role": "ab", "content": [{"text": "cde"}, "f", 7, None, True]}), 6),
        (message({"tool_calls": [{"function": {"name": "ab", "arguments": "{}"}}]}), 4),
        (b'{"choices":[{"message":{"content":"ab"}},{"message":{"content":"c"}},{"index":2},"odd"]}', 3),
        (b'{"choices":[]}', 0),
        (b'{"choices":null}', 0),
        (b"{}", 0),
        (b"[]", 0),
        (b"\xff", 0),
        (b'{"choices":"\xff"}', 0),
        (b'{"choices":[{"message":"\\ud800"}]}', 0),
        (b'{"error":{"message":"ab"},"choices":[{"logprobs":"cd"}]}', 0),
    ],
)
def test_output_is_the_bytes_of_every_text_in_every_choice(body: bytes, expected: int):
    assert expected == output_bytes(body)
