import asyncio
import gc
import time
import weakref

import pytest
from structlog.testing import capture_logs

from meshproxy.telemetry.tasks import Tasks, watch_lag
from tests.harness.waiting import turns, until


async def fail():
    raise LookupError("gone")


async def test_gives_the_result_and_forgets_the_task():
    tasks = Tasks()

    async def work():
        return 7

    task = tasks.spawn("settle", work())
    assert (len(tasks), task.get_name()) == (1, "settle")
    assert await task == 7
    await turns(1)
    assert len(tasks) == 0


async def test_holds_the_only_reference():
    tasks = Tasks()
    done = asyncio.Event()
    gate = asyncio.Event()

    async def work():
        await gate.wait()
        done.set()

    tasks.spawn("settle", work())
    gc.collect()
    gate.set()
    assert await tasks.finish(1) == 0
    assert done.is_set()


async def test_a_failure_is_logged_and_counted_and_never_lost():
    failed, complaints = [], []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    tasks = Tasks(failed.append)
    with capture_logs() as logs:
        tasks.spawn("renew", fail())
        assert await tasks.finish(1) == 0
        gc.collect()
    assert (failed, complaints) == (["renew"], [])
    assert [(log["event"], log["task"], log["log_level"], str(log["exc_info"])) for log in logs] == [
        ("task_failed", "renew", "error", "gone")
    ]


async def test_what_was_spawned_outlives_its_spawner():
    tasks = Tasks()
    gate, done = asyncio.Event(), asyncio.Event()

    async def settle():
        await gate.wait()
        done.set()

    async def handler():
        await asyncio.shield(tasks.spawn("settle", settle()))

    handling = asyncio.create_task(handler())
    await turns(1)
    handling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handling
    gate.set()
    assert await tasks.finish(1) == 0
    assert done.is_set()


async def test_finish_waits_for_what_is_spawned_meanwhile():
    tasks = Tasks()
    done = []

    async def first():
        tasks.spawn("second", second())

    async def second():
        done.append("second")

    tasks.spawn("first", first())
    assert await tasks.finish(1) == 0
    assert done == ["second"]


async def test_finish_cancels_what_is_late_and_counts_it():
    failed = []
    tasks = Tasks(failed.append)
    cleaned = []

    async def stuck():
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("up")

    tasks.spawn("stuck", stuck())
    tasks.spawn("stuck", stuck())
    await turns(1)
    assert await tasks.finish(0) == 2
    assert (cleaned, failed, len(tasks)) == (["up", "up"], [], 0)


async def test_finish_does_not_wait_for_ever_on_a_task_that_refuses_to_end(monkeypatch):
    monkeypatch.setattr("meshproxy.telemetry.tasks.CANCEL_GRACE_S", 0.01)
    tasks = Tasks()
    gate = asyncio.Event()

    async def stubborn():
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    task = tasks.spawn("stubborn", stubborn())
    await turns(1)
    assert await tasks.finish(0) == 1
    gate.set()
    await task


async def test_finish_of_nothing_is_nothing():
    assert await Tasks().finish(0) == 0


class Loop:
    """A loop that raises in its first runs. `again` is set when it has come through."""

    def __init__(self, failures):
        self.left = failures
        self.again = asyncio.Event()

    async def __call__(self):
        if self.left:
            self.left -= 1
            raise LookupError("gone")
        self.again.set()
        await asyncio.Event().wait()


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr("meshproxy.telemetry.tasks.FIRST_PAUSE_S", 0.0)


async def test_a_loop_that_raises_is_logged_counted_and_run_again(no_pause):
    failed, loop = [], Loop(2)
    tasks = Tasks(failed.append)
    with capture_logs() as logs:
        tasks.supervise("pulse", loop)
        await asyncio.wait_for(loop.again.wait(), 5)
    assert failed == ["pulse", "pulse"]
    assert [(line["event"], line["log_level"], line["runs"]) for line in logs] == [
        ("task_failed", "error", 1),
        ("task_failed", "error", 2),
    ]
    await tasks.close()


@pytest.mark.parametrize(
    ("failures", "is_vital", "expected"), [(2, True, set()), (3, True, {"pulse"}), (3, False, set())]
)
async def test_a_vital_loop_that_keeps_failing_is_named(no_pause, failures, is_vital, expected):
    loop = Loop(failures)
    tasks = Tasks()
    tasks.supervise("pulse", loop, is_vital=is_vital)
    await asyncio.wait_for(loop.again.wait(), 5)
    assert tasks.failing == expected
    await tasks.close()


async def test_and_no_more_once_it_runs_steadily(no_pause, monkeypatch):
    monkeypatch.setattr("meshproxy.telemetry.tasks.STEADY_S", 0.01)
    loop = Loop(3)
    tasks = Tasks()
    tasks.supervise("pulse", loop, is_vital=True)
    await asyncio.wait_for(loop.again.wait(), 5)
    await until(lambda: not tasks.failing, poll_s=0)
    await tasks.close()


async def test_pauses_double_up_to_a_bound(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    loop = Loop(12)
    tasks = Tasks()
    with monkeypatch.context() as patched:
        patched.setattr("meshproxy.telemetry.tasks.asyncio.sleep", sleep)
        tasks.supervise("pulse", loop)
        await asyncio.wait_for(loop.again.wait(), 5)
    assert pauses[:7] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert set(pauses[6:]) == {5.0}
    await tasks.close()


async def test_work_that_returns_is_over():
    async def work():
        pass

    tasks = Tasks()
    task = tasks.supervise("dial", work)
    await task
    over = weakref.ref(task)
    del task
    await turns(1)
    gc.collect()
    assert over() is None


async def test_close_ends_what_is_kept():
    loop = Loop(0)
    tasks = Tasks()
    task = tasks.supervise("pulse", loop)
    await loop.again.wait()
    await tasks.close()
    assert task.cancelled()


async def test_lag_is_how_late_the_loop_woke(monkeypatch):
    monkeypatch.setattr("meshproxy.telemetry.tasks.LAG_INTERVAL_S", 0.01)
    seen = []
    watching = asyncio.create_task(watch_lag(seen.append))
    await turns(1)
    time.sleep(0.1)  # noqa: TID251 - the whole loop
    await until(lambda: seen, poll_s=0)
    watching.cancel()
    assert 0.08 < seen[0] < 5
