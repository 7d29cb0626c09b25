"""SIGTERM, and worse: what clients, balancers and the ledger see of a gateway that goes."""

import asyncio
import os
import signal
import time

import pytest

from tests.harness.clients import chat, chat_bytes, next_answer
from tests.harness.waiting import until

LONG = "sim/plain?tokens=1000&tps=50"  # 20 s
BRIEF = "sim/plain?tokens=40&tps=50"  # 0.8 s
STALLED = "sim/stall-head"
MODELS = (LONG, BRIEF, STALLED)
MODES = pytest.mark.parametrize("workers", [1, 2])


@MODES
async def test_streams_run_to_their_end_and_nothing_new_comes_in(site, workers):
    gateway = await site.gateway(models=MODELS, workers=workers)
    caller = await site.key()
    _, task = await site.flowing(gateway.url, caller, BRIEF)
    gateway.send(signal.SIGTERM)
    await until(lambda: gateway.logged("draining"), "the drain")
    await until(lambda: refused(gateway), "the listener to close")
    assert (await task).is_whole
    assert await gateway.exit() == 0
    assert [event["outcome"] for event in await site.settled(caller, 1)] == ["completed"]
    assert gateway.noise == []


async def refused(gateway):
    try:
        _, writer = await asyncio.open_connection(*gateway.address)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


@MODES
async def test_in_the_grace_it_is_unready_and_still_serves_but_keeps_no_connection(site, workers):
    gateway = await site.gateway(models=MODELS, workers=workers, drain_grace_s=1.5)
    caller = await site.key()
    before = await site.chat(gateway, caller)
    gateway.send(signal.SIGTERM)
    signalled_at = time.monotonic()
    await until(lambda: gateway.logged("draining"), "the drain")
    assert gateway.probe() == 503
    assert gateway.status()["not_ready"] == ["draining"]
    answer = await site.chat(gateway, caller)
    assert (answer.status, answer.headers.get("Connection")) == (200, "close")
    assert (before.status, before.headers.get("Connection")) == (200, None)
    async with site.http.get(f"{gateway.url}/v1/models", headers=caller.auth) as answer:
        assert (answer.status, answer.headers.get("Connection")) == (200, "close")
    assert await gateway.exit() == 0
    assert 1.4 < time.monotonic() - signalled_at < 4


@MODES
async def test_what_outlasts_drain_s_is_ended_with_an_error_and_settled(site, workers):
    gateway = await site.gateway(models=MODELS, workers=workers, drain_s=0.5)
    caller = await site.key()
    stream, task = await site.flowing(gateway.url, caller, LONG)
    stalled = asyncio.create_task(site.chat(gateway, caller, model=STALLED))
    stalled_stream = site.stream(gateway.url, caller, STALLED)
    await until(lambda: len(site.provider.history.requests) == 3, "the provider to be asked")
    gateway.send(signal.SIGTERM)
    await task
    assert (stream.error["code"], stream.broken) == ("overloaded", "")
    refused = await stalled
    headers = (refused.headers["x-should-retry"], refused.headers["Connection"])
    assert (refused.status, refused.code, *headers) == (503, "overloaded", "false", "close")
    assert (await stalled_stream).status == 503
    assert await gateway.exit() == 0
    settled = await site.settled(caller, 3)
    assert [event["outcome"] for event in settled] == ["shutdown"] * 3
    assert {event["usage_source"] for event in settled} == {"estimated", "none"}
    assert sum(line["outcome"] == "shutdown" for line in gateway.logged("request")) == 3
    assert gateway.noise == []


@MODES
async def test_a_second_signal_waits_for_nobody(site, workers):
    gateway = await site.gateway(models=MODELS, workers=workers, drain_s=600, drain_grace_s=600)
    caller = await site.key()
    stream, task = await site.flowing(gateway.url, caller, LONG)
    gateway.send(signal.SIGTERM)
    await until(lambda: gateway.logged("draining"), "the drain")
    hurried_at = time.monotonic()
    gateway.send(signal.SIGTERM)
    await task
    assert stream.error["code"] == "overloaded"
    assert await gateway.exit() == 0
    assert time.monotonic() - hurried_at < 3
    await site.settled(caller, 1)


async def test_an_idle_connection_is_closed_and_one_in_use_is_not(site):
    gateway = await site.gateway(models=MODELS)
    caller = await site.key()
    reader, writer = await asyncio.open_connection(*gateway.address)
    _, task = await site.flowing(gateway.url, caller, BRIEF)
    gateway.send(signal.SIGTERM)
    assert await asyncio.wait_for(reader.read(), 0.6) == b""
    assert not task.done()
    assert (await task).is_whole
    writer.close()
    assert await gateway.exit() == 0


@pytest.mark.parametrize("fast_path", [True, False])
async def test_a_connection_is_closed_after_a_stream_that_had_begun_before(site, fast_path):
    gateway = await site.gateway(models=MODELS, fast_path=fast_path)
    caller = await site.key()
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(chat_bytes(caller.auth, model=BRIEF, stream=True))
    head = await reader.readuntil(b"\r\n\r\n")
    _, task = await site.flowing(gateway.url, caller, LONG)
    gateway.send(signal.SIGTERM)
    async with asyncio.timeout(5):
        rest = await reader.read()
    assert b"connection: close" not in head.lower()
    assert rest.endswith(b"0\r\n\r\n")
    assert not task.done()
    gateway.send(signal.SIGTERM)
    await task
    writer.close()
    assert await gateway.exit() == 0


async def test_a_body_that_is_still_coming_is_taken(site):
    gateway = await site.gateway(models=MODELS)
    caller = await site.key()
    asked = chat_bytes(caller.auth)
    idle, _ = await asyncio.open_connection(*gateway.address)
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(asked[:-9])
    await until(lambda: gateway.metric("meshproxy_in_flight_requests") > 0, "the request")
    gateway.send(signal.SIGTERM)
    await until(lambda: refused(gateway), "the listener to close")
    assert await asyncio.wait_for(idle.read(), 5) == b""  # idle connections are closed by now
    writer.write(asked[-9:])
    status, headers, _ = await next_answer(reader)
    assert (status, headers["connection"]) == (200, "close")
    assert await reader.read() == b""
    writer.close()
    assert await gateway.exit() == 0


async def test_with_nothing_to_do_it_is_gone_at_once(site):
    gateway = await site.gateway(models=MODELS)
    signalled_at = time.monotonic()
    gateway.send(signal.SIGTERM)
    assert await gateway.exit() == 0
    assert time.monotonic() - signalled_at < 1.5


async def test_a_killed_worker_is_replaced_and_its_socket_stays(site):
    gateway = await site.gateway(models=MODELS, workers=2)
    caller = await site.key()
    before = set(gateway.pids())
    os.kill(min(before), signal.SIGKILL)
    answers = await asyncio.gather(*(ask_anew(gateway, caller) for _ in range(40)))
    assert answers == [200] * 40  # those who came to the dead one's socket waited for the next

    def replaced():
        workers = gateway.status()["workers"]
        return len(workers) == 2 and {worker["pid"] for worker in workers} != before and workers

    workers = await until(replaced, "another worker")
    assert max(before) in {worker["pid"] for worker in workers}
    assert sorted(worker["restarts"] for worker in workers) == [0, 1]
    (died,) = gateway.logged("worker_died")
    assert died["exit_code"] == -signal.SIGKILL
    gateway.send(signal.SIGTERM)
    assert await gateway.exit() == 0


async def ask_anew(gateway, caller):
    """On a connection of its own, which the kernel gives to either socket; one in the dying worker's hands may be reset."""
    for _ in range(3):
        answer = await chat(gateway.url, caller.auth)
        if not answer.broken:
            return answer.status
    return 0


async def test_when_the_supervisor_is_killed_its_workers_drain_and_go(site):
    gateway = await site.gateway(models=MODELS, workers=2)
    caller = await site.key()
    pids = gateway.pids()
    _, task = await site.flowing(gateway.url, caller, BRIEF)
    gateway.send(signal.SIGKILL)
    assert (await task).is_whole
    await until(lambda: not any(alive(pid) for pid in pids), "the workers to go")
    await site.settled(caller, 1)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        return stat.read().rpartition(")")[2].split()[0] != "Z"


@MODES
async def test_an_address_that_is_taken_is_told_and_nothing_is_left(site, workers):
    first = await site.gateway(models=MODELS)
    second = site.configure(listen=first.listen, workers=workers)
    second.launch()
    assert await second.exit() == 1
    assert second.noise == [f"meshproxy: Address already in use: {first.listen}"]


@MODES
async def test_workers_that_are_starting_are_ended_too(site, workers):
    gateway = site.configure(models=MODELS, workers=workers)
    gateway.launch()
    await until(lambda: gateway.logged("supervising" if workers > 1 else "serving"), "the start")
    gateway.send(signal.SIGTERM)
    assert await gateway.exit(8) == 0
