"""Background tasks by name: the one way to start what outlives the code that starts it.

A spawned task is a task of its own: cancelling whoever spawned it (a handler whose client hung up) doesn't touch it, also
while it is being awaited through asyncio.shield(). To await one from code that may be cancelled, shield it: `await task`
alone passes the cancellation on. There are at most a few per request in flight, which `server.max_in_flight` bounds.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import structlog

T = TypeVar("T")

CANCEL_GRACE_S = 1.0  # what a cancelled task gets to clean up before it is left behind

_log = structlog.get_logger(__name__)


class Tasks:
    """The tasks in flight, each held by a strong reference until it ends. `on_failure` is told the name of each that raised."""

    def __init__(self, on_failure: Callable[[str], None] = lambda _: None) -> None:
        self._running: set[asyncio.Future[Any]] = set()
        self._on_failure = on_failure

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, name: str, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `coro`. Its failure is logged and counted under `name` (a fixed word such as `settle`), never lost."""
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def follow(self, future: asyncio.Future[T], then: Callable[[asyncio.Future[T]], None]) -> None:
        """Hold on to what is under way already, and call `then` with it when it is done: a task's promise at half its price."""
        self._running.add(future)
        future.add_done_callback(partial(self._followed, then))

    async def finish(self, timeout_s: float) -> int:
        """Wait for every task, those spawned meanwhile included; cancel what still runs after `timeout_s`. Gives how many."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        while self._running and clock() < deadline:
            await asyncio.wait(self._running, timeout=deadline - clock())
        late = set(self._running)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=CANCEL_GRACE_S)
        return len(late)

    def _followed(self, then: Callable[[asyncio.Future[T]], None], future: asyncio.Future[T]) -> None:
        self._running.discard(future)
        then(future)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()  # asking marks it as retrieved
        if error is not None:
            self._on_failure(task.get_name())
            _log.error("task_failed", task=task.get_name(), exc_info=error)
