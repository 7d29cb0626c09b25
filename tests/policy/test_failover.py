import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import (
    ErrorResponse,
    UpstreamError,
    gateway_timeout,
    overloaded,
    provider_not_available,
    upstream_error,
)
from meshproxy.policy.failover import (
    Verdict,
    classify_error,
    classify_status,
    error_to_report,
    is_refusal,
    is_upstream_failure,
    requested_wait_s,
    stream_error,
    wait_of,
)

BODY = b'{"error": {"message": "words"}}'
WORDS = {"error": {"message": "words"}}


def short(verdict):
    response = verdict.response
    return response.status, response.code, response.may_have_run, response.provider_error, verdict.try_next


@pytest.mark.parametrize(
    "status, expected",
    [
        (400, (400, "provider_refused", False, WORDS, False)),
        (413, (413, "provider_refused", False, WORDS, False)),
        (422, (422, "provider_refused", False, WORDS, False)),
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
    assert short(classify_status(status, BODY, None)) == expected


def test_a_refused_request_in_full():
    response = ErrorResponse(
        400, "provider_refused", "A web page: Oh no", provider_error={"message": "A web page: Oh no"}
    )
    page = b"<title>Oh no</title>"
    expected = Verdict(response, try_next=False, provider_message="A web page: Oh no")
    assert classify_status(400, page, None, content_type="text/html") == expected


def test_an_overload_in_full():
    page = "A web page: Oh no"
    response = ErrorResponse(
        502,
        "upstream_error",
        f"The provider is overloaded: {page}",
        retry_after_s=0.25,
        provider_error={"message": page},
    )
    verdict = classify_status(503, b"<title>Oh no</title>", "7", retry_after_ms="250", content_type="text/html")
    assert Verdict(response, try_next=True, provider_message=page) == verdict


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
    assert classify_status(status, b"", None).response.message == expected


@pytest.mark.parametrize("status", [401, 402, 403, 404, 429])
def test_words_about_our_account_stay_inside(status):
    leak = b'{"error": {"message": "Incorrect API key provided: sk-proj-1234, organization org-5678"}}'
    told = repr(classify_status(status, leak, None).response)
    assert ("sk-proj" in told, "org-5678" in told) == (False, False)


@pytest.mark.parametrize(
    "status, retry_after, expected",
    [
        (429, None, 1.0),
        (429, "0", 1.0),
        (429, "7", 7.0),
        (429, "3600", 3600.0),
        (429, "Thu, 01 Jan 1970 00:00:30 GMT", 30.0),
        (503, None, None),
        (503, "2", 2.0),
        (500, "2", None),
    ],
)
def test_the_wait_is_passed_on(status, retry_after, expected):
    assert classify_status(status, b"", retry_after).response.retry_after_s == expected


@pytest.mark.parametrize(
    "retry_after, retry_after_ms, expected",
    [
        (None, None, None),
        ("0", None, 0.0),
        ("5", None, 5.0),
        ("1.5", None, 1.5),
        (" 5 ", None, 5.0),
        ("60.001", None, 60.001),
        ("86401", None, 86400.0),
        ("5", "250", 0.25),
        ("5", "x", 5.0),
        (None, "120000", 120.0),
        ("-1", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("1e999", None, None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", None, 37.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", None, 37.0),
        ("Sun Nov  6 08:49:37 1994", None, 37.0),
        ("Sun, 06 Nov 1994 08:48:00 GMT", None, 0.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None, 86400.0),
        ("Wed, 99 Oct 2026 07:28:00 GMT", None, None),
        ("soon", None, None),
        ("", "", None),
    ],
)
def test_wait_of(retry_after, retry_after_ms, expected):
    assert wait_of(retry_after, retry_after_ms, now=784111740.0) == expected


@given(st.integers(100, 999), st.binary(max_size=50), st.none() | st.text(max_size=20))
def test_any_answer_has_a_verdict(status, body, retry_after):
    response = classify_status(status, body, retry_after).response
    assert response.status in {400, 413, 422, 502, 503}


def fault(answered, response):
    return UpstreamError(response, safe_to_repeat=True, upstream_status=answered)


@pytest.mark.parametrize(
    "answered, response, expected",
    [
        (None, upstream_error("refused", may_have_run=False), True),
        (None, gateway_timeout("silent", may_have_run=True), True),
        (None, provider_not_available("no connection is free", 1.0), False),
        (None, overloaded("shutting down"), False),
        (200, upstream_error("an error in the stream", may_have_run=True), True),
        *((status, classify_status(status, b"", None).response, True) for status in (500, 502, 503, 504, 529)),
        *(
            (status, classify_status(status, b"", None).response, False)
            for status in (302, 400, 401, 404, 408, 409, 422, 429, 499)
        ),
    ],
)
def test_who_is_to_blame(answered, response, expected):
    assert is_upstream_failure(fault(answered, response)) == expected


@pytest.mark.parametrize(
    "answered, retry_after, expected",
    [(429, None, 1.0), (429, "7", 7.0), (429, "3600", 60.0), (503, "7", 7.0), (503, None, 0.0), (500, "7", 0.0)],
)
def test_who_asks_to_be_spared_is_spared(answered, retry_after, expected):
    assert requested_wait_s(fault(answered, classify_status(answered, b"", retry_after).response)) == expected


def test_what_never_left_the_gateway_spares_nobody():
    assert requested_wait_s(fault(None, provider_not_available("no connection is free", 1.0))) == 0.0


def said(status, body, **headers):
    verdict = classify_status(status, json.dumps(body).encode(), headers.get("retry_after"))
    return verdict.response, verdict.try_next, verdict.another_model


def openai(message, code=None, param=None, kind="invalid_request_error"):
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


TOO_LONG = openai("This model's maximum context length is 8192 tokens.", "context_length_exceeded", "messages")
TOOLS = {"error": {"message": "No endpoints found that support tool use.", "code": 404}}
FLAGGED = {
    "error": {
        "code": 403,
        "message": "Your chosen model requires moderation and your input was flagged",
        "metadata": {"reasons": ["violence"], "flagged_input": "hi"},
    }
}

# What providers refuse in a request: the status, code and param that the client gets, and whether another model may take it.
REFUSED = [
    *(
        pytest.param(400, openai(words, None), ("provider_refused", None, True), id=f"too long: {words[:40]}")
        for words in (
            "input length and `max_tokens` exceed context limit: 198000 + 8192 > 200000, decrease input length",
            "prompt is too long: 210000 tokens > 200000 maximum",
            "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
            "Input validation error: `inputs` must have less than 1024 tokens. Given: 3000",
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193",
            "The prompt has 9000 tokens, which is more than the 8192 that the model takes.",
            "Requested tokens (5000) exceed the limit of 4096 for this model.",
            "Please reduce the length of the messages or completion.",
        )
    ),
    pytest.param(400, TOO_LONG, ("context_length_exceeded", "messages", True), id="OpenAI's context length"),
    pytest.param(
        400,
        openai("Unsupported parameter: 'max_tokens'.", "unsupported_parameter", "max_tokens"),
        ("unsupported_parameter", "max_tokens", True),
        id="OpenAI's unsupported parameter",
    ),
    pytest.param(
        400,
        openai("Invalid value: 'nobody'.", "invalid_value", "messages[0].role"),
        ("invalid_value", "messages[0].role", False),
        id="OpenAI's invalid value",
    ),
    pytest.param(
        400,
        openai("The response was filtered.", "content_filter", "prompt", None),
        ("content_filter", "prompt", False),
        id="Azure's content filter",
    ),
    pytest.param(
        400,
        [{"error": {"code": 400, "message": "Please use a valid role.", "status": "INVALID_ARGUMENT"}}],
        ("provider_refused", None, False),
        id="Gemini's list",
    ),
    pytest.param(
        400,
        {
            "object": "error",
            "message": '"auto" tool choice requires --enable-auto-tool-choice',
            "type": "BadRequestError",
            "code": 400,
        },
        ("provider_refused", None, True),
        id="vLLM's bare object",
    ),
    pytest.param(400, {"error": "model is loading"}, ("provider_refused", None, False), id="an error that is a string"),
    pytest.param(
        422,
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
        ("provider_refused", "seed", True),
        id="FastAPI's detail",
    ),
    pytest.param(
        422,
        {
            "object": "error",
            "message": {"detail": [{"loc": ["body", "stop"], "msg": "Bad stop"}]},
            "type": "invalid_request_error",
        },
        ("provider_refused", "stop", False),
        id="Mistral's detail in the message",
    ),
    pytest.param(403, FLAGGED, ("provider_refused", None, False), id="OpenRouter's moderation"),
    pytest.param(404, TOOLS, ("provider_refused", None, True), id="OpenRouter's endpoints without tools"),
    pytest.param(404, openai("No such file: f-1", None, "file_id"), ("provider_refused", "file_id", True), id="a file"),
    pytest.param(
        400,
        {"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": json.dumps(TOO_LONG)}}},
        ("context_length_exceeded", "messages", True),
        id="OpenRouter's raw error",
    ),
    pytest.param(413, {"error": {"message": "Request too large"}}, ("provider_refused", None, True), id="413"),
]


@pytest.mark.parametrize("status, body, expected", REFUSED)
def test_a_refusal_of_the_request_keeps_what_the_provider_said(status, body, expected):
    response, try_next, another_model = said(status, body)
    assert (response.status, response.code, response.param, another_model, try_next) == (status, *expected, False)


@pytest.mark.parametrize("status, body, expected", REFUSED)
def test_a_refusal_tells_the_providers_words_as_an_object(status, body, expected):
    response, _, _ = said(status, body)
    said_last = response.message.rpartition("error: ")[2]
    assert (type(response.provider_error), json.dumps(said_last)[1:-1] in json.dumps(body)) == (dict, True)


# What a provider says of the gateway's account or configuration, whatever status it chose for it.
ABOUT_US = [
    (401, openai("Incorrect API key provided: sk-x", "invalid_api_key")),
    (400, {"code": "Client specified an invalid argument", "error": "Incorrect API key provided: xa***."}),
    (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "API key not valid. Please pass a valid API key.",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
    ),
    (400, {"error": {"type": "invalid_request_error", "message": "Your credit balance is too low to access the API."}}),
    (400, {"object": "error", "message": "Invalid model: mistral-huge", "type": "invalid_model", "code": "1500"}),
    (402, {"error": {"code": 402, "message": "This request requires more credits, or fewer max_tokens."}}),
    (
        403,
        {
            "error": {
                "message": "Country, region, or territory not supported",
                "code": "unsupported_country_region_territory",
            }
        },
    ),
    (404, openai("The model `gpt-9` does not exist or you do not have access to it.", "model_not_found")),
    (404, {"error": {"message": "The API deployment for this resource does not exist.", "code": "DeploymentNotFound"}}),
    (404, {"error": {"message": "No endpoints found matching your data policy.", "code": 404}}),
    (404, {"error": {"message": "No endpoints found for x/y:free.", "code": 404}}),
    (404, {"detail": "Not Found"}),
]


@pytest.mark.parametrize("status, body", ABOUT_US)
def test_a_refusal_of_the_gateway_is_not_the_clients(status, body):
    response, try_next, _ = said(status, body)
    assert (response.status, response.code, response.provider_error, try_next) == (502, "upstream_error", None, True)


@pytest.mark.parametrize(
    "body, retry_after, expected",
    [
        (openai("You exceeded your current quota.", "insufficient_quota", kind="insufficient_quota"), None, 600.0),
        (openai("You exceeded your current quota.", "insufficient_quota"), "1", 600.0),
        (openai("You exceeded your current quota."), None, 600.0),
        (openai("Your account is suspended, please check your plan and billing details."), None, 600.0),
        (openai("Paused.", None, kind="exceeded_current_quota_error"), None, 600.0),
        (
            {
                "code": "Some resource has been exhausted",
                "error": "Your team 5a has either used all available credits or reached its monthly spending limit.",
            },
            None,
            600.0,
        ),
        (openai("Spend limit reached for this key."), None, 600.0),
        (openai("Quota exceeded for requests a minute. Please retry in 34.5s."), None, 34.5),
        (openai("Quota exceeded for quota metric 'Requests' and limit 'Requests per minute'."), None, 1.0),
        (openai("Rate limit reached. Please try again in 7m12s."), None, 432.0),
        (openai("Rate limit reached. Please try again in 250ms."), None, 0.25),
        (openai("Rate limit reached. Please try again in 250 milliseconds."), None, 0.25),
        (openai("Rate limit reached. Please retry in 1 hour 2 minutes."), None, 3720.0),
        (openai("Rate limit reached. Please retry after 1 day."), None, 86_400.0),
        (openai("Requests exceeded. Please retry after 60 seconds."), None, 60.0),
        (openai("Please try again in 20s."), "3", 3.0),
        (
            [
                {
                    "error": {
                        "code": 429,
                        "message": "You exceeded your current quota",
                        "details": [{"retryDelay": "34.5s"}],
                    }
                }
            ],
            None,
            34.5,
        ),
    ],
)
def test_a_wait_is_honest(body, retry_after, expected):
    response, try_next, _ = said(429, body, retry_after=retry_after)
    assert (response.status, response.retry_after_s, try_next) == (503, expected, True)


@pytest.mark.parametrize(
    "error, expected",
    [
        ({"code": 429, "message": "x"}, (503, "provider_not_available", 429)),
        ({"code": "400", "message": "x"}, (400, "provider_refused", 400)),
        ({"code": "context_length_exceeded", "message": "x"}, (400, "context_length_exceeded", 400)),
        ({"type": "overloaded_error", "message": "x"}, (502, "upstream_error", 529)),
        ({"code": "invalid_api_key", "message": "x"}, (502, "upstream_error", 401)),
        ({"code": 599, "message": "x"}, (502, "upstream_error", 599)),
        ({"code": 600, "message": "x"}, (502, "upstream_error", 200)),
        ({"message": "x"}, (502, "upstream_error", 200)),
        ("x", (502, "upstream_error", 200)),
    ],
)
def test_an_error_under_a_200_is_taken_for_its_status(error, expected):
    fault = classify_error(error, otherwise="Failed.")
    assert (fault.response.status, fault.response.code, fault.upstream_status) == expected
    assert fault.provider_message == "x"


@pytest.mark.parametrize(
    "code, expected",
    [
        *((code, (502, True)) for code in (401, 402, 404, 408, 500, 502, 503, 529, "overloaded_error", "unknown")),
        *((code, (503, True)) for code in (429, "insufficient_quota")),
        *((code, (400, False)) for code in (400, "context_length_exceeded")),
    ],
)
def test_an_error_in_place_of_a_whole_answer_may_have_cost_its_price(code, expected):
    response = classify_error({"code": code, "message": "x"}, otherwise="Failed.", may_have_run=True).response
    assert (response.status, response.may_have_run) == expected


@pytest.mark.parametrize("code, expected", [(429, 4.0), (503, 4.0), (529, 4.0), (500, None)])
def test_the_wait_beside_an_error_under_a_200_is_passed_on(code, expected):
    fault = classify_error({"code": code, "message": "x"}, otherwise="Failed.", wait_s=4.0)
    assert fault.response.retry_after_s == expected


# What providers send as a code or as a type where there is no status, by the status that it is taken for.
WORDS_OF = {
    400: (
        *("content_filter", "content_policy_violation", "moderation_blocked", "ResponsibleAIPolicyViolation"),
        *("context_length_exceeded", "max_tokens_exceeded", "token_limit_exceeded", "string_above_max_length"),
        *("invalid_request_error", "invalid_prompt", "BadRequestError"),
    ),
    401: ("invalid_api_key", "invalid_authentication", "authentication_error"),
    403: ("permission_error",),
    404: ("not_found_error", "model_not_found", "unknown_model", "invalid_model", "DeploymentNotFound"),
    429: (
        *("insufficient_quota", "insufficient_balance", "credit_balance_exhausted", "billing_hard_limit_reached"),
        *("billing_not_active", "billing_error", "exceeded_current_quota_error"),
        *("rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"),
    ),
    529: ("overloaded_error", "server_is_overloaded", "UNAVAILABLE"),
}


@pytest.mark.parametrize("member", ["code", "type"])
@pytest.mark.parametrize("status, word", [(status, word) for status, words in WORDS_OF.items() for word in words])
def test_a_word_without_a_status_is_taken_for_one(status, word, member):
    assert classify_error({member: word, "message": "x"}, otherwise="Failed.").upstream_status == status


@pytest.mark.parametrize(
    "error, expected",
    [({}, "The provider failed in the stream."), ({"message": "x"}, "The provider failed in the stream: x")],
)
def test_an_error_in_a_stream_may_have_cost_its_price(error, expected):
    fault = stream_error(error)
    assert (fault.response.message, fault.response.may_have_run, fault.upstream_status) == (expected, True, 200)


REFUSAL = classify_status(400, json.dumps(TOO_LONG).encode(), None).to_error(400)
OTHER_REFUSAL = classify_status(400, b'{"error": {"message": "not supported"}}', None).to_error(400)
WAIT = classify_status(429, b"", "9").to_error(429)
SHORT_WAIT = classify_status(429, b"", "3").to_error(429)
FAILURE = classify_status(500, BODY, None).to_error(500)
OURS = classify_status(401, b"", None).to_error(401)


def unreached():
    return UpstreamError(upstream_error("refused", may_have_run=False), safe_to_repeat=True)


@pytest.mark.parametrize(
    "faults, expected",
    [
        ([REFUSAL, unreached()], REFUSAL),
        ([REFUSAL, OTHER_REFUSAL], REFUSAL),
        ([FAILURE, REFUSAL], REFUSAL),
        ([WAIT, OURS], WAIT),
        ([WAIT, SHORT_WAIT], SHORT_WAIT),
        ([SHORT_WAIT, WAIT], SHORT_WAIT),
        ([OURS, FAILURE, unreached()], FAILURE),
        ([OURS, unreached()], OURS),
    ],
)
def test_the_fault_that_matters_most_is_told(faults, expected):
    assert error_to_report(faults) is expected


def test_a_retry_may_pay_twice_if_any_attempt_may_have_run():
    told = error_to_report(
        [classify_status(500, b"", None).to_error(500), classify_status(429, b"", "9").to_error(429)]
    )
    assert (told.response.status, told.response.may_have_run) == (503, True)
    assert error_to_report([unreached(), OURS]).response.may_have_run is False


@pytest.mark.parametrize(
    "answered, another_model, expected",
    [
        (None, False, False),
        (299, False, False),
        (302, False, True),
        (404, False, True),
        (408, False, False),
        (413, True, True),
    ],
)
def test_what_repeats_no_work(answered, another_model, expected):
    error = UpstreamError(
        upstream_error("no", may_have_run=False),
        safe_to_repeat=True,
        upstream_status=answered,
        another_model=another_model,
    )
    assert is_refusal(error) is expected


def test_what_the_gateway_cannot_read_is_no_failure_of_the_upstream():
    response = upstream_error("What is this?", may_have_run=True)
    assert (
        is_upstream_failure(UpstreamError(response, safe_to_repeat=False, upstream_status=200, unreadable=True))
        is False
    )


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": {"text": "Too many words."}}},
        {"error": {"description": "Too many words."}},
        {"error": {"code": "x", "reason": "Too many words."}},
        {"error": "invalid_request", "error_description": "Too many words."},
        {"error": {"message": "Too many words.", "input": "y" * 100_000}},
    ],
)
def test_a_providers_words_are_found_in_every_shape(body):
    assert "Too many words." in (classify_status(400, json.dumps(body).encode(), None).provider_message or "")


def test_a_long_echo_of_the_request_hides_neither_code_nor_param():
    error = {"code": "context_length_exceeded", "param": "messages", "message": "Too long: " + "y" * 100_000}
    response = classify_status(400, json.dumps({"error": error}).encode(), None).response
    assert (response.code, response.param) == ("context_length_exceeded", "messages")
