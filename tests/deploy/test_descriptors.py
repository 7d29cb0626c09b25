"""File descriptors: as many as there may be are used, and where they run out all the same only newcomers notice."""

import asyncio
import contextlib
import resource
import socket
from pathlib import Path

import pytest

from tests.deploy.conftest import until

MODES = pytest.mark.parametrize("workers", [1, 2])
FEW = 160


def limited(soft, hard):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def started(site, soft, hard, **options):
    gateway = site.configure(**options)
    await gateway.start(preexec_fn=limited(soft, hard))
    site.stack.push_async_callback(gateway.end)
    await until(lambda: site.ready(gateway), "readiness")
    return gateway


def limits_of(pid):
    line = next(
        line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files")
    )
    return line.split()[3:5]


@MODES
async def test_the_soft_limit_is_raised_to_the_hard_one(site, workers):
    gateway = await started(site, 256, 4096, workers=workers, max_in_flight=1000)
    workers = (await site.status(gateway))["workers"]
    assert {("4096", "4096")} == {tuple(limits_of(pid)) for pid in [gateway.process.pid, *(w["pid"] for w in workers)]}
    assert [] == gateway.logged("descriptors_short")


async def test_a_limit_that_max_in_flight_does_not_fit_is_a_warning(site):
    gateway = await started(site, 256, 1024, max_in_flight=500)
    await until(lambda: gateway.logged("descriptors_short"), "the line")
    (line,) = gateway.logged("descriptors_short")
    assert (1024, 1064, "server.max_in_flight") == (line["limit"], line["needed"], line["key"])


@pytest.mark.parametrize("fast_path", [True, False])
async def test_when_they_run_out_the_admin_listener_answers_and_requests_that_are_in_go_on(site, fast_path):
    gateway = await started(site, FEW, FEW, max_in_flight=40, fast_path=fast_path)
    caller = await site.key()
    host, port = gateway.listen.split(":")
    crowd = []
    body = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "Hi"}]}

    async def call():
        async with site.http.post(f"{gateway.url}/v1/chat/completions", json=body, headers=caller.auth) as answer:
            return answer.status

    assert 200 == await call()  # its connection is kept
    try:
        for _ in range(2 * FEW):
            sock = socket.create_connection((host, int(port)))
            sock.setblocking(False)
            crowd.append(sock)
        await until(lambda: gateway.logged("descriptors_exhausted"), "the line")
        line = gateway.logged("descriptors_exhausted")[0]
        assert ("error", FEW) == (line["level"], line["limit"])
        assert 200 == await site.probe(gateway)
        assert [200] * 5 == [await call() for _ in range(5)]
        assert 0 == await site.metric(gateway, "meshproxy_breaker_open")
    finally:
        for sock in crowd:
            sock.close()
    async with asyncio.timeout(10):
        while True:
            try:
                async with site.http.get(
                    f"{gateway.url}/v1/models", headers={**caller.auth, "connection": "close"}
                ) as answer:
                    assert 200 == answer.status
                    break
            except OSError:
                await asyncio.sleep(0.05)


async def test_connections_without_their_proxy_header_leave_the_admin_listener_its_own(site):
    gateway = await started(site, FEW, FEW, max_in_flight=40, proxy_protocol=True)
    host, port = gateway.listen.split(":")
    with contextlib.ExitStack() as crowd:
        for _ in range(2 * FEW):
            crowd.enter_context(socket.create_connection((host, int(port))))
        await until(lambda: gateway.logged("descriptors_exhausted"), "the line")
        assert 200 == await site.probe(gateway)
