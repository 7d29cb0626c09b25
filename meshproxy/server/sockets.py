"""Sockets to listen on: TCP, shared by workers through SO_REUSEPORT, and unix."""

import errno
import os
import socket
import stat
from pathlib import Path

from meshproxy.config import split_address

BACKLOG = 4096
UNIX_PREFIX = "unix:"


def listen(address: str, *, shared: bool = False) -> socket.socket:
    """A listening socket at `HOST:PORT`, `[V6]:PORT` or `unix:/path`. `shared`: others may listen at the same port.

    Raises OSError if the address is taken. A socket file that nobody listens at is replaced.
    """
    if address.startswith(UNIX_PREFIX):
        return _unix(Path(address.removeprefix(UNIX_PREFIX)))
    host, port = split_address(address)
    family, _, _, _, name = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(name)
        sock.listen(BACKLOG)
        sock.setblocking(False)  # noqa: FBT003 - its only argument
    except OSError:
        sock.close()
        raise
    return sock


def listen_shared(address: str, count: int) -> list[socket.socket]:
    """One socket for each of `count` workers: the kernel deals connections out among them. A unix socket is one for all."""
    if address.startswith(UNIX_PREFIX):
        return [listen(address)] * count
    listen(address).close()  # SO_REUSEPORT alone would let us share the port with a stranger of the same user
    first = listen(address, shared=True)
    bound = "[{}]:{}" if first.family == socket.AF_INET6 else "{}:{}"
    address = bound.format(*first.getsockname()[:2])
    return [first, *(listen(address, shared=True) for _ in range(count - 1))]


def name_of(sock: socket.socket) -> str:
    """The address of a listening socket as configurations write it."""
    name = sock.getsockname()
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return f"{UNIX_PREFIX}{name}"


def _unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(str(path))
        sock.listen(BACKLOG)
        sock.setblocking(False)  # noqa: FBT003 - its only argument
    except OSError:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    """Remove a socket file that a dead process left; OSError if someone still listens there."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), str(path))
    path.unlink()
