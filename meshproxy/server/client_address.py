"""Who a request came from: the peer, or whoever the trusted proxies in front say it was.

X-Forwarded-For and Forwarded (RFC 7239) are lists that each proxy appends to, so they are read from the right: what a trusted
proxy added is believed, and the first address that is no trusted proxy's is the client. What stands left of it, a client may have
written itself.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence

from multidict import MultiMapping

from meshproxy.policy.access import Networks

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
