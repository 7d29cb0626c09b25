"""What a provider says no with, and what the client and the operator hear of it: the whole gateway and real sockets."""

import asyncio
import json
import zlib
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from meshproxy.policy.principal import Limits
from tests.harness import provider as played
from tests.harness.clients import chat_bytes
from tests.harness.mesh import model

OK = {
    "id": "chatcmpl-7",
    "object": "chat.completion",
    "created": 1764000000,
    "model": "up-model",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "from elsewhere"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
}
TOO_LONG = {
    "error": {
        "message": "This model's maximum context length is 8192 tokens.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
}
FLAGGED = {
    "error": {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["violence"]}},
}
INVALID = {"error": {"message": "Invalid value: 'nobody'.", "param": "messages[0].role", "code": "invalid_value"}}
DOWN = {"error": {"message": "The tide gauge is broken", "code": "server_error"}}


@pytest.fixture
async def pair(start_mesh, providers):
    """A gateway and two providers: the model `m` is served by the first, then by the second; `first` and `second` by each."""
    first, second = await providers(), await providers()
    second.answers(200, OK)

    def upstream(url: str) -> dict[str, Any]:
        return {"kind": "openai", "base_url": url}

    mesh = await start_mesh(
        upstreams={"one": upstream(first.base_url), "two": upstream(second.base_url)},
        models={"m": model("one", "x", "two", "x"), "first": model("one", "x"), "second": model("two", "x")},
    )
    return mesh, first, second


async def test_a_refusal_of_the_request_is_told_as_the_provider_said_it(pair):
    mesh, first, second = pair
    first.answers(400, TOO_LONG)
    answer = await mesh.chat(await mesh.key(), model="m")
    error = answer.error
    expected = (400, "context_length_exceeded", "messages", "context_length_exceeded", TOO_LONG)
    told = (answer.status, error["code"], error["param"], error["provider_code"], error["provider_error"])
    assert (told, second.bodies) == (expected, [])
    assert error["message"] == TOO_LONG["error"]["message"]


async def test_what_was_flagged_is_not_asked_elsewhere(pair):
    mesh, first, second = pair
    first.answers(403, FLAGGED)
    answer = await mesh.chat(await mesh.key(), model="m", models=["second"])
    assert (answer.status, answer.error["message"], second.bodies) == (403, "Your input was flagged", [])


@pytest.mark.parametrize(("body", "expected"), [(TOO_LONG, (200, 1)), (INVALID, (400, 0))])
async def test_another_model_is_asked_for_what_only_this_one_refuses(pair, body, expected):
    mesh, first, second = pair
    first.answers(400, body)
    answer = await mesh.chat(await mesh.key(), model="first", models=["second"])
    assert (answer.status, len(second.bodies)) == expected


async def test_the_refusal_is_told_and_not_the_last_failure(start_mesh, providers):
    first = (await providers()).answers(400, TOO_LONG)
    mesh = await start_mesh(
        upstreams={"one": {"kind": "openai", "base_url": first.base_url}},
        models={"first": model("one", "x"), "gone": model("refused", "x")},
    )
    answer = await mesh.chat(await mesh.key(), model="first", models=["gone"])
    assert (answer.status, answer.code) == (400, "context_length_exceeded")


async def test_a_wait_of_more_than_a_minute_is_honest_and_not_worth_a_retry(pair):
    mesh, first, _ = pair
    first.answers(429, {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}})
    answer = await mesh.chat(await mesh.key(), model="first")
    told = (answer.status, answer.code, answer.error["provider_code"], answer.headers["retry-after"])
    assert told == (503, "provider_not_available", "insufficient_quota", "600")
    assert (answer.headers["x-should-retry"], answer.error["retry_after_seconds"]) == ("false", 600)


async def test_no_secret_of_ours_is_told_wherever_the_provider_says_it(start_mesh, providers):
    first = await providers()
    secret = "upstream-secret-9"
    first.answers(400, {"error": {"message": f"What is {secret}?", "param": secret, "code": secret, "x": [secret]}})
    upstream = {"kind": "openai", "base_url": first.base_url, "headers": {"api-key": secret}}
    mesh = await start_mesh(upstreams={"one": upstream}, models={"m": model("one", "x")})
    with structlog.testing.capture_logs() as lines:
        answer = await mesh.chat(await mesh.key(), model="m")
    assert (answer.status, secret.encode() in answer.body) == (400, False)
    assert secret not in repr(lines)


@pytest.mark.parametrize("status", [201, 202, 203])
async def test_an_answer_with_another_status_of_success_is_an_answer(pair, status):
    mesh, first, _ = pair
    first.answers(status, OK)
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="first")
    assert (answer.status, json.loads(answer.body)) == (200, OK)
    settled = await mesh.settlement(caller)
    assert (settled["prompt_tokens"], settled["completion_tokens"]) == ("9", "3")


SLOW_DOWN = {"error": {"code": 429, "message": "Slow down"}}
SLOW_DOWN_EVENT = b"data: %b\n\n" % json.dumps(SLOW_DOWN).encode()


@pytest.mark.parametrize(
    ("fields", "body", "expected"),
    [
        ({}, SLOW_DOWN, (503, "provider_not_available", "4", "false")),  # its work on a whole answer may be billed
        ({}, {"error": {"code": 401}}, (502, "upstream_error", None, "false")),
        ({"stream": True}, SLOW_DOWN, (503, "provider_not_available", "4", None)),
        ({"stream": True}, SLOW_DOWN_EVENT, (503, "provider_not_available", "4", None)),
    ],
)
async def test_a_200_with_an_error_in_it_is_told_as_its_status(pair, fields, body, expected):
    mesh, first, _ = pair
    first.answers(200, body, retry_after="4")
    answer = await mesh.chat(await mesh.key(), model="first", **fields)
    waits = (answer.headers.get("retry-after"), answer.headers.get("x-should-retry"))
    assert (answer.status, answer.code, *waits) == expected


# Routing.


async def test_the_headers_of_a_direct_answer(pair):
    mesh, _, _ = pair
    headers = (await mesh.chat(await mesh.key(), model="second")).headers
    names = ("x-resolved-model-id", "x-mesh-routing-attempts", "x-mesh-routing-fallback", "x-mesh-routing-model")
    assert [headers.get(name) for name in names] == ["second", "1", None, None]


async def test_the_headers_of_a_fallback(pair):
    mesh, first, _ = pair
    first.answers(500, DOWN)
    headers = (await mesh.chat(await mesh.key(), model="first", models=["second"])).headers
    names = ("x-resolved-model-id", "x-mesh-routing-attempts", "x-mesh-routing-fallback", "x-mesh-routing-model")
    assert [headers.get(name) for name in names] == ["second", "2", "true", "second"]


# The operator's log.


async def failed_attempts(mesh, **fields: Any) -> list[dict[str, Any]]:
    with structlog.testing.capture_logs() as lines:
        await mesh.chat(await mesh.key(), **fields)
        await mesh.quiet()
    return [line for line in lines if line["event"] == "attempt_failed"]


async def test_each_failed_attempt_has_a_line_also_where_another_served(pair):
    mesh, first, _ = pair
    first.answers(401, {"error": {"message": "Incorrect API key provided"}}, x_request_id="req_up")
    (line,) = await failed_attempts(mesh, model="m")
    told = [line[name] for name in ("upstream", "model", "phase", "status", "words", "upstream_request_id")]
    assert told == ["one", "m", "head", 401, "Incorrect API key provided", "req_up"]


async def test_an_answer_that_breaks_off_has_a_line(pair):
    mesh, first, _ = pair
    first.answers(200, b'{"id":', content_length="100")
    (line,) = await failed_attempts(mesh, model="first")
    assert (line["phase"], line["status"]) == ("body", 200)


@pytest.mark.parametrize(
    ("url", "phase", "reason"),
    [
        ("http://127.0.0.1:1/v1", "connect", "connection refused (ECONNREFUSED 111)"),
        ("http://nowhere.invalid/v1", "connect", "unknown host: "),
    ],
)
async def test_a_connection_that_cannot_be_made_says_why(start_mesh, url, phase, reason):
    mesh = await start_mesh(upstreams={"one": {"kind": "openai", "base_url": url}}, models={"m": model("one", "x")})
    (line,) = await failed_attempts(mesh, model="m")
    assert (line["phase"], line["reason"].startswith(reason), line["status"]) == (phase, True, None)


async def test_the_request_line_tells_the_providers_status_and_id(pair):
    mesh, first, _ = pair
    first.answers(400, INVALID, apim_request_id="a-1")
    await mesh.chat(await mesh.key(), model="first")
    await mesh.quiet()
    line = mesh.log.lines[-1]
    assert (line["upstream_status"], line["upstream_request_id"], line["refused_by"]) == (400, "a-1", None)


async def test_the_request_line_tells_what_refused_it(mesh):
    caller = await mesh.key(credit="0")
    await mesh.chat(caller, model="sim/plain")
    await mesh.quiet()
    assert (mesh.log.lines[-1]["refused_by"], mesh.log.lines[-1]["upstream_status"]) == ("credit", None)


# Formalities: what was paid for is not lost for its label.

CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "up-model"}
EVENTS = [
    {**CHUNK, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {**CHUNK, "choices": [{"index": 0, "delta": {"content": "from elsewhere"}, "finish_reason": None}]},
    {**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {**CHUNK, "choices": [], "usage": OK["usage"]},
]
STREAM = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS) + b"data: [DONE]\n\n"
WHOLE = json.dumps(OK).encode()


def packed(coding: str, body: bytes) -> bytes:
    """A body in one of HTTP's content codings."""
    compressor = zlib.compressobj(wbits={"gzip": 31, "deflate": 15, "raw": -15}[coding])
    return compressor.compress(body) + compressor.flush()


FORMS = [
    pytest.param(STREAM, {"content_type": ""}, id="a stream without a label"),
    pytest.param(STREAM, {"content_type": "text/plain; charset=utf-8"}, id="a stream as text"),
    pytest.param(STREAM, {"content_type": "application/json"}, id="a stream as JSON"),
    pytest.param(b"\xef\xbb\xbf" + STREAM, {"content_type": "text/event-stream"}, id="a stream with a BOM"),
    pytest.param(WHOLE, {}, id="JSON"),
    pytest.param(WHOLE, {"content_type": "text/event-stream"}, id="JSON as a stream"),
    pytest.param(WHOLE, {"content_type": ""}, id="JSON without a label"),
    pytest.param(packed("gzip", STREAM), {"content_encoding": "gzip", "content_type": "text/event-stream"}, id="gzip"),
    pytest.param(packed("gzip", WHOLE), {"content_encoding": "x-gzip"}, id="JSON in gzip"),
    pytest.param(packed("deflate", WHOLE), {"content_encoding": "deflate"}, id="JSON in deflate"),
    pytest.param(packed("raw", WHOLE), {"content_encoding": "deflate"}, id="JSON in bare deflate"),
]


@pytest.mark.parametrize(("body", "headers"), FORMS)
async def test_whatever_comes_is_streamed_to_who_asked_for_a_stream(pair, body, headers):
    mesh, first, _ = pair
    first.answers(200, body, **headers)
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="first")
    assert (answer.text, answer.events[-1]) == ("from elsewhere", "[DONE]")
    event = await mesh.settlement(caller)
    assert (event["prompt_tokens"], event["completion_tokens"], event["usage_source"]) == ("9", "3", "reported")


@pytest.mark.parametrize(("body", "headers"), FORMS)
async def test_whatever_comes_is_whole_for_who_asked_for_it_whole(pair, body, headers):
    mesh, first, _ = pair
    first.answers(200, body, **headers)
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="first")
    told = (answer.headers["content-type"], answer.headers.get("content-encoding"))
    assert (answer.json["choices"][0]["message"]["content"], told) == ("from elsewhere", ("application/json", None))
    assert (await mesh.settlement(caller))["completion_tokens"] == "3"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"<html>", {"content_type": "text/html"}),
        (b"x", {"content_encoding": "br"}),
        (packed("gzip", b"x" * 20_000_000), {"content_encoding": "gzip"}),
        (packed("gzip", WHOLE)[:20] + b"broken" * 9, {"content_encoding": "gzip"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_read_is_told_and_opens_no_breaker(pair, body, headers, stream):
    mesh, first, _ = pair
    first.answers(200, body, **headers)
    caller = await mesh.key()
    for _ in range(11):
        answer = await mesh.chat(caller, model="first", stream=stream)
    error = answer.error if answer.status != 200 else answer.events[-1]["error"]
    assert (error["code"], len(first.bodies)) == ("upstream_error", 11)


async def test_an_answer_too_large_to_keep_opens_no_breaker(start_mesh, providers):
    first = (await providers()).answers(200, OK)
    upstream = {"kind": "openai", "base_url": first.base_url, "max_response_bytes": 100}
    mesh = await start_mesh(upstreams={"one": upstream}, models={"m": model("one", "x")})
    caller = await mesh.key()
    assert [(await mesh.chat(caller, model="m")).status for _ in range(11)] == [502] * 11
    assert len(first.bodies) == 11


# Silence.


@pytest.fixture
async def silent_pair(start_mesh, providers):
    """As `pair`, with a heartbeat of 50 ms."""
    first, second = await providers(), await providers()
    second.answers(200, STREAM, content_type="text/event-stream")
    mesh = await start_mesh(
        server={"heartbeat_s": 0.05},
        upstreams={name: {"kind": "openai", "base_url": p.base_url} for name, p in (("one", first), ("two", second))},
        models={"m": model("one", "x", "two", "x"), "first": model("one", "x")},
    )
    return mesh, first, second


async def test_a_silent_provider_s_client_gets_a_head_and_pings(silent_pair):
    mesh, first, _ = silent_pair
    first.answers(200, STREAM, delay_s=0.4, content_type="text/event-stream")
    answer = await mesh.stream(await mesh.key(), model="first")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert answer.body.startswith(b": ping\n\n: ping\n\n")
    assert (answer.text, answer.events[-1]) == ("from elsewhere", "[DONE]")


async def test_what_fails_behind_pings_is_told_in_an_event(silent_pair):
    mesh, first, _ = silent_pair
    first.answers(400, TOO_LONG, delay_s=0.3)
    answer = await mesh.stream(await mesh.key(), model="m")
    (event,) = answer.events
    assert (answer.status, event["error"]["code"]) == (200, "context_length_exceeded")
    await mesh.quiet()
    assert (mesh.log.lines[-1]["status"], mesh.log.lines[-1]["code"]) == (200, "context_length_exceeded")


async def test_another_is_asked_behind_pings(silent_pair):
    mesh, first, _ = silent_pair
    first.answers(500, DOWN, delay_s=0.3)
    answer = await mesh.stream(await mesh.key(), model="m")
    assert (answer.body[:8], answer.text) == (b": ping\n\n", "from elsewhere")


async def test_pings_keep_a_client_whose_patience_is_short(silent_pair):
    mesh, first, _ = silent_pair
    first.answers(200, STREAM, delay_s=1.5, content_type="text/event-stream")
    answer = await mesh.chat(await mesh.key(), model="first", stream=True, headers={"x-stainless-read-timeout": "1.2"})
    assert answer.events[-1] == "[DONE]"


async def test_a_whole_answer_gets_no_pings(silent_pair):
    mesh, first, _ = silent_pair
    first.answers(200, OK, delay_s=0.3)
    assert (await mesh.chat(await mesh.key(), model="first")).json == OK


async def test_a_shut_down_tells_who_still_waits_for_an_answer(silent_pair):
    mesh, first, _ = silent_pair
    first.answers(200, STREAM, delay_s=5)
    asking = asyncio.create_task(mesh.stream(await mesh.key(), model="first"))
    await mesh.until(lambda: any(opening.begun for opening in mesh.worker.live.early_heads))
    mesh.worker.gateway.shut_down()
    mesh.interrupt()
    assert (await asking).events[-1]["error"]["code"] == "overloaded"


async def test_a_client_that_hangs_up_on_pings_leaves_nothing(silent_pair):
    mesh, first, _ = silent_pair
    first.answers(200, STREAM, delay_s=5)
    asking = asyncio.create_task(mesh.stream(await mesh.key(), model="first"))
    await mesh.until(lambda: any(opening.begun for opening in mesh.worker.live.early_heads))
    asking.cancel()
    await mesh.quiet()
    line = mesh.log.lines[-1]
    assert (mesh.worker.live.early_heads, line["outcome"], line["status"]) == (set(), "client_disconnected", 200)


async def test_a_patience_that_ends_is_a_hang_up_where_the_provider_is_drained(start_mesh, providers):
    first = (await providers()).answers(200, OK, delay_s=0.5)
    upstream = {"kind": "openai", "base_url": first.base_url, "on_disconnect": "drain"}
    mesh = await start_mesh(upstreams={"one": upstream}, models={"m": model("one", "x")})
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="m", headers={"x-stainless-read-timeout": "0.1"})
    assert (answer.status, answer.code, answer.headers["x-should-retry"]) == (504, "gateway_timeout", "false")
    event = await mesh.settlement(caller)
    assert (event["completion_tokens"], event["usage_source"]) == ("3", "drained")


@pytest.mark.parametrize("patience", [{"timeout": 0.2}, {"headers": {"x-stainless-read-timeout": "0.2"}}])
async def test_a_deadline_ends_what_a_fallback_serves_that_is_not_drained(start_mesh, providers, patience):
    first, second = (await providers()).answers(500, DOWN), (await providers()).answers(200, OK, delay_s=0.5)
    drained = {"kind": "openai", "base_url": first.base_url, "on_disconnect": "drain"}
    plain = {"kind": "openai", "base_url": second.base_url}
    mesh = await start_mesh(upstreams={"one": drained, "two": plain}, models={"m": model("one", "x", "two", "x")})
    caller = await mesh.key()
    answer = await mesh.chat(caller, model="m", **patience)
    await mesh.quiet()
    assert (answer.status, answer.code, await mesh.spent(caller)) == (504, "gateway_timeout", 0)


async def test_no_other_upstream_is_asked_for_a_client_that_has_gone(start_mesh, providers):
    first, second = (await providers()).answers(500, DOWN, delay_s=0.5), (await providers()).answers(200, OK)
    drained = {"kind": "openai", "base_url": first.base_url, "on_disconnect": "drain"}
    plain = {"kind": "openai", "base_url": second.base_url}
    mesh = await start_mesh(upstreams={"one": drained, "two": plain}, models={"m": model("one", "x", "two", "x")})
    caller = await mesh.key()
    asking = asyncio.create_task(mesh.chat(caller, model="m"))
    await mesh.until(lambda: first.bodies)
    asking.cancel()
    await mesh.quiet()
    assert (second.bodies, await mesh.spent(caller)) == ([], 0)


@pytest.fixture(params=[15, 0.05, 0.4], ids=["silent", "pinged", "pinged when it has gone"])
def heartbeat_s(request):
    return request.param


@pytest.fixture
async def late(heartbeat_s, start_mesh, providers):
    """A gateway, and a drained provider that streams when it may `go`; its client gets pings or none until then."""
    provider = await providers()
    answer = played.framed(played.EVENTS, "chunks", stream=True)
    provider.says = [b"", answer.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)]
    upstream = {"kind": "openai", "base_url": provider.base_url, "on_disconnect": "drain", "max_connections": 1}
    mesh = await start_mesh(
        server={"heartbeat_s": heartbeat_s}, upstreams={"one": upstream}, models={"m": model("one", "x")}
    )
    return mesh, provider


async def test_a_streams_own_deadline_is_a_hang_up_where_the_provider_is_drained(late, heartbeat_s):
    mesh, provider = late
    caller = await mesh.key()
    answer = await mesh.stream(caller, model="m", timeout=0.3)
    assert (answer.error["code"], len(answer.data)) == ("gateway_timeout", int(answer.status == 200))
    assert len(mesh.worker.live.leases) == 1  # renewed
    if heartbeat_s < 1:
        await mesh.until(lambda: all(head.begun for head in mesh.worker.live.early_heads))
    provider.go.set()
    event = await mesh.settlement(caller)
    assert [event[name] for name in ("prompt_tokens", "completion_tokens", "usage_source", "outcome", "hold")] == [
        "6",
        "24",
        "drained",
        "client_disconnected",
        "live",
    ]
    assert (mesh.log.lines[-1]["status"], mesh.log.lines[-1]["code"]) == (answer.status, "gateway_timeout")


async def test_what_is_drained_holds_its_slot_until_it_is_over(late):
    mesh, provider = late
    caller = await mesh.key(limits=Limits(max_parallel=1))
    await mesh.stream(caller, model="m", timeout=0.3)
    assert (await mesh.stream(caller, model="m")).status == 429
    provider.go.set()
    await mesh.quiet()
    assert (await mesh.stream(caller, model="m")).status == 200


async def test_what_was_not_sent_by_the_deadline_is_not_sent_after_it(late):
    """It waits for the only connection."""
    mesh, provider = late
    callers = [await mesh.key(), await mesh.key()]
    times = (1.0, 0.3)  # the first is sent in its, however busy the machine is
    answers = [await mesh.stream(caller, model="m", timeout=s) for caller, s in zip(callers, times, strict=True)]
    provider.go.set()
    await mesh.quiet()
    assert [answer.error["code"] for answer in answers] == ["gateway_timeout"] * 2
    assert [await mesh.spent(caller) > 0 for caller in callers] == [True, False]
    assert len(provider.bodies) == 1


@pytest.mark.parametrize("on_disconnect", ["cancel", "drain"])
async def test_a_deadline_before_a_provider_had_the_request_may_be_repeated(start_mesh, providers, on_disconnect):
    """The second one waits for the only connection."""
    provider = (await providers()).answers(200, OK, delay_s=1.0)
    upstream = {"kind": "openai", "base_url": provider.base_url, "max_connections": 1, "on_disconnect": on_disconnect}
    mesh = await start_mesh(upstreams={"one": upstream}, models={"m": model("one", "x")})
    callers = [await mesh.key(), await mesh.key()]
    first = asyncio.create_task(mesh.chat(callers[0], model="m", timeout=0.6))
    await mesh.until(lambda: provider.bodies)
    answers = [await mesh.chat(callers[1], model="m", timeout=0.1), await first]
    assert [(answer.status, answer.headers.get("x-should-retry")) for answer in answers] == [
        (504, None),
        (504, "false"),
    ]


async def test_a_shutdown_before_a_provider_had_the_request_may_be_repeated(start_mesh, providers):
    """The second one waits for the only connection."""
    provider = (await providers()).answers(200, OK, delay_s=5.0)
    upstream = {"kind": "openai", "base_url": provider.base_url, "max_connections": 1}
    mesh = await start_mesh(upstreams={"one": upstream}, models={"m": model("one", "x")})
    asking = []
    for caller in (await mesh.key(), await mesh.key()):
        asking.append(asyncio.create_task(mesh.chat(caller, model="m")))
        await mesh.until(lambda: provider.bodies and len(mesh.worker.live.leases) == len(asking))
    mesh.worker.gateway.shut_down()
    mesh.interrupt()
    answers = await asyncio.gather(*asking)
    assert [(answer.status, answer.headers.get("x-should-retry")) for answer in answers] == [
        (503, "false"),
        (503, None),
    ]


async def test_what_is_drained_writes_nothing_to_a_connection_that_stays_open(late):
    mesh, provider = late
    caller = await mesh.key()
    reader, writer = await asyncio.open_connection(mesh.host, mesh.port)
    writer.write(chat_bytes(caller.auth, model="m", stream=True, timeout=0.3))
    await reader.readuntil(b"gateway_timeout")
    provider.go.set()
    await mesh.quiet()
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    rest = await reader.read(-1)
    writer.close()
    assert (rest.count(b"HTTP/1.1 "), rest.count(b"HTTP/1.1 200"), b"data: " in rest) == (1, 1, False)


async def test_a_repeat_gets_the_stream_whose_first_client_gave_up(late):
    mesh, provider = late
    caller = await mesh.key()
    once = {"model": "m", "headers": {"idempotency-key": "once"}}
    answer = await mesh.stream(caller, timeout=0.3, **once)
    assert (answer.error["code"], answer.headers.get("x-should-retry")) == ("gateway_timeout", None)
    provider.go.set()
    repeat = await mesh.stream(caller, timeout=0.3, **once)
    assert (repeat.text, repeat.events[-1], "error" in str(repeat.events)) == ("Hello", "[DONE]", False)
    assert (await mesh.settlement(caller))["usage_source"] == "drained"
    assert len(provider.bodies) == 1


async def test_a_shutdown_settles_what_is_drained(late):
    mesh, _ = late
    caller = await mesh.key()
    assert (await mesh.stream(caller, model="m", timeout=0.3)).error["code"] == "gateway_timeout"
    mesh.worker.gateway.shut_down()
    await mesh.worker.tasks.finish(0)
    event = await mesh.settlement(caller)
    assert (event["usage_source"], event["completion_tokens"], int(event["cost_nusd"]) > 0) == ("estimated", "0", True)


@pytest.mark.parametrize(
    ("head", "stream"),
    [
        (b"HTTP/1.1 500 X\r\n\r\n", False),
        (b"HTTP/1.1 401 X\r\n\r\n", True),
        (b"HTTP/1.1 200 X\r\n\r\n", True),
        (b'HTTP/1.1 200 X\r\n\r\n{"id": ', True),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "once"}], ids=["", "keyed"])
async def test_a_deadline_passes_while_a_body_is_awaited_that_is_no_stream(
    start_mesh, providers, head, stream, headers
):
    provider = await providers()
    provider.says, provider.ends = [head], "silence"
    upstream = {"kind": "openai", "base_url": provider.base_url}
    mesh = await start_mesh(upstreams={"one": upstream}, models={"m": model("one", "x")})
    caller = await mesh.key()
    async with asyncio.timeout(5):
        answer = await mesh.chat(caller, model="m", stream=stream, timeout=0.3, headers=headers)
    provider.close()
    await mesh.quiet()
    assert (answer.status, answer.code, await mesh.spent(caller)) == (504, "gateway_timeout", 0)


async def test_a_stream_whose_head_has_come_by_the_deadline_is_not_cut(late):
    mesh, provider = late
    whole = provider.says[1]
    at = whole.index(b"\r\n\r\n") + 4
    provider.says = [whole[:at], whole[at:]]
    asking = asyncio.create_task(mesh.stream(await mesh.key(), model="m", timeout=0.3))
    await mesh.until(lambda: mesh.worker.live.relays)
    provider.go.set()
    answer = await asking
    assert (answer.text, answer.events[-1]) == ("Hello", "[DONE]")


async def test_the_time_of_an_answer_is_counted_by_the_upstream_that_gave_it(pair):
    mesh, first, second = pair
    first.answers(500, DOWN)
    second.answers(200, STREAM, content_type="text/event-stream")
    assert (await mesh.stream(await mesh.key(), model="m")).events[-1] == "[DONE]"
    await mesh.quiet()
    samples = (
        "meshproxy_upstream_time_to_first_token_seconds_count",
        "meshproxy_upstream_request_duration_seconds_count",
    )
    registry = mesh.worker.metrics.registry
    counts = [
        registry.get_sample_value(name, {"upstream": upstream}) for name in samples for upstream in ("one", "two")
    ]
    assert counts == [None, 1, None, 1]


@pytest.mark.parametrize(
    ("fields", "status"), [({"status": "suspended"}, 403), ({"status": "revoked"}, 401), ({"expires_at": 1.0}, 401)]
)
async def test_the_request_line_names_the_account_of_a_key_that_may_not_be_used(mesh, fields, status):
    caller = await mesh.key()
    await mesh.worker.directory.change_key(caller.key.id, lambda key: replace(key, **fields))
    await mesh.chat(caller, model="sim/plain")
    await mesh.quiet()
    line = mesh.log.lines[-1]
    assert (line["status"], line["account"], line["key_id"]) == (status, caller.account, caller.key.id)
