"""The PROXY protocol, versions 1 and 2 (HAProxy's doc/proxy-protocol.txt): a header before everything else on a connection, in
which the balancer says who its client is.
"""

import ipaddress
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from multidict import MultiMapping

from meshproxy.policy.principal import Networks

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


MAX_HOPS = 32  # entries looked at, from the right

Headers = Mapping[str, str]  # looked up by lower-case names; a MultiMapping where a name may come twice

_FOR = re.compile(r'(?:^|;)\s*for=("[^"]*"|[^;,"\s]*)', re.IGNORECASE)
_V4_WITH_PORT = re.compile(r"([0-9.]+):[0-9]+")


class TrustedProxies:
    """The networks whose word on clients is taken. A peer on a unix socket is trusted: the file's permissions let it in."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = Networks(networks)

    def trusts(self, address: str | None) -> bool:
        """Whether an address, in its one spelling, is a trusted proxy's. None: a peer on a unix socket."""
        return address is None or self._networks.have(address)

    def trusts_peer(self, host: str | None) -> bool:
        """Whether the other end of a connection is a trusted proxy. `host`: as the socket tells it."""
        return self.trusts(address(host) if host else None)

    def client_of(self, peer: str | None, headers: Headers) -> str | None:
        """The client's address. `peer`: the other end of the connection; None or empty on a unix socket.

        Where both headers are there and tell different clients, a client may have sent the one that the proxy doesn't write:
        neither is believed.
        """
        if peer and ":" in peer:  # IPv4 is told in its one spelling by every socket
            peer = address(peer)
        if "x-forwarded-for" not in headers and "forwarded" not in headers:
            return peer or None
        peer = address(peer) if peer else None
        hops, elements = _listed(headers, "x-forwarded-for"), _listed(headers, "forwarded")
        if not (hops or elements) or not self.trusts(peer):
            return peer
        told = {
            self._first_stranger(peer, listed) for listed in (hops, [_for(element) for element in elements]) if listed
        }
        return told.pop() if len(told) == 1 else peer

    def _first_stranger(self, peer: str | None, hops: Sequence[str]) -> str | None:
        """The rightmost address that no trusted proxy has; the farthest one known if all have."""
        farthest = peer
        for hop in reversed(hops[-MAX_HOPS:]):
            found = address(hop)
            if found is None:
                return farthest  # `unknown`, an obfuscated name, or nonsense: nobody knows what is behind
            farthest = found
            if not self.trusts(found):
                break
        return farthest


def address(text: str) -> str | None:
    """One address in its one spelling: without port, brackets and zone, and IPv4 where it was mapped into IPv6; None for
    anything else.
    """
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif with_port := _V4_WITH_PORT.fullmatch(text):
        text = with_port[1]
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return str(found)


def _listed(headers: Headers, name: str) -> list[str]:
    """A list header's elements, over all its lines (RFC 9110, section 5.3)."""
    if name not in headers:
        return []
    lines = headers.getall(name) if isinstance(headers, MultiMapping) else [headers[name]]
    return [element for line in lines for element in line.split(",") if element.strip()]


def _for(element: str) -> str:
    """The node of a Forwarded element; empty if it names none."""
    found = _FOR.search(element)
    return found[1] if found is not None else ""
