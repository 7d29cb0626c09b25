"""Settings and secrets, from a file and the environment."""

import hashlib
import os
from pathlib import Path

from meshproxy.config import Secrets, Settings, Unfit, parse, resolve_secrets
from meshproxy.server.tls import server_context
from meshproxy.telemetry.traces import require_extra


def read(path: str) -> Settings:
    """The settings of a TOML file; Unfit with every fault, also if it can't be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Unfit([f"{path}: can't be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise Unfit([f"{path}: not UTF-8"]) from error
    return parse(text)


def load(path: str) -> tuple[Settings, Secrets]:
    """The settings of a TOML file and its secrets; Unfit for an unreadable certificate and an extra that isn't installed too."""
    settings = read(path)
    server_context(settings.server)
    require_extra(settings.tracing)
    return settings, secrets_of(settings)


def journal_path(settings: Settings) -> str:
    """Where settlements wait for Redis: redis.journal, else a place of this Redis's own under the state directory that systemd
    (STATE_DIRECTORY) or the XDG base directories give.
    """
    if settings.redis.journal is not None:
        return settings.redis.journal
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    root = Path(state or Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "meshproxy")
    store = hashlib.sha256(settings.redis.url.encode()).hexdigest()[:16]  # what one Redis is owed is nothing to another
    return str(root / store / "journal")


def secrets_of(settings: Settings) -> Secrets:
    """The secrets that the settings name; Unfit if one can't be had."""
    return resolve_secrets(settings, os.environ, _text)


def _text(path: str) -> str:
    """A secret's file. Bytes that are no text become characters that `resolve_secrets` refuses."""
    return Path(path).read_text(encoding="utf-8", errors="replace")
