"""SIGHUP, as a transaction: the file is read and checked whole, every worker builds what it needs, and only then it is swapped
in; what only a restart can change stays as it is, and is named.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from meshproxy.app.load import Loaded
from meshproxy.app.notify import READY, notify, reloading, status
from meshproxy.config import Secrets, Settings, Unfit

Read = Callable[[], Loaded]

# What a restart changes, by table: sockets that are bound, connections that are made, histograms that are laid out.
FIXED: dict[str, tuple[str, ...]] = {
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


class Crew(Protocol):
    """Who serves: one worker or several."""

    standing: Standing

    async def prepare(self, standing: Standing) -> list[str]:
        """Build what this needs in every worker, and change nothing; what can't be built."""

    async def apply(self, standing: Standing) -> list[str]:
        """Let this hold from now on, in every worker; what kept one from it."""


class Reloader:
    """Reads the configuration again, and has a crew serve by it: when every worker could build it, or not at all."""

    def __init__(self, settings: Settings, read: Read) -> None:
        self._settings = settings  # what the file said last
        self._read = read

    async def reload(self, crew: Crew) -> None:
        """Swap in what the file says now. A bad file changes nothing, and is in the log with all that is wrong."""
        notify(reloading())
        outcome = "reload failed, see the log"
        try:
            faults = await self._swap(crew)
            if faults:
                _log.error("reload_failed", faults=faults)
                outcome = f"reload failed, generation {crew.standing.generation} goes on: {'; '.join(faults)}"
                await crew.apply(replace(crew.standing, reload_failed=True))
            else:
                _log.info("reloaded", generation=crew.standing.generation)
                outcome = f"reloaded, generation {crew.standing.generation}"
        finally:
            notify(READY, status(outcome))

    async def _swap(self, crew: Crew) -> list[str]:
        """What keeps the file from being served by; nothing if it is now."""
        try:
            loaded = await asyncio.to_thread(self._read)  # it reads files, and a TLS context alone takes 16 ms
        except Unfit as unfit:
            return unfit.faults
        settings, held_back = hold_back(self._settings, loaded.settings)
        standing = crew.standing
        served = replace(settings, redis=standing.settings.redis)  # the embedded server has a URL of its own
        wanted = Standing(served, loaded.secrets, standing.journal, standing.generation + 1)
        faults = await crew.prepare(wanted) or await crew.apply(wanted)
        if not faults:
            self._settings = settings
            for warning in loaded.warnings:
                _log.warning("config_warning", warning=warning)
            for key in held_back:
                _log.warning("reload_needs_restart", key=key)
        return faults


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
