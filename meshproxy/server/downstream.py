"""The client's socket: heads and bodies written straight to the transport.

aiohttp reads the requests; what goes out is already bytes, so it skips aiohttp's response classes, and `Sent` tells aiohttp
that nothing is left to do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time

from meshproxy.errors import Problem
from meshproxy.gateway.call import Headers, Reply
from meshproxy.server.request_id import new_request_id
from meshproxy.wire.headers import VERSION_HEADER
from meshproxy.wire.replies import envelope, problem_headers

MAX_BUFFERED_BYTES = 32_768  # what may wait for a client before reading upstream stops

_REASONS = {status.value: status.phrase for status in HTTPStatus}


class Sent(web.StreamResponse):
    """A response that has been written already."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keep = keep_alive

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection stays open."""
        return self._keep

    async def prepare(self, _request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Nothing is left to send."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to send."""


class ClientStream:
    """The gateway's `Downstream` over one request's transport. HTTP/1.1 clients get chunks, HTTP/1.0 ones (`minor` 0) read to
    the end. `drained` returns when the client has caught up; `is_closing`: whether the gateway won't take another request;
    `extra`: headers for the answer beside the API's version.
    """

    __slots__ = ("_begun", "_chunked", "_drained", "_extra", "_is_closing", "_minor", "_transport", "keep_alive")

    def __init__(
        self,
        transport: asyncio.Transport | None,
        drained: Callable[[], Awaitable[None]],
        is_closing: Callable[[], bool],
        *,
        keep_alive: bool,
        minor: int = 1,
        extra: Headers | None = None,
    ) -> None:
        self._transport = transport
        self._extra = [VERSION_HEADER, *extra] if extra else [VERSION_HEADER]
        self._drained = drained
        self._is_closing = is_closing
        self._minor = minor
        self._chunked = minor > 0
        self._begun = False
        self.keep_alive = keep_alive and self._chunked

    def begin(self, headers: Headers) -> None:
        """Send the head of a 200 event stream."""
        self._begun = True
        framing = [("transfer-encoding", "chunked")] if self._chunked else []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.set_write_buffer_limits(MAX_BUFFERED_BYTES)
        self._end_with_this_answer()
        self._send(head(200, [*headers, *self._extra, *framing], keep_alive=self.keep_alive, minor=self._minor))

    def write(self, payload: bytes, frame: bytes | None = None) -> None:
        """Send body bytes, in the frame they came in where there is one."""
        if not self._chunked:
            frame = payload
        elif frame is None:
            frame = b"%x\r\n%b\r\n" % (len(payload), payload)
        self._send(frame)

    def finish(self) -> None:
        """End the body."""
        if self._chunked:
            self._send(b"0\r\n\r\n")

    def congested(self) -> bool:
        """Whether more waits for this client than `MAX_BUFFERED_BYTES`."""
        transport = self._transport
        return transport is not None and transport.get_write_buffer_size() > MAX_BUFFERED_BYTES

    async def drained(self) -> None:
        """Return when the client has taken enough; its connection holds the flow-control state."""
        await self._drained()

    def reply(self, reply: Reply) -> None:
        """Send a whole answer. There is no way back from a stream that has begun but to break it off."""
        if self._begun:
            self.keep_alive = False
            if self._transport is not None:
                self._transport.abort()
            return
        self._end_with_this_answer()
        if reply.status == 408:  # RFC 9110, section 15.5.9
            self.keep_alive = False
        headers = [*reply.headers, *self._extra, ("content-length", str(len(reply.body)))]
        self._send(head(reply.status, headers, keep_alive=self.keep_alive, minor=self._minor) + reply.body)

    def _end_with_this_answer(self) -> None:
        """Say `Connection: close` where the gateway won't take another request."""
        if self._is_closing():
            self.keep_alive = False

    def _send(self, data: bytes) -> None:
        """Write, unless the client has gone: then its handler is being cancelled already."""
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(data)


def head(status: int, headers: Iterable[tuple[str, str]], *, keep_alive: bool, minor: int = 1) -> bytes:
    """A response head. Header names and values must be clean of CR, LF and NUL: both ours and the filtered ones of providers
    are (RFC 9110, section 5.5).
    """
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}", f"date: {rfc822_formatted_time()}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if not keep_alive:
        lines.append("connection: close")
    elif minor == 0:
        lines.append("connection: keep-alive")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1", "replace")


def parting(problem: Problem) -> bytes:
    """The whole last answer on a connection."""
    request_id = new_request_id()
    body = envelope(problem, request_id)
    headers = [("x-request-id", request_id), *problem_headers(problem), ("content-length", str(len(body)))]
    return head(problem.status, headers, keep_alive=False) + body
