"""Attempts that fail while their provider still speaks, and providers that speak unasked: neither may keep a socket, nor reach
anyone it wasn't meant for.
"""

import asyncio
import socket

import pytest

from tests.faults.conftest import Terms
from tests.faults.phases import HEAD_END
from tests.faults.play import heard, outcomes
from tests.faults.table import OUTCOMES
from tests.harness.mesh import model
from tests.harness.provider import framed
from tests.harness.proxy import beneath

UNENDING = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked" + HEAD_END
FAILED = b'data: {"error": {"message": "no", "code": 500}}\n\n'


@pytest.fixture
async def terms(teller):
    await teller.start()
    return Terms(
        upstreams={"teller": {"kind": "openai", "base_url": teller.base_url}},
        models={"told": model("teller", "x"), "told-or-wired": model("teller", "x", "wired", "sim/fast?tokens=24")},
    )


@pytest.mark.parametrize(
    "says, model, outcome",
    [
        (UNENDING % b"text/html" + b"3\r\n<p>\r\n", "told", "502"),
        (UNENDING % b"text/event-stream" + b"%x\r\n%b\r\n" % (len(FAILED), FAILED), "told", "502"),
        (UNENDING % b"text/event-stream" + b"%x\r\n%b\r\n" % (len(FAILED), FAILED), "told-or-wired", "whole"),
    ],
    ids=["no event stream", "an error first", "an error first, and another provider"],
)
async def test_who_goes_on_after_a_failed_attempt_is_hung_up_on(says, model, outcome, stage, teller):
    before = stage.held()
    teller.says, teller.ends = [says], "silence"
    clients = [heard(await stage.ask(model, stream=True))]
    await stage.nothing_left(before)
    assert await outcomes(stage, clients) == [OUTCOMES[outcome]]


async def test_a_client_that_goes_before_the_first_event_ends_the_attempt(stage, teller):
    before = stage.held()
    teller.says, teller.ends = [UNENDING % b"text/event-stream"], "silence"
    asked = asyncio.create_task(stage.ask("told", stream=True))
    await stage.mesh.until(lambda: teller.told)
    await stage.wires["client"].strike("reset", "target")
    clients = [heard(await asked)]
    await stage.nothing_left(before)
    assert await outcomes(stage, clients) == [OUTCOMES["gone, held"]]


@pytest.mark.parametrize("how", ["an answer", "an end"])
async def test_what_an_idle_connection_brings_is_nobodys_answer(how, stage, teller):
    """Also in the turn in which the next request takes it, before the loop has looked at the socket."""
    provider = stage.mesh.worker.gateway.active.providers["teller"]
    teller.says, teller.ends = [framed([b"first"], "length", stream=False)], "silence"
    assert await (await provider.post("/x", (), b"{}")).read() == b"first"
    teller.says = [framed([b"second"], "length", stream=False)]
    with await beneath(teller.writers[0]) as wire:
        if how == "an answer":
            wire.send(framed([b"unasked"], "length", stream=False))
        else:
            wire.shutdown(socket.SHUT_WR)
        assert await (await provider.post("/x", (), b"{}")).read() == b"second"
