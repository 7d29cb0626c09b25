"""The data listener: aiohttp's server with our words for what it refuses, and the main job ahead of the router.

What can be read in two ways is refused and the connection closed, so that no proxy in front can be of another mind about where a
request ends (RFC 9112, section 11.2).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from meshproxy.errors import Problem, internal_error, request_timeout
from meshproxy.server.chat import CHAT_PATH
from meshproxy.server.downstream import head
from meshproxy.server.envelope import problem_response
from meshproxy.server.proxy_protocol import Source
from meshproxy.server.request_id import new_request_id, request_id_of
from meshproxy.wire.replies import envelope, problem_headers

MAX_LINE_BYTES = 16_384
MAX_HEADER_BYTES = 16_384
MAX_HEADERS = 128
HEADER_TIMEOUT_S = 10.0
LINGER_S = (
    10.0  # read on after an answer to half a body: closed at once, the answer would be lost in a reset (RFC 9112, 9.6)
)

ChatFunction = Callable[[BaseRequest], Awaitable[web.StreamResponse]]


class Strictness(NamedTuple):
    """How long a request's head may take, in seconds as of now, and who is told the status of what was no request."""

    header_timeout_s: Callable[[], float] = lambda: HEADER_TIMEOUT_S
    on_refused: Callable[[int], None] = lambda _status: None


USUAL = Strictness()


class _Connection(RequestHandler):
    """One client's connection. What the parser refuses is answered in the envelope, and the connection closed. `source`: the
    client that a PROXY header told.

    A head has to come within a time: from the connection's beginning for the first, from its first byte for the others. In
    between a connection may be idle.
    """

    __slots__ = ("_head_begun", "_head_timer", "_source", "_strictness")

    def __init__(self, server: web.Server, source: Source | None, *, strictness: Strictness, **options: Any) -> None:
        super().__init__(server, **options)
        self._source = source
        self._strictness = strictness
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or of a body."""
        known = self._request_count
        super().data_received(data)
        if self._request_count != known:
            self._expect_nothing()
        elif self._waiter is not None and data:
            self._head_begun = True
            if self._head_timer is None:
                self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone."""
        self._expect_nothing()
        super().connection_lost(exc)

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
            problem = Problem(status, "bad_request", _in_words(exc, message))
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
            problem = request_timeout("The request's head did not come in time.")
            request_id = new_request_id()
            body = envelope(problem, request_id)
            headers = [("x-request-id", request_id), *problem_headers(problem), ("content-length", str(len(body)))]
            self.transport.write(head(problem.status, headers, keep_alive=False, version=1) + body)
            self._strictness.on_refused(problem.status)
        self.force_close()


class _Server(web.Server):
    def __call__(self, source: Source | None = None) -> _Connection:
        return _Connection(self, source, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves an application on any number of sockets. The chat path is a string comparison away from its handler: it passes
    neither router nor middleware. A client that hangs up cancels its handler.
    """

    def __init__(self, app: web.Application, chat: ChatFunction, strictness: Strictness = USUAL) -> None:
        super().__init__(app, shutdown_timeout=1.0)
        self._chat = chat
        self._strictness = strictness
        self.closing = False  # whether answers say `Connection: close`

    def connected(self) -> int:
        """How many connections there are."""
        return len(self._connections())

    def close_idle(self) -> None:
        """Close the connections without a request. (aiohttp's own pre_shutdown() also drops bodies that are being sent.)"""
        for connection in self._connections():
            if connection.is_idle:
                connection.force_close()

    def busy(self) -> int:
        """How many connections have a request, or an answer that isn't all sent."""
        return sum(connection.busy for connection in self._connections())

    def interrupt(self) -> None:
        """Cancel every request that is being answered."""
        for connection in self._connections():
            connection.interrupt()

    def _connections(self) -> list[_Connection]:
        return cast("list[_Connection]", self.server.connections) if self.server is not None else []

    async def _make_server(self) -> web.Server:
        await super()._make_server()  # starts the application; the server it makes serves nobody
        return _Server(
            self._dispatch,
            request_factory=self.app._make_request,  # noqa: SLF001 - as AppRunner does
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
            lingering_time=LINGER_S,
            strictness=self._strictness,
        )

    async def _dispatch(self, request: BaseRequest) -> web.StreamResponse:
        message = request._message  # noqa: SLF001 - what the parser made of the bytes
        if message.upgrade:  # declined; aiohttp's parser drops what came behind it in the same read
            request._message = message._replace(should_close=True)  # noqa: SLF001
        if message.chunked and request.headers["transfer-encoding"].lower() != "chunked":
            return request.protocol.handle_error(request, 400, None, "a Transfer-Encoding other than chunked")
        if request.method == "POST" and request.rel_url.raw_path == CHAT_PATH:
            return await self._chat(request)
        response = await self.app._handle(cast("web.Request", request))  # noqa: SLF001 - what the factory made
        if self.closing:
            response.force_close()
        return response


def _in_words(exc: BaseException | None, message: str | None) -> str:
    words: Any = exc.message if isinstance(exc, HttpProcessingError) else message
    lines = str(words or "bad request").splitlines() or ["bad request"]
    return f"This is not a valid HTTP request: {lines[0][:200].rstrip(':. ')}."
