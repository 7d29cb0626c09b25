"""One configured provider: its connections, and the requests written to it as HTTP/1.1. The entry point of `upstream`.

`Dialer` opens connections: each dial resolves the name anew, tries the addresses side by side (RFC 8305), and verifies
TLS. `Pool` keeps at most `limit` of them. Idle ones are reused, the latest first. A request that finds none free waits
in line for at most `wait_s`. A request is never repeated once a byte of it was written: a completion that may have run
is paid for.
"""

import asyncio
import errno
import os
import re
import resource
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohappyeyeballs

from meshproxy import config
from meshproxy.config import resolved
from meshproxy.config.load import MIN_SECRET_CHARS
from meshproxy.config.settings import DEFAULT_PORTS, host_fault
from meshproxy.errors import GatewayError, Phase, Source, invalid
from meshproxy.upstream.connection import Connection, State, Timeouts
from meshproxy.upstream.response import Response, closing, connect_timeout, exhausted, unreachable

HAPPY_EYEBALLS_DELAY_S = 0.25  # RFC 8305 section 8
# The most that one read returns, and so what a stream with a stalled client may hold in memory beside its queued
# output. Linux doubles it for bookkeeping (socket(7)). At a round trip of 100 ms it still allows 300 KB per second.
RECEIVE_BUFFER_BYTES = 32_768
RESERVED_DESCRIPTORS = 64  # kept for the admin listener, the ledger, the journal and name look-ups


class BaseUrl:
    """A parsed base URL, or ValueError. `authority` is the Host header; `path` is the prefix of requests' paths."""

    def __init__(self, base_url: str) -> None:
        url = urlsplit(base_url)
        default_port = DEFAULT_PORTS.get(url.scheme)
        if default_port is None or not url.hostname:
            raise ValueError("base_url: not an http or https URL")
        if url.username is not None or url.query or url.fragment:
            raise ValueError("base_url: no user, query or fragment belongs in it")
        self.is_tls = url.scheme == "https"
        try:
            host = url.hostname if ":" in url.hostname else url.hostname.encode("idna").decode("ascii")
        except UnicodeError as error:
            raise ValueError(f"base_url: {error}") from error
        invalid_host = host_fault(host)
        if invalid_host is not None:
            raise ValueError(f"base_url: {invalid_host}")
        self.host = host
        self.port = url.port or default_port
        self.path = url.path.rstrip("/")
        bracketed = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = bracketed if self.port == default_port else f"{bracketed}:{self.port}"


class ClientContext(ssl.SSLContext):
    """A TLS context that resumes `session`, if set, in each new connection (RFC 8446, 2.2).

    Event loops have no argument for a session, but they ask the context for each connection's TLS object.
    """

    session: ssl.SSLSession | None = None

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Make the TLS object of one connection."""
        return super().wrap_bio(*args, **{**options, "session": self.session})


def verified_context() -> ClientContext:
    """Make a TLS context that verifies certificate and name and offers HTTP/1.1 only."""
    context = ClientContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    context.set_alpn_protocols(["http/1.1"])
    return context


class Dialer:
    """Connects to one address. Name look-up, TCP and TLS together may take `timeout_s`."""

    def __init__(self, address: BaseUrl, timeout_s: float, ssl_context: ClientContext | None = None) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._ssl = (ssl_context or verified_context()) if address.is_tls else None
        self._latest: ssl.SSLObject | None = None  # the next connection resumes its session

    async def dial(self, connection: Connection) -> None:
        """Connect `connection`. Raises UpstreamError, always safe to repeat."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._connect(connection)
        except TimeoutError as error:
            raise connect_timeout(self._timeout_s) from error
        except (OSError, UnicodeError) as error:
            raise unreachable(error) from error

    async def _connect(self, connection: Connection) -> None:
        """Resolve the name, connect to the first address that answers, and negotiate TLS."""
        loop = asyncio.get_running_loop()
        host, port = self._address.host, self._address.port
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        # Not create_connection(happy_eyeballs_delay=...): uvloop doesn't have that argument.
        sock = await aiohappyeyeballs.start_connection(
            found, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S, socket_factory=_socket
        )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._ssl is None:
            await loop.create_connection(lambda: connection, sock=sock)
            return
        if self._latest is not None:
            self._ssl.session = self._latest.session
        # TLS over a transport of our own, because the TLS transport doesn't report unsent bytes
        # (Connection.carried_by).
        carrier, _ = await loop.create_connection(asyncio.Protocol, sock=sock)
        try:
            transport = await loop.start_tls(carrier, connection, self._ssl, server_hostname=host)
        except (OSError, ssl.SSLError) as error:
            carrier.abort()
            raise unreachable(error, Phase.TLS) from error
        except BaseException:
            carrier.abort()
            raise
        if transport is None:
            raise unreachable(ConnectionResetError(), Phase.TLS)
        connection.carried_by = carrier
        connection.connection_made(transport)
        self._latest = transport.get_extra_info("ssl_object")


def descriptor_bound(limit: int) -> int:
    """Return the descriptor number from which on no connection to a provider is opened.

    `limit` is RLIMIT_NOFILE (getrlimit(2)). A new descriptor is the lowest free number (open(2)), so it shows how many
    are in use.
    """
    return limit - min(RESERVED_DESCRIPTORS, limit // 4)


def _socket(info: tuple[Any, ...]) -> socket.socket:
    """Make a socket with a bounded receive buffer, which must be set before connecting (tcp(7)).

    Raises OSError (EMFILE) where only the reserved descriptors are left.
    """
    sock = socket.socket(*info[:3])
    if sock.fileno() >= descriptor_bound(resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        sock.close()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    return sock


class Pool:
    """Connections to one provider; see the module docstring. `dial` connects a connection or raises."""

    def __init__(
        self, dial: Callable[[Connection], Awaitable[None]], timeouts: Timeouts, *, limit: int, wait_s: float
    ) -> None:
        self._dial = dial
        self._timeouts = timeouts
        self._limit = limit
        self._wait_s = wait_s
        self._idle: list[Connection] = []
        self._live: set[Connection] = set()
        self._waiters: deque[asyncio.Future[Connection]] = deque()
        self._closed = False
        self._retired = False

    def take(self) -> Connection | None:
        """Return an idle connection that seems alive, or None. Stale ones found on the way are closed."""
        while self._idle:
            connection = self._idle.pop()
            if connection.state is State.IDLE and not connection.has_unread_input():
                return connection
            connection.abort()
        return None

    async def open(self) -> Connection:
        """Return a new connection or, at the limit, the first that becomes free; or raise UpstreamError, repeatable."""
        if self._closed:
            raise closing()
        connection = self._new() or await self._wait_for_free()
        if connection.state is not State.NEW:
            return connection
        try:
            await self._dial(connection)
        except BaseException:
            connection.abort()
            self._lost(connection)
            raise
        if self._closed:
            connection.abort()
            raise closing()
        return connection

    def retire(self) -> None:
        """Close idle connections, and keep none from now on."""
        self._retired = True
        for connection in tuple(self._idle):
            connection.abort()
        self._idle.clear()

    async def close(self) -> None:
        """Close every connection, including busy ones, and wait until the sockets are closed."""
        self._closed = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(closing())
        self._waiters.clear()
        lost = [connection.close() for connection in tuple(self._live) if connection.state is not State.NEW]
        if lost:
            await asyncio.wait(lost)

    def _new(self) -> Connection | None:
        if len(self._live) >= self._limit:
            return None
        connection = Connection(self._timeouts, self._freed, self._lost)
        self._live.add(connection)
        return connection

    async def _wait_for_free(self) -> Connection:
        """Wait for a connection that becomes free. Raises UpstreamError after wait_s."""
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s):
                return await waiter
        except TimeoutError as error:
            self._stop_waiting(waiter)
            raise exhausted(self._limit) from error
        except asyncio.CancelledError:
            self._stop_waiting(waiter)
            raise

    def _stop_waiting(self, waiter: asyncio.Future[Connection]) -> None:
        """Remove a waiter that gave up. A connection that it was just given goes to the next waiter."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        if waiter.cancelled() or not waiter.done() or waiter.exception() is not None:
            return
        connection = waiter.result()
        if connection.state is State.NEW:
            self._lost(connection)
        elif connection.state is State.IDLE:
            self._freed(connection)

    def _freed(self, connection: Connection) -> None:
        """Hand on or keep a connection whose exchange is over."""
        if self._closed:
            connection.abort()
        elif self._waiters and self._hand_over(connection):
            return
        elif self._retired:
            connection.abort()
        else:
            self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        """Remove a closed connection. The first waiter in line gets its slot."""
        if connection not in self._live:
            return
        self._live.remove(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiters and (successor := self._new()) is not None and not self._hand_over(successor):
            self._live.remove(successor)

    def _hand_over(self, connection: Connection) -> bool:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False


MAX_JOINED_BYTES = 65_536  # a head and a body up to this size are copied into one write
MAX_DEAD_CONNECTIONS = 3  # found closed in a row before a byte was written
MAX_KNOWN_PATHS = 16

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
        self, path: str, headers: Sequence[tuple[str, str]], body: bytes, on_sent: Callable[[bool], None] | None = None
    ) -> Response:
        """Send one request and return its answer once the head has arrived, whatever the status.

        `path` is appended to the base URL's path. `on_sent` is called with True when the request is written, and again
        when it is given up: with False if its last byte hadn't left then. Raises UpstreamError if no answer came, and
        GatewayError (client) for headers that can't be sent. Cancelling the awaiting task closes the connection at once.
        """
        begin = self._heads.get(path) or self._begin(path)
        lines = "".join([self._line(name, value) for name, value in headers]).encode("latin-1") if headers else b""
        head = b"%b%bcontent-length: %d\r\n\r\n" % (begin, lines, len(body))
        request = [head + body] if len(body) < MAX_JOINED_BYTES else [head, body]
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
            on_sent(True)  # noqa: FBT003 # a callback
        try:
            return await answer
        except asyncio.CancelledError:
            is_sent = connection.abandon(answer)
            if on_sent is not None:
                on_sent(is_sent)
            raise

    def retire(self) -> None:
        """Close idle connections now, and busy ones after their answers. Further requests are still possible."""
        self._pool.retire()

    async def close(self) -> None:
        """Close every connection. Answers in progress fail."""
        await self._pool.close()

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
