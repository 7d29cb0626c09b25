"""What `check`, `serve` and a reload read: a file's settings, its secrets and the other files that it names. All that serving
would build of them is built here first, so that what is accepted can be served.
"""

import hashlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from msgspec import Struct

from meshproxy.config import (
    Redis,
    SecretReader,
    Secrets,
    Server,
    Settings,
    Unfit,
    Upstream,
    decode,
    plain,
    split_address,
)
from meshproxy.config.names import line_of, under
from meshproxy.ledger.address import parse_url, tls_context
from meshproxy.ledger.journal import MAX_FILES
from meshproxy.server.sockets import UNIX_PREFIX
from meshproxy.server.tls import server_context
from meshproxy.telemetry.traces import require_extra
from meshproxy.upstream.provider import Provider


class Loaded(Struct, frozen=True):
    """A configuration that can be served. `settings` have the texts of their secrets; `warnings`: what is likely a mistake."""

    settings: Settings
    secrets: Secrets
    warnings: list[str]


def read(path: str) -> Settings:
    """The settings of a TOML file, without its secrets; Unfit with every fault, also if it can't be read."""
    decoded = decode(_text_of(path))
    if decoded.faults:
        raise Unfit(decoded.faults)
    return decoded.settings


def load(path: str) -> Loaded:
    """The configuration of a TOML file; Unfit with all that keeps it from being served, each with the line it is about."""
    try:
        decoded = decode(_text_of(path))
    except Unfit as unfit:
        raise Unfit([fault if path in fault else f"{fault} ({path})" for fault in unfit.faults]) from unfit
    reader = SecretReader(os.environ, secret_text)
    secrets = reader.secrets(decoded.settings)
    settings = reader.filled(decoded.settings)
    faults = [*decoded.faults, *reader.faults]
    faults += list(unservable(settings, secrets, faults))

    def placed(told: str) -> str:
        line = line_of(told, decoded.lines)
        return told if line is None else f"{told} ({path}:{line})"

    if faults:
        raise Unfit([placed(fault) for fault in faults])
    return Loaded(settings, secrets, [placed(warning) for warning in decoded.warnings])


def unservable(settings: Settings, secrets: Secrets, known: list[str]) -> Iterator[str]:
    """Build what serving builds, and give each fault. Sections with a fault among those `known` can't be built, and are not."""

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
    """Where settlements wait for Redis: redis.journal, else a place of this Redis's own under the state directory that systemd
    (STATE_DIRECTORY) or the XDG base directories give.
    """
    if settings.redis.journal is not None:
        return settings.redis.journal
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    root = Path(state or Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "meshproxy")
    address = parse_url(
        plain(settings.redis.url)
    ).canonical  # also when it is spelled otherwise, or with another password
    store = hashlib.sha256(address.encode()).hexdigest()[:16]  # what one Redis is owed is nothing to another
    return str(root / store / "journal")


def filled(settings: Settings, *, need_keys: bool = True) -> tuple[Settings, Secrets]:
    """The settings with the texts of their secrets, and the secrets beside them; Unfit if one can't be had. Without `need_keys`
    the upstreams' API keys are not read.
    """
    reader = SecretReader(os.environ, secret_text)
    secrets = reader.secrets(settings) if need_keys else Secrets({})
    settings = reader.filled(settings)
    if reader.faults:
        raise Unfit(reader.faults)
    return settings, secrets


def secret_text(path: str) -> str:
    """A secret's file. Bytes that are no text become characters that a `SecretReader` refuses."""
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Unfit([f"{path}: can't be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise Unfit([f"{path}: not UTF-8"]) from error


def _faults_of(*builders: Callable[[], object]) -> Iterator[str]:
    """What the builders refuse."""
    for build in builders:
        try:
            build()
        except Unfit as unfit:
            yield from unfit.faults


def _server_faults(server: Server) -> Iterator[str]:
    yield from _faults_of(lambda: server_context(server))
    for key in ("listen", "admin_listen"):
        address = getattr(server, key)
        if address is None:
            continue
        try:
            _try_host(address)
        except OSError as error:
            yield f"server.{key}: {address} can't be listened at ({error.strerror or error})"


def _try_host(address: str) -> None:
    """OSError if this machine has no such address, or no such directory for a socket. The port is not touched: it may be ours."""
    if address.startswith(UNIX_PREFIX):
        os.stat(Path(address.removeprefix(UNIX_PREFIX)).parent)  # noqa: PTH116 - as it raises
        return
    host, _ = split_address(address)
    found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, name = found[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.bind(name)


def _redis_faults(redis: Redis) -> Iterator[str]:
    url = plain(redis.url)
    if url != "embedded":
        yield from _faults_of(lambda: tls_context(parse_url(url)))
    if redis.journal is not None:
        try:
            _try_journal(Path(redis.journal))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            yield f"redis.journal: {redis.journal} can't be written ({reason})"


def _try_journal(path: Path) -> None:
    """OSError if a journal can't be kept here. What is made for the attempt is taken away again."""
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
    with suppress(OSError):  # somebody has begun to use it meanwhile
        directory.rmdir()


def _upstream_faults(path: str, name: str, upstream: Upstream, secrets: Secrets) -> Iterator[str]:
    try:
        Provider(name, upstream, secrets.upstreams.get(name))
    except ValueError as error:
        yield f"{path}.{error}"
