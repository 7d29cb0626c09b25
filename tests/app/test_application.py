"""The gateway inside another program: through its middlewares, on its server, and without a change to it."""

import asyncio
import base64
import gc
import hashlib
import hmac
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import aiohttp
import pytest
import structlog
from aiohttp import web

from meshproxy import create_app
from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.units import parse_usd
from tests.harness.books import Caller, usage_events
from tests.harness.clients import HELLO
from tests.harness.mesh import settings_for
from tests.harness.process import free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "jwt_gateway.py"
CONFIG = """
[redis]
url = "{redis}"
[upstreams.sim]
kind = "openai"
base_url = "{provider}"
[models."openai/gpt-4o"]
upstreams = [{{ upstream = "sim", model = "gpt-4o" }}]
input_usd_per_mtok = "2.50"
output_usd_per_mtok = "10.00"
"""


@pytest.fixture
async def store(store_server):
    store = await connect(Redis(url=store_server))
    yield store
    await store.close()


async def new_caller(store, account):
    secret, key = await Directory(store).create_key(account)
    await Ledger(store).grant(account, parse_usd("25"))
    return Caller(secret, key)


@pytest.fixture
async def serve(store_server, simulator):
    """Serve an application of these middlewares as any program would: its URL."""
    runners = []

    async def serve(*middlewares, **tables):
        settings = settings_for(store_server, simulator.base_url, **tables)
        runner = web.AppRunner(create_app(settings, middlewares), shutdown_timeout=1)  # handler_cancellation is False
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return "http://{}:{}".format(*runner.addresses[0])

    yield serve
    for runner in runners:
        await runner.cleanup()


def host():
    """What a program has, and a library is not to change."""
    root = logging.getLogger()
    signals = [signal.getsignal(signum) for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)]
    return gc.get_threshold(), gc.get_freeze_count(), root.level, list(root.handlers), structlog.get_config(), signals


async def test_the_host_is_as_it_was(serve):
    before = host()
    await serve()
    assert host() == before


async def test_the_chat_path_passes_through_middlewares(serve, store):
    seen = []

    @web.middleware
    async def note(request, handler):
        seen.append(request.path)
        return await handler(request)

    @web.middleware
    async def refuse(request, handler):
        if "x-refuse" in request.headers:
            raise web.HTTPUnauthorized(reason="Not today.")
        return await handler(request)

    url = await serve(note, refuse)
    caller = await new_caller(store, "library-1")
    async with aiohttp.ClientSession(url, headers=caller.auth) as http:
        for stream in (False, True):
            body = {"messages": HELLO, "stream": stream}
            async with http.post("/v1/chat/completions", json=body) as answer:
                assert answer.status == 200
                assert (await answer.text()).endswith("data: [DONE]\n\n") == stream
        async with http.post("/v1/chat/completions", json={"messages": HELLO}, headers={"x-refuse": "1"}) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["message"]) == (401, "unauthorized", "Not today.")
    assert seen == ["/v1/chat/completions"] * 3


async def test_a_hangup_ends_the_stream_and_is_billed(serve, store, simulator):
    slow = {"m/slow": {"upstreams": [{"upstream": "sim", "model": "sim/plain?tokens=5000&tps=50"}]}}
    prices = {"input_usd_per_mtok": "2.50", "output_usd_per_mtok": "10.00"}
    url = await serve(models={name: {**model, **prices} for name, model in slow.items()})
    caller = await new_caller(store, "library-2")
    async with aiohttp.ClientSession(url, headers=caller.auth) as http:
        body = {"messages": HELLO, "stream": True, "model": "m/slow"}
        async with http.post("/v1/chat/completions", json=body) as answer:
            for _ in range(8):
                await answer.content.readline()
            answer.close()
    async with asyncio.timeout(5):
        while not (settled := [e for e in await usage_events(store, caller.account) if e["event"] == "settled"]):
            await asyncio.sleep(0.01)
    assert settled[0]["outcome"] == "client_disconnected"
    balance = await Ledger(store).balance(caller.account)
    assert balance.held_nusd == 0
    assert 0 < balance.settled_nusd < parse_usd("0.01")  # not the 5,000 tokens


def token(claims, secret, alg="HS256"):
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": alg}, claims)]
    signature = hmac.digest(secret, b".".join(parts), hashlib.sha256)
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


@pytest.fixture
async def example(store_server, simulator, store, tmp_path):
    """The example as a process of its own: its URL."""
    caller = await new_caller(store, "library-3")
    (tmp_path / "meshproxy.toml").write_text(CONFIG.format(redis=store_server, provider=simulator.base_url))
    port = free_port()
    env = {**os.environ, "JWT_SECRET": "s3cret", "TEAM_KEYS": json.dumps({"research": caller.secret})}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLE), str(tmp_path / "meshproxy.toml"), str(port)),
        env=env,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def test_the_example_takes_a_token_for_a_key(example):
    soon = time.time() + 60
    cases = [
        (token({"team": "research", "exp": soon}, b"s3cret"), 200),
        (token({"team": "research", "exp": soon}, b"other"), 401),
        (token({"team": "research", "exp": soon}, b"s3cret", alg="none"), 401),
        (token({"team": "research", "exp": 1}, b"s3cret"), 401),
        (token({"team": "sales", "exp": soon}, b"s3cret"), 403),
        ("rsk_whatever", 401),
        ("a.b.c", 401),
    ]
    async with aiohttp.ClientSession(example) as http:
        async with asyncio.timeout(20):
            while True:
                try:
                    async with http.get("/v1/models"):
                        break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)
        for bearer, expected in cases:
            headers = {"authorization": f"Bearer {bearer}"}
            async with http.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers) as answer:
                body = await answer.json()
                assert (expected, expected == 200) == (answer.status, "error" not in body), bearer
