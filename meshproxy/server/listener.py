"""The data listener: aiohttp's server with our words for what it refuses, and the main job ahead of the router."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from meshproxy.errors import Problem, internal_error
from meshproxy.server.chat import CHAT_PATH
from meshproxy.server.envelope import problem_response
from meshproxy.server.request_id import request_id_of

MAX_LINE_BYTES = 16_384
MAX_HEADER_BYTES = 16_384
MAX_HEADERS = 128

ChatFunction = Callable[[BaseRequest], Awaitable[web.StreamResponse]]


class _Connection(RequestHandler):
    """One client's connection. What the parser refuses is answered in the envelope, and the connection closed."""

    __slots__ = ()

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
        response = problem_response(problem, request_id_of(request))
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves an application on any number of sockets. The chat path is a string comparison away from its handler: it passes
    neither router nor middleware. A client that hangs up cancels its handler.
    """

    def __init__(self, app: web.Application, chat: ChatFunction) -> None:
        super().__init__(app, shutdown_timeout=1.0)
        self._chat = chat

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
        )

    async def _dispatch(self, request: BaseRequest) -> web.StreamResponse:
        if request.method == "POST" and request.path == CHAT_PATH:
            return await self._chat(request)
        return await self.app._handle(cast("web.Request", request))  # noqa: SLF001 - what the factory made


def _in_words(exc: BaseException | None, message: str | None) -> str:
    words: Any = exc.message if isinstance(exc, HttpProcessingError) else message
    lines = str(words or "bad request").splitlines() or ["bad request"]
    return f"This is not a valid HTTP request: {lines[0][:200].rstrip(':. ')}."
