"""A gateway with a wire that can fail on each of its legs, and the count of what it holds."""

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import uvloop

from tests.conftest import HELLO, Caller, Mesh, StartMesh, model
from tests.faults.phases import SCRIPTS
from tests.faults.proxy import FaultProxy
from tests.faults.table import Case, expected_of

SHORT_S = 0.2  # the gateway's time-outs where a case comes down to one, and the life of a hold that nobody settles
LONG_S = 20.0
PATIENCE_S = 10.0


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}


class Stage:
    """A gateway, a key, and the three wires."""

    def __init__(self, mesh: Mesh, caller: Caller, wires: dict[str, FaultProxy]) -> None:
        self.mesh, self.caller, self.wires = mesh, caller, wires

    async def ask(self, model: str, *, stream: bool, patience_s: float, caller: Caller | None = None) -> bytes:
        """What comes back for a request until the connection ends, or patience does."""
        body = msgspec.json.encode({"messages": HELLO, "model": model, "stream": stream})
        lines = [f"{name}: {value}" for name, value in (caller or self.caller).auth.items()]
        lines += ["host: mesh", "connection: close", f"content-length: {len(body)}", "content-type: application/json"]
        head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "\r\n"])
        got = b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.wires["client"].port)
        try:
            writer.write(head.encode() + body)
            async with asyncio.timeout(patience_s):
                while data := await reader.read(65_536):
                    got += data
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.transport.abort()
        return got

    def held(self) -> dict[str, int]:
        """How much there is of everything that must not grow."""
        worker = self.mesh.worker
        return {
            "tasks": len(asyncio.all_tasks()),
            "spawned": len(self.mesh._of_requests()),
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "leases": len(worker.live.leases),
            "relays": len(worker.live.relays),
            "recordings": len(worker.live.recordings),
            "in flight": worker.recorder.in_flight,
            "journal": len(worker.journal),
        }

    async def until(self, expected: Any, look: Any) -> None:
        """Return when it looks as expected; fail with the difference if it doesn't come to that."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while (seen := look()) != expected and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)
        assert expected == seen


@pytest.fixture
async def wires(simulator, store_server):
    """One for each leg. They outlive the gateway, which says its last words to Redis when it stops."""
    address = urlsplit(simulator.base_url)
    made = {
        "client": FaultProxy(gateway="target"),
        "upstream": FaultProxy(gateway="caller"),
        "Redis": FaultProxy(gateway="caller"),
    }
    made["upstream"].leads_to(lambda: asyncio.open_connection(address.hostname, address.port))
    made["Redis"].leads_to(lambda: _open_store(store_server))
    for wire in made.values():
        await wire.start()
    yield made
    for wire in made.values():
        await wire.close()


@pytest.fixture
async def stage(wires, start_mesh: StartMesh, simulator, monkeypatch, case: Case) -> Stage:
    """Nothing comes down to a time-out that needn't, however busy the machine is."""
    timeout_s = SHORT_S if case[2] == "blackhole" else LONG_S
    ttl_s = SHORT_S if expected_of(case).hold == "abandoned" else LONG_S
    monkeypatch.setattr("meshproxy.ledger.journal.REPLAY_INTERVAL_S", 0.05)
    monkeypatch.setattr("meshproxy.server.listener.LINGER_S", SHORT_S)
    base_url = f"http://127.0.0.1:{wires['upstream'].port}{urlsplit(simulator.base_url).path}"
    patience = {f"{name}_timeout_s": timeout_s for name in ("connect", "first_byte", "idle")}
    mesh = await start_mesh(
        server={"header_timeout_s": timeout_s, "body_timeout_s": timeout_s},
        redis={"url": f"redis://127.0.0.1:{wires['Redis'].port}", "timeout_s": timeout_s},
        credits={"hold_ttl_s": ttl_s, "lease_output_tokens": 8},
        upstreams={"wired": {"kind": "openai", "base_url": base_url, **patience}},
        models={
            "paced": model("wired", "sim/plain?tokens=24&tps=400"),
            "pondering": model("wired", "sim/plain?tokens=24&tps=400&ttft=0.1"),
        },
    )
    wires["client"].leads_to(lambda: asyncio.open_connection(mesh.host, mesh.port))
    for script in SCRIPTS.values():
        await mesh.worker.store.execute("SCRIPT", "LOAD", script.text)
    return Stage(mesh, await mesh.key(), wires)


async def _open_store(url: str):
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return await asyncio.open_unix_connection(parts.path)
    return await asyncio.open_connection(parts.hostname, parts.port)
