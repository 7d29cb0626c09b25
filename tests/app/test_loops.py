"""Every loop that runs for a worker's life comes back when it raises, and the log and a metric say that it did."""

import asyncio

import pytest
from structlog.testing import capture_logs

from meshproxy.gateway.in_flight import InFlight
from meshproxy.ledger import connection
from meshproxy.ledger.link import ReconnectingStore
from meshproxy.ledger.store import Unavailable
from meshproxy.telemetry.tasks import Tasks

LOOPS = ("pulse", "journal", "instances", "loop-lag", "refusals", "deadlines")


@pytest.mark.parametrize("name", LOOPS)
async def test_a_loop_that_raises_runs_again(start_mesh, monkeypatch, tmp_path, name):
    supervise, again = Tasks.supervise, asyncio.Event()
    calls = []

    def planted(tasks, task, work, **options):
        async def failing():
            calls.append(None)
            if len(calls) == 1:
                raise LookupError("gone")
            again.set()
            await work()

        return supervise(tasks, task, failing if task == name else work, **options)

    monkeypatch.setattr(Tasks, "supervise", planted)
    with capture_logs() as logs:
        mesh = await start_mesh(redis={"on_failure": "local", "journal": str(tmp_path / "journal")})
        await asyncio.wait_for(again.wait(), 5)
    assert [(line["task"], line["log_level"]) for line in logs if line["event"] == "task_failed"] == [(name, "error")]
    (family,) = mesh.worker.metrics.task_failures.labels(name).collect()
    assert next(sample.value for sample in family.samples if sample.name.endswith("_total")) == 1
    assert mesh.worker.not_ready() == []


async def test_dialling_goes_on_after_what_nobody_foresaw(start_mesh, monkeypatch):
    original, calls = connection.dial, []

    async def planted(*args, **options):
        calls.append(None)
        if len(calls) == 1:
            raise Unavailable("connection", "not yet")  # so that it is dialled in the background
        if len(calls) == 2:
            raise LookupError("gone")
        return await original(*args, **options)

    monkeypatch.setattr(connection, "dial", planted)
    with capture_logs() as logs:
        mesh = await start_mesh(connected=True)
    assert isinstance(mesh.worker.store, ReconnectingStore)
    assert [line["task"] for line in logs if line["event"] == "task_failed"] == ["ledger-dial"]


async def test_one_relay_s_trouble_is_not_the_others(mesh, monkeypatch):
    looked_after = []

    class Relay:
        def __init__(self, trouble):
            self.last_error = trouble

        def ping_if_silent(self, _now, _heartbeat_s):
            looked_after.append(self)
            if self.last_error:
                raise LookupError("gone")

    relays = {Relay(trouble=True), Relay(trouble=False), Relay(trouble=True), Relay(trouble=False)}
    mesh.worker.live.relays |= relays
    try:
        with capture_logs() as logs:
            await mesh.until(lambda: any(line["event"] == "task_failed" for line in logs))
    finally:
        mesh.worker.live.relays -= relays
    assert relays <= set(looked_after)


async def test_a_pulse_that_keeps_failing_takes_the_worker_out_of_its_balancer(start_mesh, monkeypatch):
    async def planted(*_):
        raise LookupError("gone")

    monkeypatch.setattr("meshproxy.telemetry.tasks.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(InFlight, "pulse", planted)
    mesh = await start_mesh()
    await mesh.until(lambda: mesh.worker.not_ready() == ["the task pulse keeps failing"])
