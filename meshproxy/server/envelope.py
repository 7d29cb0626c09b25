"""The one envelope for everything that goes wrong outside the main job: paths, methods, bodies, bugs."""

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from meshproxy.errors import (
    Fault,
    Problem,
    internal_error,
    invalid,
    method_not_allowed,
    not_found,
    overloaded,
    request_too_large,
)
from meshproxy.server.request_id import request_id_of
from meshproxy.wire.replies import envelope, problem_headers

_CODES = {401: "unauthorized", 403: "forbidden"}  # what a middleware of create_app()'s may raise

_log = structlog.get_logger("meshproxy.server")


def problem_response(problem: Problem, request_id: str) -> web.Response:
    """A problem as an aiohttp response."""
    headers = dict(problem_headers(problem))
    headers["x-request-id"] = request_id
    response = web.Response(status=problem.status, headers=headers, body=envelope(problem, request_id))
    if problem.status == 408:  # RFC 9110, section 15.5.9
        response.force_close()
    return response


def http_problem(error: web.HTTPException, request: web.BaseRequest) -> Problem:
    """What aiohttp or a middleware refused, in our words."""
    if error.status == 404:
        return not_found(f"There is nothing at {request.path[:256]}.")
    if error.status == 405:
        return method_not_allowed(f"{request.method[:32]} is not allowed at {request.path[:256]}.")
    if error.status == 413:
        return request_too_large(request.client_max_size)
    if error.status >= 500:
        return internal_error() if error.status == 500 else overloaded(error.reason)
    return Problem(error.status, _CODES.get(error.status, "validation_error"), error.reason)


@web.middleware
async def envelope_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever a handler raises becomes an envelope."""
    request_id = request_id_of(request)
    try:
        response = await handler(request)
    except Fault as fault:
        return problem_response(fault.problem, request_id)
    except web.HTTPException as error:
        response = problem_response(http_problem(error, request), request_id)
        if "allow" in error.headers:
            response.headers["allow"] = error.headers["allow"]
        return response
    except ValueError as error:
        return problem_response(invalid(str(error)), request_id)
    if not response.prepared:
        response.headers.setdefault("x-request-id", request_id)
    return response
