"""The body of a request, whole; a Fault for what isn't JSON by its headers (415), is too large (413) or too slow (408)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from meshproxy.config import Server
from meshproxy.errors import Fault, Source, invalid, request_timeout, request_too_large, unsupported_media_type
from meshproxy.gateway.bounds import SMALL_BYTES
from meshproxy.server.connection import ClientConnection

SLOWEST_BYTES_PER_S = 65_536  # a body's time grows by a second for as much of its length: half a megabit


TakeRoom = Callable[[int], Awaitable[None]]  # of gateway.bounds.Room
CHUNKED_BYTES = (
    1_048_576  # for which a body of unknown length takes room at first; one that is larger, for the most it may be
)


async def body_of(connection: ClientConnection, fields: Mapping[str, str], server: Server, take: TakeRoom) -> bytes:
    """The body of a usual request, of these header fields."""
    timeout_s = _time_for(fields, server, server.max_body_bytes)
    length = int(fields["content-length"])
    if length > SMALL_BYTES:
        await take(length)
    try:
        return await connection.body(timeout_s)
    except TimeoutError as error:
        raise _too_slow() from error


async def read_json_body(
    request: web.BaseRequest, server: Server, take: TakeRoom, most_bytes: int | None = None
) -> bytes:
    """The body of a request of aiohttp's. `most_bytes`: where less than `server.max_body_bytes` is enough."""
    most_bytes = server.max_body_bytes if most_bytes is None else min(most_bytes, server.max_body_bytes)
    timeout_s = _time_for(request.headers, server, most_bytes)
    length = request.content_length
    if length is not None:
        await take(length)
    _continue(request)
    taken = most_bytes if length is not None else SMALL_BYTES
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) <= taken:
                    continue
                if len(body) > most_bytes:
                    raise Fault(Source.CLIENT, request_too_large(most_bytes))
                taken = most_bytes if taken >= CHUNKED_BYTES else min(CHUNKED_BYTES, most_bytes)
                await take(taken)
            return bytes(body)
    except TimeoutError as error:
        raise _too_slow() from error
    except web.RequestPayloadError as error:
        raise Fault(Source.CLIENT, invalid("The request's body is broken.")) from error


def _time_for(headers: Mapping[str, str], server: Server, most_bytes: int) -> float:
    """How many seconds it may take, if its headers are right."""
    encoding = headers.get("content-encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise Fault(Source.CLIENT, unsupported_media_type("Send the body as it is: no content-encoding is taken here."))
    content_type = headers.get("content-type", "application/json")
    if content_type != "application/json" and not _is_json(content_type):
        raise Fault(Source.CLIENT, unsupported_media_type("Send the body as `content-type: application/json`."))
    length = int(headers.get("content-length", 0))
    if length > most_bytes:
        raise Fault(Source.CLIENT, request_too_large(most_bytes))
    return server.body_timeout_s + length / SLOWEST_BYTES_PER_S


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def _too_slow() -> Fault:
    return Fault(Source.CLIENT, request_timeout("The request's body did not come in time."))


def _continue(request: web.BaseRequest) -> None:
    """Answer `Expect: 100-continue` (RFC 9110, section 10.1.1) before the body is awaited."""
    if request.headers.get("expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
