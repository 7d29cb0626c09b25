"""Supervised background tasks: start what outlives its caller, keep loops running, and watch the event loop's lag.

A spawned task is independent: cancelling the caller (a handler whose client hung up) doesn't cancel it, not even while
the caller awaits it through asyncio.shield(). Code that may be cancelled must use the shield: `await task` alone passes
the cancellation on. Each request in flight has a few tasks at most, and `server.max_in_flight` bounds the requests.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import structlog

from meshproxy.units import backoff_s

T = TypeVar("T")

CANCEL_GRACE_S = 1.0  # how long a cancelled task may clean up before it is abandoned

FIRST_PAUSE_S = 0.1  # before a loop that raised is restarted
MAX_PAUSE_S = 5.0
STEADY_S = 10.0  # a run this long resets the pause
FAILING_RUNS = 3  # in a row, until a vital loop counts as failing

LAG_INTERVAL_S = 0.25

_log = structlog.get_logger(__name__)


class Tasks:
    """The running tasks, each held by a strong reference. `on_failure` is called with the name of each that raises.

    `running` may also have futures, for which `finish` waits too: a callback on a future costs half as much as a task. The
    code that adds one discards it when it is done.
    """

    def __init__(self, on_failure: Callable[[str], None] = lambda _: None) -> None:
        self.failing: set[str] = set()  # vital loops that keep raising
        self.running: set[asyncio.Future[Any]] = set()
        self._supervised: set[asyncio.Task[None]] = set()
        self._on_failure = on_failure

    def __len__(self) -> int:
        return len(self.running)

    def __iter__(self) -> Iterator[asyncio.Future[Any]]:
        return iter(tuple(self.running))

    def spawn(self, name: str, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `coro`. If it raises, that is logged and counted under `name`, a fixed word such as `settle`."""
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self.running.add(task)
        task.add_done_callback(self._ended)
        return task

    def supervise(
        self, name: str, work: Callable[[], Coroutine[Any, Any, None]], *, is_vital: bool = False
    ) -> asyncio.Task[None]:
        """Run `work` until it returns. If it raises, log and count that under `name`, and run it again after a pause.

        The pause doubles up to MAX_PAUSE_S, and starts anew after a run of STEADY_S. `is_vital`: `failing` contains the
        name once it has raised FAILING_RUNS times in a row. `finish` doesn't wait for it: cancel the task, or `close`.
        """
        task = asyncio.get_running_loop().create_task(self._rerun(name, work, is_vital=is_vital), name=name)
        self._supervised.add(task)
        task.add_done_callback(self._supervised.discard)
        return task

    async def _rerun(self, name: str, work: Callable[[], Coroutine[Any, Any, None]], *, is_vital: bool) -> None:
        """Run `work` again after each exception, until it returns."""
        clock = asyncio.get_running_loop().time
        runs = 0
        while True:
            began_at = clock()
            watch = asyncio.get_running_loop().call_later(STEADY_S, self.failing.discard, name)
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - the supervisor
                runs = 1 if clock() - began_at >= STEADY_S else runs + 1
                pause_s = backoff_s(runs, FIRST_PAUSE_S, MAX_PAUSE_S)
                self._on_failure(name)
                _log.error("task_failed", task=name, runs=runs, again_in_s=pause_s, exc_info=error)
                if is_vital and runs >= FAILING_RUNS:
                    self.failing.add(name)
            else:
                self.failing.discard(name)
                return
            finally:
                watch.cancel()
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        """Cancel the loops started by `supervise`."""
        supervised = tuple(self._supervised)
        for task in supervised:
            task.cancel()
        if supervised:
            await asyncio.wait(supervised, timeout=CANCEL_GRACE_S)

    async def finish(self, timeout_s: float) -> int:
        """Wait for every spawned task, also later ones. Cancel what runs after `timeout_s`, and return how many."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        while self.running and clock() < deadline:
            await asyncio.wait(self.running, timeout=deadline - clock())
        late = set(self.running)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=CANCEL_GRACE_S)
        return len(late)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.running.discard(task)
        if task.cancelled():
            return
        error = task.exception()  # also marks it as retrieved
        if error is not None:
            self._on_failure(task.get_name())
            _log.error("task_failed", task=task.get_name(), exc_info=error)


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Observe how late the event loop wakes, in seconds, every LAG_INTERVAL_S until cancelled.

    Anything that blocks the loop (a long render, a slow regex, a starved CPU) delays every stream as long. uvloop's
    timers count whole milliseconds, so under it a lag below 1 ms is noise.
    """
    now = asyncio.get_running_loop().time
    while True:
        due = now() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        observe(max(0.0, now() - due))
