"""Addresses: the listeners' (`HOST:PORT`, `[IPV6]:PORT`, `:PORT` for every interface, `unix:/path`), networks and URLs."""

import ipaddress
import re
from urllib.parse import urlsplit

REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://", "redis+cluster://")

_HOST = re.compile(r"[A-Za-z0-9._-]*")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8080`, `[::1]:8080` or `:8080` (every interface); ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        return _ipv6(host[1:-1], address), int(port)
    if ":" in host:
        raise ValueError(f"{address!r}: an IPv6 address goes in brackets")
    if _HOST.fullmatch(host) is None:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host, int(port)


def address_fault(address: str) -> str | None:
    """What is wrong with a listener's address; None if nothing is."""
    if address.startswith("unix:"):
        return None if address.startswith("unix:/") else f"{address!r} needs an absolute path"
    try:
        split_address(address)
    except ValueError as error:
        return str(error)
    return None


def is_private(address: str) -> bool:
    """Whether only this machine can reach a listener's address: loopback, or a socket file. What can't be told is not."""
    if address.startswith("unix:"):
        return True
    try:
        host, _ = split_address(address)
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_fault(text: str) -> str | None:
    """What is wrong with a network, or one address; None if nothing is."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return f"{text!r} is not a network such as 10.0.0.0/8"
    return None


def port_fault(url: str) -> str | None:
    """What is wrong with an HTTP URL's port; None if nothing is."""
    try:
        return "there is no port 0" if urlsplit(url).port == 0 else None
    except ValueError as error:
        return str(error)


def redis_url_fault(url: str) -> str | None:
    """What is wrong with the scheme of redis.url; None if nothing is. The rest, which isn't shown, may hold a password."""
    if url == "embedded" or url.startswith(REDIS_SCHEMES):
        return None
    return f"its scheme is none of {', '.join(REDIS_SCHEMES)}, nor is it embedded"


def _ipv6(host: str, address: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError as error:
        raise ValueError(f"{address!r}: {host!r} is not an IPv6 address") from error
