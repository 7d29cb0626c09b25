import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.wire.headers import (
    bearer,
    downstream_headers,
    format_reset,
    forwarded_headers,
    patience_s,
    ratelimit_headers,
    request_id,
)


class TestBearer:
    @pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer   "])
    def test_the_secret(self, scheme: str):
        assert bearer(scheme + "rsk_aZ09_-") == "rsk_aZ09_-"

    @pytest.mark.parametrize(
        "authorization",
        [
            None,
            "",
            "Bearer",
            "Bearer ",
            "rsk_abc",
            "Bearer rsk_",
            "Bearer sk_abc",
            "Bearer RSK_abc",
            "Bearerrsk_abc",
            "Bearer\trsk_abc",
            "Bearer rsk_abc rsk_def",
            "Bearer rsk_abc,",
            "Bearer rsk_abc, Bearer rsk_def",
            "Bearer rsk_abc\n",
            " Bearer rsk_abc",
            'Bearer "rsk_abc"',
            "Bearer rsk_ab:c",
            "Bearer rsk_ab\u017f",  # would be an s if case were folded
            "Bearer rsk_\u0661",
            "Bearer rsk_\udcff",
            "Basic cnNrX2FiYzo=",
            "Bearer rsk_" + "x" * 125,
            pytest.param("Bearer rsk_" + "x" * 65_536, id="64 KiB"),
        ],
    )
    def test_odd_shapes(self, authorization: str | None):
        assert bearer(authorization) is None

    def test_the_longest_secret(self):
        assert bearer("Bearer rsk_" + "x" * 124) == "rsk_" + "x" * 124

    @given(st.text())
    def test_any_text(self, text: str):
        assert bearer(text) is None


class TestRequestId:
    @pytest.mark.parametrize("inbound", ["a", "A-z_09", "x" * 128])
    def test_a_valid_one_is_kept(self, inbound: str):
        assert inbound == request_id(inbound)

    @pytest.mark.parametrize(
        "inbound", [None, "", "x" * 129, "x" * 10_240, "a b", "a\r\nb: c", "a\n", "é", "a.b", "a/b", "\u0661"]
    )
    def test_an_invalid_one_isn_t(self, inbound: str | None):
        assert request_id(inbound) is None


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (-3, "0s"),
        (float("nan"), "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (0.1201, "121ms"),
        (0.9991, "1s"),
        (1, "1s"),
        (1.001, "2s"),
        (1.1 * 10, "11s"),
        (59.5, "1m0s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (361.2, "6m2s"),
        (3600, "1h0m0s"),
        (3661, "1h1m1s"),
        (float("inf"), "8760h0m0s"),
    ],
)
def test_a_reset_is_written_as_openai_does(seconds: float, expected: str):
    assert expected == format_reset(seconds)


class TestRatelimitHeaders:
    def test_both_buckets(self):
        expected = [
            ("x-ratelimit-limit-requests", "600"),
            ("x-ratelimit-remaining-requests", "599"),
            ("x-ratelimit-reset-requests", "100ms"),
            ("x-ratelimit-limit-tokens", "1000000"),
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "1m0s"),
        ]
        assert expected == ratelimit_headers(requests=(600, 599, 0.1), tokens=(1_000_000, -30, 60.0))

    def test_no_bucket(self):
        assert ratelimit_headers(requests=None, tokens=None) == []


class TestForwarded:
    def test_only_the_list_goes_upstream(self):
        headers = {
            "http-referer": "https://example.com",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "authorization": "Bearer rsk_abc",
            "cookie": "a=b",
            "x-forwarded-for": "10.0.0.1",
            "openai-organization": "org",
            "host": "example.com",
            "x-request-id": "r",
        }
        assert [name for name, _ in forwarded_headers(headers)] == ["http-referer", "traceparent"]

    @pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\0b", "é", "\udcff", "x" * 1025])
    def test_a_value_that_could_harm_is_dropped(self, value: str):
        assert forwarded_headers({"x-title": value, "openai-beta": "x" * 1024}) == [("openai-beta", "x" * 1024)]


class TestDownstream:
    def test_what_is_safe_to_show(self):
        kept = [("content-type", "application/json"), ("openai-version", "2020-10-01"), ("openai-processing-ms", "12")]
        inside = [
            ("connection", "keep-alive"),
            ("content-length", "12"),
            ("transfer-encoding", "chunked"),
            ("set-cookie", "a=b"),
            ("x-ratelimit-remaining-requests", "1"),
            ("openai-organization", "org"),
            ("openai-project", "proj"),
            ("server", "cloudflare"),
            ("date", "Mon, 01 Jan 2024 00:00:00 GMT"),
            ("x-request-id", "r"),
            ("x-mesh-cost", "0.00"),
            ("alt-svc", "h3=elsewhere"),
            ("location", "https://elsewhere"),
            ("strict-transport-security", "max-age=1"),
            ("access-control-allow-origin", "*"),
        ]
        assert kept == downstream_headers([*inside, *kept])

    def test_what_connection_names_is_hop_by_hop(self):
        headers = [("openai-version", "1"), ("openai-model", "m"), ("connection", "close, OpenAI-Version")]
        assert downstream_headers(headers) == [("openai-model", "m")]

    def test_what_the_gateway_sets_itself_is_left_out(self):
        headers = [("content-type", "text/event-stream"), ("openai-version", "1")]
        assert downstream_headers(headers, without=[("content-type", "x")]) == [("openai-version", "1")]

    def test_a_value_that_could_split_a_response_is_dropped(self):
        assert downstream_headers([("openai-version", "1\r\nset-cookie: a=b")]) == []


class TestPatience:
    @pytest.mark.parametrize(("text", "expected"), [("600", 600.0), ("0.5", 0.5), (" 5 ", 5.0), ("1e3", 1000.0)])
    def test_seconds(self, text: str, expected: float):
        assert patience_s(text) == expected

    @pytest.mark.parametrize("text", [None, "", "None", "0", "-1", "nan", "inf", "1e999", "9" * 5000 + "x"])
    def test_what_says_nothing_sets_no_limit(self, text: str | None):
        assert patience_s(text) == math.inf
