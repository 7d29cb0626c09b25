"""The judge of charges, holds, credit and caps.

Both sides of each bound: rows are a change of the good record, its request, and the rules that it breaks.
"""

import json

import pytest
from msgspec.structs import replace

from simulation.client import Sight, body_of, trace_of
from simulation.history import ALLOWANCE_NUSD, Answer, Request
from simulation.provider import Bill, Call
from simulation.record import Beat, Sample, Trouble
from tests.simulation.judged import (
    BILLS,
    CLEAN,
    COST,
    GRANTED,
    LINE,
    MARKER,
    OVERDRAWN,
    REQUEST,
    STREAMED,
    WHOLE,
    Case,
    alone,
    book,
    broken_by,
    charged,
    envelope,
    judge,
    settled,
)


def estimated(prompt, completion):
    """Let nothing have been reported, and so many tokens have been charged."""

    def change(case):
        case.call.reported, case.call.bill, case.call.is_true = False, Bill(), frozenset()
        charged(prompt * 2_500 + completion * 10_000, usage_source="estimated")(case)

    return change


def sourced(source, lie="true", *, is_true=("prompt", "completion"), left_at=None, lost_at=None, **call):
    """Let the settlement name this source of its tokens, where a provider's answer was like this, and its client left."""

    def change(case):
        case.record.books = {0: book(settled(usage_source=source))}
        case.call.answer, case.call.is_true = Answer(lie=lie), frozenset(is_true)
        for name, value in call.items():
            setattr(case.call, name, value)
        if left_at is not None:
            case.sight.request = replace(case.sight.request, keyed=True, reads="leaves")
            case.sight.ended, case.sight.ended_at = "left", left_at
        if lost_at is not None:
            case.record.troubles = [Trouble("gone", lost_at, lost_at + 30)]

    return change


def capped(told, cap, available=GRANTED):
    """Let a cap have gone out that the client was told, while so much credit was available."""

    def change(case):
        case.call.body["max_tokens"] = cap
        case.record.samples.append(Sample(9.6, 0, available, 0))
        if told is not None:
            case.sight.headers["x-mesh-max-tokens"] = str(told)

    return change


def budgeted(budget):
    """Let a cap have gone out for a key with a budget."""

    def change(case):
        case.key(budget_nusd=budget)
        capped(60, 60)(case)

    return change


def shared(budget, ended_at):
    """Let another request of a key with a budget have ended at a time, which cost nothing."""

    def change(case):
        budgeted(budget)(case)
        other = Sight(Request("q1"), "mk1q1z", "id-q1", b"", 8.0, sent_at=8.0, ended="left", ended_at=ended_at)
        case.record.sights.append(other)

    return change


def left_in_a_head(ended_at):
    """Let a client have left before it had read the head of its answer, and nothing have been charged."""

    def change(case):
        case.sight.ended, case.sight.ended_at, case.sight.status, case.sight.payload = "left", ended_at, 0, b""
        case.sight.headers, case.sight.times = {}, [(ended_at, 4)]
        case.call.complete = case.call.head_sent = case.call.reported = False
        case.call.shown_begun, case.call.ended, case.call.ended_at = 0, "closed", ended_at
        case.record.books = {0: book()}

    return change


def cut(cost, dialect="openai"):
    """Let a provider that served the tier "priority" have broken off after two tokens of a request for "flex"."""

    def change(case):
        error = envelope().decode()
        case.sight.payload = f"data: {LINE}\n\ndata: {error}\n\n".encode()
        case.serve("served")
        case.call.answer = Answer(dialect=dialect, end="resets", tier="priority")
        case.call.body |= {"model": "up-served", "service_tier": "flex"}
        case.call.upstream, case.call.tier, case.call.shown_begun = "two", "priority", 2
        case.call.reported, case.call.bill, case.call.is_true = False, Bill(), frozenset()
        case.call.complete, case.call.ended = False, "cut"
        case.record.books = {0: book(settled(cost_nusd=cost, model="served", usage_source="estimated"))}

    return change


def out_of_credit(cost, **fields):
    """Let a stream of many tokens have ended for lack of credit, with a hold of 100,000."""

    def change(case):
        error = envelope(code="insufficient_credits").decode()
        case.sight.payload = f"data: {LINE}\n\ndata: {error}\n\n".encode()
        case.call.made = case.call.shown = case.call.shown_begun = 300
        case.call.reported, case.call.bill, case.call.is_true = False, Bill(), frozenset()
        case.call.complete, case.call.ended = False, "closed"
        short = {"outcome": "insufficient_credits", "usage_source": "estimated", "held_nusd": 100_000, **fields}
        case.record.books = {0: book(settled(cost_nusd=cost, **short))}
        case.record.samples.append(Sample(9.6, 0, 1_000, 0))

    return change


def billed_beyond_credit(cost, hold="live"):
    """Let the provider of a stream that ended for lack of credit have reported more than its hold allowed for."""

    def change(case):
        out_of_credit(cost, usage_source="reported", hold=hold)(case)
        case.call.reported, case.call.bill, case.call.is_true = (
            True,
            Bill(20, 0, 300),
            frozenset({"prompt", "completion"}),
        )
        case.call.shown = case.call.shown_begun = 5  # the rest is hidden

    return change


def gone_in_the_head(cost, *troubles):
    """Let a client have gone as the first bytes came, and its provider have been left."""

    def change(case):
        case.sight.ended, case.sight.status, case.sight.payload, case.sight.times = "left", 0, b"", []
        case.sight.request = replace(case.sight.request, reads="half_closes")
        case.call.complete, case.call.ended, case.call.reported = False, "closed", False
        case.call.shown = case.call.shown_sent = case.call.shown_begun = 0
        case.record.books = {0: book(settled(cost_nusd=cost, usage_source="estimated"))}
        case.record.troubles = list(troubles)

    return change


def out_of_credit_in_a_dearer_tier(cost):
    """Let a stream for "flex" have ended for lack of credit, in "priority" at five times the price."""

    def change(case):
        out_of_credit(cost, model="served")(case)
        case.serve("served")
        case.call.answer, case.call.tier, case.call.upstream = Answer(tier="priority"), "priority", "two"
        case.call.body |= {"model": "up-served", "service_tier": "flex"}

    return change


def out_of_credit_in_a_tier(cost, prompt):
    """Let a stream have ended for lack of credit, with a prompt for which another tier of prices begins above 20 tokens."""

    def change(case):
        out_of_credit(cost, model="tiered", prompt_tokens=prompt)(case)
        case.serve("tiered")
        case.call.body["model"] = "up-tiered"

    return change


def held(amount):
    """Let the request have held so much."""

    def change(case):
        case.record.books = {0: book(settled(held_nusd=amount))}

    return change


def spent_before(cost, charged_at=11.0, worker=0, cap=1, ended_at=9.7):
    """Let another request have cost so much before one was refused for a hold of all, with nothing left of the allowance."""

    def change(case):
        short_of(FULL_HOLD, 0)(case)
        began_at = ended_at - 0.1
        other = Sight(Request("q1", max_tokens=cap), "mk1q1z", "id-q1", b"", began_at, sent_at=began_at, ended="left")
        other.worker, other.ended_at = worker, ended_at
        case.record.sights.append(other)
        charged = {"settled_ms": round(charged_at * 1000)}
        case.record.books = {0: book(settled(request_id="id-q1", hold="none", cost_nusd=cost, held_nusd=0, **charged))}

    return change


def short_of(needed, available=None):
    """Let the request have been refused for a hold of so much, of which all but one nano-USD was there."""

    def change(case):
        if available is None:
            case.record.samples.append(Sample(9.6, 0, needed - 1, 0))
        usd = [f"0.{amount:09d}" for amount in (needed - 1 if available is None else available, needed)]
        case.failed(
            402, code="insufficient_credits", message=f"It has {usd[0]} USD available, ...: {usd[1]} USD needed."
        )
        case.record.calls = []
        case.sight.headers |= {"x-mesh-attempts": "0", "x-mesh-routing-attempts": "0"}

    return change


def beside_costly(left):
    """Let so much have been left of a worker's share, where another request had cost 2,500,000 in spite of its cap."""

    def change(case):
        alone(short_of(FULL_HOLD, left))(case)
        request = Request("q1", max_tokens=1)
        body = body_of(request, "mk1q1z")
        other = Sight(request, "mk1q1z", "id-q1", body, 9.0, sent_at=9.0, ended="left", ended_at=9.1)
        asked = {**json.loads(body), "model": "up-plain"}
        call = Call("mk1q1z", "one", 0, 9.05, Answer(heeds_cap=False), asked, {}, lines=[])
        call.made = call.shown = call.shown_begun = 245
        call.bill, call.is_true = Bill(20, 0, 245), frozenset({"prompt", "completion"})
        call.reported = call.complete = True
        call.ended, call.ended_at = "whole", 9.1
        case.record.sights.append(other)
        case.record.calls = [call]
        case.record.books = {
            0: book(settled(cost_nusd=2_500_000, request_id="id-q1", hold="none", held_nusd=0, completion_tokens=245))
        }

    return change


def out_of_slices(left, since=9.9):
    """Let a stream have ended for lack of credit, while so much was left from a time on, and little before."""

    def change(case):
        out_of_credit(100_000)(case)
        case.call.made = case.call.shown = case.call.shown_begun = 8
        case.record.samples[-1:] = [Sample(9.6, 0, 1_000, 0), Sample(since, 0, left, 0)]

    return change


def beyond(excess, *, made=8, shown=8, **call):
    """Let a reported charge have exceeded its hold by so much."""

    def change(case):
        source = "reported" if call.get("reported", True) else "estimated"
        case.record.books = {0: book(settled(held_nusd=COST - excess, usage_source=source))}
        case.call.made, case.call.shown = made, shown
        for name, value in call.items():
            setattr(case.call, name, value)

    return change


MESSAGE_BYTES = len(json.dumps([{"role": "user", "content": f"{MARKER}: the river is old, and"}]))
PROMPT_HELD = MESSAGE_BYTES // 3 + 12  # tokens, by the coarsest estimate
FULL_HOLD = PROMPT_HELD * 2_500 + 400 * 10_000
TIERED = Request("q0", model="tiered", stream=True)
SERVED = Request("q0", model="served", tier="flex", stream=True)
SLICE_NUSD = PROMPT_HELD * 2_500 + (12 + 16) * 10_000 - 100_000  # with 8 tokens seen, beside a hold of 100,000
MONEY = {
    "an estimate of 0.8": (estimated(16, 6), REQUEST, set()),
    "a prompt below 0.8": (estimated(15, 6), REQUEST, BILLS),
    "output below 0.8": (estimated(16, 5), REQUEST, BILLS),
    "an estimate of 1.4": (estimated(28, 12), REQUEST, set()),
    "a prompt above 1.4": (estimated(29, 12), REQUEST, BILLS),
    "output above 1.4": (estimated(28, 13), REQUEST, BILLS),
    "an estimate up to the cap": (estimated(28, 8), Request("q0", max_tokens=8), set()),
    "an estimate above the cap": (estimated(28, 9), Request("q0", max_tokens=8), BILLS),
    "an estimate with a tool's name": (
        estimated(28, 15),
        Request("q0", answers=(Answer(kind="tool"),)),
        set(),
    ),
    "an estimate above a tool's name": (estimated(28, 16), Request("q0", answers=(Answer(kind="tool"),)), BILLS),
    "a session without its name": (charged(COST, session="~"), Request("q0", session="s1"), {"tokens_are_reported"}),
    "a cut stream of another tier": (cut(20 * 5_000 + 2 * 20_000), SERVED, set()),
    "a cut stream in the tier asked for": (cut(20 * 1_000 + 2 * 4_000), SERVED, BILLS),
    "a cut stream that names its tier at its end": (cut(20 * 1_000 + 2 * 4_000, "anthropic"), SERVED, set()),
    "a hold and a slice": (out_of_credit(100_000 + 16 * 10_000), STREAMED, set()),
    "more than a hold and a slice": (out_of_credit(100_001 + 16 * 10_000), STREAMED, BILLS | OVERDRAWN),
    "a bill above a hold and a slice": (billed_beyond_credit(100_000 + 16 * 10_000), STREAMED, set()),
    "a hold for a longer prompt, and a slice": (billed_beyond_credit(70_000 + 16 * 10_000), STREAMED, set()),
    "less than that": (billed_beyond_credit(69_999 + 16 * 10_000), STREAMED, BILLS),
    "the head of a worker's end": (gone_in_the_head(0, Trouble("drained", -9.0, 31.0, 0)), REQUEST, set()),
    "the head of what ran on another worker": (gone_in_the_head(0, Trouble("drained", -9.0, 31.0, 1)), REQUEST, BILLS),
    "a head that nothing ended": (gone_in_the_head(0), REQUEST, BILLS),
    "a hold and a slice of a dearer tier": (out_of_credit_in_a_dearer_tier(500_000 + 16 * 30_000), SERVED, set()),
    "more than that": (out_of_credit_in_a_dearer_tier(500_001 + 16 * 30_000), SERVED, BILLS),
    "a hold and a slice of a tier that was reached": (
        out_of_credit_in_a_tier(200_000 + 16 * 20_000 + 5_000, 21),
        TIERED,
        set(),
    ),
    "more than a hold of that tier": (out_of_credit_in_a_tier(200_001 + 16 * 20_000 + 5_000, 21), TIERED, BILLS),
    "a hold and a slice of no higher tier": (out_of_credit_in_a_tier(100_000 + 16 * 20_000, 20), TIERED, set()),
    "more than a hold of no higher tier": (
        out_of_credit_in_a_tier(100_001 + 16 * 20_000, 20),
        TIERED,
        BILLS | OVERDRAWN,
    ),
    "an abandoned hold and a slice": (billed_beyond_credit(260_000, "abandoned"), STREAMED, {"holds_are_kept"}),
    "a hold and a slice for each of two": (out_of_credit(100_000 + 320_000), Request("q0", stream=True, n=2), set()),
    "a whole answer at its hold": (beyond(0), REQUEST, set()),
    "a whole answer beyond its hold": (beyond(1), REQUEST, OVERDRAWN),
    "a whole answer of a provider that ignores caps": (beyond(80_000, answer=Answer(heeds_cap=False)), REQUEST, set()),
    "a slice, and a fifth of the text that no estimate sees": (beyond((16 + 2) * 10_000), STREAMED, set()),
    "more than a slice": (beyond((16 + 2) * 10_000 + 1), STREAMED, OVERDRAWN),
    "a slice and hidden reasoning": (beyond((16 + 2 + 5) * 10_000, made=13), STREAMED, set()),
    "an unreported slice": (beyond(16 * 10_000 + 1, reported=False), STREAMED, OVERDRAWN),
    "a larger cap": (capped(None, 10), Request("q0", max_tokens=9), CLEAN),
    "a smaller cap": (capped(None, 8), Request("q0", max_tokens=9), CLEAN),
    "a hold of all": (held(FULL_HOLD), REQUEST, set()),
    "a hold of more": (held(FULL_HOLD + 1), REQUEST, {"holds_are_needed"}),
    "a hold of a cap": (held(PROMPT_HELD * 2_500 + 90_000), Request("q0", max_tokens=9), set()),
    "a hold of more than a cap": (
        held(PROMPT_HELD * 2_500 + 90_001),
        Request("q0", max_tokens=9),
        {"holds_are_needed"},
    ),
    "a hold of a slice": (held(PROMPT_HELD * 2_500 + (12 + 16) * 10_000), STREAMED, set()),
    "a hold of more than a slice": (held(PROMPT_HELD * 2_500 + 280_001), STREAMED, {"holds_are_needed"}),
    "a refusal for a hold": (short_of(FULL_HOLD), REQUEST, set()),
    "a refusal for more than a hold": (short_of(FULL_HOLD + 1), REQUEST, {"statuses_have_reasons"}),
    "a refusal for a share of the allowance": (alone(short_of(FULL_HOLD, ALLOWANCE_NUSD // 2)), REQUEST, set()),
    "a refusal for what is left of a share": (alone(spent_before(ALLOWANCE_NUSD // 2)), REQUEST, BILLS),
    "a refusal for less than is left": (
        alone(spent_before(ALLOWANCE_NUSD // 2 - 1)),
        REQUEST,
        BILLS | {"statuses_have_reasons"},
    ),
    "a refusal for what may still be held": (alone(spent_before(1, cap=None, ended_at=9.0)), REQUEST, BILLS),
    "a refusal for what was held of a request that is over": (
        alone(spent_before(1, cap=None, ended_at=8.99)),
        REQUEST,
        BILLS | {"statuses_have_reasons"},
    ),
    "a refusal for what was charged just before": (
        alone(spent_before(ALLOWANCE_NUSD // 2, 9.01), 5.0),
        REQUEST,
        BILLS,
    ),
    "a refusal for what was charged": (
        alone(spent_before(ALLOWANCE_NUSD // 2, 8.99), 5.0),
        REQUEST,
        BILLS | {"statuses_have_reasons"},
    ),
    "a refusal for what was charged as the store was lost": (
        alone(spent_before(ALLOWANCE_NUSD // 2, 7.99), 7.0),
        REQUEST,
        BILLS,
    ),
    "a refusal for what another worker spent": (
        alone(spent_before(ALLOWANCE_NUSD // 2, worker=1)),
        REQUEST,
        BILLS | {"statuses_have_reasons"},
    ),
    "a refusal for less than a share": (
        alone(short_of(FULL_HOLD, ALLOWANCE_NUSD // 2 - 1)),
        REQUEST,
        {"statuses_have_reasons"},
    ),
    "a refusal for what a costly request left of a share": (beside_costly(500_000), REQUEST, set()),
    "a refusal for less than it left": (beside_costly(499_999), REQUEST, {"statuses_have_reasons"}),
    "a refusal for a share before the store is lost": (
        alone(short_of(FULL_HOLD, ALLOWANCE_NUSD // 2), 12.1),
        REQUEST,
        {"statuses_have_reasons"},
    ),
    "a slice that is lacking": (out_of_slices(SLICE_NUSD - 1), STREAMED, set()),
    "a slice that is left": (out_of_slices(SLICE_NUSD), STREAMED, {"statuses_have_reasons"}),
    "a slice that was lacking until a second before": (out_of_slices(SLICE_NUSD, 10.1), STREAMED, set()),
    "a cap of the gateway's": (capped(60, 60, 2 * FULL_HOLD - 1), REQUEST, set()),
    "a cap that wasn't needed": (capped(60, 60, 2 * FULL_HOLD), REQUEST, CLEAN),
    "a cap above the model's": (capped(401, 401, 1_000), REQUEST, CLEAN),
    "a cap that isn't told": (capped(None, 60, 1_000), REQUEST, CLEAN),
    "another cap that is told": (capped(61, 60, 1_000), REQUEST, CLEAN),
    "a cap within a budget": (budgeted(2 * FULL_HOLD - 1), REQUEST, set()),
    "a cap that its budget didn't need": (budgeted(2 * FULL_HOLD), REQUEST, CLEAN),
    "a cap while another request holds the budget": (shared(3 * FULL_HOLD - 1, 9.8), REQUEST, set()),
    "a cap of what another request had given back": (shared(3 * FULL_HOLD - 1, 8.5), REQUEST, CLEAN),
    "a deadline's answer that wasn't read": (left_in_a_head(10.5), Request("q0", stream=True, timeout_s=0.5), set()),
    "an answer left before its deadline": (left_in_a_head(10.4), Request("q0", stream=True, timeout_s=0.5), BILLS),
    "an answer left without a deadline": (left_in_a_head(10.5), STREAMED, BILLS),
    "a cap of a stream": (capped(60, 60, 1_000), STREAMED, CLEAN),
}


@pytest.mark.parametrize(("change", "request_", "broken"), MONEY.values(), ids=MONEY.keys())
def test_money_is_judged_at_its_bounds(change, request_, broken):
    assert broken_by(change, request_) == broken


SOURCES = {
    "a report": (sourced("reported"), True),
    "a report that is called an estimate": (sourced("estimated"), False),
    "a report that is called drained though its client stayed": (sourced("drained"), False),
    "a report without a prompt": (sourced("estimated", "no_prompt", is_true=["completion"]), True),
    "an estimate that is called a report": (sourced("reported", "no_prompt", is_true=["completion"]), False),
    "an answer without text or a report": (sourced("none", "none", is_true=[], shown=0, reported=False), True),
    "an answer without text or a report, which can't be": (
        sourced("none", "absurd", is_true=[], shown=0, reported=False),
        True,
    ),
    "an answer without text that was reported": (sourced("none", shown=0), False),
    "an answer without text whose output can't be": (sourced("reported", "absurd", is_true=["prompt"], shown=0), False),
    "an answer without text whose prompt is reported": (
        sourced("reported", "no_completion", is_true=["prompt"], shown=0),
        True,
    ),
    "half of the text": (sourced("reported", "early", is_true=["prompt"], shown=20, made=24), False),
    "half of the text, and reasoning": (sourced("reported", "early", is_true=["prompt"], shown=20, made=25), True),
    "half of a long text, of which half came": (
        sourced(
            "reported", "early", is_true=["prompt"], shown=45, made=45, shown_begun=28, complete=False, ended="cut"
        ),
        True,
    ),
    "half of a long text that came": (
        sourced("reported", "early", is_true=["prompt"], shown=45, made=45, shown_begun=45),
        False,
    ),
    "a report that came after a hang-up": (sourced("drained", left_at=10.79), True),
    "a report after a hang-up that isn't called drained": (sourced("reported", left_at=10.79), False),
    "a report after a hang-up that wasn't read": (sourced("estimated", left_at=10.79), False),
    "a report that wasn't read without the store": (
        sourced("estimated", left_at=10.79, lost_at=16.0, ended_at=15.0, last_at=15.0),
        True,
    ),
    "a report that wasn't read before the store was lost": (
        sourced("estimated", left_at=10.79, lost_at=16.01, ended_at=15.0, last_at=15.0),
        False,
    ),
    "a report that came as its client left": (sourced("reported", left_at=10.81), True),
    "a report that came before its client left, whose body lingered": (
        sourced("reported", left_at=10.79, last_at=10.98),
        True,
    ),
    "a report that came later, whose body lingered": (sourced("reported", left_at=10.77, last_at=10.98), False),
    "a provider's error": (sourced("none", ended="error"), True),
    "a provider's error that is called an estimate": (sourced("estimated", ended="error"), False),
}


@pytest.mark.parametrize(("change", "is_right"), SOURCES.values(), ids=SOURCES.keys())
def test_the_source_of_the_tokens_is_judged(change, is_right):
    case = Case()
    change(case)
    assert ("sources_are_told" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("waited_s", "answer", "head_sent", "excused"),
    [
        (29.91, Answer(delay_s=31.0), False, True),
        (29.89, Answer(delay_s=31.0), False, False),
        (30.0, Answer(delay_s=29.0), False, False),
        (19.91, Answer(pause_s=21.0), True, True),
        (19.89, Answer(pause_s=21.0), True, False),
        (20.0, Answer(pause_s=19.0), True, False),
    ],
)
def test_a_provider_that_is_left_for_its_silence_is_paid_by_no_client(waited_s, answer, head_sent, excused):
    case = Case(Request("q0", stream=True, reads="stalls"), answer=answer)
    gone_in_the_head(0)(case)
    case.sight.ended_at, case.call.ended_at, case.call.head_sent = 90.0, 42.0, head_sent
    case.call.at = case.call.last_at = 42.0 - waited_s
    assert ("charges_are_bills" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(
    ("gzip", "sent_bytes", "complete", "is_right"),
    [(True, 1, False, True), (True, 0, False, False), (True, 1, True, False), (False, 1, False, False)],
)
def test_a_part_of_a_compressed_stream_may_have_a_report(gzip, sent_bytes, complete, is_right):
    case = Case(Request("q0", stream=True, reads="leaves"), answer=Answer("gemini", gzip=gzip))
    case.sight.ended, case.call.ended, case.call.reported = "left", "closed", False
    case.call.sent_bytes, case.call.complete = sent_bytes, complete
    case.record.books = {0: book(settled(usage_source="reported"))}
    assert ("sources_are_told" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(("reads", "excused"), [("slowly", True), ("all", False)])
def test_credit_may_have_been_short_long_before_a_slow_client_is_told(reads, excused):
    case = Case(Request("q0", stream=True, reads=reads))
    out_of_credit(100_000)(case)
    case.record.samples += [Sample(10.2, 0, 1_000, 0), Sample(10.3, 0, GRANTED, 0)]
    case.sight.ended_at = 12.0
    assert ("statuses_have_reasons" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(("ran", "excused"), [("id-q1", True), ("id-q0", False)])
def test_a_request_that_left_before_it_ran_has_no_tokens_of_another_s(ran, excused):
    case = Case(Request("q0", keyed=True, reads="leaves"))
    case.sight.ended, case.sight.ended_at = "left", 10.5
    case.twice(ended_at=12.0)
    case.call.headers = {"traceparent": trace_of(ran)}
    case.record.books = {0: book(settled(usage_source="none"), settled(hold_id="h2", request_id="id-q1"))}
    assert ("sources_are_told" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(("reported", "excused"), [(True, True), (False, False)])
def test_a_client_that_left_behind_a_report_of_zeros_and_no_text_is_charged_nothing(reported, excused):
    case = Case(Request("q0", stream=True, reads="leaves"))
    gone_in_the_head(0)(case)
    case.sight.status, case.call.reported, case.call.is_true, case.call.bill = 200, reported, frozenset(), Bill()
    assert ("charges_are_bills" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(
    ("status", "limits", "other_nusd", "is_right"),
    [
        (504, {}, 0, False),
        (504, {"budget_nusd": COST + 162_000}, 0, True),
        (504, {"session_budget_nusd": COST + 162_000}, 0, True),
        (504, {"budget_nusd": GRANTED}, 0, False),
        (504, {"budget_nusd": GRANTED}, GRANTED - COST, True),
        (200, {"budget_nusd": COST}, 0, False),
    ],
)
def test_a_budget_may_end_an_answer_that_runs_on(status, limits, other_nusd, is_right):
    case = Case(Request("q0", keyed=True, timeout_s=0.5, session="s1"))
    case.key(**limits)
    case.sight.status, case.sight.payload = status, envelope(code="gateway_timeout") if status == 504 else WHOLE
    sources = [settled(usage_source="estimated")]
    if other_nusd:
        case.twice()
        case.record.sights[1].request, case.record.sights[1].marker = Request("q1"), "mk1q1z"
        sources.append(settled(hold_id="h2", request_id="id-q1", held_nusd=other_nusd))
    case.record.books = {0: book(*sources)}
    assert ("sources_are_told" not in {finding.rule for finding in judge(case.record)}) == is_right


def local(number, cost, charged_at=60.0, worker="worker-00001", **fields):
    """A settlement of a whole answer that was admitted without the store, of a worker."""
    ids = {"hold_id": f"{worker}{number}", "request_id": f"id-q{number}"}
    return settled(hold="none", held_nusd=0, cost_nusd=cost, settled_ms=round(charged_at * 1000), **ids, **fields)


@pytest.mark.parametrize(
    ("events", "told", "is_right", "troubles"),
    [
        pytest.param([local(0, 3_000_000), local(1, 3_000_000)], [1], True, [], id="an allowance"),
        pytest.param([local(0, 3_000_000), local(1, 3_000_001)], [1], False, [], id="more than that"),
        pytest.param([local(0, 3_000_000), local(1, 1)], [2], False, [], id="more than a share"),
        pytest.param([local(0, 3_000_000), local(1, 1)], [1, 2], True, [], id="which is perhaps not read"),
        pytest.param([local(0, 3_000_000), local(1, 1)], [1, 2, 2], False, [], id="which is read"),
        pytest.param([local(0, 3_000_000), local(1, 1)], [2, 1], False, [], id="more, as a lower number is told once"),
        pytest.param(
            [local(0, 3_000_000), local(1, 1)], [2, 1, 1], True, [], id="more, as a lower number is told twice"
        ),
        pytest.param([local(0, 3_000_000), local(1, 1)], [], True, [], id="which was never asked for"),
        pytest.param(
            [local(0, 3_000_000), local(1, 3_000_000, worker="worker-00002")],
            [2],
            True,
            [],
            id="two shares of two workers",
        ),
        pytest.param(
            [local(0, 3_000_000, 20.0), local(1, 3_000_000, started_ms=20_001)],
            [2],
            True,
            [],
            id="a share, charged, and another",
        ),
        pytest.param(
            [local(0, 3_000_000, 20.0), local(1, 3_000_000, started_ms=19_999)],
            [2],
            False,
            [],
            id="another before it is charged",
        ),
        pytest.param(
            [local(0, 3_000_000), settled(cost_nusd=4_000_000, hold_id="h2", request_id="id-q1")],
            [2],
            True,
            [],
            id="a hold",
        ),
        pytest.param(
            [local(0, 3_000_000), local(1, 3_000_000)],
            [2],
            True,
            [Trouble("failover", 10.2, 30.0)],
            id="holds that were lost",
        ),
        pytest.param(
            [local(0, 3_000_000), local(1, 3_000_000)],
            [2],
            False,
            [Trouble("failover", 11.2, 30.0)],
            id="holds that weren't",
        ),
        pytest.param(
            [local(0, 6_000_000)],
            [1, 2, 2],
            True,
            [Trouble("lost_reply", at, at + 5.0) for at in (2.0, 3.0)],
            id="alone, as far as a worker knows whose replies were lost",
        ),
        pytest.param(
            [local(0, 6_000_000)],
            [1, 2, 2],
            False,
            [Trouble("lost_reply", at, at + 5.0) for at in (2.1, 3.1)],
            id="shared, where the replies that were lost were others",
        ),
    ],
)
def test_a_worker_spends_its_share_of_the_allowance_without_the_store(events, told, is_right, troubles):
    case = Case()
    case.twice()
    case.record.sights[1].marker, other = "mk1q1z", replace(case.call, marker="mk1q1z")
    case.record.calls.append(other)
    case.record.history = replace(case.record.history, local=True, workers=2)
    case.record.troubles = [Trouble("gone", 9.0, 60.0), *troubles]
    case.record.beats = [
        Beat(1.0 + at, worker, count) for at, count in enumerate(told) for worker in ("worker-00001", "worker-00002")
    ]
    case.record.books = {0: book(*events)}
    assert ("credit_is_not_overdrawn" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("workers", "charged_at", "troubles", "is_right"),
    [
        pytest.param(1, 20.0, [], True, id="charged before"),
        pytest.param(1, 20.01, [], False, id="in the journal of the one before"),
        pytest.param(2, 20.01, [], True, id="of another worker"),
        pytest.param(1, 20.01, [Trouble("disk_full", 9.0, 30.0)], True, id="which the disk may have lost"),
    ],
)
def test_a_worker_that_is_started_again_owes_what_its_journal_has(workers, charged_at, troubles, is_right):
    case = Case()
    case.twice()
    case.record.sights[1].marker, other = "mk1q1z", replace(case.call, marker="mk1q1z")
    case.record.calls.append(other)
    case.record.history = replace(case.record.history, local=True, workers=workers)
    case.record.troubles = [Trouble("gone", 9.0, 60.0), Trouble("killed", 15.0, 16.0, 0), *troubles]
    before, after = local(0, 3_000_000, charged_at), local(1, 3_000_001, started_ms=20_000, worker="worker-00002")
    case.record.books = {0: book(before, after)}
    assert ("credit_is_not_overdrawn" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("outages", "is_right"),
    [
        pytest.param([(9.0, 20.0), (25.0, 40.0)], True, id="two outages"),
        pytest.param([(9.0, 20.0), (12.0, 40.0)], False, id="two that overlap"),
        pytest.param([(9.0, 20.0), (36.0, 40.0)], False, id="one in which nothing was admitted"),
    ],
)
def test_a_balance_may_fall_by_an_allowance_in_each_outage(outages, is_right):
    case = Case()
    case.twice()
    case.record.history = replace(case.record.history, local=True, workers=1)
    case.record.troubles = [Trouble("gone", *outage) for outage in outages]
    costs = [local(0, 6_000_000, 20.0), local(1, 5_000_000, started_ms=30_000)]
    case.record.books = {0: replace(book(*costs), balance=-ALLOWANCE_NUSD - 6_000_001)}
    words = " ".join(finding.words for finding in judge(case.record))
    assert ("with the allowance" not in words) == is_right


@pytest.mark.parametrize(("hold", "is_right"), [("abandoned", True), ("live", False)])
def test_a_balance_may_fall_by_what_had_an_abandoned_hold(hold, is_right):
    case = Case()
    case.record.history = replace(case.record.history, local=True)
    case.record.books = {0: replace(book(settled(held_nusd=COST, hold=hold)), balance=-COST)}
    words = " ".join(finding.words for finding in judge(case.record))
    assert ("with the allowance" not in words) == is_right


@pytest.mark.parametrize(("lost", "is_right"), [(0, False), (1, False), (2, True)])
def test_a_lost_reply_has_one_request_admitted_without_the_store(lost, is_right):
    """And no whole allowance: three of 5,000,000 and one at each of the workers exceed one allowance."""
    case = Case()
    case.record.history = replace(case.record.history, local=True)
    costs = [local(number, 5_000_000, charged_at=11.0, worker=f"worker-{number:05}") for number in range(4)]
    case.record.books = {0: book(*costs, granted=0, balance=-20_000_000)}
    case.record.troubles = [Trouble("lost_reply", 9.0 + at, 15.0) for at in range(lost)]
    assert ("credit_is_not_overdrawn" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(("complete", "charge", "broken"), [(True, 0, True), (True, COST, False), (False, 0, False)])
def test_a_request_that_runs_on_past_its_deadline_is_charged(complete, charge, broken):
    case = Case(Request("q0", keyed=True, timeout_s=0.5))
    case.sight.status, case.sight.payload = 504, envelope(code="gateway_timeout")
    case.call.complete = complete
    case.record.books = {0: book(settled(cost_nusd=charge))}
    assert ("charges_are_bills" in {finding.rule for finding in judge(case.record)}) == broken
