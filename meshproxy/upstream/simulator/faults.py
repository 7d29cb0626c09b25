"""Answers that are no answers: what happens instead of a reply."""

from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.dialects import Kind
from meshproxy.upstream.simulator.journal import Journal
from meshproxy.upstream.simulator.line import EVENT_STREAM, JSON, PAGE, Line
from meshproxy.upstream.simulator.mangle import CUTTING
from meshproxy.upstream.simulator.refusals import on_demand

REFUSALS: dict[str, Kind] = {
    "error-context": "context",
    "error-filter": "filter",
    "error-quota": "quota",
    "error-key": "key",
}
OUTRIGHT = ("error-html", "refuse", "reset")  # OpenRouter would go on to its next model: nothing of an answer was seen
INSTEAD = ("error-html", "not-json", "empty", "redirect", "refuse", "reset", "stall-head")
BREAKING = (*CUTTING, "refuse", "reset", "stall-head")  # an answer that has no honest end
REDIRECTED = "/_sim/redirected"

HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\r\n"
NONSENSE = b"<<this is {not JSON"


def refuse_on_demand(behaviour: Behaviour, journal: Journal) -> None:
    """Raise the `Refusal` that was asked for: always, every Nth time, or the first N times."""
    numbers, retry_after_s = behaviour.numbers, behaviour.options.retry_after
    if refused := behaviour.one_of(REFUSALS):
        raise behaviour.dialect.refusal(REFUSALS[refused])
    if "error" in numbers:
        raise on_demand(numbers["error"], retry_after_s)
    if not numbers.keys() & {"flaky", "fail-first"}:
        return
    count = journal.count(behaviour.name)
    if "flaky" in numbers and count % numbers["flaky"] == 0:
        raise on_demand(500, retry_after_s)
    if count <= numbers.get("fail-first", 0):
        raise on_demand(503, retry_after_s)


async def misbehave(fault: str, line: Line, *, stream: bool) -> None:
    """One of `INSTEAD`."""
    kind = EVENT_STREAM if stream else JSON
    match fault:
        case "error-html":
            await line.answer(502, [PAGE], HTML)
        case "not-json":
            await line.answer(200, [kind], b"data: %b\n\n" % NONSENSE if stream else NONSENSE)
        case "empty":
            await line.answer(200, [kind], b"")
        case "redirect":
            await line.answer(302, [("location", REDIRECTED), PAGE], b"")
        case "refuse":
            line.close()
        case "reset":
            line.reset()
        case "stall-head":
            await line.silence()
