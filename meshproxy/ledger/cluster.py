"""Redis Cluster: a channel to every master, and the map from slots to channels.

A command goes to the master of its first key's slot; the keys of a script share a hash tag, so one key tells. MOVED and ASK
send it on with the same future: the server that answers so has run nothing (Redis cluster specification, "Redirection and
resharding"). A MOVED or a lost link also has the map fetched anew, until every slot has a master with a link.
"""

import asyncio
import random
import ssl
from collections.abc import Awaitable
from functools import partial
from typing import Any

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from meshproxy.ledger.address import Address, Endpoint
from meshproxy.ledger.channel import Channel, Spawn, backoff_s, dial, spawn_plainly
from meshproxy.ledger.link import Link, Pending, failed
from meshproxy.ledger.store import Argument, OnOp, Store, StoreError, Unavailable

MAX_NODES = 1000  # the specification's own bound on a cluster

_KEY_AT = {"EVAL": 3, "EVALSHA": 3, "XGROUP": 2, "XINFO": 2, "OBJECT": 2, "MEMORY": 2}
_KEYLESS = {"PING", "TIME", "INFO", "SCRIPT", "CLUSTER", "CLIENT", "CONFIG", "ECHO", "FLUSHALL"}


class ClusterStore(Store):
    """A cluster, found through any of the endpoints of `address`."""

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
        self.trouble: str | None = None  # why the map could not be had, last time
        self._address = address
        self._tls = tls
        self._timeout_s = timeout_s
        self._spawn = spawn
        self._channels: dict[Endpoint, Channel] = {}
        self._known: dict[str, Channel] = {}  # the same by `host:port`
        self._slots: list[Channel | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._mapping: asyncio.Task[None] | None = None
        self._stale = False
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether every slot has a master with a link."""
        return None not in self._slots and all(channel.connected for channel in self._channels.values())

    def send(self, op: str, command: tuple[Argument, ...]) -> Awaitable[Any]:
        """Queue one command on the link to its key's master; fails at once without one."""
        key = key_of(command)
        channel = next(iter(self._channels.values()), None) if key is None else self._slots[key_slot(key)]
        if channel is None:
            return failed(Unavailable("connection", self.trouble or "no master serves this slot"))
        return channel.send(op, command)

    async def open(self, *, wait: bool) -> None:
        """Fetch the map and dial every master; `wait`: now, raising Unavailable."""
        if wait:
            await self._map()
        if not self.connected:
            self._map_soon()

    async def close(self) -> None:
        """Hang up on every node."""
        self._closed = True
        if self._mapping is not None:
            self._mapping.cancel()
            await asyncio.wait([self._mapping])
        for channel in self._channels.values():
            await channel.close()

    def _redirect(self, message: str, pending: Pending) -> bool:
        """Send on what a node answered with `MOVED slot host:port` or `ASK slot host:port`; False if we can't."""
        kind, _, target = message.partition(" ")
        channel = self._known.get(target.rpartition(" ")[2])
        if kind == "MOVED":
            self._map_soon()
        overdue = asyncio.get_running_loop().time() - pending[2] > self._timeout_s
        if overdue or channel is None or channel.link is None:
            return False
        channel.link.resend(pending, asking=kind == "ASK")
        return True

    def _map_soon(self) -> None:
        self._stale = True
        if self._mapping is None and not self._closed:
            self._mapping = self._spawn("ledger-cluster-map", self._map_until_whole())

    async def _map_until_whole(self) -> None:
        failures = 0
        while self._stale or not self.connected:
            self._stale = False
            try:
                await self._map()
            except Unavailable as error:
                self.trouble = error.reason
            await asyncio.sleep(backoff_s(failures))
            failures += 1
        self._mapping = None

    async def _map(self) -> None:
        """Take over the map of the first node that gives one."""
        reasons = []
        for endpoint in self._informants():
            try:
                ranges = await self._ranges(endpoint)
                await self._adopt(ranges)
            except (Unavailable, StoreError) as error:
                reasons.append(error.reason if isinstance(error, Unavailable) else f"{endpoint}: {error}")
            else:
                self.trouble = None
                return
        raise Unavailable("clusterdown", "; ".join(reasons) or "the cluster has no nodes")

    def _informants(self) -> list[Endpoint]:
        """Who may know the map: masters with a link, any order (one may be cut off from the rest), then the URL's nodes."""
        linked = [endpoint for endpoint, channel in self._channels.items() if channel.connected]
        random.shuffle(linked)
        return [*linked, *self._address.endpoints]

    async def _ranges(self, endpoint: Endpoint) -> list[tuple[int, int, Endpoint]]:
        """First slot, last slot and master of every range, as this node sees them."""
        channel = self._channels.get(endpoint)
        link = channel.link if channel is not None else None
        asked = link if link is not None else await self._dial(endpoint)
        try:
            reply = await asked.send("CLUSTER", ("CLUSTER", "SLOTS"))
        finally:
            if link is None:
                asked.lose("closed", "the map was read")
        # a node that doesn't know its own address leaves the host empty
        return [(first, last, Endpoint((m[0] or b"").decode() or endpoint.host, m[1])) for first, last, m, *_ in reply]

    async def _adopt(self, ranges: list[tuple[int, int, Endpoint]]) -> None:
        masters = {master for _, _, master in ranges}
        if not 0 < len(masters) <= MAX_NODES:
            raise Unavailable("clusterdown", f"the map names {len(masters)} masters")
        await asyncio.gather(*(self._open(master) for master in masters - self._channels.keys()))
        slots: list[Channel | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, master in ranges:
            slots[first : last + 1] = [self._channels[master]] * (last + 1 - first)
        self._slots = slots
        for gone in self._channels.keys() - masters:
            self._channels.pop(gone).retire()
        self._known = {f"{endpoint.host}:{endpoint.port}": channel for endpoint, channel in self._channels.items()}

    async def _open(self, master: Endpoint) -> None:
        """Dial a new master; if it doesn't answer, it is dialled on in the background."""
        channel = Channel(partial(self._dial, master), spawn=self._spawn, on_lost=self._map_soon)
        self._channels[master] = channel
        try:
            await channel.open()
        except Unavailable as error:
            channel.trouble = error.reason
            channel.keep_dialling()

    async def _dial(self, endpoint: Endpoint) -> Link:
        make = partial(Link, self._timeout_s, self.on_op, self._redirect)
        return await dial(endpoint, self._address.login, self._tls, make, timeout_s=self._timeout_s)


def key_of(command: tuple[Argument, ...]) -> bytes | None:
    """The key that decides where a command goes; None if any node will do."""
    name = str(command[0])
    at = _KEY_AT.get(name, 1)
    if name in _KEYLESS or len(command) <= at or (at == 3 and command[2] == 0):
        return None
    key = command[at]
    return key if isinstance(key, bytes) else str(key).encode()
