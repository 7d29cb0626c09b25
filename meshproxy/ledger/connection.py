"""`connect` opens the Store behind `redis.url`: one server, the master that Sentinel names, or a Cluster.

redis-py opens and logs in every socket (TLS, AUTH, SELECT). Over its connections Sentinel is asked for the master and a
Cluster for its map; a request's commands go over our own connection: docs/decisions/link.md.

`ClusterStore` has a connection to every master and a map from slots to masters. A command goes to the master of its first
key's slot; the keys of a script share a hash tag, so the first key decides. MOVED and ASK redirect the command with the
same future: the server that replies so has executed nothing (Redis cluster specification, "Redirection and
resharding"). A MOVED or a lost connection also starts a refresh of the map, repeated until every slot has a connected
master.
"""

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from msgspec.structs import asdict
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot

from meshproxy import config
from meshproxy.ledger.link import (
    Pending,
    ReconnectingStore,
    Redirect,
    RedisConnection,
    Supervise,
    dial,
    disconnected,
    jittered_backoff_s,
    opened,
    query,
    run_unsupervised,
)
from meshproxy.ledger.store import (
    Command,
    Endpoint,
    Login,
    OnChange,
    OnOp,
    ScriptCall,
    Store,
    StoreError,
    Unavailable,
    parse_url,
    tls_context,
)

__all__ = ["Store", "StoreError", "Unavailable", "connect"]

MAX_NODES = 1000  # the specification's bound on a cluster

DialNode = Callable[[Endpoint, Redirect], Awaitable[RedisConnection]]
QueryNode = Callable[..., Awaitable[Any]]  # an endpoint and a command: its reply, over a connection of redis-py's


class ClusterStore(Store):
    """A Store over a cluster, found through any of `seeds`. A command is redirected for `timeout_s` at most."""

    def __init__(
        self,
        seeds: Sequence[Endpoint],
        dial: DialNode,
        query_node: QueryNode,
        timeout_s: float,
        supervise: Supervise,
        on_change: OnChange | None = None,
        on_op: OnOp | None = None,
    ) -> None:
        self._seeds = seeds
        self._dial = dial
        self._query_node = query_node
        self._timeout_s = timeout_s
        self._supervise = supervise
        self._on_change = on_change
        self._on_op = on_op
        self._last_error = "no master serves this slot"  # or why the map could not be fetched
        self._masters: dict[Endpoint, ReconnectingStore] = {}  # of every master
        self._slots: list[ReconnectingStore | None] = [None] * SLOTS
        self._mapping: asyncio.Task[None] | None = None
        self._stale = False
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether every slot has a connected master."""
        return None not in self._slots and all(master.connected for master in self._masters.values())

    def send(self, op: str, command: Command) -> "asyncio.Future[Any]":
        """Queue one command on the connection to its key's master. Fails at once without a connection."""
        key = key_of(command)
        master = next(iter(self._masters.values()), None) if key is None else self._slots[key_slot(key)]
        if master is None:
            return disconnected(op, self._last_error, self._on_op)
        return master.send(op, command)

    async def open(self) -> None:
        """Fetch the map and dial every master. Raises Unavailable if no node has a map."""
        await self._map()
        if not self.connected:
            self.keep_dialling()

    def keep_dialling(self) -> None:
        """Fetch the map in the background until every slot has a connected master."""
        self._stale = True
        if self._mapping is None and not self._closed:
            self._mapping = self._supervise("ledger-cluster-map", self._map_until_whole)

    async def close(self) -> None:
        """Close the connections to all nodes, for good."""
        self._closed = True
        if self._mapping is not None:
            self._mapping.cancel()
            await asyncio.wait([self._mapping])
        for master in self._masters.values():
            await master.close()

    def _redirect(self, message: str, pending: Pending) -> bool:
        """Follow a reply `MOVED slot host:port` or `ASK slot host:port`; return False if that is impossible."""
        kind, _, target = message.split(" ")
        host, _, port = target.rpartition(":")
        master = self._masters.get(Endpoint(host, int(port)))
        if kind == "MOVED":
            self.keep_dialling()
        overdue = asyncio.get_running_loop().time() - pending[2] > self._timeout_s
        if overdue or master is None or master.connection is None:
            return False
        master.connection.resend(pending, asking=kind == "ASK")
        return True

    async def _map_until_whole(self) -> None:
        """Refresh the map, with backoff, until every slot has a connected master."""
        failures = 0
        while self._stale or not self.connected:
            self._stale = False
            try:
                await self._map()
            except Unavailable as error:
                self._last_error = error.reason
            await asyncio.sleep(jittered_backoff_s(failures + 1))
            failures += 1
        self._mapping = None

    async def _map(self) -> None:
        """Take over the map of the first node that returns one.

        Connected masters are asked first, in random order, because one of them may be cut off from the rest.
        """
        connected = [endpoint for endpoint, master in self._masters.items() if master.connected]
        random.shuffle(connected)
        reasons = []
        for endpoint in (*connected, *self._seeds):
            try:
                return await self._adopt(await self._ranges(endpoint))
            except Unavailable as error:
                reasons.append(error.reason)
        raise Unavailable("clusterdown", "; ".join(reasons))

    async def _ranges(self, endpoint: Endpoint) -> list[tuple[int, int, Endpoint]]:
        """Return the first slot, last slot and master of every range, as this node knows them."""
        reply = await self._query_node(endpoint, "CLUSTER", "SLOTS")
        # a node that doesn't know its own address returns an empty host
        return [(first, last, Endpoint((m[0] or b"").decode() or endpoint.host, m[1])) for first, last, m, *_ in reply]

    async def _adopt(self, ranges: list[tuple[int, int, Endpoint]]) -> None:
        """Connect new masters, switch to the new map, and retire masters that are gone."""
        endpoints = {endpoint for _, _, endpoint in ranges}
        if not 0 < len(endpoints) <= MAX_NODES:
            raise Unavailable("clusterdown", f"the map names {len(endpoints)} masters")
        await asyncio.gather(*(self._open(endpoint) for endpoint in endpoints - self._masters.keys()))
        slots: list[ReconnectingStore | None] = [None] * SLOTS
        for first, last, endpoint in ranges:
            slots[first : last + 1] = [self._masters[endpoint]] * (last + 1 - first)
        self._slots = slots
        for gone in self._masters.keys() - endpoints:
            self._masters.pop(gone).retire()

    async def _open(self, endpoint: Endpoint) -> None:
        """Dial a new master; keep dialling in the background if it doesn't answer."""
        dial = partial(self._dial, endpoint, self._redirect)
        master = self._masters[endpoint] = ReconnectingStore(
            dial,
            supervise=self._supervise,
            on_lost=self.keep_dialling,
            name=str(endpoint),
            on_change=self._on_change,
            on_op=self._on_op,
        )
        try:
            await master.open()
        except Unavailable:
            master.keep_dialling()


def key_of(command: Command) -> bytes | None:
    """Return the key that decides which node takes a command; None if it has no key and any node can take it."""
    if isinstance(command, ScriptCall):
        command = command.by_text()
    at = 3 if command[0] in {"EVAL", "EVALSHA"} else 1
    if len(command) <= at:
        return None
    key = command[at]
    return key if isinstance(key, bytes) else str(key).encode()


async def connect(
    settings: config.Redis,
    *,
    wait: bool = True,
    on_op: OnOp | None = None,
    supervise: Supervise = run_unsupervised,
    on_change: OnChange | None = None,
) -> Store:
    """Return the store behind `settings.url`. For an `embedded` server, start it first and pass its URL.

    `wait`: wait until the store answers, and raise Unavailable if it doesn't within `timeout_s`; otherwise dial in the
    background. Raises ConfigError for a URL or TLS files that can't be used.
    """
    address, timeout_s = parse_url(config.resolved(settings.url)), settings.timeout_s
    connection = partial(_connection, login=address.login, tls=tls_context(address), timeout_s=timeout_s)

    async def dial_node(node: Endpoint, redirect: Redirect | None = None, *, master: bool = False) -> RedisConnection:
        make = partial(RedisConnection, timeout_s, on_op, redirect)
        return await dial(node, connection(node), make, master=master)

    async def query_node(node: Endpoint, *command: str, **options: Any) -> Any:
        server = connection(node, **options)
        async with opened(node, server):
            return await query(server, *command)

    async def dial_master() -> RedisConnection:
        query_sentinel = partial(query_node, login=Login())
        return await dial_node(await discover(address.endpoints, query_sentinel, address.service), master=True)

    if address.kind == "cluster":
        store: ReconnectingStore | ClusterStore = ClusterStore(
            address.endpoints, dial_node, query_node, timeout_s, supervise, on_change, on_op
        )
    elif address.kind == "sentinel":
        store = ReconnectingStore(
            dial_master, supervise=supervise, name=address.service, on_change=on_change, on_op=on_op
        )
    else:
        server = address.endpoints[0]
        store = ReconnectingStore(
            partial(dial_node, server), supervise=supervise, name=str(server), on_change=on_change, on_op=on_op
        )
    if wait:
        await store.open()
    else:
        store.keep_dialling()
    return store


def _connection(endpoint: Endpoint, login: Login, tls: ssl.SSLContext | None, timeout_s: float) -> AbstractConnection:
    """Return redis-py's connection to a server, not yet open. Without a `retry` it tries everything once."""
    options = asdict(login) | {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    options |= {"protocol": 2, "driver_info": None}  # as old servers have it
    if endpoint.path:
        return UnixDomainSocketConnection(path=endpoint.path, **options)
    if tls is None:
        return Connection(host=endpoint.host, port=endpoint.port, **options)
    server = SSLConnection(host=endpoint.host, port=endpoint.port, **options)
    server.ssl_context.context = tls  # it trusts ca_file alone, redis-py's own the system's authorities besides
    return server


async def discover(sentinels: Sequence[Endpoint], query_node: QueryNode, service: str) -> Endpoint:
    """Return the master that the first Sentinel to know one names. Raises Unavailable if none does."""
    reasons = []
    for sentinel in sentinels:
        try:
            named = await query_node(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        except Unavailable as error:
            reasons.append(error.reason)
        else:
            if named is not None:
                return Endpoint(named[0].decode(), int(named[1]))
            reasons.append(f"{sentinel} doesn't know it")
    raise Unavailable("connection", f"no Sentinel names a master {service} ({'; '.join(reasons)})")


async def store_warnings(store: Store) -> list[str]:
    """Return warnings about a Redis that may lose money: it may evict keys, or forgets all at a restart.

    A setting that can't be read (a managed Redis may refuse CONFIG) gives no warning.
    """
    warnings = []
    memory = _info(await store.execute("INFO", "memory"))
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and memory.get("maxmemory", "0") != "0":
        warnings.append(f"maxmemory-policy is {policy}: Redis may evict balances and keys; set noeviction")
    persistence = _info(await store.execute("INFO", "persistence"))
    if persistence.get("aof_enabled") == "0":
        try:
            save = dict([await store.execute("CONFIG", "GET", "save")])
        except StoreError:
            save = {}
        if save.get(b"save") == b"":
            warnings.append("appendonly is no and save is empty: a restart of Redis forgets all credit and keys")
    return warnings


def _info(reply: bytes) -> dict[str, str]:
    """Parse the reply to INFO."""
    lines = (line.partition(":") for line in reply.decode().splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in lines}
