"""Sockets to listen on: TCP, shared by workers through SO_REUSEPORT, and unix."""

import os
import socket
from pathlib import Path
from typing import Any

from meshproxy.config import split_address

BACKLOG = 4096
UNIX_PREFIX = "unix:"


def listen(address: str, *, shared: bool = False) -> socket.socket:
    """A listening socket at `HOST:PORT`, `[V6]:PORT` or `unix:/path`. `shared`: others may listen at the same port.

    Raises OSError if the address is taken. A socket file that nobody listens at is replaced.
    """
    family, name = _resolved(address)
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        sock = socket.create_server(name, family=family, backlog=BACKLOG, reuse_port=shared, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), address) from error
    sock.setblocking(False)  # noqa: FBT003 - its only argument
    return sock


def listen_shared(address: str, count: int) -> list[socket.socket]:
    """One socket for each of `count` workers: the kernel deals connections out among them. A unix socket is one for all."""
    if address.startswith(UNIX_PREFIX):
        return [listen(address)] * count
    listen(address).close()  # SO_REUSEPORT alone would let us share the port with a stranger of the same user
    first = listen(address, shared=True)
    return [first, *(listen(name_of(first), shared=True) for _ in range(count - 1))]


def name_of(sock: socket.socket) -> str:
    """The address of a listening socket as configurations write it."""
    name = sock.getsockname()
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return f"{UNIX_PREFIX}{name}"


def _resolved(address: str) -> tuple[socket.AddressFamily, Any]:
    """The family of an address, and its name as sockets know it."""
    if address.startswith(UNIX_PREFIX):
        path = address.removeprefix(UNIX_PREFIX)
        _remove_stale(Path(path))
        return socket.AF_UNIX, path
    host, port = split_address(address)
    family, _, _, _, name = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return family, name


def _remove_stale(path: Path) -> None:
    """Remove a socket file that a dead process left. One that somebody listens at stays, and is in the way."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) != 0:
                path.unlink()
