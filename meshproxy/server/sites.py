"""Where connections come in: a listening socket whose connections go to the server, with TLS or a PROXY header before them."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any

from meshproxy.server.client_address import TrustedProxies
from meshproxy.server.proxy_protocol import NotProxied, read_source
from meshproxy.server.sockets import BACKLOG
from meshproxy.server.tls import HANDSHAKE_S
from meshproxy.telemetry.tasks import Tasks

PROXY_HEADER_S = 5.0  # for a header that the specification wants sent at once
MAX_ARRIVING = 1024  # connections whose header hasn't come; more are closed
ACCEPT_PAUSE_S = 0.1  # after accept() failed, as it does when file descriptors run out

MakeProtocol = Callable[..., asyncio.Protocol]  # may be given the source that the PROXY header told


class Site:
    """One listening socket at work, whose connections go straight to the server."""

    def __init__(self, sock: socket.socket, make: MakeProtocol, tls: ssl.SSLContext | None) -> None:
        self._sock = sock
        self._make = make
        self._tls: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": HANDSHAKE_S if tls is not None else None}

    async def start(self) -> None:
        """Accept connections."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._make, sock=self._sock, backlog=BACKLOG, **self._tls)

    async def stop(self) -> None:
        """Accept no more, and close the socket. What was accepted goes on."""
        self._server.close()


class ProxiedSite(Site):
    """One for balancers that send a PROXY header first, ahead of TLS too. Others are hung up on. `proxies`: whose headers are
    believed (as of now). `loops`: what keeps the accepting running; `has_room`: whether a connection
    of this descriptor may stay.
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
        self._arriving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Accept connections."""
        self._sock.setblocking(False)  # noqa: FBT003 - its only argument
        self._accepting = self._loops.keep("accept", self._accept)

    async def stop(self) -> None:
        """Accept no more, and close the socket."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(self._sock)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            host = peer[0] if isinstance(peer, tuple) else None
            is_welcome = self._proxies().trusts_peer(host) and self._has_room(connection.fileno())
            if len(self._arriving) >= MAX_ARRIVING or not is_welcome:
                connection.close()
                continue
            arrival = asyncio.create_task(self._arrive(connection), name="arrive")
            self._arriving.add(arrival)
            arrival.add_done_callback(self._arriving.discard)

    async def _arrive(self, connection: socket.socket) -> None:
        """Read the header, and hand the connection over. Whatever fails here is the other side's doing: hang up."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotProxied, OSError), contextlib.ExitStack() as stack:
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
            raise NotProxied("the connection ended in its header")
        data += received
    return data
