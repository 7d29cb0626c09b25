"""What comes of each fault of each leg at each phase of a request: the table of docs/reliability.md."""

from typing import NamedTuple

from tests.faults.phases import IDLE, WAITING
from tests.faults.proxy import MODES

GENTLE = ("delay", "drip")
SHAPES = ("unary", "stream")

Case = tuple[str, str, str, str]  # leg, phase, mode, shape


class Outcome(NamedTuple):
    """What a case comes to: what the client gets; outcome, status and usage source in the log, None for no line; what became of
    holds; what the account pays.
    """

    client: str
    line: tuple[str, int, str] | None
    hold: str
    charge: str


OUTCOMES = {
    "whole": Outcome("200", ("completed", 200, "reported"), "settled", "all"),
    "unheard": Outcome("broken", ("completed", 200, "reported"), "settled", "all"),
    "no request": Outcome("broken", None, "", "nothing"),
    "gone": Outcome("broken", ("client_disconnected", 0, "none"), "", "nothing"),
    "gone, held": Outcome("broken", ("client_disconnected", 0, "none"), "settled", "nothing"),
    "gone midway": Outcome("broken", ("client_disconnected", 200, "estimated"), "settled", "a part"),
    "408": Outcome("broken", ("failed", 408, "none"), "", "nothing"),
    "502": Outcome("502 upstream_error", ("failed", 502, "none"), "settled", "nothing"),
    "504": Outcome("504 gateway_timeout", ("failed", 504, "none"), "settled", "nothing"),
    "event 502": Outcome("200, upstream_error", ("upstream_failed", 200, "estimated"), "settled", "a part"),
    "event 504": Outcome("200, gateway_timeout", ("upstream_failed", 200, "estimated"), "settled", "a part"),
    "503": Outcome("503 ledger_unavailable", ("failed", 503, "none"), "", "nothing"),
    "503, held": Outcome("503 ledger_unavailable", ("failed", 503, "none"), "abandoned", "nothing"),
}

# leg and phase: what comes of an end (reset, half-close, truncate), and of silence (blackhole); unary / stream where they differ.
# What only takes longer (delay, drip) is always whole.
TABLE = {
    ("client", "connected"): ("no request", "no request"),
    ("client", "in the request's head"): ("no request", "no request"),
    ("client", "in the request's body"): ("gone", "408"),
    ("client", "behind the request"): ("gone", "unheard"),
    ("client", WAITING): ("gone, held", "unheard"),
    ("client", "before the answer"): ("unheard / gone midway", "unheard"),
    ("client", "in the answer's head"): ("unheard / gone midway", "unheard"),
    ("client", "behind the answer's head"): ("unheard / gone midway", "unheard"),
    ("client", "in the answer's body"): ("unheard / gone midway", "unheard"),
    ("client", "at the answer's end"): ("unheard", "unheard"),
    ("upstream", IDLE): ("whole", "504"),
    ("upstream", "connected"): ("502", "504"),
    ("upstream", "in the request's head"): ("502", "504"),
    ("upstream", "in the request's body"): ("502", "504"),
    ("upstream", "behind the request"): ("502", "504"),
    ("upstream", "before the answer"): ("502", "504"),
    ("upstream", "in the answer's head"): ("502", "504"),
    ("upstream", "behind the answer's head"): ("502", "504"),
    ("upstream", "in the answer's body"): ("502 / event 502", "504 / event 504"),
    ("upstream", "at the answer's end"): ("502 / whole", "504 / whole"),
    ("Redis", "connected"): ("503", "503"),
    ("Redis", "admit, in the call"): ("503", "503"),
    ("Redis", "admit, before the reply"): ("503, held", "503, held"),
    ("Redis", "admit, in the reply"): ("503, held", "503, held"),
    ("Redis", "renew, in the call"): ("whole", "whole"),
    ("Redis", "renew, before the reply"): ("whole", "whole"),
    ("Redis", "renew, in the reply"): ("whole", "whole"),
    ("Redis", "settle, in the call"): ("whole", "whole"),
    ("Redis", "settle, before the reply"): ("whole", "whole"),
    ("Redis", "settle, in the reply"): ("whole", "whole"),
}


def cases_of(leg: str) -> list[Case]:
    """Every case of a leg. Only streams renew."""
    return [
        (leg, phase, mode, shape)
        for of, phase in TABLE
        for mode in MODES
        for shape in SHAPES
        if of == leg and not (phase.startswith("renew") and shape == "unary")
    ]


def expected_of(case: Case) -> Outcome:
    """What the table says of a case."""
    leg, phase, mode, shape = case
    if mode in GENTLE:
        return OUTCOMES["whole"]
    words = TABLE[leg, phase][mode == "blackhole"].split(" / ")
    return OUTCOMES[words[-1] if shape == "stream" else words[0]]


def table() -> str:
    """The rows as they stand in the documentation."""
    rows = [f"| {leg} | {phase} | {' | '.join(words)} |" for (leg, phase), words in TABLE.items()]
    return "\n".join(["| leg | struck | an end | silence |", "|---|---|---|---|", *rows])


def legend() -> str:
    """What its words stand for."""
    rows = []
    for word, outcome in OUTCOMES.items():
        line = "-" if outcome.line is None else ", ".join(str(part) for part in outcome.line)
        rows.append(f"| {word} | {outcome.client} | {line} | {outcome.hold or '-'} | {outcome.charge} |")
    return "\n".join(["| | client gets | log | hold | charge |", "|---|---|---|---|---|", *rows])
