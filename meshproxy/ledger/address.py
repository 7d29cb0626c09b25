"""Where Redis is: the URL of `redis.url`, taken apart. Pure.

    redis://[user:password@]host[:port][/db]            rediss:// the same over TLS, verified
    unix://[user:password@]/path[?db=0]
    redis+sentinel://[user:password@]host[:port],.../service[/db]
    redis+cluster://[user:password@]host[:port],...

After `?`: `db`; `tls=1` for Sentinel and Cluster; `ca_file`, `cert_file`, `key_file` with TLS. A password with one of `/?#@%`
must be percent-encoded. What is wrong with a URL is told without quoting it, for it may hold a password.
"""

import ssl
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from msgspec import Struct

from meshproxy.config import Unfit

REDIS_PORT = 6379
SENTINEL_PORT = 26379

_OPTIONS = {"db", "tls", "ca_file", "cert_file", "key_file"}
_KINDS: dict[str, Literal["server", "sentinel", "cluster"]] = {
    "redis": "server",
    "rediss": "server",
    "unix": "server",
    "redis+sentinel": "sentinel",
    "redis+cluster": "cluster",
}


class Endpoint(Struct, frozen=True):
    """A host and port, or the path of a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        return self.path or f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class Tls(Struct, frozen=True):
    """Files of PEM; None: the system's authorities, and no certificate of our own."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def context(self) -> ssl.SSLContext:
        """A context that verifies certificate and host name. Reads the files; OSError if they can't be used."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


class Login(Struct, frozen=True):
    """Who we are to the server. Never shown."""

    username: str | None = None
    password: str | None = None
    db: int = 0

    def __repr__(self) -> str:
        return f"Login(db={self.db})"


class Address(Struct, frozen=True):
    """A URL, taken apart. `service` is Sentinel's name for the master."""

    kind: Literal["server", "sentinel", "cluster"]
    endpoints: tuple[Endpoint, ...]
    login: Login = Login()
    tls: Tls | None = None
    service: str = ""


def parse_url(url: str) -> Address:
    """The address of a URL; Unfit for anything else."""
    try:
        return _parse(url)
    except ValueError as error:
        raise Unfit([f"redis.url: {error}"]) from None


def _parse(url: str) -> Address:
    scheme, _, rest = url.partition("://")
    if scheme not in _KINDS:
        raise ValueError(f"its scheme is none of {', '.join(_KINDS)}")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    options = _options(query)
    kind = _KINDS[scheme]
    service, path = _service(path) if kind == "sentinel" else ("", path)
    if scheme == "unix":
        login = _login(userinfo, options.get("db", ""))
        return Address(kind, (_socket(hosts, slash + path),), login)
    port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    endpoints = tuple(_endpoint(host, port) for host in hosts.split(","))
    if kind == "server" and len(endpoints) > 1:
        raise ValueError("one server has one host (redis+sentinel and redis+cluster take several)")
    login = _login(userinfo, options.get("db", path))
    if kind == "cluster" and login.db:
        raise ValueError("Redis Cluster has no database but 0")
    return Address(kind, endpoints, login, _tls(scheme, options), service)


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"an unknown option after the question mark (known: {', '.join(sorted(_OPTIONS))})")
    return options


def _service(path: str) -> tuple[str, str]:
    service, _, db = path.partition("/")
    if not service:
        raise ValueError("Sentinel needs the name of the master, as redis+sentinel://host/mymaster/0")
    return unquote(service), db


def _socket(hosts: str, path: str) -> Endpoint:
    if hosts or len(path) < 2:
        raise ValueError("a unix socket needs an absolute path, as unix:///run/redis.sock")
    return Endpoint(path=unquote(path))


def _endpoint(text: str, default_port: int) -> Endpoint:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise ValueError("a host and port can't be read (is a character of the password not percent-encoded?)")
    return Endpoint(host, default_port if port is None else port)


def _login(userinfo: str, db: str) -> Login:
    username, _, password = userinfo.partition(":")
    if db and not (db.isascii() and db.isdigit()):
        raise ValueError("the database is a number")
    return Login(unquote(username) or None, unquote(password) or None, int(db or 0))


def _tls(scheme: str, options: dict[str, str]) -> Tls | None:
    if scheme != "rediss" and options.get("tls", "0") in {"0", "false", ""}:
        return None
    return Tls(options.get("ca_file"), options.get("cert_file"), options.get("key_file"))
