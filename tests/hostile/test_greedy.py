"""Clients that want too much: connections, requests, bytes they don't read, descriptors. What each may cost is bounded and
measured here, in a process of the gateway's own.
"""

import asyncio
import json
import resource
import socket
import statistics
import time

import pytest

from meshproxy.ledger.replays import FAILED_TTL_MS
from meshproxy.policy.principal import Limits
from tests.harness.clients import answers_in, chat_bytes
from tests.harness.mesh import model
from tests.harness.waiting import until
from tests.hostile.corpus import END, LENGTH, request

FREE = Limits(1_000_000, 1_000_000_000, 1_000_000)
MEASURED = {"sim/long": model("sim", "sim/fast?tokens=10000"), "sim/paced": model("sim", "sim/plain?tokens=60&tps=50")}

IDLE_BYTES = 24_576  # of a connection without a request
STOPPED_BYTES = 131_072  # of a stream whose client doesn't read: 32 KiB that wait, 16 unlooked at, one read of 64
REFUSAL_S = 0.05
GAP_S = 0.15  # of streams that get an event each 20 ms, while others are refused


async def test_what_an_idle_connection_costs(alone, measured):
    gateway = await alone(server={"header_timeout_s": 60})
    count = 2000
    with gateway.connect() as first:
        first.sendall(END)
        first.recv(1000)
    before = gateway.program.rss_bytes
    clients = [gateway.connect() for _ in range(count)]
    for client in clients[::2]:  # half of them have had a request
        client.sendall(END.replace(b"close", b"keep-alive"))
        assert client.recv(1000).startswith(b"HTTP/1.1 404")
    each = (gateway.program.rss_bytes - before) / count
    measured(f"an idle connection: {each:.0f} bytes")
    assert each < IDLE_BYTES
    for client in clients:
        client.close()


async def test_what_a_stream_costs_whose_client_does_not_read(alone, mesh, measured):
    gateway = await alone(models=MEASURED, server={"header_timeout_s": 60})  # they send one after the other
    caller = await mesh.key(credit="1000", limits=FREE)
    count = 50
    before = gateway.program.rss_bytes
    clients = [gateway.connect(receive_buffer=4096) for _ in range(count)]
    for client in clients:
        client.sendall(_chat(caller, model="sim/long", stream=True))
        assert (await asyncio.to_thread(client.recv, 12, socket.MSG_PEEK)).startswith(b"HTTP/1.1 200")
    await _settled(lambda: gateway.program.rss_bytes)
    each = (gateway.program.rss_bytes - before) / count
    measured(f"a stream that isn't read: {each:.0f} bytes")
    assert each < STOPPED_BYTES
    for client in clients:
        client.close()
    await mesh.until(lambda: mesh.simulator.history.open_streams == 0)


async def test_refusals_are_quick_and_what_was_admitted_keeps_its_pace(alone, mesh, measured):
    admitted = 20
    gateway = await alone(server={"max_in_flight": admitted}, models=MEASURED)
    caller = await mesh.key(credit="1000", limits=FREE)
    streams = [asyncio.create_task(_gaps(gateway, caller)) for _ in range(admitted)]
    await mesh.until(lambda: mesh.simulator.history.open_streams == admitted)
    refusals = [await _refused(gateway, caller) for _ in range(300)]
    gaps = [gap for stream in streams for gap in await stream]
    measured(f"a refusal: {statistics.median(refusals) * 1000:.2f} ms, at most {max(refusals) * 1000:.1f} ms")
    measured(f"a gap of 20 ms: {statistics.median(gaps) * 1000:.1f} ms, at most {max(gaps) * 1000:.1f} ms")
    assert statistics.median(refusals) < REFUSAL_S
    assert max(gaps) < GAP_S


async def test_bodies_that_never_come_leave_room_for_others(start_mesh):
    mesh = await start_mesh(server={"max_in_flight": 200})
    caller, other = await mesh.key(limits=FREE), await mesh.key(credit="0")
    half = request(LENGTH, body=b"{").replace(b"KEY", other.secret.encode())
    clients = [await asyncio.open_connection(mesh.host, mesh.port) for _ in range(200)]
    for _, writer in clients:
        writer.write(half)
    await mesh.until(lambda: len([line for line in mesh.log.lines if line["status"] == 503]) == 100)
    assert mesh.worker.recorder.in_flight == 100
    assert (await mesh.chat(caller, model="sim/plain")).status == 200
    for _, writer in clients:
        writer.transport.abort()


async def test_requests_in_a_row_are_answered_in_a_row(mesh):
    caller = await mesh.key(limits=FREE)
    many = b"".join(request(method=b"GET", target=b"/%d" % number, body=b"") for number in range(1000))
    ask = request(LENGTH).replace(b"KEY", caller.secret.encode())
    answers = answers_in(await mesh.raw(many + ask + END))
    assert [status for status, _, _ in answers] == [404] * 1000 + [200, 404]
    told = [json.loads(body)["error"]["message"] for _, _, body in answers[:1000]]
    hint = "Chat completions are served at POST /v1/chat/completions."
    assert [f"There is nothing at /{number}. {hint}" for number in range(1000)] == told


async def test_without_descriptors_the_listener_waits_and_goes_on(alone, mesh, measured):
    gateway = await alone(server={"header_timeout_s": 60})
    resource.prlimit(gateway.program.pid, resource.RLIMIT_NOFILE, (64, 64))
    clients = [gateway.connect() for _ in range(200)]
    began = gateway.program.cpu_s
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await asyncio.Event().wait()
    spent_s = gateway.program.cpu_s - began
    measured(f"a second without descriptors: {spent_s:.2f} s of CPU")
    assert spent_s < 0.3
    for client in clients:
        client.close()
    caller = await mesh.key(limits=FREE)
    with gateway.connect() as client:
        client.sendall(_chat(caller))
        assert (await asyncio.to_thread(client.recv, 12)).startswith(b"HTTP/1.1 200")


def _chat(caller, *lines, **fields) -> bytes:
    return chat_bytes(caller.auth, *lines, **{"model": "sim/plain", **fields})


async def _gaps(gateway, caller) -> list[float]:
    """The times between the events of a stream."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(_chat(caller, model="sim/paced", stream=True))
    clock = time.perf_counter
    await reader.readuntil(b"data: ")
    at, gaps = clock(), []
    while b"[DONE]" not in await reader.readuntil(b"\n\n"):
        gaps.append(clock() - at)
        at += gaps[-1]
    writer.close()
    assert len(gaps) >= 60
    return gaps


async def _refused(gateway, caller) -> float:
    """How long a refusal took, the connection included."""
    clock = time.perf_counter
    began = clock()
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(_chat(caller, "Connection: close"))
    ((status, headers, _),) = answers_in(await reader.read(-1))
    writer.close()
    assert (status, headers["retry-after"]) == (503, "1")
    return clock() - began


async def _settled(measure) -> None:
    """Return when a measure stays what it is."""
    seen = [-1]

    def stays():
        seen.append(measure())
        return seen[-1] == seen[-2]

    await until(stays, "it to stay", poll_s=0.3)


async def test_a_template_larger_than_any_may_be_is_not_taken_apart(mesh):
    caller = await mesh.key()
    body = b'{"name":"a","params":{"x":[' + b"{}," * 2_000_000 + b"{}]}}"
    answer = await mesh.request(
        "POST", "/v1/templates", data=body, headers={**caller.auth, "content-type": "application/json"}
    )
    assert (answer.status, answer.code) == (413, "request_too_large")


@pytest.mark.parametrize(
    "fields, credit",
    [({"model": "sim/error-422"}, "1"), ({"model": "sim/plain"}, "0"), ({"model": "nothing/here"}, "1")],
    ids=["by the provider", "for want of credit", "for its model"],
)
@pytest.mark.parametrize("key", [False, True], ids=["", "with Idempotency-Keys"])
async def test_what_a_refused_request_leaves_in_redis(mesh, measured, fields, credit, key):
    """With the longest session's name, however many there are: less than a KiB each."""
    caller = await mesh.key(credit=credit, limits=FREE)
    store, count = mesh.worker.store, 300

    async def refused(number):
        session = f"{number:06}".ljust(256, "\N{GRINNING FACE}")
        headers = {"x-request-id": session[:6].ljust(128, "r")}
        if key:
            headers["idempotency-key"] = session[:6].ljust(255, "k")
        return (await mesh.chat(caller, session_id=session, headers=headers, **fields)).status

    await refused(0)
    await mesh.quiet()
    before = await used(store)
    statuses = {await refused(number) for number in range(1, count + 1)}
    await mesh.quiet()
    for name in await store.execute("KEYS", f"mesh:{{{caller.account}}}:replay:*"):
        assert await store.execute("PTTL", name) <= FAILED_TTL_MS
        await store.execute("DEL", name)  # some seconds early
    each = (await used(store) - before) / count
    measured(f"a refused request leaves {each:.0f} bytes in Redis")
    assert statuses.isdisjoint({200})
    assert each < 1024
    for name in await store.execute("KEYS", f"mesh:{{{caller.account}}}:*"):
        kind = name.rpartition(b"}:")[2].partition(b":")[0]
        if kind not in {
            b"credit",
            b"record",
            b"keys",
            b"usage",
            b"grants",
            b"grant",
            b"spend",
            b"refs",
            b"hours",
            b"month",
        }:
            assert await store.execute("PTTL", name) > 0, name  # the others are few, or have a largest size


async def used(store) -> int:
    memory = (await store.execute("INFO", "memory")).decode()
    return int(memory.partition("used_memory:")[2].split()[0])
