"""What the admin listener tells of whoever serves: one worker in this process, or several in their own."""

import time

from meshproxy.app.control import Report
from meshproxy.app.serving import Serving
from meshproxy.app.supervisor import Supervisor
from meshproxy.server.admin import Status
from meshproxy.telemetry import exposition
from meshproxy.telemetry.summary import summarize
from meshproxy.version import VERSION

Crew = Serving | Supervisor


class Panel:
    """server.admin.AdminState over a crew. `size`: how many workers it should have."""

    def __init__(self, crew: Crew, size: int) -> None:
        self._crew = crew
        self._size = size
        self._started_at = time.time()

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """Write one exposition for all workers."""
        await self._reports()
        return await exposition.render(self._crew.fleet.merged(), accept)

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
