import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.openai.headers import (
    bearer,
    client_timeout_s,
    downstream_headers,
    format_reset,
    forwarded_headers,
    trace_id,
    valid_request_id,
)


class TestBearer:
    @pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer   "])
    @pytest.mark.parametrize("secret", ["rsk_AMZamz059_-", "rsk_a"])
    def test_the_secret(self, scheme: str, secret: str):
        assert bearer(scheme + secret) == secret

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
    @pytest.mark.parametrize("inbound", ["a", "AMZ-amz_059", "order.17:retry-2", "x" * 128])
    def test_a_valid_one_is_kept(self, inbound: str):
        assert inbound == valid_request_id(inbound)

    @pytest.mark.parametrize(
        "inbound",
        [None, "", "x" * 129, "x" * 10_240, "a b", "a\tb", "a\r\nb: c", "a\n", "é", "a/b", "a;b", "<a>", "\u0661"],
    )
    def test_an_invalid_one_isn_t(self, inbound: str | None):
        assert valid_request_id(inbound) is None


class TestTraceId:
    ID, PARENT = "0123456789abcdef0123456789abcdef", "0123456789abcdef"

    @pytest.mark.parametrize(
        "traceparent",
        [
            "00-{id}-{parent}-01",
            "59-{id}-{parent}-5f",
            "f0-{id}-{parent}-bc",
            "cd-{id}-{parent}-01-",
            "cd-{id}-{parent}-01-what the future brings",
            "00-{id}-0000000000000001-01",
        ],
    )
    def test_of_a_traceparent(self, traceparent: str):
        assert trace_id(traceparent.format(id=self.ID, parent=self.PARENT)) == self.ID

    def test_almost_all_of_it_may_be_zeros(self):
        assert trace_id(f"00-{'0' * 31}1-{self.PARENT}-00") == "0" * 31 + "1"

    @pytest.mark.parametrize(
        "traceparent",
        [
            None,
            "",
            "{id}",
            "ff-{id}-{parent}-01",
            "0-{id}-{parent}-01",
            "000-{id}-{parent}-01",
            "00{id}-{parent}-01",
            "00-00000000000000000000000000000000-{parent}-01",
            "00-{id}0-{parent}-01",
            "00-0{id}-{parent}-01",
            "00-{parent}-{parent}-01",
            "00-{id}{parent}-01",
            "00-{id}-0000000000000000-01",
            "00-{id}-{parent}0-01",
            "00-{id}-0{parent}-01",
            "00-{id}-01234567-01",
            "00-{id}-{parent}01",
            "00-{id}-{parent}-1",
            "00-{id}-{parent}-011",
            "00-{id}-{parent}-01.more",
            "00-{id}-{parent}-0g",
            "00-{id}-{parent}-01\n",
            "00-0123456789ABCDEF0123456789ABCDEF-{parent}-01",
        ],
    )
    def test_there_is_none_in_anything_else(self, traceparent: str | None):
        assert trace_id(traceparent and traceparent.format(id=self.ID, parent=self.PARENT)) is None


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (-3, "0s"),
        (float("nan"), "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (0.1201, "121ms"),
        (0.120004, "121ms"),
        (0.1200004, "120ms"),
        (0.999, "999ms"),
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
    assert format_reset(seconds) == expected


class TestForwarded:
    def test_only_the_list_goes_upstream(self):
        headers = {
            "http-referer": "https://example.com",
            "x-title": "Example",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "tracestate": "a=b",
            "openai-beta": "assistants=v2",
            "authorization": "Bearer rsk_abc",
            "cookie": "a=b",
            "x-forwarded-for": "10.0.0.1",
            "openai-organization": "org",
            "host": "example.com",
            "x-request-id": "r",
        }
        assert forwarded_headers(headers) == list(headers.items())[:5]

    @pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\0b", "é", "\udcff", "x" * 1025])
    def test_a_value_that_could_harm_is_dropped(self, value: str):
        assert forwarded_headers({"x-title": value, "openai-beta": "x" * 1024}) == [("openai-beta", "x" * 1024)]


class TestDownstream:
    def test_what_is_safe_to_show(self):
        kept = [
            ("content-type", "application/json"),
            ("content-encoding", "gzip"),
            ("content-language", "de"),
            ("openai-model", "gpt-4o"),
            ("openai-version", "2020-10-01"),
            ("openai-processing-ms", "12"),
            ("x-generation-id", "gen-1"),
        ]
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

    @pytest.mark.parametrize("named", ["close, OpenAI-Version", "openai-version ,x", "close,openai-version"])
    def test_what_connection_names_is_hop_by_hop(self, named: str):
        headers = [("openai-version", "1"), ("openai-model", "m"), ("connection", named), ("server", "openai-model")]
        assert downstream_headers(headers) == [("openai-model", "m")]

    def test_what_the_gateway_sets_itself_is_left_out(self):
        headers = [("content-type", "text/event-stream"), ("openai-version", "1")]
        assert downstream_headers(headers, without=[("content-type", "x")]) == [("openai-version", "1")]

    def test_a_value_that_could_split_a_response_is_dropped(self):
        assert downstream_headers([("openai-version", "1\r\nset-cookie: a=b")]) == []


class TestPatience:
    @pytest.mark.parametrize(("text", "expected"), [("600", 600.0), ("0.5", 0.5), (" 5 ", 5.0), ("1e3", 1000.0)])
    def test_seconds(self, text: str, expected: float):
        assert client_timeout_s(text) == expected

    @pytest.mark.parametrize("text", [None, "", "None", "0", "-1", "nan", "inf", "1e999", "9" * 5000 + "x"])
    def test_what_says_nothing_sets_no_limit(self, text: str | None):
        assert client_timeout_s(text) == math.inf
