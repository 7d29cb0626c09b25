"""How a URL becomes a `Store`: one server, the master that Sentinel names, or a cluster.

redis-py opens and logs in every socket (TLS, AUTH, SELECT) and asks Sentinel for the master. A request's commands then go over
our own link: docs/decisions/link.md.
"""

import asyncio
import ssl
from collections.abc import Sequence
from functools import partial
from typing import Any

import redis
from redis.asyncio import ConnectionPool, Redis, Sentinel, SSLConnection
from redis.asyncio.connection import AbstractConnection, Connection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from meshproxy import config
from meshproxy.ledger.address import Endpoint, Login, parse_url, tls_context
from meshproxy.ledger.channel import Channel, Keep, dial, keep_plainly
from meshproxy.ledger.cluster import ClusterStore
from meshproxy.ledger.link import Link, Redirect
from meshproxy.ledger.store import OnChange, OnOp, Store, StoreError, Unavailable

__all__ = ["Store", "StoreError", "Unavailable", "connect"]


async def connect(
    settings: config.Redis,
    *,
    wait: bool = True,
    on_op: OnOp | None = None,
    keep: Keep = keep_plainly,
    on_change: OnChange | None = None,
) -> Store:
    """Return the store behind `settings.url`, of any kind but `embedded` (start that first, and take its URL).

    `wait`: until it answers, raising Unavailable if it doesn't within `timeout_s`; else it is dialled in the background.
    Raises Unfit for a URL or TLS files that can't be used.
    """
    address, timeout_s = parse_url(config.plain(settings.url)), settings.timeout_s
    options = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "protocol": 2, "driver_info": None}
    tls = tls_context(address)

    async def dial_node(endpoint: Endpoint, redirect: Redirect | None = None, *, master: bool = False) -> Link:
        server = connection(endpoint, address.login, tls, options)
        return await dial(
            server, endpoint, partial(Link, timeout_s, on_op, redirect), timeout_s=timeout_s, master=master
        )

    async def dial_master() -> Link:
        return await dial_node(await discover(sentinel, address.service), master=True)

    if address.kind == "cluster":
        store: Channel | ClusterStore = ClusterStore(address.endpoints, dial_node, timeout_s, keep, on_change)
    else:
        sentinel = _sentinel(address.endpoints, tls, options)
        one = dial_master if address.kind == "sentinel" else partial(dial_node, address.endpoints[0])
        name = address.service or str(address.endpoints[0])
        store = Channel(one, keep=keep, name=name, on_change=on_change)
    if wait:
        await store.open()
    else:
        store.keep_dialling()
    return store


class TlsConnection(SSLConnection):
    """redis-py's, with a context of ours: it trusts `ca_file` alone, and redis-py's trusts the system's authorities besides."""

    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context.context = context


def connection(
    endpoint: Endpoint, login: Login, tls: ssl.SSLContext | None, options: dict[str, Any]
) -> AbstractConnection:
    """Return redis-py's connection to a server, which isn't open yet and never retries."""
    options = options | {"username": login.username, "password": login.password, "db": login.db}
    if endpoint.path:
        return UnixDomainSocketConnection(path=endpoint.path, **options)
    if tls is None:
        return Connection(host=endpoint.host, port=endpoint.port, **options)
    return TlsConnection(host=endpoint.host, port=endpoint.port, context=tls, **options)


def _sentinel(endpoints: Sequence[Endpoint], tls: ssl.SSLContext | None, options: dict[str, Any]) -> Sentinel:
    """Return redis-py's client of several Sentinels. Each is asked once: its default is to ask a dead one for seconds."""
    options = options | {"retry": Retry(NoBackoff(), 0)}
    if tls is not None:
        options |= {"connection_class": TlsConnection, "context": tls}
    sentinel = Sentinel([])  # type: ignore[no-untyped-call]
    sentinel.sentinels = [
        Redis.from_pool(ConnectionPool(host=endpoint.host, port=endpoint.port, **options)) for endpoint in endpoints
    ]
    return sentinel


async def discover(sentinel: Sentinel, service: str) -> Endpoint:
    """Return the master that the first Sentinel to see it alive names; Unavailable if none does."""
    try:
        return Endpoint(*await sentinel.discover_master(service))
    except redis.RedisError as error:
        raise Unavailable("connection", f"no Sentinel names a master {service} ({error})") from None
    finally:
        await asyncio.gather(*(client.aclose() for client in sentinel.sentinels), return_exceptions=True)
