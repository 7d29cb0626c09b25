"""What one client may do to others: nothing. Each test attacks a gateway in a process of its own for some seconds, while a
well-behaved client streams an event each 20 ms and asks for its key each 100 ms: it doesn't wait for long, gets
nothing but 200, and the process grows by less than 400 MB.
"""

import asyncio
import contextlib
import json
import os
import time
from contextlib import asynccontextmanager

import pytest

from meshproxy.policy.principal import Limits
from tests.harness.clients import chat_bytes
from tests.harness.mesh import model
from tests.harness.waiting import turns, until
from tests.hostile.corpus import request

FREE = Limits(1_000_000, 1_000_000_000, 1_000_000)
MODELS = {"sim/paced": model("sim", "sim/plain?tokens=10000&tps=50")}
LONGEST_WAIT_S = 2.5  # the worst of them takes 0.6 s of a quiet core, and other tests share the cores
GROWTH_BYTES = 400_000_000
LOOK_S = 0.1


class Neighbour:
    """A well-behaved client of a gateway, and what it saw."""

    def __init__(self, gateway, caller):
        self._gateway = gateway
        self._caller = caller
        self.statuses = set()
        self.longest_s = 0.0
        self.events = 0

    async def stream(self):
        reader, writer = await asyncio.open_connection(*self._gateway.address)
        writer.write(chat(self._caller, model="sim/paced", stream=True))
        try:
            self.statuses.add(int((await reader.readuntil(b"\r\n\r\n")).split()[1]))
            while True:
                await self._timed(reader.readuntil(b"\n\n"))
                self.events += 1
        finally:
            writer.close()

    async def ask(self):
        reader, writer = await asyncio.open_connection(*self._gateway.address)
        head = b"GET /v1/key HTTP/1.1\r\nHost: m\r\nAuthorization: Bearer %b\r\n\r\n" % self._caller.secret.encode()
        try:
            while True:
                writer.write(head)
                answer = await self._timed(reader.readuntil(b"\r\n\r\n"))
                self.statuses.add(int(answer.split()[1]))
                await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
                await asyncio.sleep(LOOK_S)  # noqa: TID251 - the client's pace
        finally:
            writer.close()

    async def _timed(self, wait):
        began = time.perf_counter()
        try:
            return await wait
        finally:
            self.longest_s = max(self.longest_s, time.perf_counter() - began)


@pytest.fixture
def unharmed(measured):
    """Watch a gateway while it is attacked: `async with unharmed(gateway, caller): attack`."""

    @asynccontextmanager
    async def watch(gateway, caller):
        neighbour = Neighbour(gateway, caller)
        tasks = [asyncio.create_task(work) for work in (neighbour.stream(), neighbour.ask())]
        await until(lambda: neighbour.events >= 10, "its stream")
        before = most = gateway.program.rss_bytes

        async def look():
            nonlocal most
            while True:
                most = max(most, gateway.program.rss_bytes)
                await asyncio.sleep(LOOK_S / 4)  # noqa: TID251 - between two looks

        tasks.append(asyncio.create_task(look()))
        try:
            yield neighbour
            seen = neighbour.events
            await until(lambda: neighbour.events >= seen + 5, "more of its stream", 10)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        measured(
            f"another waited {neighbour.longest_s:.2f} s at most, the process grew by {(most - before) / 1e6:.0f} MB"
        )
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 3
        assert neighbour.statuses == {200}
        assert neighbour.longest_s < LONGEST_WAIT_S * max(
            1, os.getloadavg()[0] / os.cpu_count()
        )  # others work here too
        assert most - before < GROWTH_BYTES

    return watch


@pytest.mark.parametrize(
    "one",
    [
        request(b"Content-Length: 2", body=b"{}"),
        request(b"Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"),
        request(method=b"GET", target=b"/v1/key", body=b""),
    ],
    ids=["chat", "chat through aiohttp", "key"],
)
async def test_requests_without_end_whose_answers_nobody_reads(alone, mesh, unharmed, one):
    gateway = await alone(models=MODELS)
    caller = await mesh.key(credit="1000", limits=FREE)
    many = one * 2000
    async with unharmed(gateway, caller):
        clients = [await asyncio.open_connection(*gateway.address, limit=1024) for _ in range(50)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(4):
                await asyncio.gather(*(flood(writer, many) for _, writer in clients))
        for _, writer in clients:
            writer.transport.abort()


async def flood(writer, data):
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(data)
            await writer.drain()


def chat(caller, *lines, **fields):
    return chat_bytes(caller.auth, *lines, **{"model": "sim/plain", **fields})


LARGE_BYTES = 33_000_000
TOOLS = (
    b'{"model":"sim/plain","messages":[{"role":"user","content":"hi"}],"tools":['
    + b"{}," * (LARGE_BYTES // 3)
    + b"{}]}"
)
TEXT = b'{"model":"sim/plain","messages":[{"role":"user","content":"' + b"x" * LARGE_BYTES + b'"}]}'
MANY = (
    b'{"model":"sim/plain","messages":['
    + b'{"role":"user","content":""},' * (LARGE_BYTES // 29)
    + b'{"role":"user","content":"hi"}]}'
)


@pytest.mark.parametrize(
    "body, chunked",
    [(TEXT, False), (TEXT, True), (MANY, False), (TOOLS, False)],
    ids=["one text", "one text in chunks", "many messages", "many tools"],
)
async def test_large_bodies_side_by_side(alone, mesh, unharmed, body, chunked):
    gateway = await alone(models=MODELS)
    caller = await mesh.key(credit="1000", limits=FREE)
    broke = await mesh.key(credit="0")
    framed = request(b"Content-Length: %d" % len(body), b"Connection: close", body=body)
    if chunked:
        framed = request(
            b"Transfer-Encoding: chunked", b"Connection: close", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        )
    framed = framed.replace(b"KEY", broke.secret.encode(), 1)
    async with unharmed(gateway, caller):
        statuses = await asyncio.gather(*(asyncio.to_thread(sent, gateway, framed) for _ in range(20)))
    assert set(statuses) <= {402, 422, 503}


def sent(gateway, data):
    """The status of the answer to a request, which may come before all of it is sent."""
    with gateway.connect() as client:
        client.settimeout(60)
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        return int(client.recv(12).split()[1])


MUCH_BYTES = 5_000_000


@pytest.mark.parametrize(
    "begun, status",
    [(b"", b"400"), (b"GET /", b"414"), (b"GET / HTTP/1.1\r\nHost: m\r\nX-A: ", b"431")],
    ids=["no request", "a long target", "a long header"],
)
async def test_heads_that_never_end(alone, mesh, unharmed, begun, status):
    gateway = await alone(models=MODELS)
    caller = await mesh.key(credit="1000", limits=FREE)
    async with unharmed(gateway, caller):
        ends = await asyncio.gather(*(asyncio.to_thread(told, gateway, begun + b"a" * MUCH_BYTES) for _ in range(100)))
    assert set(ends) <= {b"HTTP/1.0 " + status, b""}  # or the connection was closed ahead of all the bytes


def told(gateway, data):
    """The beginning of what came back, which may be nothing."""
    with gateway.connect() as client, contextlib.suppress(ConnectionError):
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        return client.recv(12)
    return b""


@pytest.mark.parametrize("target", [b"/v1/chat/completions", b"/v1/templates"])
@pytest.mark.parametrize("chunk", [b"1\r\n \r\n", b"1;a=" + b"b" * 999 + b"\r\n \r\n"], ids=["small", "extended"])
async def test_bodies_that_are_framing_for_the_most_part(alone, mesh, unharmed, target, chunk):
    gateway = await alone(models=MODELS)
    caller = await mesh.key(credit="1000", limits=FREE)
    broke = await mesh.key(credit="0", limits=FREE)
    many = chunk * (MUCH_BYTES // len(chunk))
    data = request(b"Transfer-Encoding: chunked", target=target, body=many).replace(b"KEY", broke.secret.encode())
    async with unharmed(gateway, caller):
        ends = await asyncio.gather(*(asyncio.to_thread(told, gateway, data) for _ in range(25)))
    assert set(ends) <= {b"HTTP/1.1 400", b""}


@pytest.mark.parametrize("count, name, status", [(500, "sim/slow", 200), (50, "sim/error-500", 502)])
async def test_hundreds_that_wait_for_one_idempotency_key(alone, mesh, unharmed, measured, count, name, status):
    """Redis is asked at most 2,000 times a second in all, also while the request that they wait for fails again and again."""
    gateway = await alone(models={**MODELS, "sim/slow": model("sim", "sim/plain?tokens=8&ttft=2")})
    caller = await mesh.key(credit="1000", limits=FREE)
    store = mesh.worker.store
    async with unharmed(gateway, caller):
        waiters = [await asyncio.open_connection(*gateway.address) for _ in range(count)]
        began, before = time.perf_counter(), await commands(store)
        for _, writer in waiters:
            writer.write(chat(caller, "Idempotency-Key: one", model=name))
        statuses = [int((await reader.readuntil(b"\r\n\r\n")).split()[1]) for reader, _ in waiters]
        each_s = (await commands(store) - before) / (time.perf_counter() - began)
        for _, writer in waiters:
            writer.close()
    measured(f"Redis was asked {each_s:.0f} times a second")
    assert statuses[0] == status
    assert set(statuses) <= {status, 503}  # no more is asked of a provider that fails
    assert each_s < 2000


async def commands(store):
    """How many commands a server has run."""
    stats = (await store.execute("INFO", "stats")).decode()
    return int(stats.partition("total_commands_processed:")[2].split()[0])


async def templated(mesh, caller, copies):
    """Give the caller's account a template of so many slots."""
    body = json.dumps({"name": "bomb", "system": "{{a}}" * copies})
    headers = {"content-type": "application/json", **caller.auth}
    assert (await mesh.request("POST", "/v1/templates", data=body, headers=headers)).status == 201


@pytest.mark.parametrize(
    ("credit", "copies", "value_bytes", "statuses"),
    [("0", 200_000, 900_000, {413}), ("0", 100_000, 300, {402}), ("1000", 100_000, 300, {200})],
    ids=["180 GB", "30 MB without credit", "30 MB"],
)
async def test_templates_whose_rendering_is_large(alone, mesh, unharmed, credit, copies, value_bytes, statuses):
    gateway = await alone(models=MODELS)
    caller = await mesh.key(credit="1000", limits=FREE)
    attacker = await mesh.key(credit=credit, limits=FREE)
    await templated(mesh, attacker, copies)
    one = chat(attacker, template="bomb", variables={"a": "x" * value_bytes}, max_tokens=5)
    async with unharmed(gateway, caller):
        answers = await asyncio.gather(*(asyncio.to_thread(sent, gateway, one) for _ in range(20)))
    assert set(answers) <= statuses | {503}


PARTS = [{"type": "text", "text": "some words to be cut, and others"}]


@pytest.mark.parametrize(
    ("credit", "parts", "statuses"),
    [("0", 100_000, {402}), ("1000", 15_000, {200}), ("1000", 200_000, {200})],
    ids=["10 MB without credit", "840 KB", "12 MB"],
)
async def test_middle_out_over_thousands_of_parts(alone, mesh, unharmed, credit, parts, statuses):
    small = {**model("sim", "sim/plain?tokens=8"), "context_window": 32_000, "max_output_tokens": 64}
    gateway = await alone(models={**MODELS, "small": small})
    caller = await mesh.key(credit="1000", limits=FREE)
    attacker = await mesh.key(credit=credit, limits=FREE)
    one = chat(
        attacker, model="small", messages=[{"role": "user", "content": PARTS * parts}], transforms=["middle-out"]
    )
    async with unharmed(gateway, caller):
        answers = await asyncio.gather(*(asyncio.to_thread(sent, gateway, one) for _ in range(10)))
    assert set(answers) <= statuses | {503}


async def test_many_lists_of_many_templates(alone, mesh, unharmed):
    gateway = await alone(models=MODELS)
    caller = await mesh.key(credit="1000", limits=FREE)
    other = await mesh.key(credit="0")
    for number in range(15):
        fields = {"name": f"t{number}", "system": "{{ a }}" + "x" * 1_000_000}
        answer = await mesh.request("POST", "/v1/templates", json=fields, headers=other.auth)
        assert answer.status == 201
    ask = request(b"Connection: close", method=b"GET", target=b"/v1/templates", body=b"")
    async with unharmed(gateway, caller):
        statuses = await asyncio.gather(
            *(asyncio.to_thread(sent, gateway, ask.replace(b"KEY", other.secret.encode())) for _ in range(30))
        )
    assert set(statuses) <= {200, 429}
    assert 200 in statuses


async def test_many_reports_of_long_times(alone, mesh, unharmed):
    gateway = await alone(models=MODELS)
    caller = await mesh.key(credit="1000", limits=FREE)
    other = await mesh.key(credit="0")
    target = b"/v1/usage?since=2026-08-01&until=2026-10-31"
    ask = request(method=b"GET", target=target, body=b"").replace(b"KEY", other.secret.encode())
    before = await commands(mesh.worker.store)
    async with unharmed(gateway, caller):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                await asyncio.gather(*(asked_again(gateway, ask) for _ in range(20)))
    assert await commands(mesh.worker.store) - before < 60_000


async def asked_again(gateway, ask):
    reader, writer = await asyncio.open_connection(*gateway.address)
    try:
        while True:
            writer.write(ask)
            await reader.readuntil(b"\r\n\r\n")
            await turns(1)
    finally:
        writer.close()
