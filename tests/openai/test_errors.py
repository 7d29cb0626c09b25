import functools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import (
    Detail,
    ErrorResponse,
    gateway_timeout,
    idempotency_conflict,
    insufficient_credits,
    internal_error,
    invalid,
    provider_not_available,
    rate_limit_exceeded,
    unauthorized,
    upstream_error,
)
from meshproxy.openai.errors import envelope, error_event, error_headers
from meshproxy.openai.provider_errors import conceal_secrets, provider_error, without_quotes, without_secrets

DEEP = functools.reduce(lambda inner, _: [inner], range(5000), [])


def nested(levels: int) -> dict[str, Any]:
    return functools.reduce(lambda inner, _: {"a": inner}, range(levels - 1), {})


def told(response: ErrorResponse) -> dict[str, Any]:
    return json.loads(envelope(response, "req_1"))


class TestEnvelope:
    def test_the_least(self):
        assert told(unauthorized("No key.")) == {
            "error": {
                "message": "No key.",
                "type": "authentication_error",
                "param": None,
                "code": "unauthorized",
                "request_id": "req_1",
            },
            "request_id": "req_1",
        }

    def test_details(self):
        response = invalid(
            "Bad.", Detail("missing", ("body", "messages", 0, "role"), "Field required"), param="messages[0].role"
        )
        error = told(response)["error"]
        assert error["details"] == [
            {"type": "missing", "loc": ["body", "messages", 0, "role"], "msg": "Field required"}
        ]
        assert error["param"] == "messages[0].role"

    def test_a_detail_can_be_encoded_whatever_its_place(self):
        response = invalid("Bad.", Detail("missing", ("body", "\ud800" + "x" * 3000, 0), "\ud800"))
        expected = {"type": "missing", "loc": ["body", "?" + "x" * 1999, 0], "msg": "?"}
        assert told(response)["error"]["details"] == [expected]

    @pytest.mark.parametrize(("seconds", "expected"), [(1.5, 2), (0.0001, 1), (2, 2), (0, 1), (59.0001, 60)])
    def test_time_to_wait(self, seconds: float, expected: int):
        actual = told(rate_limit_exceeded("Slow down.", seconds))["error"]["retry_after_seconds"]
        assert (type(actual), actual) == (int, expected)

    def test_an_endless_wait_is_not_told(self):
        assert "retry_after_seconds" not in told(rate_limit_exceeded("Never.", float("inf")))["error"]

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"code": 529, "message": "é\n"}, {"code": 529, "message": "é\n"}),
            ("text", {"message": "text"}),
            (["a", None], {"message": '["a",null]'}),
            (7, {"message": "7"}),
            ("a\ud800b", {"message": "a?b"}),
            ({"a": "\ud800"}, {"message": "unreadable"}),
            ({"a": object()}, {"message": "unreadable"}),
            pytest.param(DEEP, {"message": "unreadable"}, id="deep"),
            pytest.param(nested(100), nested(100), id="as deep as may be"),
            pytest.param(nested(101), {"message": "unreadable"}, id="one deeper"),
            pytest.param({"m": '[{\\"' * 200}, {"m": '[{\\"' * 200}, id="brackets in a text"),
            pytest.param({"m": "[" * 9000}, {"message": '{"m":"' + "[" * 1994}, id="brackets in a long text"),
            pytest.param({"m": "x" * 8184}, {"m": "x" * 8184}, id="8 KiB"),
            pytest.param({"m": "x" * 8185}, {"message": '{"m":"' + "x" * 1994}, id="more than 8 KiB"),
            pytest.param("x" * 2001, {"message": "x" * 2000}, id="a long text"),
        ],
    )
    def test_the_provider_s_words_are_an_object(self, value: Any, expected: Any):
        response = upstream_error("Failed.", may_have_run=True, provider_error=value)
        assert told(response)["error"]["provider_error"] == expected

    def test_the_provider_s_code(self):
        assert (
            told(ErrorResponse(502, "upstream_error", "Failed.", provider_code="529"))["error"]["provider_code"]
            == "529"
        )

    def test_messages_are_cut_and_can_be_encoded(self):
        error = told(ErrorResponse(404, "not_found", "\udcff" + "x" * 5000, param="\ud800"))["error"]
        assert (error["message"], error["param"]) == ("?" + "x" * 1999, "?")


class TestHeaders:
    @pytest.mark.parametrize(
        ("response", "expected"),
        [
            (unauthorized("x"), {"www-authenticate": "Bearer"}),
            (insufficient_credits("x"), {}),
            (rate_limit_exceeded("x", 1.2341), {"retry-after": "2", "retry-after-ms": "1235"}),
            (rate_limit_exceeded("x", 1.234004), {"retry-after": "2", "retry-after-ms": "1235"}),
            (rate_limit_exceeded("x", 1.2340004), {"retry-after": "2", "retry-after-ms": "1234"}),
            (rate_limit_exceeded("x", 0.02), {"retry-after": "1", "retry-after-ms": "20"}),
            (rate_limit_exceeded("x", 0.0), {"retry-after": "1", "retry-after-ms": "0"}),
            (rate_limit_exceeded("x", 1.1), {"retry-after": "2", "retry-after-ms": "1100"}),
            (rate_limit_exceeded("x", 60), {"retry-after": "60", "retry-after-ms": "60000"}),
            (
                rate_limit_exceeded("x", 60.001),
                {"retry-after": "61", "retry-after-ms": "60001", "x-should-retry": "false"},
            ),
            (rate_limit_exceeded("x", float("inf")), {"x-should-retry": "false"}),
            (rate_limit_exceeded("x", float("nan")), {"x-should-retry": "false"}),
            (provider_not_available("x", 5), {"retry-after": "5", "retry-after-ms": "5000"}),
            (upstream_error("x", may_have_run=True), {"x-should-retry": "false"}),
            (upstream_error("x", may_have_run=False), {}),
            (gateway_timeout("x", may_have_run=True), {"x-should-retry": "false"}),
            (internal_error(), {"x-should-retry": "false"}),
            (ErrorResponse(499, "x", "x", may_have_run=True), {}),
            (idempotency_conflict(), {"x-should-retry": "false"}),
        ],
    )
    def test_of_a_problem(self, response: ErrorResponse, expected: dict[str, str]):
        assert {"content-type": "application/json"} | expected == dict(error_headers(response))


class TestErrorEvent:
    def test_is_the_envelope_as_one_event(self):
        response = insufficient_credits("Out of credit.")
        assert b"data: " + envelope(response, "req_1") + b"\n\n" == error_event(response, "req_1")

    @given(st.text() | st.dictionaries(st.text(), st.text()))
    def test_nothing_a_provider_says_begins_another_event(self, words: Any):
        event = error_event(upstream_error("a\r\n\r\ndata: b", may_have_run=True, provider_error=words), "req_1")
        assert (event.count(b"\n"), event.count(b"\r"), event[-2:]) == (2, 0, b"\n\n")


class TestProviderError:
    @pytest.mark.parametrize(
        ("body", "content_type", "expected"),
        [
            (b"", None, None),
            (b" \n", "application/json", None),
            (b'{"error":{"message":"x"}}', "application/json", {"error": {"message": "x"}}),
            (b'"x"', None, "x"),
            (b"Bad gateway", "text/plain", "Bad gateway"),
            (b"\xff", None, "\ufffd"),
            (b'"\xff"', None, "\ufffd"),
            (b"Oops: <html>", None, "Oops: <html>"),
            (b"<htm>", None, "<htm>"),
            (b"<!doctype htm>", None, "<!doctype htm>"),
            (b" " * 64 + b"<html>", None, "A web page without a title"),
            (b" " * 65 + b"<html>", None, " " * 65 + "<html>"),
            (b"<html><title>\xff</title>", None, "A web page: \ufffd"),
            (b"<html><titl>x</title>", None, "A web page without a title"),
            (b"<html>title>x</title>", None, "A web page without a title"),
            (b"<html><title>x</titl>", None, "A web page without a title"),
            (b"<html><title>a</title><svg><title>b</title>", None, "A web page: a"),
            (b"<html><title></title><svg><title>b</title>", None, "A web page without a title"),
            (b"<html><title" + b"x" * 200 + b">a</title>", None, "A web page: a"),
            (b"<html><title" + b"x" * 201 + b">a</title>", None, "A web page without a title"),
            (b"<html><title>" + b"x" * 1000 + b"</title>", None, "A web page: " + "x" * 200),
            (b"<html><title>" + b"x" * 1001 + b"</title>", None, "A web page without a title"),
            pytest.param(b"<html>".ljust(65_521) + b"<title>x</title>", None, "A web page: x", id="64 KiB"),
            pytest.param(b"<html>".ljust(65_522) + b"<title>x</title>", None, "A web page without a title", id="past"),
            (b"<html><head><title>502 Bad\n Gateway &amp; more</title>", None, "A web page: 502 Bad Gateway & more"),
            (b"<HTML><TITLE lang=en>x</TITLE>", None, "A web page: x"),
            (b"<!DOCTYPE html><p>x", None, "A web page without a title"),
            (b"<p>x", "Text/HTML; charset=utf-8", "A web page without a title"),
            (b"<title>" + b"x" * 900 + b"</title>", "text/html", "A web page: " + "x" * 200),
            pytest.param(b'"' + b"x" * 262_142 + b'"', None, "x" * 262_142, id="256 KiB of JSON"),
            pytest.param(b'"' + b"x" * 262_143 + b'"', None, '"' + "x" * 1999, id="more"),
            (b'\xef\xbb\xbf{"error":"x"}', None, {"error": "x"}),
            (b'{"error":"x","score":NaN}', None, {"error": "x", "score": None}),
            (b'{"error":"\\ud800"}', None, {"error": "\ufffd"}),
            (b'{"error":"\xff"}', None, {"error": "\ufffd"}),
            (b'{"error":"a\nb"}', None, {"error": "a b"}),
            pytest.param(b"{" * 100_000, None, "{" * 2000, id="long"),
            pytest.param(("\U0001f600" * 3000).encode(), None, "\U0001f600" * 2000, id="long and wide"),
            pytest.param(b"[" * 8000, None, "[" * 2000, id="deep"),
        ],
    )
    def test_what_a_provider_said(self, body: bytes, content_type: str | None, expected: Any):
        assert provider_error(body, content_type) == expected

    @given(st.binary(max_size=200))
    def test_any_bytes_can_be_told(self, body: bytes):
        words = provider_error(body)
        envelope(ErrorResponse(400, "provider_refused", "Bad.", provider_error=words), "req_1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Incorrect API key provided: sk-secret-1.", "Incorrect API key provided: [redacted]."),
        ({"message": ["sk-secret-1", {"sk-secret-1": 1}]}, {"message": ["[redacted]", {"[redacted]": 1}]}),
        ('the words are cut off: sk-"\\secr', "the words are cut off: [redacted]"),
        ("cut off: sk-secret-", "cut off: [redacted]"),
        ("cut off: sk-se", "cut off: [redacted]"),
        ("cut off: sk-s", "cut off: sk-s"),
        ({"message": "cut off: sk-secret-", "code": 401}, {"message": "cut off: [redacted]", "code": 401}),
        ([{"raw": ["key sk-secr"]}], [{"raw": ["key [redacted]"]}]),
        ({"key": 'sk-"\\secret-2'}, {"key": "[redacted]"}),
        ("sk-s and sk-", "sk-s and sk-"),
        ("sk-secre and more", "sk-secre and more"),
        ("sk-secret and more", "[redacted] and more"),
        ("sk-secret-, sk-secret and sk-secret-1sk-secret-1 too", "[redacted], [redacted] and [redacted][redacted] too"),
        (None, None),
        (7, 7),
    ],
)
def test_a_providers_words_are_told_without_our_keys(words, expected):
    assert conceal_secrets(words, ("sk-secret-1", 'sk-"\\secret-2')) == expected


@pytest.mark.parametrize(("told", "expected"), [(15, "0123456789abcde"), (16, "[redacted]"), (60, "[redacted]")])
def test_the_beginning_of_a_long_key_in_mid_text_is_concealed(told, expected):
    key = "0123456789abcdef" * 4
    assert conceal_secrets(f"key {key[:told]}, and so on", (key,)) == f"key {expected}, and so on"


def test_words_too_deep_to_look_through_are_concealed_whole():
    assert conceal_secrets(DEEP, ("sk-secret-1",)) == "[redacted]"


def test_a_problem_names_no_secret_anywhere():
    leak = "say sk-secret-1"
    response = ErrorResponse(400, leak, leak, leak, provider_error={"message": leak}, provider_code=leak)
    assert "sk-secret-1" not in repr(without_secrets(response, ("sk-secret-1",)))


REQUEST = b'[{"role":"user","content":"my secret plan"},'
REQUEST += b'{"role":"assistant","content":"a plan that is long: step \\"one\\", step two"}]'


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Invalid value: 'my secret plan'.", "Invalid value: '[redacted]'."),
        ('Invalid: a plan that is long: step "one", step two', "Invalid: [redacted]"),
        ("Invalid: a plan that is long: step... (cut off)", "Invalid: [redacted]"),
        ("Unsupported role: user", "Unsupported role: user"),
        ("my plan", "my plan"),
    ],
)
def test_a_providers_words_are_logged_without_the_prompt(words, expected):
    assert without_quotes(words, REQUEST) == expected
