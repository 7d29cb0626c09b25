"""What the admin listener tells of whoever serves: one worker in this process, or several in their own."""

import time
from asyncio import Event
from typing import Protocol

from msgspec import Struct

from meshproxy.app.reload import Standing
from meshproxy.server.admin import Status, WorkerStatus
from meshproxy.telemetry import exposition
from meshproxy.telemetry.snapshot import Fleet
from meshproxy.telemetry.summary import summarize
from meshproxy.version import VERSION


class Report(Struct, frozen=True):
    """How a worker is: its metrics (telemetry.snapshot), why it isn't ready, and whether it has the ledger."""

    snapshot: bytes
    not_ready: list[str]
    connected: bool


class Crew(Protocol):
    """Who serves. `up` is set once every worker has been up; `fleet` remembers what workers that are gone have counted."""

    standing: Standing
    up: Event
    fleet: Fleet

    async def start(self) -> None:
        """Begin to serve."""

    async def apply(self, standing: Standing) -> None:
        """Let this hold from now on."""

    async def reports(self) -> dict[int, Report]:
        """How each worker is that says so in time, by its number."""

    def workers(self) -> list[WorkerStatus]:
        """The workers that are up."""

    async def stop(self) -> None:
        """Drain, settle and end."""

    def hurry(self) -> None:
        """End what runs now, and wait for nothing in stop()."""


class Panel:
    """server.admin.AdminState over a crew. `size`: how many workers it should have."""

    def __init__(self, crew: Crew, size: int) -> None:
        self._crew = crew
        self._size = size
        self._started_at = time.time()

    async def metrics(self, *, openmetrics: bool) -> bytes:
        """One exposition for all workers."""
        await self._reports()
        return await exposition.render(self._crew.fleet.merged(), openmetrics=openmetrics)

    async def ready(self) -> list[str]:
        """Why a balancer should send nothing here: not all serve yet, nobody does, or everybody has a reason."""
        return self._reasons(await self._reports())

    async def status(self) -> Status:
        """The status page's figures."""
        reports = await self._reports()
        return {
            **summarize(self._crew.fleet.merged()),
            "version": VERSION,
            "uptime_s": time.time() - self._started_at,
            "not_ready": self._reasons(reports),
            "max_in_flight": self._crew.standing.settings.server.max_in_flight * self._size,
            "ledger_state": "up" if any(report.connected for report in reports) else "down",
            "workers": self._crew.workers(),
        }

    def _reasons(self, reports: list[Report]) -> list[str]:
        if (
            not self._crew.up.is_set()
        ):  # the kernel deals connections out to every socket, also to one without its worker yet
            return ["starting"]
        if any(not report.not_ready for report in reports):
            return []
        return sorted({reason for report in reports for reason in report.not_ready}) or ["no worker is up"]

    async def _reports(self) -> list[Report]:
        reports = await self._crew.reports()
        for number, report in reports.items():
            self._crew.fleet.report(number, report.snapshot)
        return list(reports.values())
