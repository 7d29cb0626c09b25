"""A store that is one server, or a part of one that is many: a link, and a new one whenever it is lost.

While there is no link, commands fail at once: a request should be told `ledger_unavailable` now and not after a time-out. New
links are dialled with a jittered, bounded backoff that starts afresh only after a link that held.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from meshproxy.ledger.address import Endpoint, Login
from meshproxy.ledger.link import Link, failed
from meshproxy.ledger.store import Argument, OnChange, Store, StoreError, Unavailable

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
    endpoint: Endpoint, login: Login, tls: Any, make: Callable[[], Link], *, timeout_s: float, master: bool = False
) -> Link:
    """Connect, log in and check that the server answers; Unavailable otherwise. `master`: a replica won't do."""
    link = make()
    try:
        async with asyncio.timeout(timeout_s):
            await _connect(endpoint, tls, link)
            await _greet(link, login, master=master)
    except TimeoutError:
        reason = f"{endpoint} did not answer within {timeout_s:g} s"
    except (OSError, UnicodeError, StoreError) as error:
        reason = f"{endpoint}: {error}"
    except Unavailable as error:
        reason = f"{endpoint}: {error.reason}"
    except BaseException:
        link.lose("connection", "dialling was given up")
        raise
    else:
        return link
    link.lose("connection", reason)
    raise Unavailable("connection", reason)


async def _connect(endpoint: Endpoint, tls: Any, link: Link) -> None:
    loop = asyncio.get_running_loop()
    if endpoint.path:
        await loop.create_unix_connection(lambda: link, endpoint.path)
    else:
        await loop.create_connection(lambda: link, endpoint.host, endpoint.port, ssl=tls)


async def _greet(link: Link, login: Login, *, master: bool) -> None:
    if login.password is not None:
        user = () if login.username is None else (login.username,)
        try:
            await link.send("AUTH", ("AUTH", *user, login.password))
        except StoreError as error:  # old servers quote what they don't understand
            raise StoreError(error.kind, f"the login was refused ({error.kind})") from None
    named = link.send("CLIENT", ("CLIENT", "SETNAME", CLIENT_NAME))
    selected = link.send("SELECT", ("SELECT", login.db)) if login.db else None
    role = link.send("ROLE", ("ROLE",)) if master else None
    alive = link.send("PING", ("PING",))
    await asyncio.wait([named])  # a name is a courtesy: some users may not set one
    if selected is not None:
        await selected
    if role is not None and (await role)[0] != b"master":
        raise Unavailable("readonly", "the server is a replica")
    await alive
