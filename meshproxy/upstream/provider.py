"""One configured provider: writes requests as HTTP/1.1 over pooled connections. The entry point of `upstream`.

A request is never repeated once a byte of it was written: a completion that may have run is paid for.
"""

import asyncio
import re
from collections.abc import Callable, Sequence

from meshproxy import config
from meshproxy.config import resolved
from meshproxy.errors import GatewayError, Source, invalid
from meshproxy.upstream.connection import Timeouts
from meshproxy.upstream.pool import BaseUrl, ClientContext, Dialer, Pool
from meshproxy.upstream.response import Response, Sink, unreachable

__all__ = ["Provider", "Response", "Sink"]

MAX_JOINED_BYTES = 65_536  # a head and a body up to this size are copied into one write
MAX_DEAD_CONNECTIONS = 3  # found closed in a row before a byte was written
MAX_KNOWN_PATHS = 16
MIN_SECRET_CHARS = 8  # shorter values are placeholders, such as local models take

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_PATH = re.compile(r"/[\x21-\x7e]*")
_FRAMING = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect"}
)


class Provider:
    """Posts requests to one upstream. `ssl_context` replaces the default. Raises ValueError for bad settings."""

    def __init__(
        self,
        name: str,
        settings: config.Upstream,
        api_key: str | None,
        *,
        ssl_context: ClientContext | None = None,
        user_agent: str = "meshproxy",
    ) -> None:
        self.name = name
        self.secrets = _secrets(settings, api_key)
        self._address = BaseUrl(settings.base_url)
        self._own_headers = _own_headers(settings, api_key, user_agent)
        self._heads: dict[str, bytes] = {}
        timeouts = Timeouts(
            settings.first_byte_timeout_s, settings.idle_timeout_s, settings.keepalive_s, settings.max_response_bytes
        )
        dialer = Dialer(self._address, settings.connect_timeout_s, ssl_context)
        self._pool = Pool(dialer.dial, timeouts, limit=settings.max_connections, wait_s=settings.connect_timeout_s)

    async def post(
        self, path: str, headers: Sequence[tuple[str, str]], body: bytes, on_sent: Callable[[], None] | None = None
    ) -> Response:
        """Send one request and return its answer once the head has arrived, whatever the status.

        `path` is appended to the base URL's path. `on_sent` is called when the request is written. Raises UpstreamError
        if no answer came, and GatewayError (client) for headers that can't be sent. Cancelling the awaiting task closes
        the connection at once.
        """
        request = self._request(path, headers, body)
        connection, answer = self._pool.take(), None
        if connection is not None and (answer := connection.send(request)) is None:
            connection.abort()
        for _ in range(MAX_DEAD_CONNECTIONS):
            if answer is not None:
                break
            connection = await self._pool.open()
            answer = connection.send(request)
        if connection is None or answer is None:
            raise unreachable(ConnectionResetError())
        if on_sent is not None:
            on_sent()
        try:
            return await answer
        except asyncio.CancelledError:
            connection.abandon(answer)
            raise

    def retire(self) -> None:
        """Close idle connections now, and busy ones after their answers. Further requests are still possible."""
        self._pool.retire()

    async def close(self) -> None:
        """Close every connection. Answers in progress fail."""
        await self._pool.close()

    def _request(self, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> list[bytes]:
        """Return the bytes of a request: one piece if it is small, else head and body."""
        begin = self._heads.get(path) or self._begin(path)
        lines = "".join([self._line(name, value) for name, value in headers]).encode("latin-1") if headers else b""
        head = b"%b%bcontent-length: %d\r\n\r\n" % (begin, lines, len(body))
        return [head + body] if len(body) < MAX_JOINED_BYTES else [head, body]

    def _begin(self, path: str) -> bytes:
        """Return the lines that are the same for every request to `path`."""
        target = self._address.path + path
        if not _PATH.fullmatch(target):
            raise ValueError(f"{target!r} is no path that can be sent")
        lines = [f"POST {target} HTTP/1.1", f"host: {self._address.authority}"]
        lines += [f"{name}: {value}" for name, value in self._own_headers.items()]
        begin = ("\r\n".join(lines) + "\r\n").encode("latin-1")
        if len(self._heads) < MAX_KNOWN_PATHS:
            self._heads[path] = begin
        return begin

    def _line(self, name: str, value: str) -> str:
        """Format one of the caller's headers. It must neither break its line nor repeat one of the provider's own."""
        lower = name.lower()
        if not _can_be_sent(name, value) or lower in _FRAMING or lower in self._own_headers:
            raise GatewayError(Source.CLIENT, invalid(f"The header {name[:64]!r} can't be passed on."))
        return f"{lower}: {value}\r\n"


def _secrets(settings: config.Upstream, api_key: str | None) -> tuple[str, ...]:
    """Return what clients must never see: the API key, and configured header values long enough to be secrets."""
    return tuple(
        value for value in (api_key or "", *map(resolved, settings.headers.values())) if len(value) >= MIN_SECRET_CHARS
    )


def _own_headers(settings: config.Upstream, api_key: str | None, user_agent: str) -> dict[str, str]:
    """Return the headers that every request has, by lower-case name. Raises ValueError for those that can't be sent."""
    own = {"user-agent": user_agent, "accept-encoding": "identity", "content-type": "application/json"}
    if api_key is not None:
        own["authorization"] = f"Bearer {api_key}"
    for name, value in settings.headers.items():
        if name.lower() in _FRAMING:
            raise ValueError(f"headers: {name} is set by the gateway")
        own[name.lower()] = resolved(value)
    for name, value in own.items():
        if not _can_be_sent(name, value):
            raise ValueError(f"headers: {name!r} has characters that a header can't carry")
    return own


def _can_be_sent(name: str, value: str) -> bool:
    return _NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None
