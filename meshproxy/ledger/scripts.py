"""Lua scripts: text that lies beside this module as `NAME.lua`, called by the SHA-1 that EVALSHA wants.

A line `-- include: NAME` is replaced by the text of `NAME.lua`, so that scripts can share functions although Redis knows
no modules. Nothing is read at import: whoever composes the ledger loads its scripts once.
"""

import hashlib
import re
from collections.abc import Callable
from importlib import resources

from msgspec import Struct

MAX_INCLUDE_DEPTH = 8

_INCLUDE = re.compile(r"^-- include: ([a-z0-9_]+)[ \t]*$", re.MULTILINE)


class Script(Struct, frozen=True):
    """One script, whole: its name for metrics and messages, its text, and the SHA-1 (hex) that Redis knows it by."""

    name: str
    text: str
    sha: str

    @classmethod
    def of(cls, name: str, text: str) -> "Script":
        """The script of a text that is at hand."""
        return cls(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    @classmethod
    def load(cls, name: str) -> "Script":
        """The script in `NAME.lua` with its includes; FileNotFoundError if one is missing, ValueError if they nest too deep."""
        return cls.of(name, expand(name, _read))


def expand(name: str, read: Callable[[str], str], depth: int = 0) -> str:
    """The text of a script with each include replaced by its own text, which may include more."""
    if depth > MAX_INCLUDE_DEPTH:
        raise ValueError(f"{name}.lua: includes nest deeper than {MAX_INCLUDE_DEPTH}, or in a circle")
    return _INCLUDE.sub(lambda line: expand(line[1], read, depth + 1).rstrip("\n"), read(name))


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
