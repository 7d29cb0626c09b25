"""Print what a seed's history is and what came of it: the transcript, what was charged, and what is wrong with that."""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from meshproxy.ledger.store import script_text
from simulation.bills import allowed_charges, text_of
from simulation.client import Sight
from simulation.history import MODELS, UPSTREAMS, History, Model, Price, describe, draw
from simulation.provider import Call
from simulation.record import Finding, Record, View
from simulation.run import Line
from simulation.shrink import shrunk
from simulation.story import Played, played

TIME_WIDTH: Final = 11  # of a line
POLLED: Final = 2  # lines that may take turns
SOON_S: Final = 0.001  # after which a request is called late
MOST_TEXT: Final = 100  # characters of a body or an answer's text
PLAIN_HEADERS: Final = frozenset(
    {"cache-control", "connection", "content-length", "date", "server", "transfer-encoding"}
)
_PARTICULAR: Final = re.compile(r"""\[.*\]|\{.*\}|\(.*\)|'[^']*'|"[^"]*"|(?:\b(?:id-|mk)?[a-z]?|-)[0-9][0-9a-z._-]*""")
LOGGED_ELSEWHERE: Final = frozenset({"timestamp", "level", "event", "logger", "client", "key_id", "account"})
_REPLY: Final = re.compile(r"^-- (reply .*(?:\n--  .*)*)", re.MULTILINE)  # of the comment at a script's beginning


def replay(seed: int, *, whole: bool = False) -> int:
    """Print what a seed's history is and what came of it; of the smallest one that fails alike, if it fails.

    The transcript has what happened from the first step to the end of the last one; `whole`: set-up and reading too.
    """
    history = draw(seed)
    done = played(history)
    is_broken = bool(done.findings)
    if is_broken:
        kept = _gist(done.findings[0])
        smallest = shrunk(history, lambda smaller: kept in map(_gist, played(smaller, is_traced=False).findings))
        print(f"shrunk from {len(history.steps)} steps to {len(smallest.steps)} that break {kept[0]} alike")
        done = played(smallest)
    print("\n".join([*describe(done.history), *_models(done.history)]))
    lines = _transcript(done, whole=whole)
    print("\nTranscript: seconds as in at_s, where, what\n")
    print("\n".join(_folded(lines)))
    print("\nReplies of the store's scripts, by place\n")
    print("\n".join(_replies(lines)))
    if done.record is not None:
        print("\nCharges in nano-USD, beside what the providers' bills allow\n")
        print("\n".join(_charges(done.record)))
    print()
    for finding in done.findings:
        print(f"{finding.rule}: {finding.words}")
    if not done.findings:
        print("no rule is broken")
    return 1 if is_broken else 0


def _gist(finding: Finding) -> tuple[str, str]:
    """Return what a shrunk history must keep of a finding: the rule and its words, without numbers, names and quotations."""
    return finding.rule, re.sub("#(, #)+", "#", _PARTICULAR.sub("#", finding.words))


def _models(history: History) -> Iterator[str]:
    """Describe the models that requests name, and their upstreams, where these aren't usual."""
    from_start = {name: MODELS[name] for request in history.requests for name in (request.model, *request.fallbacks)}
    for name, model in sorted(from_start.items()):
        yield f"  model {name}: {_model(model)}"
    routes = {route for model in from_start.values() for route in model.routes}
    yield from (f"  upstream {route}: {UPSTREAMS[route]}" for route in sorted(routes))


def _model(model: Model) -> str:
    services = [f"service tier {name}: {_price(price)}" for name, price in model.services]
    traits = [
        f"{name} = {getattr(model, name)}" for name in ("hidden_reasoning", "from_usage_cost") if getattr(model, name)
    ]
    return "; ".join([f"asks {', then '.join(model.routes)}; {_price(model.price)}", *services, *traits])


def _price(price: Price) -> str:
    """Describe a price in nano-USD a token, as a number of tokens is multiplied by it."""
    parts = {"cached": price.cached, "reasoning": price.reasoning}
    words = [f"{price.input / 1e6:g} a token of prompt, {price.output / 1e6:g} of output"]
    words += [f"{part / 1e6:g} of {name}" for name, part in parts.items() if part is not None]
    words += [f"{price.request} a request"] * bool(price.request)
    words += [f"above {above} tokens of prompt: {_price(tier)}" for above, tier in price.tiers]
    return ", ".join(words)


def _transcript(done: Played, *, whole: bool) -> list[str]:
    """Return the lines of a history in order of time, with what its clients sent and saw."""
    outcome = done.outcome
    first, last = outcome.marks.get("steps", 0.0), outcome.marks.get("books", float("inf"))
    if whole:
        first, last = 0.0, float("inf")
    lines = [_shorter(line) for line in outcome.lines]
    if done.record is not None:
        began = outcome.marks.get("steps", 0.0)
        lines += [line for sight in done.record.sights for line in _of_client(sight, began)]
        lines += _of_credit(done.record)
        lines += [line for call in done.record.calls for line in _of_provider(call)]
    return outcome.told(sorted((line for line in lines if first <= line[0] <= last), key=lambda line: line[0]))


def _folded(lines: Iterable[str]) -> Iterator[str]:
    """Leave out what is asked again and again, such as whether another worker has the answer to a repeat."""
    latest: deque[str] = deque(maxlen=POLLED)
    times, until = 0, ""
    for line in lines:
        at, text = line[:TIME_WIDTH], line[TIME_WIDTH:]
        if text in latest:
            times, until = times + 1, at
            continue
        if times:
            yield f"{until}  ... {times} more lines like the last ones"
        times = 0
        latest.append(text)
        yield line
    if times:
        yield f"{until}  ... {times} more lines like the last ones"


def _shorter(line: Line) -> Line:
    """Leave out of a request's log line what is the same in all."""
    at, text, values = line
    if not (values and isinstance(values[-1], str) and values[-1].startswith("{")):
        return line
    logged = json.loads(values[-1])
    told = " ".join(f"{name}={json.dumps(value)}" for name, value in logged.items() if name not in LOGGED_ELSEWHERE)
    return at, text, (*values[:-1], f"log: {told}")


def _of_client(sight: Sight, began: float) -> Iterator[Line]:
    """Describe when a client sent a request, and what it saw. `began`: when the steps did."""
    name = sight.request_id.removeprefix("id-")
    late_s = 0.0 if sight.again else sight.began_at - began - sight.request.at_s
    waited = f", {late_s:.3f} s late: its connection was in use" if sight.request.connection and late_s > SOON_S else ""
    sent = (name, sight.worker, waited, _cut(sight.body.decode()))
    yield sight.began_at, "%s: the client sends it to gateway-%d%s: %s", sent
    if not sight.status:
        seen = "no answer"
    else:
        shown = [f"{header}: {value}" for header, value in sight.headers.items() if header not in PLAIN_HEADERS]
        error = sight.error
        told = f"error {error.get('code')}: {error.get('message')}" if error else _text(sight)
        seen = "; ".join([f"status {sight.status}", "a stream" if sight.is_stream else "whole", *shown, told])
        if sight.is_stream:
            seen += "; [DONE]" if "[DONE]" in sight.data else "; no [DONE]"
    yield sight.ended_at, "%s: the client saw %s; the end: %s", (name, seen, sight.ended)


def _text(sight: Sight) -> str:
    """Return the beginning of an answer's text and its length."""
    lines = sight.data if sight.is_stream else [sight.payload.decode(errors="replace")]
    text = "".join(map(text_of, lines))
    return f"text {_cut(text)!r} ({len(text)} characters)"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def _of_provider(call: Call) -> Iterator[Line]:
    """Tell what a provider was asked and what it did."""
    where = f"provider {call.upstream}, call {call.number} ({call.marker})"
    yield call.at, "%s: asked for %s", (where, {key: value for key, value in call.body.items() if key != "messages"})
    if call.ended_at:
        said = f"{call.shown_sent} of {call.shown} tokens of text{', a report' if call.reported else ''} sent"
        yield call.ended_at, "%s: the end: %s, %s", (where, call.ended, said)


def _of_credit(record: Record) -> Iterator[Line]:
    """Describe which script changed an account's credit, and which holds were abandoned."""
    last = {number: (credit, 0) for number, credit in enumerate(record.history.credit)}
    for sample in record.samples:
        balance, held = last[sample.account]
        last[sample.account] = sample.balance, sample.held
        if last[sample.account] != (balance, held):
            told = (
                sample.account,
                sample.balance,
                sample.balance - balance,
                sample.held,
                sample.held - held,
                sample.script,
            )
            yield sample.at, "store: a%d has %d (%+d), held %d (%+d) after %s", told
    for number, book in record.books.items():
        for event in book.events:
            if event["event"] == "abandoned":
                at = int(event["abandoned_ms"]) / 1000 - record.store_offset_s
                yield (
                    at,
                    "store: a%d's hold %s was abandoned: it held %s",
                    (number, event["hold_id"], event["held_nusd"]),
                )


def _replies(lines: Iterable[str]) -> Iterator[str]:
    """Describe what the numbers mean in the replies of the scripts that a transcript has."""
    for name in sorted({found[1] for line in lines if (found := re.search(r"  store: ([a-z_]+) ", line))}):
        try:
            found = _REPLY.search(script_text(name))
        except FileNotFoundError:
            continue
        if found is not None:
            yield f"  {name}: {' '.join(found[1].replace('--', ' ').removeprefix('reply').split())}"


def _charges(record: Record) -> Iterator[str]:
    """Set each request's charge beside what the model of the bill allows."""
    view = View(record)
    for sight in record.sights:
        allowed = sorted(
            {f"{low}" if low == high else f"{low} to {high}" for low, high in allowed_charges(view, sight)}
        )
        bills = [
            f"{call.upstream} bills {call.bill.prompt} + {call.bill.completion} tokens"
            + (f" at {call.bill.cost_nusd} nano-USD" if call.bill.cost_nusd is not None else "")
            + ("" if call.reported else ", unreported")
            for call in view.own_calls(sight)
        ]
        name = sight.request_id.removeprefix("id-")
        right, billed = " or ".join(allowed) or "nothing", "; ".join(bills) or "no call"
        yield f"  {name}: charged {view.charge(sight)}, allowed {right} ({billed})"
