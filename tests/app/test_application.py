"""The gateway inside another program: through its middlewares, on its server, and without a change to it."""

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

import pytest
import structlog
from aiohttp import web

from meshproxy import create_app
from meshproxy.units import parse_usd
from tests.harness.books import Books
from tests.harness.clients import chat
from tests.harness.mesh import model, settings_for
from tests.harness.process import Program, free_port, listens, toml

EXAMPLE = Path(__file__).parents[2] / "examples" / "jwt_gateway.py"


@pytest.fixture
async def books(store_server):
    opened = await Books.open(store_server)
    yield opened
    await opened.close()


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


async def test_the_chat_path_passes_through_middlewares(serve, books):
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
    caller = await books.key()
    for stream in (False, True):
        answer = await chat(url, caller.auth, stream=stream)
        assert (answer.is_whole, answer.is_done) == (True, stream)
    refused = await chat(url, caller.auth, headers={"x-refuse": "1"})
    assert (refused.status, refused.code, refused.error["message"]) == (401, "unauthorized", "Not today.")
    assert seen == ["/v1/chat/completions"] * 3


async def test_a_hangup_ends_the_stream_and_is_billed(serve, books, simulator):
    url = await serve(models={"m/slow": model("sim", "sim/plain?tokens=5000&tps=50")})
    caller = await books.key()
    await chat(url, caller.auth, model="m/slow", stream=True, hang_up_after_events=4)
    (settled,) = await books.settled(caller.account, 1)
    assert settled["outcome"] == "client_disconnected"
    balance = await books.balanced(caller.account)
    assert 0 < balance.settled_nusd < parse_usd("0.01")  # not the 5,000 tokens


def token(claims, secret, alg="HS256"):
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": alg}, claims)]
    signature = hmac.digest(secret, b".".join(parts), hashlib.sha256)
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


@pytest.fixture
async def example(store_server, simulator, books, tmp_path):
    """The example as a process of its own: its URL."""
    tables = {
        "redis": {"url": store_server},
        "upstreams": {"sim": {"kind": "openai", "base_url": simulator.base_url}},
        "models": {"openai/gpt-4o": model("sim", "gpt-4o")},
    }
    (tmp_path / "meshproxy.toml").write_text(toml(tables))
    port, caller = free_port(), await books.key()
    env = {**os.environ, "JWT_SECRET": "s3cret", "TEAM_KEYS": json.dumps({"research": caller.secret})}
    with Program(
        sys.executable, EXAMPLE, tmp_path / "meshproxy.toml", str(port), log=tmp_path / "log", env=env
    ) as running:
        await running.until(lambda: listens(port))
        yield f"http://127.0.0.1:{port}"
        running.stop()


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
    for bearer, expected in cases:
        answer = await chat(example, {"authorization": f"Bearer {bearer}"})
        assert (answer.status, "error" not in answer.json) == (expected, expected == 200), bearer
