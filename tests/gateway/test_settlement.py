import asyncio
from decimal import Decimal
from types import SimpleNamespace

import msgspec
import pytest

from meshproxy.config import Model, Route
from meshproxy.gateway.settle import Settler, bill, bill_prompt
from meshproxy.ledger.store import StoreError, Unavailable
from meshproxy.openai.usage import RefusedNumber, Report, Usage
from meshproxy.policy.pricing import price_of
from meshproxy.telemetry.tasks import Tasks
from tests.gateway.parts import BILLED_PROMPT_TOKENS, BODY, Renewals, candidate, exchange, lease, plan

CHEAP = price_of(
    Model(upstreams=[Route(upstream="u", model="m")], input_usd_per_mtok="0.25", output_usd_per_mtok="1.00")
)


def report(prompt=0, completion=0, **rest):
    counts = {"prompt": prompt, "completion": completion, **rest}
    return Report({kind: count for kind, count in counts.items() if count})


def billed(reported, seen, *, of_plan=None, most=None, served_model=None, outdated=False):
    made = exchange(of_plan)
    bill(made, reported, served_model, lambda: seen, most, outdated=outdated)
    return made.usage, made.usage_source, made.cost_nusd


class TestBill:
    def test_the_reported_numbers(self):
        assert billed(report(10, 20), 99) == (Usage(10, 20), "reported", 10 * 2_500 + 20 * 10_000)

    def test_an_estimate_where_nothing_was_reported(self):
        expected = Usage(BILLED_PROMPT_TOKENS, 7)
        assert billed(None, 7) == (expected, "estimated", BILLED_PROMPT_TOKENS * 2_500 + 7 * 10_000)

    @pytest.mark.parametrize(
        ("most", "expected"),
        [
            (None, Usage(BILLED_PROMPT_TOKENS, 7, audio_completion=5)),
            (3, Usage(BILLED_PROMPT_TOKENS, 3, audio_completion=3)),
        ],
    )
    def test_audio_is_estimated_as_audio(self, most, expected):
        made = exchange()
        bill(made, None, None, lambda: 7, most, audio_output=lambda: 5)
        assert (made.usage, made.usage_source) == (expected, "estimated")

    def test_nothing_where_nothing_was_seen(self):
        assert billed(None, 0) == (Usage(), "none", 0)

    @pytest.mark.parametrize(
        ("reported", "expected"),
        [
            (report(0, 0), Usage(BILLED_PROMPT_TOKENS, 7)),  # zeros beside text
            (report(10, 0), Usage(10, 7)),
            (report(0, 20), Usage(BILLED_PROMPT_TOKENS, 20)),
            (report(10**9, 1), Usage(BILLED_PROMPT_TOKENS, 1)),
            (report(10, 10**9), Usage(10, 7)),
            (report(10, 0, cached=4), Usage(10, 7, cached=4)),
        ],
    )
    def test_an_estimate_in_the_place_of_what_is_missing_or_cannot_be_true(self, reported, expected):
        assert billed(reported, 7)[:2] == (expected, "estimated")

    @pytest.mark.parametrize(
        ("reported", "expected"),
        [
            (report(), (Usage(), "reported")),
            (report(800), (Usage(800), "reported")),
            (report(800, 10**9), (Usage(800), "estimated")),  # that can't be true
        ],
    )
    def test_no_output_where_there_was_none(self, reported, expected):
        assert billed(reported, 0)[:2] == expected

    @pytest.mark.parametrize(
        ("seen", "expected"), [(99, (Usage(10, 99), "estimated")), (3, (Usage(10, 20), "reported"))]
    )
    def test_text_that_came_after_the_report_counts(self, seen, expected):
        assert billed(report(10, 20), seen, outdated=True)[:2] == expected

    def test_more_than_the_request_asked_for_is_believed(self):
        assert billed(report(500, 20_000), 7, of_plan=plan(output_cap=5, output_limit=5))[0].completion == 20_000

    def test_an_estimate_is_no_more_than_was_asked_for(self):
        assert billed(None, 1000, of_plan=plan(output_cap=5, output_limit=5))[0].completion == 5

    def test_no_more_than_the_most(self):
        assert billed(report(10, 20), 99, most=3)[:2] == (Usage(10, 3), "estimated")

    def test_the_fallback_that_served_sets_the_price(self):
        native = candidate(model="cheap", upstream_model="cheap-1", price=CHEAP)
        of_plan = plan(candidates=(candidate(natives=(native,)),))
        assert billed(report(10, 20), 0, of_plan=of_plan, served_model="cheap-1")[2] == 10 * 250 + 20 * 1_000

    def test_a_fallback_that_none_was_asked_for_is_billed_at_the_dearest(self):
        native = candidate(model="cheap", upstream_model="cheap-1", price=CHEAP)
        for natives_first in (False, True):
            asked, other = (native, candidate()) if natives_first else (candidate(), native)
            made = exchange(plan(candidates=(msgspec.structs.replace(asked, natives=(other,)),)))
            bill(made, report(10, 20), "a stranger", lambda: 0)
            told = (made.cost_nusd, made.model, made.unlisted_model)
            assert told == (10 * 2_500 + 20 * 10_000, "m", "a stranger")

    def test_what_a_stream_costs_so_far_changes_nothing_of_what_it_costs(self):
        native = candidate(model="cheap", upstream_model="cheap-1", price=CHEAP)
        made = exchange(plan(candidates=(candidate(natives=(native,)),)))
        for served_model, expected in (("cheap-1", "cheap"), ("a stranger", "m"), ("cheap-1", "cheap")):
            bill(made, report(10, 20), served_model, lambda: 0)
            assert (made.model, made.unlisted_model is not None) == (expected, expected == "m")

    @pytest.mark.parametrize(
        ("told", "most", "outdated", "expected"),
        [
            ("0.5", None, False, 500_000_000),
            (None, None, False, 10 * 2_500 + 20 * 10_000),
            ("0.5", 3, False, 10 * 2_500 + 3 * 10_000),
            ("0.5", None, True, 10 * 2_500 + 99 * 10_000),
        ],
    )
    def test_the_provider_s_own_figure_counts_for_the_whole_answer(self, told, most, outdated, expected):
        price = msgspec.structs.replace(candidate().price, markup=1_000_000_000)
        made = exchange(plan(candidates=(candidate(price=price),)))
        reported = msgspec.structs.replace(report(10, 20), cost_usd=None if told is None else Decimal(told))
        bill(made, reported, None, lambda: 99, most, outdated=outdated)
        assert (made.cost_nusd, made.price.markup is None) == (expected, expected != 500_000_000)

    @pytest.mark.parametrize(
        ("reported", "served", "expected"),
        [
            (None, None, 250),
            ("flex", None, 250),
            ("default", None, 2_500),
            (None, "default", 2_500),
            ("default", "flex", 2_500),
        ],
    )
    def test_the_service_tier_that_was_served_sets_the_price(self, reported, served, expected):
        body = b'{"service_tier":"flex","messages":[{"role":"user","content":"Hello there"}]}'
        made = exchange(plan(body, candidates=(candidate(services=(("flex", CHEAP),)),)))
        bill(made, msgspec.structs.replace(report(10), service_tier=reported), None, lambda: 0, served_tier=served)
        assert 10 * expected == made.cost_nusd

    def test_the_prompt_of_a_client_that_hung_up_has_the_price_of_the_tier_that_was_served(self):
        made = exchange(plan(candidates=(candidate(services=(("flex", CHEAP),)),)))
        bill(made, None, None, lambda: 0, served_tier="flex")
        bill_prompt(made)
        assert made.cost_nusd == BILLED_PROMPT_TOKENS * 250

    def test_nothing_before_there_is_a_plan(self):
        made = exchange()
        made.plan = None
        bill(made, report(1, 1), None, lambda: 1)
        assert (made.usage, made.cost_nusd) == (Usage(), 0)

    def test_what_was_refused_is_kept_for_the_log(self):
        made = exchange()
        bill(made, report(10**9, 1), None, lambda: 1)
        assert made.refused_numbers == (RefusedNumber("over_window", "prompt", "1000000000"),)


class Books:
    """A ledger and a journal that keep what they are given; the ledger answers `answers` in turn."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.settled, self.journaled = [], []

    def send_settlement(self, settlement):
        self.settled.append(settlement)
        answer, asked = self.answers.pop(0), asyncio.get_running_loop().create_future()
        if isinstance(answer, Exception):
            asked.set_exception(answer)
        elif answer is not None:
            asked.set_result(answer)
        return asked

    async def settle(self, settlement):
        return await self.send_settlement(settlement)

    async def append(self, settlement):
        self.journaled.append(settlement)


async def settle(books, *, with_lease=True, outcome="completed", **fields):
    made, tasks = exchange(plan(BODY)), Tasks()
    if with_lease:
        made.lease = lease(Renewals())
    bill(made, report(10, 20), None, lambda: 0)
    made.outcome = outcome
    for name, value in fields.items():
        setattr(made, name, value)
    Settler(books, books, None, tasks, lambda: 1000.0, lambda: 2.5).settle(made)
    await tasks.finish(1)
    return made


class TestSettler:
    async def test_what_is_settled(self):
        books = Books(True)
        await settle(books)
        (settlement,) = books.settled
        assert (
            settlement.hold_id,
            settlement.request_id,
            settlement.account,
            settlement.key_id,
            settlement.model,
            settlement.upstream,
        ) == ("h", "req_1", "acme", "k", "m", "u")
        assert (
            settlement.cost_nusd,
            settlement.usage_source,
            settlement.outcome,
            settlement.started_ms,
            settlement.unheld,
        ) == (225_000, "reported", "completed", 997_500, False)
        assert '"output":10000000000' in settlement.price

    @pytest.mark.parametrize("complete, kept_ms", [(True, 60_000), (False, -1)])
    async def test_how_long_a_key_is_charged_whose_client_left(self, complete, kept_ms):
        books, recording = Books(True), SimpleNamespace(record="record", ttl_ms=60_000)
        await settle(books, outcome="client_disconnected", recording=recording, complete=complete)
        (settlement,) = books.settled
        assert (settlement.replay, settlement.replay_ttl_ms) == ("record", kept_ms)

    async def test_nothing_without_a_hold(self):
        books = Books()
        await settle(books, with_lease=False)
        assert books.settled == []

    async def test_what_ends_before_the_ledger_has_answered_is_settled_as_it_ended(self):
        books = Books(True)
        unanswered = lease(Renewals()).hold.request
        await settle(books, with_lease=False, unanswered=unanswered, outcome="shutdown", code="overloaded")
        assert [(each.hold_id, each.outcome, each.code) for each in books.settled] == [("h", "shutdown", "overloaded")]

    async def test_a_hold_that_the_ledger_lost_is_charged_without_it(self):
        books = Books(False, True)
        await settle(books)
        assert [settlement.unheld for settlement in books.settled] == [False, True]

    @pytest.mark.parametrize("error", [Unavailable("connection", "lost"), StoreError("OOM", "full")])
    async def test_what_the_ledger_cannot_take_is_kept_on_disk(self, error):
        books = Books(error)
        await settle(books)
        assert books.settled == books.journaled

    async def test_what_was_never_sent_needs_no_hold_later(self):
        """A failover that ends the outage may have lost the hold; the marker counts the settlement once."""
        books = Books(Unavailable("connection", "not connected", is_sent=False))
        await settle(books)
        assert [settlement.unheld for settlement in books.journaled] == [True]

    async def test_what_is_without_an_answer_at_the_end_is_kept_on_disk(self):
        books = Books(None)
        made, tasks = exchange(plan(BODY)), Tasks()
        made.lease = lease(Renewals())
        Settler(books, books, None, tasks, lambda: 1000.0, lambda: 2.5).settle(made)
        assert await tasks.finish(0) == 1
        await tasks.finish(1)
        assert books.settled == books.journaled
