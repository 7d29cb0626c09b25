"""SIGTERM, and worse: what clients, balancers and the ledger see of a gateway that goes."""

import asyncio
import os
import signal
import time

import aiohttp
import pytest

from tests.deploy.conftest import until

LONG = "sim/plain?tokens=1000&tps=50"  # 20 s
BRIEF = "sim/plain?tokens=40&tps=50"  # 0.8 s
STALLED = "sim/stall-head"
MODELS = (LONG, BRIEF, STALLED)
MODES = pytest.mark.parametrize("workers", [1, 2])
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


async def ask(site, gateway, caller, **fields):
    async with site.http.post(
        f"{gateway.url}/v1/chat/completions", json={**HELLO, **fields}, headers=caller.auth
    ) as answer:
        return answer.status, dict(answer.headers), await answer.json()


@MODES
async def test_streams_run_to_their_end_and_nothing_new_comes_in(site, workers):
    gateway = await site.gateway(models=MODELS, workers=workers)
    caller = await site.key()
    _, task = await site.flowing(gateway.url, caller, BRIEF)
    gateway.signal(signal.SIGTERM)
    await until(lambda: gateway.logged("draining"), "the drain")
    await until(lambda: refused(gateway), "the listener to close")
    assert (await task).whole
    assert 0 == await gateway.exit()
    assert ["completed"] == [event["outcome"] for event in await site.settled(caller, 1)]
    assert [] == gateway.noise


async def refused(gateway):
    try:
        host, port = gateway.listen.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


@MODES
async def test_in_the_grace_it_is_unready_and_still_serves_but_keeps_no_connection(site, workers):
    gateway = await site.gateway(models=MODELS, workers=workers, drain_grace_s=1.5)
    caller = await site.key()
    before = await ask(site, gateway, caller)
    gateway.signal(signal.SIGTERM)
    signalled_at = time.monotonic()
    await until(lambda: gateway.logged("draining"), "the drain")
    assert 503 == await site.probe(gateway)
    assert (await site.status(gateway))["not_ready"] == ["draining"]
    status, headers, _ = await ask(site, gateway, caller)
    assert (200, "close") == (status, headers.get("Connection"))
    assert (200, None) == (before[0], before[1].get("Connection"))
    async with site.http.get(f"{gateway.url}/v1/models", headers=caller.auth) as answer:
        assert (200, "close") == (answer.status, answer.headers.get("Connection"))
    assert 0 == await gateway.exit()
    assert 1.4 < time.monotonic() - signalled_at < 4


@MODES
async def test_what_outlasts_drain_s_is_ended_with_an_error_and_settled(site, workers):
    gateway = await site.gateway(models=MODELS, workers=workers, drain_s=0.5)
    caller = await site.key()
    stream, task = await site.flowing(gateway.url, caller, LONG)
    stalled = asyncio.create_task(ask(site, gateway, caller, model=STALLED))
    stalled_stream = site.stream(gateway.url, caller, STALLED)
    await until(lambda: len(site.provider.history.requests) == 3, "the provider to be asked")
    gateway.signal(signal.SIGTERM)
    await task
    assert ("overloaded", "") == (stream.error["code"], stream.broken)
    status, headers, body = await stalled
    assert (503, "overloaded", "false", "close") == (
        status,
        body["error"]["code"],
        headers["x-should-retry"],
        headers["Connection"],
    )
    assert 503 == (await stalled_stream).status
    assert 0 == await gateway.exit()
    settled = await site.settled(caller, 3)
    assert ["shutdown"] * 3 == [event["outcome"] for event in settled]
    assert {"estimated", "none"} == {event["usage_source"] for event in settled}
    assert 3 == sum(line["outcome"] == "shutdown" for line in gateway.logged("request"))
    assert [] == gateway.noise


@MODES
async def test_a_second_signal_waits_for_nobody(site, workers):
    gateway = await site.gateway(models=MODELS, workers=workers, drain_s=600, drain_grace_s=600)
    caller = await site.key()
    stream, task = await site.flowing(gateway.url, caller, LONG)
    gateway.signal(signal.SIGTERM)
    await until(lambda: gateway.logged("draining"), "the drain")
    hurried_at = time.monotonic()
    gateway.signal(signal.SIGTERM)
    await task
    assert "overloaded" == stream.error["code"]
    assert 0 == await gateway.exit()
    assert time.monotonic() - hurried_at < 3
    await site.settled(caller, 1)


async def test_an_idle_connection_is_closed_and_one_in_use_is_not(site):
    gateway = await site.gateway(models=MODELS)
    caller = await site.key()
    host, port = gateway.listen.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    _, task = await site.flowing(gateway.url, caller, BRIEF)
    gateway.signal(signal.SIGTERM)
    assert b"" == await asyncio.wait_for(reader.read(), 0.6)
    assert not task.done()
    assert (await task).whole
    writer.close()
    assert 0 == await gateway.exit()


async def test_a_body_that_is_still_coming_is_taken(site):
    gateway = await site.gateway(models=MODELS)
    caller = await site.key()
    body = b'{"messages": [{"role": "user", "content": "Hello"}]}'
    host, port = gateway.listen.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        f"authorization: {caller.auth['authorization']}\r\ncontent-type: application/json\r\n\r\n"
    )
    writer.write(head.encode() + body[:9])
    await until(lambda: in_flight(site, gateway), "the request")
    gateway.signal(signal.SIGTERM)
    await until(lambda: refused(gateway), "the listener to close")
    await asyncio.sleep(0.2)  # past the closing of idle connections
    writer.write(body[9:])
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nconnection: close\r\n" in answer
    writer.close()
    assert 0 == await gateway.exit()


async def in_flight(site, gateway):
    return await site.metric(gateway, "meshproxy_in_flight_requests") > 0


async def test_with_nothing_to_do_it_is_gone_at_once(site):
    gateway = await site.gateway(models=MODELS)
    signalled_at = time.monotonic()
    gateway.signal(signal.SIGTERM)
    assert 0 == await gateway.exit()
    assert time.monotonic() - signalled_at < 1.5


async def test_a_killed_worker_is_replaced_and_its_socket_stays(site):
    gateway = await site.gateway(models=MODELS, workers=2)
    caller = await site.key()
    before = {worker["pid"] for worker in (await site.status(gateway))["workers"]}
    os.kill(min(before), signal.SIGKILL)
    answers = await asyncio.gather(*(ask_anew(gateway, caller) for _ in range(40)))
    assert [200] * 40 == answers  # those who came to the dead one's socket waited for the next

    async def replaced():
        workers = (await site.status(gateway))["workers"]
        return len(workers) == 2 and {worker["pid"] for worker in workers} != before and workers

    workers = await until(replaced, "another worker")
    assert max(before) in {worker["pid"] for worker in workers}
    assert [0, 1] == sorted(worker["restarts"] for worker in workers)
    (died,) = gateway.logged("worker_died")
    assert -signal.SIGKILL == died["exit_code"]
    gateway.signal(signal.SIGTERM)
    assert 0 == await gateway.exit()


async def ask_anew(gateway, caller):
    """On a connection of its own, which the kernel gives to either socket; one in the dying worker's hands may be reset."""
    async with aiohttp.ClientSession() as http:
        for _ in range(3):
            try:
                async with http.post(f"{gateway.url}/v1/chat/completions", json=HELLO, headers=caller.auth) as answer:
                    return answer.status
            except aiohttp.ClientConnectionError:
                continue
    return 0


async def test_when_the_supervisor_is_killed_its_workers_drain_and_go(site):
    gateway = await site.gateway(models=MODELS, workers=2)
    caller = await site.key()
    pids = [worker["pid"] for worker in (await site.status(gateway))["workers"]]
    _, task = await site.flowing(gateway.url, caller, BRIEF)
    gateway.signal(signal.SIGKILL)
    assert (await task).whole
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
    await second.start()
    assert 1 == await second.exit()
    assert [f"meshproxy: Address already in use: {first.listen}\n"] == second.noise


@MODES
async def test_workers_that_are_starting_are_ended_too(site, workers):
    gateway = site.configure(models=MODELS, workers=workers)
    await gateway.start()
    site.stack.push_async_callback(gateway.end)
    await until(lambda: gateway.logged("supervising" if workers > 1 else "serving"), "the start")
    gateway.signal(signal.SIGTERM)
    assert 0 == await gateway.exit(8)
