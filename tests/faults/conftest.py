"""A gateway with a wire that can fail on each of its legs, and the count of what it holds."""

import asyncio
import ssl
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import trustme
import uvloop
from structlog.testing import capture_logs

from tests.faults.phases import SCRIPTS
from tests.faults.table import OUTCOMES, SECURED, Case, expected_of
from tests.harness.books import Caller
from tests.harness.clients import chat_bytes, said
from tests.harness.mesh import Mesh, StartMesh, model
from tests.harness.provider import Teller
from tests.harness.proxy import FaultProxy
from tests.harness.waiting import PATIENCE_S, until_equal

SHORT_S = 0.2  # the gateway's time-outs where a case comes down to one, and the life of a hold that nobody settles
MAX_HEAR_S = 20.0
OURS_TO_MEND = ("task_failed", "bug", "handler failed")  # docs/operations.md


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}


class Terms(NamedTuple):
    """What the gateway of a case is set to: its patience on each leg, the life of a hold, whether its provider speaks TLS, what
    else is set of that provider, and others. Nothing comes down to a time-out that needn't, however busy the machine is.
    """

    client_s: float = MAX_HEAR_S
    upstream_s: float = MAX_HEAR_S
    redis_s: float = MAX_HEAR_S
    ttl_s: float = MAX_HEAR_S
    secured: bool = False
    wired: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to these
    upstreams: dict[str, Any] = {}  # noqa: RUF012
    models: dict[str, Any] = {}  # noqa: RUF012


class Stage:
    """A gateway, a key, and the wires."""

    def __init__(self, mesh: Mesh, caller: Caller, wires: dict[str, FaultProxy]) -> None:
        self.mesh, self.caller, self.wires = mesh, caller, wires
        self.headers: dict[str, str] = {}
        self.counted: Counter[str] = Counter()  # in the metrics, before what is judged
        self.said: list[dict[str, Any]] = []  # by the gateway in its log, lines of requests aside

    async def ask(
        self, model: str = "", *, stream: bool, client_timeout_s: float = PATIENCE_S, caller: Caller | None = None
    ) -> bytes:
        """What comes back for a request until the connection ends, or patience does. A stream's events come one by one."""
        lines = [f"{name}: {value}" for name, value in self.headers.items()]
        fields = {"model": model or ("paced" if stream else "brisk"), "stream": stream}
        asked = chat_bytes((caller or self.caller).auth, *lines, "Connection: close", **fields)
        return await said("127.0.0.1", self.wires["client"].port, asked, client_timeout_s)

    def held(self) -> dict[str, int]:
        """How much there is of everything that must not grow."""
        worker = self.mesh.worker
        return {
            "tasks": len(asyncio.all_tasks()),
            "spawned": self.mesh.spawned(),
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "leases": len(worker.live.leases),
            "relays": len(worker.live.relays),
            "recordings": len(worker.live.recordings),
            "in flight": worker.recorder.in_flight,
            "journal": len(worker.journal),
        }

    async def nothing_left(self, before: dict[str, int]) -> None:
        """Return when there is no more than before; an idle connection is no leak."""
        await self.mesh.until(lambda: self.mesh.worker.store.connected)
        for provider in self.mesh.worker.gateway.active.providers.values():
            provider.retire()
        await until_equal(lambda: {name: count for name, count in self.held().items() if count > before[name]}, {})
        assert [line for line in self.said if line["event"] in OURS_TO_MEND] == []


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch) -> ssl.SSLContext:
    """How a provider speaks TLS whose certificate the gateway takes."""
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
async def wires(simulator, store_server, trusted):
    """One for each leg. They outlive the gateway, which says its last words to Redis when it stops."""
    address = urlsplit(simulator.base_url)
    made = {
        "client": FaultProxy(gateway="target"),
        "upstream": FaultProxy(gateway="caller"),
        "handshake": FaultProxy(gateway="caller"),
        "TLS": FaultProxy(gateway="caller"),
        "Redis": FaultProxy(gateway="caller"),
    }
    for leg in ("upstream", "TLS"):
        made[leg].leads_to(lambda: asyncio.open_connection(address.hostname, address.port))
    made["handshake"].leads_to(lambda: asyncio.open_connection("127.0.0.1", made["TLS"].port))
    made["Redis"].leads_to(lambda: _open_store(store_server))
    for leg, wire in made.items():
        await wire.start(trusted if leg == "TLS" else None)
    yield made
    for wire in made.values():
        await wire.close()


@pytest.fixture
async def teller():
    """One that a test has yet to start."""
    teller = Teller()
    yield teller
    teller.close()


@pytest.fixture
def terms(case: Case) -> Terms:
    """Those of one fault."""
    timeout_s = SHORT_S if case[2] == "blackhole" else MAX_HEAR_S
    expected = expected_of(case)
    upstream_s = MAX_HEAR_S if expected == OUTCOMES["whole"] else timeout_s
    ttl_s = SHORT_S if expected.hold == "abandoned" else MAX_HEAR_S
    return Terms(timeout_s, upstream_s, timeout_s, ttl_s, secured=case[0] in SECURED)


@pytest.fixture
async def stage(wires, start_mesh: StartMesh, simulator, monkeypatch, terms: Terms) -> Stage:
    monkeypatch.setattr("meshproxy.ledger.journal.REPLAY_INTERVAL_S", 0.05)
    for module in ("fast_path", "listener"):
        monkeypatch.setattr(f"meshproxy.server.{module}.LINGER_S", SHORT_S)
    origin = (
        f"https://127.0.0.1:{wires['handshake'].port}"
        if terms.secured
        else f"http://127.0.0.1:{wires['upstream'].port}"
    )
    patience = {f"{name}_timeout_s": terms.upstream_s for name in ("connect", "first_byte", "idle")}
    wired = {"kind": "openai", "base_url": origin + urlsplit(simulator.base_url).path, **patience, **terms.wired}
    mesh = await start_mesh(
        server={"header_timeout_s": terms.client_s, "body_timeout_s": terms.client_s},
        redis={"url": f"redis://127.0.0.1:{wires['Redis'].port}", "timeout_s": terms.redis_s},
        credits={"hold_ttl_s": terms.ttl_s, "lease_output_tokens": 8},
        upstreams={"wired": wired, **terms.upstreams},
        models={
            "brisk": model("wired", "sim/plain?tokens=24&tps=2000"),
            "paced": model("wired", "sim/plain?tokens=24&tps=400"),
            "slow": model(
                "wired", "sim/plain?tokens=24&tps=100"
            ),  # a busy machine is late, and still in the middle of it
            "pondering": model("wired", "sim/plain?tokens=24&tps=400&ttft=0.1"),
            **terms.models,
        },
    )
    wires["client"].leads_to(lambda: asyncio.open_connection(mesh.host, mesh.port))
    for script in SCRIPTS.values():
        await mesh.worker.store.execute("SCRIPT", "LOAD", script.text)
    stage = Stage(mesh, await mesh.key(), wires)
    with capture_logs() as stage.said:
        yield stage


async def _open_store(url: str):
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return await asyncio.open_unix_connection(parts.path)
    return await asyncio.open_connection(parts.hostname, parts.port)
