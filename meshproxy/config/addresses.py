"""Where the listeners listen: `HOST:PORT`, `[IPV6]:PORT`, `:PORT` (every interface) or `unix:/path`."""

import ipaddress
import re

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


def is_network(text: str) -> bool:
    """Whether this is a network such as 10.0.0.0/8, or one address."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _ipv6(host: str, address: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError as error:
        raise ValueError(f"{address!r}: {host!r} is not an IPv6 address") from error
