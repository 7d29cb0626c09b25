"""File descriptors: as many as there may be are used, and where they run out all the same only newcomers notice."""

import contextlib
import resource
import socket
from pathlib import Path

import pytest

from tests.harness.clients import fetch
from tests.harness.waiting import until

MODES = pytest.mark.parametrize("workers", [1, 2])
FEW = 160


def limited(soft, hard):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def started(site, soft, hard, **options):
    return await site.configure(**options).started(preexec_fn=limited(soft, hard))


def limits_of(pid):
    line = next(
        line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files")
    )
    return line.split()[3:5]


@MODES
async def test_the_soft_limit_is_raised_to_the_hard_one(site, workers):
    gateway = await started(site, 256, 4096, workers=workers, max_in_flight=1000)
    pids = [gateway.program.pid, *gateway.pids()]
    assert {tuple(limits_of(pid)) for pid in pids} == {("4096", "4096")}
    assert gateway.logged("descriptors_short") == []


async def test_a_limit_that_max_in_flight_does_not_fit_is_a_warning(site):
    gateway = await started(site, 256, 1024, max_in_flight=500)
    await until(lambda: gateway.logged("descriptors_short"), "the line")
    (line,) = gateway.logged("descriptors_short")
    assert (line["limit"], line["needed"], line["key"]) == (1024, 1064, "server.max_in_flight")


@contextlib.contextmanager
def crowd(gateway):
    """More connections than there are descriptors."""
    with contextlib.ExitStack() as stack:
        for _ in range(2 * FEW):
            stack.enter_context(socket.create_connection(gateway.address)).setblocking(False)
        yield


@pytest.mark.parametrize("fast_path", [True, False])
async def test_when_they_run_out_the_admin_listener_answers_and_requests_that_are_in_go_on(site, fast_path):
    gateway = await started(site, FEW, FEW, max_in_flight=40, fast_path=fast_path)
    caller = await site.key()
    assert (await site.chat(gateway, caller)).status == 200  # its connection is kept
    with crowd(gateway):
        await until(lambda: gateway.logged("descriptors_exhausted"), "the line")
        line = gateway.logged("descriptors_exhausted")[0]
        assert (line["level"], line["limit"]) == ("error", FEW)
        assert gateway.probe() == 200
        assert [(await site.chat(gateway, caller)).status for _ in range(5)] == [200] * 5
        assert gateway.metric("meshproxy_breaker_open") == 0

    async def answered():
        answer = await fetch("GET", f"{gateway.url}/v1/models", headers=caller.auth)
        return answer if not answer.broken else None

    assert (await until(answered, "room for newcomers")).status == 200


async def test_connections_without_their_proxy_header_leave_the_admin_listener_its_own(site):
    gateway = await started(site, FEW, FEW, max_in_flight=40, proxy_protocol=True)
    with crowd(gateway):
        await until(lambda: gateway.logged("descriptors_exhausted"), "the line")
        assert gateway.probe() == 200
