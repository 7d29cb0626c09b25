"""Load a configuration: read its file, its secrets and the other files that it names, and try all that serving needs.

What `load` accepts can be served: it makes every object that `serve` makes of the configuration. Every fault is found at
once. Imports of aiohttp are in the functions that need it: a health check reads a file without it.
"""

import errno
import hashlib
import ipaddress
import os
import socket
import ssl
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from msgspec import Struct

from meshproxy.config import (
    ConfigError,
    Redis,
    SecretReader,
    Secrets,
    Server,
    Settings,
    Upstream,
    decode,
    resolved,
)
from meshproxy.config.load import line_of, under
from meshproxy.ledger.journal import MAX_FILES
from meshproxy.ledger.store import parse_url, tls_context
from meshproxy.telemetry.spans import require_extra
from meshproxy.units import DAY_S

MAX_SECRET_BYTES = 65_536
WRONG_DATES = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED (openssl's x509_vfy.h)
EXPIRES_SOON_S = 2 * DAY_S  # certificates for six days are renewed when half of their time has passed


class Loaded(Struct, frozen=True):
    """A configuration that can be served. `settings` contain the secrets' texts; `warnings` are likely mistakes."""

    settings: Settings
    secrets: Secrets
    warnings: list[str]


def read(path: str) -> Settings:
    """Return the settings of a TOML file, without its secrets. Raises ConfigError with every fault."""
    decoded = decode(_read_text(path))
    if decoded.faults:
        raise ConfigError(decoded.faults)
    return decoded.settings


def load(path: str) -> Loaded:
    """Load the configuration of a TOML file. Raises ConfigError with all that prevents serving it, with lines."""
    try:
        decoded = decode(_read_text(path))
    except ConfigError as error:
        raise ConfigError([fault if path in fault else f"{fault} ({path})" for fault in error.faults]) from error
    reader = SecretReader(os.environ, secret_text)
    secrets = reader.secrets(decoded.settings)
    settings = reader.with_secrets(decoded.settings)
    faults = [*decoded.faults, *reader.faults]
    faults += list(build_faults(settings, secrets, faults))

    def with_line(fault: str) -> str:
        line = line_of(fault, decoded.lines)
        return fault if line is None else f"{fault} ({path}:{line})"

    if faults:
        raise ConfigError([with_line(fault) for fault in faults])
    warnings = [*decoded.warnings, *certificate_warnings(settings.server, time.time())]
    return Loaded(settings, secrets, [with_line(warning) for warning in warnings])


def build_faults(settings: Settings, secrets: Secrets, known: list[str]) -> Iterator[str]:
    """Build what serving builds, and yield each fault. Sections with a fault in `known` are skipped."""

    def is_whole(path: str) -> bool:
        return not any(fault.startswith(path) and fault[len(path) :][:1] in {":", ".", "["} for fault in known)

    if is_whole("server"):
        yield from _server_faults(settings.server)
    if is_whole("redis"):
        yield from _redis_faults(settings.redis)
    if is_whole("tracing"):
        yield from _faults_of(lambda: require_extra(settings.tracing))
    for name, upstream in (settings.upstreams or {}).items():
        path = under("upstreams", name)
        if is_whole(path):
            yield from _upstream_faults(path, name, upstream, secrets)


def journal_path(settings: Settings) -> str:
    """Return the path of the journal: redis.journal, else a path for this Redis in the state directory.

    The state directory is systemd's STATE_DIRECTORY, else one by the XDG base directories.
    """
    if settings.redis.journal is not None:
        return settings.redis.journal
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    root = Path(state or Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "meshproxy")
    address = parse_url(resolved(settings.redis.url)).canonical  # the same for every spelling and password
    store = hashlib.sha256(address.encode()).hexdigest()[:16]  # one Redis must not be sent another's settlements
    return str(root / store / "journal")


def read_secrets(settings: Settings, *, need_keys: bool = True) -> tuple[Settings, Secrets]:
    """Return the settings with their secrets' texts, and the secrets. Raises ConfigError if one can't be read.

    Without `need_keys` the upstreams' API keys aren't read.
    """
    reader = SecretReader(os.environ, secret_text)
    secrets = reader.secrets(settings) if need_keys else Secrets({})
    settings = reader.with_secrets(settings)
    if reader.faults:
        raise ConfigError(reader.faults)
    return settings, secrets


def secret_text(path: str) -> str:
    """Read a secret's file. Raises OSError if it isn't a regular file or is too large for a secret.

    Bytes that aren't UTF-8 become characters that a `SecretReader` refuses.
    """
    require_file(path)
    with open(path, "rb") as file:  # noqa: PTH123 - to read no more than this of it
        data = file.read(MAX_SECRET_BYTES + 1)
    if len(data) > MAX_SECRET_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_SECRET_BYTES} bytes")
    return data.decode(errors="replace")


def require_file(path: str) -> None:
    """Raise OSError if the path isn't a regular file: reading a FIFO or a device may never end."""
    mode = os.stat(path).st_mode  # noqa: PTH116 - for its OSError
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except OSError as error:
        raise ConfigError([f"{path}: can't be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8"]) from error


def _faults_of(build: Callable[[], object]) -> Iterator[str]:
    """Call `build` and yield the faults that it raises."""
    try:
        build()
    except ConfigError as error:
        yield from error.faults


def _server_faults(server: Server) -> Iterator[str]:
    """Check the TLS files and that both listeners' addresses exist."""
    from meshproxy.server.listener import server_context  # noqa: PLC0415 - aiohttp; a health check reads a file without it

    faults = [*_file_faults("server.tls_cert", server.tls_cert), *_file_faults("server.tls_key", server.tls_key)]
    yield from faults or _faults_of(lambda: server_context(server))
    if server.listen is not None and server.admin_listen is not None:
        with suppress(OSError):  # reported below
            if _is_same_address(server.listen, server.admin_listen):
                yield "server.admin_listen: the same as server.listen"
    for key in ("listen", "admin_listen"):
        address = getattr(server, key)
        if address is None:
            continue
        try:
            _check_address(address)
        except OSError as error:
            yield f"server.{key}: can't listen at {address} ({error.strerror or error})"


def certificate_warnings(server: Server, now: float) -> Iterator[str]:
    """Yield a warning if clients will refuse the certificate for its dates, or will in EXPIRES_SOON_S from `now`.

    The `ssl` module reads no dates from a file, so a handshake in memory, which trusts this certificate, verifies it.
    """
    from meshproxy.server.listener import server_context  # noqa: PLC0415 - as above

    context = server_context(server)
    if context is None or server.tls_cert is None:
        return
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trusting.load_verify_locations(server.tls_cert)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, gateway = trusting.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
    try:
        for end in (client, gateway, client):  # the first two wait for what the other says (RFC 8446, section 2)
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in WRONG_DATES:
            yield f"server.tls_cert: {server.tls_cert}: clients refuse it ({error.verify_message})"
        return
    ends_at = str((client.getpeercert() or {}).get("notAfter", ""))
    if ends_at and ssl.cert_time_to_seconds(ends_at) < now + EXPIRES_SOON_S:
        yield f"server.tls_cert: {server.tls_cert} expires on {ends_at}"


def _check_address(address: str) -> None:
    """Raise OSError if this machine lacks the address or the socket's directory. The port may be ours: not bound."""
    from meshproxy.server.listener import socket_address  # noqa: PLC0415 - as above

    family, name = socket_address(address)
    if family == socket.AF_UNIX:
        path = Path(name)
        os.stat(path.parent)  # noqa: PTH116 - for its OSError
        if path.exists() and not path.is_socket():
            raise OSError(errno.EEXIST, "something that is not a socket is there")
        return
    with socket.socket(family) as sock:
        sock.bind((name[0], 0, *name[2:]))


def _is_same_address(one: str, other: str) -> bool:
    """Return whether two listeners need the same port or socket file, however their addresses are spelled."""
    from meshproxy.server.listener import socket_address  # noqa: PLC0415 - as above

    (family, name), (other_family, other_name) = socket_address(one), socket_address(other)
    if socket.AF_UNIX in {family, other_family}:
        return family == other_family and os.path.realpath(name) == os.path.realpath(other_name)
    (host, port), (other_host, other_port) = name[:2], other_name[:2]
    if port == 0 or port != other_port:
        return False
    first, second = ipaddress.ip_address(host.partition("%")[0]), ipaddress.ip_address(other_host.partition("%")[0])
    return first == second or any(
        a.is_unspecified and a.version >= b.version  # one at :: takes IPv4 too
        for a, b in ((first, second), (second, first))
    )


def _file_faults(key: str, path: str | None) -> Iterator[str]:
    try:
        if path is not None:
            require_file(path)
    except OSError as error:
        yield f"{key}: {path} can't be read ({error.strerror})"
    except ValueError:  # a NUL in it
        yield f"{key}: not a valid file name"


def _redis_faults(redis: Redis) -> Iterator[str]:
    """Check the Redis URL, its TLS files and the journal's place."""
    url = resolved(redis.url)
    if url != "embedded":
        yield from _faults_of(lambda: _check_redis_url(url))
    if redis.journal is not None:
        try:
            _check_journal(Path(redis.journal))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            yield f"redis.journal: {redis.journal} can't be written ({reason})"


def _check_redis_url(url: str) -> None:
    """Raise ConfigError if the URL can't be read, or the files that it names."""
    address = parse_url(url)
    for endpoint in address.endpoints:
        if endpoint.path and Path(endpoint.path).exists() and not Path(endpoint.path).is_socket():
            raise ConfigError([f"redis.url: {endpoint.path} is not a socket"])
    for path in (address.tls.ca_file, address.tls.cert_file, address.tls.key_file) if address.tls is not None else ():
        for fault in _file_faults("redis.url", path):
            raise ConfigError([fault])
    tls_context(address)


def _check_journal(path: Path) -> None:
    """Raise OSError if a journal can't be kept here. What the attempt creates is removed again."""
    if path.is_dir():
        raise OSError(errno.EISDIR, "it is a directory: name a file in it")
    with ExitStack() as stack:
        for directory in reversed([parent for parent in path.parents if not parent.exists()]):
            directory.mkdir(mode=0o700)
            stack.callback(_remove_if_empty, directory)
        for number in range(MAX_FILES):
            name = Path(f"{path}.{number}")
            if not name.exists():
                break
            os.close(os.open(name, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC))
        with tempfile.TemporaryFile(dir=path.parent, prefix=path.name):
            pass


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):  # in use by now
        directory.rmdir()


def _upstream_faults(path: str, name: str, upstream: Upstream, secrets: Secrets) -> Iterator[str]:
    from meshproxy.upstream.provider import Provider  # noqa: PLC0415 - as above

    try:
        Provider(name, upstream, secrets.upstreams.get(name))
    except ValueError as error:
        yield f"{path}.{error}"
