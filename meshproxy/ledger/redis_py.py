"""A `Store` over a client of redis-py's that somebody already has, fakeredis's among them. Each command is a task and takes a
connection of the client's pool, so commands issued together may run in any order.
"""

import asyncio
import time
from typing import Any

from redis import asyncio as redis_py
from redis import exceptions

from meshproxy.ledger.store import Argument, OnOp, ScriptMissing, Store, StoreError, Unavailable, kind_of, refusal


class RedisPyStore(Store):
    """Wraps a client that doesn't decode responses."""

    def __init__(self, client: "redis_py.Redis", *, on_op: OnOp | None = None) -> None:
        self.on_op = on_op
        self._client = client
        self._connected = True

    @property
    def connected(self) -> bool:
        """Whether the last command reached a server."""
        return self._connected

    def send(self, op: str, command: tuple[Argument, ...]) -> "asyncio.Future[Any]":
        """Start a task that runs the command."""
        return asyncio.ensure_future(self._call(op, command))

    async def close(self) -> None:
        """Close the client."""
        await self._client.aclose()

    async def _call(self, op: str, command: tuple[Argument, ...]) -> Any:
        asked_at = time.monotonic()
        kind: str | None = None
        try:
            reply = await self._raw(command)
        except (exceptions.RedisError, OSError) as error:
            translated = translate(error)
            kind = kind_of(translated)
            self._connected = kind not in {"connection", "timeout"}
            raise translated from error
        else:
            self._connected = True
            return reply
        finally:
            if self.on_op is not None:
                self.on_op(op, time.monotonic() - asked_at, kind)

    async def _raw(self, command: tuple[Argument, ...]) -> Any:
        """The reply as it came, past redis-py's callbacks, which give each command's another shape."""
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_command(*command)
            return resp2(await connection.read_response())
        except asyncio.CancelledError:
            await connection.disconnect()
            raise
        finally:
            await pool.release(connection)


def resp2(reply: Any) -> Any:
    """A reply of RESP3 in the shapes of RESP2: maps and sets are flat lists."""
    if isinstance(reply, dict):
        return [resp2(part) for pair in reply.items() for part in pair]
    if isinstance(reply, list | set | tuple):
        return [resp2(part) for part in reply]
    return reply


def translate(error: Exception) -> Unavailable | StoreError:
    """redis-py's exceptions in our two words. It takes the kind off some messages and makes a class of it."""
    known = _KINDS.get(type(error))
    if known == "NOSCRIPT":
        return ScriptMissing(known, str(error))
    if known is not None:
        return Unavailable(known.lower(), str(error))
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return Unavailable("timeout", str(error))
    if isinstance(error, exceptions.ConnectionError | OSError):
        return Unavailable("connection", str(error))
    message = str(error)
    return refusal(message if message.split(" ", 1)[0].isupper() else f"ERR {message}")


_KINDS: dict[type[Exception], str] = {
    exceptions.NoScriptError: "NOSCRIPT",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.TryAgainError: "TRYAGAIN",
}
