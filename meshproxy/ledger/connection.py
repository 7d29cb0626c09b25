"""How a URL becomes a `Store`: one server, the master that Sentinel names, or a cluster.

All of them speak over links of our own, which cost a fifth of redis-py's pipelines and never repeat a command by themselves;
redis-py is for whoever has a client of its already (`RedisPyStore`).
"""

import ssl
from collections.abc import Awaitable
from functools import partial
from typing import Any

from meshproxy import config
from meshproxy.ledger.address import Address, Endpoint, Login, parse_url
from meshproxy.ledger.channel import Channel, Spawn, dial, spawn_plainly
from meshproxy.ledger.cluster import ClusterStore
from meshproxy.ledger.link import Link
from meshproxy.ledger.redis_py import RedisPyStore
from meshproxy.ledger.store import Argument, OnOp, ScriptMissing, Store, StoreError, Unavailable

__all__ = ["RedisPyStore", "ScriptMissing", "ServerStore", "Store", "StoreError", "Unavailable", "connect"]


async def connect(
    settings: config.Redis, *, wait: bool = True, on_op: OnOp | None = None, spawn: Spawn = spawn_plainly
) -> Store:
    """The store behind `settings.url`, of any kind but `embedded` (start that first, and take its URL).

    `wait`: until it answers, raising Unavailable if it doesn't within `timeout_s`; else it is dialled in the background.
    Raises Unfit for a URL or TLS files that can't be used.
    """
    address = parse_url(settings.url)
    try:
        tls = address.tls.context() if address.tls is not None else None
    except OSError as error:
        raise config.Unfit([f"redis.url: the TLS files can't be used ({error.strerror or error})"]) from error
    if address.kind == "cluster":
        store: ServerStore | ClusterStore = ClusterStore(address, tls, settings.timeout_s, on_op=on_op, spawn=spawn)
    else:
        store = ServerStore(address, tls, settings.timeout_s, on_op=on_op, spawn=spawn)
    await store.open(wait=wait)
    return store


class ServerStore(Store):
    """One server, named by its address or by Sentinel."""

    def __init__(
        self,
        address: Address,
        tls: ssl.SSLContext | None,
        timeout_s: float,
        *,
        on_op: OnOp | None = None,
        spawn: Spawn = spawn_plainly,
    ) -> None:
        self.on_op = on_op
        self._address = address
        self._tls = tls
        self._timeout_s = timeout_s
        self._channel = Channel(self._dial, spawn=spawn)

    @property
    def connected(self) -> bool:
        """Whether there is a link."""
        return self._channel.connected

    @property
    def trouble(self) -> str | None:
        """What went wrong last, for the log and the status page; None while connected."""
        return self._channel.trouble

    def send(self, op: str, command: tuple[Argument, ...]) -> Awaitable[Any]:
        """Queue one command on the link; fails at once without one."""
        return self._channel.send(op, command)

    async def open(self, *, wait: bool) -> None:
        """Dial now, or in the background."""
        if wait:
            await self._channel.open()
        else:
            self._channel.keep_dialling()

    async def close(self) -> None:
        """Hang up; what is pending fails."""
        await self._channel.close()

    async def _dial(self) -> Link:
        sentinel = self._address.kind == "sentinel"
        endpoint = self._address.endpoints[0]
        if sentinel:
            endpoint = await discover(self._address, self._tls, self._timeout_s)
        make = partial(Link, self._timeout_s, self.on_op)
        return await dial(endpoint, self._address.login, self._tls, make, timeout_s=self._timeout_s, master=sentinel)


async def discover(address: Address, tls: ssl.SSLContext | None, timeout_s: float) -> Endpoint:
    """The master that the first Sentinel to know one names; Unavailable if none does. Sentinels are asked without a login."""
    reasons = []
    for sentinel in address.endpoints:
        try:
            link = await dial(sentinel, Login(), tls, partial(Link, timeout_s), timeout_s=timeout_s)
        except Unavailable as error:
            reasons.append(error.reason)
            continue
        try:
            reply = await link.send("SENTINEL", ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service))
        except (Unavailable, StoreError) as error:
            reasons.append(f"{sentinel}: {error}")
            continue
        finally:
            link.lose("closed", "the Sentinel was asked")
        if reply is not None:
            return Endpoint(reply[0].decode(), int(reply[1]))
        reasons.append(f"{sentinel} doesn't know it")
    raise Unavailable("connection", f"no Sentinel names a master {address.service} ({'; '.join(reasons)})")
