"""Print what a seed's history is and what came of it: the transcript, what was charged, and what is wrong with that."""

import json
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from meshproxy.ledger.store import script_text
from simulation.bills import allowed_charges, text_of
from simulation.client import Sight
from simulation.drawing import draw
from simulation.history import MODELS, UPSTREAMS, History, Model, Outage, Price, describe
from simulation.provider import Call
from simulation.record import Done, Finding, Record, View
from simulation.run import HOLD_OF, Line
from simulation.shrink import shrunk
from simulation.story import Played, played

TIME_WIDTH: Final = 11  # of a line
POLLED: Final = 2  # lines that may take turns
NOT_FOLDED: Final = ("  fault", "  outage", "  operator", "  look")
SOON_S: Final = 0.001  # after which a request is called late
MOST_TEXT: Final = 100  # characters of a body or an answer's text
PLAIN_HEADERS: Final = frozenset(
    {"cache-control", "connection", "content-length", "date", "server", "transfer-encoding"}
)
_NUMBER: Final = r"(?:\b(?:id-|mk)?[a-z]?|-)[0-9][0-9a-z._-]*"
_PARTICULAR: Final = re.compile(_NUMBER)
_FIELD: Final = re.compile(r"""(?<!\w)['"]([a-z_-]+)['"]: """)  # its name, in a dictionary
_QUOTED: Final = re.compile(r"""(?<!\w)b?(?:'[^']*'|"[^"]*")""")
_BRACKETED: Final = re.compile(r"[\[({]([^][(){}]*)[])}]")  # with no brackets inside
_COMPARED: Final = re.compile(
    r"(?P<number>-?{0})(?P<of> s| of {0} [a-z]+ remain)?, and (?P<rights>{0}(?:(?:\.\.|, | to ){0})*|nothing)"
    r"(?P<end>(?: s)? (?:would be right|may)\b)".format(r"[0-9]+(?:\.[0-9]+)?")
)
_STORES: Final = re.compile(r"(?<=  store: ).*")
_HOLD: Final = re.compile(r"\b[0-9a-f]+\b")
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
    """Return what a shrunk history must keep of a finding: the rule and its words, without numbers, names and quotations.

    The fields that a dictionary has are kept, and whether a number is above or below what would be right.
    """
    words = _QUOTED.sub("#", _FIELD.sub(r"\1=", _COMPARED.sub(_way, finding.words)))
    found = 1
    while found:
        words, found = _BRACKETED.subn(_names_in, words)
    return finding.rule, re.sub("#(, #)+", "#", _PARTICULAR.sub("#", words))


def _way(compared: re.Match[str]) -> str:
    """Return whether a number is above or below all that would be right."""
    number = float(compared["number"])
    rights = [float(each) for each in re.findall(r"[0-9]+(?:\.[0-9]+)?", compared["rights"])] or [0.0]
    way = "more" if number > max(rights) else "less" if number < min(rights) else "neither"
    return f"{way}{compared['of'] or ''} than{compared['end']}"


def _names_in(bracketed: re.Match[str]) -> str:
    """Return the names of a dictionary's fields, and of what else is in brackets nothing."""
    names = re.findall(r"([a-z_-]+)=", bracketed[1]) if bracketed[0].startswith("{") else []
    return f"#<{' '.join(names)}>" if names else "#"


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
    lines = [_shorter(line) for line in outcome.lines if line[0] <= last and line[1] is not HOLD_OF]
    if done.record is not None:
        began, attempts = outcome.marks.get("steps", 0.0), _attempts(done.record)
        lines += [line for step in done.history.steps if isinstance(step, Outage) for line in _of_outage(step, began)]
        lines += [line for change in done.record.changes for line in _of_change(change)]
        for sight in done.record.sights:
            lines += [*_of_client(sight, began), *_of_bytes(sight)]
        lines += _of_credit(done.record)
        lines += [line for call in done.record.calls for line in _of_provider(call, attempts.get(id(call)))]
    told = outcome.told(sorted((line for line in lines if first <= line[0]), key=lambda line: line[0]))
    names = {
        hold: _name(request_id)
        for _, text, values in outcome.lines
        if text is HOLD_OF
        for *_, request_id, hold in [values]
    }

    def named(hold: re.Match[str]) -> str:
        return f"{hold[0]} ({names[hold[0]]})" if hold[0] in names else hold[0]

    return [_STORES.sub(lambda rest: _HOLD.sub(named, rest[0]), line) for line in told]


def _name(request_id: str) -> str:
    return request_id.removeprefix("id-")


def _of_outage(outage: Outage, began: float) -> Iterator[Line]:
    """Describe when an upstream fails every call, and when no more."""
    start, answer = began + outage.at_s, outage.answer
    told = f"status {answer.status} {answer.error}".strip()
    yield start, "outage begins: %s gives every call %s, for %g s", (outage.upstream, told, outage.for_s)
    yield start + outage.for_s, "outage ends: %s", (outage.upstream,)


def _of_change(done: Done) -> Iterator[Line]:
    """Describe what an operator changes, and when that is done."""
    words = {
        "grant": f"grants a{done.account} {done.amount} nano-USD ({done.ref})",
        "template": f"changes the template of a{done.account} to version {done.amount}",
        "requests_per_minute": f"gives k{done.key} {done.amount} requests per minute",
    }.get(done.what, f"{done.what}s k{done.key}")
    yield done.began_at, "operator: %s", (words,)
    yield done.ended_at, "operator: %s: %s", (words, "done" if done.ok else "it failed")


def _attempts(record: Record) -> dict[int, tuple[str, int]]:
    """Return whose call each one is, by its identity, and which attempt of that request, counted as the gateway does.

    An attempt that reached no provider is known from the log.
    """
    view, attempts = View(record), {}
    for sight in record.sights:
        failed = {line["attempt"]: line["upstream"] for line in record.failed if line["request_id"] == sight.request_id}
        number = 1
        for call in view.own_calls(sight):
            if call.at < sight.began_at:
                continue  # of the same request, before it was sent again
            while failed.get(number, call.upstream) != call.upstream:
                number += 1
            attempts[id(call)] = _name(sight.request_id), number
            number += 1
    return attempts


def _folded(lines: Iterable[str]) -> Iterator[str]:
    """Leave out what is asked again and again, such as whether another worker has the answer to a repeat."""
    latest: deque[str] = deque(maxlen=POLLED)
    times, until = 0, ""
    for line in lines:
        at, text = line[:TIME_WIDTH], line[TIME_WIDTH:]
        if text in latest and not text.startswith(NOT_FOLDED):
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
    name = _name(sight.request_id)
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
        seen = "; ".join(
            [
                f"status {sight.status}",
                f"a stream of {len(sight.data)} events" if sight.is_stream else "whole",
                *shown,
                told,
            ]
        )
        if sight.is_stream:
            seen += "; [DONE]" if "[DONE]" in sight.data else "; no [DONE]"
    yield sight.ended_at, "%s: the client saw %s; the end: %s", (name, seen, sight.ended)


def _of_bytes(sight: Sight) -> Iterator[Line]:
    """Describe when a client got the first bytes, a stream's first event, and comments, such as the pings between two events."""
    if not sight.times:
        return
    name, lengths = _name(sight.request_id), [length for _, length in sight.times]
    yield sight.times[0][0], "%s: the client gets the first bytes, of status %d", (name, sight.status)
    length, events = 0, 0
    comment, times = b"", [0.0]
    for block in [*sight.payload.split(b"\n\n")[:-1], b""] if sight.is_stream else []:
        length += len(block) + 2
        at = sight.times[bisect_left(lengths, length)][0] if block else 0.0
        if comment and block != comment:
            more = f", and {len(times) - 1} more in {times[-1] - times[0]:.3f} s" if len(times) > 1 else ""
            yield times[0], "%s: the client gets the comment %r%s", (name, comment.decode(errors="replace"), more)
        if block.startswith(b":"):
            times = [*times, at] if block == comment else [at]
            comment = block
            continue
        comment = b""
        if block and not events:
            yield at, "%s: the client gets the first event", (name,)
        events += 1


def _text(sight: Sight) -> str:
    """Return the beginning of an answer's text and its length."""
    lines = sight.data if sight.is_stream else [sight.payload.decode(errors="replace")]
    text = "".join(map(text_of, lines))
    return f"text {_cut(text)!r} ({len(text)} characters)"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def _of_provider(call: Call, attempt: tuple[str, int] | None) -> Iterator[Line]:
    """Describe what a provider was asked and what it did. `attempt`: whose call it is, and the gateway's number of it."""
    whose = ""
    if attempt is not None and (attempt[1] != call.number + 1 or not call.marker.endswith(f"{attempt[0]}z")):
        whose = f"; attempt {attempt[1]} of {attempt[0]}"
    where = f"provider {call.upstream}, call {call.number + 1} ({call.marker}{whose})"
    asked = json.dumps({key: value for key, value in call.body.items() if key != "messages"})
    yield call.at, "%s: asked for %s", (where, asked)
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
        name = _name(sight.request_id)
        right, billed = " or ".join(allowed) or "nothing", "; ".join(bills) or "no call"
        yield f"  {name}: charged {view.charge(sight)}, allowed {right} ({billed})"
