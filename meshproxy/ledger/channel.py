"""A store that is one server, or a part of one that is many: a link, and a new one whenever it is lost.

While there is no link, commands fail at once: a request should be told `ledger_unavailable` now and not after a time-out. New
links are dialled with a jittered, bounded backoff that starts afresh only after a link that held.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import redis
from redis.asyncio.connection import AbstractConnection

from meshproxy.ledger.address import Endpoint
from meshproxy.ledger.link import Link, failed
from meshproxy.ledger.store import Argument, OnChange, Store, Unavailable

BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 2.0
STEADY_S = 5.0  # a link that held this long was a good one
CLIENT_NAME = "meshproxy"

Keep = Callable[[str, Callable[[], Coroutine[Any, Any, None]]], "asyncio.Task[None]"]  # run it until it returns
Dial = Callable[[], Awaitable[Link]]


def keep_plainly(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
    """Run it once, for a program that ends soon; the caller keeps the reference."""
    return asyncio.create_task(work(), name=name)


class Channel(Store):
    """`dial` finds the server and returns a link that is ready for commands, or raises Unavailable. `on_change` is called with
    `name` for every link that is made or lost.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        keep: Keep = keep_plainly,
        on_lost: Callable[[], None] | None = None,
        name: str = "",
        on_change: OnChange | None = None,
    ) -> None:
        self.trouble: str | None = None  # what went wrong last; None: connected
        self._dial = dial
        self._keep = keep
        self._on_lost = on_lost
        self._name = name
        self._on_change = on_change
        self._link: Link | None = None
        self._linked_at = 0.0
        self._failures = 0
        self._dialling: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether there is a link."""
        return self._link is not None

    def send(self, op: str, command: tuple[Argument, ...]) -> "asyncio.Future[Any]":
        """Queue one command, or fail at once."""
        link = self._link
        if link is None:
            return failed(Unavailable("connection", self.trouble or "not connected"))
        return link.send(op, command)

    @property
    def link(self) -> Link | None:
        """The link of this moment, if there is one."""
        return self._link

    async def open(self) -> None:
        """Dial once; Unavailable if that fails."""
        self._adopt(await self._dial())

    def keep_dialling(self) -> None:
        """Dial in the background until there is a link."""
        if self._dialling is None and not self._closed:
            self._dialling = self._keep("ledger-dial", self._dial_until_linked)

    def retire(self) -> None:
        """Hang up once everything asked is answered, and dial no more."""
        self._closed = True
        if self._dialling is not None:
            self._dialling.cancel()
        if self._link is not None:
            self._link.finish()

    async def close(self) -> None:
        """Hang up for good."""
        self._closed = True
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.wait([self._dialling])
        if self._link is not None:
            self._link.lose("closed", "the store was closed")

    def _adopt(self, link: Link) -> None:
        self._link, self._linked_at, self.trouble = link, asyncio.get_running_loop().time(), None
        link.on_lost = self._lost
        self._tell(is_connected=True)
        if link.lost is not None:
            self._lost(link)

    def _lost(self, link: Link) -> None:
        self._link = None
        self.trouble = link.lost.reason if link.lost is not None else None
        if asyncio.get_running_loop().time() - self._linked_at >= STEADY_S:
            self._failures = 0
        self.keep_dialling()
        if self._closed:
            return
        self._tell(is_connected=False)
        if self._on_lost is not None:
            self._on_lost()

    def _tell(self, *, is_connected: bool) -> None:
        if self._on_change is not None:
            self._on_change(self._name, is_connected, self.trouble or "")

    async def _dial_until_linked(self) -> None:
        while self._link is None:
            await asyncio.sleep(backoff_s(self._failures))
            self._failures += 1
            try:
                link = await self._dial()
            except Unavailable as error:
                self.trouble = error.reason
            else:
                self._dialling = None
                self._adopt(link)
                return


def backoff_s(failures: int) -> float:
    """How long to wait before the next attempt: doubling, bounded, and spread so that workers don't come all at once."""
    bound = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** min(failures, 16))
    return bound * random.uniform(0.5, 1.0)  # noqa: S311 - jitter is no secret


async def dial(
    server: AbstractConnection, endpoint: Endpoint, make: Callable[[], Link], *, timeout_s: float, master: bool = False
) -> Link:
    """Have redis-py connect and log in, check that the server answers, and return a link that has taken the socket over.

    `master`: a replica won't do. Raises Unavailable.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await server.connect()  # type: ignore[no-untyped-call]
            with suppress(redis.ResponseError):  # a name is a courtesy: some users may not set one
                await _ask(server, "CLIENT", "SETNAME", CLIENT_NAME)
            await _ask(server, "PING")
            if master and (await _ask(server, "ROLE"))[0] != b"master":
                raise redis.ConnectionError(f"{endpoint} is a replica")
        link = make()
        link.take_over(taken_from(server))
    except (TimeoutError, redis.TimeoutError):
        reason = f"{endpoint} did not answer within {timeout_s:g} s"
    except redis.RedisError as error:
        reason = _plain(error, server)
    else:
        return link
    finally:
        await server.disconnect(nowait=True)  # closes a socket that no link has taken over
    raise Unavailable("connection", reason if str(endpoint) in reason else f"{endpoint}: {reason}")


async def _ask(server: AbstractConnection, *command: str) -> Any:
    await server.send_command(*command)
    return await server.read_response()


def taken_from(server: AbstractConnection) -> asyncio.StreamWriter:
    """Take the socket of redis-py's connection, which from then on has none. `_writer` is the one private name in use."""
    writer, server._writer = server._writer, None  # noqa: SLF001 - redis-py has no public way to hand a socket over
    if writer is None:
        raise redis.ConnectionError("redis-py has no open socket")
    return writer


def _plain(error: redis.RedisError, server: AbstractConnection) -> str:
    """An error's text, without what an old server quotes of a login that it doesn't understand."""
    refusal = error if isinstance(error, redis.ResponseError) else error.__cause__
    is_quoting = isinstance(refusal, redis.ResponseError) and server.password is not None
    return "the login or the database was refused" if is_quoting else str(error)
