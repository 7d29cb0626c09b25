"""The one envelope for everything that goes wrong outside the main job: paths, methods, bodies, bugs."""

from difflib import get_close_matches

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

MAIN_PATH = "/v1/chat/completions"
MAX_COMPARED_CHARS = 128  # of a path that isn't there
PATHS = web.AppKey("paths", tuple[str, ...])  # those that a caller may have meant
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
        return not_found(f"There is nothing at {request.path[:256]}.{_hint(request)}")
    if error.status == 405:
        allowed = error.headers.get("allow", "").replace(",", ", ")
        return method_not_allowed(f"{request.method[:32]} is not allowed at {request.path[:256]}, only {allowed}.")
    if error.status == 413:
        return request_too_large(request.client_max_size)
    if error.status >= 500:
        return internal_error() if error.status == 500 else overloaded(error.reason)
    return Problem(error.status, _CODES.get(error.status, "validation_error"), error.reason)


def _hint(request: web.BaseRequest) -> str:
    """Name the nearest path that there is, where the application has told its paths: by its end, else by its letters."""
    if not isinstance(request, web.Request) or PATHS not in request.app:
        return ""
    path = request.path[:MAX_COMPARED_CHARS].rstrip("/")
    known = request.app[PATHS]
    by_end = (name for name in known if path.endswith(name.removeprefix("/v1")))
    nearest = next(by_end, None) or next(iter(get_close_matches(path, known, n=1, cutoff=0.75)), None)
    hint = "" if nearest in {None, MAIN_PATH} else f" The nearest is {nearest}."
    return f"{hint} Chat completions are served at POST {MAIN_PATH}."


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
