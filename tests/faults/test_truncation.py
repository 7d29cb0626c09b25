"""A provider's answer ends after any of its bytes: it counts as whole only where its framing, or its [DONE], says that it is."""

import json

import pytest

from tests.faults.conftest import Terms
from tests.faults.play import heard, outcomes
from tests.faults.table import OUTCOMES, Outcome
from tests.harness.mesh import model
from tests.harness.provider import EVENTS, REPLY, framed

CUTS_OF_A_ROUTE = 9  # a route's tenth failure in a row opens its breaker
ENDS = OUTCOMES | {
    "unreported": Outcome("200", ("completed", 200, "estimated"), "settled", "a part"),
    "reported": Outcome("200, upstream_error", ("upstream_failed", 200, "reported"), "settled", "all"),
}


@pytest.fixture
def told(shape, framing):
    stream = shape == "stream"
    return framed(EVENTS if stream else [json.dumps(REPLY).encode()], framing, stream=stream)


@pytest.fixture
async def terms(told, teller, request, trusted):
    await teller.start(trusted if "ends" in request.fixturenames else None)
    routes = {f"cut-{number}": model("teller", f"cut-{number}") for number in range(len(told) // CUTS_OF_A_ROUTE + 1)}
    return Terms(upstreams={"teller": {"kind": "openai", "base_url": teller.base_url}}, models=routes)


def of_a_whole(told, cut, framing):
    """A whole answer that breaks off is no answer. One without framing is whole when its JSON is."""
    return "whole" if cut == len(told) else "502"


def of_a_stream(told, cut, framing):
    """From its first event to its [DONE], a stream that breaks off ends in an event that says so; usage that came is charged."""
    ends = [at + 2 for at in range(len(told)) if told.startswith(b"\n\n", at)]
    if framing == "end":  # after which an event may lack its blank line, and a finish reason is as good as a [DONE]
        events = sum(cut >= end - 2 for end in ends)
        return ("502", "event 502", "event 502", "unreported", "whole", "whole")[events]
    return ("502", "event 502", "event 502", "event 502", "reported", "whole")[sum(cut >= end for end in ends)]


@pytest.mark.parametrize("framing", ["length", "chunks", "end"])
@pytest.mark.parametrize("shape", ["unary", "stream"])
async def test_at_any_byte(shape, framing, told, stage, teller):
    before = stage.held()
    rule = of_a_stream if shape == "stream" else of_a_whole
    expected, clients = [], []
    for cut in range(len(told) + 1):
        teller.says = [told[:cut]]
        expected.append(ENDS[rule(told, cut, framing)])
        clients.append(heard(await stage.ask(f"cut-{cut // CUTS_OF_A_ROUTE}", stream=shape == "stream")))
    await stage.nothing_left(before)
    assert await outcomes(stage, clients) == expected


@pytest.mark.parametrize(
    "shape, framing, without, ends, outcome",
    [
        ("unary", "end", 0, "goodbye", "whole"),
        ("unary", "end", 0, "cut", "502"),
        ("stream", "end", 0, "goodbye", "whole"),
        ("stream", "end", 0, "cut", "whole"),
        ("stream", "end", len(EVENTS[-1]), "goodbye", "whole"),
        ("stream", "end", len(EVENTS[-1]), "cut", "reported"),
        ("unary", "length", 0, "cut", "whole"),
        ("stream", "chunks", 0, "cut", "whole"),
    ],
)
async def test_under_tls_the_end_must_be_the_providers_own(shape, without, ends, outcome, told, stage, teller):
    """Else whoever can cut a wire could cut an answer short (RFC 9112, section 9.8)."""
    before = stage.held()
    teller.says, teller.ends = [told[: len(told) - without]], ends
    clients = [heard(await stage.ask("cut-0", stream=shape == "stream"))]
    await stage.nothing_left(before)
    assert await outcomes(stage, clients) == [ENDS[outcome]]
