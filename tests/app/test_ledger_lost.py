"""What the log and the balancer hear when Redis goes away and comes back."""

import contextlib
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meshproxy.ledger.embedded import Embedded
from meshproxy.telemetry.exposition import decode
from meshproxy.telemetry.logs import LOG_INTERVAL_S, LedgerRecorder
from meshproxy.telemetry.metrics import Metrics

NOWHERE = "redis://127.0.0.1:1/0"


def about_the_ledger(logs):
    return [line["event"] for line in logs if line["event"] in {"ledger_lost", "ledger_back", "ledger_unavailable"}]


@pytest.fixture
async def server():
    async with Embedded() as server:
        yield server


async def end(server):
    server.process.kill()
    await server.process.wait()
    with contextlib.suppress(FileNotFoundError):
        Path(server.url.removeprefix("unix://")).unlink()


async def test_a_line_when_it_is_lost_and_one_when_it_is_back(start_mesh, server):
    mesh = await start_mesh(redis={"url": server.url})
    with capture_logs() as logs:
        for _ in range(2):
            await end(server)
            await mesh.until(lambda: not mesh.worker.store.connected)
            await server.launch()
            await mesh.until(lambda: mesh.worker.store.connected)
    assert about_the_ledger(logs) == ["ledger_lost", "ledger_back"] * 2
    path = server.url.removeprefix("unix://")
    assert {line["server"] for line in logs if line["event"].startswith("ledger_")} == {path}
    assert all(line["reason"] for line in logs if line["event"] == "ledger_lost")


async def test_what_comes_late_is_back_too(start_mesh, server):
    await end(server)
    with capture_logs() as logs:
        mesh = await start_mesh(redis={"url": server.url}, connected=False)
        assert mesh.worker.not_ready() == ["the ledger can't be reached"]
        await server.launch()
        await mesh.until(lambda: mesh.worker.store.connected)
    assert about_the_ledger(logs) == ["ledger_unavailable", "ledger_back"]
    assert mesh.worker.not_ready() == []


async def test_who_had_it_once_stays_ready_and_answers_in_the_envelope(start_mesh, server):
    mesh = await start_mesh(redis={"url": server.url})
    await end(server)
    await mesh.until(lambda: not mesh.worker.store.connected)
    assert mesh.worker.not_ready() == []
    answer = await mesh.request("GET", "/v1/key", headers={"authorization": "Bearer rsk_unknown"})
    assert (answer.status, answer.code) == (503, "ledger_unavailable")
    assert "retry-after" in answer.headers
    await server.launch()
    await mesh.until(lambda: mesh.worker.store.connected)


async def test_operations_without_a_connection_are_counted_and_have_no_duration(start_mesh):
    mesh = await start_mesh(redis={"url": NOWHERE}, connected=False)
    for _ in range(3):
        await mesh.request("GET", "/v1/key", headers={"authorization": "Bearer rsk_unknown"})
    families = {family.name: family.series for family in decode(await mesh.worker.metrics.snapshot())}
    errors = {series.labels[0]: series.value for series in families["meshproxy_ledger_errors_total"] if series.value}
    assert (errors.keys(), errors["disconnected"] >= 3) == ({"disconnected"}, True)
    assert sum(series.value for series in families["meshproxy_ledger_op_duration_seconds"]) == 0


async def test_with_local_it_is_ready_without(start_mesh, tmp_path):
    redis = {"url": NOWHERE, "on_failure": "local", "journal": str(tmp_path / "journal")}
    mesh = await start_mesh(redis=redis, connected=False)
    assert mesh.worker.not_ready() == []


async def test_a_full_redis_is_logged_once_by_its_kind(server, start_mesh):
    mesh = await start_mesh(redis={"url": server.url})
    caller = await mesh.key()
    await mesh.worker.store.execute("CONFIG", "SET", "maxmemory", "1")
    with capture_logs() as logs:
        statuses = {(await mesh.chat(caller, model="sim/fast")).status for _ in range(5)}
        await mesh.worker.store.execute("CONFIG", "SET", "maxmemory", "0")
    fails = [line for line in logs if line["event"] == "ledger_fails"]
    assert (
        statuses,
        [(line["kind"], line["op"], line["operations"]) for line in fails],
    ) == ({503}, [("oom", "admit", 1)])


def test_slow_operations_are_counted_between_two_lines(monkeypatch):
    times = iter((0.0, 1.0, LOG_INTERVAL_S + 1.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    recorder = LedgerRecorder(Metrics([], []))
    with capture_logs() as logs:
        for seconds in (0.06, 0.2, 0.07):
            recorder.record("admit", seconds, None)
    assert [(line["operations"], line["worst_ms"]) for line in logs] == [(1, 60.0), (2, 200.0)]
