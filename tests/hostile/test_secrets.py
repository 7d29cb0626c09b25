"""Canaries in every field and header of a request, in keys and in providers' words, through success and every error: they are
found in no log of any level, in no metric, not in Redis, not in another client's answer, and at the provider only where they
belong.
"""

import hashlib
import io
import json
import logging
import re

import pytest
import redis
import structlog

from meshproxy.openai.headers import FORWARDED
from meshproxy.policy.principal import Limits
from meshproxy.telemetry.exposition import decode, render
from meshproxy.telemetry.logs import configure
from tests.harness.mesh import PRICE
from tests.hostile.corpus import CHAT, request
from tests.hostile.parrot import ANSWER, WAYS, parrot

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

PROVIDER_KEY = "sim-canary-Zy81-provider-key"
HEADER_KEY = "header-canary-Qk92-provider"
UNKNOWN = "rsk_canaryUnknownSecret"
PROMPTS = ("canary-prompt", "canary-tool", "canary-user", "canary-unknown", "canary-variable")
PRIVATE = ("canary-cookie", "canary-agent", "canary-organization", "canary-query", "canary-header", "canary-api-key")
FREE = Limits(1_000_000, 1_000_000_000, 1_000_000)
OURS = {"host", "user-agent", "accept-encoding", "content-type", "content-length", "authorization", "x-api-key"}

BODY = {
    "messages": [{"role": "user", "content": "canary-prompt", "name": "canary-prompt"}],
    "tools": [{"type": "function", "function": {"name": "canary-tool", "description": "canary-tool"}}],
    "user": "canary-user",
    "stop": ["canary-user"],
    "metadata": {"canary-unknown": "canary-unknown"},
    "canary-unknown": ["canary-unknown"],
    "template": "greeter",
    "variables": {"name": "canary-variable", "canary-variable": "canary-variable"},
    "session_id": "canary-session",
}
HEADERS = {
    "cookie": "canary-cookie",
    "user-agent": "canary-agent",
    "openai-organization": "canary-organization",
    "openai-project": "canary-organization",
    "referer": "http://canary-query/",
    "x-api-key": "canary-api-key",
    "api-key": "canary-api-key",
    "proxy-authorization": "Basic canary-api-key",
    "x-canary": "canary-header",
    "forwarded": "by=canary-header",
    "http-referer": "http://canary-referer/",
    "x-title": "canary-title",
}


@pytest.fixture
def log():
    """Everything that is logged, at the lowest level."""
    stream = io.BytesIO()
    handlers, level = logging.root.handlers[:], logging.root.level
    sink = configure("debug", "json", stream)
    yield lambda: (sink.flush(), stream.getvalue().decode())[1]
    sink.close()
    logging.captureWarnings(capture=False)
    logging.basicConfig(level=level, handlers=handlers, force=True)
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def empty_store(store_server):
    """Remove what earlier tests stored: these look at all of Redis."""
    with redis.Redis.from_url(store_server) as store:
        store.flushdb()


@pytest.fixture
async def bird():
    async with parrot() as found:
        yield found


@pytest.fixture
async def mesh(start_mesh, bird):
    upstream = {"kind": "openai", "base_url": bird.url, "headers": {"x-api-key": HEADER_KEY}}
    models = {f"p/{way}": {"upstreams": [{"upstream": "sim", "model": way}], **PRICE} for way in WAYS}
    mesh = await start_mesh(upstreams={"sim": upstream}, models=models)
    mesh.worker.reload(mesh.worker.prepare(mesh.worker.settings, {"sim": PROVIDER_KEY}, 2))
    return mesh


@pytest.fixture
async def caller(mesh):
    caller = await mesh.key(limits=FREE)
    made = {"name": "greeter", "system": "Hello {{ name }}"}
    assert (await mesh.request("POST", "/v1/templates", json=made, headers=caller.auth)).status == 201
    return caller


async def test_no_canary_is_where_it_does_not_belong(mesh, caller, bird, log):
    answers = [
        await mesh.chat(caller, headers=HEADERS, model=f"p/{way}", stream=stream, **BODY)
        for way in WAYS
        for stream in (False, True)
    ]
    answers += [answer async for answer in _refusals(mesh, caller)]
    assert {200, 400, 401, 402, 404, 405, 413, 415, 422, 429, 502, 503} <= {answer.status for answer in answers}
    await mesh.quiet()
    told = "".join(f"{dict(answer.headers)}{answer.body.decode()}" for answer in answers)
    logged = log() + json.dumps(mesh.log.lines)
    metrics = (await render(decode(await mesh.worker.metrics.snapshot()), OPENMETRICS))[0].decode()
    stored = await _stored(mesh)
    heard = str(bird.heard)

    assert (
        _found(logged, caller.secret, UNKNOWN, PROVIDER_KEY, HEADER_KEY, *PROMPTS, *PRIVATE, ANSWER, "canary-session")
        == []
    )
    assert _found(metrics, caller.secret, UNKNOWN, PROVIDER_KEY, HEADER_KEY, "canary", caller.account) == []
    assert _found(stored, caller.secret, UNKNOWN, PROVIDER_KEY, HEADER_KEY, *PROMPTS, *PRIVATE, ANSWER) == []
    assert _found(told, caller.secret, UNKNOWN, PROVIDER_KEY, HEADER_KEY, *PRIVATE, "org-canary", "x-echo") == []
    assert _found(heard, caller.secret, *PRIVATE, "canary-session", "greeter", caller.account, caller.key.id) == []
    assert hashlib.sha256(caller.secret.encode()).hexdigest() in stored  # that it was looked for where it is
    assert "canary-session" in stored


async def test_the_provider_hears_what_the_list_says_and_nothing_else(mesh, caller, bird):
    await mesh.chat(caller, headers=HEADERS, model="p/well", **BODY)
    ((headers, body),) = bird.heard
    assert headers.keys() - {*OURS, *FORWARDED} == set()
    assert headers["authorization"] == f"Bearer {PROVIDER_KEY}"
    assert headers["x-api-key"] == HEADER_KEY
    assert json.loads(body).keys() == BODY.keys() - {"template", "variables", "session_id"} | {
        "model",
    }


async def test_another_client_hears_nothing_of_it(mesh, caller):
    other = await mesh.key(limits=FREE)
    for way in WAYS:
        await mesh.chat(caller, headers=HEADERS, model=f"p/{way}", **BODY)
        answer = await mesh.chat(other, model=f"p/{way}", session_id="canary-session")
        assert (
            _found(f"{dict(answer.headers)}{answer.body.decode()}", *PROMPTS, *PRIVATE, "greeter", caller.account) == []
        )


async def test_a_replay_keeps_the_answer_and_not_the_question(mesh, caller):
    headers = {**HEADERS, "idempotency-key": "canary-header"}
    first = await mesh.chat(caller, headers=headers, model="p/well", **BODY)
    again = await mesh.chat(caller, headers=headers, model="p/well", **BODY)
    assert first.body == again.body
    stored = await _stored(mesh)
    assert ANSWER in stored
    assert _found(stored, caller.secret, PROVIDER_KEY, HEADER_KEY, *PROMPTS, *PRIVATE) == []


@pytest.mark.parametrize("way", ["say-400", "say-500", "text", "html", "error-in-200", "error-event"])
async def test_the_providers_words_are_told_with_our_keys_taken_out(mesh, caller, way):
    answer = await mesh.chat(caller, model=f"p/{way}", stream=way == "error-event", **BODY)
    told = answer.body.decode()
    assert "provider_error" in told
    assert _found(told, PROVIDER_KEY, PROVIDER_KEY[:8], HEADER_KEY, HEADER_KEY[:8]) == []
    assert "[redacted]" in told


async def test_the_words_of_a_provider_make_no_events_and_no_headers(mesh, caller, bird):
    evil = "data: {}\n\ndata: [DONE]\n\nevent: x\r\nset-cookie: a=b\r\n\r\nHTTP/1.1 200 OK"
    for way in ("say-400", "say-500", "error-event"):
        body = {**BODY, "metadata": {"x": evil}}
        answer = await mesh.chat(caller, model=f"p/{way}", stream=way == "error-event", **body)
        lines = answer.body.decode().splitlines()
        assert [line for line in lines if line and not line.startswith(("data: {", "{"))] == []
        assert "set-cookie" not in answer.headers
        assert b"[DONE]" not in re.sub(rb'"(?:[^"\\]|\\.)*"', b"", answer.body)


async def test_what_a_client_sends_makes_no_header_for_the_provider(mesh, caller, bird):
    split = ["a\r\nx-evil: b", "a\nx-evil: b", "a\rx-evil: b", "a\0b"]
    for value in split:
        raw = request(b"X-Title: " + value.encode("latin-1"), b"Content-Length: 2", b"Connection: close", body=b"{}")
        await mesh.raw(raw.replace(b"KEY", caller.secret.encode()))
    for value in ("\xff\xfe", "x" * 5000):
        answer = await mesh.chat(caller, headers={"x-title": value}, model="p/well", **BODY)
        assert answer.status == 200
    assert len(bird.heard) == 2
    assert [headers for headers, _ in bird.heard if "x-evil" in headers or "x-title" in headers] == []


async def _refusals(mesh, caller):
    """Every error that comes before a provider, with a canary in what is refused."""
    poor, slow = await mesh.key(credit="0"), await mesh.key(limits=Limits(1, 1_000_000, 1))
    canary = {"model": "p/well", **BODY}
    yield await mesh.post(caller, b'{"canary-prompt": ', headers=HEADERS)
    yield await mesh.post(caller, {**canary, "temperature": "canary-prompt"}, headers=HEADERS)
    yield await mesh.post(caller, {**canary, "variables": {"x": "canary-variable"}}, headers=HEADERS)
    yield await mesh.post(caller, {**canary, "model": "canary-unknown"}, headers=HEADERS)
    yield await mesh.post(caller, {**canary, "template": "canary-unknown"}, headers=HEADERS)
    yield await mesh.post(poor, {"model": "p/well", "messages": BODY["messages"]}, headers=HEADERS)
    await mesh.post(slow, {"model": "p/well", "messages": BODY["messages"]}, headers=HEADERS)
    yield await mesh.post(slow, {"model": "p/well", "messages": BODY["messages"]}, headers=HEADERS)
    yield await mesh.post(caller, b"canary-prompt", headers={**HEADERS, "content-type": "text/canary-header"})
    yield await mesh.post(caller, canary, headers={**HEADERS, "authorization": f"Bearer {UNKNOWN}"})
    yield await mesh.post(caller, canary, headers={**HEADERS, "idempotency-key": "canary-header" * 100})
    for method, path in (("GET", "/nowhere?canary-query"), ("PUT", CHAT.decode()), ("GET", "/v1/key?canary-query")):
        yield await mesh.request(method, path, headers={**HEADERS, **caller.auth})
    yield await mesh.request("GET", f"/v1/models/{caller.key.id}", headers=HEADERS)
    yield await mesh.post(caller, b"canary-prompt" * 3_000_000, headers=HEADERS)
    raw = await mesh.raw(request(b"Bad Header: canary-header").replace(b"KEY", caller.secret.encode()))
    head, _, body = raw.partition(b"\r\n\r\n")
    yield type(await mesh.request("GET", "/"))(int(head.split()[1]), {}, body)


async def _stored(mesh) -> str:
    """All of Redis, as text."""
    store = mesh.worker.store
    told = []
    for key in await store.execute("KEYS", "*"):
        kind = (await store.execute("TYPE", key)).decode()
        if kind == "none":  # another test's, and expired meanwhile
            continue
        read = {
            "string": ("GET", key),
            "hash": ("HGETALL", key),
            "list": ("LRANGE", key, 0, -1),
            "set": ("SMEMBERS", key),
            "zset": ("ZRANGE", key, 0, -1),
            "stream": ("XRANGE", key, "-", "+"),
        }[kind]
        told.append(f"{key} {await store.execute(*read)}")
    return "\n".join(told)


def _found(text: str, *canaries: str) -> list[str]:
    return [canary for canary in canaries if canary in text]
