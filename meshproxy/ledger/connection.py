"""How a URL becomes a `Store`: one server, the master that Sentinel names, or a cluster.

All of them speak over links of our own, which cost a fifth of redis-py's pipelines and never repeat a command by themselves.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from meshproxy import config
from meshproxy.ledger.address import Endpoint, Login, parse_url, tls_context
from meshproxy.ledger.channel import Channel, Keep, dial, keep_plainly
from meshproxy.ledger.cluster import ClusterStore, ask_once
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
    """The store behind `settings.url`, of any kind but `embedded` (start that first, and take its URL).

    `wait`: until it answers, raising Unavailable if it doesn't within `timeout_s`; else it is dialled in the background.
    Raises Unfit for a URL or TLS files that can't be used.
    """
    address, timeout_s = parse_url(config.plain(settings.url)), settings.timeout_s
    tls = tls_context(address)

    async def dial_node(
        endpoint: Endpoint, redirect: Redirect | None = None, *, login: Login = address.login, master: bool = False
    ) -> Link:
        make = partial(Link, timeout_s, on_op, redirect)
        return await dial(endpoint, login, tls, make, timeout_s=timeout_s, master=master)

    async def dial_master() -> Link:
        named = await discover(address.endpoints, partial(dial_node, login=Login()), address.service)
        return await dial_node(named, master=True)

    if address.kind == "cluster":
        store: Channel | ClusterStore = ClusterStore(address.endpoints, dial_node, timeout_s, keep, on_change)
    else:
        one = dial_master if address.kind == "sentinel" else partial(dial_node, address.endpoints[0])
        name = address.service or str(address.endpoints[0])
        store = Channel(one, keep=keep, name=name, on_change=on_change)
    if wait:
        await store.open()
    else:
        store.keep_dialling()
    return store


async def discover(
    sentinels: Sequence[Endpoint], dial_sentinel: Callable[[Endpoint], Awaitable[Link]], service: str
) -> Endpoint:
    """The master that the first Sentinel to know one names; Unavailable if none does."""
    reasons = []
    for sentinel in sentinels:
        try:
            reply = await ask_once(dial_sentinel(sentinel), "SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        except (Unavailable, StoreError) as error:
            reasons.append(str(error))
        else:
            if reply is not None:
                return Endpoint(reply[0].decode(), int(reply[1]))
            reasons.append(f"{sentinel} doesn't know it")
    raise Unavailable("connection", f"no Sentinel names a master {service} ({'; '.join(reasons)})")
