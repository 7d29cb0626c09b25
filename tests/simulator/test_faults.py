"""Each fault as a client's socket sees it, and as the journal remembers it."""

import asyncio
import gzip
import json
import zlib

import openai
import pytest

from tests.harness.waiting import PATIENCE_S, until

DONE = b"data: [DONE]\n\n"


def data_events(content):
    return [event for event in content.split(b"\n\n") if event.startswith(b"data: {")]


async def ended(simulator):
    """How the last request ended, once it has."""
    entry = simulator.history.requests[-1]
    await until(lambda: entry.ended != "open", poll_s=0)
    return entry.ended


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 409, 418, 422, 429, 500, 502, 503, 504, 529])
async def test_an_error_of_any_status(http, status):
    async with http.post(
        "/v1/chat/completions", json={"model": f"sim/error-{status}", "messages": [{"role": "user", "content": "x"}]}
    ) as answer:
        body = json.loads(await answer.read())
    assert (answer.status, answer.content_type) == (status, "application/json")
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert (status in {429, 503, 529}) == ("retry-after" in answer.headers)


async def test_the_sdk_knows_the_errors(sdk):
    with pytest.raises(openai.RateLimitError) as caught:
        await sdk.chat.completions.create(
            model="sim/error-429?retry_after=7", messages=[{"role": "user", "content": "x"}]
        )
    assert (caught.value.response.headers["retry-after"], caught.value.code) == ("7", "rate_limit_exceeded")


async def test_refuse_closes_without_an_answer(wire, simulator):
    wire.ask(model="sim/refuse")
    answer = await wire.to_the_end()
    assert (answer.reads, answer.broken, await ended(simulator)) == ([], None, "broken")


async def test_reset_resets(wire, simulator):
    wire.ask(model="sim/reset")
    answer = await wire.to_the_end()
    assert (answer.reads, answer.broken, await ended(simulator)) == ([], ConnectionResetError, "broken")


@pytest.mark.parametrize("model, head", [("sim/stall-head", 0), ("sim/stall", 200)])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_stall_lasts_until_the_client_goes(wire, simulator, model, head, stream):
    wire.ask(model=model + "+fast", stream=stream)
    await until(lambda: simulator.history.open_requests, poll_s=0)
    if head:
        assert (await wire.until(b"\r\n\r\n")).body == b""
    wire.writer.close()
    assert (await ended(simulator), simulator.history.requests[-1].tokens) == ("client_closed", 0)


async def test_stall_mid_falls_silent_after_so_many_events(wire, simulator):
    wire.ask(model="sim/fast+stall-mid?after=2", stream=True)
    answer = await wire.until(b'"content":"')
    while b'"content":"","refusal"' not in answer.content:
        answer.reads += (await wire.until(b"\n")).reads
    await until(lambda: simulator.history.requests[-1].events >= 2, poll_s=0)
    wire.writer.close()
    assert await ended(simulator) == "client_closed"


@pytest.mark.parametrize(
    "model, broken", [("sim/fast+die-mid-stream", None), ("sim/fast+reset-mid-stream?after=200", ConnectionResetError)]
)
async def test_a_stream_that_dies_is_not_finished(wire, simulator, model, broken):
    wire.ask(model=model, stream=True, messages=[{"role": "user", "content": "300 tokens"}])
    answer = await wire.to_the_end()
    assert (answer.broken, answer.body.endswith(b"0\r\n\r\n"), DONE in answer.body) == (broken, False, False)
    assert await ended(simulator) == "broken"
    if broken is None:
        assert len(data_events(answer.content)) == 3


async def test_a_unary_answer_that_dies_is_half(wire):
    wire.ask(model="sim/fast+die-mid-stream")
    answer = await wire.to_the_end()
    length = int(answer.head.partition(b"content-length: ")[2].split()[0])
    assert length // 2 == len(answer.body)


async def test_an_error_in_the_middle_is_openrouters(wire):
    wire.ask(model="sim/fast+error-mid-stream?after=1", stream=True)
    answer = await wire.until(b"0\r\n\r\n")
    opening, error = (json.loads(event.removeprefix(b"data: ")) for event in data_events(answer.content))
    assert (
        error["error"]["code"],
        error["choices"][0]["finish_reason"],
        DONE in answer.content,
    ) == (502, "error", False)
    assert opening["id"] == error["id"]


async def test_an_early_end_is_clean_but_has_no_done(wire):
    wire.ask(model="sim/fast+end-early?after=4", stream=True, stream_options={"include_usage": True})
    answer = await wire.until(b"\r\n0\r\n\r\n")
    assert (len(data_events(answer.content)), DONE in answer.content) == (4, False)
    wire.ask(model="sim/fast")
    assert (await wire.until(b'"fp_simulated01"}')).status == 200


async def test_a_bad_chunk_is_no_chunk(wire):
    wire.ask(model="sim/fast+bad-chunk?after=1", stream=True)
    answer = await wire.to_the_end()
    assert answer.body.endswith(b"}\n\n\r\nthis is no chunk size\r\n")


async def test_a_burst_is_one_write(wire):
    wire.ask(model="sim/fast+burst?tokens=20", stream=True)
    answer = await wire.until(b"\r\n0\r\n\r\n")
    held = [read for read in answer.reads if b"data: {" in read]
    assert (len(held), len(data_events(answer.content))) == (1, 22)


async def test_split_cuts_everywhere_but_loses_nothing(wire):
    wire.ask(model="sim/fast+split+unicode?tokens=80", stream=True, seed=4)
    split = await wire.until(b"\r\n0\r\n\r\n")
    wire.ask(model="sim/fast+unicode?tokens=80", stream=True, seed=4)
    whole = await wire.until(b"\r\n0\r\n\r\n")
    told = [
        [json.loads(event[6:])["choices"][0]["delta"] for event in data_events(answer.content)]
        for answer in (split, whole)
    ]
    assert told[1] == told[0]
    assert {b"da", b"}\n", b"\r"} <= {read[-2:] for read in split.reads}
    assert any(read[-1] >= 0xC0 for read in split.reads)
    assert any(len(read) == 1 and read.isalnum() for read in split.reads)


async def test_a_split_unary_answer_is_whole(http):
    body = {"model": "sim/fast+split+unicode", "messages": [{"role": "user", "content": "x"}]}
    async with http.post("/v1/chat/completions", json=body) as answer:
        assert json.loads(await answer.read())["choices"][0]["finish_reason"] == "stop"


async def test_line_ends_can_be_cr_lf(wire):
    wire.ask(model="sim/fast+crlf", stream=True)
    content = (await wire.until(b"\r\n0\r\n\r\n")).content
    assert (content.replace(b"\r\n", b"").count(b"\n"), content.endswith(b"data: [DONE]\r\n\r\n")) == (0, True)


async def test_comments_come_between_events(wire):
    wire.ask(model="sim/fast+comments?tokens=8", stream=True)
    content = (await wire.until(b"\r\n0\r\n\r\n")).content
    assert (content.count(b": OPENROUTER PROCESSING\n\n"), len(data_events(content))) == (3, 10)


async def test_ids_come_with_events_and_alone(wire):
    wire.ask(model="sim/fast+ids?tokens=1", stream=True)
    content = (await wire.until(b"\r\n0\r\n\r\n")).content
    assert content.startswith(b"retry: 3000\n\nevent: ping\n\nid: start\n\nevent: message\nid: 0\ndata: {")


async def test_a_byte_order_mark_begins_the_stream(wire):
    wire.ask(model="sim/fast+bom", stream=True)
    content = (await wire.until(b"\r\n0\r\n\r\n")).content
    assert (content.startswith(b"\xef\xbb\xbfdata: {"), content.count(b"\xef\xbb\xbf")) == (True, 1)


async def test_a_huge_event_is_as_large_as_asked(wire):
    wire.ask(model="sim/fast+huge-event?bytes=300000", stream=True)
    content = (await wire.until(b"\r\n0\r\n\r\n")).content
    assert max(len(event) + 2 for event in data_events(content)) == 300_000
    assert set(json.loads(data_events(content)[2][6:])["padding"]) == {"x"}


async def test_gzip_is_flushed_at_every_event(wire):
    wire.ask(model="sim/fast+gzip+stall-mid?after=2", stream=True)
    answer = await wire.until(b"\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        while len(data_events(zlib.decompressobj(wbits=31).decompress(answer.content))) < 2:
            answer.reads.append(await wire.reader.read(65536))
            assert answer.reads[-1]
    assert b"content-encoding: gzip" in answer.head


async def test_gzip_of_a_unary_answer(http):
    body = {"model": "sim/fast+gzip", "messages": [{"role": "user", "content": "x"}]}
    async with http.post("/v1/chat/completions", json=body) as answer:
        assert json.loads(gzip.decompress(await answer.read()))["object"] == "chat.completion"


@pytest.mark.parametrize("model, version", [("sim/fast+eof-delimited", "1.1"), ("sim/fast", "1.0")])
async def test_a_body_can_end_with_the_connection(wire, model, version):
    wire.ask(version=version, model=model, stream=True)
    answer = await wire.to_the_end()
    assert (answer.broken, answer.body.endswith(DONE)) == (None, True)
    assert tuple(word in answer.head for word in (b"transfer-encoding", b"content-length", b"connection: close")) == (
        False,
        False,
        True,
    )


async def test_a_stream_can_have_a_length(wire):
    wire.ask(model="sim/fast+content-length-stream", stream=True)
    answer = await wire.until(DONE)
    assert int(answer.head.partition(b"content-length: ")[2].split()[0]) == len(answer.body)


@pytest.mark.parametrize(
    "model, stream, status, kind, body",
    [
        ("sim/error-html", False, 502, "text/html", b"<html>"),
        ("sim/not-json", False, 200, "application/json", b"<<this is {not JSON"),
        ("sim/not-json", True, 200, "text/event-stream", b"data: <<this is {not JSON\n\n"),
        ("sim/empty", False, 200, "application/json", b""),
        ("sim/empty", True, 200, "text/event-stream", b""),
        ("sim/redirect", False, 302, "text/html", b""),
        ("sim/fast+wrong-content-type", True, 200, "text/html", b"data: {"),
        ("sim/fast+wrong-content-type", False, 200, "text/html", b'{"id"'),
    ],
)
async def test_answers_that_are_no_answers(http, model, stream, status, kind, body):
    asked = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "x"}]}
    async with http.post("/v1/chat/completions", json=asked, allow_redirects=False) as answer:
        told = await answer.read()
    assert (answer.status, answer.content_type, told[: len(body)] if body else told) == (status, kind, body)


async def test_whoever_follows_the_redirect_is_noted(http, simulator):
    asked = {"model": "sim/redirect", "messages": [{"role": "user", "content": "x"}]}
    async with http.post("/v1/chat/completions", json=asked) as answer:
        assert json.loads(await answer.read()) == {"redirected": True}
    assert simulator.history.requests[-1].path == "/_sim/redirected"


@pytest.mark.parametrize(
    "model, expected",
    [
        ("sim/flaky-2", [200, 500, 200, 500]),
        ("sim/flaky-2?tag=other", [200, 500, 200, 500]),
        ("sim/fail-first-2", [503, 503, 200, 200]),
    ],
)
async def test_counted_failures(http, model, expected):
    asked = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    statuses = []
    for _ in expected:
        async with http.post("/v1/chat/completions", json=asked, headers={"x-sim-fault": "fast"}) as answer:
            statuses.append(answer.status)
    assert statuses == expected


async def usages(wire, model, **fields):
    wire.ask(model=model, stream=True, **fields)
    content = (await wire.until(b"\r\n0\r\n\r\n")).content
    return [json.loads(event[6:]).get("usage", "absent") for event in data_events(content)]


ASKED = {"stream_options": {"include_usage": True}}


async def test_no_usage_is_told_even_if_asked(wire):
    assert set(await usages(wire, "sim/fast+no-usage", **ASKED)) == {"absent"}


@pytest.mark.parametrize(
    "trait, completion", [("usage-negative", -5), ("usage-absurd", 10**15 + 4), ("usage-string", "4")]
)
async def test_usage_can_be_a_lie(wire, http, trait, completion):
    model = f"sim/fast+{trait}?tokens=4"
    assert (await usages(wire, model, **ASKED))[-1]["completion_tokens"] == completion
    asked = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    async with http.post("/v1/chat/completions", json=asked) as answer:
        assert json.loads(await answer.read())["usage"]["completion_tokens"] == completion


async def test_usage_can_come_early(wire):
    *others, last = await usages(wire, "sim/fast+usage-early?tokens=2", **ASKED)
    assert (others, last["completion_tokens"]) == ([None, None, None], 2)


async def test_usage_can_come_with_every_chunk(wire):
    told = await usages(wire, "sim/fast+usage-every?tokens=3")
    assert [usage["completion_tokens"] for usage in told] == [0, 1, 2, 3, 3]


async def test_a_fault_can_be_asked_for_by_header(wire):
    wire.ask(model="gpt-4o", stream=True, headers={"x-sim-fault": "fast, end-early, after=1, tokens=9"})
    answer = await wire.until(b"\r\n0\r\n\r\n")
    assert len(data_events(answer.content)) == 1
