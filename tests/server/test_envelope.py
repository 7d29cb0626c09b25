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
    "broken": web.HTTPInternalServerError(),
    "unavailable": web.HTTPServiceUnavailable(),
    "value": ValueError("Odd."),
}


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
        ("/fail/odd", 415, "validation_error"),
        ("/fail/broken", 500, "internal_error"),
        ("/fail/unavailable", 503, "overloaded"),
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
