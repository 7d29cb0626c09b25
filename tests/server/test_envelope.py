import json
import re

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from meshproxy.errors import GatewayError, Source, overloaded, request_timeout
from meshproxy.server.aiohttp_path import envelope_errors, error_response
from meshproxy.server.chat import request_id_of

MADE = "req_[0-9a-f]{24}"

RAISED = {
    "fault": GatewayError(Source.GATEWAY, overloaded("Full.")),
    "gone": web.HTTPNotFound(),
    "large": web.HTTPRequestEntityTooLarge(10, 11),
    "odd": web.HTTPUnsupportedMediaType(),
    "unpaid": web.HTTPPaymentRequired(),
    "late": web.HTTPRequestTimeout(),
    "conflict": web.HTTPConflict(),
    "often": web.HTTPTooManyRequests(headers={"Retry-After": "7", "X-Quota": "of the host"}),
    "full": web.HTTPServiceUnavailable(headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "login": web.HTTPUnauthorized(headers={"WWW-Authenticate": "Basic", "Content-Language": "de"}),
    "moved": web.HTTPFound("/elsewhere"),
    "broken": web.HTTPInternalServerError(),
    "unavailable": web.HTTPServiceUnavailable(),
    "unknown": web.HTTPNotImplemented(),
    "relay": web.HTTPBadGateway(headers={"Retry-After": "7"}),
    "slow": web.HTTPGatewayTimeout(reason="The host gave up."),
    "storage": web.HTTPInsufficientStorage(),
    "value": ValueError("Odd."),
}
RAISED["moved"].set_cookie("seen", "yes")


async def fail(request):
    raise RAISED[request.match_info["what"]]


async def work(_request):
    return web.Response(body=b"fine")


@pytest.fixture
async def client(aiohttp_client):
    app = web.Application(middlewares=[envelope_errors], client_max_size=1000)
    app.router.add_get("/fail/{what}", fail)
    app.router.add_get("/work", work)
    return await aiohttp_client(app)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/fail/fault", 503, "overloaded"),
        ("/fail/gone", 404, "not_found"),
        ("/nowhere", 404, "not_found"),
        ("/fail/large", 413, "request_too_large"),
        ("/fail/odd", 415, "unsupported_media_type"),
        ("/fail/unpaid", 402, "insufficient_credits"),
        ("/fail/late", 408, "request_timeout"),
        ("/fail/conflict", 409, "conflict"),
        ("/fail/often", 429, "rate_limit_exceeded"),
        ("/fail/broken", 500, "internal_error"),
        ("/fail/unavailable", 503, "overloaded"),
        ("/fail/unknown", 501, "internal_error"),
        ("/fail/relay", 502, "upstream_error"),
        ("/fail/slow", 504, "gateway_timeout"),
        ("/fail/storage", 507, "internal_error"),
        ("/fail/value", 422, "validation_error"),
    ],
)
async def test_whatever_is_raised(client, path, status, code):
    async with client.get(path, headers={"x-request-id": "mine"}) as response:
        told = await response.json()
        assert (
            response.status,
            response.headers["content-type"],
            response.headers["x-request-id"],
        ) == (status, "application/json", "mine")
    assert (told["error"]["code"], told["error"]["request_id"], told["request_id"]) == (code, "mine", "mine")


@pytest.mark.parametrize(
    "path, expected",
    [
        ("/fail/often", {"retry-after": "7", "retry-after-ms": "7000", "x-quota": "of the host"}),
        ("/fail/relay", {"retry-after": "7", "retry-after-ms": "7000"}),
        ("/fail/slow", {"retry-after": None}),
        ("/fail/full", {"retry-after": "1", "retry-after-ms": "0"}),
        ("/fail/unavailable", {"retry-after": "1", "retry-after-ms": "1000"}),
        ("/fail/login", {"www-authenticate": "Bearer", "content-language": None, "content-type": "application/json"}),
    ],
)
async def test_an_error_keeps_its_own_headers(client, path, expected):
    async with client.get(path) as response:
        assert {name: response.headers.get(name) for name in expected} == expected


async def test_an_error_of_a_middleware_keeps_its_words(client):
    async with client.get("/fail/slow") as response:
        assert (await response.json())["error"]["message"] == "The host gave up."


async def test_a_redirect_is_passed_on(client):
    async with client.get("/fail/moved", headers={"x-request-id": "mine"}, allow_redirects=False) as response:
        told = [response.headers.get(name) for name in ("location", "content-type", "x-request-id", "set-cookie")]
        assert (response.status, told) == (302, ["/elsewhere", "text/plain; charset=utf-8", "mine", "seen=yes; Path=/"])


async def test_a_method_that_is_not_allowed_is_told_which_are(client):
    async with client.delete("/work") as response:
        assert (response.status, response.headers["allow"]) == (405, "GET,HEAD")
        assert (await response.json())["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "headers, expected", [({"x-request-id": "mine"}, "mine"), ({"x-request-id": "a b"}, MADE), ({}, MADE)]
)
async def test_what_went_well_gets_an_id(client, headers, expected):
    async with client.get("/work", headers=headers) as response:
        assert (response.status, re.fullmatch(expected, response.headers["x-request-id"]) is not None) == (200, True)


def test_a_made_id_is_the_requests_alone():
    requests = [make_mocked_request("GET", "/") for _ in range(100)]
    first, second = ([request_id_of(request) for request in requests] for _ in range(2))
    assert (len(set(first)), second) == (100, first)


def test_a_client_that_was_too_slow_is_hung_up_on():
    response = error_response(request_timeout("Too slow."), "r")
    assert (response.status, response.keep_alive) == (408, False)
    assert json.loads(response.body)["error"]["code"] == "request_timeout"
