"""SIGHUP: what a running gateway takes from its file, and what it says about the rest."""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
from pathlib import Path

import pytest

from meshproxy.ledger.journal import MAX_FILES
from tests.harness.clients import CHAT, fetch
from tests.harness.waiting import until

MODES = pytest.mark.parametrize("workers", [1, 2])
GENERATION = "meshproxy_config_generation"
SUCCESSFUL = "meshproxy_config_last_reload_successful"


async def models(gateway, caller):
    """Asked on a connection of its own, which any worker may get."""
    answer = await fetch("GET", f"{gateway.url}/v1/models", headers=caller.auth)
    return {model["id"] for model in answer.json["data"]}


def config_metrics(gateway):
    return gateway.metric(GENERATION), gateway.metric(SUCCESSFUL)


async def reload(gateway, event="reloaded"):
    seen = len(gateway.logged(event))
    gateway.send(signal.SIGHUP)
    await until(lambda: len(gateway.logged(event)) > seen, event)


@MODES
async def test_a_reload_reaches_every_worker(site, workers):
    gateway = await site.gateway(workers=workers)
    caller = await site.key()
    assert await models(gateway, caller) == {"openai/gpt-4o"}
    site.configure(gateway, workers=workers, models=("sim/new",))
    await reload(gateway)
    for _ in range(4 * workers):
        assert await models(gateway, caller) == {"openai/gpt-4o", "sim/new"}
    assert config_metrics(gateway) == (2, 1)


@MODES
async def test_a_bad_file_changes_nothing_and_says_all_that_is_wrong(site, workers):
    gateway = await site.gateway(workers=workers)
    caller = await site.key()
    good = gateway.config.read_text()
    gateway.config.write_text(good.replace("[log]", "drain = 1\n[lag]").replace('"2.50"', "2.50"))
    await reload(gateway, "reload_failed")
    (line,) = gateway.logged("reload_failed")
    assert [fault.rpartition(" (")[0] for fault in line["faults"]] == [
        "server.drain: unknown key, did you mean drain_s?",
        "lag: unknown key, did you mean log?",
        'models."openai/gpt-4o".input_usd_per_mtok: expected a decimal string in USD, as "2.50"',
    ]
    assert await models(gateway, caller) == {"openai/gpt-4o"}
    assert config_metrics(gateway) == (1, 0)
    gateway.config.unlink()
    await reload(gateway, "reload_failed")
    assert gateway.logged("reload_failed")[1]["faults"] == [
        f"{gateway.config}: can't be read (No such file or directory)"
    ]
    gateway.config.write_text(good)
    await reload(gateway)
    assert config_metrics(gateway) == (2, 1)


@MODES
async def test_what_needs_a_restart_is_named_and_the_log_level_applies(site, workers):
    gateway = await site.gateway(workers=workers, level="warning")
    caller = await site.key()
    await models(gateway, caller)
    assert gateway.logged("request") == []
    site.configure(gateway, workers=3, admin_listen="127.0.0.1:9", level="info")
    await reload(gateway)
    named = ["server.admin_listen", "server.workers"]
    assert [line["key"] for line in gateway.logged("reload_needs_restart")] == named
    assert gateway.probe() == 200
    assert (await site.chat(gateway, caller)).status == 200
    await until(lambda: gateway.logged("request"), "the request's line")


async def test_a_worker_that_comes_later_has_the_newest_configuration(site):
    gateway = await site.gateway(workers=2)
    caller = await site.key()
    site.configure(gateway, workers=2, models=("sim/new",))
    await reload(gateway)
    good = gateway.config.read_text()
    gateway.config.write_text("[server")
    await reload(gateway, "reload_failed")
    for pid in gateway.pids():
        os.kill(pid, signal.SIGKILL)
    await until(lambda: [worker["restarts"] for worker in gateway.status()["workers"]] == [1, 1], "two new workers")
    assert config_metrics(gateway) == (2, 0)
    gateway.config.write_text(good)
    for _ in range(8):
        assert "sim/new" in await models(gateway, caller)


@MODES
@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('headers = { te = "trailers" }', "upstreams.sim.headers.te"),
        ('api_key = { env = "NO_SUCH_VARIABLE" }', "upstreams.sim.api_key"),
        ('headers = { a = { file = "/nonexistent" } }', "upstreams.sim.headers.a"),
    ],
)
async def test_what_no_worker_could_serve_takes_none_down(site, workers, line, key):
    gateway = await site.gateway(workers=workers)
    caller = await site.key()
    pids = gateway.pids()
    gateway.replace('kind = "simulator"', f'kind = "simulator"\n{line}')
    await reload(gateway, "reload_failed")
    (fault,) = gateway.logged("reload_failed")[0]["faults"]
    assert fault.startswith(f"{key}: ")
    assert config_metrics(gateway) == (1, 0)
    assert await models(gateway, caller) == {"openai/gpt-4o"}
    assert gateway.pids() == pids


@MODES
async def test_no_reload_costs_a_request(site, workers):
    gateway = await site.gateway(workers=workers)
    caller = await site.key(credit="1000")
    good = gateway.config.read_text()
    over = asyncio.Event()
    ended = []

    async def call():
        while not over.is_set():
            stream = len(ended) % 2 == 0
            answer = await site.chat(gateway, caller, stream=stream)
            ended.append((answer.is_whole, answer.is_done == stream))

    calling = [asyncio.create_task(call()) for _ in range(4)]
    for number in range(5):
        gateway.config.write_text(
            good.replace("drain_s = 10", f"drain_s = {number + 1}").replace("2.50", f"2.5{number}")
        )
        await reload(gateway)
        gateway.config.write_text(good.replace("[log]", "[lag]"))
        await reload(gateway, "reload_failed")
    over.set()
    await asyncio.gather(*calling)
    assert set(ended) == {(True, True)}
    assert config_metrics(gateway) == (6, 0)


@MODES
async def test_a_hangup_before_it_serves_is_a_reload_and_no_end(site, workers):
    gateway = site.configure(workers=workers)
    gateway.launch()

    def waits():
        """Whether SIGHUP is blocked by now: Python's own first steps are nobody's to protect (proc(5), SigBlk)."""
        with contextlib.suppress(FileNotFoundError, StopIteration):
            status = Path(f"/proc/{gateway.program.pid}/status").read_text().splitlines()
            blocked = next(line for line in status if line.startswith("SigBlk:"))
            return int(blocked.split()[1], 16) & 1 << (signal.SIGHUP - 1)

    await until(waits, "a blocked SIGHUP")
    gateway.send(signal.SIGHUP)
    await until(lambda: gateway.logged("reloaded"), "reloaded")
    await until(gateway.is_ready, "readiness")


@MODES
async def test_a_reader_of_stderr_that_stands_still_does_not_keep_it_from_its_end(site, workers):
    gateway = site.configure(workers=workers, drain_s=1, level="info")
    await gateway.started(stderr=subprocess.PIPE)
    caller = await site.key()
    for _ in range(600):  # more lines than the pipe takes
        await fetch("GET", f"{gateway.url}/v1/models", session=site.http, headers=caller.auth)
        await fetch("POST", gateway.url + CHAT, session=site.http, data=b"{", headers=caller.auth)
    gateway.send(signal.SIGTERM)
    assert await gateway.exit(1 + 10) == 0
    gateway.program.process.stderr.close()


@MODES
async def test_what_only_a_worker_finds_ends_them_all_with_78_at_once(site, tmp_path, workers):
    """A journal whose files are all another gateway's: nothing that a check could know."""
    gateway = site.configure(workers=workers)
    journal = tmp_path / "journal"
    gateway.replace("[redis]", f'[redis]\njournal = "{journal}"')
    with contextlib.ExitStack() as stack:
        for number in range(MAX_FILES):
            file = stack.enter_context(Path(f"{journal}.{number}").open("wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
        gateway.launch()
        assert await gateway.exit(10) == 78
    (fault,) = gateway.noise
    assert fault == f"redis.journal: {journal}: all {MAX_FILES} files are in use"
