"""The one envelope for everything that goes wrong outside the main job: paths, methods, bodies, bugs."""

import asyncio
import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import StreamReader
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from meshproxy.errors import (
    ErrorResponse,
    GatewayError,
    internal_error,
    invalid,
    method_not_allowed,
    not_found,
    overloaded,
    request_timeout,
    request_too_large,
)
from meshproxy.openai.errors import envelope, problem_headers
from meshproxy.server.chat import parting, request_id_of
from meshproxy.server.client_address import Source

MAIN_PATH = "/v1/chat/completions"
MAX_COMPARED_CHARS = 128  # of a path that isn't there
PATHS = web.AppKey("paths", tuple[str, ...])  # those that a caller may have meant
_CODES = {401: "unauthorized", 403: "forbidden"}  # what a middleware of create_app()'s may raise

_log = structlog.get_logger("meshproxy.server")


def problem_response(problem: ErrorResponse, request_id: str) -> web.Response:
    """A problem as an aiohttp response."""
    headers = dict(problem_headers(problem))
    headers["x-request-id"] = request_id
    response = web.Response(status=problem.status, headers=headers, body=envelope(problem, request_id))
    if problem.status == 408:  # RFC 9110, section 15.5.9
        response.force_close()
    return response


def http_problem(error: web.HTTPException, request: web.BaseRequest) -> ErrorResponse:
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
    return ErrorResponse(error.status, _CODES.get(error.status, "validation_error"), error.reason)


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
    except GatewayError as fault:
        return problem_response(fault.problem, request_id)
    except web.HTTPException as error:
        response = problem_response(http_problem(error, request), request_id)
        if "allow" in error.headers:
            response.headers["allow"] = error.headers["allow"]
        return response
    except web.RequestPayloadError:
        return problem_response(invalid("The request's body is broken."), request_id)
    except ValueError as error:
        return problem_response(invalid(str(error)), request_id)
    if not response.prepared:
        response.headers.setdefault("x-request-id", request_id)
    return response


HEADER_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 60.0
TOO_LATE = request_timeout("The request's head did not come in time.")
PIECE_BYTES = 16_384  # parsed at a time: a fault or a body of tiny chunks is noticed before 256 KiB of it are parsed
# What the framing of a chunked body may take, and one byte more for each eight of content (a chunk of 64 bytes has six). A
# chunk costs microseconds to parse, however small it is: 25 bodies of 6 MB in chunks of a byte kept others waiting for 20 s.
MAX_FRAMING_BYTES = 32_768


class Strictness(NamedTuple):
    """How long a request's head may take, in seconds as of now, what is called with the status of what was no request, how long a
    client may take nothing of what is written to it, and the descriptor from which on connections are closed, with what is
    called then.
    """

    header_timeout_s: Callable[[], float] = lambda: HEADER_TIMEOUT_S
    on_refused: Callable[[int], None] = lambda _status: None
    write_timeout_s: Callable[[], float] = lambda: WRITE_TIMEOUT_S
    max_descriptor: float = math.inf
    on_crowded: Callable[[], None] = lambda: None

    def has_room(self, descriptor: int) -> bool:
        """Whether a connection may stay. Of one that may not, the descriptor is one of the last: hang up at once."""
        if descriptor < self.max_descriptor:
            return True
        self.on_crowded()
        return False

    def too_late(self) -> bytes:
        """The answer to a head that didn't come in time."""
        self.on_refused(TOO_LATE.status)
        return parting(TOO_LATE)


class GeneralConnection(RequestHandler):
    """One client's connection. What the parser refuses is answered in the envelope, and the connection closed. `source`: the
    client that a PROXY header told.

    A head has to come within a time: from the connection's beginning for the first, from its first byte for the others. In
    between a connection may be idle. What comes behind a refused head is dropped unread. A body whose framing is too much
    of it is refused.
    """

    __slots__ = (
        "_body",
        "_body_received",
        "_head_begun",
        "_head_timer",
        "_is_refused",
        "_source",
        "_strictness",
        "_wire",
    )
    _wire: asyncio.Transport

    def __init__(self, server: web.Server, source: Source | None, *, strictness: Strictness, **options: Any) -> None:
        super().__init__(server, **options)
        self._source = source
        self._strictness = strictness
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_begun = False
        self._is_refused = False
        self._body: StreamReader | None = None  # of the newest request
        self._body_received = 0  # bytes of it, with what frames them

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
        self._wire = cast("asyncio.Transport", transport)  # aiohttp forgets its own when it begins to close
        super().connection_made(transport)
        self._expect_head()
        sock = transport.get_extra_info("socket")
        if sock is not None and not self._strictness.has_room(sock.fileno()):
            self._wire.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or of a body, or none: aiohttp asks so for what it has kept."""
        for at in range(0, len(data) or 1, PIECE_BYTES):
            if self._is_refused:
                return
            self._receive(data[at : at + PIECE_BYTES])

    def _receive(self, data: bytes) -> None:
        known = self._request_count
        super().data_received(data)
        if self._request_count != known:
            self._expect_nothing()
            self._look_at_newest()
        elif self._body is not None and not self._body.is_eof():
            self._count_framing(self._body, len(data))
        elif not (self._request_in_progress or self._messages):
            self._head_begun = True
            if self._head_timer is None:
                self._expect_head()

    def _look_at_newest(self) -> None:
        message, self._body = self._messages[-1]
        self._body_received = 0
        fault = getattr(message, "exc", None)  # of what aiohttp's parser refused
        if isinstance(fault, BaseException):
            self._is_refused = True
            fault.__traceback__ = None  # its frames hold what was read, and the fault again

    def _count_framing(self, body: StreamReader, received: int) -> None:
        self._body_received += received
        if self._body_received - body.total_bytes > MAX_FRAMING_BYTES + body.total_bytes // 8:
            self._is_refused = True
            body.set_exception(web.RequestPayloadError("its chunks are too small"))
            body.feed_eof()  # else aiohttp reads on after the answer
            self.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone."""
        self._expect_nothing()
        super().connection_lost(exc)

    async def start(self) -> None:
        """Serve requests; close the connection whatever ends this, so that no fault of aiohttp's or ours parks it."""
        try:
            await super().start()
        except Exception:
            self.logger.exception("a connection's task failed")
            self.force_close()

    @property
    def peername(self) -> Any:
        """Who is at the other end, as sockets tell it."""
        return self._source or super().peername

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, or a part of the answer is still ours."""
        transport = self.transport
        return self._request_in_progress or (transport is not None and transport.get_write_buffer_size() > 0)

    @property
    def unsent_bytes(self) -> int:
        """How much was written that the client hasn't taken."""
        return self._wire.get_write_buffer_size()

    def abort(self) -> None:
        """Hang up at once."""
        self._wire.abort()

    @property
    def is_idle(self) -> bool:
        """Whether neither a request nor a part of one is here."""
        return not (self.busy or self._messages or self._head_begun)

    def interrupt(self) -> None:
        """Cancel the request that is being answered, if one is."""
        if self._request_in_progress and self._task_handler is not None:
            self._task_handler.cancel()

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer bytes that are no HTTP request (400), or a handler's bug (500)."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        if status >= 500:
            self.logger.error("handler failed", exc_info=exc)
            problem = internal_error()
        else:
            problem = ErrorResponse(status, "bad_request", _in_words(exc, message))
            self._strictness.on_refused(status)
        response = problem_response(problem, request_id_of(request))
        response.force_close()
        return response

    def _expect_head(self) -> None:
        self._head_timer = self._loop.call_later(self._strictness.header_timeout_s(), self._give_head_up)

    def _expect_nothing(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
            self._head_begun = False

    def _give_head_up(self) -> None:
        """408 for half a head; nothing for none, for a balancer that connects ahead would take it for an answer."""
        self._head_timer = None
        if self._head_begun and self.transport is not None:
            self.transport.write(self._strictness.too_late())
        self.force_close()


def _in_words(exc: BaseException | None, message: str | None) -> str:
    words: Any = exc.message if isinstance(exc, HttpProcessingError) else message
    lines = str(words or "bad request").splitlines() or ["bad request"]
    return f"This is not a valid HTTP request: {lines[0][:200].rstrip(':. ')}."
