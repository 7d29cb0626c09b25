"""Addresses: the listeners' (`HOST:PORT`, `[IPV6]:PORT`, `:PORT` for every interface, `unix:/path`), networks and URLs."""

import ipaddress
import re
from urllib.parse import urlsplit

REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://", "redis+cluster://")

MAX_LABEL = 63  # of a host's name; RFC 1035, section 2.3.4
MAX_HOST = 253  # in text, of the 255 octets that RFC 1035, section 2.3.4, gives to a name on the wire
MAX_SOCKET_PATH = 107  # sun_path and its NUL; unix(7)

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
        if not address.startswith("unix:/") or "\0" in address:
            return f"{address!r} needs an absolute path"
        too_long = len(address.removeprefix("unix:").encode()) > MAX_SOCKET_PATH
        return f"the path of a unix socket has at most {MAX_SOCKET_PATH} bytes" if too_long else None
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


def is_everywhere(address: str) -> bool:
    """Whether a listener's address is every interface of the machine."""
    try:
        host, _ = split_address(address)
    except ValueError:
        return False
    return host in {"", "0.0.0.0", "::"}  # noqa: S104 - what is asked for


def network_fault(text: str) -> str | None:
    """What is wrong with a network, or one address; None if nothing is."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return f"{text!r} is not a network such as 10.0.0.0/8"
    return None


def url_fault(url: str) -> str | None:
    """What is wrong with an HTTP URL's host or port; None if nothing is."""
    try:
        parts = urlsplit(url)
        if parts.port == 0:
            return "there is no port 0"
    except ValueError as error:
        return str(error)
    return host_fault(parts.hostname or "")


def host_fault(host: str) -> str | None:
    """What is wrong with a host's name or address; None if nothing is. One dot at the end is the root (RFC 1034, 3.1)."""
    if ":" in host:
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            return "its host is not an IPv6 address"
        return None
    name = host.removesuffix(".")
    if _HOST.fullmatch(name) is None or any(not 1 <= len(label) <= MAX_LABEL for label in name.split(".")):
        return f"a label of its host's name has 1 to {MAX_LABEL} letters, digits, - and _ (RFC 1035, 2.3.4)"
    if len(name) > MAX_HOST:
        return f"its host's name has more than {MAX_HOST} characters (RFC 1035, 2.3.4)"
    return None


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
