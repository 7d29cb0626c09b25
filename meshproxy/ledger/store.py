"""Lua scripts: text that lies beside this module as `NAME.lua`, called by the SHA-1 that EVALSHA wants.

A line `-- include: NAME` is replaced by the text of `NAME.lua`, so that scripts can share functions although Redis knows
no modules. Nothing is read at import: whoever composes the ledger loads its scripts once.
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
    return resources.files(__package__).joinpath("scripts", f"{name}.lua").read_text(encoding="utf-8")


Argument = str | bytes | int
OnChange = Callable[[str, bool, str], None]  # a server's name, whether there is a connection to it now, and if not why
OnOp = Callable[[str, float, str | None], None]  # what was asked, seconds, kind of error (None: it went well)

# Replies that time or a failover mends: https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors
PASSING = frozenset({
    "ASK",  # with MOVED: a slot went to a node that isn't known yet; nothing has run
    "BUSY",  # a script runs too long
    "CLUSTERDOWN",
    "LOADING",  # the data set is read from disk
    "MASTERDOWN",  # a replica without its master
    "MISCONF",  # snapshots fail, so writes are refused
    "MOVED",
    "NOREPLICAS",  # fewer than min-replicas-to-write
    "OOM",  # maxmemory is reached
    "READONLY",  # this is a replica now
    "TRYAGAIN",  # a slot is on the move
})  # fmt: skip


class Unavailable(GatewayError):
    """The store can't be used now.

    `kind` is one of a closed set, for metrics; `reason`, which is also its text, is for logs and bears no secret.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(Source.GATEWAY, ledger_unavailable())
        self.args = (reason,)
        self.kind = kind
        self.reason = reason


class StoreError(Exception):
    """The store understood, and refused: a bug here or a wrong set-up there. `kind` is its first word."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ScriptMissing(StoreError):
    """NOSCRIPT: the server lost its scripts, or never had this one."""


class Store(ABC):
    """Redis, whatever stands behind its URL."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether a command sent now would reach a server."""

    @abstractmethod
    def send(self, op: str, command: tuple[Argument, ...]) -> "asyncio.Future[Any]":
        """Queue one command; `op` is its name for metrics. It is sent even if nobody awaits the reply."""

    @abstractmethod
    async def close(self) -> None:
        """Fail what is pending and let go of every socket."""

    def execute(self, *args: Argument) -> "asyncio.Future[Any]":
        """Queue one command and await its reply (bytes, int, list or None). Raises Unavailable and StoreError.

        Commands issued in one turn of the event loop share a write. Await them after issuing them all, or gather them.
        """
        return self.send(str(args[0]), args)

    def call(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> "asyncio.Future[Any]":
        """Call a script by its SHA-1; ScriptMissing where the server doesn't know it yet."""
        return self.send(script.name, ("EVALSHA", script.sha, len(keys), *keys, *args))

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run a script by its SHA-1, and by its text where the server doesn't know it yet."""
        try:
            return await self.call(script, keys, args)
        except ScriptMissing:
            return await self.send(script.name, ("EVAL", script.text, len(keys), *keys, *args))


def refusal(message: str) -> Unavailable | StoreError:
    """The exception for an error reply, which begins with its kind in capitals."""
    kind = message.split(" ", 1)[0]
    if kind in PASSING:
        return Unavailable(kind.lower(), message)
    if kind == "NOSCRIPT":
        return ScriptMissing(kind, message)
    return StoreError(kind, message)


def kind_of(error: Unavailable | StoreError) -> str:
    """A word of a closed set for metrics."""
    if isinstance(error, Unavailable):
        return error.kind
    return "noscript" if isinstance(error, ScriptMissing) else "error"
