import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from meshproxy.errors import UpstreamError, upstream_error
from meshproxy.openai.usage import ProviderAnswer, Usage, decode_answer, decode_members, decode_value, find_report


def report(**members: Any) -> bytes:
    return json.dumps({"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18, **members}).encode()


def test_the_total_is_prompt_and_completion():
    assert [usage.total for usage in (Usage(), Usage(prompt=10, completion=8, cached=4))] == [0, 18]


DEEP = pytest.param(b'{"a":' + b"[" * 100_000, id="deep")


def usage_of(told: Any, *, window: int = 128_000, choices: int = 1) -> tuple[Usage, list[str]] | None:
    """The usage in a member `usage`, and the reasons why some of it was refused."""
    found = find_report({"usage": Raw(json.dumps(told).encode())})
    if found is None:
        return None
    usage, refused = found.settled(window, choices)
    return usage, [refusal.reason for refusal in refused]


def told(prompt: Any, completion: Any, total: Any = None, **members: Any) -> dict[str, Any]:
    wholes = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {**wholes, **({} if total is None else {"total_tokens": total}), **members}


def prompt_parts(**parts: Any) -> dict[str, Any]:
    return {"prompt_tokens_details": parts}


def completion_parts(**parts: Any) -> dict[str, Any]:
    return {"completion_tokens_details": parts}


class TestDialects:
    @pytest.mark.parametrize(
        ("report", "expected"),
        [
            pytest.param(
                told(
                    10, 8, 18, **prompt_parts(cached_tokens=4, audio_tokens=2), **completion_parts(reasoning_tokens=5)
                ),
                Usage(10, 8, cached=4, reasoning=5, audio_prompt=2),
                id="openai",
            ),
            pytest.param(
                told("900", "50", "950", **prompt_parts(cached_tokens="600")), Usage(900, 50, cached=600), id="strings"
            ),
            *(
                pytest.param(told(300, 50, 1050, **parts), Usage(1000, 50), id=f"beside the prompt: {parts}")
                for parts in (
                    prompt_parts(image_tokens=700),
                    prompt_parts(text_tokens=300, image_tokens=200, video_tokens=500),
                    {"tool_use_prompt_tokens": 700},
                )
            ),
            pytest.param(told(1000, 50, 1050, **prompt_parts(image_tokens=700)), Usage(1000, 50), id="image within"),
            pytest.param(
                told(300, 50, 1050, **prompt_parts(image_tokens=200)),
                Usage(300, 750, reasoning=700),
                id="image, and thoughts",
            ),
            pytest.param(
                told(10, 8, 18, cost=0.1, **prompt_parts(cached_tokens=4, cache_write_tokens=6)),
                Usage(10, 8, cached=4, cache_write=6),
                id="openrouter",
            ),
            pytest.param(
                told(32, 9, 135, **completion_parts(reasoning_tokens=94)),
                Usage(32, 103, reasoning=94),
                id="xai, reasoning beside",
            ),
            pytest.param(
                told(32, 100, 142, **completion_parts(reasoning_tokens=10)),
                Usage(32, 110, reasoning=10),
                id="xai, less reasoning than text",
            ),
            pytest.param(
                told(32, 103, 135, **completion_parts(reasoning_tokens=94)),
                Usage(32, 103, reasoning=94),
                id="reasoning within",
            ),
            pytest.param(told(12, 20, 1532), Usage(12, 1520, reasoning=1500), id="gemini"),
            pytest.param(
                told(7, 50, 57, **prompt_parts(cached_tokens=10_000)),
                Usage(10_007, 50, cached=10_000),
                id="cache beside, not in the total",
            ),
            pytest.param(
                told(900, 50, 1550, **prompt_parts(cached_tokens=600)),
                Usage(1500, 50, cached=600),
                id="cache beside, in the total",
            ),
            pytest.param(
                {
                    "input_tokens": 900,
                    "output_tokens": 50,
                    "cache_read_input_tokens": 600,
                    "cache_creation_input_tokens": 300,
                    "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200},
                },
                Usage(1800, 50, cached=600, cache_write=300, cache_write_1h=200),
                id="anthropic",
            ),
            pytest.param(
                told(900, 50, 950, cache_read_input_tokens=600, cache_creation_input_tokens=0),
                Usage(900, 50, cached=600),
                id="anthropic's names within the prompt (LiteLLM)",
            ),
            pytest.param(
                {"input_tokens": 900, "output_tokens": 50, "input_tokens_details": {"cached_tokens": 600}},
                Usage(900, 50, cached=600),
                id="responses",
            ),
            pytest.param(
                told(900, 50, 950, prompt_cache_hit_tokens=600, prompt_cache_miss_tokens=300),
                Usage(900, 50, cached=600),
                id="deepseek",
            ),
            pytest.param(told(900, 50, 950, cached_tokens=600), Usage(900, 50, cached=600), id="moonshot"),
            pytest.param(
                told(900, 50, 950, num_cached_tokens=600, prompt_token_details={"cached_tokens": 600}),
                Usage(900, 50, cached=600),
                id="mistral",
            ),
            pytest.param(
                told(20, 50, 70, citation_tokens=7299, num_search_queries=3, reasoning_tokens=7000),
                Usage(7319, 7050, reasoning=7000),
                id="perplexity",
            ),
            pytest.param(
                told(20, 50, 70, citation_tokens=100, reasoning_tokens=30),
                Usage(120, 80, reasoning=30),
                id="perplexity, little reasoning",
            ),
            pytest.param(
                told(900, 50, 950, input_tokens=0, output_tokens=0, input_tokens_details=None),
                Usage(900, 50),
                id="empty second names",
            ),
        ],
    )
    def test_a_dialect(self, report: dict[str, Any], expected: Usage):
        assert usage_of(report) == (expected, [])

    @pytest.mark.parametrize(
        ("report", "expected"),
        [
            (told(5000.0, 50.0, 5050.0), Usage(5000, 50)),
            (told(900, 50, 950, **prompt_parts(cached_tokens=12.0)), Usage(900, 50, cached=12)),
            (told(800, None, 800), Usage(800, 0)),
            (told(None, 50, 950), Usage(900, 50)),
            (told(900, None, 950), Usage(900, 50)),
            (told(900, 50, 0), Usage(900, 50)),
            (told(900, 50, 3), Usage(900, 50)),
            (told(900, 50, prompt_tokens_details=[], completion_tokens_details="none"), Usage(900, 50)),
            (told(900, 50, **prompt_parts(cached_tokens=None)), Usage(900, 50)),
            (told(0, 0, 0), Usage()),
            (told(0, 0, 70), Usage()),
            ({}, Usage()),
        ],
    )
    def test_what_is_odd_but_clear(self, report: dict[str, Any], expected: Usage):
        assert usage_of(report) == (expected, [])

    @pytest.mark.parametrize(
        ("report", "expected", "reason"),
        [
            (told(-5, 50), Usage(0, 50), "negative"),
            (told(900, -1.0), Usage(900, 0), "negative"),
            (told("9oo", 50), Usage(0, 50), "no_number"),
            (told("-900", 50), Usage(0, 50), "no_number"),
            (told("9" * 40, 50), Usage(0, 50), "no_number"),
            (told(900.5, 50), Usage(0, 50), "no_number"),
            (told(True, 50), Usage(0, 50), "no_number"),
            (told({"a": 1}, 50), Usage(0, 50), "no_number"),
            (told(10**30, 50), Usage(0, 50), "over_window"),
            (told(1e300, 50), Usage(0, 50), "over_window"),
            (told(900, 10**9), Usage(900, 0), "over_window"),
            (told(900, 50, 10**9), Usage(900, 50), "over_window"),
            (told(900, 50, **prompt_parts(cached_tokens=-1)), Usage(900, 50), "negative"),
            (told(900, 50, **prompt_parts(cached_tokens=10**9)), Usage(900, 50), "over_window"),
            (told(900, 50, **prompt_parts(cached_tokens=134_000)), Usage(900, 50), "over_window"),
            (told(900, 50, **completion_parts(reasoning_tokens=134_390)), Usage(900, 50), "over_window"),
            (told(900, 50, citation_tokens=134_000), Usage(900, 50), "over_window"),
            (told(900, 50, cost=-1), Usage(900, 50), "cost"),
        ],
    )
    def test_a_bad_number_spoils_only_itself(self, report: dict[str, Any], expected: Usage, reason: str):
        assert usage_of(report) == (expected, [reason])

    def test_each_choice_has_a_window(self):
        assert usage_of(told(100, 2500), window=1000, choices=3) == (Usage(100, 2500), [])

    def test_a_window_is_quoted_in_round_numbers(self):
        assert usage_of(told(131_072, 1)) == (Usage(131_072, 1), [])

    @pytest.mark.parametrize("text", [b"null", b"[]", b"7", b'"x"', b"", b"{", DEEP])
    def test_what_is_no_report(self, text: bytes):
        assert find_report({"usage": Raw(text)}) is None

    @pytest.mark.parametrize(
        "event",
        [
            {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}},
            {"choices": [], "x_groq": {"id": "r", "usage": {"prompt_tokens": 9, "completion_tokens": 2}}},
            {"choices": [{"index": 0, "usage": {"prompt_tokens": 9, "completion_tokens": 2}}], "usage": None},
        ],
    )
    def test_the_places_of_a_report(self, event: dict[str, Any]):
        members = decode_members(json.dumps(event).encode())
        assert members is not None
        found = find_report(members)
        assert found is not None
        assert found.settled(1000)[0] == Usage(9, 2)

    @pytest.mark.parametrize(
        ("older", "newer", "expected"),
        [
            (told(500, 75, 575), told(0, 0, 0), Usage(500, 75)),
            (told(8, 0, 8), told(8, 50, 58), Usage(8, 50)),
            (told(900, 1, 901), {"completion_tokens": 50}, Usage(900, 50)),
            (told(8, 1, 9), told(8, 2, 10), Usage(8, 2)),
        ],
    )
    def test_of_two_reports_numbers_beat_zeros(self, older: dict[str, Any], newer: dict[str, Any], expected: Usage):
        first, last = (find_report({"usage": Raw(json.dumps(report).encode())}) for report in (older, newer))
        assert last is not None
        assert last.over(first).settled(128_000)[0] == expected

    @pytest.mark.parametrize(
        ("report", "expected"), [(told(8, 0, 8), False), (told(8, 5), True), (told(8, None, 9), True), ({}, False)]
    )
    def test_whether_it_counts_the_output(self, report: dict[str, Any], expected: bool):
        found = find_report({"usage": Raw(json.dumps(report).encode())})
        assert found is not None
        assert found.counts_output == expected

    @pytest.mark.parametrize(
        ("members", "expected"),
        [
            ({"cost": 0.00014}, "0.00014"),
            ({"cost": 0}, "0"),
            ({"cost": 0.5, "is_byok": True, "cost_details": {"upstream_inference_cost": 10}}, "10.5"),
            ({"cost": 0.5, "is_byok": False, "cost_details": {"upstream_inference_cost": 0.4}}, "0.5"),
            ({"cost": {"input_tokens_cost": 0.1, "total_cost": 0.25}}, "0.25"),
            ({"cost_in_usd_ticks": 37_756_000}, "0.0037756"),
            ({"cost": None}, None),
            ({"cost": -0.1}, None),
            ({"cost": "0.1"}, "0.1"),
            ({"cost": {"total_cost": "0.25"}}, "0.25"),
            ({"cost": "1e9"}, None),
            ({"cost": "n/a"}, None),
            ({"cost": 1e9}, None),
            ({"cost_in_usd_ticks": 10**20}, None),
            ({}, None),
        ],
    )
    def test_the_provider_s_own_figure(self, members: dict[str, Any], expected: str | None):
        found = find_report({"usage": Raw(json.dumps(told(1, 1) | members).encode())})
        assert found is not None
        assert (None if expected is None else Decimal(expected)) == found.cost_usd

    @pytest.mark.parametrize("text", [b"1e999999999999", b"1e-999999999999", b"1" + b"0" * 5000])
    @pytest.mark.parametrize("name", [b"cost", b"cost_in_usd_ticks", b"prompt_tokens"])
    def test_a_number_of_any_size_is_read_at_once(self, name: bytes, text: bytes):
        found = find_report({"usage": Raw(b'{"completion_tokens":5,"%s":%s}' % (name, text))})
        assert found is not None
        assert found.settled(1000)[0] == Usage(0, 5)

    @pytest.mark.parametrize(
        ("event", "expected"),
        [
            ({"usage": told(1, 1), "service_tier": "flex"}, "flex"),
            ({"usage": told(1, 1, service_tier="priority")}, "priority"),
            ({"usage": told(1, 1, service_tier=7), "service_tier": None}, None),
        ],
    )
    def test_the_tier_that_was_served(self, event: dict[str, Any], expected: str | None):
        found = find_report(decode_members(json.dumps(event).encode()) or {})
        assert found is not None
        assert found.service_tier == expected


NUMBERS = st.integers(-2, 300) | st.sampled_from([None, 1.5, 12.0, "7", True, [], {}, 10**30, 1e300])
DETAILS = st.dictionaries(
    st.sampled_from(["cached_tokens", "cache_write_tokens", "reasoning_tokens", "audio_tokens", "x"]), NUMBERS
)
TOLD = st.dictionaries(
    st.sampled_from(
        [
            "prompt_tokens",
            "completion_tokens",
            "total_tokens",
            "input_tokens",
            "output_tokens",
            "cached_tokens",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
            "citation_tokens",
            "reasoning_tokens",
            "cost",
        ]
    ),
    NUMBERS,
)


@given(TOLD, DETAILS, DETAILS, st.integers(1, 400), st.integers(1, 3))
def test_parts_fit_their_wholes_and_wholes_the_window(
    wholes: dict[str, Any], prompt: dict[str, Any], completion: dict[str, Any], window: int, choices: int
):
    report = {**wholes, "prompt_tokens_details": prompt, "completion_tokens_details": completion}
    found = usage_of(report, window=window, choices=choices)
    assert found is not None
    usage = found[0]
    most = window + window // 20
    assert 0 <= usage.cache_write_1h <= usage.cache_write <= usage.cached + usage.cache_write <= usage.prompt <= most
    assert 0 <= max(usage.reasoning, usage.audio_completion) <= usage.completion <= most * choices
    assert 0 <= usage.audio_prompt <= usage.prompt


class TestLooseJson:
    @pytest.mark.parametrize(
        "rest",
        [
            pytest.param(b'"choices":[{"message":{"content":"\\ud83d"}}]', id="half a surrogate pair"),
            pytest.param(b'"choices":[{"logprobs":[NaN,Infinity,-Infinity]}]', id="NaN"),
            pytest.param(b'"choices":[{"message":{"content":"a\tb\x01"}}]', id="control characters"),
            pytest.param(b'"choices":[{"message":{"content":"\xff"}}]', id="not UTF-8"),
        ],
    )
    @pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
    def test_usage_is_read_all_the_same(self, bom: bytes, rest: bytes):
        reply = decode_answer(bom + b'{"model":"m",' + rest + b',"usage":{"prompt_tokens":9,"completion_tokens":2}}')
        assert reply.report is not None
        assert (reply.model, reply.report.settled(1000)[0]) == ("m", Usage(9, 2))


class TestDecodeReply:
    def test_a_whole_answer(self):
        body = (
            b'{"id":"x","model":"gpt-4o-2024","choices":[{"message":{"content":"\xc3\xa9"}}],"usage":' + report() + b"}"
        )
        reply = decode_answer(body)
        assert reply.report is not None
        assert (reply.report.settled(1000)[0], reply.model) == (Usage(10, 8), "gpt-4o-2024")

    @pytest.mark.parametrize(
        "body",
        [
            b"{}",
            b'{"usage":null,"model":null,"error":null}',
            b'{"usage":[],"model":7}',
        ],
    )
    def test_an_answer_that_says_nothing(self, body: bytes):
        assert ProviderAnswer() == decode_answer(body)

    def test_an_error_with_a_200(self):
        assert ProviderAnswer(error={"code": 502}) == decode_answer(b'{"error":{"code":502}}')

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"[]",
            b"null",
            b"<html>",
            b'{"a":',
            b"\xff",
            pytest.param(b'{"a":' + b"[" * 100_000, id="deep"),
        ],
    )
    def test_what_is_no_json_object(self, body: bytes):
        with pytest.raises(UpstreamError) as caught:
            decode_answer(body)
        response = upstream_error("The provider's answer is not a JSON object.", may_have_run=True)
        assert (caught.value.response, caught.value.safe_to_repeat) == (response, False)

    @given(st.binary(max_size=100))
    def test_any_bytes_are_a_reply_or_a_fault(self, body: bytes):
        try:
            decode_answer(b'{"usage":' + body + b"}")
        except UpstreamError as fault:
            response = fault.response
        else:
            return
        assert response.status == 502


@pytest.mark.parametrize("raw", [None, b"", b"{", b"x", DEEP])
def test_what_is_no_json_has_no_value(raw: bytes | None):
    assert decode_value(raw) is None
