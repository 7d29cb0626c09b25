"""The interface to Redis that the ledger is written against: `Store`, its Lua scripts and its errors.

Scripts lie as `NAME.lua` in `scripts/` and are called by the SHA-1 that EVALSHA takes. A line `-- include: NAME` is
replaced by the text of `NAME.lua`, because Redis scripts can't import modules. No file is read at import: the objects
of the ledger load their scripts when they are made.
"""

import asyncio
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from msgspec import Struct

from meshproxy.errors import GatewayError, Source, ledger_unavailable

_INCLUDE = re.compile(r"^-- include: ([a-z0-9_]+)[ \t]*$", re.MULTILINE)


class Script(Struct, frozen=True):
    """One script with its includes: the name for metrics and messages, the text, and its SHA-1 (hex)."""

    name: str
    text: str
    sha: str

    @classmethod
    def of(cls, name: str, text: str) -> "Script":
        """Make the script of a given text."""
        return cls(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    @classmethod
    def load(cls, name: str) -> "Script":
        """Load the script in `NAME.lua` with its includes. Raises FileNotFoundError if a file is missing."""
        return cls.of(name, expand(_read(name), _read))


def expand(text: str, read: Callable[[str], str]) -> str:
    """Replace each include in a script's text by `read(NAME)`. Included files can't include others."""
    return _INCLUDE.sub(lambda line: read(line[1]).rstrip("\n"), text)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath("scripts", f"{name}.lua").read_text(encoding="utf-8")


Argument = str | bytes | int
OnChange = Callable[[str, bool, str], None]  # server name, whether it is connected now, reason if not
OnOp = Callable[[str, float, str | None], None]  # operation, seconds, kind of error (None: success)

# Error replies that end by themselves, after some time or a failover:
# https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors
TEMPORARY_ERRORS = frozenset({
    "ASK",  # like MOVED: the slot is on a node that isn't known yet; nothing was executed
    "BUSY",  # a script runs too long
    "CLUSTERDOWN",
    "LOADING",  # the data set is read from disk
    "MASTERDOWN",  # a replica without its master
    "MISCONF",  # snapshots fail, so writes are refused
    "MOVED",
    "NOREPLICAS",  # fewer than min-replicas-to-write
    "OOM",  # maxmemory is reached
    "READONLY",  # this is a replica now
    "TRYAGAIN",  # a slot is being migrated
})  # fmt: skip


class Unavailable(GatewayError):
    """The store can't be used now.

    `kind` is from a closed set, for metrics. `reason` is for logs and contains no secret; it is also the exception's
    text.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(Source.GATEWAY, ledger_unavailable())
        self.args = (reason,)
        self.kind = kind
        self.reason = reason


class StoreError(Exception):
    """An error reply that waiting doesn't resolve: a bug here or a wrong set-up there. `kind` is its first word."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ScriptMissing(StoreError):
    """NOSCRIPT: the server doesn't have the script."""


class Store(ABC):
    """Redis behind any kind of URL: a server, Sentinel or Cluster."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether a command sent now would reach a server."""

    @abstractmethod
    def send(self, op: str, command: tuple[Argument, ...]) -> "asyncio.Future[Any]":
        """Queue one command; return the future of its reply. It is sent even if not awaited. `op` is for metrics."""

    @abstractmethod
    async def close(self) -> None:
        """Fail all pending commands and close every socket."""

    def execute(self, *args: Argument) -> "asyncio.Future[Any]":
        """Queue one command and return the future of its reply (bytes, int, list or None). It raises Unavailable and
        StoreError.

        Commands issued in one turn of the event loop share one write: issue them all before awaiting them, or gather
        them.
        """
        return self.send(str(args[0]), args)

    def call(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> "asyncio.Future[Any]":
        """Call a script by its SHA-1. The future raises ScriptMissing if the server doesn't have the script."""
        return self.send(script.name, ("EVALSHA", script.sha, len(keys), *keys, *args))

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run a script by its SHA-1, or by its text if the server lacks it. Raises Unavailable and StoreError."""
        try:
            return await self.call(script, keys, args)
        except ScriptMissing:
            return await self.send(script.name, ("EVAL", script.text, len(keys), *keys, *args))


def error_of_reply(message: str) -> Unavailable | StoreError:
    """Make the exception for an error reply. Its first word, in capitals, is the kind."""
    kind = message.split(" ", 1)[0]
    if kind in TEMPORARY_ERRORS:
        return Unavailable(kind.lower(), message)
    if kind == "NOSCRIPT":
        return ScriptMissing(kind, message)
    return StoreError(kind, message)


def kind_of(error: Unavailable | StoreError) -> str:
    """Return an error's label for metrics, from a closed set."""
    if isinstance(error, Unavailable):
        return error.kind
    return "noscript" if isinstance(error, ScriptMissing) else "error"
