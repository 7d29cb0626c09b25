"""A network in memory: names, listeners, sockets and asyncio's transports over them.

A connection has two ends, an `End` in the kernel of each process. Bytes that are sent are in flight for a drawn time,
keep their order, and wait at the other end until its process reads them, a drawn part or all of them at once. At most
`window` bytes are under way; what doesn't fit waits in the transport's buffer, which has asyncio's water marks.

Closing is as Linux does it: a close sends FIN, or RST if bytes were received that nobody read or SO_LINGER is 0; bytes
that arrive at a closed end are answered with RST. The death of a process closes its ends alike, without what its
transports had buffered.

A `Link` has what a plan may change of one connection while it lives: its delays, whether it is silent, after how many
bytes of a direction it is cut. `Network.on_link` gets every new one.
"""

import asyncio
import contextvars
import errno
import ipaddress
import math
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Self

from simulation.loop import PROCESS, Event, Process, SimHandle, SimLoop

FAST_S, SLOW_S = 0.000_2, 0.08  # a packet's time, as a rule and at times
WAKE_S = 0.000_3  # how long an end may wait before it reads, so that packets join
CONNECT_GIVE_UP_S = 127.0  # Linux gives up a silent connect after so long (tcp_syn_retries = 6, tcp(7))
READ_BYTES = 262_144  # the most that one read returns, as asyncio's
EPHEMERAL_PORT = 32_768
ANY = frozenset({"", "0.0.0.0", "::"})


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Link:
    """One connection as a plan sees it. `client` and `server` are names of processes, `port` the server's.

    `cut_after`: bytes that still pass to the server and to the client, then RST on both sides (None: no bound).
    `is_silent`: nothing passes any more, and nobody is told. `split`: how likely a read returns a part.
    """

    def __init__(self, number: int, client: Process, server: Process, port: int) -> None:
        self.number = number
        self.client, self.server, self.port = client, server, port
        self.usual_s, self.rare_s = FAST_S, SLOW_S
        self.split = 0.2
        self.window = 65_536
        self.is_silent = False
        self.cut_after: dict[str, int | None] = {"to_server": None, "to_client": None}
        self.carried = {"to_server": 0, "to_client": 0}
        self.ends: list[End] = []

    def reset(self) -> None:
        """Have both ends get RST."""
        for end in self.ends:
            end.reset()

    def __repr__(self) -> str:
        return f"#{self.number} {self.client.name}>{self.server.name}:{self.port}"


class End:
    """One end of a connection, in the kernel of `process`."""

    def __init__(self, network: "Network", process: Process, link: Link, direction: str) -> None:
        self.network = network
        self.process = process
        self.link = link
        self.direction = direction  # of what it sends
        self.peer: End = self
        self.received = bytearray()
        self.has_eof = self.is_reset = self.is_closed = self.is_shut = False
        self.under_way = 0  # bytes sent and, as far as is known here, not read by the peer
        self._taken: deque[tuple[float, int]] = deque()  # how many bytes the peer has read, and when that is known here
        self._is_full = False  # whether a sender waits for room
        self.lingers = True
        self._last_arrival = 0.0
        self.on_readable: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None

    def _pass(self, callback: Callable[..., None], *args: Any) -> None:
        """Have a packet arrive after all before it."""
        loop, link = self.network.loop, self.link
        arrival = loop.now + loop.jitter(link.usual_s, link.rare_s)
        if arrival <= self._last_arrival:  # events of one moment have no order
            arrival = math.nextafter(self._last_arrival, math.inf)
        self._last_arrival = arrival
        loop.at(arrival, None, Event(callback, args))

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send what fits, and return how much that is. Raises OSError for a lost connection."""
        if self.is_reset:
            raise _error(errno.ECONNRESET)
        if self.is_shut or self.is_closed:
            raise _error(errno.EPIPE)
        now = self.network.loop.now
        while self._taken and self._taken[0][0] <= now:
            self.under_way -= self._taken.popleft()[1]
        size = min(len(data), self.link.window - self.under_way)
        if size < len(data):
            self._is_full = True
            while self._taken:
                self._learn(*self._taken.popleft())
        if size <= 0:
            return 0
        self.under_way += size
        self._pass(self.peer._arrive, bytes(data[:size]))
        return size

    def _arrive(self, data: bytes) -> None:
        link, direction = self.link, self.peer.direction
        if link.is_silent or self.is_reset:
            return
        left = link.cut_after[direction]
        is_cut = left is not None and link.carried[direction] + len(data) >= left
        if is_cut and left is not None:
            data = data[: max(0, left - link.carried[direction])]
        link.carried[direction] += len(data)
        if self.is_closed:
            self.peer._pass_reset()
        else:
            self.received += data
            self._readable()
        if is_cut:
            self.network.loop.trace("%r: cut after %d bytes %s", link, link.carried[direction], direction)
            link.reset()

    def _pass_reset(self) -> None:
        """Have RST arrive here, sent by the peer."""
        self.peer._pass(self.reset)

    def reset(self) -> None:
        """Receive RST."""
        if self.is_closed or self.is_reset or self.link.is_silent:
            return
        self.is_reset = True
        self._readable()
        if self.on_writable is not None:
            self.on_writable()

    def _eof(self) -> None:
        if not self.link.is_silent:
            self.has_eof = True
            self._readable()

    def _readable(self) -> None:
        if self.on_readable is not None:
            self.on_readable()

    @property
    def is_readable(self) -> bool:
        """Whether a read would return at once."""
        return bool(self.received) or self.has_eof or self.is_reset

    def read(self, most: int) -> bytes:
        """Take received bytes; b"" at the end. Raises OSError after RST, BlockingIOError if there is nothing yet."""
        if self.received:
            size = min(most, len(self.received))
            rng = self.network.loop.rng
            if size > 1 and rng.random() < self.link.split:
                size = rng.randrange(1, size)
            data = bytes(self.received[:size])
            del self.received[:size]
            known_at = self.network.loop.now + self.link.usual_s
            if self.peer._is_full:
                self.peer._learn(known_at, size)
            else:
                self.peer._taken.append((known_at, size))  # no event: nothing waits for it
            return data
        if self.is_reset:
            raise _error(errno.ECONNRESET)
        if self.has_eof:
            return b""
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _learn(self, when: float, size: int) -> None:
        """Have there be room at a time."""
        self.network.loop.at(when, None, Event(self._make_room, (size,)))

    def _make_room(self, size: int) -> None:
        self.under_way -= size
        self._is_full = False
        if self.on_writable is not None:
            self.on_writable()

    def shut(self) -> None:
        """Send FIN behind what was sent."""
        if not self.is_shut:
            self.is_shut = True
            self._pass(self.peer._eof)

    def close(self) -> None:
        """Close this end: see the charter."""
        if self.is_closed:
            return
        self.is_closed = True
        if (self.received or not self.lingers) and not self.is_reset:
            self._pass(self.peer.reset)
        elif not self.is_reset:
            self.shut()
        self.on_readable = self.on_writable = None
        self.network.closed(self.link)


class Socket:
    """What `socket.socket` is in a run."""

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        process = PROCESS.get()
        if fileno is not None:
            self.__dict__.update(process.sockets[fileno].__dict__)
            process.sockets[fileno] = self
            return
        self.family = socket.AF_INET if family == -1 else socket.AddressFamily(family)
        self.type = socket.SOCK_STREAM if type == -1 else socket.SocketKind(type)
        self.proto = max(proto, 0)
        self.process = process
        self.fd = process.free_fd()
        process.sockets[self.fd] = self
        self.end: End | None = None
        self.listener: Listener | None = None
        self.transport: SimTransport | None = None
        self.descriptors = [1]  # how many there are of this connection or listener, in all processes
        self.name: tuple[str, int] = ("0.0.0.0", 0)
        self.peer: tuple[str, int] | None = None

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self.fd

    def setblocking(self, flag: bool) -> None:  # noqa: FBT001 - as socket's
        """Nothing: no socket blocks."""

    def settimeout(self, value: float | None) -> None:
        """Nothing: no socket blocks."""

    def gettimeout(self) -> float:
        """Return 0: it doesn't block."""
        return 0.0

    def setsockopt(self, level: int, option: int, value: Any, *_: Any) -> None:
        """Keep what matters here: SO_LINGER."""
        if level == socket.SOL_SOCKET and option == socket.SO_LINGER and self.end is not None:
            is_on, seconds = struct.unpack("ii", value)
            self.end.lingers = not (is_on and not seconds)

    def getsockopt(self, *_: Any) -> int:
        """Return 0: no error, no option."""
        return 0

    def bind(self, address: Any) -> None:
        """Take an address."""
        self.name = address[:2] if isinstance(address, tuple) else (str(address), 0)

    def listen(self, _backlog: int = 100) -> None:
        """Listen at the address that was bound. Raises OSError if it is taken."""
        self.listener = network_of(self.process).listen(self)

    def getsockname(self) -> tuple[str, int]:
        """Return this end's address."""
        return self.name

    def getpeername(self) -> tuple[str, int]:
        """Return the other end's address."""
        if self.peer is None:
            raise _error(errno.ENOTCONN)
        return self.peer

    def shutdown(self, _how: int) -> None:
        """Send FIN."""
        if self.end is not None:
            self.end.shut()

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd < 0:
            return
        if self.process.sockets.get(self.fd) is self:
            del self.process.sockets[self.fd]
        self.fd = -1
        if self.listener is not None and self.listener.process is self.process:
            self.listener.accept = None  # what arrives waits for a process that accepts
        self.descriptors[0] -= 1
        if self.descriptors[0]:
            return
        if self.listener is not None:
            self.listener.drop()
        if self.end is not None:
            self.end.close()

    def inherit(self, process: Process) -> None:
        """Give a child process the same descriptor."""
        made = Socket.__new__(Socket)
        made.__dict__.update(self.__dict__)
        made.process = process
        process.sockets[self.fd] = made
        self.descriptors[0] += 1

    def die(self) -> None:
        """Close it as the kernel does for a dead process."""
        if self.transport is not None:
            self.transport.die()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Listener:
    """A listening address; the sockets of one process or, shared, of several."""

    def __init__(self, network: "Network", sock: Socket) -> None:
        self.network = network
        self.process = sock.process
        self.port = sock.name[1]
        self.accept: Callable[[End], None] | None = None
        self.context = contextvars.copy_context()
        self.waiting: deque[End] = deque()
        self.on_waiting: Callable[[], None] | None = None

    def drop(self) -> None:
        """Stop listening. Connections that were not accepted are closed."""
        self.network.forget(self)
        while self.waiting:
            self.waiting.popleft().close()

    def arrive(self, end: End) -> None:
        """Take a new connection."""
        self.waiting.append(end)
        if self.accept is not None:
            handle = SimHandle(self._accept, (), self.context)
            self.network.loop._enqueue(self.process, handle)
        elif self.on_waiting is not None:
            self.on_waiting()

    def _accept(self) -> None:
        if self.waiting and self.accept is not None:
            self.accept(self.waiting.popleft())


class Network:
    """All names, listeners and connections. `names` is the DNS: a name's addresses; an empty list is a failing look-up."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop = loop
        loop.network = self
        self.names: dict[str, list[str]] = {"localhost": ["127.0.0.1"]}
        self.listeners: dict[tuple[str, int], list[Listener]] = {}
        self.black_holes: set[tuple[str, int]] = set()  # where packets vanish
        self.links: dict[int, Link] = {}  # open ones
        self.on_link: Callable[[Link], None] = lambda _: None
        self._link_number = 0
        self._port = EPHEMERAL_PORT

    # Names.

    def address_of(self, host: str) -> str:
        """Return a name's first address; a name that is new gets one."""
        if not host:
            return ""
        if (literal := _literal(host)) is not None:
            return literal
        if host not in self.names:
            self.names[host] = [f"10.2.{len(self.names) // 250}.{len(self.names) % 250 + 1}"]
        return self.names[host][0]

    async def look_up(self, host: Any, port: Any, **options: Any) -> list[Any]:
        """Look a name up, as getaddrinfo(3)."""
        await asyncio.sleep(self.loop.jitter(FAST_S, SLOW_S))
        return self.found(host, port, **options)

    def found(
        self,
        host: Any,
        port: Any,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """Return the addresses of a name. Raises gaierror for an unknown one."""
        name = host.decode() if isinstance(host, bytes) else host or "0.0.0.0"
        literal = _literal(name)
        addresses = self.names.get(name, []) if literal is None else [literal]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        kind = socket.SocketKind(type) if type else socket.SOCK_STREAM
        return [
            (socket.AF_INET, kind, proto or socket.IPPROTO_TCP, "", (address, int(port or 0))) for address in addresses
        ]

    # Listening.

    def listen(self, sock: Socket) -> Listener:
        """Have a bound socket listen."""
        host, port = self.address_of(sock.name[0]), sock.name[1]
        if not port:
            self._port += 1
            port = self._port
        host = "" if host in ANY else host
        sock.name = (host or "0.0.0.0", port)
        listener = Listener(self, sock)
        self.listeners.setdefault((host, port), []).append(listener)
        self.loop.trace("%s: listens at %s:%d", sock.process.name, sock.name[0], port)
        return listener

    def forget(self, listener: Listener) -> None:
        """Remove a listener."""
        for listeners in self.listeners.values():
            if listener in listeners:
                listeners.remove(listener)

    async def create_server(
        self, factory: Callable[[], Any], host: Any, port: Any, *, sock: Socket | None = None, **options: Any
    ) -> "Server":
        """Listen, and give each connection to a protocol of its own."""
        if sock is None:
            sock = Socket()
            sock.bind((host if isinstance(host, str) else (host or [""])[0], port or 0))
        if sock.listener is None:
            sock.listen()
        server = Server(self, sock, factory)
        if options.get("start_serving", True):
            server.begin()
        return server

    async def accept(self, sock: Socket) -> tuple[Socket, Any]:
        """Wait for a connection."""
        listener = sock.listener
        if listener is None:
            raise _error(errno.EINVAL)
        while not listener.waiting:
            arrived: asyncio.Future[None] = self.loop.create_future()
            listener.on_waiting = partial(_resolve, arrived)
            await arrived
        accepted = self.accepted(listener.waiting.popleft(), sock)
        return accepted, accepted.peer

    def accepted(self, end: End, listening: Socket) -> Socket:
        """Make the socket of a connection that was waiting."""
        made = Socket(listening.family, listening.type)
        made.end = end
        made.name = listening.name
        made.peer = (end.link.client.address, EPHEMERAL_PORT + end.link.number)
        end.process = end.link.server = made.process
        return made

    # Connecting.

    async def connect(self, sock: Socket, address: tuple[str, int]) -> None:
        """Connect. Raises ConnectionRefusedError where nobody listens, and TimeoutError at a black hole."""
        loop = self.loop
        host, port = address[0], address[1]
        await asyncio.sleep(loop.jitter(FAST_S, SLOW_S))
        if (host, port) in self.black_holes:
            await asyncio.sleep(CONNECT_GIVE_UP_S)
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        found = self.listeners.get((host, port)) or self.listeners.get(("", port)) or []
        if not found:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"Connect call failed {address}")
        listener = found[int(loop.rng.random() * len(found))] if len(found) > 1 else found[0]
        self._link_number += 1
        link = Link(self._link_number, sock.process, listener.process, port)
        ours, theirs = End(self, sock.process, link, "to_server"), End(self, listener.process, link, "to_client")
        ours.peer, theirs.peer = theirs, ours
        link.ends = [ours, theirs]
        self.links[link.number] = link
        sock.end = ours
        sock.name, sock.peer = (sock.process.address, EPHEMERAL_PORT + link.number), (host, port)
        loop.trace("%r: connected", link)
        self.on_link(link)
        listener.arrive(theirs)
        await asyncio.sleep(loop.jitter(FAST_S, SLOW_S))

    async def create_connection(
        self, factory: Callable[[], Any], host: Any, port: Any, *, sock: Socket | None = None, **options: Any
    ) -> tuple["SimTransport", Any]:
        """Connect, unless `sock` is connected already, and give the connection to a protocol."""
        if options.get("ssl"):
            raise NotImplementedError("TLS isn't simulated")
        if sock is None:
            found = await self.look_up(host, port)
            for at, info in enumerate(found):
                sock = Socket(*info[:3])
                try:
                    await self.connect(sock, info[4])
                except OSError:
                    sock.close()
                    if at == len(found) - 1:
                        raise
                except BaseException:
                    sock.close()
                    raise
                else:
                    break
        assert sock is not None
        protocol = factory()
        made: asyncio.Future[None] = self.loop.create_future()
        transport = SimTransport(self, sock, protocol, made)
        try:
            await made
        except BaseException:
            transport.close()
            raise
        return transport, protocol

    def attach(self, factory: Callable[[], Any], sock: Socket) -> tuple["SimTransport", Any]:
        """Give an accepted connection to a protocol."""
        protocol = factory()
        return SimTransport(self, sock, protocol), protocol

    async def receive(self, sock: Socket, most: int) -> bytes:
        """Wait for bytes of a socket without a transport."""
        end = sock.end
        if end is None:
            raise _error(errno.ENOTCONN)
        while not end.is_readable:
            arrived: asyncio.Future[None] = self.loop.create_future()
            end.on_readable = partial(_resolve, arrived)
            await arrived
        end.on_readable = None
        return end.read(most)

    def pair(self) -> tuple[Socket, Socket]:
        """Make two connected sockets, as socketpair(2)."""
        ours, theirs = Socket(socket.AF_UNIX), Socket(socket.AF_UNIX)
        self._link_number += 1
        link = Link(self._link_number, ours.process, ours.process, 0)
        link.split, link.rare_s = 0.0, FAST_S
        ours.end, theirs.end = End(self, ours.process, link, "to_server"), End(self, ours.process, link, "to_client")
        ours.end.peer, theirs.end.peer = theirs.end, ours.end
        link.ends = [ours.end, theirs.end]
        self.links[link.number] = link
        return ours, theirs

    def closed(self, link: Link) -> None:
        """Forget a connection once both ends are closed."""
        if all(end.is_closed for end in link.ends) and self.links.pop(link.number, None) is not None:
            self.loop.trace("%r: closed, %d bytes to the server, %d back", link, *link.carried.values())


@lru_cache(256)
def _literal(name: str) -> str | None:
    """Return an IP address as it is usually written, None for a name."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return None


def _resolve(arrived: "asyncio.Future[None]") -> None:
    if not arrived.done():
        arrived.set_result(None)


def network_of(process: Process) -> Network:  # noqa: ARG001 - one network for all
    """Return the network of the running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)
    return loop.network


class Server(asyncio.AbstractServer):
    """What create_server() returns."""

    def __init__(self, network: Network, sock: Socket, factory: Callable[[], Any]) -> None:
        self._network = network
        self._factory = factory
        self._closed: asyncio.Future[None] = network.loop.create_future()
        self._sock: Socket | None = sock

    @property
    def sockets(self) -> tuple[Socket, ...]:
        """The listening socket, if it still listens."""
        return () if self._sock is None else (self._sock,)

    def begin(self) -> None:
        """Accept connections from now on, and those that wait."""
        listener = self._sock.listener if self._sock is not None else None
        if listener is not None:
            listener.process = PROCESS.get()
            listener.context = contextvars.copy_context()
            listener.accept = self._accept
            for _ in range(len(listener.waiting)):
                self._network.loop.call_soon(listener._accept)

    def _accept(self, end: End) -> None:
        if self._sock is not None:
            self._network.attach(self._factory, self._network.accepted(end, self._sock))

    def close(self) -> None:
        """Stop listening. Connections stay."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
            if not self._closed.done():
                self._closed.set_result(None)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop."""
        return self._network.loop

    def is_serving(self) -> bool:
        """Return whether it listens."""
        return self._sock is not None

    async def start_serving(self) -> None:
        """Accept connections."""
        self.begin()

    async def serve_forever(self) -> None:
        """Accept connections until this is cancelled or the server closed."""
        self.begin()
        try:
            await asyncio.shield(self._closed)
        finally:
            self.close()

    async def wait_closed(self) -> None:
        """Wait until it is closed."""
        await asyncio.shield(self._closed)

    async def __aexit__(self, *_: object) -> None:
        self.close()


class SimTransport(asyncio.transports._FlowControlMixin):
    """asyncio's transport over a socket of the network."""

    _loop: SimLoop
    _protocol: Any
    _maybe_pause_protocol: Callable[[], None]  # the mixin's
    _maybe_resume_protocol: Callable[[], None]

    def __init__(
        self, network: Network, sock: Socket, protocol: Any, made: "asyncio.Future[None] | None" = None
    ) -> None:
        assert sock.end is not None
        super().__init__({"socket": sock, "peername": sock.peer, "sockname": sock.name}, network.loop)
        self._end = sock.end
        self._sock = sock
        sock.transport = self
        self._process = sock.process
        self._protocol = protocol
        self._buffer = bytearray()
        self._is_closing = self._is_lost = self._is_paused = self._has_eof = self._is_flushing = False
        self._context = contextvars.copy_context()
        self._is_due = False  # whether a read is scheduled
        self._reading = SimHandle(self._read, (), self._context)
        network.loop.call_soon(self._begin, made)

    def _begin(self, made: "asyncio.Future[None] | None") -> None:
        self._protocol.connection_made(self)
        self._end.on_readable, self._end.on_writable = self._wake, self._on_room
        if self._end.is_readable:
            self._wake()
        if made is not None and not made.done():
            made.set_result(None)

    # Reading.

    def _wake(self) -> None:
        """Have the process read, at once or a little later."""
        if self._is_due or self._is_paused or self._is_closing:
            return
        self._is_due = True
        rng = self._loop.rng
        if rng.random() < 0.5:
            self._loop.at(self._loop.now + WAKE_S * rng.random(), self._process, self._reading)
        else:
            self._loop._enqueue(self._process, self._reading)

    def _read(self) -> None:
        self._is_due = False
        end = self._end
        if self._is_paused or self._is_closing or not end.is_readable:
            return
        try:
            data = end.read(READ_BYTES)
        except OSError as error:
            self._fatal_error(error)
            return
        if data:
            self._protocol.data_received(data)
            if end.is_readable:
                self._wake()
        elif not self._has_eof:
            self._has_eof = True
            if not self._protocol.eof_received():
                self.close()

    def pause_reading(self) -> None:
        """Read no more."""
        self._is_paused = True

    def resume_reading(self) -> None:
        """Read again."""
        if self._is_closing or not self._is_paused:
            return
        self._is_paused = False
        if self._end.is_readable:
            self._wake()

    def is_reading(self) -> bool:
        """Return whether it reads."""
        return not self._is_paused and not self._is_closing

    # Writing.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or keep what doesn't fit."""
        if self._end.is_shut and not self._is_closing:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not data or self._is_lost:
            return
        if self._process.is_deferring:
            self._buffer += data
            if not self._is_flushing:
                self._is_flushing = True
                self._process.flushes.append(partial(self._context.run, self._flush))
                if PROCESS.get() is not self._process:  # a test's hand in it
                    self._loop.call_soon(lambda: None, context=self._context)
        else:
            if not self._buffer:
                try:
                    data = data[self._end.send(data) :]
                except OSError as error:
                    self._fatal_error(error)
                    return
            self._buffer += data
        self._maybe_pause_protocol()

    def writelines(self, list_of_data: Any) -> None:
        """Send several."""
        self.write(b"".join(list_of_data))

    def _flush(self) -> None:
        """Send what fits now."""
        self._is_flushing = False
        if self._is_lost or not self._buffer:
            return
        try:
            sent = self._end.send(self._buffer)
        except OSError as error:
            self._buffer.clear()
            self._fatal_error(error)
            return
        del self._buffer[:sent]
        self._maybe_resume_protocol()
        if not self._buffer:
            if self._is_closing:
                self._lose(None)
            elif self._is_ending:
                self._end.shut()

    def _on_room(self) -> None:
        if self._buffer or self._end.is_reset:
            self._loop._enqueue(self._process, SimHandle(self._write_more, (), self._context))

    def _write_more(self) -> None:
        if self._end.is_reset and not self._end.received and not self._is_paused:
            self._fatal_error(_error(errno.ECONNRESET))
        elif not self._is_flushing:
            self._flush()

    _is_ending = False

    def write_eof(self) -> None:
        """Send FIN behind what was written."""
        if self._is_closing or self._is_ending:
            return
        self._is_ending = True
        if not self._buffer:
            self._end.shut()

    def can_write_eof(self) -> bool:
        """Return True."""
        return True

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait."""
        return len(self._buffer)

    # Closing.

    def is_closing(self) -> bool:
        """Return whether it closes or is closed."""
        return self._is_closing

    def close(self) -> None:
        """Close once everything written is sent."""
        if self._is_closing:
            return
        self._is_closing = True
        if not self._buffer:
            self._lose(None)

    def abort(self) -> None:
        """Close at once."""
        self._force(None)

    def _fatal_error(self, error: OSError) -> None:
        self._force(error)

    def _force(self, error: Exception | None) -> None:
        if self._is_lost:
            return
        self._buffer.clear()
        self._is_closing = True
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._loop.call_soon(self._call_lost, error, context=self._context)

    def _call_lost(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._sock.close()
            self._sock.transport = None

    def die(self) -> None:
        """End without a word to the protocol: its process is dead."""
        self._is_closing = self._is_lost = True
        self._buffer.clear()

    def set_protocol(self, protocol: Any) -> None:
        """Replace the protocol."""
        self._protocol = protocol

    def get_protocol(self) -> Any:
        """Return the protocol."""
        return self._protocol


class Poll:
    """What `select.poll` is in a run: of the current process's sockets."""

    def __init__(self) -> None:
        self._watched: dict[int, tuple[Process, int]] = {}

    def register(self, fd: int, mask: int = select.POLLIN) -> None:
        """Watch a descriptor."""
        self._watched[fd] = (PROCESS.get(), mask)

    def poll(self, _timeout_ms: float | None = None) -> list[tuple[int, int]]:
        """Return the descriptors that can be read now."""
        found = []
        for fd, (process, mask) in self._watched.items():
            sock = process.sockets.get(fd)
            if sock is None or sock.end is None:
                found.append((fd, select.POLLNVAL))
            elif sock.end.is_readable and mask & select.POLLIN:
                found.append((fd, select.POLLIN))
        return found
