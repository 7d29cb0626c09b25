"""The interface to Redis that the ledger is written against: `Store`, its Lua scripts and errors, and `redis.url`.

Scripts lie as `NAME.lua` in `scripts/` and are called by the SHA-1 that EVALSHA takes. A line `-- include: NAME` is
replaced by the text of `NAME.lua`, because Redis scripts can't import modules. No file is read at import: the objects
of the ledger load their scripts when they are made.

redis-py reads credentials, host and port of `redis.url`; its grammar lacks Sentinel, Cluster and our options:

    redis://[user:password@]host[:port][/db]            rediss:// the same over TLS, verified
    unix://[user:password@]/path[?db=0]
    redis+sentinel://[user:password@]host[:port],.../service[/db]
    redis+cluster://[user:password@]host[:port],...

After `?`: `db`; `tls=1` for Sentinel and Cluster; `ca_file`, `cert_file`, `key_file` with TLS. A password with one of
`/?#@%` must be percent-encoded. Error messages never quote the URL, because it may contain a password.
"""

import asyncio
import hashlib
import ipaddress
import re
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import parse_qsl, unquote

import hiredis
from msgspec import Struct

from meshproxy.config import ConfigError
from meshproxy.config.settings import MAX_SOCKET_PATH, host_fault
from meshproxy.errors import ErrorResponse, GatewayError, Source, ledger_unavailable

if TYPE_CHECKING:
    from redis.asyncio.connection import ConnectKwargs


_INCLUDE = re.compile(r"^-- include: ([a-z0-9_]+)[ \t]*$", re.MULTILINE)


class Script(Struct, frozen=True):
    """One script with its includes: the name for metrics and messages, the text, and its SHA-1 (hex)."""

    name: str
    text: str
    sha: str

    @classmethod
    def of(cls, name: str, text: str) -> "Script":
        """Make the script of a given text."""
        return cls(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    @classmethod
    def load(cls, name: str) -> "Script":
        """Load the script in `NAME.lua` with its includes. Raises FileNotFoundError if a file is missing."""
        return cls.of(name, expand(script_text(name), script_text))


def expand(text: str, read: Callable[[str], str]) -> str:
    """Replace each include in a script's text by `read(NAME)`. Included files can't include others."""
    return _INCLUDE.sub(lambda line: read(line[1]).rstrip("\n"), text)


def script_text(name: str) -> str:
    """Return the text of `NAME.lua`."""
    return resources.files(__package__).joinpath("scripts", f"{name}.lua").read_text(encoding="utf-8")


Item = TypeVar("Item")
Argument = str | bytes | int


class Packed(Struct, frozen=True):
    """Arguments that many commands have, and their form on the wire: packing one again costs 0.12 us, 0.2 if it is an int."""

    texts: tuple[str, ...] = ()
    count: int = 0
    wire: bytes = b""


def pack(*texts: str | int) -> Packed:
    """Pack arguments as RESP's bulk strings, without the head of an array."""
    packed: bytes = hiredis.pack_command(texts)  # type: ignore[arg-type]
    return Packed(tuple(map(str, texts)), len(texts), packed.partition(b"\r\n")[2])


class ScriptCall(Struct, frozen=True):
    """A call of a script: packed by the script's SHA-1, and its parts. See Store.run."""

    packed: bytes
    script: Script
    key_count: int
    head: Packed
    between: tuple[Argument, ...]
    tail: Packed

    def by_text(self) -> tuple[Argument, ...]:
        """Return the command that calls the script by its text."""
        return ("EVAL", self.script.text, self.key_count, *self.head.texts, *self.between, *self.tail.texts)


Command = tuple[Argument, ...] | ScriptCall
OnChange = Callable[[str, bool, str], None]  # server name, whether it is connected now, reason if not
OnOp = Callable[
    [str, float | None, str | None], None
]  # operation, seconds (None: not sent), kind of error (None: success)

# Error replies that end by themselves, after some time or a failover:
# https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors
TEMPORARY_ERRORS = frozenset({
    "ASK",  # like MOVED: the slot is on a node that isn't known yet; nothing was executed
    "BUSY",  # a script runs too long
    "CLUSTERDOWN",
    "LOADING",  # the data set is read from disk
    "MASTERDOWN",  # a replica without its master
    "MISCONF",  # snapshots fail, so writes are refused
    "MOVED",
    "NOREPLICAS",  # fewer than min-replicas-to-write
    "OOM",  # maxmemory is reached
    "READONLY",  # this is a replica now
    "TRYAGAIN",  # a slot is being migrated
})  # fmt: skip


class Unavailable(GatewayError):
    """The store can't be used now.

    `kind` is from a closed set, for metrics. `reason` is for logs and contains no secret; it is also the exception's
    text. `is_sent`: the command may have reached the server, and may have run.
    """

    def __init__(self, kind: str, reason: str, *, is_sent: bool = True) -> None:
        super().__init__(Source.GATEWAY, ledger_unavailable())
        self.args = (reason,)
        self.kind = kind
        self.reason = reason
        self.is_sent = is_sent


class StoreError(Exception):
    """An error reply that waiting doesn't resolve: a bug here or a wrong set-up there. `kind` is its first word."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Contended(GatewayError):
    """A record was changed by others before each attempt at changing it. Repeating the change is safe."""

    def __init__(self, name: str) -> None:
        message = f"{name} is being changed by others; repeat the change"
        super().__init__(Source.CLIENT, ErrorResponse(409, "changed_meanwhile", message))


NOTHING = Packed()
MAX_KNOWN_CALLS = 128  # pairs of script and number of keys whose packed beginning is cached


class Store(ABC):
    """Redis behind any kind of URL: a server, Sentinel or Cluster."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether a command sent now would reach a server."""

    @abstractmethod
    def send(self, op: str, command: Command) -> "asyncio.Future[Any]":
        """Queue one command; return the future of its reply. It is sent even if not awaited. `op` is for metrics."""

    @abstractmethod
    async def close(self) -> None:
        """Fail all pending commands and close every socket."""

    def execute(self, *args: Argument) -> "asyncio.Future[Any]":
        """Queue one command and return the future of its reply (bytes, int, list or None).

        It raises Unavailable and StoreError.

        Commands issued in one turn of the event loop share one write: issue them all before awaiting them, or gather
        them.
        """
        return self.send(str(args[0]), args)

    def run(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[Argument],
        *,
        head: Packed = NOTHING,
        tail: Packed = NOTHING,
    ) -> "asyncio.Future[Any]":
        """Queue a call of a script; return the future of its reply, as `execute` does.

        `head` has the keys before `keys`, `tail` the arguments after `args`. The script's text is sent where the server
        doesn't have the script.
        """
        between, key_count = (*keys, *args), head.count + len(keys)
        begin = _call_begins(script, key_count)
        count = begin.count + head.count + len(between) + tail.count
        wire = hiredis.pack_command(between).partition(b"\r\n")[2]  # type: ignore[arg-type]
        packed = b"*%d\r\n%b%b%b%b" % (count, begin.wire, head.wire, wire, tail.wire)
        return self.send(script.name, ScriptCall(packed, script, key_count, head, between, tail))


@lru_cache(MAX_KNOWN_CALLS)
def _call_begins(script: Script, key_count: int) -> Packed:
    return pack("EVALSHA", script.sha, key_count)


def pairs(flat: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the fields and values of a reply that lists them in turn, as HGETALL's."""
    return zip(flat[::2], flat[1::2], strict=True)


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield the items in batches, so that each batch's commands can share one write."""
    return (items[first : first + size] for first in range(0, len(items), size))


def error_of_reply(message: str) -> Unavailable | StoreError:
    """Make the exception for an error reply. Its first word, in capitals, is the kind."""
    kind = message.split(" ", 1)[0]
    if kind in TEMPORARY_ERRORS:
        return Unavailable(kind.lower(), message)
    return StoreError(kind, message)


def kind_of(error: Unavailable | StoreError) -> str:
    """Return an error's label for metrics, from a closed set."""
    if isinstance(error, Unavailable):
        return error.kind
    return "noscript" if error.kind == "NOSCRIPT" else "error"


REDIS_PORT = 6379
SENTINEL_PORT = 26379
MAX_DB_DIGITS = 9  # Redis takes no number above 2**31 - 1

_OPTIONS = {"db", "tls", "ca_file", "cert_file", "key_file"}
_SWITCH = {"0": False, "1": True, "false": False, "true": True}
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
    """PEM files. None: the system's authorities, and no client certificate."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def context(self) -> ssl.SSLContext:
        """Make an SSL context that verifies certificate and host name. Raises OSError if a file can't be used."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file, password=_no_password)
        return context


def _no_password() -> str:
    """Refuse a key with a password: OpenSSL would ask for it on the terminal."""
    raise ValueError("a key with a password can't be used")


class Login(Struct, frozen=True):
    """The credentials and the database. The `repr` shows no credentials."""

    username: str | None = None
    password: str | None = None
    db: int = 0

    def __repr__(self) -> str:
        return f"Login(db={self.db})"


class RedisAddress(Struct, frozen=True):
    """A parsed URL. `service` is Sentinel's name for the master."""

    kind: Literal["server", "sentinel", "cluster"]
    endpoints: tuple[Endpoint, ...]
    login: Login = Login()
    tls: Tls | None = None
    service: str = ""

    @property
    def canonical(self) -> str:
        """One spelling for each Redis: without credentials and TLS, endpoints sorted, loopback always `localhost`."""
        endpoints = sorted(str(Endpoint(_canonical_host(e.host), e.port, e.path)) for e in self.endpoints)
        return f"{self.kind} {','.join(endpoints)} {self.service}/{self.login.db}"


def parse_url(url: str) -> RedisAddress:
    """Parse a Redis URL. Raises ConfigError if it is invalid."""
    try:
        return _parse(url)
    except ValueError as error:
        raise ConfigError([f"redis.url: {error}"]) from None


def tls_context(address: RedisAddress) -> ssl.SSLContext | None:
    """Make the SSL context of an address, None without TLS. Raises ConfigError if its files can't be used."""
    try:
        return None if address.tls is None else address.tls.context()
    except ssl.SSLError as error:
        raise ConfigError(
            [f"redis.url: the TLS files can't be used ({(error.reason or 'not PEM').lower()})"]
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError([f"redis.url: the TLS files can't be used ({reason})"]) from error


def _parse(url: str) -> RedisAddress:
    """Parse a Redis URL. Raises ValueError, without quoting the URL."""
    scheme, _, rest = url.partition("://")
    kind = _KINDS.get(scheme)
    if kind is None:
        raise ValueError(f"its scheme is none of {', '.join(_KINDS)}")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    userinfo, at, hosts = authority.rpartition("@")
    options = _read_options(query)
    service, db = path.partition("/")[::2] if kind == "sentinel" else ("", path)
    if kind == "sentinel" and not service:
        raise ValueError("Sentinel needs the name of the master, as redis+sentinel://host/mymaster/0")
    if scheme == "unix":
        reads, endpoints, db = [_read_authority(f"{userinfo}{at}localhost")], [_socket(hosts, slash + path)], ""
    else:
        default_port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
        reads = [_read_authority(f"{userinfo}{at}{host}") for host in hosts.split(",")]
        endpoints = [Endpoint(read["host"], read.get("port", default_port)) for read in reads]
    if kind == "server" and len(endpoints) > 1:
        raise ValueError("one server has one host (redis+sentinel and redis+cluster take several)")
    login = Login(reads[0].get("username"), reads[0].get("password"), _database(db, options.get("db", db)))
    if kind == "cluster" and login.db:
        raise ValueError("Redis Cluster has no database but 0")
    has_tls = _has_tls(scheme, options.get("tls"))
    files = tuple(map(options.get, ("ca_file", "cert_file", "key_file")))
    if any(files) and not has_tls:
        raise ValueError("ca_file, cert_file and key_file are for TLS: as rediss://, or with tls=1")
    if options.get("key_file") and not options.get("cert_file"):
        raise ValueError("key_file needs a cert_file")
    tls = Tls(*files) if has_tls else None
    return RedisAddress(kind, tuple(endpoints), login, tls, unquote(service))


def _has_tls(scheme: str, option: str | None) -> bool:
    if option is None:
        return scheme == "rediss"
    if option not in _SWITCH:
        raise ValueError(f"tls is one of {', '.join(_SWITCH)}")
    if (scheme == "unix" and _SWITCH[option]) or (scheme == "rediss" and not _SWITCH[option]):
        raise ValueError(f"{scheme}:// and tls={option} contradict each other")
    return _SWITCH[option]


def _read_options(query: str) -> dict[str, str]:
    given = parse_qsl(query, keep_blank_values=True)
    options = dict(given)
    if not options.keys() <= _OPTIONS:
        raise ValueError(f"an unknown option after the question mark (known: {', '.join(sorted(_OPTIONS))})")
    if len(options) < len(given):
        raise ValueError("an option is there twice")
    return options


def _database(in_path: str, in_options: str) -> int:
    if in_path and in_path != in_options:
        raise ValueError("the path and the option db name different databases")
    if in_options and not (in_options.isascii() and in_options.isdigit() and len(in_options) <= MAX_DB_DIGITS):
        raise ValueError(f"the database is a number of at most {MAX_DB_DIGITS} digits")
    return int(in_options or 0)


def _socket(hosts: str, path: str) -> Endpoint:
    if hosts or len(path) < 2:
        raise ValueError("a unix socket needs an absolute path, as unix:///run/redis.sock")
    path = unquote(path)
    if len(path.encode()) > MAX_SOCKET_PATH or "\0" in path:
        raise ValueError(f"the path of a unix socket has at most {MAX_SOCKET_PATH} bytes, and no NUL")
    return Endpoint(path=path)


def _read_authority(authority: str) -> "ConnectKwargs":
    """Read user, password, host and port. Raises ValueError without redis-py's message, which may quote a password."""
    from redis.asyncio.connection import parse_url as read_url  # noqa: PLC0415 - it takes a while; a health check reads no URL

    try:
        read = read_url(f"redis://{authority}")
    except ValueError:
        read = {}
    is_port_0 = authority.endswith("0") and authority.rstrip("0").endswith(":")  # redis-py reads port 0 as no port
    if "host" not in read or is_port_0 or host_fault(read["host"]) is not None:
        raise ValueError("a host and port can't be read (is a character of the password not percent-encoded?)")
    return read


def _canonical_host(host: str) -> str:
    """Return a host name in lower case, an address in its shortest form (RFC 5952), and `localhost` for loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".")
    return "localhost" if address.is_loopback else address.compressed
