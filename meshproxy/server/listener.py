"""The listeners. A connection of the data listener begins as the main job's, and is aiohttp's from its first request for
anything else; one of the admin listener is aiohttp's from the beginning.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, cast

from aiohttp import HttpVersion11, web
from aiohttp.web_request import BaseRequest
from yarl import URL

from meshproxy.server.connection import LINGER_S, ClientConnection
from meshproxy.server.general import GeneralConnection, Strictness
from meshproxy.server.proxy_protocol import Source
from meshproxy.telemetry.tasks import Tasks
from meshproxy.wire.head import MAX_FIELDS, MAX_HEAD_BYTES

Connection = ClientConnection | GeneralConnection

LOOK_S = 0.25  # how late a connection's deadline may be noticed
WRITES_LOOKED_AT_EACH_S = 1.0  # or sooner, where the time-out is short
SHUTDOWN_S = 1.0

USUAL = Strictness()

_UNREADABLE = web.RequestKey("unreadable", bool)


class Chat(Protocol):
    """Who answers the usual requests."""

    def serve(self, connection: ClientConnection, fields: dict[str, str]) -> Coroutine[Any, Any, None]:
        """Answer one request, and tell its connection."""


class _Server(web.Server):
    """Makes protocols for sockets. It is the `Host` of its connections."""

    def __init__(self, handler: Any, chat: Callable[[], Chat] | None, strictness: Strictness, **options: Any) -> None:
        super().__init__(handler, strictness=strictness, **options)
        self.usual: set[ClientConnection] = set()
        self._chat = chat
        self._strictness = strictness
        self._unsent: dict[Connection, tuple[int, float]] = {}  # bytes, and since when none was taken
        self._writes_looked_at = 0.0

    def __call__(self, source: Source | None = None) -> Any:  # which protocol aiohttp can't say
        return self.others(source) if self._chat is None else ClientConnection(self, self._loop, source)

    def others(self, source: Source | None) -> GeneralConnection:
        return GeneralConnection(self, source, loop=self._loop, **self._kwargs)

    def header_timeout_s(self) -> float:
        return self._strictness.header_timeout_s()

    def has_room(self, descriptor: int) -> bool:
        return self._strictness.has_room(descriptor)

    def joined(self, connection: ClientConnection) -> None:
        self.usual.add(connection)

    def left(self, connection: ClientConnection) -> None:
        self.usual.discard(connection)

    def serve(self, connection: ClientConnection, fields: dict[str, str]) -> Coroutine[Any, Any, None]:
        assert self._chat is not None  # noqa: S101 - else there is no such connection
        return self._chat().serve(connection, fields)

    def too_late(self) -> bytes:
        return self._strictness.too_late()

    def look_at_deadlines(self) -> None:
        now = self._loop.time()
        for connection in [connection for connection in self.usual if connection.deadline <= now]:
            connection.expire()
        if now - self._writes_looked_at >= min(WRITES_LOOKED_AT_EACH_S, self._strictness.write_timeout_s() / 4):
            self._writes_looked_at = now
            self._look_at_writes(now)

    def all(self) -> "list[Connection]":
        """Every connection."""
        return [*self.usual, *cast("list[GeneralConnection]", self.connections)]

    def _look_at_writes(self, now: float) -> None:
        """Give up every client that has taken nothing for too long of what was written to it: its request is cancelled."""
        before, self._unsent = self._unsent, {}
        for connection in self.all():
            unsent = connection.unsent_bytes
            if not unsent:
                continue
            known, since = before.get(connection, (0, now))
            if unsent < known:
                since = now
            if now - since >= self._strictness.write_timeout_s():
                connection.abort()
            else:
                self._unsent[connection] = unsent, since


class Runner(web.AppRunner):
    """Serves an application on any number of sockets, and the chat path beside it: usual requests pass neither router nor
    middleware. `chat`: who answers them, once there are any; without it every request is the application's. A client that hangs
    up cancels its handler. `loops`: what keeps the look at deadlines running.
    """

    def __init__(
        self,
        app: web.Application,
        chat: Callable[[], Chat] | None,
        strictness: Strictness = USUAL,
        loops: Tasks | None = None,
    ) -> None:
        super().__init__(app, shutdown_timeout=SHUTDOWN_S)
        self._loops = loops if loops is not None else Tasks()
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

    def _connections(self) -> "list[Connection]":
        server = cast("_Server | None", self.server)
        return server.all() if server is not None else []

    async def _make_server(self) -> web.Server:
        await super()._make_server()  # starts the application; the server it makes serves nobody
        server = _Server(
            self._dispatch,
            self._chat,
            self._strictness,
            request_factory=self._request,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            max_headers=MAX_FIELDS,
            lingering_time=LINGER_S,
        )
        self._looking = self._loops.keep("deadlines", partial(_now_and_then, server.look_at_deadlines))
        return server

    def _request(self, message: Any, *parts: Any) -> web.Request:
        """A request of what the parser made of the bytes. Whether the host of an absolute target can be decoded
        (`http://xn--a/` can't, RFC 3492) is found only here, where a ValueError would end the connection's task.
        """
        try:
            return self.app._make_request(message, *parts)  # noqa: SLF001 - as AppRunner does
        except ValueError:
            request = self.app._make_request(message._replace(url=URL("/")), *parts)  # noqa: SLF001
            request[_UNREADABLE] = True
            return request

    async def _dispatch(self, request: BaseRequest) -> web.StreamResponse:
        message = request._message  # noqa: SLF001 - what the parser made of the bytes
        refusal = _refusal_of(request)
        if refusal is not None:
            return request.protocol.handle_error(request, 400, None, refusal)
        if message.upgrade:  # declined; aiohttp's parser drops what came behind it in the same read
            request._message = message._replace(should_close=True)  # noqa: SLF001
        response = await self.app._handle(cast("web.Request", request))  # noqa: SLF001 - what the factory made
        if self.closing:
            response.force_close()
        return response


def _refusal_of(request: BaseRequest) -> str | None:
    """Why a request that the parser let through is refused: it can be read in two ways, or not at all."""
    headers = request.headers
    if request.get(_UNREADABLE):
        return "the host of its target can't be read"
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if request.version < HttpVersion11:  # RFC 9112, section 6.1
            return "a Transfer-Encoding in HTTP/1.0"
        if coding.lower() != "chunked":
            return "a Transfer-Encoding other than chunked"
    if len(headers.getall("authorization", ())) > 1:  # a proxy in front may have looked at the other one
        return "more than one Authorization header"
    return None


async def _now_and_then(look: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        look()
