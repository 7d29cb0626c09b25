"""The client goes in the turn in which the answer ends or the provider dies: the charge and the outcome are those of the one
that is taken for having ended it.
"""

import asyncio

import pytest

from meshproxy.gateway.exchange import Call
from tests.faults.conftest import Terms
from tests.faults.phases import PHASES
from tests.faults.play import heard, written
from tests.faults.table import Outcome
from tests.gateway import parts
from tests.harness.mesh import model


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


class Reader(parts.Client):
    """A client that closes its connection as soon as it has read the `last` of a stream."""

    handler = None

    def __init__(self, last):
        super().__init__()
        self.last = last

    def begin(self, headers):
        pass

    def write(self, payload, frame=None):
        super().write(payload, frame)
        if self.last in payload:
            self.handler.cancel()


@pytest.mark.parametrize("idempotency_key", [None, "once"])
@pytest.mark.parametrize(
    "name, last, expected",
    [
        ("die-mid-stream", b'"error"', ("upstream_failed", "upstream_error", "estimated")),
        ("error-mid-stream", b'"error"', ("upstream_failed", "upstream_error", "estimated")),
        ("plain?tokens=8&tps=1000", b"[DONE]", ("completed", None, "reported")),
        ("plain?tokens=8&tps=1000", b'"content"', ("client_disconnected", None, None)),
    ],
)
async def test_a_client_that_closes_when_it_has_read_the_end_has_not_ended_it(
    start_mesh, idempotency_key, name, last, expected
):
    mesh = await start_mesh(models={"m": model("sim", f"sim/{name}")})
    caller = await mesh.key()

    async def read_body(_take):
        return b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "Hi"}]}'

    now = asyncio.get_running_loop().time()
    call = Call("r1", caller.auth["authorization"], read_body, now, idempotency_key=idempotency_key)
    client = Reader(last)
    client.handler = asyncio.create_task(mesh.worker.gateway.chat(call, client))
    await asyncio.wait([client.handler])
    source = (await mesh.settlement(caller))["usage_source"]
    line = mesh.log.lines[-1]
    assert (line["outcome"], line["code"], expected[2] and source) == expected
