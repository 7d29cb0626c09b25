"""The body of a request, whole; a Fault for what isn't JSON by its headers (415), is too large (413) or too slow (408)."""

import asyncio
from collections.abc import Mapping

from aiohttp import web

from meshproxy.config import Server
from meshproxy.errors import Fault, Source, invalid, request_timeout, request_too_large, unsupported_media_type
from meshproxy.server.connection import ClientConnection

SLOWEST_BYTES_PER_S = 65_536  # a body's time grows by a second for as much of its length: half a megabit


async def body_of(connection: ClientConnection, fields: Mapping[str, str], server: Server) -> bytes:
    """The body of a usual request, of these header fields."""
    timeout_s = _time_for(fields, server)
    try:
        return await connection.body(timeout_s)
    except TimeoutError as error:
        raise _too_slow() from error


async def read_json_body(request: web.BaseRequest, server: Server) -> bytes:
    """The body of a request of aiohttp's."""
    timeout_s = _time_for(request.headers, server)
    _continue(request)
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError as error:
        raise _too_slow() from error
    except web.HTTPRequestEntityTooLarge as error:
        raise Fault(Source.CLIENT, request_too_large(request.client_max_size)) from error
    except web.RequestPayloadError as error:
        raise Fault(Source.CLIENT, invalid("The request's body is broken.")) from error


def _time_for(headers: Mapping[str, str], server: Server) -> float:
    """How many seconds it may take, if its headers are right."""
    encoding = headers.get("content-encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise Fault(Source.CLIENT, unsupported_media_type("Send the body as it is: no content-encoding is taken here."))
    content_type = headers.get("content-type", "application/json")
    if content_type != "application/json" and not _is_json(content_type):
        raise Fault(Source.CLIENT, unsupported_media_type("Send the body as `content-type: application/json`."))
    length = int(headers.get("content-length", 0))
    if length > server.max_body_bytes:
        raise Fault(Source.CLIENT, request_too_large(server.max_body_bytes))
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
