import pytest

from meshproxy import errors
from meshproxy.errors import Detail, ErrorResponse, GatewayError, Source, UpstreamError

DETAIL = Detail("missing", ("body", "messages"), "Field required")

# problem, status, code, type, param, retry_after_s, may_have_run
FAMILY = [
    (errors.unauthorized("m"), 401, "unauthorized", "authentication_error", None, None, False),
    (errors.insufficient_credits("m"), 402, "insufficient_credits", "insufficient_quota", None, None, False),
    (errors.spend_limit_exceeded("m"), 402, "spend_limit_exceeded", "insufficient_quota", None, None, False),
    (errors.forbidden("m"), 403, "forbidden", "permission_error", None, None, False),
    (errors.forbidden("m", "model"), 403, "forbidden", "permission_error", "model", None, False),
    (errors.model_not_found("m"), 404, "model_not_found", "not_found_error", "model", None, False),
    (errors.template_not_found("m"), 404, "template_not_found", "not_found_error", "template", None, False),
    (errors.not_found("m"), 404, "not_found", "not_found_error", None, None, False),
    (errors.method_not_allowed("m"), 405, "method_not_allowed", "invalid_request_error", None, None, False),
    (errors.invalid_api_version("v", ["w"]), 400, "invalid_api_version", "invalid_request_error", None, None, False),
    (errors.request_timeout("m"), 408, "request_timeout", "invalid_request_error", None, None, False),
    (errors.idempotency_conflict(), 409, "idempotency_conflict", "conflict_error", None, None, False),
    (errors.request_too_large(9), 413, "request_too_large", "invalid_request_error", None, None, False),
    (errors.unsupported_media_type("m"), 415, "unsupported_media_type", "invalid_request_error", None, None, False),
    (errors.invalid("m", param="n"), 422, "validation_error", "invalid_request_error", "n", None, False),
    (errors.rate_limit_exceeded("m", 2.5), 429, "rate_limit_exceeded", "rate_limit_error", None, 2.5, False),
    (errors.internal_error(), 500, "internal_error", "api_error", None, None, True),
    (errors.upstream_error("m", may_have_run=True), 502, "upstream_error", "api_error", None, None, True),
    (errors.upstream_error("m", may_have_run=False), 502, "upstream_error", "api_error", None, None, False),
    (errors.provider_not_available("m", 3.0), 503, "provider_not_available", "api_error", None, 3.0, False),
    (errors.overloaded("m"), 503, "overloaded", "api_error", None, 1.0, False),
    (errors.ledger_unavailable(), 503, "ledger_unavailable", "api_error", None, 1.0, False),
    (errors.gateway_timeout("m", may_have_run=True), 504, "gateway_timeout", "api_error", None, None, True),
]


@pytest.mark.parametrize("response, status, code, kind, param, retry_after_s, may_have_run", FAMILY)
def test_the_family(response, status, code, kind, param, retry_after_s, may_have_run):
    actual = (
        response.status,
        response.code,
        response.type,
        response.param,
        response.retry_after_s,
        response.may_have_run,
    )
    assert actual == (status, code, kind, param, retry_after_s, may_have_run)


def test_the_family_is_whole():
    makers = {
        name
        for name, member in vars(errors).items()
        if callable(member) and getattr(member, "__annotations__", {}).get("return") is ErrorResponse
    }
    covered = {"invalid" if response.code == "validation_error" else response.code for response, *_ in FAMILY}
    assert makers == covered


def test_every_problem_says_something():
    assert all(response.message for response, *_ in FAMILY)


def test_details_and_a_providers_words_are_kept():
    response = ErrorResponse(400, "c", "m", details=(DETAIL, DETAIL), provider_error={"a": 1})
    assert (response.details, response.provider_error) == ((DETAIL, DETAIL), {"a": 1})


@pytest.mark.parametrize("maker", [errors.model_not_found, errors.template_not_found])
def test_a_name_that_is_not_found_is_not_echoed_without_end(maker):
    assert len(maker("x" * 100_000).message) < 256


def test_a_fault_carries_its_source_and_its_problem():
    response = errors.not_found("gone")
    fault = GatewayError(Source.CLIENT, response)
    assert (fault.source, fault.response, str(fault)) == (Source.CLIENT, response, "gone")


@pytest.mark.parametrize("safe", [True, False])
def test_an_upstream_fault_says_whether_another_may_be_asked(safe):
    response = errors.upstream_error("reset", may_have_run=not safe)
    fault = UpstreamError(response, safe_to_repeat=safe)
    assert (fault.source, fault.response, fault.safe_to_repeat) == (Source.UPSTREAM, response, safe)


@pytest.mark.parametrize("status", [400, 405, 408, 413, 414, 415, 418, 422, 431])
def test_an_unlisted_status_below_500_is_a_fault_of_the_request(status):
    assert ErrorResponse(status, "c", "m").type == "invalid_request_error"
