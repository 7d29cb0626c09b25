"""What comes of each fault of each leg at each phase of a request: the table of docs/reliability.md."""

from typing import NamedTuple

from tests.faults.phases import IDLE, THEN, WAITING
from tests.harness.proxy import MODES, TLS_MODES

GENTLE = ("delay", "drip")
SHAPES = ("unary", "stream")
SECURED = ("handshake", "TLS")  # the two halves of an upstream's leg that speaks TLS

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
    "gone, held": Outcome("broken", ("client_disconnected", 0, "estimated"), "settled", "the prompt"),
    "gone, abandoned": Outcome("broken", ("client_disconnected", 0, "none"), "abandoned", "nothing"),
    "kept, unanswered": Outcome("broken", ("client_disconnected", 0, "drained"), "settled", "all"),
    "kept": Outcome("broken", ("client_disconnected", 200, "drained"), "settled", "all"),
    "gone midway": Outcome("broken", ("client_disconnected", 200, "estimated"), "settled", "a part"),
    "408": Outcome("broken", ("failed", 408, "none"), "", "nothing"),
    "502": Outcome("502 upstream_error", ("failed", 502, "none"), "settled", "nothing"),
    "504": Outcome("504 gateway_timeout", ("failed", 504, "none"), "settled", "nothing"),
    "event 502": Outcome("200, upstream_error", ("upstream_failed", 200, "estimated"), "settled", "a part"),
    "event 504": Outcome("200, gateway_timeout", ("upstream_failed", 200, "estimated"), "settled", "a part"),
    "503": Outcome("503 ledger_unavailable", ("failed", 503, "none"), "", "nothing"),
    "503, held": Outcome("503 ledger_unavailable", ("failed", 503, "none"), "abandoned", "nothing"),
}

# leg and phase: what comes of an end (reset, half-close, truncate, garbage), and of silence (blackhole); unary / stream where
# they differ. What only takes longer (delay, drip) is always whole.
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
    ("handshake", "in the client's hello"): ("502", "504"),
    ("handshake", "before the server's hello"): ("502", "504"),
    ("handshake", "in the server's hello"): ("502", "504"),
    ("TLS", IDLE): ("whole", "504"),
    ("TLS", "before the answer"): ("502", "504"),
    ("TLS", "in the answer's head"): ("502", "504"),
    ("TLS", "in the answer's body"): ("502 / event 502", "504 / event 504"),
    ("TLS", "at the answer's end"): ("502 / whole", "504 / whole"),
    ("Redis", "connected"): ("503", "503"),
    ("Redis", "look-up, in the call"): ("503", "503"),
    ("Redis", "look-up, before the reply"): ("503", "503"),
    ("Redis", "look-up, in the reply"): ("503", "503"),
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


# What comes of two faults at once, the second while the first lasts or at a place of its own; unary / stream, None where there is
# no such case.
PAIRS = {
    (("Redis", "admit, in the call", "blackhole"), ("client", THEN, "reset")): "gone",
    (("Redis", "admit, before the reply", "blackhole"), ("client", THEN, "reset")): "gone, abandoned",
    (("upstream", "behind the request", "blackhole"), ("client", THEN, "reset")): "gone, held",
    (("upstream", "in the answer's body", "blackhole"), ("client", THEN, "reset")): "gone, held / gone midway",
    (("upstream", "in the answer's body", "reset"), ("Redis", "settle, in the call", "reset")): "502 / event 502",
    (("upstream", "in the answer's body", "reset"), ("Redis", "settle, in the reply", "blackhole")): "502 / event 502",
    (("upstream", "in the answer's body", "reset"), ("Redis", THEN, "reset")): "502 / event 502",
    (
        ("client", "in the answer's body", "reset"),
        ("Redis", "settle, in the call", "blackhole"),
    ): "unheard / gone midway",
    (("client", "in the answer's body", "reset"), ("Redis", "settle, in the reply", "reset")): "unheard / gone midway",
    (("Redis", "renew, in the call", "blackhole"), ("client", THEN, "reset")): "- / gone midway",
    (("Redis", "renew, in the reply", "blackhole"), ("upstream", THEN, "reset")): "- / event 502",
    (("Redis", "renew, before the reply", "blackhole"), ("upstream", "at the answer's end", "reset")): "- / whole",
    (("Redis", "renew, before the reply", "blackhole"), ("TLS", "at the answer's end", "reset")): "- / whole",
}

# Where a reset comes to something else because the work goes on without its client: with an Idempotency-Key, or with
# on_disconnect = "drain".
KEPT = {
    ("client", WAITING): "kept, unanswered",
    ("client", "before the answer"): "unheard / kept",
    ("client", "in the answer's head"): "unheard / kept",
    ("client", "behind the answer's head"): "unheard / kept",
    ("client", "in the answer's body"): "unheard / kept",
}


def cases_of(leg: str) -> list[Case]:
    """Every case of a leg. Only streams renew, and a key is looked up before anyone knows what is wanted."""
    return [
        (leg, phase, mode, shape)
        for of, phase in TABLE
        for mode in (TLS_MODES if leg in SECURED else MODES)
        for shape in SHAPES
        if of == leg and not phase.startswith("renew" if shape == "unary" else "look-up")
    ]


def expected_of(case: Case) -> Outcome:
    """What the table says of a case."""
    leg, phase, mode, shape = case
    if mode in GENTLE:
        return OUTCOMES["whole"]
    return OUTCOMES[word_of(TABLE[leg, phase][mode == "blackhole"], shape)]


def word_of(words: str, shape: str) -> str:
    """Of two words, that of a unary request or that of a stream."""
    return words.split(" / ")[-1 if shape == "stream" else 0]


def table() -> str:
    """The rows as they stand in the documentation."""
    rows = [f"| {leg} | {phase} | {' | '.join(words)} |" for (leg, phase), words in TABLE.items()]
    return "\n".join(["| leg | struck | an end | silence |", "|---|---|---|---|", *rows])


def pairs() -> str:
    """Those of two faults at once."""
    rows = [f"| {', '.join(first)} | {', '.join(second)} | {words} |" for (first, second), words in PAIRS.items()]
    return "\n".join(["| one wire | another | |", "|---|---|---|", *rows])


def kept() -> str:
    """Those of kept requests."""
    rows = [f"| {leg} | {phase} | {words} |" for (leg, phase), words in KEPT.items()]
    return "\n".join(["| leg | struck | a reset |", "|---|---|---|", *rows])


def legend() -> str:
    """What its words stand for."""
    rows = []
    for word, outcome in OUTCOMES.items():
        line = "-" if outcome.line is None else ", ".join(str(part) for part in outcome.line)
        rows.append(f"| {word} | {outcome.client} | {line} | {outcome.hold or '-'} | {outcome.charge} |")
    return "\n".join(["| | client gets | log | hold | charge |", "|---|---|---|---|---|", *rows])
