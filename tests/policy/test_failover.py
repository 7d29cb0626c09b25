import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import (
    Problem,
    UpstreamFault,
    gateway_timeout,
    overloaded,
    provider_not_available,
    upstream_error,
)
from meshproxy.policy.failover import Verdict, after_status, asks_to_wait_s, is_unwell, wait_of

BODY = b'{"error": {"message": "words"}}'
WORDS = {"error": {"message": "words"}}


def short(verdict):
    problem = verdict.problem
    return problem.status, problem.code, problem.may_have_run, problem.provider_error, verdict.try_next


@pytest.mark.parametrize(
    "status, expected",
    [
        (400, (422, "validation_error", False, WORDS, False)),
        (413, (422, "validation_error", False, WORDS, False)),
        (422, (422, "validation_error", False, WORDS, False)),
        (401, (502, "upstream_error", False, None, True)),
        (402, (502, "upstream_error", False, None, True)),
        (403, (502, "upstream_error", False, None, True)),
        (404, (502, "upstream_error", False, None, True)),
        (429, (503, "provider_not_available", False, None, True)),
        (408, (502, "upstream_error", True, WORDS, True)),
        (409, (502, "upstream_error", True, WORDS, True)),
        (500, (502, "upstream_error", True, WORDS, True)),
        (502, (502, "upstream_error", True, WORDS, True)),
        (504, (502, "upstream_error", True, WORDS, True)),
        (599, (502, "upstream_error", True, WORDS, True)),
        (503, (502, "upstream_error", False, WORDS, True)),
        (529, (502, "upstream_error", False, WORDS, True)),
        (101, (502, "upstream_error", False, WORDS, True)),
        (199, (502, "upstream_error", False, WORDS, True)),
        (300, (502, "upstream_error", False, WORDS, True)),
        (301, (502, "upstream_error", False, WORDS, True)),
        (307, (502, "upstream_error", False, WORDS, True)),
        (405, (502, "upstream_error", False, WORDS, True)),
        (418, (502, "upstream_error", False, WORDS, True)),
        (499, (502, "upstream_error", False, WORDS, True)),
        (200, (502, "upstream_error", True, WORDS, False)),
        (201, (502, "upstream_error", True, WORDS, False)),
        (202, (502, "upstream_error", True, WORDS, False)),
        (204, (502, "upstream_error", True, WORDS, False)),
        (299, (502, "upstream_error", True, WORDS, False)),
    ],
)
def test_after_status(status, expected):
    assert expected == short(after_status(status, BODY, None))


def test_a_refused_request_in_full():
    problem = Problem(422, "validation_error", "The provider refused the request.", provider_error="A web page: Oh no")
    page = b"<title>Oh no</title>"
    assert Verdict(problem, try_next=False) == after_status(400, page, None, content_type="text/html")


def test_an_overload_in_full():
    words = "The provider is overloaded."
    problem = Problem(502, "upstream_error", words, retry_after_s=0.25, provider_error="A web page: Oh no")
    verdict = after_status(503, b"<title>Oh no</title>", "7", retry_after_ms="250", content_type="text/html")
    assert Verdict(problem, try_next=True) == verdict


@pytest.mark.parametrize(
    "status, expected",
    [
        (401, "The provider refused the gateway's credentials."),
        (402, "The provider refused the gateway's account."),
        (403, "The provider refused the gateway."),
        (404, "The provider doesn't serve what the gateway asked for."),
        (418, "The provider answered with status 418, which makes no sense here."),
        (429, "The provider has no capacity left."),
        (500, "The provider failed with status 500."),
    ],
)
def test_the_client_is_told_in_words(status, expected):
    assert expected == after_status(status, b"", None).problem.message


@pytest.mark.parametrize("status", [401, 402, 403, 404, 429])
def test_words_about_our_account_stay_inside(status):
    leak = b'{"error": {"message": "Incorrect API key provided: sk-proj-1234, organization org-5678"}}'
    told = repr(after_status(status, leak, None))
    assert ("sk-proj" in told, "org-5678" in told) == (False, False)


@pytest.mark.parametrize(
    "status, retry_after, expected",
    [
        (429, None, 1.0),
        (429, "0", 1.0),
        (429, "7", 7.0),
        (429, "3600", 60.0),
        (503, None, None),
        (503, "2", 2.0),
        (500, "2", None),
    ],
)
def test_the_wait_is_passed_on(status, retry_after, expected):
    assert expected == after_status(status, b"", retry_after).problem.retry_after_s


@pytest.mark.parametrize(
    "retry_after, retry_after_ms, expected",
    [
        (None, None, None),
        ("0", None, 0.0),
        ("5", None, 5.0),
        ("1.5", None, 1.5),
        (" 5 ", None, 5.0),
        ("60.001", None, 60.0),
        ("5", "250", 0.25),
        ("5", "x", 5.0),
        (None, "120000", 60.0),
        ("-1", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("1e999", None, None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None, None),
        ("", "", None),
    ],
)
def test_wait_of(retry_after, retry_after_ms, expected):
    assert expected == wait_of(retry_after, retry_after_ms)


@given(st.integers(100, 999), st.binary(max_size=50), st.none() | st.text(max_size=20))
def test_any_answer_has_a_verdict(status, body, retry_after):
    problem = after_status(status, body, retry_after).problem
    assert problem.status in {422, 502, 503}


def fault(answered, problem):
    return UpstreamFault(problem, safe_to_repeat=True, answered=answered)


@pytest.mark.parametrize(
    "answered, problem, expected",
    [
        (None, upstream_error("refused", may_have_run=False), True),
        (None, gateway_timeout("silent", may_have_run=True), True),
        (None, provider_not_available("no connection is free", 1.0), False),
        (None, overloaded("shutting down"), False),
        (200, upstream_error("an error in the stream", may_have_run=True), True),
        *((status, after_status(status, b"", None).problem, True) for status in (500, 502, 503, 504, 529)),
        *(
            (status, after_status(status, b"", None).problem, False)
            for status in (302, 400, 401, 404, 408, 409, 422, 429, 499)
        ),
    ],
)
def test_who_is_to_blame(answered, problem, expected):
    assert expected == is_unwell(fault(answered, problem))


@pytest.mark.parametrize(
    "answered, retry_after, expected",
    [(429, None, 1.0), (429, "7", 7.0), (429, "3600", 60.0), (503, "7", 7.0), (503, None, 0.0), (500, "7", 0.0)],
)
def test_who_asks_to_be_spared_is_spared(answered, retry_after, expected):
    assert expected == asks_to_wait_s(fault(answered, after_status(answered, b"", retry_after).problem))


def test_what_never_left_the_gateway_spares_nobody():
    assert 0.0 == asks_to_wait_s(fault(None, provider_not_available("no connection is free", 1.0)))
