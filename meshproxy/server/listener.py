"""The data listener: a connection begins as the main job's, and is aiohttp's from its first request for anything else."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, cast

from aiohttp import web
from aiohttp.web_request import BaseRequest

from meshproxy.server.connection import LINGER_S, ClientConnection
from meshproxy.server.general import GeneralConnection, Strictness
from meshproxy.server.proxy_protocol import Source
from meshproxy.wire.head import MAX_FIELDS, MAX_HEAD_BYTES

LOOK_S = 0.25  # how late a connection's deadline may be noticed
SHUTDOWN_S = 1.0

USUAL = Strictness()


class Chat(Protocol):
    """Who answers the usual requests."""

    def serve(self, connection: ClientConnection, fields: dict[str, str]) -> Coroutine[Any, Any, None]:
        """Answer one request, and tell its connection."""


class _Server(web.Server):
    """Makes protocols for sockets. It is the `Host` of its connections."""

    def __init__(self, handler: Any, chat: Callable[[], Chat], strictness: Strictness, **options: Any) -> None:
        super().__init__(handler, strictness=strictness, **options)
        self.usual: set[ClientConnection] = set()
        self._chat = chat
        self._strictness = strictness

    def __call__(self, source: Source | None = None) -> Any:  # which protocol aiohttp can't say
        return ClientConnection(self, self._loop, source)

    def others(self, source: Source | None) -> GeneralConnection:
        return GeneralConnection(self, source, loop=self._loop, **self._kwargs)

    def header_timeout_s(self) -> float:
        return self._strictness.header_timeout_s()

    def joined(self, connection: ClientConnection) -> None:
        self.usual.add(connection)

    def left(self, connection: ClientConnection) -> None:
        self.usual.discard(connection)

    def serve(self, connection: ClientConnection, fields: dict[str, str]) -> Coroutine[Any, Any, None]:
        return self._chat().serve(connection, fields)

    def too_late(self) -> bytes:
        return self._strictness.too_late()

    def look_at_deadlines(self) -> None:
        now = self._loop.time()
        for connection in [connection for connection in self.usual if connection.deadline <= now]:
            connection.expire()


class Runner(web.AppRunner):
    """Serves an application on any number of sockets, and the chat path beside it: usual requests pass neither router nor
    middleware. `chat`: who answers them, once there are any. A client that hangs up cancels its handler.
    """

    def __init__(self, app: web.Application, chat: Callable[[], Chat], strictness: Strictness = USUAL) -> None:
        super().__init__(app, shutdown_timeout=SHUTDOWN_S)
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

    async def cleanup(self) -> None:
        """Stop listening, and hang up on everybody."""
        if self.server is not None:
            self._looking.cancel()
            for connection in tuple(cast("_Server", self.server).usual):
                connection.abort()
        await super().cleanup()

    def _connections(self) -> list[ClientConnection | GeneralConnection]:
        server = cast("_Server | None", self.server)
        return [*server.usual, *cast("list[GeneralConnection]", server.connections)] if server is not None else []

    async def _make_server(self) -> web.Server:
        await super()._make_server()  # starts the application; the server it makes serves nobody
        server = _Server(
            self._dispatch,
            self._chat,
            self._strictness,
            request_factory=self.app._make_request,  # noqa: SLF001 - as AppRunner does
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            max_headers=MAX_FIELDS,
            lingering_time=LINGER_S,
        )
        self._looking = asyncio.create_task(_now_and_then(server.look_at_deadlines), name="deadlines")
        return server

    async def _dispatch(self, request: BaseRequest) -> web.StreamResponse:
        message = request._message  # noqa: SLF001 - what the parser made of the bytes
        if message.upgrade:  # declined; aiohttp's parser drops what came behind it in the same read
            request._message = message._replace(should_close=True)  # noqa: SLF001
        if message.chunked and request.headers["transfer-encoding"].lower() != "chunked":
            return request.protocol.handle_error(request, 400, None, "a Transfer-Encoding other than chunked")
        response = await self.app._handle(cast("web.Request", request))  # noqa: SLF001 - what the factory made
        if self.closing:
            response.force_close()
        return response


async def _now_and_then(look: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        look()
