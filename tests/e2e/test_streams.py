"""Streams as a client sees them, whatever the provider does to them, and what they are charged."""

import asyncio
import gc
import json
import socket
import struct
from operator import itemgetter

import openai
import pytest
from msgspec.structs import replace

from meshproxy.ledger.records import AccountKeys
from meshproxy.ledger.replays import Replays, body_digest
from meshproxy.policy.principal import Limits
from meshproxy.server.chat import ClientStream
from meshproxy.telemetry.exposition import decode
from meshproxy.units import parse_usd
from tests.harness.clients import CHAT, HELLO
from tests.harness.mesh import PRICE, model
from tests.harness.waiting import PATIENCE_S

REPORTED_NUSD = 6 * 2_500 + 8 * 10_000  # what the simulator reports of HELLO and eight tokens
PROMPT_NUSD = 9 * 2_500  # of HELLO, where nobody reports it
HELD_NUSD = 18 * 2_500 + 256 * 10_000  # the estimate of HELLO, and a slice of output
SEED = 7
# how a provider fails a stream, and what comes of it: the client's status and code, the log's outcome, and whose count is charged
FAILING = {
    **dict.fromkeys(
        ("die-mid-stream", "reset-mid-stream", "bad-chunk", "end-early", "error-mid-stream"),
        (200, "upstream_error", "upstream_failed", "estimated"),
    ),
    "stall-mid": (200, "gateway_timeout", "upstream_failed", "estimated"),
    "not-json": (200, "upstream_error", "upstream_failed", "none"),
    "stall": (504, "gateway_timeout", "failed", "none"),
    **dict.fromkeys(
        (
            *("redirect", "error-html", "empty", "refuse", "reset", "error-500", "error-401"),
            *("die-mid-stream?after=0", "reset-mid-stream?after=0", "bad-chunk?after=0", "end-early?after=0"),
            *("error-mid-stream?after=0", "comments+error-mid-stream?after=0"),
        ),
        (502, "upstream_error", "failed", "none"),
    ),
    "error-429": (503, "provider_not_available", "failed", "none"),
}
HARMLESS = ("burst", "split", "crlf", "comments", "ids", "bom", "eof-delimited", "content-length-stream", "usage-every")


async def test_a_stream_is_whole_and_settled_by_the_reported_usage(mesh):
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="sim/plain")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert answer.events[-1] == "[DONE]"
    assert len([event for event in answer.events[1:-1] if event["choices"][0]["delta"]]) == 8
    settled = await mesh.settlement(caller)
    assert (
        settled["prompt_tokens"],
        settled["completion_tokens"],
        settled["cost_nusd"],
    ) == ("6", "8", str(REPORTED_NUSD))
    assert (
        settled["usage_source"],
        settled["outcome"],
        settled["held_nusd"],
    ) == ("reported", "completed", str(HELD_NUSD))
    assert await mesh.spent(caller) == REPORTED_NUSD


@pytest.mark.parametrize("trait", HARMLESS)
async def test_however_it_comes_it_reads_the_same(mesh, trait):
    caller = await mesh.key()
    plain = await mesh.stream(caller, model="sim/plain", seed=SEED)
    answer = await mesh.stream(caller, model=f"sim/{trait}", seed=SEED)
    assert plain.text == answer.text
    assert answer.events[-1] == "[DONE]"
    lines = answer.body.decode().split("\n")
    assert {line for line in lines if line.startswith(("id:", "retry:")) or "\r" in line or "\ufeff" in line} == set()
    assert [int(event["cost_nusd"]) for event in await mesh.settlements(caller)] == [REPORTED_NUSD] * 2


async def test_events_without_data_are_not_passed_on(mesh):
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="sim/ids")
    events = answer.body.decode().rstrip("\n").split("\n\n")
    assert [event for event in events if "data:" not in event and not event.startswith(":")] == []


async def test_every_character_survives_awkward_cuts(start_mesh):
    models = {name: model("sim", f"{name}?tokens=60") for name in ("sim/unicode", "sim/unicode+split")}
    mesh = await start_mesh(models=models)
    caller = await mesh.key()
    whole = await mesh.stream(caller, model="sim/unicode", seed=SEED)
    cut = await mesh.stream(caller, model="sim/unicode+split", seed=SEED)
    assert whole.text == cut.text
    assert any(ord(character) > 0xFFFF for character in whole.text)


async def test_usage_is_shown_to_who_asked_for_it(mesh):
    caller = await mesh.key()
    asked = await mesh.stream(caller, model="sim/plain", stream_options={"include_usage": True})
    assert (asked.events[-2]["choices"], asked.events[-2]["usage"]["completion_tokens"]) == ([], 8)
    hidden = await mesh.stream(caller, model="sim/plain")
    assert [event for event in hidden.events[:-1] if not event["choices"]] == []
    bodies = [json.loads(entry.raw_body) for entry in mesh.received]
    assert [body["stream_options"]["include_usage"] for body in bodies] == [True, True]


async def test_usage_in_the_finishing_chunk_counts_and_the_chunk_is_kept(mesh):
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="sim/usage-early")
    assert answer.events[-2]["choices"][0]["finish_reason"] == "stop"
    assert (await mesh.settlement(caller))["usage_source"] == "reported"


@pytest.mark.parametrize(("asked", "least", "most"), [({"stream": True}, 8, 16), ({"max_tokens": 10}, 1, 10)])
@pytest.mark.parametrize("trait", ["no-usage", "usage-negative", "usage-absurd"])
async def test_usage_that_cannot_be_believed_is_estimated(mesh, trait, asked, least, most):
    caller = await mesh.key()
    answer = await mesh.chat(caller, model=f"sim/{trait}", **asked)
    assert (answer.is_whole, answer.is_done) == (True, "stream" in asked)
    settled = await mesh.settlement(caller)
    assert (settled["usage_source"], settled["outcome"], settled["prompt_tokens"]) == ("estimated", "completed", "9")
    assert least <= int(settled["completion_tokens"]) <= most
    assert 0 < await mesh.spent(caller) <= int(settled["held_nusd"])


async def test_a_lying_provider_is_not_believed_past_what_was_asked_for(mesh):
    caller = await mesh.key(credit="0.001")
    await mesh.stream(caller, model="sim/no-usage", max_tokens=3)
    settled = await mesh.settlement(caller)
    assert int(settled["cost_nusd"]) <= int(settled["held_nusd"])
    assert int(settled["completion_tokens"]) <= 3


@pytest.mark.parametrize("trait", FAILING)
async def test_a_stream_whose_provider_fails_is_ended_honestly(start_mesh, simulator, trait):
    status, code, outcome, source = FAILING[trait]
    idle_timeout_s = 0.1 if "stall" in trait else 10
    mesh = await start_mesh(
        upstreams={"sim": {"kind": "openai", "base_url": simulator.base_url, "idle_timeout_s": idle_timeout_s}},
        models={
            "m": model("sim", f"sim/{trait}{'&' if '?' in trait else '?'}tokens=8&tps=50")
        },  # its events come one by one
    )
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="m")
    assert (answer.status, answer.code, b"[DONE]" in answer.body) == (status, code, False)
    told = answer.events[-1] if status == 200 else answer.json
    assert told["request_id"] == told["error"]["request_id"] == answer.headers["x-request-id"]
    settled, line = await mesh.settlement(caller), mesh.log.lines[-1]
    assert (settled["outcome"], settled["usage_source"]) == (line["outcome"], line["usage_source"]) == (outcome, source)
    assert (line["status"], line["code"], len(mesh.received)) == (status, code, 1)
    assert await mesh.counted(CHAT) == {str(status): 1}
    charged = await mesh.spent(caller)
    assert 0 < charged <= HELD_NUSD if source == "estimated" else charged == 0


async def test_an_event_of_two_megabytes_passes(mesh):
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="sim/huge-event")
    assert answer.events[-1] == "[DONE]"
    assert (await mesh.settlement(caller))["usage_source"] == "reported"


async def test_an_event_that_is_too_large_is_not_held_against_its_provider(start_mesh, simulator):
    mesh = await start_mesh(
        upstreams={"sim": {"kind": "openai", "base_url": simulator.base_url, "max_event_bytes": 1_000_000}}
    )
    caller = await mesh.key()
    for _ in range(12):  # a breaker opens after ten calls of which half failed
        answer = await mesh.stream(caller, model="sim/huge-event")
        assert answer.events[-1]["error"]["code"] == "upstream_error"
    assert (await mesh.stream(caller, model="sim/plain")).events[-1] == "[DONE]"


async def test_the_words_of_a_provider_that_failed_in_the_stream_are_told(mesh):
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="sim/error-mid-stream")
    assert answer.events[-1]["error"]["provider_error"]["message"] == "Provider disconnected unexpectedly"
    assert [event for event in answer.events[:-1] if "error" in event] == []


async def test_a_silent_stream_is_kept_open_by_pings(start_mesh):
    mesh = await start_mesh(
        server={"heartbeat_s": 0.05}, models={"sim/late": model("sim", "sim/plain?tokens=8&ttft=0.3")}
    )
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="sim/late")
    assert 2 <= answer.body.count(b": ping\n\n") <= 6
    assert answer.events[-1] == "[DONE]"
    assert (await mesh.settlement(caller))["usage_source"] == "reported"


async def test_a_client_that_hangs_up_stops_the_provider_at_once(mesh):
    caller = await mesh.key()
    body = {"model": "sim/slow", "messages": HELLO, "stream": True}
    async with mesh.http.post("/v1/chat/completions", json=body, headers=caller.auth) as response:
        await response.content.readany()
        response.close()
    (entry,) = mesh.received
    await mesh.until(lambda: entry.ended == "client_closed")
    assert mesh.simulator.history.open_streams == 0
    settled = await mesh.settlement(caller)
    assert (settled["outcome"], settled["usage_source"]) == ("client_disconnected", "estimated")
    assert 0 < await mesh.spent(caller) <= HELD_NUSD
    assert mesh.log.lines[-1]["outcome"] == "client_disconnected"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("trait", ["stall-head", "stall"])
async def test_a_client_that_hangs_up_before_the_answer_pays_its_prompt(mesh, trait, stream):
    caller = await mesh.key()
    task = asyncio.create_task(mesh.chat(caller, model=f"sim/{trait}", stream=stream))
    await mesh.until(lambda: len(mesh.received) == 1)
    task.cancel()
    (entry,) = mesh.received
    await mesh.until(lambda: entry.ended == "client_closed")
    settled = await mesh.settlement(caller)
    assert (settled["outcome"], settled["usage_source"]) == ("client_disconnected", "estimated")
    assert (
        settled["prompt_tokens"],
        settled["completion_tokens"],
        settled["cost_nusd"],
    ) == ("9", "0", str(PROMPT_NUSD))


async def test_a_client_that_hangs_up_before_its_request_is_sent_pays_nothing(start_mesh):
    """The provider's port takes connections and says nothing of TLS."""
    silent = await asyncio.start_server(lambda reader, _: reader.read(), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    mesh = await start_mesh(
        upstreams={"far": {"kind": "openai", "base_url": f"https://127.0.0.1:{port}/v1"}},
        models={"far": model("far", "m")},
    )
    caller = await mesh.key()
    task = asyncio.create_task(mesh.chat(caller, model="far"))
    await mesh.until(lambda: bool(mesh.worker.live.leases))
    task.cancel()
    assert itemgetter("usage_source", "cost_nusd")(await mesh.settlement(caller)) == ("none", "0")
    silent.close()


@pytest.fixture
def held_back(monkeypatch):
    """Set when a stream begins to wait for its client."""
    drained, waits = ClientStream.drained, asyncio.Event()

    async def waiting(stream):
        waits.set()
        await drained(stream)

    monkeypatch.setattr(ClientStream, "drained", waiting)
    return waits


def _unsent():
    """The most bytes that wait in a transport of this process."""
    transports = (each for each in gc.get_objects() if isinstance(each, asyncio.Transport) and not each.is_closing())
    return max(transport.get_write_buffer_size() for transport in transports)


async def test_a_client_that_does_not_read_holds_the_provider_back_and_may_then_be_gone(start_mesh, held_back):
    mesh = await start_mesh(send_buffer=32_768, models={"sim/long": model("sim", "sim/fast?tokens=30000")})
    caller = await mesh.key()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        client.connect((mesh.host, mesh.port))
        client.sendall(_post(caller, {"model": "sim/long", "messages": HELLO, "stream": True}))
        await asyncio.wait_for(held_back.wait(), PATIENCE_S)
        assert _unsent() < 2 * 65_536 + 262_144
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    settled = await mesh.settlement(caller)
    assert settled["outcome"] == "client_disconnected"
    assert [mesh.simulator.history.open_streams, mesh.worker.recorder.in_flight] == [0, 0]


async def test_an_answer_that_waits_for_its_client_goes_on_for_a_repeat_when_that_is_gone(start_mesh, held_back):
    mesh = await start_mesh(send_buffer=32_768, models={"sim/long": model("sim", "sim/fast?tokens=6000")})
    caller = await mesh.key()
    ask = _post(caller, {"model": "sim/long", "messages": HELLO, "stream": True})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        client.connect((mesh.host, mesh.port))
        client.sendall(ask.replace(b"\r\n", b"\r\nidempotency-key: once\r\n", 1))
        await asyncio.wait_for(held_back.wait(), PATIENCE_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    settled = await mesh.settlement(caller)
    assert (settled["usage_source"], settled["completion_tokens"]) == ("drained", "6000")


async def test_a_slow_reader_gets_everything(start_mesh, held_back):
    mesh = await start_mesh(send_buffer=32_768, models={"sim/long": model("sim", "sim/fast?tokens=3000")})
    caller = await mesh.key()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        client.connect((mesh.host, mesh.port))
        client.sendall(_post(caller, {"model": "sim/long", "messages": HELLO, "stream": True}))
        await asyncio.wait_for(held_back.wait(), PATIENCE_S)
        client.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=client)
        got = await asyncio.wait_for(reader.read(-1), 10)
        writer.close()
    assert got.count(b'"delta":{"content"') == 3000
    assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert (await mesh.settlement(caller))["completion_tokens"] == "3000"


async def test_an_http_1_0_client_reads_to_the_end_of_the_connection(mesh):
    caller = await mesh.key()
    got = await mesh.raw(_post(caller, {"model": "sim/plain", "messages": HELLO, "stream": True}, version="1.0"))
    head, _, body = got.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_chunks_of_the_provider_reach_the_client_as_they_were(mesh):
    caller = await mesh.key()
    got = await mesh.raw(_post(caller, {"model": "sim/plain", "messages": HELLO, "stream": True}))
    body = got.partition(b"\r\n\r\n")[2]
    sizes = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        sizes.append(int(size, 16))
        assert rest[sizes[-1] : sizes[-1] + 2] == b"\r\n"
        body = rest[sizes[-1] + 2 :]
    assert sizes[-1] == 0
    assert 0 not in sizes[:-1]


async def test_a_stream_ends_when_its_credit_does(start_mesh):
    slice_tokens = 8
    mesh = await start_mesh(
        credits={"lease_output_tokens": slice_tokens},
        models={"sim/long": model("sim", "sim/plain?tokens=3000&tps=2000")},
    )
    caller = await mesh.key(credit="0.0004")
    answer = await mesh.stream(caller, model="sim/long")
    assert answer.events[-1]["error"]["code"] == "insufficient_credits"
    settled = await mesh.settlement(caller)
    assert settled["outcome"] == "insufficient_credits"
    balance = await mesh.balance(caller)
    assert balance.balance_nusd >= -slice_tokens * 10_000
    await mesh.until(lambda: mesh.simulator.history.open_streams == 0)


@pytest.mark.parametrize(
    "name, credit, code",
    [("sim/long", "0.0012", "insufficient_credits"), ("sim/error-mid-stream", "25", "upstream_error")],
)
async def test_a_repeat_that_reads_along_sees_the_end_that_the_first_sees(start_mesh, name, credit, code):
    """The error event of the first, once, and no second one behind it."""
    models = {
        "sim/long": model("sim", "sim/plain?tokens=3000&tps=400"),
        "sim/error-mid-stream": model("sim", "sim/error-mid-stream?tokens=80&tps=200&after=40"),
    }
    mesh = await start_mesh(credits={"lease_output_tokens": 8}, models=models)
    caller = await mesh.key(credit=credit)
    both = (mesh.chat(caller, model=name, stream=True, headers={"idempotency-key": "once"}) for _ in range(2))
    answers = await asyncio.gather(*both)
    assert sorted("idempotent-replayed" in answer.headers for answer in answers) == [False, True]
    assert [answer.code for answer in answers] == [code, code]
    assert answers[0].body == answers[1].body
    await mesh.quiet()
    assert [line["code"] for line in mesh.log.lines[-2:]] == [code, code]


@pytest.mark.parametrize(
    ("route", "credit", "end"),
    [
        ("sim/plain?tokens=8", "25", "[DONE]"),
        ("sim/plain?tokens=8&ttft=0.2", "25", "[DONE]"),
        ("sim/plain?tokens=8", "0.000001", "insufficient_credits"),
        ("sim/error-500", "25", "upstream_error"),
    ],
)
async def test_a_repeat_gets_pings_while_it_waits_for_a_first_request_that_has_died(start_mesh, route, credit, end):
    """Then it runs itself, behind the head that the pings began; another repeat gets its answer, or runs anew."""
    mesh = await start_mesh(server={"heartbeat_s": 0.05}, models={"m": model("sim", route)})
    caller = await mesh.key(credit=credit)
    body = json.dumps({"model": "m", "messages": HELLO, "stream": True}).encode()
    replays = Replays(mesh.worker.store)
    died = replays.claim_by(caller.account, caller.key.id, "once", "died")
    await replays.claim(died, body_digest(body), 300, most_keys=10, most_bytes=1000)
    once = {"idempotency-key": "once"}
    answer = await mesh.post(caller, body, headers=once)
    assert (answer.status, answer.body.count(b": ping\n\n") >= 3) == (200, True)
    assert answer.events[-1] == end if end == "[DONE]" else answer.code == end
    again = await mesh.post(caller, body, headers=once)
    assert ("idempotent-replayed" in again.headers, again.headers.get("x-mesh-model")) == (
        (True, "m") if end == "[DONE]" else (False, None)
    )


async def test_a_repeat_that_reads_along_ends_honestly_when_the_gateway_shuts_down(start_mesh):
    mesh = await start_mesh(models={"sim/long": model("sim", "sim/plain?tokens=3000&tps=100")})
    caller = await mesh.key()
    ask = _post(caller, {"model": "sim/long", "messages": HELLO, "stream": True})
    readers = []
    for _ in range(2):
        reader, writer = await asyncio.open_connection(mesh.host, mesh.port)
        writer.write(ask.replace(b"\r\n", b"\r\nidempotency-key: once\r\n", 1))
        await asyncio.wait_for(reader.readuntil(b'"content"'), PATIENCE_S)
        readers.append((reader, writer))
    mesh.worker.gateway.shut_down()
    mesh.interrupt()
    for reader, writer in readers:
        rest = await asyncio.wait_for(reader.read(-1), PATIENCE_S)
        assert (b'"code":"overloaded"' in rest, rest.endswith(b"\r\n0\r\n\r\n")) == (True, True)
        writer.close()
    await mesh.until(lambda: len(mesh.log.lines) == 2)
    assert [line["code"] for line in mesh.log.lines] == ["overloaded", "overloaded"]


async def test_a_repeat_whose_client_leaves_is_logged_without_a_code(start_mesh):
    mesh = await start_mesh(models={"sim/long": model("sim", "sim/plain?tokens=3000&tps=100")})
    ask = _post(await mesh.key(), {"model": "sim/long", "messages": HELLO, "stream": True})
    writers = []
    for _ in range(2):
        reader, writer = await asyncio.open_connection(mesh.host, mesh.port)
        writer.write(ask.replace(b"\r\n", b"\r\nidempotency-key: once\r\n", 1))
        await asyncio.wait_for(reader.readuntil(b'"content"'), PATIENCE_S)
        writers.append(writer)
    writers[1].close()
    await mesh.until(lambda: mesh.log.lines)
    line = mesh.log.lines[0]
    assert (line["outcome"], line["status"], line["code"]) == ("client_disconnected", 200, None)
    mesh.worker.gateway.shut_down()
    writers[0].close()


@pytest.mark.parametrize("stream", [True, False])
async def test_the_log_and_the_metrics_name_the_model_of_a_replay_and_whether_it_is_a_stream(mesh, stream):
    caller = await mesh.key()
    for _ in range(2):
        await mesh.chat(caller, model="sim/plain", stream=stream, headers={"idempotency-key": "once"})
    await mesh.quiet()
    line = mesh.log.lines[-1]
    expected = ("replayed", "sim/plain", stream, 200)
    assert (line["outcome"], line["model"], line["stream"], line["status"]) == expected
    families = {family.name: family for family in decode(await mesh.worker.metrics.snapshot())}
    counted = {series.labels: series.value for series in families["meshproxy_requests_total"].series if series.value}
    assert counted == {(CHAT, "sim/plain", "200", str(stream).lower()): 2}


async def test_a_stream_with_credit_is_renewed_to_its_end(start_mesh):
    mesh = await start_mesh(
        credits={"lease_output_tokens": 8}, models={"sim/long": model("sim", "sim/fast?tokens=400")}
    )
    caller = await mesh.key(credit="0.01")
    answer = await mesh.stream(caller, model="sim/long")
    assert answer.events[-1] == "[DONE]"
    assert (await mesh.settlement(caller))["completion_tokens"] == "400"
    assert int((await mesh.settlement(caller))["held_nusd"]) > 18 * 2_500 + 8 * 10_000


async def test_a_stream_without_a_cap_is_covered_past_the_default(start_mesh):
    mesh = await start_mesh(
        credits={"lease_output_tokens": 8, "default_output_tokens": 16},
        models={"sim/long": {**model("sim", "sim/plain?tokens=3000&tps=2000"), **PRICE}},
    )
    caller = await mesh.key(credit="0.0006")
    answer = await mesh.stream(caller, model="sim/long")
    assert answer.events[-1]["error"]["code"] == "insufficient_credits"
    assert (await mesh.balance(caller)).balance_nusd >= -8 * 10_000


async def test_the_sdk_streams(mesh):
    caller = await mesh.key()
    whole = await mesh.stream(caller, model="sim/split", seed=SEED)
    chunks = await mesh.sdk(caller).chat.completions.create(
        model="sim/split", messages=HELLO, stream=True, seed=SEED, stream_options={"include_usage": True}
    )
    got = [chunk async for chunk in chunks]
    assert whole.text == "".join(chunk.choices[0].delta.content or "" for chunk in got if chunk.choices)
    assert got[-1].usage.completion_tokens == 8


@pytest.mark.parametrize("trait", ["die-mid-stream", "error-mid-stream", "end-early"])
async def test_the_sdk_raises_when_a_stream_dies(mesh, trait):
    caller = await mesh.key()
    chunks = await mesh.sdk(caller, max_retries=2).chat.completions.create(
        model=f"sim/{trait}", messages=HELLO, stream=True
    )
    with pytest.raises(openai.APIError) as raised:
        [chunk async for chunk in chunks]
    assert raised.value.code == "upstream_error"
    assert len(mesh.received) == 1


async def test_shutdown_tells_the_streams_that_are_left(mesh):
    caller = await mesh.key()
    task = asyncio.create_task(mesh.stream(caller, model="sim/slow"))
    await mesh.until(lambda: any(relay.scanner.events for relay in mesh.worker.live.relays))
    mesh.worker.gateway.shut_down()
    answer = await task
    assert answer.events[-1]["error"]["code"] == "overloaded"
    assert (await mesh.settlement(caller))["outcome"] == "shutdown"


def _post(caller, body, version="1.1"):
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/{version}\r\nhost: mesh\r\nauthorization: Bearer {caller.secret}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + data


@pytest.mark.parametrize("name", ["plain", "die-mid-stream", "refuse", "error-500", "error-400", "mangled-json"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_slot_is_free_however_a_request_ends(mesh, name, stream):
    caller = await mesh.key(limits=Limits(max_parallel=1))
    for _ in range(3):
        answer = await mesh.chat(caller, model=f"sim/{name}", stream=stream)
        assert answer.status != 429
        await mesh.quiet()


async def test_a_slot_is_free_when_its_client_has_hung_up(mesh):
    caller = await mesh.key(limits=Limits(max_parallel=1))
    running = asyncio.create_task(mesh.stream(caller, model="sim/stall-mid"))
    await mesh.until(lambda: len(mesh.received) == 1)
    busy = await mesh.stream(caller, model="sim/plain")
    assert (busy.status, busy.code, busy.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    assert "parallel" in busy.error["message"]
    running.cancel()
    await asyncio.wait([running])
    await mesh.quiet()
    assert (await mesh.stream(caller, model="sim/plain")).status == 200


async def test_an_account_s_slots_are_shared_by_its_keys(mesh):
    caller = await mesh.key()
    other = await mesh.key(caller.account)
    await mesh.worker.directory.change_account(
        caller.account, lambda account: replace(account, limits=Limits(max_parallel=1))
    )
    running = asyncio.create_task(mesh.stream(caller, model="sim/stall-mid"))
    await mesh.until(lambda: len(mesh.received) == 1)
    assert (await mesh.stream(other, model="sim/plain")).status == 429
    running.cancel()
    await asyncio.wait([running])
    await mesh.quiet()
    assert (await mesh.stream(other, model="sim/plain")).status == 200


LEASED = {"credits": {"lease_output_tokens": 8}, "models": {"sim/slow": model("sim", "sim/plain?tokens=60&tps=200")}}


async def _lose_holds(mesh, caller):
    """As a failover may: the grants are there, and the holds aren't."""
    keys, store = AccountKeys(caller.account), mesh.worker.store
    await store.execute("DEL", keys.holds, keys.deadlines, keys.held)
    await store.execute("HSET", keys.credit, "held", "0")


@pytest.mark.parametrize(
    ("taken", "last", "outcome"),
    [("0", "[DONE]", "completed"), ("-24.9999", "insufficient_credits", "insufficient_credits")],
)
async def test_a_stream_whose_hold_is_lost_needs_credit_for_another(start_mesh, taken, last, outcome):
    mesh = await start_mesh(**LEASED)
    caller = await mesh.key()
    running = asyncio.create_task(mesh.stream(caller, model="sim/slow"))
    await mesh.until(lambda: any(relay.scanner.events > 2 for relay in mesh.worker.live.relays))
    await _lose_holds(mesh, caller)
    if parse_usd(taken):
        await mesh.worker.ledger.grant(caller.account, parse_usd(taken))
    answer = await running
    end = answer.events[-1]
    assert (end if end == "[DONE]" else end["error"]["code"], mesh.log.lines[-1]["outcome"]) == (last, outcome)
    assert int((await mesh.settlement(caller))["cost_nusd"]) == await mesh.spent(caller) > 0


async def test_a_stream_that_ends_for_want_of_credit_says_what_the_key_s_page_says(start_mesh):
    mesh = await start_mesh(**LEASED)
    caller = await mesh.key(credit="0.0004")
    error = (await mesh.stream(caller, model="sim/slow")).events[-1]["error"]
    await mesh.quiet()
    key = await mesh.get(caller, "/v1/key")
    assert error["code"] == "insufficient_credits"
    assert key["available_usd"] in error["message"].split()
