import asyncio
import contextlib
import json
import re

import pytest

from meshproxy.errors import UpstreamError, overloaded, upstream_error
from meshproxy.gateway.attempts import EarlyHead
from meshproxy.gateway.relay import BACKLOG_CHECK_BYTES, Relay
from meshproxy.ledger.records import Denial
from meshproxy.openai.event_stream import COST, DONE, PING, StreamScanner
from meshproxy.upstream.response import LAST_BYTE_S
from tests.gateway.parts import Client, Provider, Renewals, exchange, lease, plan
from tests.harness.waiting import turns


def event(text="x", finish="null"):
    choice = b'{"index":0,"delta":{"content":"%b"},"finish_reason":%b}' % (text.encode(), finish.encode())
    return b'data: {"id":"c","model":"m","choices":[%b]}\n\n' % choice


LAST = event("", '"stop"')
USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
LARGE = event("").replace(b'"m"', b'"' + b"m" * BACKLOG_CHECK_BYTES + b'"')  # after so much the client is looked at
NO_CREDIT = Denial("insufficient_credits", "credit", 0)


def done(cost):
    """What ends a stream that a client was told no cost of before."""
    return COST % cost.encode() + DONE


class Stream:
    """A relay that runs, between a provider and a client."""

    def __init__(self, *, covered=100, slice_tokens=100, hide_usage=True, max_event_bytes=10_000_000, pinged_at=None):
        self.provider, self.client, self.ledger = Provider(), Client(), Renewals()
        self.now = 100.0
        self.exchange = exchange(plan())
        if pinged_at is not None:
            self.exchange.early_head = EarlyHead(self.client, list, lambda: None, lambda: pinged_at)
            self.exchange.early_head.begun = True
        self.lease = lease(self.ledger, self.exchange.plan, covered=covered, slice_tokens=slice_tokens)
        scanner = StreamScanner(hide_usage=hide_usage, max_event_bytes=max_event_bytes)
        self.relay = Relay(self.provider, self.client, self.exchange, self.lease, scanner, lambda: self.now)
        self.lease.watch(self.relay.renewed)
        self.task = asyncio.create_task(self.relay.run())

    async def finish(self):
        self.provider.sink.end()
        await self.task

    def says(self, *payloads):
        for payload in payloads:
            self.provider.sink.data(payload, None)

    @property
    def error(self):
        return json.loads(self.client.sent[-1].removeprefix(b"data: "))["error"]


@pytest.fixture
async def stream():
    made = Stream()
    await turns()
    yield made
    made.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await made.task


@pytest.fixture
async def short():
    """One that is covered for four tokens, and then for four more at a time."""
    made = Stream(covered=4, slice_tokens=4)
    await turns()
    yield made
    made.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await made.task


async def test_events_go_out_in_the_call_that_brought_them(stream):
    payload, frame = event(" a"), b"%x\r\n" % len(event(" a")) + event(" a") + b"\r\n"
    stream.provider.sink.data(payload, frame)
    assert stream.client.sent[0] is payload
    assert stream.client.frames[0] is frame


async def test_a_frame_is_not_used_for_other_bytes_than_its_own(stream):
    stream.provider.sink.data(event(" a") + DONE, b"frame")
    assert (stream.client.sent[0], stream.client.frames[0]) == (event(" a"), None)


async def test_a_good_end_is_told_once(stream):
    stream.says(event(" a"), LAST, USAGE, DONE)
    stream.provider.sink.end()
    await stream.task
    assert event(" a") + LAST + done("0.0000225") == stream.client.text
    assert (stream.relay.outcome, stream.client.finished, stream.provider.closed) == ("completed", True, True)
    assert stream.relay.scanner.report.counts == {"prompt": 1, "completion": 2}


async def test_the_client_need_not_wait_for_the_end_of_the_body(stream):
    stream.says(event(" a"), DONE)
    assert done("0.0000325") == stream.client.sent[-1]


async def test_what_dies_after_its_done_was_whole(stream):
    stream.says(event(" a"), DONE)
    stream.provider.sink.fail(UpstreamError(upstream_error("Gone.", may_have_run=True), safe_to_repeat=False))
    await stream.task
    assert (stream.relay.outcome, stream.client.sent[-1]) == ("completed", done("0.0000325"))


async def test_a_finish_reason_is_a_good_end_without_done(stream):
    stream.says(event(" a"), LAST)
    stream.provider.sink.end()
    await stream.task
    assert (stream.relay.outcome, stream.client.sent[-1]) == ("completed", done("0.0000325"))


async def test_an_early_end_is_none(stream):
    stream.says(event(" a"))
    stream.provider.sink.end()
    await stream.task
    assert (stream.relay.outcome, stream.error["code"]) == ("upstream_failed", "upstream_error")
    assert DONE not in stream.client.text


async def test_a_provider_that_dies_is_told_in_one_last_event(stream):
    stream.says(event(" a"))
    stream.provider.sink.fail(UpstreamError(upstream_error("Gone.", may_have_run=True), safe_to_repeat=False))
    await stream.task
    assert (stream.error["message"], stream.error["request_id"]) == ("Gone.", "req_1")
    assert (stream.relay.outcome, stream.exchange.code) == ("upstream_failed", "upstream_error")


async def test_a_provider_that_tells_an_error_is_quoted(stream):
    stream.says(event(" a"), b'data: {"error":{"message":"Overheated"}}\n\n')
    await stream.task
    assert stream.error["provider_error"] == {"message": "Overheated"}
    assert len(stream.client.sent) == 2


async def test_an_event_without_end_is_given_up(stream):
    stream.says(b"data: " + b"x" * 10_000_001)
    await stream.task
    assert stream.error["code"] == "upstream_error"
    assert stream.provider.closed


async def test_a_client_that_hangs_up_closes_the_provider(stream):
    stream.says(event(" a"))
    stream.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.task
    assert stream.provider.closed


async def test_a_client_that_hangs_up_while_it_is_full_closes_the_provider(stream):
    stream.client.full = True
    stream.says(LARGE)
    await turns()
    stream.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.task
    assert stream.provider.closed


async def test_a_full_client_pauses_the_provider_until_it_has_caught_up(stream):
    stream.client.full = True
    stream.says(LARGE)
    await turns()
    assert stream.provider.paused
    stream.client.drain()
    await turns()
    assert not stream.provider.paused


async def test_a_client_that_catches_up_before_anyone_looks_is_not_forgotten(stream):
    stream.client.full = True
    stream.says(LARGE)
    stream.client.full = False
    await turns()
    assert not stream.provider.paused


async def test_a_stream_that_ends_while_its_client_is_full_ends(stream):
    stream.client.full = True
    stream.says(LARGE, DONE)
    await turns()
    stream.provider.sink.end()
    stream.client.drain()
    await stream.task
    assert stream.client.finished


async def test_a_silent_provider_is_covered_by_pings(stream):
    stream.relay.ping_if_silent(stream.now + 14.9, 15)
    assert stream.client.sent == []
    stream.relay.ping_if_silent(stream.now + 15, 15)
    stream.relay.ping_if_silent(stream.now + 16, 15)
    assert stream.client.sent == [PING]


async def test_pings_before_the_answer_and_in_it_have_one_rhythm():
    made = Stream(pinged_at=90.0)  # the answer began at 100
    await turns()
    made.relay.ping_if_silent(104.9, 15)
    assert made.client.sent == []
    made.relay.ping_if_silent(105.0, 15)
    assert made.client.sent == [PING]
    await made.finish()


async def test_an_event_puts_the_ping_off(stream):
    stream.now += 10
    stream.says(event(" a"))
    stream.relay.ping_if_silent(stream.now + 14, 15)
    assert [event(" a")] == stream.client.sent


async def test_a_full_or_finished_client_gets_no_ping(stream):
    stream.client.full = True
    stream.relay.ping_if_silent(stream.now + 100, 15)
    stream.client.full = False
    stream.says(DONE)
    stream.provider.sink.end()
    stream.relay.ping_if_silent(stream.now + 100, 15)
    assert [done("0.00")] == stream.client.sent


async def test_the_end_of_a_body_is_not_waited_for_long_after_done(stream):
    stream.says(event(" a") + DONE)
    stream.relay.ping_if_silent(stream.now + LAST_BYTE_S - 0.1, 15)
    assert not stream.relay.ended
    stream.relay.ping_if_silent(stream.now + LAST_BYTE_S, 15)
    await stream.task
    assert (stream.relay.outcome, stream.provider.closed, stream.client.finished) == ("completed", True, True)


async def test_shutdown_is_told(stream):
    stream.says(event(" a"))
    stream.relay.shut_down(overloaded("Closing."))
    await stream.task
    assert (stream.relay.outcome, stream.error["code"]) == ("shutdown", "overloaded")
    assert stream.provider.closed


async def test_shutdown_adds_nothing_to_a_complete_stream(stream):
    stream.says(event(" a") + DONE)
    stream.relay.shut_down(overloaded("Closing."))
    await stream.task
    assert (stream.relay.outcome, stream.client.sent[-1]) == ("completed", done("0.0000325"))
    assert stream.provider.closed


async def test_an_end_after_the_end_is_nothing(stream):
    stream.relay.shut_down(overloaded("Closing."))
    stream.provider.sink.end()
    stream.relay.stop(overloaded("Again."))
    assert len(stream.client.sent) == 1


async def test_times_are_noted(stream):
    for now in (101.0, 101.5, 104.0, 104.1):
        stream.now = now
        stream.says(event(" a"))
    stream.provider.sink.end()
    await stream.task
    noted = stream.exchange
    assert (noted.first_event_at, noted.last_event_at, noted.max_gap_s) == (101.0, 104.1, 2.5)


async def test_more_credit_is_asked_for_before_it_is_used_up(short):
    short.says(*[event(" a")] * 2)
    await turns()
    assert short.ledger.asked == []
    short.says(event(" a"))
    await turns()
    assert short.ledger.asked == [18 * 2_500 + 7 * 10_000]
    assert not short.provider.paused


async def test_a_stream_past_its_credit_waits_for_more(short):
    short.says(*[event(" a")] * 5)
    await turns()
    assert short.provider.paused
    await short.ledger.answer()
    assert not short.provider.paused


async def test_a_stream_that_outran_its_renewal_asks_again(short):
    short.says(*[event(" a")] * 3)
    await turns()
    short.says(*[event(" a")] * 5)
    await short.ledger.answer()
    assert (len(short.ledger.asked), short.provider.paused) == (2, True)
    await short.ledger.answer()
    assert not short.provider.paused


async def test_a_stream_without_more_credit_ends(short):
    short.says(*[event(" a")] * 5)
    await turns()
    await short.ledger.answer(NO_CREDIT)
    await short.task
    assert (short.relay.outcome, short.error["code"]) == ("insufficient_credits", "insufficient_credits")
    assert short.provider.closed


async def test_a_complete_stream_needs_no_more_credit(short):
    short.says(*[event(" a")] * 4, DONE)
    await turns()
    await short.ledger.answer(NO_CREDIT)
    short.provider.sink.end()
    await short.task
    assert (short.relay.outcome, short.client.sent[-1]) == ("completed", done("0.0000625"))


async def test_credit_does_not_resume_what_waits_for_the_client(short):
    short.says(*[event(" a")] * 5)
    short.client.full = True
    await turns()
    await short.ledger.answer()
    assert short.provider.paused
    short.client.drain()
    await turns()
    assert not short.provider.paused


async def test_a_client_that_catches_up_does_not_resume_what_waits_for_credit(short):
    short.client.full = True
    short.says(*[event(" a")] * 5)
    await turns()
    short.client.drain()
    await turns()
    assert short.provider.paused


async def test_what_is_far_past_its_credit_is_kept_back_until_there_is_more(short):
    short.says(b"".join([event(" a")] * 12))
    await turns()
    assert short.client.sent == []
    await short.ledger.answer()
    assert b"".join([event(" a")] * 12) == short.client.text


async def test_a_client_that_is_full_of_what_was_let_go_is_waited_for(short):
    short.says(b"".join([event(" a")] * 12))
    await turns()
    short.client.full = True
    await short.ledger.answer()
    assert short.provider.paused
    short.client.drain()
    await turns()
    assert not short.provider.paused


async def test_what_is_kept_back_is_not_lost_at_the_end(short):
    short.says(b"".join([event(" a")] * 12) + LAST + DONE)
    short.provider.sink.end()
    await turns()
    await short.ledger.answer()
    await short.task
    assert b"".join([event(" a")] * 12) + LAST + done("0.0001425") == short.client.text


async def test_what_is_kept_back_is_never_sent_without_credit(short):
    short.says(b"".join([event(" a")] * 12) + DONE)
    await turns()
    await short.ledger.answer(NO_CREDIT)
    await short.task
    assert (len(short.client.sent), short.error["code"]) == (1, "insufficient_credits")


@pytest.fixture
async def shown():
    """One whose client sees usage."""
    made = Stream(hide_usage=False)
    await turns()
    yield made
    made.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await made.task


PAID = USAGE.replace(b"}}", b'},"cost":"0.0000225"}')  # 1 * 2.50 + 2 * 10.00 USD a million


@pytest.mark.parametrize(
    ("payloads", "expected"),
    [
        pytest.param([event(" a"), LAST, USAGE, DONE], event(" a") + LAST + PAID + DONE, id="each alone"),
        pytest.param([event(" a") + LAST + USAGE + DONE], event(" a") + LAST + PAID + DONE, id="in one read"),
        pytest.param([USAGE[:20], USAGE[20:] + DONE], PAID + DONE, id="cut"),
        pytest.param([USAGE.replace(b'"id"', b'"cost":9,"id"') + DONE], PAID + DONE, id="another cost"),
        pytest.param([b"event: x\n" + USAGE + DONE], b"event: x\n" + PAID + DONE, id="with a name"),
        pytest.param(
            [LAST.replace(b'"model"', b'"usage":{"prompt_tokens":1,"completion_tokens":2},"model"'), DONE],
            LAST.replace(b'"model"', b'"usage":{"prompt_tokens":1,"completion_tokens":2},"model"').replace(
                b"]}", b'],"cost":"0.0000225"}'
            )
            + DONE,
            id="beside the finish",
        ),
        pytest.param([event(" a"), LAST, DONE], event(" a") + LAST + done("0.0000325"), id="no report"),
        pytest.param(
            [USAGE, event(" a") * 3, LAST, DONE], PAID + event(" a") * 3 + LAST + done("0.0000325"), id="early"
        ),
        pytest.param(
            [USAGE.replace(b":2}", b":1}"), USAGE, DONE],
            PAID.replace(b":2}", b":1}").replace(b"225", b"125") + PAID + DONE,
            id="twice",
        ),
    ],
)
async def test_a_client_that_sees_usage_is_told_the_cost_in_it(shown, payloads, expected):
    shown.says(*payloads)
    await shown.finish()
    assert shown.client.text == expected


async def test_what_is_told_is_what_is_charged(shown):
    shown.says(event(" a"), LAST, USAGE, DONE)
    await shown.finish()
    shown.relay.bill()
    assert shown.exchange.cost_nusd == 22_500


async def test_a_stream_that_fails_tells_no_cost(stream):
    stream.says(event(" a"))
    await stream.finish()
    assert b"x-mesh-cost" not in stream.client.text


FILTERED = (
    b'"content_filter_results":{"hate":{"filtered":false,"severity":"safe"},"violence":{"filtered":false}},"index"'
)
LOGPROBS = b'"logprobs":{"content":[%b]},"index"' % b",".join([b'{"token":" w","logprob":-0.3,"bytes":[32,116]}'] * 20)


@pytest.mark.parametrize(
    "payloads",
    [
        pytest.param([event(" word")] * 400, id="a token an event"),
        pytest.param([event(" word").replace(b'"index"', FILTERED)] * 400, id="filter results"),
        pytest.param([event(" word").replace(b'"index"', LOGPROBS)] * 400, id="logprobs"),
        pytest.param([event(" word" * 40)] * 10, id="forty tokens an event"),
        pytest.param([event(" word" * 400)], id="all in an event"),
        pytest.param([event(" word") * 400], id="all in a read"),
        pytest.param([event(" word") * 150] * 3, id="some in a read"),
        pytest.param([event(letter) for letter in " word" * 400], id="a letter an event"),
    ],
)
async def test_no_more_than_a_slice_past_the_hold_goes_out_whatever_the_events(stream, payloads):
    bound = stream.lease.bound
    for payload in payloads:
        stream.says(payload)
        if stream.provider.paused:
            break
    await turns()
    await stream.ledger.answer(NO_CREDIT)
    await stream.task
    texts = json.loads(b"[" + b",".join(re.findall(rb'"content":("[^"]*")', stream.client.text)) + b"]")
    words = "".join(texts).count(" word")
    assert words <= bound
    stream.relay.bill()
    assert words <= stream.exchange.usage.completion <= bound
