"""Reload the configuration on SIGHUP: in every worker, or in none; and report states to systemd (sd_notify(3))."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from meshproxy.app.load import Loaded, read
from meshproxy.config import ConfigError, Secret, Secrets, Settings

READY = "READY=1"
STOPPING = "STOPPING=1"
MAX_STATUS_CHARS = 1000  # a datagram larger than the socket takes is lost whole


def notify(*states: str) -> None:
    """Send states to the service manager (NOTIFY_SOCKET). Does nothing without one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    name = f"\0{address[1:]}" if address.startswith("@") else address  # @: an abstract socket
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(name)
        sock.sendall("\n".join(states).encode())


def reloading() -> str:
    """Return the state of a reload that begins now; READY ends it. Type=notify-reload requires the time in it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def status(text: str) -> str:
    """Return the state that `systemctl status` shows as one line."""
    return "STATUS=" + " ".join(text.split())[:MAX_STATUS_CHARS]


Read = Callable[[], Loaded]

# Keys that only a restart changes, by table: bound sockets, made connections, histograms' layouts.
RESTART_ONLY: dict[str, tuple[str, ...]] = {
    "server": (
        "listen",
        "admin_listen",
        "workers",
        "admin_token",
        "admin_hosts",
        "proxy_protocol",
        "fast_path",
        "max_body_bytes",
    ),
    "redis": tuple(field.name for field in msgspec.structs.fields(Settings().redis)),
    "log": ("format",),
    "metrics": ("buckets", "accounts", "accounts_max"),
    "tracing": ("endpoint", "sample"),
}

_log = structlog.get_logger("meshproxy.app")


class RunningConfig(Struct, tag="config", frozen=True):
    """The configuration in force, and the journal's path (None: in memory).

    `generation` counts the configurations that were swapped in. `reload_failed`: a newer configuration could not be
    used.
    """

    settings: Settings
    secrets: Secrets
    journal: str | None = None
    generation: int = 1
    reload_failed: bool = False


class FileWatch:
    """Finds changes of the configuration's file and of the secrets and certificates that it names."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._files = files_of(path)
        self._served = self._latest = self._versions()

    def changed(self) -> bool:
        """Return whether a file has changed since it was served, and not since the call before.

        So no file is read while it is being written.
        """
        before, self._latest = self._latest, self._versions()
        if self._latest == self._served or self._latest != before:
            return False
        self._files = files_of(self._path)
        self._served = self._latest = self._versions()
        return True

    def _versions(self) -> list[tuple[int, int, int] | None]:
        """Return each file's version. A link has its target's version, because Kubernetes swaps targets."""
        return [_version(path) for path in self._files]


def files_of(path: str) -> list[str]:
    """Return the configuration's path, and the paths of secrets and certificates that it names, if it can be read."""
    with suppress(ConfigError):
        settings = read(path)
        certificate = (settings.server.tls_cert, settings.server.tls_key)
        return [path, *(file for file in certificate if file is not None), *_secret_files(settings)]
    return [path]


def _secret_files(value: object) -> Iterator[str]:
    """Yield the path of every secret in a configuration that is in a file."""
    if isinstance(value, Secret):
        if value.file is not None:
            yield value.file
    elif isinstance(value, Struct):
        for name in value.__struct_fields__:
            yield from _secret_files(getattr(value, name))
    elif isinstance(value, dict):
        for member in value.values():
            yield from _secret_files(member)


def _version(path: str) -> tuple[int, int, int] | None:
    """Return inode, modification time and size; None if there is no such file."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a path as the configuration has it
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


class Reloadable(Protocol):
    """What the Reloader reloads: one worker, or the supervisor of several."""

    config: RunningConfig

    async def prepare(self, config: RunningConfig) -> list[str]:
        """Build this configuration in every worker without serving it. Return the faults that prevent it."""

    async def apply(self, config: RunningConfig) -> list[str]:
        """Put this configuration in force in every worker. Return the faults that prevented it in one."""


class Reloader:
    """Reads the configuration again and puts it in force in all workers, or in none if one of them can't build it."""

    def __init__(self, settings: Settings, read: Read) -> None:
        self._settings = settings  # as last read and put in force
        self._read = read

    async def reload(self, workers: Reloadable) -> None:
        """Put the file's present configuration in force. A bad file changes nothing; the log has every fault."""
        notify(reloading())
        outcome = "reload failed, see the log"
        try:
            faults = await self._swap(workers)
            if faults:
                _log.error("reload_failed", faults=faults)
                outcome = f"reload failed, generation {workers.config.generation} goes on: {'; '.join(faults)}"
                await workers.apply(replace(workers.config, reload_failed=True))
            else:
                _log.info("reloaded", generation=workers.config.generation)
                outcome = f"reloaded, generation {workers.config.generation}"
        finally:
            notify(READY, status(outcome))

    async def _swap(self, workers: Reloadable) -> list[str]:
        """Load, prepare and apply the file. Return the faults that prevent it; none: it is in force."""
        try:
            loaded = await asyncio.to_thread(self._read)  # reads files, and a TLS context alone takes 16 ms
        except ConfigError as error:
            return error.faults
        settings, kept_keys = without_restart_keys(self._settings, loaded.settings)
        config = workers.config
        token = config.secrets.admin_token
        if loaded.secrets.admin_token != token and "server.admin_token" not in kept_keys:
            kept_keys.append("server.admin_token")  # the key refers to the same file, which has another token
        served = replace(settings, redis=config.settings.redis)  # the embedded server's URL is not in the file
        secrets = replace(loaded.secrets, admin_token=token)
        new = RunningConfig(served, secrets, config.journal, config.generation + 1)
        faults = await workers.prepare(new) or await workers.apply(new)
        if not faults:
            self._settings = settings
            for warning in loaded.warnings:
                _log.warning("config_warning", warning=warning)
            for key in kept_keys:
                _log.warning("reload_needs_restart", key=key)
        return faults


def without_restart_keys(running: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """Return `new` with the values of `running` for keys that only a restart changes, and the names of those that differ."""
    keys = dict(RESTART_ONLY)
    if (running.server.tls_cert is None) != (new.server.tls_cert is None):
        keys["server"] += ("tls_cert", "tls_key")  # a certificate may change, but TLS can't be turned on or off
    tables, differing = {}, []
    for table, names in keys.items():
        kept = {name: getattr(getattr(running, table), name) for name in names}
        differing += [f"{table}.{name}" for name in names if getattr(getattr(new, table), name) != kept[name]]
        tables[table] = replace(getattr(new, table), **kept)
    return replace(new, **tables), differing
