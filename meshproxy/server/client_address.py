"""The client's address: from a PROXY header, from `X-Forwarded-For` or `Forwarded`, else the peer's.

The PROXY protocol, versions 1 and 2 (HAProxy's doc/proxy-protocol.txt), is a header before everything else on a
connection, in which a balancer names its client. `TrustedProxies` decides which proxies' headers are believed.
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
SHORTEST_BYTES = len(b"PROXY UNKNOWN\r\n")  # of version 1; one byte less than version 2's fixed part

_FIXED = struct.Struct("!12sBBH")
_ADDRESSES = {0x11: (socket.AF_INET, 4), 0x21: (socket.AF_INET6, 16)}  # TCP over IPv4 and over IPv6
_V1_FAMILIES = {b"TCP4": ipaddress.IPv4Address, b"TCP6": ipaddress.IPv6Address}

Receive = Callable[[int], Awaitable[bytes]]
ProxiedClient = tuple[str, int]  # the host and port of a client that a PROXY header names


class InvalidProxyHeader(Exception):
    """The connection doesn't begin with a valid PROXY header."""


async def read_source(receive: Receive) -> ProxiedClient | None:
    """Read a PROXY header.

    Return the client's address and port, or None for the proxy's own connections and unknown clients.

    `receive(n)` returns exactly n bytes, or raises. Nothing beyond the header is read. Raises InvalidProxyHeader.
    """
    start = await receive(SHORTEST_BYTES)
    if start.startswith(SIGNATURE):
        return await _read_v2(start, receive)
    if start.startswith(b"PROXY "):
        return await _read_v1(start, receive)
    raise InvalidProxyHeader("no PROXY header")


async def _read_v1(line: bytes, receive: Receive) -> ProxiedClient | None:
    """Read a line of text byte by byte, because its length isn't announced."""
    while not line.endswith(b"\r\n"):
        if len(line) >= MAX_V1_BYTES:
            raise InvalidProxyHeader("version 1: the line is too long")
        line += await receive(1)
    words = line[:-2].split(b" ")
    if words[1] == b"UNKNOWN":
        return None
    try:
        _, family, source, _, port, _ = words
        found, number = str(_V1_FAMILIES[family](source.decode("ascii"))), int(port)
    except (ValueError, KeyError) as error:
        raise InvalidProxyHeader("version 1: malformed") from error
    if not 0 <= number <= 65535:
        raise InvalidProxyHeader("version 1: no such port")
    return found, number


async def _read_v2(start: bytes, receive: Receive) -> ProxiedClient | None:
    """Read a binary header. `start` is its first SHORTEST_BYTES bytes."""
    fixed = start + await receive(_FIXED.size - len(start))
    _, version_and_command, family, length = _FIXED.unpack(fixed)
    if version_and_command not in {0x20, 0x21} or length > MAX_V2_BYTES:
        raise InvalidProxyHeader("version 2: malformed")
    rest = await receive(length) if length else b""
    if version_and_command == 0x20 or family not in _ADDRESSES:  # LOCAL; or datagrams, unix sockets, unspecified
        return None
    kind, size = _ADDRESSES[family]
    if length < 2 * size + 4:
        raise InvalidProxyHeader("version 2: the addresses are cut short")
    (port,) = struct.unpack_from("!H", rest, 2 * size)
    return socket.inet_ntop(kind, rest[:size]), port


MAX_HOPS = 32  # entries looked at, from the right

Headers = Mapping[str, str]  # looked up by lower-case names; a MultiMapping where a name may come twice

_FOR = re.compile(r'(?:^|;)\s*for=("[^"]*"|[^;,"\s]*)', re.IGNORECASE)
_V4_WITH_PORT = re.compile(r"([0-9.]+):[0-9]+")


class TrustedProxies:
    """The networks of proxies whose headers are believed. Peers on a unix socket are trusted: its file let them in."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = Networks(networks)

    def trusts(self, address: str | None) -> bool:
        """Return whether a normalized address is a trusted proxy's. None is a peer on a unix socket."""
        return address is None or self._networks.have(address)

    def trusts_peer(self, host: str | None) -> bool:
        """Return whether a connection's peer is a trusted proxy. `host` is as the socket spells it."""
        return self.trusts(address(host) if host else None)

    def client_of(self, peer: str | None, headers: Headers) -> str | None:
        """Return the client's address. `peer` is the connection's other end, None or "" on a unix socket.

        If both headers are present and name different clients, neither is believed: the client may have sent the one
        that the proxy doesn't write.
        """
        if peer and ":" in peer:  # sockets spell IPv4 in one way only
            peer = address(peer)
        if "x-forwarded-for" not in headers and "forwarded" not in headers:
            return peer or None
        peer = address(peer) if peer else None
        hops, elements = _elements(headers, "x-forwarded-for"), _elements(headers, "forwarded")
        if not (hops or elements) or not self.trusts(peer):
            return peer
        named = {
            self._first_untrusted(peer, listed) for listed in (hops, [_for(element) for element in elements]) if listed
        }
        return named.pop() if len(named) == 1 else peer

    def _first_untrusted(self, peer: str | None, hops: Sequence[str]) -> str | None:
        """Return the rightmost address that isn't a trusted proxy's; if all are, the leftmost known address."""
        farthest = peer
        for hop in reversed(hops[-MAX_HOPS:]):
            found = address(hop)
            if found is None:
                return farthest  # `unknown`, an obfuscated name or nonsense: what is behind it is unknown
            farthest = found
            if not self.trusts(found):
                break
        return farthest


def address(text: str) -> str | None:
    """Normalize an address: without port, brackets and zone, IPv4-mapped IPv6 as IPv4. Return None if it is invalid."""
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


def _elements(headers: Headers, name: str) -> list[str]:
    """Return a list header's elements from all its lines (RFC 9110, 5.3)."""
    if name not in headers:
        return []
    lines = headers.getall(name) if isinstance(headers, MultiMapping) else [headers[name]]
    return [element for line in lines for element in line.split(",") if element.strip()]


def _for(element: str) -> str:
    """Return the `for` node of a Forwarded element, "" if it has none."""
    found = _FOR.search(element)
    return found[1] if found is not None else ""
