"""What the rest of the ledger knows of Redis: commands go in, replies come out, and two kinds of trouble.

`Unavailable` is a fault of the gateway's: the store is lost, slow, full, or in the middle of a failover. Everything foreign is
translated to it once, here. `StoreError` is a bug or a wrong set-up (WRONGTYPE, NOPERM, a script's own error).

No command is ever sent twice by a store: one whose reply was lost may have run, and only the ledger knows what may be repeated.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from meshproxy.errors import Fault, Source, ledger_unavailable
from meshproxy.ledger.scripts import Script

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


class Unavailable(Fault):
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
