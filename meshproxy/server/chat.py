"""`POST /v1/chat/completions`: from a request to the gateway's `Call` and back to the socket. The usual request comes from a
`ClientConnection`, any other through aiohttp.
"""

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from meshproxy.gateway.call import Call, Downstream
from meshproxy.gateway.pipeline import Gateway
from meshproxy.server.body import TakeRoom, body_of, read_json_body
from meshproxy.server.client_address import TrustedProxies
from meshproxy.server.connection import ClientConnection
from meshproxy.server.downstream import ClientStream, Sent
from meshproxy.server.padding import PaddedStream
from meshproxy.server.request_id import new_request_id, request_id_of
from meshproxy.wire.headers import cors_headers, forwarded_headers, patience_s, request_id, trace_id

CHAT_PATH = "/v1/chat/completions"


class ChatHandler:
    """The handler of the main job. `clock` is monotonic seconds."""

    def __init__(self, gateway: Gateway, clock: Callable[[], float], trusted_proxies: TrustedProxies) -> None:
        self.trusted_proxies = trusted_proxies  # a reload puts others here
        self._gateway = gateway
        self._clock = clock

    def client_of(self, request: web.BaseRequest) -> str | None:
        """Who a request of aiohttp's came from."""
        return self.trusted_proxies.client_of(request.remote, request.headers)

    async def serve(self, connection: ClientConnection, fields: dict[str, str]) -> None:
        """Serve a usual request, of these header fields."""
        keep_alive = fields.get("connection", "").lower() != "close"
        server = self._gateway.deployment.settings.server
        stream = ClientStream(
            connection.transport,
            connection.drained,
            self._is_closing,
            keep_alive=keep_alive,
            extra=cors_headers(fields.get("origin"), server.cors_origins),
        )
        stays = False
        try:
            call = self._call(
                request_id(fields.get("x-request-id")) or new_request_id(),
                fields,
                connection.peer,
                lambda take: body_of(connection, fields, server, take),
            )
            reply = await self._gateway.chat(call, self._padded(stream))
            if reply is not None:
                stream.reply(reply)
            stays = stream.keep_alive
        finally:
            connection.answered(keep_alive=stays)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve a request of aiohttp's; the answer is written by the time this returns."""
        server = self._gateway.deployment.settings.server
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
            lambda take: read_json_body(request, server, take),
        )
        reply = await self._gateway.chat(call, self._padded(stream))
        if reply is not None:
            stream.reply(reply)
        await request.writer.drain()  # else a client that sends requests and reads no answer would be read on
        return Sent(keep_alive=stream.keep_alive)

    def _call(
        self,
        request_id: str,
        headers: Mapping[str, str],
        peer: str | None,
        read_body: Callable[[TakeRoom], Awaitable[bytes]],
    ) -> Call:
        received_at = self._clock()
        return Call(
            request_id=request_id,
            authorization=headers.get("authorization"),
            read_body=read_body,
            received_at=received_at,
            forward=forwarded_headers(headers),
            idempotency_key=headers.get("idempotency-key"),
            trace_id=trace_id(headers.get("traceparent")),
            deadline=received_at + patience_s(headers.get("x-stainless-read-timeout")),
            api_version=headers.get("x-mesh-version"),
            client=self.trusted_proxies.client_of(peer, headers),
            sees_usage="x-meshapi-sdk" in headers,
        )

    def _padded(self, stream: ClientStream) -> Downstream:
        return PaddedStream(stream) if self._gateway.deployment.settings.stream.padding else stream

    def _is_closing(self) -> bool:
        return self._gateway.draining
