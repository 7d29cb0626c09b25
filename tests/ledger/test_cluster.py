"""A real cluster of three masters on loopback: every command finds its slot's master, also while slots move and nodes die."""

import asyncio
import signal
from contextlib import ExitStack

import pytest
import redis
from redis.crc import key_slot

from meshproxy.config import Redis
from meshproxy.ledger.connection import Unavailable, connect, key_of
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import Hold, HoldRequest, Settlement
from meshproxy.ledger.store import NOTHING, Script, ScriptCall, pack
from meshproxy.openai.usage import Usage
from meshproxy.policy.template import Template
from tests.harness.waiting import turns, until
from tests.ledger.conftest import binary, eventually, free_ports, spawn

RANGES = ((0, 5460), (5461, 10922), (10923, 16383))
pytestmark = pytest.mark.xdist_group("cluster")


class Node:
    def __init__(self, stack, home, port, bus_port):
        self.port, self.bus_port = port, bus_port
        self.admin = stack.enter_context(redis.Redis(port=port))
        at = ("--port", port, "--bind", "127.0.0.1", "--dir", home, "--save", "", "--cluster-port", bus_port)
        cluster = ("--cluster-enabled", "yes", "--cluster-node-timeout", 1000, "--cluster-require-full-coverage", "no")
        self.start = lambda: spawn(stack, binary("valkey"), *at, *cluster)
        self.process = self.start()

    def knows_all(self):
        info = self.admin.execute_command("CLUSTER", "INFO")
        return b"cluster_state:ok" in info and b"cluster_slots_ok:16384" in info

    @property
    def id(self):
        return self.admin.execute_command("CLUSTER MYID")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    ports = free_ports(6)
    with ExitStack() as stack:
        nodes = [Node(stack, tmp_path_factory.mktemp("node"), ports[n], ports[n + 3]) for n in range(3)]
        for node, slots in zip(nodes, RANGES, strict=True):
            eventually(node.admin.ping)
            node.admin.execute_command("CLUSTER", "ADDSLOTSRANGE", *slots)
            node.admin.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, nodes[0].bus_port)
        for node in nodes:
            eventually(node.knows_all)
        yield nodes


@pytest.fixture
async def store(nodes):
    for node in nodes:
        node.admin.flushall()
    store = await connect(Redis(url=f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"))
    yield store
    await store.close()


def owner_of(nodes, slot):
    return next(node for node, (first, last) in zip(nodes, RANGES, strict=True) if first <= slot <= last)


async def redirects(node, kind, asked):
    """How often a node answers a command with MOVED or ASK."""

    def count():
        return node.admin.info("errorstats").get(f"errorstat_{kind}", {"count": 0})["count"]

    before = count()
    await asked
    return count() - before


async def test_keys_of_every_slot_range(nodes, store):
    names = [f"key-{n}" for n in range(300)]
    await asyncio.gather(*(store.execute("SET", name, name) for name in names))
    assert await asyncio.gather(*(store.execute("GET", name) for name in names)) == [name.encode() for name in names]
    assert all(node.admin.dbsize() > 50 for node in nodes)
    assert store.connected


async def test_the_ledgers_scripts(store):
    ledger = Ledger(store)
    for account in ("acme", "beta", "gamma", "delta"):
        assert (await ledger.grant(account, 1000)).balance_nusd == 1000
        ask = HoldRequest(
            hold_id="h1", account=account, key_id="k", session="s", amount_nusd=400, tokens=10, ttl_ms=60_000
        )
        assert isinstance(await ledger.admit(ask), Hold)
        settlement = Settlement(
            hold_id="h1",
            request_id="r",
            account=account,
            key_id="k",
            session="s",
            model="m",
            upstream="u",
            usage=Usage(3, 4),
            usage_source="reported",
            outcome="completed",
            cost_nusd=300,
            started_ms=1_700_000_000_000,
        )
        assert await ledger.settle(settlement)
        assert not await ledger.settle(settlement)
        balance = await ledger.balance(account, "k")
        assert (balance.balance_nusd, balance.held_nusd, balance.spend.total_nusd) == (700, 0, 300)


async def test_the_directory(store):
    directory = Directory(store)
    secret, key = await directory.create_key("acme")
    assert (await directory.principal(secret)).key == key
    assert await directory.find_key(key.id[:10]) == key
    assert await directory.list_keys() == [key]
    template = Template(id="t", name="greet", owner="acme", system="hi", created_at=1.0, updated_at=1.0)
    assert await directory.templates.put(template)
    assert await directory.templates.find("acme", "greet") == template
    old, (new, rotated) = secret, await directory.rotate_key(key.id, grace_s=60)
    assert [(await directory.principal(each)).key for each in (old, new)] == [rotated, rotated]


@pytest.mark.parametrize("account", ["acme", "beta", "gamma", "delta"])
async def test_a_deleted_account_leaves_nothing_on_any_node(nodes, store, account):
    directory, ledger = Directory(store), Ledger(store)
    await directory.create_key(account)
    await ledger.grant(account, 1000, ref="inv-7")
    assert await directory.delete_account(account)
    left = [name for node in nodes for name in node.admin.keys("*")]
    assert left == [b"mesh:audit"]


async def test_a_slot_that_moved_is_followed(nodes, store):
    """MOVED, before the store has heard of it by itself."""
    slot = key_slot(b"{moved}")
    source = owner_of(nodes, slot)
    target = next(node for node in nodes if node is not source)
    assert await store.execute("SET", "{moved}", 1) == b"OK"
    source.admin.execute_command("DEL", "{moved}")
    for node in nodes:
        node.admin.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target.id)
    try:
        replies = await asyncio.gather(*(store.execute("INCR", "{moved}") for _ in range(5)))
        assert replies == [1, 2, 3, 4, 5]
        assert target.admin.execute_command("GET", "{moved}") == b"5"
        async with asyncio.timeout(10):  # until the new map is there
            while await redirects(source, "MOVED", store.execute("GET", "{moved}")):
                pass
    finally:
        target.admin.execute_command("DEL", "{moved}")
        for node in nodes:
            node.admin.execute_command("CLUSTER", "SETSLOT", slot, "NODE", source.id)


async def test_a_slot_that_is_moving_is_asked_for(nodes, store):
    """ASK: the key isn't at the source any more, and the target takes it only after ASKING."""
    slot = key_slot(b"{asked}")
    source = owner_of(nodes, slot)
    target = next(node for node in nodes if node is not source)
    target.admin.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
    source.admin.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
    try:
        replies = await asyncio.gather(*(store.execute("INCR", "{asked}") for _ in range(5)))
        assert replies == [1, 2, 3, 4, 5]
        assert await redirects(source, "ASK", store.execute("GET", "{asked}")) == 1
    finally:
        target.admin.execute_command("ASKING")
        for node in (target, source):
            node.admin.execute_command("CLUSTER", "SETSLOT", slot, "STABLE")


async def test_a_node_that_dies_takes_only_its_slots_along_and_comes_back(nodes, store):
    victim = owner_of(nodes, key_slot(b"victim"))
    others = [name for name in ("a", "b", "c", "d", "e") if owner_of(nodes, key_slot(name.encode())) is not victim]
    assert await store.execute("GET", "victim") is None
    victim.process.send_signal(signal.SIGSTOP)
    pending = store.execute("GET", "victim")
    await turns(1)
    victim.process.kill()
    victim.process.wait()
    with pytest.raises(Unavailable):
        await pending
    with pytest.raises(Unavailable):
        await store.execute("GET", "victim")
    assert not store.connected
    assert [await store.execute("GET", name) for name in others] == [None] * len(others)
    victim.start()
    await until(lambda: store.connected)
    eventually(victim.knows_all)
    assert await store.execute("SET", "victim", 1) == b"OK"


async def test_nobody_at_home():
    port = free_ports(1)[0]
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=f"redis+cluster://127.0.0.1:{port}"))
    assert (caught.value.kind, f"127.0.0.1:{port}" in caught.value.reason) == ("clusterdown", True)
    store = await connect(Redis(url=f"redis+cluster://127.0.0.1:{port}"), wait=False)
    with pytest.raises(Unavailable):
        await store.execute("GET", "x")
    await store.close()


async def test_a_server_without_cluster_mode_is_told():
    port = free_ports(1)[0]
    async with Embedded("--port", str(port), "--bind", "127.0.0.1"):
        with pytest.raises(Unavailable) as caught:
            await connect(Redis(url=f"redis+cluster://127.0.0.1:{port}"))
    assert "cluster support disabled" in caught.value.reason


@pytest.mark.parametrize("endpoint_type", ["ip", "unknown-endpoint"])
async def test_a_node_that_does_not_name_its_host_and_wants_a_password(endpoint_type):
    """Its map has an empty or a null host: the one that it was asked at."""
    port, bus_port = free_ports(2)
    cluster = ("--cluster-enabled", "yes", "--cluster-port", str(bus_port), "--protected-mode", "no")
    async with Embedded("--port", str(port), "--bind", "127.0.0.1", *cluster):
        with redis.Redis(port=port) as admin:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            admin.config_set("cluster-preferred-endpoint-type", endpoint_type)
            eventually(lambda: b"cluster_state:ok" in admin.execute_command("CLUSTER", "INFO"))
            admin.config_set("requirepass", "geheim")
        store = await connect(Redis(url=f"redis+cluster://:geheim@127.0.0.1:{port}"))
        assert await store.execute("SET", "x", 1) == b"OK"
        await store.close()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("GET", "a"), b"a"),
        (("GET", b"\xff"), b"\xff"),
        (("EVALSHA", "sha", 2, "a", "b", "x"), b"a"),
        (ScriptCall(b"", Script.of("two", "return 2"), 2, pack("a"), ("b", "x"), NOTHING), b"a"),
        (("PING",), None),
        (("TIME",), None),
    ],
)
def test_which_key_decides(command, expected):
    assert key_of(command) == expected
