"""All requests that aiohttp handles: `AiohttpConnection`, its protocol with our bounds, and their error envelope.

Unknown paths, wrong methods, invalid bodies, invalid HTTP and bugs are all answered in the envelope. A connection is
closed if a head takes too long, or if it has one of the last descriptors.
"""

import asyncio
import math
import time
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple, cast

import structlog
from aiohttp import StreamReader, web
from aiohttp.http import HttpProcessingError
from aiohttp.http_exceptions import LineTooLong
from aiohttp.typedefs import Handler

from meshproxy.errors import (
    ErrorResponse,
    GatewayError,
    Source,
    internal_error,
    invalid,
    method_not_allowed,
    not_found,
    overloaded,
    request_timeout,
    request_too_large,
)
from meshproxy.http1.message import MAX_FIELDS, MAX_HEAD_BYTES
from meshproxy.openai.errors import envelope, error_headers
from meshproxy.openai.request import CHAT_PATH
from meshproxy.policy.failover import wait_of
from meshproxy.server.chat import final_error_response, request_id_of
from meshproxy.server.client_address import ProxiedClient

MAX_COMPARED_CHARS = 128  # of an unknown path
MIN_SIMILARITY = 0.8  # of the path that a 404 suggests: `/v1/messages` is 0.76 like `/v1/usage`
PATHS = web.AppKey("paths", tuple[str, ...])  # paths that a 404 may suggest
_CODES = {  # of the errors that a middleware of create_app() may raise
    401: "unauthorized",
    402: "insufficient_credits",
    403: "forbidden",
    408: "request_timeout",
    409: "conflict",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    502: "upstream_error",
    503: "overloaded",
    504: "gateway_timeout",
}
_OF_BODY = frozenset({"content-encoding", "content-language", "content-length", "content-type"})

_log = structlog.get_logger("meshproxy.server")


def error_response(error: ErrorResponse, request_id: str) -> web.Response:
    """Make the aiohttp response of an error response."""
    headers = dict(error_headers(error))
    headers["x-request-id"] = request_id
    response = web.Response(status=error.status, headers=headers, body=envelope(error, request_id))
    if error.status == 408 or error.code == "bad_request":  # RFC 9110, section 15.5.9; RFC 9112, section 11.2
        response.force_close()
    return response


def from_http_exception(error: web.HTTPException, request: web.BaseRequest) -> ErrorResponse:
    """Convert an error of aiohttp or of a middleware to an error response. Its Retry-After becomes `retry_after_s`."""
    wait_s = wait_of(error.headers.get("retry-after"), error.headers.get("retry-after-ms"), time.time())
    # an authority-form target (RFC 9112, 3.2.3) has no path
    target = (request.path or request.raw_path)[:256]
    if error.status == 404:
        return not_found(f"There is nothing at {target}.{_suggestion(request)}")
    if error.status == 405:
        allowed = error.headers.get("allow", "").replace(",", ", ")
        return method_not_allowed(f"{request.method[:32]} is not allowed at {target}, only {allowed}.")
    if error.status == 413:
        return request_too_large(request.client_max_size)
    if error.status == 500:
        return internal_error()
    if error.status == 503 and wait_s is None:
        return overloaded(error.reason)
    code = _CODES.get(error.status, "validation_error" if error.status < 500 else "internal_error")
    return ErrorResponse(error.status, code, error.reason, retry_after_s=wait_s)


def _suggestion(request: web.BaseRequest) -> str:
    """Suggest the nearest path that exists, by its end, else by similarity. "" if the application has no PATHS."""
    if not isinstance(request, web.Request) or PATHS not in request.app:
        return ""
    path = request.path[:MAX_COMPARED_CHARS].rstrip("/")
    known = request.app[PATHS]
    by_end = (name for name in known if path.endswith(name.removeprefix("/v1")))
    nearest = next(by_end, None) or next(iter(get_close_matches(path, known, n=1, cutoff=MIN_SIMILARITY)), None)
    hint = "" if nearest in {None, CHAT_PATH} else f" The nearest is {nearest}."
    return f"{hint} Chat completions are served at POST {CHAT_PATH}."


@web.middleware
async def envelope_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer whatever a handler raises in the envelope, but a redirect and what else is no error as it is.

    An error keeps the headers that it was raised with, except those of its body and those that the envelope sets.
    """
    request_id = request_id_of(request)
    try:
        response = await handler(request)
    except GatewayError as fault:
        return error_response(fault.response, request_id)
    except web.HTTPException as error:
        if error.status < 400:
            response = web.Response(status=error.status, reason=error.reason, text=error.text, headers=error.headers)
            response.cookies.update(error.cookies)
        else:
            response = error_response(from_http_exception(error, request), request_id)
            ours = {*_OF_BODY, *map(str.lower, response.headers)}
            response.headers.extend([header for header in error.headers.items() if header[0].lower() not in ours])
    except web.RequestPayloadError:
        return error_response(invalid("The request's body is malformed."), request_id)
    except ValueError as error:
        return error_response(invalid(str(error)), request_id)
    if not response.prepared:
        response.headers.setdefault("x-request-id", request_id)
    return response


HEADER_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 60.0
TOO_MANY_FIELDS = "Too many headers received"  # the parser's message: this fault has no class of its own
HEAD_TOO_LARGE = ErrorResponse(  # RFC 6585, section 5
    431,
    "request_head_too_large",
    f"The request's head is too large: it has at most {MAX_FIELDS} headers, each of at most {MAX_HEAD_BYTES} bytes.",
)
URI_TOO_LONG = ErrorResponse(  # RFC 9112, section 3
    414, "uri_too_long", f"The request's target is too long: it has at most {MAX_HEAD_BYTES} bytes."
)
TOO_MUCH_FRAMING = ErrorResponse(  # RFC 9112, section 7.1.1
    400,
    "bad_request",
    "This is not a valid HTTP request: its chunks are too small, or their extensions too long.",
)
HEAD_TIMEOUT = request_timeout("The request's head did not arrive in time.")
PARSE_BYTES = 16_384  # parsed at once: a fault, or a body of tiny chunks, is noticed before 256 KiB of it are parsed
# Bound on the framing of a chunked body, plus one byte for each 32 of content (a chunk of 200 bytes has six). Each
# chunk costs microseconds to parse, even a tiny one: 25 bodies of 6 MB in chunks of one byte delayed other requests by
# 20 s.
MAX_FRAMING_BYTES = 16_384
_NO_HEADER = b"\0\r\n\r\n"  # an end of a head that the parser refuses, wherever a header breaks off


class ConnectionLimits(NamedTuple):
    """A listener's bounds on its connections.

    `header_timeout_s`: how long a head may take. `on_refused`: called with the status of an answer to invalid HTTP.
    `write_timeout_s`: how long a client may take nothing of what is written to it. `max_descriptor`: connections from
    this descriptor on are closed, and `on_exhausted` is called. `headers` are added to the answer to invalid HTTP.
    """

    header_timeout_s: Callable[[], float] = lambda: HEADER_TIMEOUT_S
    on_refused: Callable[[int], None] = lambda _status: None
    write_timeout_s: Callable[[], float] = lambda: WRITE_TIMEOUT_S
    max_descriptor: float = math.inf
    on_exhausted: Callable[[], None] = lambda: None
    headers: tuple[tuple[str, str], ...] = ()

    def has_room(self, descriptor: int) -> bool:
        """Return whether a connection with this descriptor may stay. If not, it must be closed at once."""
        if descriptor < self.max_descriptor:
            return True
        self.on_exhausted()
        return False

    def too_late(self) -> bytes:
        """Return the answer to a head that didn't arrive in time, and count it."""
        self.on_refused(HEAD_TIMEOUT.status)
        return final_error_response(HEAD_TIMEOUT)


class AiohttpConnection(web.RequestHandler):
    """One client's connection served by aiohttp. `source`: the client named by a PROXY header.

    Input that the parser refuses is answered in the envelope, the connection is closed, and what follows a refused head
    is dropped unread. So is a body with too much framing. A head must arrive in time: the first one counted from the
    start of the connection, the others from their first byte. Between requests a connection may be idle.
    """

    __slots__ = (
        "_body",
        "_body_bytes",
        "_body_received",
        "_client_transport",
        "_has_first_line",
        "_head_begun",
        "_head_timer",
        "_is_line_too_long",
        "_is_refused",
        "_limits",
        "_line_bytes",
        "_source",
    )
    _client_transport: asyncio.Transport

    def __init__(
        self, server: web.Server, source: ProxiedClient | None, *, limits: ConnectionLimits, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._source = source
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_begun = False
        self._has_first_line = False  # of the head that arrives
        self._line_bytes = 0  # received of the header that arrives
        self._is_line_too_long = False
        self._is_refused = False
        self._body: StreamReader | None = None  # of the newest request
        self._body_bytes: int | None = None  # its Content-Length
        self._body_received = 0  # its bytes received, framing included

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Await the first head; close the connection at once if there is no room."""
        # aiohttp drops its own reference when it begins to close
        self._client_transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)
        self._start_head_timer()
        sock = transport.get_extra_info("socket")
        if sock is not None and not self._limits.has_room(sock.fileno()):
            self._client_transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a head or of a body, piece by piece. aiohttp passes none to have its kept bytes processed.

        A piece ends with a head and with a body of known length: the parser, given several requests of which one is
        invalid, drops those before it.
        """
        at = 0
        while not self._is_refused:
            end = self._end_of_piece(data, at)
            self._receive(data[at:end])
            at = end
            if at >= len(data):
                return

    def _end_of_piece(self, data: bytes, at: int) -> int:
        end = at + PARSE_BYTES
        if self._body is not None and not self._body.is_eof():
            return end if self._body_bytes is None else min(end, at + max(1, self._body_bytes - self._body.total_bytes))
        piece = data[at:end]
        empty = len(piece) - len(piece.lstrip(b"\r\n"))  # the parser takes empty lines before a head, however many
        blank = data.find(b"\r\n\r\n", at + empty, end)
        return end if blank < 0 else blank + 4

    def _receive(self, data: bytes) -> None:
        """Pass bytes to aiohttp, and keep the head's time."""
        known, body = len(self._messages), self._body
        in_body = body is not None and not body.is_eof()
        if self._has_first_line and not in_body and self._line_exceeds_bound(data):
            data = _NO_HEADER
        super().data_received(data)
        if len(self._messages) > known:
            self._stop_head_timer()
            self._inspect_newest()
            return
        if body is not None and in_body:
            behind = b"" if not body.is_eof() or self._body_bytes is not None else _behind_body(data)
            self._count_framing(body, len(data) - len(behind))
            if not body.is_eof():
                return
            data = behind
        if data.strip(b"\r\n") or (data and not self._is_answering):
            self._head_begun = True
            self._has_first_line = self._has_first_line or b"\n" in data.lstrip(b"\r\n")
            self._line_bytes = len(data) - data.rfind(b"\n") - 1 if b"\n" in data else self._line_bytes
            if self._head_timer is None:
                self._start_head_timer()

    def _line_exceeds_bound(self, data: bytes) -> bool:
        """Count the bytes of the header that arrives; return whether it has more than MAX_HEAD_BYTES.

        The parser has the same bound, but doesn't always count the name: it depends on how the name arrives. No piece has
        a whole line that is too long.
        """
        end = data.find(b"\n")
        self._line_bytes += len(data) if end < 0 else end
        self._is_line_too_long = self._line_bytes > MAX_HEAD_BYTES + len("\r")
        return self._is_line_too_long

    def _inspect_newest(self) -> None:
        """Note the body of the newest request, and whether aiohttp's parser found a fault."""
        message, body = self._messages[-1]
        fault = getattr(message, "exc", None)  # set if the parser found one
        if isinstance(fault, BaseException):
            self._is_refused = True
            fault.__traceback__ = None  # its frames hold the bytes read, and the exception itself
            if self._body is not None and not self._body.is_eof():
                self._messages.pop()  # the fault is in the body of the request before: it gets the one answer
                error = ErrorResponse(400, "bad_request", _error_message(fault, None))
                self._refuse_body(self._body, GatewayError(Source.CLIENT, error))
                return
        else:
            self._has_first_line, self._line_bytes = False, 0
        length = getattr(message, "headers", {}).get("content-length")
        self._body, self._body_bytes = body, None if length is None else int(length)
        self._body_received = 0

    def _count_framing(self, body: StreamReader, received: int) -> None:
        """Refuse a body whose framing is more than MAX_FRAMING_BYTES and a part of its data."""
        self._body_received += received
        if self._body_received - body.total_bytes > MAX_FRAMING_BYTES + body.total_bytes // 32:
            self._is_refused = True
            self._refuse_body(body, GatewayError(Source.CLIENT, TOO_MUCH_FRAMING))

    def _refuse_body(self, body: StreamReader, fault: Exception) -> None:
        """Fail the reading of a body, and close the connection after the answer."""
        body.set_exception(fault)
        body.feed_eof()  # otherwise aiohttp reads on after the answer
        self.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancel the head's time: the client is gone."""
        self._stop_head_timer()
        super().connection_lost(exc)

    async def start(self) -> None:
        """Serve requests. Close the connection if aiohttp's task raises: otherwise it would stay open, unserved."""
        try:
            await super().start()
        except Exception:
            self.logger.exception("a connection's task failed")
            self.force_close()

    @property
    def peername(self) -> Any:
        """The client's address and port as sockets return them."""
        return self._source or super().peername

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, or a part of the answer isn't sent."""
        transport = self.transport
        return self._request_in_progress or (transport is not None and transport.get_write_buffer_size() > 0)

    @property
    def unsent_bytes(self) -> int:
        """Bytes written that the client hasn't taken."""
        return self._client_transport.get_write_buffer_size()

    def abort(self) -> None:
        """Close the connection at once."""
        self._client_transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether no request, not even a part of one, has been received."""
        return not (self.busy or self._messages or self._head_begun)

    def interrupt(self) -> None:
        """Cancel the request that is being answered, if there is one."""
        if self._request_in_progress and self._task_handler is not None:
            self._task_handler.cancel()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer invalid HTTP (400), a head that is too large (414, 431) or a handler's bug (500)."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        if status >= 500:
            self.logger.error("handler failed", exc_info=exc)
            error = internal_error()
        else:
            is_field = self._has_first_line and (isinstance(exc, LineTooLong) or self._is_line_too_long)
            if is_field or message == TOO_MANY_FIELDS:
                error = HEAD_TOO_LARGE
            elif isinstance(exc, LineTooLong):
                error = URI_TOO_LONG
            else:
                error = ErrorResponse(status, "bad_request", _error_message(exc, message))
            self._limits.on_refused(error.status)
        response = error_response(error, request_id_of(request))
        response.headers.extend(self._limits.headers)
        response.force_close()
        return response

    @property
    def _is_answering(self) -> bool:
        return self._request_in_progress or bool(self._messages)

    def _start_head_timer(self) -> None:
        self._head_timer = asyncio.get_running_loop().call_later(self._limits.header_timeout_s(), self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
            self._head_begun = False

    def _on_head_timeout(self) -> None:
        """Close a connection whose head is late: with 408 if it has begun.

        Nothing is sent if it hasn't begun: a balancer that connects ahead of requests would take the 408 for an answer.
        A head behind a request gets its time once that is answered.
        """
        self._head_timer = None
        if self._is_answering:
            self._start_head_timer()
            return
        if self._head_begun and self.transport is not None:
            self.transport.write(self._limits.too_late())
        self.force_close()


def _behind_body(data: bytes) -> bytes:
    """Return what follows the empty line that ended a chunked body in these bytes, or was ended by them."""
    _, blank, rest = data.rpartition(b"\r\n\r\n")
    return rest if blank else data.lstrip(b"\r\n")


def _error_message(exc: BaseException | None, message: str | None) -> str:
    words: Any = exc.message if isinstance(exc, HttpProcessingError) else message
    lines = str(words or "bad request").splitlines() or ["bad request"]
    return f"This is not a valid HTTP request: {lines[0][:200].rstrip(':. ')}."
