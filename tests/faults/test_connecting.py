"""A provider whose SYN gets no answer: its listener's queue is full, which is what a host behind a silent firewall looks like."""

import select
import socket
from contextlib import ExitStack

import pytest

from tests.faults.conftest import SHORT_S, Terms
from tests.faults.play import heard, outcomes
from tests.faults.table import OUTCOMES, SHAPES
from tests.harness.mesh import model

MOST_WAITING = 8  # a queue of 0 holds one or two
ANSWERED_S = 0.05  # on loopback a SYN that is answered at all is answered at once


@pytest.fixture
def full():
    """The port of a listener that takes nobody and has room for nobody more."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(MOST_WAITING):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
            if not select.select([], [waiting], [], ANSWERED_S)[1]:
                yield listener.getsockname()[1]
                return
        pytest.skip("this kernel answers however full the queue is")


@pytest.fixture
def terms(full):
    upstream = {"kind": "openai", "base_url": f"http://127.0.0.1:{full}/v1", "connect_timeout_s": SHORT_S}
    alone, followed = model("full", "x"), model("full", "x", "wired", "sim/fast?tokens=24")
    return Terms(upstreams={"full": upstream}, models={"alone": alone, "followed": followed})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name, outcome, attempts", [("alone", "504", b"1"), ("followed", "whole", b"2")])
async def test_it_is_given_up_in_time_and_the_next_is_asked(shape, name, outcome, attempts, stage):
    before = stage.held()
    got = await stage.ask(name, stream=shape == "stream")
    told = got.lower().partition(b"x-mesh-attempts: ")[2].partition(b"\r\n")[0]
    await stage.nothing_left(before)
    assert (await outcomes(stage, [heard(got)]), told) == ([OUTCOMES[outcome]], attempts)
