"""The master of the ledger dies under streams that it admitted: they settle once on the next, whether they end before or after
there is one.
"""

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot

from tests.faults.play import FULL_NUSD
from tests.harness.mesh import model
from tests.harness.process import Valkey, free_port
from tests.harness.provider import EVENTS, Teller, framed
from tests.harness.waiting import until

RANGES = ((0, 5460), (5461, 10922), (10923, 16383))
ACCOUNT = "acme"
DEAD_MS = "300"  # after so long without a word from a master its replica stands in
pytestmark = pytest.mark.xdist_group("ledger moves")


@pytest.fixture
def start():
    with ExitStack() as stack:

        def start_one(*options, config=""):
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            file = home / "sentinel.conf"
            file.write_text(config)
            server = Valkey(home, *options, config=file if config else None)
            stack.callback(server.kill)
            server.admin = stack.enter_context(redis.Redis(port=server.port))
            return server

        yield start_one


async def sentinel(start):
    """A master, its replica, and a Sentinel's URL."""
    master = start()
    replica = start("--replicaof", "127.0.0.1", str(master.port))
    watcher = start(
        "--sentinel",
        config=f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds mymaster {DEAD_MS}\n"
        "sentinel failover-timeout mymaster 3000\n",
    )
    await until(lambda: watcher.admin.sentinel_masters()["mymaster"]["num-slaves"] == 1, not_yet=redis.RedisError)
    return master, replica, f"redis+sentinel://127.0.0.1:{watcher.port}/mymaster/0"


async def cluster(start):
    """Of three masters the one that has the account, its replica, and the cluster's URL."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", DEAD_MS, "--cluster-require-full-coverage", "no")
    bus = [free_port() for _ in range(4)]
    nodes = [start(*options, "--cluster-port", str(port)) for port in bus]
    for node in nodes:
        node.admin.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, bus[0])
    for node, slots in zip(nodes, RANGES, strict=False):
        node.admin.execute_command("CLUSTER", "ADDSLOTSRANGE", *slots)
    slot = key_slot(ACCOUNT.encode())
    master = next(node for node, (_, last) in zip(nodes, RANGES, strict=False) if slot <= last)
    name = master.admin.execute_command("CLUSTER MYID")
    await until(lambda: nodes[3].admin.execute_command("CLUSTER", "REPLICATE", name), not_yet=redis.RedisError)
    await until(lambda: all(map(is_whole, nodes)), not_yet=redis.RedisError)
    await until(lambda: nodes[3].admin.info("replication")["master_link_status"] == "up", not_yet=redis.RedisError)
    return master, nodes[3], "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def is_whole(node):
    """Whether a node knows all others, and who has which slot."""
    info = node.admin.execute_command("CLUSTER", "INFO")
    return all(line in info for line in (b"cluster_state:ok", b"cluster_known_nodes:4", b"cluster_slots_ok:16384"))


@pytest.fixture
async def tellers():
    """Providers of a stream whose end they keep for later."""
    told = framed(EVENTS, "chunks", stream=True)
    middle = told.index(EVENTS[1])
    tellers = {"ends-before": Teller(), "ends-after": Teller()}
    for teller in tellers.values():
        teller.says = [told[:middle], told[middle:]]
        await teller.start()
    yield tellers
    for teller in tellers.values():
        teller.close()


@pytest.mark.parametrize("ledger", [sentinel, cluster])
async def test_streams_settle_once_on_the_next_master(ledger, start, start_mesh, tellers, monkeypatch):
    monkeypatch.setattr("meshproxy.ledger.journal.REPLAY_INTERVAL_S", 0.05)
    master, replica, url = await ledger(start)
    mesh = await start_mesh(
        redis={"url": url},
        upstreams={name: {"kind": "openai", "base_url": teller.base_url} for name, teller in tellers.items()},
        models={name: model(name, "x") for name in tellers},
    )
    caller = await mesh.key(ACCOUNT)
    asked = [asyncio.create_task(mesh.stream(caller, model=name)) for name in tellers]
    await mesh.until(lambda: all(teller.told for teller in tellers.values()))
    written = master.admin.info("replication")["master_repl_offset"]
    await until(lambda: replica.admin.info("replication")["slave_repl_offset"] >= written, not_yet=redis.RedisError)
    master.kill()
    await until(lambda: not mesh.worker.store.connected)
    tellers["ends-before"].go.set()
    answers = [await asked[0]]
    await until(lambda: mesh.worker.store.connected)
    tellers["ends-after"].go.set()
    answers.append(await asked[1])
    await mesh.until(lambda: not len(mesh.worker.journal))
    assert [given.events[-1] for given in answers] == ["[DONE]"] * 2
    settled = [(event["hold"], event["outcome"]) for event in await mesh.settlements(caller)]
    assert (settled, await mesh.spent(caller)) == ([("live", "completed")] * 2, 2 * FULL_NUSD)
    assert replica.admin.info("replication")["role"] == "master"
