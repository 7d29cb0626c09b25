"""How faults speak of keys: where one stands, and which right one is nearest to a wrong one."""

import difflib
import json
import re
from collections.abc import Iterable

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def under(path: str, key: str) -> str:
    """The path of a key in the table at `path`, quoted where TOML would quote it."""
    name = key if _BARE_KEY.fullmatch(key) else json.dumps(key)
    return f"{path}.{name}" if path else name


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean NAME?`, or nothing if no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""
