"""A worker process as its supervisor sees it."""

import asyncio
import contextlib
import time

from meshproxy.app.control import Control, Drain, Hurry, Question
from meshproxy.server.admin import WorkerStatus

ANSWER_S = 2.0  # a worker that takes longer to answer is left out of a scrape


class Child:
    """One worker process and the line to it."""

    def __init__(self, number: int, restarts: int, process: asyncio.subprocess.Process, control: Control) -> None:
        self.number = number
        self._restarts = restarts
        self._started_at = time.time()
        self.process = process
        self.control = control

    async def ask(self, question: Question) -> bytes | None:
        """The answer, still encoded, or None from a worker that is gone or stuck."""
        try:
            return await asyncio.wait_for(self.control.ask(question), ANSWER_S)
        except (ConnectionError, TimeoutError):
            return None

    def tell(self, order: Drain | Hurry) -> None:
        """Give an order that has no answer. One who is gone needs none."""
        with contextlib.suppress(ConnectionError):
            self.control.send(order)

    def status(self, now: float, *, stopping: bool) -> WorkerStatus:
        """Its line on the status page."""
        state = "draining" if stopping else "running"
        return {
            "pid": self.process.pid,
            "state": state,
            "uptime_s": now - self._started_at,
            "restarts": self._restarts,
        }
