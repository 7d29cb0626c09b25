"""`python -m benchmarks.store`: what a request's scripts cost Redis, with one account and with many, alone and as a cluster.

Each request is an admission and a settlement with four buckets, sent as a gateway sends them: many in a write. What is reported
is the CPU time of Redis's own processes (see processes.py), so that it holds on a busy machine too. Memory is that of a request's
usage event, marker and aggregates, as INFO counts it.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from benchmarks.processes import OTHER_CORE, PROXY_CORE, Process, free_ports, program
from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import Hold, HoldRequest, Settlement
from meshproxy.openai.usage import Usage
from meshproxy.policy.principal import Limits

REPEATS = 3
REQUESTS = 20_000
AT_ONCE = 100
ACCOUNTS = 1_000
PLENTY = Limits(requests_per_minute=1_000_000_000, tokens_per_minute=1_000_000_000)
COST_NUSD = 30_000
SLOTS = 16_384
MASTERS = 3

_ids = itertools.count()


@dataclass(frozen=True)
class Kind:
    """A Redis to measure."""

    name: str
    accounts: int
    masters: int = 1
    options: tuple[str, ...] = ()


KINDS = (
    Kind("one, no file", 1),
    Kind("one, no file", ACCOUNTS),
    Kind("one, appendonly everysec", ACCOUNTS, options=("--appendonly", "yes")),
    Kind(f"a cluster of {MASTERS} masters, no file", ACCOUNTS, MASTERS, ("--cluster-enabled", "yes")),
)


def main() -> int:
    """Measure, and print a table in Markdown."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.store", description="Measure what a request costs Redis; takes some minutes."
    ).parse_args()
    os.sched_setaffinity(0, {OTHER_CORE})
    print(
        "| Redis | accounts | CPU us a request | requests/s of one core | bytes kept a request |\n|---|---:|---:|---:|---:|"
    )
    for kind in KINDS:
        measured = [_measure(kind) for _ in range(REPEATS)]
        us = statistics.median(us for us, _ in measured)
        kept = statistics.median(kept for _, kept in measured)
        print(f"| {kind.name} | {kind.accounts} | {us:.0f} | {1e6 / us:.0f} | {kept:.0f} |")
    return 0


def _measure(kind: Kind) -> tuple[float, float]:
    """Return microseconds of Redis's CPU and bytes of its memory for each request."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshproxy-bench-")))
        ports = free_ports(2 * kind.masters)
        pairs = zip(ports[::2], ports[1::2], strict=True)
        nodes = [stack.enter_context(_node(directory, port, bus, kind.options)) for port, bus in pairs]
        if kind.masters > 1:
            _join(ports)
        admins = [stack.enter_context(redis.Redis(port=port)) for port in ports[::2]]
        scheme = "redis+cluster" if kind.masters > 1 else "redis"
        us, kept = asyncio.run(_load(f"{scheme}://127.0.0.1:{ports[0]}", kind.accounts, nodes, admins))
        print(f"{kind.name}, {kind.accounts} accounts: {us:.0f} us", file=sys.stderr)
        return us, kept


@contextmanager
def _node(directory: Path, port: int, bus: int, options: tuple[str, ...]) -> Iterator[Process]:
    home = directory / str(port)
    home.mkdir()
    argv = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(home), "--save", ""]
    with Process([*argv, "--cluster-port", str(bus), *options], PROXY_CORE, [port]) as process:
        yield process


def _join(ports: list[int]) -> None:
    """Give each node its share of the slots and let them meet."""
    share = SLOTS // MASTERS + 1
    for number, port in enumerate(ports[::2]):
        with redis.Redis(port=port) as node:
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", number * share, min((number + 1) * share, SLOTS) - 1)
            node.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0], ports[1])
    deadline = time.monotonic() + 20
    for port in ports[::2]:
        with redis.Redis(port=port) as node:
            while b"cluster_state:ok" not in node.execute_command("CLUSTER", "INFO"):
                if time.monotonic() > deadline:
                    raise RuntimeError("the cluster did not form")
                time.sleep(0.05)


async def _load(url: str, accounts: int, nodes: list[Process], admins: list["redis.Redis"]) -> tuple[float, float]:
    store = await connect(Redis(url=url, timeout_s=10))
    ledger = Ledger(store)
    names = [f"account-{number}" for number in range(accounts)]
    for name in names:
        await ledger.grant(name, 10**15)
    todo = itertools.cycle(names)
    await _requests(ledger, todo, REQUESTS // 10)
    before_s, before_bytes = sum(node.cpu_s() for node in nodes), _used(admins)
    await _requests(ledger, todo, REQUESTS)
    spent_s, kept = sum(node.cpu_s() for node in nodes) - before_s, _used(admins) - before_bytes
    await store.close()
    return spent_s / REQUESTS * 1e6, kept / REQUESTS


async def _requests(ledger: Ledger, names: Iterator[str], count: int) -> None:
    for _ in range(count // AT_ONCE):
        await asyncio.gather(*(_request(ledger, next(names)) for _ in range(AT_ONCE)))


async def _request(ledger: Ledger, account: str) -> None:
    hold_id = f"hold-{next(_ids)}"
    hold = await ledger.admit(
        HoldRequest(
            hold_id=hold_id,
            account=account,
            key_id="key",
            amount_nusd=2 * COST_NUSD,
            tokens=300,
            ttl_ms=60_000,
            key_limits=PLENTY,
            account_limits=PLENTY,
        )
    )
    assert isinstance(hold, Hold)
    await ledger.settle(
        Settlement(
            hold_id=hold_id,
            request_id=hold_id,
            account=account,
            key_id="key",
            model="openai/gpt-4o",
            upstream="openai",
            usage=Usage(12, 10),
            usage_source="reported",
            outcome="completed",
            cost_nusd=COST_NUSD,
            started_ms=int(time.time() * 1000),
        )
    )


def _used(admins: list["redis.Redis"]) -> int:
    return sum(admin.info("memory")["used_memory"] for admin in admins)


if __name__ == "__main__":
    sys.exit(main())
