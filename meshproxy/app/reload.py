"""SIGHUP, as a transaction: the file is read and checked whole, and only then swapped in; what only a restart can change stays
as it is, and is named.
"""

from collections.abc import Callable

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from meshproxy.app.load import Loaded
from meshproxy.app.notify import READY, notify, reloading
from meshproxy.config import Secrets, Settings, Unfit

Read = Callable[[], Loaded]

# What a restart changes, by table: sockets that are bound, connections that are made, histograms that are laid out.
FIXED: dict[str, tuple[str, ...]] = {
    "server": ("listen", "admin_listen", "workers", "admin_token", "admin_hosts", "proxy_protocol", "max_body_bytes"),
    "redis": tuple(field.name for field in msgspec.structs.fields(Settings().redis)),
    "log": ("format",),
    "metrics": ("buckets",),
    "tracing": ("endpoint", "sample"),
}

_log = structlog.get_logger("meshproxy.app")


class Standing(Struct, tag="standing", frozen=True):
    """What holds: a configuration, and the path where settlements wait for Redis (None: in memory). `generation` counts the
    configurations that were swapped in; `reload_failed`: a newer one was unfit.
    """

    settings: Settings
    secrets: Secrets
    journal: str | None = None
    generation: int = 1
    reload_failed: bool = False


class Reloader:
    """Knows what the file said last, and reads what shall hold next."""

    def __init__(self, settings: Settings, read: Read) -> None:
        self._settings = settings
        self._read = read

    def next(self, standing: Standing) -> Standing:
        """What holds after `standing`: the next generation; or the same, with all that is wrong in the log."""
        notify(reloading())
        try:
            loaded = self._read()
        except Unfit as unfit:
            _log.error("reload_failed", faults=unfit.faults)
            return replace(standing, reload_failed=True)
        finally:
            notify(READY)
        for warning in loaded.warnings:
            _log.warning("config_warning", warning=warning)
        self._settings, held_back = hold_back(self._settings, loaded.settings)
        for key in held_back:
            _log.warning("reload_needs_restart", key=key)
        settings = replace(self._settings, redis=standing.settings.redis)  # the embedded server has a URL of its own
        return Standing(settings, loaded.secrets, standing.journal, standing.generation + 1)


def hold_back(running: Settings, wanted: Settings) -> tuple[Settings, list[str]]:
    """`wanted`, with what only a restart changes as it is in `running`; and the keys that differ there."""
    fixed = dict(FIXED)
    if (running.server.tls_cert is None) != (wanted.server.tls_cert is None):
        fixed["server"] += ("tls_cert", "tls_key")  # a certificate may move, but TLS isn't turned on or off
    tables, held_back = {}, []
    for table, names in fixed.items():
        kept = {name: getattr(getattr(running, table), name) for name in names}
        held_back += [f"{table}.{name}" for name in names if getattr(getattr(wanted, table), name) != kept[name]]
        tables[table] = replace(getattr(wanted, table), **kept)
    return replace(wanted, **tables), held_back
