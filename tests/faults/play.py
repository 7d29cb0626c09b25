"""One case from its fault to its outcome."""

import asyncio
import json
from collections import Counter

from tests.faults.conftest import SHORT_S
from tests.faults.phases import HEAD_END, IDLE, PHASES, WAITING
from tests.faults.table import GENTLE, Outcome
from tests.harness.clients import CHAT, length_in
from tests.harness.waiting import PATIENCE_S

PROMPT_NUSD = 22_500  # its 9 tokens, where nobody reports them
FULL_NUSD = 255_000  # 6 tokens of prompt and 24 of output


async def played(stage, case):
    """What came of a case. Fails if anything is left of it: a task, a descriptor, a lease, a relay, a request in flight or a
    settlement in the journal.
    """
    leg, phase, mode, shape = case
    before = stage.held()
    got = await struck(stage, leg, phase, mode, stream=shape == "stream")
    stage.wires[leg].fault = None
    await stage.nothing_left(before)
    return await written(stage, heard(got))


async def struck(stage, leg, phase, mode, *, stream):
    """What a client gets whose request meets the fault."""
    mesh, wire = stage.mesh, stage.wires[leg]
    client_timeout_s = 2.5 * SHORT_S if (leg, mode) == ("client", "blackhole") else PATIENCE_S
    if phase == IDLE:
        before = await stage.ask(stream=False, caller=await mesh.key())
        assert heard(before) == "200"
        await mesh.quiet()
        mesh.log.lines.clear()
        stage.counted = await mesh.counted(CHAT)
        await wire.strike(mode, "caller")
        return await stage.ask(stream=stream, client_timeout_s=client_timeout_s)
    if phase == WAITING:
        asked = asyncio.create_task(
            stage.ask(model_of(leg, phase, stream=stream), stream=stream, client_timeout_s=client_timeout_s)
        )
        await mesh.until(lambda: mesh.received)
        await wire.strike(mode, "target")
        return await asked
    wire.fault = PHASES[leg][phase](mode)
    if wire.fault.lasting:
        wire.cut()
        await mesh.until(lambda: not mesh.worker.store.connected)
        if mode in GENTLE:
            await mesh.until(lambda: mesh.worker.store.connected)
    got = await stage.ask(model_of(leg, phase, stream=stream), stream=stream, client_timeout_s=client_timeout_s)
    await mesh.until(lambda: wire.struck)
    return got


def model_of(leg, phase, *, stream):
    """The model whose provider is at that phase for long enough; the usual one is "".

    A provider that answers at once may have begun before it notices the end of its caller: on CPython 3.12 and later aiohttp's
    server does, since it starts its handlers eagerly.
    """
    if phase == WAITING or (leg, phase) == ("upstream", "behind the request"):
        return "pondering"
    return "slow" if stream and phase == "in the answer's body" else ""


async def written(stage, got):
    """The outcome as client, log and ledger have it, whose books balance. The metrics must count what the log says."""
    balance = await balanced(stage)
    assert 0 <= balance.settled_nusd <= FULL_NUSD
    hold = " ".join(event["event"] for event in await events_of(stage))
    lines = [line_of(line) for line in stage.mesh.log.lines]
    assert len(lines) <= 1
    counted = await stage.mesh.counted(CHAT) - stage.counted
    assert counted == Counter(str(status or "other") for _, status, _ in lines), counted
    return Outcome(got, lines[0] if lines else None, hold, charge_of(balance.settled_nusd))


async def outcomes(stage, clients):
    """Those of requests that came one after the other and had a hold each."""
    await balanced(stage)
    rows = zip(clients, stage.mesh.log.lines, await events_of(stage), strict=True)
    return [
        Outcome(got, line_of(line), event["event"], charge_of(int(event["cost_nusd"]))) for got, line, event in rows
    ]


async def balanced(stage):
    """The account's credit, of which nothing is held any more."""
    return await stage.mesh.books.balanced(stage.caller.account)


async def events_of(stage):
    """What became of holds, oldest first."""
    events = await stage.mesh.books.events(stage.caller.account)
    return [event for event in events if event["event"] != "grant"]


def line_of(line):
    return line["outcome"], line["status"], line["usage_source"]


def charge_of(cost_nusd):
    return {0: "nothing", PROMPT_NUSD: "the prompt", FULL_NUSD: "all"}.get(cost_nusd, "a part")


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
