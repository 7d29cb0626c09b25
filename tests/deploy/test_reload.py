"""SIGHUP: what a running gateway takes from its file, and what it says about the rest."""

import os
import signal

import pytest

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
    ] == line["faults"]
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
