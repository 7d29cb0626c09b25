"""Wait for a condition, with a bound."""

import asyncio
import inspect
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PATIENCE_S = 30.0  # for what should take milliseconds, on a busy machine
POLL_S = 0.01

Exceptions = type[BaseException] | tuple[type[BaseException], ...]


async def until(
    condition: Callable[[], Any],
    what: str = "it to be so",
    timeout_s: float = PATIENCE_S,
    poll_s: float = POLL_S,
    not_yet: Exceptions = (),
) -> Any:
    """Return what a condition gives once that is true. It may be a coroutine function; `not_yet`: what it may raise before."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = None
        with suppress(not_yet):
            outcome = condition()
            found = await outcome if inspect.isawaitable(outcome) else outcome
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(poll_s)


def wait_until(
    condition: Callable[[], Any], what: str = "it to be so", timeout_s: float = PATIENCE_S, not_yet: Exceptions = ()
) -> Any:
    """As `until`, for what happens in another thread or process."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = None
        with suppress(not_yet):
            found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(POLL_S)


async def until_equal(look: Callable[[], Any], expected: Any, timeout_s: float = PATIENCE_S) -> None:
    """Return when it looks as expected; fail with the difference if it doesn't come to that."""
    with suppress(AssertionError):
        await until(lambda: look() == expected, timeout_s=timeout_s)
    assert look() == expected


async def turns(count: int = 10) -> None:
    """Let the loop go round: what is ready runs, nothing is waited for."""
    for _ in range(count):
        await asyncio.sleep(0)


class SkewedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time a test moves by `skew`, in seconds."""

    skew = 0.0

    def time(self) -> float:
        return super().time() + self.skew
