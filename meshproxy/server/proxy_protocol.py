"""The PROXY protocol, versions 1 and 2 (HAProxy's doc/proxy-protocol.txt): a header before everything else on a connection, in
which the balancer says who its client is.
"""

import ipaddress
import socket
import struct
from collections.abc import Awaitable, Callable

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
MAX_V1_BYTES = 107  # section 2.1: the longest line, CRLF included
MAX_V2_BYTES = 4096  # of addresses and TLVs; the specification expects 536 to be enough
SHORTEST = len(b"PROXY UNKNOWN\r\n")  # of version 1; one byte less than version 2's fixed part

_FIXED = struct.Struct("!12sBBH")
_ADDRESSES = {0x11: (socket.AF_INET, 4), 0x21: (socket.AF_INET6, 16)}  # TCP over IPv4 and over IPv6
_V1_FAMILIES = {b"TCP4": ipaddress.IPv4Address, b"TCP6": ipaddress.IPv6Address}

Receive = Callable[[int], Awaitable[bytes]]
Source = tuple[str, int]


class NotProxied(Exception):
    """A connection that doesn't begin with a PROXY header."""


async def read_source(receive: Receive) -> Source | None:
    """The client's address and port, or None where the proxy speaks for itself (health checks) or doesn't know.

    `receive(n)` gives exactly n bytes, or raises. Nothing beyond the header is taken. Raises NotProxied.
    """
    start = await receive(SHORTEST)
    if start.startswith(SIGNATURE):
        return await _read_v2(start, receive)
    if start.startswith(b"PROXY "):
        return await _read_v1(start, receive)
    raise NotProxied("no PROXY header")


async def _read_v1(line: bytes, receive: Receive) -> Source | None:
    """One line of text, whose end nothing foretells: byte by byte."""
    while not line.endswith(b"\r\n"):
        if len(line) >= MAX_V1_BYTES:
            raise NotProxied("version 1: the line is too long")
        line += await receive(1)
    words = line[:-2].split(b" ")
    if words[1] == b"UNKNOWN":
        return None
    try:
        _, family, source, _, port, _ = words
        found, number = str(_V1_FAMILIES[family](source.decode("ascii"))), int(port)
    except (ValueError, KeyError) as error:
        raise NotProxied("version 1: malformed") from error
    if not 0 <= number <= 65535:
        raise NotProxied("version 1: no such port")
    return found, number


async def _read_v2(start: bytes, receive: Receive) -> Source | None:
    fixed = start + await receive(_FIXED.size - len(start))
    _, version_and_command, family, length = _FIXED.unpack(fixed)
    if version_and_command not in {0x20, 0x21} or length > MAX_V2_BYTES:
        raise NotProxied("version 2: malformed")
    rest = await receive(length) if length else b""
    if version_and_command == 0x20 or family not in _ADDRESSES:  # LOCAL; or datagrams, unix sockets, unspecified
        return None
    kind, size = _ADDRESSES[family]
    if length < 2 * size + 4:
        raise NotProxied("version 2: the addresses are cut short")
    (port,) = struct.unpack_from("!H", rest, 2 * size)
    return socket.inet_ntop(kind, rest[:size]), port
