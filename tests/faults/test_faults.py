"""Each fault of each leg at each phase of a request, and what comes of it: the table of docs/reliability.md.

Whatever is done to the wire, the client gets what the table says, the hold is settled once or released by its deadline, the
books balance, and nothing is left: no task, descriptor, lease, relay, request in flight or settlement in the journal.
"""

import asyncio
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from meshproxy.ledger.keyspace import AccountKeys
from meshproxy.ledger.usage_report import recent
from tests.faults.conftest import PATIENCE_S, TIMEOUT_S
from tests.faults.phases import HEAD_END, PHASES, WAITING, length_in
from tests.faults.proxy import MODES

DOC = Path(__file__).parents[2] / "docs" / "reliability.md"
GENTLE = ("delay", "drip")
FULL_NUSD = 255_000  # 6 tokens of prompt and 24 of output
SHAPES = ("unary", "stream")


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
CASES = [
    (leg, phase, mode, shape)
    for leg, phase in TABLE
    for mode in MODES
    for shape in SHAPES
    if not (phase.startswith("renew") and shape == "unary")  # only streams renew
]


def expected_of(leg, phase, mode, shape):
    """What the table says of a case."""
    if mode in GENTLE:
        return OUTCOMES["whole"]
    words = TABLE[leg, phase][mode == "blackhole"].split(" / ")
    return OUTCOMES[words[-1] if shape == "stream" else words[0]]


def table():
    """The rows as they stand in the documentation."""
    rows = [f"| {leg} | {phase} | {' | '.join(words)} |" for (leg, phase), words in TABLE.items()]
    return "\n".join(["| leg | struck | an end | silence |", "|---|---|---|---|", *rows])


def legend():
    """What its words stand for."""
    rows = []
    for word, outcome in OUTCOMES.items():
        line = "-" if outcome.line is None else ", ".join(str(part) for part in outcome.line)
        rows.append(f"| {word} | {outcome.client} | {line} | {outcome.hold or '-'} | {outcome.charge} |")
    return "\n".join(["| | client gets | log | hold | charge |", "|---|---|---|---|---|", *rows])


@pytest.mark.parametrize("case", CASES, ids=", ".join)
async def test_a_fault_has_its_outcome_and_leaves_nothing(stage, case):
    leg, phase, mode, shape = case
    before = stage.held()
    got = await struck(stage, leg, phase, mode, stream=shape == "stream")
    stage.wires[leg].fault = None
    await stage.mesh.until(lambda: stage.mesh.worker.store.connected)
    stage.mesh.worker.gateway.deployment.providers["wired"].retire()  # an idle connection is no leak
    await stage.until(before, stage.held)
    assert expected_of(*case) == await written(stage, heard(got))


async def struck(stage, leg, phase, mode, *, stream):
    """What a client gets whose request meets the fault."""
    mesh, wire = stage.mesh, stage.wires[leg]
    patience_s = 2.5 * TIMEOUT_S if leg == "client" else PATIENCE_S
    if phase == WAITING:
        asked = asyncio.create_task(stage.ask("pondering", stream=stream, patience_s=patience_s))
        await mesh.until(lambda: mesh.received)
        await wire.strike(mode)
        return await asked
    wire.fault = PHASES[leg][phase](mode)
    if wire.fault.lasting:
        wire.cut()
        await mesh.until(lambda: not mesh.worker.store.connected)
        if mode in GENTLE:
            await mesh.until(lambda: mesh.worker.store.connected)
    got = await stage.ask("paced", stream=stream, patience_s=patience_s)
    await mesh.until(lambda: wire.struck)
    return got


async def written(stage, got):
    """The outcome as client, log and ledger have it, whose books balance."""
    mesh, account = stage.mesh, stage.caller.account
    balance = await mesh._released(account)
    assert balance.granted_nusd == balance.balance_nusd + balance.settled_nusd
    assert 0 == await mesh.worker.store.execute("HLEN", AccountKeys(account).holds)
    assert 0 <= balance.settled_nusd <= FULL_NUSD
    charge = {0: "nothing", FULL_NUSD: "all"}.get(balance.settled_nusd, "a part")
    events = [event["event"] for event in await recent(mesh.worker.store, account, 100)]
    hold = " ".join(event for event in events if event != "grant")
    lines = [(line["outcome"], line["status"], line["usage_source"]) for line in mesh.log.lines]
    assert len(lines) <= 1
    return Outcome(got, lines[0] if lines else None, hold, charge)


def heard(got):
    """What the client got, in a word or two."""
    head, _, body = got.partition(HEAD_END)
    if b"transfer-encoding: chunked" in head:
        if not body.endswith(b"\r\n0\r\n\r\n"):
            return "broken"
        last = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")][-1]
        return "200" if last == b"[DONE]" else f"200, {json.loads(last)['error']['code']}"
    if not body or len(body) != length_in(head):
        return "broken"
    status = head.split(b" ", 2)[1].decode()
    return status if status == "200" else f"{status} {json.loads(body)['error']['code']}"


def test_every_phase_has_its_row():
    assert {(leg, phase) for leg, phases in PHASES.items() for phase in phases} == TABLE.keys()


def test_the_tables_of_the_documentation_are_these():
    text = DOC.read_text()
    assert table() in text
    assert legend() in text
