"""SIGHUP: what a running gateway takes from its file, and what it says about the rest."""

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from pathlib import Path

import pytest

from meshproxy.ledger.journal import MAX_FILES
from tests.deploy.conftest import until

MODES = pytest.mark.parametrize("workers", [1, 2])
GENERATION = "meshproxy_config_generation"
SUCCESSFUL = "meshproxy_config_last_reload_successful"


async def models(site, gateway, caller):
    async with site.http.get(f"{gateway.url}/v1/models", headers=caller.auth) as answer:
        return {model["id"] for model in (await answer.json())["data"]}


async def config_metrics(site, gateway):
    return await site.metric(gateway, GENERATION), await site.metric(gateway, SUCCESSFUL)


async def reload(gateway, event="reloaded"):
    seen = len(gateway.logged(event))
    gateway.signal(signal.SIGHUP)
    await until(lambda: len(gateway.logged(event)) > seen, event)


@MODES
async def test_a_reload_reaches_every_worker(site, workers):
    gateway = await site.gateway(workers=workers)
    caller = await site.key()
    assert {"openai/gpt-4o"} == await models(site, gateway, caller)
    site.configure(gateway, workers=workers, models=("sim/new",))
    await reload(gateway)
    for _ in range(4 * workers):
        assert {"openai/gpt-4o", "sim/new"} == await models(site, gateway, caller)
    assert (2, 1) == await config_metrics(site, gateway)


@MODES
async def test_a_bad_file_changes_nothing_and_says_all_that_is_wrong(site, workers):
    gateway = await site.gateway(workers=workers)
    caller = await site.key()
    good = gateway.path.read_text()
    gateway.path.write_text(good.replace("[log]", "drain = 1\n[lag]").replace('"2.50"', "2.50"))
    await reload(gateway, "reload_failed")
    (line,) = gateway.logged("reload_failed")
    assert [
        "server.drain: unknown key, did you mean drain_s?",
        "lag: unknown key, did you mean log?",
        'models."openai/gpt-4o".input_usd_per_mtok: expected a decimal string in USD, as "2.50"',
    ] == [fault.rpartition(" (")[0] for fault in line["faults"]]
    assert {"openai/gpt-4o"} == await models(site, gateway, caller)
    assert (1, 0) == await config_metrics(site, gateway)
    gateway.path.unlink()
    await reload(gateway, "reload_failed")
    assert gateway.logged("reload_failed")[1]["faults"] == [
        f"{gateway.path}: can't be read (No such file or directory)"
    ]
    gateway.path.write_text(good)
    await reload(gateway)
    assert (2, 1) == await config_metrics(site, gateway)


@MODES
async def test_what_needs_a_restart_is_named_and_the_log_level_applies(site, workers):
    gateway = await site.gateway(workers=workers, level="warning")
    caller = await site.key()
    await models(site, gateway, caller)
    assert [] == gateway.logged("request")
    site.configure(gateway, workers=3, admin_listen="127.0.0.1:9", level="info")
    await reload(gateway)
    named = ["server.admin_listen", "server.workers"]
    assert named == [line["key"] for line in gateway.logged("reload_needs_restart")]
    assert 200 == await site.probe(gateway)
    async with site.http.post(
        f"{gateway.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hi"}]},
        headers=caller.auth,
    ) as answer:
        assert 200 == answer.status
    await until(lambda: gateway.logged("request"), "the request's line")


async def test_a_worker_that_comes_later_has_the_newest_configuration(site):
    gateway = await site.gateway(workers=2)
    caller = await site.key()
    site.configure(gateway, workers=2, models=("sim/new",))
    await reload(gateway)
    good = gateway.path.read_text()
    gateway.path.write_text("[server")
    await reload(gateway, "reload_failed")
    for worker in (await site.status(gateway))["workers"]:
        os.kill(worker["pid"], signal.SIGKILL)

    async def replaced():
        workers = (await site.status(gateway))["workers"]
        return [1, 1] == [worker["restarts"] for worker in workers]

    await until(replaced, "two new workers")
    assert (2, 0) == await config_metrics(site, gateway)
    gateway.path.write_text(good)
    for _ in range(8):
        assert "sim/new" in await models(site, gateway, caller)


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
    pids = {worker["pid"] for worker in (await site.status(gateway))["workers"]}
    gateway.path.write_text(gateway.path.read_text().replace('kind = "simulator"', f'kind = "simulator"\n{line}'))
    await reload(gateway, "reload_failed")
    (fault,) = gateway.logged("reload_failed")[0]["faults"]
    assert fault.startswith(f"{key}: ")
    assert (1, 0) == await config_metrics(site, gateway)
    assert {"openai/gpt-4o"} == await models(site, gateway, caller)
    assert pids == {worker["pid"] for worker in (await site.status(gateway))["workers"]}


@MODES
async def test_no_reload_costs_a_request(site, workers):
    gateway = await site.gateway(workers=workers)
    caller = await site.key(credit="1000")
    good = gateway.path.read_text()
    over = asyncio.Event()
    ended = []

    async def call():
        while not over.is_set():
            body = {
                "model": "openai/gpt-4o",
                "messages": [{"role": "user", "content": "Hi"}],
                "stream": len(ended) % 2 == 0,
            }
            async with site.http.post(f"{gateway.url}/v1/chat/completions", json=body, headers=caller.auth) as answer:
                ended.append((answer.status, body["stream"] == (await answer.text()).endswith("[DONE]\n\n")))

    calling = [asyncio.create_task(call()) for _ in range(4)]
    for number in range(5):
        gateway.path.write_text(good.replace("drain_s = 10", f"drain_s = {number + 1}").replace("2.50", f"2.5{number}"))
        await reload(gateway)
        gateway.path.write_text(good.replace("[log]", "[lag]"))
        await reload(gateway, "reload_failed")
    over.set()
    await asyncio.gather(*calling)
    assert {(200, True)} == set(ended)
    assert (6, 0) == await config_metrics(site, gateway)


@MODES
async def test_a_hangup_before_it_serves_is_a_reload_and_no_end(site, workers):
    gateway = site.configure(workers=workers)
    await gateway.start()
    site.stack.push_async_callback(gateway.end)

    def waits():
        """Whether SIGHUP is blocked by now: Python's own first steps are nobody's to protect (proc(5), SigBlk)."""
        with contextlib.suppress(FileNotFoundError, StopIteration):
            status = Path(f"/proc/{gateway.process.pid}/status").read_text().splitlines()
            blocked = next(line for line in status if line.startswith("SigBlk:"))
            return int(blocked.split()[1], 16) & 1 << (signal.SIGHUP - 1)

    await until(waits, "a blocked SIGHUP")
    gateway.signal(signal.SIGHUP)
    await until(lambda: gateway.logged("reloaded"), "reloaded")
    await until(lambda: site.ready(gateway), "readiness")


@MODES
async def test_a_reader_of_stderr_that_stands_still_does_not_keep_it_from_its_end(site, workers):
    gateway = site.configure(workers=workers, drain_s=1, level="info")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "meshproxy", "serve", "--config", str(gateway.path)),
        stderr=asyncio.subprocess.PIPE,
        limit=1,
    )
    try:
        await until(lambda: site.ready(gateway), "readiness")
        caller = await site.key()
        for _ in range(600):  # more lines than the pipe takes
            await models(site, gateway, caller)
            async with site.http.post(f"{gateway.url}/v1/chat/completions", data=b"{", headers=caller.auth) as answer:
                await answer.read()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(1 + 10):
            while process.returncode is None:
                await asyncio.sleep(0.05)
        assert 0 == process.returncode
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@MODES
async def test_what_only_a_worker_finds_ends_them_all_with_78_at_once(site, tmp_path, workers):
    """A journal whose files are all another gateway's: nothing that a check could know."""
    gateway = site.configure(workers=workers)
    journal = tmp_path / "journal"
    gateway.path.write_text(gateway.path.read_text().replace("[redis]", f'[redis]\njournal = "{journal}"'))
    with contextlib.ExitStack() as stack:
        for number in range(MAX_FILES):
            file = stack.enter_context(Path(f"{journal}.{number}").open("wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
        await gateway.start()
        site.stack.push_async_callback(gateway.end)
        assert 78 == await gateway.exit(10)
    (fault,) = gateway.noise
    assert fault == f"redis.journal: {journal}: all {MAX_FILES} files are in use\n"
