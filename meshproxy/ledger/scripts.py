"""Lua scripts: text that lies beside this module as `NAME.lua`, called by the SHA-1 that EVALSHA wants.

A line `-- include: NAME` is replaced by the text of `NAME.lua`, so that scripts can share functions although Redis knows
no modules. Nothing is read at import: whoever composes the ledger loads its scripts once.
"""

import hashlib
import re
from collections.abc import Callable
from importlib import resources

from msgspec import Struct

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
        """The script in `NAME.lua` with its includes; FileNotFoundError if one is missing."""
        return cls.of(name, expand(_read(name), _read))


def expand(text: str, read: Callable[[str], str]) -> str:
    """A script's text with each include replaced by what `read` says that it is. What is included includes nothing."""
    return _INCLUDE.sub(lambda line: read(line[1]).rstrip("\n"), text)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
