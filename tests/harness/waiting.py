"""Wait for a condition, with a bound."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 30.0  # for what should take milliseconds, on a busy machine
POLL_S = 0.01


async def until(
    condition: Callable[[], Any], what: str = "it to be so", timeout_s: float = PATIENCE_S, poll_s: float = POLL_S
) -> Any:
    """Return what a condition gives once that is true. A condition may be a coroutine function."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(poll_s)


def wait_until(condition: Callable[[], Any], what: str = "it to be so", timeout_s: float = PATIENCE_S) -> Any:
    """As `until`, for what happens in another thread or process."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(POLL_S)
    return found
