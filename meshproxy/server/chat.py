"""`POST /v1/chat/completions`: from aiohttp's request to the gateway's `Call` and back to the socket."""

import asyncio
from collections.abc import Callable

from aiohttp import web

from meshproxy.errors import Fault, Source, invalid, request_timeout, request_too_large, unsupported_media_type
from meshproxy.gateway.call import Call
from meshproxy.gateway.pipeline import Gateway
from meshproxy.server.client_address import TrustedProxies
from meshproxy.server.downstream import ClientStream, Sent
from meshproxy.server.padding import PaddedStream
from meshproxy.wire.headers import forwarded_headers, patience_s, trace_id

CHAT_PATH = "/v1/chat/completions"
SLOWEST_BYTES_PER_S = 65_536  # a body's time grows by a second for as much of its length: half a megabit


class ChatHandler:
    """The handler of the main job. `request_id` picks the id of a request; `clock` is monotonic seconds."""

    def __init__(
        self,
        gateway: Gateway,
        request_id: Callable[[web.BaseRequest], str],
        clock: Callable[[], float],
        trusted_proxies: TrustedProxies,
    ) -> None:
        self.trusted_proxies = trusted_proxies  # a reload puts others here
        self._gateway = gateway
        self._request_id = request_id
        self._clock = clock

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one request; the answer is written by the time this returns."""
        headers = request.headers
        received_at = self._clock()
        call = Call(
            request_id=self._request_id(request),
            authorization=headers.get("authorization"),
            read_body=lambda: read_json_body(request, self._gateway.deployment.settings.server.body_timeout_s),
            received_at=received_at,
            forward=forwarded_headers(headers),
            idempotency_key=headers.get("idempotency-key"),
            trace_id=trace_id(headers.get("traceparent")),
            deadline=received_at + patience_s(headers.get("x-stainless-read-timeout")),
            client=self.trusted_proxies.client_of(request.remote, headers),
        )
        stream = ClientStream(request, is_closing=lambda: self._gateway.draining)
        padded = self._gateway.deployment.settings.stream.padding
        reply = await self._gateway.chat(call, PaddedStream(stream) if padded else stream)
        if reply is not None:
            stream.reply(reply)
        return Sent(keep_alive=stream.keep_alive)


async def read_json_body(request: web.BaseRequest, timeout_s: float) -> bytes:
    """The body of a request, whole; a Fault for what isn't JSON by its headers (415), is too large (413) or too slow (408)."""
    headers = request.headers
    encoding = headers.get("content-encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise Fault(Source.CLIENT, unsupported_media_type("Send the body as it is: no content-encoding is taken here."))
    content_type = headers.get("content-type")
    if content_type is not None and not _is_json(content_type):
        raise Fault(Source.CLIENT, unsupported_media_type("Send the body as `content-type: application/json`."))
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise Fault(Source.CLIENT, request_too_large(limit))
    await _continue(request)
    try:
        if request.content.is_eof():
            return await request.read()
        async with asyncio.timeout(timeout_s + (request.content_length or 0) / SLOWEST_BYTES_PER_S):
            return await request.read()
    except TimeoutError as error:
        raise Fault(Source.CLIENT, request_timeout("The request's body did not come in time.")) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise Fault(Source.CLIENT, request_too_large(limit)) from error
    except web.RequestPayloadError as error:
        raise Fault(Source.CLIENT, invalid("The request's body is broken.")) from error


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


async def _continue(request: web.BaseRequest) -> None:
    """Answer `Expect: 100-continue` (RFC 9110, section 10.1.1) before the body is awaited."""
    if request.headers.get("expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
