"""What the simulator remembers, and that it remembers no more than it may."""

import json
from types import SimpleNamespace

from meshproxy.simulator.delivery import COMPLETED
from meshproxy.simulator.server import MAX_BODY_BYTES, MAX_COUNTED, MAX_KEPT_BYTES, MAX_REQUESTS, RequestHistory

HELLO = [{"role": "user", "content": "Hello"}]
REQUEST = SimpleNamespace(method="POST", path_qs="/v1/chat/completions", raw_headers=[(b"X-A", b"1")])


async def test_received_requests_can_be_read_and_cleared(http):
    body = b'{"model": "sim/fast?tokens=4",  "messages": [{"role":"user","content":"hi"}], "stream": true}'
    async with http.post("/v1/chat/completions", data=body, headers={"X-Canary": "here"}) as answer:
        await answer.read()
    async with http.get("/_sim/requests") as answer:
        (entry,) = json.loads(await answer.read())["requests"]
    assert (body.decode(), json.loads(body)) == (entry["body_text"], entry["body"])
    assert tuple(entry[name] for name in ("ended", "status", "tokens", "events", "stream")) == (
        "completed",
        200,
        4,
        7,
        True,
    )
    assert ["X-Canary", "here"] in entry["headers"]
    async with http.delete("/_sim/requests") as answer:
        assert answer.status == 204
    async with http.get("/_sim/requests") as answer:
        assert json.loads(await answer.read()) == {"requests": []}


async def test_stats_tell_what_is_open(wire, http):
    wire.ask(model="sim/fast+stall", stream=True)
    await wire.until(b"\r\n\r\n")
    async with http.get("/_sim/stats") as answer:
        stats = json.loads(await answer.read())
    assert (stats["open_streams"], stats["open_requests"], stats["totals"]["streams"]) == (1, 1, 1)


async def test_models_are_listed_with_what_they_do(sdk):
    models = {model.id: model async for model in sdk.models.list()}
    assert {"gpt-4o", "sim/fast", "sim/die-mid-stream", "sim/error-STATUS"} <= set(models)
    assert "a byte order mark" in models["sim/bom"].description
    assert (await sdk.models.retrieve("openai/gpt-4o")).id == "openai/gpt-4o"


async def test_healthz(http):
    async with http.get("/healthz") as answer:
        assert (answer.status, json.loads(await answer.read())) == (200, {"status": "ok"})


def test_the_history_forgets_the_oldest():
    history = RequestHistory()
    for _ in range(MAX_REQUESTS + 5):
        history.close(history.open(REQUEST, b"{}"), COMPLETED)
    assert (len(history.requests), history.requests[0].number) == (MAX_REQUESTS, 5)
    assert history.totals[COMPLETED] == MAX_REQUESTS + 5


def test_the_journal_keeps_bodies_within_a_bound():
    history = RequestHistory()
    for _ in range(100):
        history.open(REQUEST, b"x" * (MAX_BODY_BYTES + 1))
    assert sum(len(entry.raw_body) for entry in history.requests) == MAX_KEPT_BYTES


def test_counts_are_bounded_too():
    history = RequestHistory()
    assert [history.count("0"), history.count("0")] == [1, 2]
    for name in range(1, MAX_COUNTED + 1):
        history.count(str(name))
    assert history.count("0") == 1


def test_what_is_no_json_is_told_as_text():
    entry = RequestHistory().open(REQUEST, b"\xff{")
    assert (entry.as_json()["body"], entry.as_json()["body_text"]) == (None, "\ufffd{")
