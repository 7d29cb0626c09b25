"""The chat path between the client's connection and the gateway: reads requests, and writes answers to the transport.

`ChatHandler` serves requests of both connections, the fast path's and aiohttp's. `ClientStream` is the gateway's
`Downstream`; `PaddedStream` hides the sizes of its events. A body is read within a time and memory bound.
"""

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from email.utils import formatdate
from functools import lru_cache, partial
from http import HTTPStatus

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from meshproxy.config import Server
from meshproxy.errors import (
    ErrorResponse,
    GatewayError,
    Source,
    invalid,
    request_timeout,
    request_too_large,
    unsupported_media_type,
)
from meshproxy.gateway.entry import SMALL_BYTES
from meshproxy.gateway.exchange import Call, Downstream, DownstreamWrapper, Headers, Reply
from meshproxy.gateway.pipeline import Gateway
from meshproxy.openai.errors import envelope, error_headers
from meshproxy.openai.headers import (
    VERSION_HEADER,
    client_timeout_s,
    cors_headers,
    forwarded_headers,
    trace_id,
    valid_request_id,
)
from meshproxy.server.client_address import TrustedProxies
from meshproxy.server.fast_path import ClientConnection

_REQUEST_ID = web.RequestKey("request_id", str)


def request_id_of(request: web.BaseRequest) -> str:
    """Return the request's id, the same at each call: the client's x-request-id if it is valid, else a new one."""
    found = request.get(_REQUEST_ID)
    if found is None:
        found = request[_REQUEST_ID] = valid_request_id(request.headers.get("x-request-id")) or new_request_id()
    return found


def new_request_id() -> str:
    """Make an id from 96 random bits."""
    return f"req_{random.getrandbits(96):024x}"


PADDING_STEP_BYTES = 128
MAX_PADDED_BYTES = 1024  # larger events (tool calls, logprobs) get its next multiple, and don't raise the level

_COMMENT = b": %b\n\n"
_SHORTEST = len(_COMMENT % b"")
_FILLING = b"." * MAX_PADDED_BYTES


class PaddedStream(DownstreamWrapper):
    """A `Downstream` that pads every write to the size of the largest before it, rounded up to a step.

    So of a stream's sizes, an observer sees only the few moments at which its largest event grows by a step.
    """

    __slots__ = ("_level",)

    def __init__(self, downstream: Downstream) -> None:
        super().__init__(downstream)
        self._level = PADDING_STEP_BYTES

    def write(self, payload: bytes, frame: bytes | None = None) -> None:  # noqa: ARG002 - a frame's size is wrong with padding
        """Send whole events, padded by a comment."""
        size = len(payload) + _SHORTEST
        if size > MAX_PADDED_BYTES:
            target = _round_up(size, MAX_PADDED_BYTES)
        else:
            target = self._level = max(self._level, _round_up(size, PADDING_STEP_BYTES))
        self._downstream.write(payload + _COMMENT % _FILLING[: target - size])


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


MAX_BUFFERED_BYTES = 32_768  # bytes that may wait for a client before reading from the upstream stops

_REASONS = {status.value: status.phrase for status in HTTPStatus}


class WrittenResponse(web.StreamResponse):
    """A response that has been written already."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._stays_open = keep_alive

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection stays open."""
        return self._stays_open

    async def prepare(self, _request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Do nothing: everything is sent."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: everything is sent."""


class ClientStream:
    """The gateway's `Downstream` over one request's transport.

    HTTP/1.1 clients get chunks; HTTP/1.0 clients (`minor` 0) read until the end of the connection. `drained` returns
    when the client has caught up. `is_closing`: whether the gateway won't take another request. `extra`: headers
    besides the API's version.
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
        if self._is_closing():
            self.keep_alive = False
        self._send(head(200, [*headers, *self._extra, *framing], keep_alive=self.keep_alive, minor=self._minor))

    def write(self, payload: bytes, frame: bytes | None = None) -> None:
        """Send body bytes, in `frame` (whole chunks) if there is one."""
        if not self._chunked:
            frame = payload
        elif frame is None:
            frame = b"%x\r\n%b\r\n" % (len(payload), payload)
        transport = self._transport  # as `_send` does it, without a call for each event
        if transport is not None and not transport.is_closing():
            transport.write(frame)

    def finish(self) -> None:
        """End the body."""
        if self._chunked:
            self._send(b"0\r\n\r\n")

    def congested(self) -> bool:
        """Return whether more than `MAX_BUFFERED_BYTES` wait for this client."""
        transport = self._transport
        if transport is None or transport.is_closing():  # nothing more is written: see `_send`
            return False
        return transport.get_write_buffer_size() > MAX_BUFFERED_BYTES

    async def drained(self) -> None:
        """Wait until the client has caught up or gone. The connection holds the flow-control state."""
        with contextlib.suppress(ConnectionError):  # aiohttp's, of a client that has gone: others may want the answer
            await self._drained()

    def reply(self, reply: Reply) -> None:
        """Send a whole answer. If a stream has begun, no other answer is possible: break the connection off."""
        if self._begun:
            self.keep_alive = False
            if self._transport is not None:
                self._transport.abort()
            return
        if reply.status == 408 or self._is_closing():  # RFC 9110, section 15.5.9
            self.keep_alive = False
        headers = [*reply.headers, *self._extra, ("content-length", str(len(reply.body)))]
        self._send(head(reply.status, headers, keep_alive=self.keep_alive, minor=self._minor) + reply.body)

    def end(self) -> None:
        """Send nothing from now on: the request is answered, and work that goes on without its client may still write."""
        self._transport = None

    def _send(self, data: bytes) -> None:
        """Write, unless the client has gone; its handler is then being cancelled already."""
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(data)


def head(status: int, headers: Iterable[tuple[str, str]], *, keep_alive: bool, minor: int = 1) -> bytes:
    """Format a response head.

    Header names and values must be free of CR, LF and NUL (RFC 9110, 5.5): our own and the filtered ones of providers
    are.
    """
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}", f"date: {_date(int(time.time()))}"]
    lines += map(": ".join, headers)
    if not keep_alive:
        lines.append("connection: close")
    elif minor == 0:
        lines.append("connection: keep-alive")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1", "replace")


@lru_cache(maxsize=1)
def _date(now_s: int) -> str:
    """Format the time of an answer (RFC 9110, section 5.6.7)."""
    return formatdate(now_s, usegmt=True)


def final_error_response(error: ErrorResponse) -> bytes:
    """Format a complete error response, the last one on a connection."""
    request_id = new_request_id()
    body = envelope(error, request_id)
    headers = [("x-request-id", request_id), *error_headers(error), ("content-length", str(len(body)))]
    return head(error.status, headers, keep_alive=False) + body


SLOWEST_BYTES_PER_S = 65_536  # adds a second to a body's time for each of these bytes: half a megabit per second


ReserveMemory = Callable[[int], Awaitable[None]]  # for so many bytes: gateway.entry.BodyReservation.take
# A body of unknown length reserves memory for this much first; a larger one then for the largest body allowed.
CHUNKED_BYTES = 1_048_576


async def body_of(
    connection: ClientConnection, fields: dict[str, str], server: Server, reserve: ReserveMemory
) -> bytes:
    """Read the body of a fast-path request with these header fields, and clear them: nothing needs them any more."""
    timeout_s = _body_timeout_s(fields, server, server.max_body_bytes)
    length = int(fields["content-length"])
    if length > SMALL_BYTES:
        await reserve(length)
    try:
        return await connection.body(timeout_s)
    except TimeoutError as error:
        raise _body_timeout() from error
    finally:
        fields.clear()  # a stream may last for minutes


async def read_json_body(
    request: web.BaseRequest, server: Server, reserve: ReserveMemory, max_bytes: int | None = None
) -> bytes:
    """Read the body of an aiohttp request. `max_bytes` may lower the bound of `server.max_body_bytes`."""
    max_bytes = server.max_body_bytes if max_bytes is None else min(max_bytes, server.max_body_bytes)
    timeout_s = _body_timeout_s(request.headers, server, max_bytes)
    length = request.content_length
    if length is not None:
        await reserve(length)
    _send_continue(request)
    reserved = max_bytes if length is not None else SMALL_BYTES
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) <= reserved:
                    continue
                if len(body) > max_bytes:
                    raise GatewayError(Source.CLIENT, request_too_large(max_bytes))
                reserved = max_bytes if reserved >= CHUNKED_BYTES else min(CHUNKED_BYTES, max_bytes)
                await reserve(reserved)
            return bytes(body)
    except TimeoutError as error:
        raise _body_timeout() from error
    except web.RequestPayloadError as error:
        raise GatewayError(Source.CLIENT, invalid("The request's body is malformed.")) from error


def _body_timeout_s(headers: Mapping[str, str], server: Server, max_bytes: int) -> float:
    """Return how many seconds a body may take. Raises GatewayError if its headers are invalid."""
    encoding = headers.get("content-encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise GatewayError(
            Source.CLIENT, unsupported_media_type("Send the body uncompressed: content-encoding is not supported.")
        )
    content_type = headers.get("content-type", "application/json")
    if content_type != "application/json" and not _is_json(content_type):
        raise GatewayError(Source.CLIENT, unsupported_media_type("Send the body as `content-type: application/json`."))
    length = int(headers.get("content-length", 0))
    if length > max_bytes:
        raise GatewayError(Source.CLIENT, request_too_large(max_bytes))
    return server.body_timeout_s + length / SLOWEST_BYTES_PER_S


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def _body_timeout() -> GatewayError:
    return GatewayError(Source.CLIENT, request_timeout("The request's body did not arrive in time."))


def _send_continue(request: web.BaseRequest) -> None:
    """Answer `Expect: 100-continue` before waiting for the body; in HTTP/1.0 it is ignored (RFC 9110, section 10.1.1)."""
    is_expected = request.headers.get("expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    if is_expected and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


class ChatHandler:
    """The handler of chat completions. `clock` is monotonic, in seconds."""

    def __init__(self, gateway: Gateway, clock: Callable[[], float], trusted_proxies: TrustedProxies) -> None:
        self.trusted_proxies = trusted_proxies  # replaced by a reload
        self.closes_idle = False  # whether a connection is closed after its answer, also if that doesn't say so
        self._gateway = gateway
        self._clock = clock

    def client_of(self, request: web.BaseRequest) -> str | None:
        """Return the client address of an aiohttp request."""
        return self.trusted_proxies.client_of(request.remote, request.headers)

    async def serve(self, connection: ClientConnection, fields: dict[str, str]) -> None:
        """Serve a fast-path request with these header fields."""
        keep_alive = fields.get("connection", "").lower() != "close"
        server = self._gateway.active.settings.server
        stream = ClientStream(
            connection.transport,
            connection.drained,
            self._is_closing,
            keep_alive=keep_alive,
            extra=cors_headers(fields["origin"], server.cors_origins) if "origin" in fields else None,
        )
        keep_open = False
        try:
            known_id = valid_request_id(fields["x-request-id"]) if "x-request-id" in fields else None
            call = self._call(
                known_id or new_request_id(), fields, connection.peer, partial(body_of, connection, fields, server)
            )
            reply = await self._gateway.chat(call, self._padded(stream))
            if reply is not None:
                stream.reply(reply)
            stream.end()
            keep_open = stream.keep_alive and not self.closes_idle
        finally:
            connection.answered(keep_alive=keep_open)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve an aiohttp request. The answer is written when this returns."""
        server = self._gateway.active.settings.server
        stream = ClientStream(
            request.transport,
            request.writer.drain,
            self._is_closing,
            keep_alive=request.keep_alive,
            minor=request.version.minor,
            extra=cors_headers(request.headers.get("origin"), server.cors_origins),
        )
        call = self._call(
            request_id_of(request),
            request.headers,
            request.remote,
            partial(read_json_body, request, server),
        )
        reply = await self._gateway.chat(call, self._padded(stream))
        if reply is not None:
            if request.content.exception() is not None:  # in a broken body: the next request can't be found
                stream.keep_alive = False
            stream.reply(reply)
        stream.end()
        await request.writer.drain()  # otherwise the answers to a client that reads none would pile up
        return WrittenResponse(keep_alive=stream.keep_alive and not self.closes_idle)

    def _call(
        self,
        request_id: str,
        headers: Mapping[str, str],
        peer: str | None,
        read_body: Callable[[ReserveMemory], Awaitable[bytes]],
    ) -> Call:
        """Make the gateway's Call of a request. `peer` is the connection's other end, None on a unix socket."""
        received_at = self._clock()
        timeout_s = headers.get("x-stainless-read-timeout")
        return Call(
            request_id=request_id,
            authorization=headers.get("authorization"),
            read_body=read_body,
            received_at=received_at,
            forward=forwarded_headers(headers),
            idempotency_key=headers.get("idempotency-key"),
            trace_id=trace_id(headers["traceparent"]) if "traceparent" in headers else None,
            deadline=received_at + client_timeout_s(timeout_s) if timeout_s is not None else math.inf,
            api_version=headers.get("x-mesh-version"),
            client=self.trusted_proxies.client_of(peer, headers),
            sees_usage="x-meshapi-sdk" in headers,
        )

    def _padded(self, stream: ClientStream) -> Downstream:
        return PaddedStream(stream) if self._gateway.active.settings.stream.padding else stream

    def _is_closing(self) -> bool:
        return self._gateway.draining
