"""An upgrade and a downgrade under load: the release before this one and this one, over one Redis at the same time.

The earlier release runs from the repository's own history with the libraries of this one. Whatever the order in which instances
are replaced, no request fails, each is charged once, and the account's books are what one release alone would have written.
"""

import asyncio
import signal
import subprocess
import tarfile
from io import BytesIO

import pytest

from tests.deploy.conftest import ROOT, tell
from tests.harness.waiting import until

EARLIER = "910efae778dcfccd78df6e14465eedcaf32e4252"  # the last commit before 0.1.0's formats were final
MODEL = "sim/plain?tokens=6&tps=200"
CALLERS = 4


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The folder of the earlier release."""
    packed = subprocess.run(("git", "-C", str(ROOT), "archive", EARLIER, "meshproxy"), check=False, capture_output=True)
    if packed.returncode:
        pytest.skip("the clone has no history (git fetch --unshallow)")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Fleet:
    """Two instances behind a balancer that sends each request to one that is ready."""

    def __init__(self, site, earlier):
        self.site = site
        self.releases = {"earlier": {"env": {"PYTHONPATH": str(earlier)}, "cwd": earlier}, "this": {}}
        self.ready = []
        self.answered = []  # an empty text, or what went wrong

    async def add(self, release):
        gateway = self.site.configure(models=(MODEL,), drain_s=10, workers=1)
        await gateway.started(**self.releases[release])
        self.ready.append(gateway)
        return gateway

    async def remove(self, gateway):
        self.ready.remove(gateway)
        gateway.send(signal.SIGTERM)
        assert await gateway.exit() == 0
        assert [line for line in gateway.lines if line["level"] == "error"] == []

    async def load(self, caller, until_set):
        number = 0
        while not until_set.is_set():
            number += 1
            gateway = self.ready[number % len(self.ready)]
            if number % 2:
                stream = await self.site.stream(gateway.url, caller, MODEL)
                self.answered.append("" if stream.is_whole else f"{stream.status} {stream.broken} {stream.events[-1:]}")
                continue
            answer = await self.site.chat(gateway, caller, model=MODEL)
            self.answered.append("" if answer.is_whole and "x-mesh-cost" in answer.headers else answer.body_text)

    async def passed(self, count):
        """Wait for so many more answers."""
        goal = len(self.answered) + count
        await until(lambda: len(self.answered) >= goal, f"{count} answers")


async def test_instances_of_two_releases_share_one_redis_in_every_order(site, earlier):
    fleet = Fleet(site, earlier)
    caller = await site.key()
    instances = [await fleet.add("earlier"), await fleet.add("earlier")]
    stop = asyncio.Event()
    load = [asyncio.create_task(fleet.load(caller, stop)) for _ in range(CALLERS)]
    await fleet.passed(40)
    for release in ("this", "this", "earlier", "earlier", "this"):  # upgraded, downgraded, and once more
        instances.append(await fleet.add(release))
        await fleet.passed(20)
        await fleet.remove(instances.pop(0))
        await fleet.passed(20)
    stop.set()
    await asyncio.gather(*load)
    tell(f"{len(fleet.answered)} answers while five instances were replaced")
    assert [failed for failed in fleet.answered if failed] == []
    events = await site.settled(caller, len(fleet.answered))
    balance = await site.books.ledger.balance(caller.account)
    assert len(events) == len(fleet.answered)
    assert sum(int(event["cost_nusd"]) for event in events) == balance.settled_nusd
    assert {event["usage_source"] for event in events} == {"reported"}
