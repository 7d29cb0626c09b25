"""What Redis may do in the middle of an admission, a renewal or a settlement, and what comes of it: the table of docs/ledger.md.

Each fault is made with a real server. During it each step is tried once; after it each is repeated, as the gateway or a client
would, and must have counted once.
"""

from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshproxy import config
from meshproxy.ledger.connection import Unavailable, connect
from meshproxy.ledger.journal import Journal
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import Hold, HoldRequest, Settlement
from meshproxy.ledger.store import StoreError
from meshproxy.openai.usage import Usage
from tests.harness.waiting import until
from tests.money.conftest import figure, full_only

DOC = Path(__file__).parents[2] / "docs" / "ledger.md"
GRANTED, AMOUNT, RAISED, COST = 10_000, 100, 250, 60
TIMEOUT_S = 0.4
STEPS = ("admit", "renew", "settle")
LOST = ("connection", "connection", "connection")

# fault: what is answered meanwhile to admit, renew and settle, and whether they may have run all the same
OUTCOMES = {
    "NOSCRIPT (SCRIPT FLUSH)": (("done", "done", "done"), "no"),
    "slow, but within `redis.timeout_s`": (("done", "done", "done"), "no"),
    "slow, past `redis.timeout_s`": (("timeout", "connection", "connection"), "yes"),
    "frozen (SIGSTOP)": (("timeout", "connection", "connection"), "yes"),
    "gone (SIGKILL)": (LOST, "no"),
    "restart (SIGKILL, appendonly)": (LOST, "no"),
    "READONLY (became a replica)": (("readonly", "connection", "connection"), "no"),
    "OOM (maxmemory, noeviction)": (("oom", "oom", "done"), "no"),
    "NOREPLICAS (min-replicas-to-write)": (("noreplicas",) * 3, "no"),
    "NOPERM (ACL)": (("refused",) * 3, "no"),
}


def table() -> str:
    """The rows as they stand in the documentation."""
    head = "| Redis is | admit | renew | settle | may have run |\n|---|---|---|---|---|"
    rows = [f"| {fault} | {' | '.join(answers)} | {ran} |" for fault, (answers, ran) in OUTCOMES.items()]
    return "\n".join([head, *rows])


class Faults:
    """How each is made, and mended."""

    def __init__(self, valkey, other=None):
        self.valkey, self.other_port = valkey, other.port if other is not None else 0

    @asynccontextmanager
    async def of(self, name):
        begin, end = {
            "NOSCRIPT (SCRIPT FLUSH)": (self.request("SCRIPT", "FLUSH"), None),
            "slow, but within `redis.timeout_s`": (self.request("CLIENT", "PAUSE", "60", "ALL"), None),
            "slow, past `redis.timeout_s`": (self.request("CLIENT", "PAUSE", "900", "ALL"), None),
            "frozen (SIGSTOP)": (self.valkey.freeze, self.valkey.thaw),
            "gone (SIGKILL)": (self.valkey.kill, self.valkey.start),
            "restart (SIGKILL, appendonly)": (lambda: (self.valkey.kill(), self.valkey.start()), None),
            "READONLY (became a replica)": (
                self.request("REPLICAOF", "127.0.0.1", str(self.other_port)),
                self.request("REPLICAOF", "NO", "ONE"),
            ),
            "OOM (maxmemory, noeviction)": (
                self.request("CONFIG", "SET", "maxmemory", "1"),
                self.request("CONFIG", "SET", "maxmemory", "0"),
            ),
            "NOREPLICAS (min-replicas-to-write)": (
                self.request("CONFIG", "SET", "min-replicas-to-write", "1"),
                self.request("CONFIG", "SET", "min-replicas-to-write", "0"),
            ),
            "NOPERM (ACL)": (
                self.request("ACL", "SETUSER", "default", "-evalsha", "-eval"),
                self.request("ACL", "SETUSER", "default", "+@all"),
            ),
        }[name]
        begin()
        try:
            yield
        finally:
            if end is not None:
                end()

    def request(self, *words):
        def run():
            assert self.valkey.request(*words).startswith(b"+OK"), words

        return run


class House:
    """A ledger, a journal, and two holds: one to renew and one to settle."""

    def __init__(self, store, path):
        self.store, self.ledger = store, Ledger(store)
        self.journal = Journal(path, 1 << 20)

    async def begin(self):
        await self.ledger.grant("acme", GRANTED)
        self.to_renew = await self.ledger.admit(ask("renewed"))
        assert isinstance(await self.ledger.admit(ask("settled")), Hold)

    async def admit(self):
        assert isinstance(await self.ledger.admit(ask("admitted")), Hold)

    async def renew(self):
        assert isinstance(await self.ledger.renew(self.to_renew, amount_nusd=RAISED), Hold)

    async def settle(self):
        """As the gateway does: what can't be settled goes to the journal."""
        try:
            await self.ledger.settle(settlement("settled"))
        except (Unavailable, StoreError):
            await self.journal.append(settlement("settled"))
            raise

    async def after(self):
        """Redis is back: everything is repeated, and counts once."""
        await self.until_connected()
        await self.journal.replay(self.ledger.settle)
        await self.admit()
        await self.renew()
        assert not await self.ledger.settle(settlement("settled"))

    async def until_connected(self):
        await until(lambda: self.store.execute("SET", "probe", "1"), "a connection", not_yet=Unavailable)


async def replicated(store):
    """Whether a replica has all that was written here."""
    return await store.execute("WAIT", 1, 100)


def ask(hold_id):
    return HoldRequest(hold_id=hold_id, account="acme", key_id="k1", amount_nusd=AMOUNT, tokens=1, ttl_ms=60_000)


def settlement(hold_id):
    return Settlement(
        hold_id=hold_id, request_id="r1", account="acme", key_id="k1", model="m", upstream="u", usage=Usage(1, 1),
        usage_source="reported", outcome="completed", cost_nusd=COST, started_ms=1_764_000_000_000,
    )  # fmt: skip


async def answer(step):
    """A word for what came of it."""
    try:
        await step()
    except Unavailable as error:
        return error.kind
    except StoreError:
        return "refused"
    return "done"


@pytest.fixture
async def house(valkey, tmp_path):
    store = await connect(config.Redis(url=valkey.url, timeout_s=TIMEOUT_S))
    opened = House(store, tmp_path / "journal")
    await opened.begin()
    yield opened
    opened.journal.close()
    await store.close()


async def books(ledger):
    balance = await ledger.balance("acme")
    return balance.balance_nusd, balance.held_nusd, balance.granted_nusd, balance.settled_nusd


@pytest.mark.parametrize("fault", OUTCOMES)
async def test_each_step_in_each_fault(house, valkey, start_valkey, fault):
    other = start_valkey(name="other") if "READONLY" in fault else None
    before = await books(house.ledger)
    if other is not None:  # a replica takes over what its master has: give it the same
        assert other.request("REPLICAOF", "127.0.0.1", str(valkey.port)) == b"+OK"
        await until(lambda: replicated(house.store), "the replica")
        assert other.request("REPLICAOF", "NO", "ONE") == b"+OK"
    expected, may_have_run = OUTCOMES[fault]
    async with Faults(valkey, other).of(fault):
        answers = [await answer(step) for step in (house.admit, house.renew, house.settle)]
    assert list(expected) == answers
    if "done" not in answers and may_have_run == "no":
        await house.until_connected()
        assert await books(house.ledger) == before
    await house.after()
    assert await books(house.ledger) == (GRANTED - COST, AMOUNT + RAISED, GRANTED, COST)
    events = await house.store.execute("XRANGE", "mesh:{acme}:usage", "-", "+")
    assert sum(b"settled" in fields for _, fields in events) == 1
    figure("Redis fault", fault=fault, faults=3, lost=0, charged_twice=0)


async def test_an_unheld_settlement_waits_while_memory_is_full(house, valkey):
    unheld = settlement("local")
    async with Faults(valkey).of("OOM (maxmemory, noeviction)"):
        with pytest.raises(Unavailable):
            await house.ledger.settle(unheld_of(unheld))
    assert [await house.ledger.settle(unheld_of(unheld)) for _ in range(2)] == [True, False]


def unheld_of(told):
    return Settlement(**{name: getattr(told, name) for name in told.__struct_fields__ if name != "unheld"}, unheld=True)


@full_only
async def test_failover_to_a_replica_by_sentinel(valkey, start_valkey, tmp_path):
    """What the replica had is what holds; each step is done once, on one or the other."""
    replica = start_valkey("--replicaof", "127.0.0.1", str(valkey.port), name="replica")
    sentinel = start_sentinel(start_valkey, tmp_path, valkey.port)
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster/0"
    await until(lambda: sentinel.request("SENTINEL", "CKQUORUM", "mymaster").startswith(b"+OK"), "a quorum")
    store = await connect(config.Redis(url=url, timeout_s=TIMEOUT_S))
    house = House(store, tmp_path / "journal")
    await house.begin()
    await until(lambda: replicated(store), "the replica")
    valkey.kill()
    assert {await answer(step) for step in (house.admit, house.renew, house.settle)} == {"connection"}
    await house.after()
    assert await books(house.ledger) == (GRANTED - COST, AMOUNT + RAISED, GRANTED, COST)
    assert replica.request("SET", "written-here", "1") == b"+OK"  # which is the master now
    house.journal.close()
    await store.close()
    figure("failover", faults=3, lost=0, charged_twice=0)


def start_sentinel(start_valkey, tmp_path, master_port):
    """A Sentinel, whose configuration file is the first argument of a server."""
    file = tmp_path / "sentinel.conf"
    file.write_text(
        f"sentinel monitor mymaster 127.0.0.1 {master_port} 1\n"
        "sentinel down-after-milliseconds mymaster 500\n"
        "sentinel failover-timeout mymaster 5000\n"
    )
    return start_valkey("--sentinel", name="sentinel", config=file)


def test_the_table_of_the_documentation_is_this_one():
    assert table() in DOC.read_text()
