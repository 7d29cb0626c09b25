"""The listeners: sockets, TLS, PROXY headers, and `Runner`, which serves an application and the fast path on them.

One TLS context lasts for the listener's life: a renewed certificate is loaded into it, and the next handshake uses it.
The server checks all connections' deadlines every CHECK_INTERVAL_S.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from meshproxy.config import ConfigError, Server, split_address
from meshproxy.http1.message import MAX_FIELDS, MAX_HEAD_BYTES
from meshproxy.server.aiohttp_path import AiohttpConnection, ConnectionLimits
from meshproxy.server.client_address import InvalidProxyHeader, ProxiedClient, TrustedProxies, read_source
from meshproxy.server.fast_path import LINGER_S, ClientConnection, Handler
from meshproxy.telemetry.tasks import Tasks

HANDSHAKE_S = 10.0


def server_context(server: Server) -> ssl.SSLContext | None:
    """Make the TLS context of the settings, None without TLS. Raises ConfigError if the files can't be used."""
    if server.tls_cert is None or server.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, server)
    return context


def load_certificate(context: ssl.SSLContext, server: Server) -> None:
    """Use this certificate from now on. If the files can't be used, raises ConfigError and changes nothing."""
    if server.tls_cert is None or server.tls_key is None:
        return
    try:
        context.load_cert_chain(server.tls_cert, server.tls_key, password=_no_password)
    except ssl.SSLError as error:
        reason = (error.reason or "not PEM").replace("_", " ").lower()
        raise ConfigError([f"server.tls_cert: {server.tls_cert} and {server.tls_key}: {reason}"]) from error
    except OSError as error:
        raise ConfigError(
            [f"server.tls_cert: {server.tls_cert} or {server.tls_key} can't be read ({error.strerror})"]
        ) from error
    except ValueError as error:
        raise ConfigError([f"server.tls_key: {error}"]) from error


def _no_password() -> str:
    """Raise: without this callback OpenSSL would ask on the terminal."""
    raise ValueError("a key with a password can't be used")


BACKLOG = 4096
UNIX_PREFIX = "unix:"


def listen(address: str, *, shared: bool = False) -> socket.socket:
    """Open a listening socket at `HOST:PORT`, `[V6]:PORT` or `unix:/path`.

    `shared`: other sockets may listen at the same port.

    Raises OSError if the address is taken. A socket file without a listener is replaced.
    """
    family, name = socket_address(address)
    if family == socket.AF_UNIX:
        _remove_stale(Path(name))
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        sock = socket.create_server(name, family=family, backlog=BACKLOG, reuse_port=shared, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), address) from error
    sock.setblocking(False)  # noqa: FBT003 - its only argument
    return sock


def listen_shared(address: str, count: int) -> list[socket.socket]:
    """Open one socket for each of `count` workers; the kernel distributes connections. Unix sockets are shared."""
    if address.startswith(UNIX_PREFIX):
        return [listen(address)] * count
    listen(address).close()  # SO_REUSEPORT alone would let us share the port with another program of the same user
    first = listen(address, shared=True)
    return [first, *(listen(name_of(first), shared=True) for _ in range(count - 1))]


def name_of(sock: socket.socket) -> str:
    """Return the address of a listening socket as configurations spell it."""
    name = sock.getsockname()
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return f"{UNIX_PREFIX}{name}"


def socket_address(address: str) -> tuple[socket.AddressFamily, Any]:
    """Return the family of a listener's address, and its name for sockets. Raises OSError if there is no such host."""
    if address.startswith(UNIX_PREFIX):
        return socket.AF_UNIX, address.removeprefix(UNIX_PREFIX)
    host, port = split_address(address)
    family, *_, name = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return family, name


def _remove_stale(path: Path) -> None:
    """Remove a socket file that no process listens at."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) != 0:
                path.unlink()


PROXY_HEADER_S = 5.0  # the specification wants the header sent at once
MAX_PENDING = 1024  # connections whose header hasn't arrived; more are closed
ACCEPT_PAUSE_S = 0.1  # after accept() failed, for example for lack of descriptors

MakeProtocol = Callable[..., asyncio.Protocol]  # may take the source from a PROXY header


class Site:
    """A listening socket whose connections go straight to the server."""

    def __init__(self, sock: socket.socket, make: MakeProtocol, tls: ssl.SSLContext | None) -> None:
        self._sock = sock
        self._make = make
        self._tls: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": HANDSHAKE_S if tls is not None else None}

    async def start(self) -> None:
        """Accept connections."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._make, sock=self._sock, backlog=BACKLOG, **self._tls)

    async def stop(self) -> None:
        """Accept no more connections and close the socket. Accepted ones continue."""
        self._server.close()


class ProxiedSite(Site):
    """A listening socket for balancers that send a PROXY header first, before TLS. Other connections are closed.

    `proxies`: whose headers are believed. `loops` keeps accepting running. `has_room`: whether a connection with this
    descriptor may stay.
    """

    def __init__(
        self,
        sock: socket.socket,
        make: MakeProtocol,
        tls: ssl.SSLContext | None,
        proxies: Callable[[], TrustedProxies],
        loops: Tasks,
        has_room: Callable[[int], bool],
    ) -> None:
        super().__init__(sock, make, tls)
        self._loops = loops
        self._has_room = has_room
        self._proxies = proxies
        self._pending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Accept connections."""
        self._sock.setblocking(False)  # noqa: FBT003 - its only argument
        self._accepting = self._loops.supervise("accept", self._accept)

    async def stop(self) -> None:
        """Accept no more connections and close the socket."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._sock.close()

    async def _accept(self) -> None:
        """Accept connections of trusted proxies. Others are closed, as are those beyond MAX_PENDING."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(self._sock)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            host = peer[0] if isinstance(peer, tuple) else None
            is_accepted = self._proxies().trusts_peer(host) and self._has_room(connection.fileno())
            if len(self._pending) >= MAX_PENDING or not is_accepted:
                connection.close()
                continue
            pending = asyncio.create_task(self._read_proxy_header(connection), name="proxy-header")
            self._pending.add(pending)
            pending.add_done_callback(self._pending.discard)

    async def _read_proxy_header(self, connection: socket.socket) -> None:
        """Read the header and hand the connection to the server. Any failure is the peer's: close the connection."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(InvalidProxyHeader, OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            async with asyncio.timeout(PROXY_HEADER_S):
                source = await read_source(partial(_receive_exactly, loop, connection))
            await loop.connect_accepted_socket(partial(self._make, source), connection, **self._tls)
            stack.pop_all()


async def _receive_exactly(loop: asyncio.AbstractEventLoop, connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        received = await loop.sock_recv(connection, size - len(data))
        if not received:
            raise InvalidProxyHeader("the connection ended in its header")
        data += received
    return data


Connection = ClientConnection | AiohttpConnection

CHECK_INTERVAL_S = 0.25  # how late a connection's deadline may be noticed
WRITE_CHECK_INTERVAL_S = 1.0  # or more often, if the time-out is short
SHUTDOWN_S = 1.0

DEFAULT_LIMITS = ConnectionLimits()

_UNREADABLE = web.RequestKey("unreadable", str)


class _Server(web.Server):
    """Makes protocols for accepted sockets. It is the `Host` of its fast-path connections."""

    def __init__(
        self, handler: Any, make_request: Any, chat: Callable[[], Handler] | None, limits: ConnectionLimits
    ) -> None:
        super().__init__(handler, request_factory=make_request, handler_cancellation=True)
        self.fast_connections: set[ClientConnection] = set()
        self._limits = limits
        self.header_timeout_s, self.has_room, self.too_late = limits.header_timeout_s, limits.has_room, limits.too_late
        self._is_fast = chat is not None
        self.handler = cast("Callable[[], Handler]", chat)  # without it there are no fast connections
        self._event_loop = asyncio.get_running_loop()
        self._unsent: dict[Connection, tuple[int, float]] = {}  # unsent bytes, and since when none of them was taken
        self._writes_checked_at = 0.0

    def __call__(self, source: ProxiedClient | None = None) -> Any:  # aiohttp's type knows only its own protocol
        return ClientConnection(self, self._event_loop, source) if self._is_fast else self.others(source)

    def others(self, source: ProxiedClient | None) -> AiohttpConnection:
        return AiohttpConnection(
            self,
            source,
            limits=self._limits,
            loop=self._event_loop,
            access_log=None,
            auto_decompress=False,
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            max_headers=MAX_FIELDS,
            lingering_time=LINGER_S,
        )

    def joined(self, connection: ClientConnection) -> None:
        self.fast_connections.add(connection)

    def left(self, connection: ClientConnection) -> None:
        self.fast_connections.discard(connection)

    def check_deadlines(self) -> None:
        now = self._event_loop.time()
        for connection in [connection for connection in self.fast_connections if connection.deadline <= now]:
            connection.expire()
        if now - self._writes_checked_at >= min(WRITE_CHECK_INTERVAL_S, self._limits.write_timeout_s() / 4):
            self._writes_checked_at = now
            self._abort_stalled_writes(now)

    def all(self) -> "list[Connection]":
        """List every connection."""
        return [*self.fast_connections, *cast("list[AiohttpConnection]", self.connections)]

    def _abort_stalled_writes(self, now: float) -> None:
        """Abort the connection of every client that has taken nothing for write_timeout_s. This cancels its request."""
        before, self._unsent = self._unsent, {}
        for connection in self.all():
            unsent = connection.unsent_bytes
            if not unsent:
                continue
            known, since = before.get(connection, (0, now))
            if unsent < known:
                since = now
            if now - since >= self._limits.write_timeout_s():
                connection.abort()
            else:
                self._unsent[connection] = unsent, since


class Runner(web.AppRunner):
    """Serves an application on any number of sockets, and fast-path requests without its router and middlewares.

    `chat` returns the handler of fast-path requests; without it the application serves every request. A client's
    hang-up cancels its handler. `loops` keeps the check of deadlines running.
    """

    def __init__(
        self,
        app: web.Application,
        chat: Callable[[], Handler] | None,
        limits: ConnectionLimits = DEFAULT_LIMITS,
        loops: Tasks | None = None,
    ) -> None:
        super().__init__(app, shutdown_timeout=SHUTDOWN_S)
        self._loops = loops if loops is not None else Tasks()
        self._chat = chat
        self._limits = limits
        self._server_of_ours: _Server | None = None
        self.closing = False  # whether answers say `Connection: close`

    def connected(self) -> int:
        """Return the number of connections."""
        return len(self._connections())

    def close_idle(self) -> None:
        """Close the connections without a request. aiohttp's pre_shutdown() would also drop bodies being sent."""
        for connection in self._connections():
            if connection.is_idle:
                connection.force_close()

    def busy(self) -> int:
        """Return the number of connections with a request, or with an answer that isn't completely sent."""
        return sum(connection.busy for connection in self._connections())

    def interrupt(self) -> None:
        """Cancel every request that is being answered."""
        for connection in self._connections():
            connection.interrupt()

    @property
    def server(self) -> "_Server | None":
        """The server of our connections, in the place of aiohttp's."""
        return self._server_of_ours

    async def setup(self) -> None:
        """Start the application, and the check of deadlines. aiohttp's own server only makes requests for ours."""
        await super().setup()
        made = super().server
        if made is None:
            raise RuntimeError("aiohttp made no server")
        self._make_request, self._handle = made.request_factory, made.request_handler
        server = _Server(self._dispatch, self._request, self._chat, self._limits)
        self._server_of_ours = server
        self._deadline_task = self._loops.supervise("deadlines", partial(_run_every, server.check_deadlines))

    async def cleanup(self) -> None:
        """Stop listening and close all connections."""
        server, self._server_of_ours = self._server_of_ours, None
        if server is not None:
            for site in self.sites:
                await site.stop()
            self._deadline_task.cancel()
            remaining = server.all()
            for connection in tuple(server.fast_connections):
                connection.abort()
            server.pre_shutdown()
            await server.shutdown(SHUTDOWN_S)
            for each in remaining:  # one whose client doesn't take its answer stays open otherwise
                each.abort()
        await super().cleanup()

    def _connections(self) -> "list[Connection]":
        server = self._server_of_ours
        return server.all() if server is not None else []

    def _request(self, message: Any, *parts: Any) -> web.Request:
        """Make a request from the parser's message. An absolute target's host replaces `Host` (RFC 9112, section 3.2.2).

        Only here is that host decoded. An invalid one (`http://xn--a/`, RFC 3492) raises a ValueError, which would end the
        connection's task; such a request is marked unreadable instead.
        """
        version, refusal = message.version, None
        if not HttpVersion10 <= version <= HttpVersion11:  # the parser takes 2.0, and a line without a version for 0.9
            message, refusal = message._replace(version=HttpVersion10), f"HTTP/{version.major}.{version.minor}"
        if message.upgrade:  # declined; the parser drops what followed in the same read
            message = message._replace(should_close=True)
        try:
            request = self._make_request(_with_host_of_target(message), *parts)
        except ValueError:
            request = self._make_request(message._replace(url=URL("/")), *parts)
            refusal = "the host of its target can't be read"
        if refusal is not None:
            request[_UNREADABLE] = refusal
        return cast("web.Request", request)

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        """Refuse an ambiguous request, or pass it to the application."""
        refusal = _ambiguity(request)
        if refusal is not None:
            return request.protocol.handle_error(request, 400, None, refusal)
        response = await self._handle(request)
        if self.closing:
            response.force_close()
        return response


def _with_host_of_target(message: Any) -> Any:
    """Give a message with an absolute target the form of others: a path, and its host in `Host`.

    Raises ValueError for a host that can't be decoded.
    """
    url = message.url
    if not (url.scheme and url.host):
        return message
    headers = CIMultiDict(message.headers)
    headers["Host"] = url.host_port_subcomponent
    path = URL.build(path=url.raw_path, query_string=url.raw_query_string, encoded=True)
    return message._replace(url=path, headers=CIMultiDictProxy(headers))


def _ambiguity(request: web.BaseRequest) -> str | None:
    """Return why a request that the parser accepted is refused: it is ambiguous or unreadable. None if it isn't."""
    headers = request.headers
    if _UNREADABLE in request:
        return str(request[_UNREADABLE])
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if request.version < HttpVersion11:  # RFC 9112, section 6.1
            return "a Transfer-Encoding in HTTP/1.0"
        if coding.lower() != "chunked":
            return "a Transfer-Encoding other than chunked"
    if len(headers.getall("authorization", ())) > 1:  # a proxy in front may have checked the other one
        return "more than one Authorization header"
    return None


async def _run_every(check: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(CHECK_INTERVAL_S)
        check()
