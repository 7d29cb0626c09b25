"""`make soak`: everything at once against one gateway for half an hour, clients, providers and Redis failing all along. What it
holds is looked at every ten seconds; when the load is over nothing may be left that wasn't there after the warm-up, and every
account's money must add up.
"""

import argparse
import asyncio
import csv
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import msgspec
import uvloop

from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.store import Unavailable
from meshproxy.policy.principal import Limits
from meshproxy.simulator import SimulatorSettings, start
from tests.harness.clients import HELLO
from tests.harness.mesh import model, settings_for
from tests.harness.process import Program
from tests.hostile.corpus import CASES, END, request

ROOT = Path(__file__).parents[2]
CLIENTS = 24
SAMPLE_S = 10.0
CUT_S = 20.0  # between two losses of Redis's connections
QUIET_S = 30.0  # for pools, replays and holds to come to their end
CREDIT_NUSD = 10**12
SESSIONS = 50
REPEATS = 20  # Idempotency-Keys in use
MAX_GROWTH_BYTES = 12_582_912  # of a heap that is torn up all the time

WELL = ("plain", "fast", "burst", "split", "crlf", "comments", "unicode", "reasoning", "usage-every", "bom", "no-usage")
ILL = (
    *("die-mid-stream", "reset-mid-stream", "end-early", "error-mid-stream", "bad-chunk", "huge-event", "usage-absurd"),
    *("refuse", "reset", "empty", "not-json", "error-429", "error-500", "error-400", "error-401"),
    *("stall-head", "stall-mid"),
)
TABLES = {
    "server": {"header_timeout_s": 1, "body_timeout_s": 1, "heartbeat_s": 1, "max_in_flight": 64},
    "credits": {"lease_output_tokens": 16, "hold_ttl_s": 5},
    "idempotency": {"ttl_s": 5},
    "models": {
        **{
            f"soak/{name}": model(
                "sim", f"sim/{name}" if "-4" in name or "-5" in name else f"sim/{name}?tokens=40&tps=400"
            )
            for name in (*WELL, *ILL)
        },
        "soak/failover": model("refused", "x", "sim", "sim/plain?tokens=8"),
        "soak/long": model("sim", "sim/fast?tokens=3000"),
    },
}


class Alone(Program):
    """A gateway's process that can be asked what lives in it."""

    port: int

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    async def living(self) -> dict[str, int]:
        """How much there is in it of what must not grow."""
        self.process.stdin.write(b"look\n")
        self.process.stdin.flush()
        return json.loads(await asyncio.to_thread(self.process.stdout.readline))


@asynccontextmanager
async def running(store_url, simulator, tables, log: Path) -> AsyncIterator[Alone]:
    told = json.dumps({"settings": msgspec.to_builtins(settings_for(store_url, simulator.base_url, **tables))})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    with Alone(sys.executable, Path(__file__).parent / "alone.py", told, log=log, cwd=ROOT, **pipes) as gateway:
        gateway.port = int(await asyncio.to_thread(gateway.process.stdout.readline))
        yield gateway
        gateway.process.stdin.close()
        await gateway.exit()


class Soak:
    """The load and what is seen meanwhile."""

    _http: aiohttp.ClientSession

    def __init__(self, gateway: Alone, keys: dict[str, str], chance: random.Random) -> None:
        self._gateway = gateway
        self._keys = keys
        self._chance = chance
        self.outcomes: Counter[str] = Counter()
        self._over = False
        self._ways: list[Callable[[], Awaitable[str]]] = [
            *[self._well] * 8, *[self._ill] * 6, *[self._hang_up] * 4, self._idle_reader, self._half, self._junk, self._repeat,
            self._repeat, self._refused, self._pages, self._failover,
        ]  # fmt: skip

    async def run(self, seconds: float, look: Callable[[], Awaitable[None]]) -> None:
        """Load for so long."""
        until = time.monotonic() + seconds
        base_url = f"http://127.0.0.1:{self._gateway.port}"
        async with aiohttp.ClientSession(base_url, connector=aiohttp.TCPConnector(limit=0)) as self._http:
            self._over = False
            clients = [asyncio.create_task(self._client()) for _ in range(CLIENTS)]
            while (left_s := until - time.monotonic()) > 0:
                await asyncio.sleep(min(SAMPLE_S, left_s))
                await look()
            self._over = True
            await asyncio.gather(*clients)

    async def _client(self) -> None:
        """One after the other until it is over."""
        while not self._over:
            way = self._chance.choice(self._ways)
            try:
                async with asyncio.timeout(30):
                    outcome = await way()
            except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
                outcome = type(error).__name__
            except TimeoutError:
                outcome = "HUNG"
            self.outcomes[f"{way.__name__[1:]} {outcome}"] += 1

    async def _well(self) -> str:
        return await self._chat(self._chance.choice(WELL), stream=self._chance.random() < 0.7)

    async def _ill(self) -> str:
        return await self._chat(self._chance.choice(ILL), stream=self._chance.random() < 0.7)

    async def _failover(self) -> str:
        return await self._chat("failover", stream=True)

    async def _repeat(self) -> str:
        return await self._chat("plain", stream=True, idempotency=f"again-{self._chance.randrange(REPEATS)}")

    async def _refused(self) -> str:
        key = self._chance.choice(["poor", "slow", "unknown"])
        return await self._chat("plain", stream=True, key=key)

    async def _hang_up(self) -> str:
        """At any moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._chance.random() * 0.1):
                return await self._chat("plain", stream=True)
        return "gone"

    async def _idle_reader(self) -> str:
        """Doesn't read for a while, and then goes."""
        _, writer = await asyncio.open_connection("127.0.0.1", self._gateway.port, limit=1024)
        writer.write(_raw(self._keys["rich"], {"model": "soak/long", "messages": HELLO, "stream": True}))
        await asyncio.sleep(self._chance.random())
        writer.transport.abort()
        return "gone"

    async def _half(self) -> str:
        """Begins a request and never ends it."""
        whole = _raw(self._keys["rich"], {"model": "soak/plain", "messages": HELLO})
        return await self._send(whole[: self._chance.randrange(1, len(whole))])

    async def _junk(self) -> str:
        data, _ = self._chance.choice(list(CASES.values()))
        return await self._send(data.replace(b"KEY", self._keys["rich"].encode()) + END)

    async def _pages(self) -> str:
        path = self._chance.choice(
            ["/v1/models", "/v1/usage?group_by=model,session_id", "/v1/key", "/v1/templates", "/nowhere"]
        )
        async with self._http.get(path, headers=self._auth("rich")) as response:
            await response.read()
            return str(response.status)

    async def _chat(self, name: str, *, stream: bool, key: str = "rich", idempotency: str | None = None) -> str:
        headers = self._auth(key) | ({"idempotency-key": idempotency} if idempotency is not None else {})
        session = None if idempotency is not None else f"session-{self._chance.randrange(SESSIONS)}"
        body = {"model": f"soak/{name}", "messages": HELLO, "stream": stream, "session_id": session}
        async with self._http.post("/v1/chat/completions", json=body, headers=headers) as response:
            told = await response.read()
        if not stream or response.status != 200:
            return str(response.status)
        return "done" if told.endswith(b"data: [DONE]\n\n") else "error event" if b'{"error":' in told else "CUT"

    async def _send(self, data: bytes) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._gateway.port)
        writer.write(data)
        try:
            return (await reader.read(-1))[9:12].decode() or "closed"
        finally:
            writer.close()

    def _auth(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self._keys[key]}"}


async def main(seconds: float, samples: Path) -> int:
    chance = random.Random(1)
    async with Embedded() as server:
        store = await connect(Redis(url=server.url))
        simulator = await start(settings=SimulatorSettings(tokens_per_second=2000, first_token_s=0.01))
        keys = await _make_keys(Directory(store, time.monotonic), Ledger(store))
        tables = {**TABLES, "upstreams": {"sim": _upstream(simulator.base_url)}}
        async with running(server.url, simulator, tables, samples.with_suffix(".log")) as gateway:
            soak = Soak(gateway, keys, chance)
            faults = await _load(soak, gateway, store, simulator, seconds, samples)
            faults += await _unbalanced(Ledger(store), keys)
        await simulator.close()
        await store.close()
    for outcome, count in sorted(soak.outcomes.items()):
        _say(f"{count:8} {outcome}")
    faults += [outcome for outcome in soak.outcomes if outcome.endswith(("HUNG", "CUT", " 500"))]
    _say("\n".join(["FAILED", *faults]) if faults else f"held for {seconds:.0f} s, {soak.outcomes.total()} requests")
    return 1 if faults else 0


async def _load(soak: Soak, gateway: Alone, store, simulator, seconds: float, path: Path) -> list[str]:
    """Warm up, look, go on, look again: what differs."""
    began = time.monotonic()
    with path.open("w", newline="") as file:
        rows = csv.writer(file)

        async def look() -> dict[str, int]:
            seen = await _look(gateway, store)
            _write(rows, time.monotonic() - began, seen, soak.outcomes.total())
            return seen

        async def phase(for_s: float) -> dict[str, int]:
            cutting = asyncio.create_task(_cut_redis_off(store))
            await soak.run(for_s, look)
            cutting.cancel()
            await asyncio.sleep(QUIET_S)
            simulator.history.requests.clear()
            return await look()

        before = await phase(max(seconds * 0.15, 20))
        after = await phase(seconds)
    grown = after["rss_bytes"] - before["rss_bytes"]
    faults = [f"RSS grew by {grown} bytes"] if grown > MAX_GROWTH_BYTES else []
    flat = ("descriptors", "tasks", "spawned", "in_flight", "leases", "relays", "recordings", "journal")
    faults += [f"{name}: {before[name]} before, {after[name]} after" for name in flat if after[name] > before[name]]
    if after["redis_keys"] > before["redis_keys"] + 3 * SESSIONS:  # a new hour or day may have begun
        faults.append(f"Redis's keys: {before['redis_keys']} before, {after['redis_keys']} after")
    return faults


async def _look(gateway: Alone, store) -> dict[str, int]:
    return {
        "rss_bytes": gateway.rss_bytes,
        "descriptors": gateway.descriptors,
        "redis_keys": await _again(lambda: store.execute("DBSIZE")),
        **await gateway.living(),
    }


def _write(rows, at_s: float, seen: dict[str, int], requests: int) -> None:
    if at_s < 1.5 * SAMPLE_S:
        rows.writerow(["seconds", "requests", *seen])
    rows.writerow([round(at_s), requests, *seen.values()])
    _say(f"{at_s:6.0f} s {requests:8} requests " + " ".join(f"{name}={value}" for name, value in seen.items()))


async def _again(ask):
    """Ask until the connection holds."""
    while True:
        try:
            return await ask()
        except Unavailable:
            await asyncio.sleep(0.1)


async def _cut_redis_off(store) -> None:
    """Every connection of the gateway's and ours, again and again."""
    while True:
        await asyncio.sleep(CUT_S)
        with suppress(Exception):
            await store.execute("CLIENT", "KILL", "TYPE", "normal")


async def _make_keys(directory: Directory, ledger: Ledger) -> dict[str, str]:
    much = Limits(10**9, 10**12, 10**6)
    keys = {"unknown": "rsk_nobody"}
    for name, limits, credit in (
        ("rich", much, CREDIT_NUSD),
        ("poor", much, 0),
        ("slow", Limits(1, None, 1), CREDIT_NUSD),
    ):
        keys[name], _ = await directory.create_key(name, limits=limits)
        if credit:
            await ledger.grant(name, credit)
    return keys


async def _unbalanced(ledger: Ledger, keys: dict[str, str]) -> list[str]:
    faults = []
    for account in keys.keys() - {"unknown"}:
        balance = await _again(lambda account=account: ledger.balance(account))
        if balance.held_nusd or balance.granted_nusd != balance.balance_nusd + balance.settled_nusd:
            faults.append(f"{account}: {balance}")
    return faults


def _upstream(base_url: str) -> dict[str, object]:
    return {"kind": "openai", "base_url": base_url, "first_byte_timeout_s": 1, "idle_timeout_s": 1, "keepalive_s": 5}


def _raw(secret: str, body) -> bytes:
    data = json.dumps(body).encode()
    return request(b"Content-Length: %d" % len(data), body=data).replace(b"KEY", secret.encode())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--samples", type=Path, default=Path("soak.csv"))
    options = parser.parse_args()
    sys.exit(uvloop.run(main(options.seconds, options.samples)))
