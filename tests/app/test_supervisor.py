"""What a worker hears that is just starting. The rest of the supervisor's work is tested on processes, in tests/deploy."""

import asyncio
import contextlib
import socket

import msgspec
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from meshproxy.app.reload import RunningConfig
from meshproxy.app.supervisor import Supervisor, WorkerProcess
from meshproxy.config import Secrets, Settings

FIRST = RunningConfig(Settings(), Secrets({}))
FAILED = replace(FIRST, reload_failed=True)


class Line:
    """A control that keeps what it is asked, and is told by a test what happens meanwhile."""

    def __init__(self, meanwhile=lambda: None, faults=()):
        self.asked = []
        self._meanwhile = meanwhile
        self._answer = msgspec.msgpack.encode(list(faults))

    async def request(self, request):
        self.asked.append(request)
        self._meanwhile()
        return self._answer


async def test_a_worker_hears_what_changed_while_it_was_starting():
    supervisor = Supervisor(FIRST, [None])

    def a_reload_fails():
        supervisor.config = FAILED

    line = Line(a_reload_fails)
    assert await supervisor.configure(WorkerProcess(1, 0, None, line))
    assert line.asked == [FIRST, FAILED]
    assert supervisor.up.is_set()


async def test_not_all_are_up_before_the_last_is():
    supervisor = Supervisor(FIRST, [None, None])
    assert await supervisor.configure(WorkerProcess(1, 0, None, Line(lambda: None)))
    assert not supervisor.up.is_set()
    assert await supervisor.configure(WorkerProcess(2, 0, None, Line(lambda: None)))
    assert supervisor.up.is_set()


async def test_one_who_is_gone_before_it_serves_is_no_worker():
    def gone():
        raise ConnectionError

    supervisor = Supervisor(FIRST, [None])
    assert not await supervisor.configure(WorkerProcess(1, 0, None, Line(gone)))
    assert supervisor.workers() == []


async def test_a_worker_that_cannot_serve_says_why():
    supervisor = Supervisor(FIRST, [None])
    assert not await supervisor.configure(WorkerProcess(1, 0, None, Line(faults=["redis.journal: full"])))
    assert supervisor.faults == ["redis.journal: full"]


async def test_one_worker_s_fault_keeps_all_from_a_configuration():
    supervisor = Supervisor(FIRST, [None, None])
    for number, faults in ((1, []), (2, ["upstreams.a: no"])):
        worker = WorkerProcess(number, 0, None, Line())
        assert await supervisor.configure(worker)
        worker.control = Line(faults=faults)
    wanted = replace(FIRST, generation=2)
    assert await supervisor.prepare(wanted) == ["upstreams.a: no"]
    assert supervisor.config is FIRST


async def test_a_worker_that_does_not_answer_keeps_all_from_it_too(monkeypatch):
    monkeypatch.setattr("meshproxy.app.supervisor.PREPARE_S", 0.01)

    class Stuck(Line):
        async def request(self, request):
            await asyncio.Event().wait()

    supervisor = Supervisor(FIRST, [None])
    worker = WorkerProcess(7, 0, None, Line())
    assert await supervisor.configure(worker)
    worker.control = Stuck()
    assert await supervisor.prepare(FIRST) == ["worker 7 did not answer within 0.01 s"]


@pytest.mark.parametrize(
    ("error", "event"), [(OSError(11, "no fork"), "worker_not_started"), (ValueError(), "task_failed")]
)
async def test_a_keeper_tries_again_when_no_process_could_be_started(monkeypatch, error, event):
    tried = asyncio.Event()
    attempts = []

    async def spawn(*_):
        attempts.append(None)
        if len(attempts) == 1:
            raise error
        tried.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    with capture_logs() as logs, contextlib.closing(socket.socket()) as sock:
        supervisor = Supervisor(FIRST, [sock])
        await supervisor.start()
        await asyncio.wait_for(tried.wait(), 5)
        keepers = [task for task in asyncio.all_tasks() if task.get_name() == "worker-keeper"]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
    assert [line["event"] for line in logs] == [event]
