"""Settings and secrets, from a file and the environment."""

import os
from collections.abc import Mapping
from pathlib import Path

from meshproxy.config import Settings, Unfit, parse, resolve_secrets


def load(path: str | os.PathLike[str], env: Mapping[str, str] = os.environ) -> tuple[Settings, dict[str, str]]:
    """The settings of a TOML file and the API key of each upstream; Unfit with every fault, an unreadable file included."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Unfit([f"{path}: can't be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise Unfit([f"{path}: not UTF-8"]) from error
    settings = parse(text)
    return settings, secrets_of(settings, env)


def secrets_of(settings: Settings, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The API key of each upstream that names one; Unfit if one can't be had."""
    return resolve_secrets(settings, env, lambda path: Path(path).read_text(encoding="utf-8", errors="replace"))
