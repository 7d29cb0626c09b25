"""The client goes and the provider dies in the same turn: the charge is that of the one that is taken for having failed."""

import asyncio

import pytest

from tests.faults.conftest import Terms
from tests.faults.phases import PHASES
from tests.faults.play import heard, written
from tests.faults.table import Outcome


@pytest.fixture
def terms():
    return Terms()


@pytest.mark.parametrize("order", [("client", "upstream"), ("upstream", "client")], ids=" before ".join)
@pytest.mark.parametrize(
    "stream, charges",
    [
        (False, {("client_disconnected", 0, "estimated"): "the prompt", ("failed", 502, "none"): "nothing"}),
        (True, {("client_disconnected", 200, "estimated"): "a part", ("upstream_failed", 200, "estimated"): "a part"}),
    ],
    ids=["unary", "stream"],
)
async def test_both_are_gone(stage, order, stream, charges):
    before = stage.held()
    phase = "in the answer's body" if stream else "before the answer"
    stage.wires["upstream"].fault = PHASES["upstream"][phase]("delay")
    asked = asyncio.create_task(stage.ask(stream=stream))
    await stage.mesh.until(lambda: stage.wires["upstream"].struck)
    for leg in order:
        stage.wires[leg].cut()
    got = await asked
    await stage.nothing_left(before)
    outcome = await written(stage, heard(got))
    assert Outcome("broken", outcome.line, "settled", charges[outcome.line]) == outcome
