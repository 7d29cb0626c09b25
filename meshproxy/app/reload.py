"""SIGHUP, as a transaction: the file is read and checked whole, and only then swapped in; what only a restart can change stays
as it is, and is named.
"""

from collections.abc import Callable, Iterator

import msgspec
import structlog
from msgspec.structs import replace

from meshproxy.app.notify import READY, notify, reloading
from meshproxy.config import Settings, Unfit

Read = Callable[[], tuple[Settings, dict[str, str]]]

# What a restart changes, by table: sockets that are bound, connections that are made, histograms that are laid out.
FIXED: dict[str, tuple[str, ...]] = {
    "server": ("listen", "admin_listen", "workers", "admin_token", "proxy_protocol", "max_body_bytes"),
    "redis": tuple(field.name for field in msgspec.structs.fields(Settings().redis)),
    "log": ("format",),
    "metrics": ("buckets",),
    "tracing": ("endpoint", "sample"),
}

_log = structlog.get_logger("meshproxy.app")


class Reloader:
    """Knows what runs, and reads what shall run next. `settings`: as the file said at the start."""

    def __init__(self, settings: Settings, read: Read) -> None:
        self._running = settings
        self._read = read

    def next(self) -> tuple[Settings, dict[str, str]] | None:
        """The configuration to swap in; None, with all that is wrong in the log, if the file is unfit."""
        notify(reloading())
        try:
            wanted, secrets = self._read()
        except Unfit as unfit:
            _log.error("reload_failed", faults=unfit.faults)
            return None
        finally:
            notify(READY)
        for key in needs_restart(self._running, wanted):
            _log.warning("reload_needs_restart", key=key)
        self._running = hold_back(self._running, wanted)
        return self._running, secrets


def needs_restart(running: Settings, wanted: Settings) -> Iterator[str]:
    """The keys that differ, and that a reload leaves as they are."""
    for table, names in FIXED.items():
        before, after = getattr(running, table), getattr(wanted, table)
        yield from (f"{table}.{name}" for name in names if getattr(before, name) != getattr(after, name))
    if (running.server.tls_cert is None) != (wanted.server.tls_cert is None):
        yield "server.tls_cert"


def hold_back(running: Settings, wanted: Settings) -> Settings:
    """`wanted`, with what only a restart changes as it is in `running`."""
    tables = {
        table: replace(getattr(wanted, table), **{name: getattr(getattr(running, table), name) for name in names})
        for table, names in FIXED.items()
    }
    if (running.server.tls_cert is None) != (wanted.server.tls_cert is None):
        kept = running.server
        tables["server"] = replace(tables["server"], tls_cert=kept.tls_cert, tls_key=kept.tls_key)
    return replace(wanted, **tables)
