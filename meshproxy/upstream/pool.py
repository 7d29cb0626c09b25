"""How a provider is reached: its name looked up anew for every connection, its addresses tried side by side, TLS verified."""

import asyncio
import errno
import os
import resource
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohappyeyeballs

from meshproxy.config.settings import host_fault
from meshproxy.errors import Phase
from meshproxy.upstream.connection import Connection, Patience
from meshproxy.upstream.response import closing, connect_timeout, dropped, exhausted, unreachable

HAPPY_EYEBALLS_DELAY_S = 0.25  # RFC 8305 section 8
# What one read may bring, and so what a stream whose client stands still may have in memory beside what waits for the client.
# Linux doubles it for its own bookkeeping (socket(7)). At a round trip of 100 ms it still lets 300 KB a second through.
RECEIVE_BUFFER_BYTES = 32_768
RESERVED_DESCRIPTORS = (
    64  # for the admin listener, the ledger, the journal and name look-ups, when all others are in use
)
_PORTS = {"http": 80, "https": 443}


class Address:
    """Where a base URL points. `authority` is what the Host header says; `path` is the prefix of every path."""

    def __init__(self, base_url: str) -> None:
        url = urlsplit(base_url)
        default_port = _PORTS.get(url.scheme)
        if default_port is None or not url.hostname:
            raise ValueError("base_url: not an http or https URL")
        if url.username is not None or url.query or url.fragment:
            raise ValueError("base_url: no user, query or fragment belongs in it")
        self.is_tls = url.scheme == "https"
        try:
            host = url.hostname if ":" in url.hostname else url.hostname.encode("idna").decode("ascii")
        except UnicodeError as error:
            raise ValueError(f"base_url: {error}") from error
        fault = host_fault(host)
        if fault is not None:
            raise ValueError(f"base_url: {fault}")
        self.host = host
        self.port = url.port or default_port
        self.path = url.path.rstrip("/")
        bracketed = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = bracketed if self.port == default_port else f"{bracketed}:{self.port}"


class ClientContext(ssl.SSLContext):
    """TLS to one provider: a connection resumes the `session` that is here (RFC 8446, section 2.2), if there is one. Event loops
    have no argument for that, but ask the context for each connection's TLS.
    """

    session: ssl.SSLSession | None = None

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """The TLS of one connection."""
        return super().wrap_bio(*args, **{**options, "session": self.session})


def verified_context() -> ClientContext:
    """TLS as a client should speak it: certificate and name verified, HTTP/1.1 alone."""
    context = ClientContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    context.set_alpn_protocols(["http/1.1"])
    return context


class Dialer:
    """Connects to one address within `timeout_s`: name, TCP and TLS together."""

    def __init__(self, address: Address, timeout_s: float, ssl_context: ClientContext | None = None) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._ssl = (ssl_context or verified_context()) if address.is_tls else None
        self._latest: ssl.SSLObject | None = None  # of which the next may resume what came with its answers

    async def dial(self, connection: Connection) -> None:
        """Connect `connection`; UpstreamError, always safe to repeat, if that fails."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._connect(connection)
        except TimeoutError as error:
            raise connect_timeout(self._timeout_s) from error
        except (OSError, UnicodeError) as error:
            raise unreachable(error) from error

    async def _connect(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        host, port = self._address.host, self._address.port
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        # Not create_connection(happy_eyeballs_delay=...): uvloop has no such argument.
        sock = await aiohappyeyeballs.start_connection(
            found, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S, socket_factory=_socket
        )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._ssl is None:
            await loop.create_connection(lambda: connection, sock=sock)
            return
        if self._latest is not None:
            self._ssl.session = self._latest.session
        # TLS on a transport of our own: what it still has to send is not told by the one above it (Connection.carried_by).
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
    """The descriptor from which on no connection to a provider is made, of `limit` (getrlimit(2), RLIMIT_NOFILE). A new one
    is the lowest that is free (open(2)), so its number says how many are in use.
    """
    return limit - min(RESERVED_DESCRIPTORS, limit // 4)


def _socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket with a bounded receive buffer, which has to be set before it connects (tcp(7)). OSError (EMFILE) where the only
    descriptors left are those reserved for what keeps the gateway itself going.
    """
    sock = socket.socket(*info[:3])
    if sock.fileno() >= descriptor_bound(resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        sock.close()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    return sock


class Pool:
    """See the charter. `dial` connects a connection or raises; `wait_s`: how long to wait in line."""

    def __init__(
        self, dial: Callable[[Connection], Awaitable[None]], patience: Patience, *, limit: int, wait_s: float
    ) -> None:
        self._dial = dial
        self._patience = patience
        self._limit = limit
        self._wait_s = wait_s
        self._idle: list[Connection] = []
        self._live: set[Connection] = set()
        self._line: deque[asyncio.Future[Connection]] = deque()
        self._closed = False
        self._retired = False

    def take(self) -> Connection | None:
        """An idle connection that seems alive. Those that turn out to be stale are closed on the way."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and not connection.heard_something():
                return connection
            connection.abort()
        return None

    async def open(self) -> Connection:
        """A fresh connection, or if there is no slot the first that becomes free; UpstreamError, always safe to repeat."""
        if self._closed:
            raise closing()
        connection = self._new() or await self._stand_in_line()
        if connection.made:
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
        """Keep nothing idle from now on."""
        self._retired = True
        for connection in tuple(self._idle):
            connection.abort()
        self._idle.clear()

    async def close(self) -> None:
        """Close every connection, busy ones too, and wait until the sockets are gone."""
        self._closed = True
        for waiter in self._line:
            if not waiter.done():
                waiter.set_exception(closing())
        self._line.clear()
        live = [connection for connection in self._live if connection.made]
        for connection in live:
            connection.abort(dropped())
        if live:
            await asyncio.wait([connection.lost for connection in live])

    def _new(self) -> Connection | None:
        if len(self._live) >= self._limit:
            return None
        connection = Connection(self._patience, self._freed, self._lost)
        self._live.add(connection)
        return connection

    async def _stand_in_line(self) -> Connection:
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._line.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s):
                return await waiter
        except TimeoutError as error:
            self._leave_line(waiter)
            raise exhausted(self._limit) from error
        except asyncio.CancelledError:
            self._leave_line(waiter)
            raise

    def _leave_line(self, waiter: asyncio.Future[Connection]) -> None:
        """What was handed to someone who had just given up goes to the next."""
        if waiter in self._line:
            self._line.remove(waiter)
        if waiter.cancelled() or not waiter.done() or waiter.exception() is not None:
            return
        connection = waiter.result()
        if not connection.made:
            self._lost(connection)
        elif connection.usable:
            self._freed(connection)

    def _freed(self, connection: Connection) -> None:
        """An exchange is over and its connection can be used again."""
        if self._closed:
            connection.abort()
        elif self._hand_over(connection):
            return
        elif self._retired:
            connection.abort()
        else:
            self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        """A connection is no more; its slot goes to the first in line."""
        if connection not in self._live:
            return
        self._live.remove(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._line and (heir := self._new()) is not None and not self._hand_over(heir):
            self._live.remove(heir)

    def _hand_over(self, connection: Connection) -> bool:
        while self._line:
            waiter = self._line.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False
