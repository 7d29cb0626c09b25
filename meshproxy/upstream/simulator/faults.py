"""Answers that are no answers: what happens instead of a reply."""

from collections.abc import Awaitable, Callable

from meshproxy.upstream.simulator import refusals
from meshproxy.upstream.simulator.ask import Ask
from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.delivery import EVENT_STREAM, PAGE
from meshproxy.upstream.simulator.journal import Journal
from meshproxy.upstream.simulator.line import JSON, Line
from meshproxy.upstream.simulator.mangle import CUTTING

BREAKING = (*CUTTING, "refuse", "reset", "stall-head")  # an answer that has no honest end
REDIRECTED = "/_sim/redirected"

Fault = Callable[[Line, Ask], Awaitable[None]]


def refuse_on_demand(behaviour: Behaviour, journal: Journal) -> None:
    """Raise the `Refusal` that was asked for: always, every Nth time, or the first N times."""
    if behaviour.status is not None:
        raise refusals.on_demand(behaviour.status, behaviour.options.retry_after)
    if behaviour.flaky is None and behaviour.fail_first is None:
        return
    count = journal.count(behaviour.name)
    if behaviour.flaky is not None and count % behaviour.flaky == 0:
        raise refusals.on_demand(500, behaviour.options.retry_after)
    if behaviour.fail_first is not None and count <= behaviour.fail_first:
        raise refusals.on_demand(503, behaviour.options.retry_after)


def fails_outright(behaviour: Behaviour) -> bool:
    """Whether OpenRouter would go on to its next model: nothing of an answer was seen."""
    return behaviour.one_of(("error-html", "refuse", "reset")) is not None


def instead_of_reply(behaviour: Behaviour) -> Fault | None:
    """What to do instead of replying, if something: called with the line and what was wanted."""
    trait = behaviour.one_of(_FAULTS)
    return _FAULTS[trait] if trait else None


async def _error_html(line: Line, _ask: Ask) -> None:
    page = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\r\n"
    await line.answer(502, [PAGE], page)


async def _not_json(line: Line, ask: Ask) -> None:
    nonsense = b"<<this is {not JSON"
    if ask.stream:
        await line.answer(200, [EVENT_STREAM], b"data: " + nonsense + b"\n\n")
    else:
        await line.answer(200, [JSON], nonsense)


async def _empty(line: Line, ask: Ask) -> None:
    await line.answer(200, [EVENT_STREAM if ask.stream else JSON], b"")


async def _redirect(line: Line, _ask: Ask) -> None:
    await line.answer(302, [("location", REDIRECTED), PAGE], b"")


async def _refuse(line: Line, _ask: Ask) -> None:
    line.close()


async def _reset(line: Line, _ask: Ask) -> None:
    line.reset()


async def _stall_head(line: Line, _ask: Ask) -> None:
    await line.silence()


_FAULTS: dict[str, Fault] = {
    "error-html": _error_html,
    "not-json": _not_json,
    "empty": _empty,
    "redirect": _redirect,
    "refuse": _refuse,
    "reset": _reset,
    "stall-head": _stall_head,
}
