"""The pipeline, cut at every place where it waits: by a client that hangs up, by a bug, by Redis, by the provider.

Each case is tried with the first wait, the second, and so on until the request comes through untouched. After each: nothing is
held, the books balance, what was asked of the provider was settled exactly once, and nothing is left behind.
"""

import asyncio
import itertools
import types

import pytest
from structlog.testing import capture_logs

from meshproxy.errors import UpstreamError, upstream_error
from meshproxy.gateway.exchange import Call
from meshproxy.ledger.records import AccountKeys
from meshproxy.ledger.store import StoreError, Unavailable
from tests.harness.books import usage_events
from tests.harness.clients import HELLO
from tests.harness.mesh import model
from tests.harness.waiting import turns
from tests.money.conftest import figure

MAX_WAITS = 200
REPORTED_NUSD = 6 * 2_500 + 8 * 10_000
BODY = b'{"model":"%b","stream":%b,"messages":[{"role":"user","content":"Hello there"}]}'


class Client:
    """A `Downstream` that keeps what it gets."""

    def __init__(self):
        self.body = b""
        self.begun = self.finished = False

    def begin(self, headers):
        self.begun = True

    def write(self, payload, frame=None):
        self.body += payload

    def finish(self):
        self.finished = True

    def congested(self):
        return False

    async def drained(self):
        raise AssertionError("it is never congested")


class Cut:
    """Does something at the wait number `at` of a coroutine; `came` says whether it was reached."""

    def __init__(self, at, way):
        self.at, self.way, self.came = at, way, False

    @types.coroutine
    def drive(self, work):
        """`work`, step by step."""
        step, value = work.send, None
        for wait in itertools.count():
            try:
                awaited = step(value)
            except StopIteration as stop:
                return stop.value
            if wait == self.at:
                self.came = True
                if self.way == "at once":  # as a hang-up in the middle of the wait
                    asyncio.current_task().cancel()
                elif self.way != "too late":
                    if awaited is not None:
                        awaited.cancel()
                    step, value = work.throw, self.way
                    continue
            try:
                step, value = work.send, (yield awaited)
            except BaseException as error:  # noqa: BLE001 - it is passed on
                step, value = work.throw, error
            if wait == self.at and self.way == "too late":  # as a hang-up in the turn that ends the wait
                step, value = work.throw, asyncio.CancelledError()


WAYS = {
    "hang-up": lambda: "at once",
    "late hang-up": lambda: "too late",
    "bug": lambda: RuntimeError("injected"),
    "ledger": lambda: Unavailable("timeout", "injected"),
    "refusal": lambda: StoreError("WRONGTYPE", "injected"),
    "provider": lambda: UpstreamError(upstream_error("injected", may_have_run=True), safe_to_repeat=False),
}
KINDS = {
    "unary": {"stream": False},
    "stream": {"stream": True},
    "drained unary": {"stream": False, "model": "drained"},
    "drained stream": {"stream": True, "model": "drained"},
    "idempotent unary": {"stream": False, "idempotent": True},
    "idempotent stream": {"stream": True, "idempotent": True},
    "short stream": {"stream": True, "credit": "0.0001"},
}


@pytest.fixture
async def mesh(start_mesh, simulator):
    upstreams = {"drained": {"kind": "openai", "base_url": simulator.base_url, "on_disconnect": "drain"}}
    models = {"fast": model("sim", "sim/plain?tokens=8&tps=4000"), "drained": model("drained", "sim/plain?tokens=8")}
    mesh = await start_mesh(upstreams=upstreams, models=models, credits={"lease_output_tokens": 4})
    mesh.log.lines = Unread()  # what is a bug here was made here
    with capture_logs():
        yield mesh


class Unread(list):
    def append(self, line):
        pass


def ours(tasks):
    """Tasks that run the gateway's code."""
    return {task for task in tasks if "/meshproxy/" in task.get_coro().cr_code.co_filename and not is_simulator(task)}


def is_simulator(task):
    return "/simulator/" in task.get_coro().cr_code.co_filename


async def request(mesh, cut, *, stream, credit="1.00", idempotent=False, **fields):
    """One request that is cut, and its caller."""
    caller = await mesh.key(credit=credit)
    body = BODY % (fields.get("model", "fast").encode(), b"true" if stream else b"false")

    async def read_body(_take):
        await turns(1)
        return body

    key = f"once-{cut.at}" if idempotent else None
    now = asyncio.get_running_loop().time()
    call = Call("r1", caller.auth["authorization"], read_body, now, idempotency_key=key)
    client = Client()
    before = asyncio.all_tasks()
    handler = asyncio.create_task(_driven(cut, mesh.worker.gateway.chat(call, client)))
    await asyncio.wait([handler])
    reply = None if handler.cancelled() else handler.result()
    await mesh.quiet()
    await mesh.until(lambda: not ours(asyncio.all_tasks() - before))
    return caller, client, reply


async def _driven(cut, work):
    return await cut.drive(work)


async def check(mesh, caller, client, reply, asked):
    """The books of one request."""
    worker = mesh.worker
    balance = await worker.ledger.balance(caller.account)
    events = await usage_events(worker.store, caller.account)
    settled = [event for event in events if event["event"] == "settled"]
    assert balance.held_nusd == 0
    assert balance.granted_nusd == balance.balance_nusd + balance.settled_nusd
    assert balance.settled_nusd == sum(int(event["cost_nusd"]) for event in settled)
    assert len(settled) <= 1
    abandoned = [event["hold_id"] for event in events if event["event"] == "abandoned"]
    assert not asked or not abandoned
    assert ["live"] * len(settled) == [event["hold"] for event in settled]
    if asked:
        assert len(settled) == 1
    if b'"content"' in client.body:
        assert balance.settled_nusd > 0  # no stream is free
    if reply is not None and reply.status == 200:
        assert balance.settled_nusd == REPORTED_NUSD
    assert (
        worker.recorder.in_flight,
        len(worker.tasks),
        worker.live.leases,
        worker.live.relays,
        worker.live.recordings,
    ) == (0, 0, set(), set(), set())
    return len(settled)


CASES = [
    (kind, way)
    for kind in KINDS
    for way in WAYS
    if "hang-up" in way
    or not kind.startswith(("drained", "idempotent"))  # their work is in a task of its own, see below
]


@pytest.mark.parametrize(("kind", "way"), CASES)
async def test_cut_at_every_wait(mesh, kind, way):
    cuts = settlements = 0
    for at in range(MAX_WAITS):
        cut = Cut(at, WAYS[way]())
        asked_before = len(mesh.received)
        caller, client, reply = await request(mesh, cut, **KINDS[kind])
        if way == "ledger":
            await end_holds(mesh, caller)
        settlements += await check(mesh, caller, client, reply, asked=len(mesh.received) > asked_before)
        if not cut.came:
            break
        cuts += 1
    else:
        pytest.fail("it never came through")
    assert cuts >= 3
    figure("cut at every wait", kind=kind, way=way, cuts=cuts, settlements=settlements)


async def end_holds(mesh, caller):
    """An admission whose reply was lost leaves a hold, which nobody knows of and its deadline releases: let it pass."""
    names = AccountKeys(caller.account)
    for hold_id in await mesh.worker.store.execute("HKEYS", names.holds):
        await mesh.worker.store.execute("ZADD", names.deadlines, 0, hold_id)


@pytest.mark.parametrize("way", ["bug", "ledger", "provider"])
@pytest.mark.parametrize("task", ["drain", "renew", "idempotency"])
async def test_tasks_behind_a_request_cut_at_every_wait(mesh, monkeypatch, task, way):
    """What runs behind the handler's back may fail as well."""
    kinds = {"drain": "drained stream", "renew": "stream", "idempotency": "idempotent stream"}
    spawn = mesh.worker.tasks.spawn
    cuts = 0
    for at in range(MAX_WAITS):
        cut = Cut(at, WAYS[way]())
        monkeypatch.setattr(
            mesh.worker.tasks,
            "spawn",
            lambda name, coro, cut=cut: spawn(name, _driven(cut, coro) if name == task and not cut.came else coro),
        )
        asked_before = len(mesh.received)
        caller, client, reply = await asyncio.wait_for(request(mesh, Cut(-1, None), **KINDS[kinds[task]]), 20)
        await check(mesh, caller, client, reply, asked=len(mesh.received) > asked_before)
        assert reply is not None or client.finished
        if not cut.came:
            break
        cuts += 1
    assert cuts >= 1
    figure("task cut at every wait", task=task, way=way, cuts=cuts)


@pytest.mark.parametrize("way", ["ledger", "refusal"])
async def test_a_settlement_without_an_answer_is_in_the_journal_and_charged_once(mesh, monkeypatch, way):
    """However it is cut on its way there."""
    spawn, send, sent = mesh.worker.tasks.spawn, mesh.worker.ledger.send_settlement, set()

    def lose(settlement):
        answer = send(settlement)
        if settlement.hold_id in sent:
            return answer
        sent.add(settlement.hold_id)
        lost = asyncio.get_running_loop().create_future()
        lost.set_exception(WAYS[way]())
        return lost

    monkeypatch.setattr(mesh.worker.ledger, "send_settlement", lose)
    for at in range(MAX_WAITS):
        cut = Cut(at, WAYS[way]())
        monkeypatch.setattr(
            mesh.worker.tasks,
            "spawn",
            lambda name, coro, cut=cut: spawn(name, _driven(cut, coro) if name == "settle" else coro),
        )
        caller, _, _ = await request(mesh, Cut(-1, None), stream=True)
        await mesh.until(lambda: not len(mesh.worker.journal))
        await check(mesh, caller, Client(), None, asked=True)
        if not cut.came:
            break


async def test_the_cases_are_what_clients_send(mesh):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="fast", messages=HELLO)
    assert (answer.status, await mesh.spent(caller)) == (200, REPORTED_NUSD)
