"""Settle: compute what a request used and cost, and charge it once when it is over, however it ended.

A charge that the ledger doesn't take is kept in the journal on disk until the ledger is back.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any

import msgspec
from msgspec.structs import replace

from meshproxy.gateway.exchange import Exchange
from meshproxy.ledger.journal import Journal
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.local import LocalAdmission
from meshproxy.ledger.records import HoldRequest, Settlement
from meshproxy.ledger.store import StoreError, Unavailable
from meshproxy.openai.usage import Report, Usage
from meshproxy.policy.catalog import Candidate, may_have_served
from meshproxy.policy.pricing import Price, billed_price, cost
from meshproxy.telemetry.tasks import Tasks

MAX_KNOWN_PRICES = 1024  # whose JSON is cached


def bill(
    exchange: Exchange,
    report: Report | None,
    served_model: str | None,
    estimate_output: Callable[[], int],
    most_output: int | None = None,
    *,
    audio_output: Callable[[], int] | None = None,
    outdated: bool = False,
    served_tier: str | None = None,
) -> None:
    """Record usage, its source and the cost on the exchange. May be called again as more output arrives.

    The provider's numbers are used where they are plausible; missing ones are estimated from the prompt and the output
    seen. If nothing was reported and nothing seen, nothing is charged. Output tokens past `most_output` aren't charged.
    `outdated`: text came after the report, so its output is a lower bound. `audio_output` estimates how much of the
    output was audio, which has its own price. `served_tier`: the service tier that the answer names outside its report.
    """
    plan, candidate = exchange.plan, exchange.attempted or exchange.candidate
    if plan is None or candidate is None:
        return
    exchange.attempted = candidate
    candidates = may_have_served(candidate, served_model) if candidate.natives else (candidate,)
    usage = Usage()
    if report is not None:
        window = candidate.context_window
        if candidate.natives:
            window = max(candidate.context_window for candidate in candidates)
        usage, exchange.refused_numbers = report.settled(window, plan.request.n)
        exchange.usage_source = "reported"
    reported_usd = report.cost_usd if report is not None else None
    if usage.completion == 0 or outdated:
        seen = min(estimate_output(), plan.output_bound)
        if seen > usage.completion:
            audio = min(audio_output(), seen) if audio_output is not None else 0
            usage = replace(usage, completion=seen, audio_completion=max(usage.audio_completion, audio))
            exchange.usage_source = "estimated"
        elif exchange.refused_numbers and not usage.completion:  # no text in the place of what can't be true
            exchange.usage_source = "estimated"
    if usage.prompt == 0 and (usage.completion or exchange.refused_numbers):
        usage = replace(usage, prompt=plan.likely_prompt_tokens())
        exchange.usage_source = "estimated"
    if most_output is not None and usage.completion > most_output:
        audio = min(usage.audio_completion, most_output)
        usage = replace(usage, completion=most_output, audio_completion=audio)
        exchange.usage_source = "estimated"
        reported_usd = None
    exchange.usage = usage
    exchange.served_tier = (report.service_tier if report is not None else None) or served_tier
    _charge(exchange, candidates, None if outdated else reported_usd)
    exchange.unlisted_model = served_model if len(candidates) > 1 else None


def bill_prompt(exchange: Exchange) -> None:
    """Record the prompt's cost for a request whose client hung up before anything was known.

    Its provider has the prompt and may have worked on it, so it bills at least that.
    """
    plan, candidate = exchange.plan, exchange.candidate
    if plan is None or candidate is None:
        return
    exchange.usage, exchange.usage_source = Usage(plan.likely_prompt_tokens()), "estimated"
    _charge(exchange, (candidate,), None)


def _charge(exchange: Exchange, candidates: Sequence[Candidate], reported_usd: Decimal | None) -> None:
    """Record the cost of the usage at the dearest of the models that may have served.

    The price is that of the service tier that the provider names, else of the requested tier.
    """
    requested_tier = exchange.plan.request.service_tier if exchange.plan is not None else None
    dearest = -1
    for candidate in candidates:
        price = candidate.price_in(exchange.served_tier, requested_tier) if candidate.services else candidate.price
        cost_nusd = cost(price, exchange.usage, reported_usd)
        if cost_nusd > dearest:
            dearest = exchange.cost_nusd = cost_nusd
            exchange.candidate, exchange.model = candidate, candidate.model
            exchange.price = billed_price(price, exchange.usage, reported_usd)


@lru_cache(MAX_KNOWN_PRICES)
def _price_json(price: Price) -> str:
    return msgspec.json.encode(price).decode()


class Settler:
    """Sends settlements in the background: a request's end can't cancel one, and shutdown waits for them.

    `wall_clock` is Unix time, `clock` monotonic time, in seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        journal: Journal,
        local: LocalAdmission | None,
        tasks: Tasks,
        wall_clock: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._journal = journal
        self._local = local
        self._tasks = tasks
        self._wall_clock = wall_clock
        self._clock = clock
        self.pending = 0  # settlements that are sent and not answered

    def settle(self, exchange: Exchange) -> None:
        """Settle the exchange's hold, if it has one or may get one. Returns at once."""
        if exchange.lease is not None:
            request = exchange.lease.hold.request
            settlement = self._settlement(exchange, request, unheld=exchange.lease.unheld)
            if self._local is not None:
                self._local.settled_here(settlement, 0 if exchange.lease.is_local else exchange.lease.hold.amount_nusd)
            self.pending += 1
            answer = self._ledger.send_settlement(settlement)
            self._tasks.running.add(answer)
            answer.add_done_callback(partial(self._answered, settlement))
        elif exchange.unanswered is not None:
            settlement = self._settlement(exchange, exchange.unanswered, unheld=False)
            self._tasks.spawn("settle", self._release(settlement))

    async def _release(self, settlement: Settlement) -> None:
        """Release the hold of a request that ended before the ledger admitted it.

        Commands keep their order, so the hold exists by then. If the command can't be sent, the hold's deadline
        releases it.
        """
        with contextlib.suppress(Unavailable):
            await self._ledger.settle(settlement)

    def _answered(self, settlement: Settlement, answer: asyncio.Future[Any]) -> None:
        """Handle the ledger's answer: charged in nearly every case, else retry in the background."""
        self._tasks.running.discard(answer)
        failed = answer.cancelled() or answer.exception() is not None
        if failed or not (answer.result() or settlement.unheld):
            self._tasks.spawn("settle", self._charge_or_journal(settlement, answer))
            return
        self.pending -= 1
        if self._local is not None:
            self._local.charged(settlement.hold_id)

    async def charge(self, settlement: Settlement) -> bool:
        """Settle an entry of the journal; return whether it was charged. Raises Unavailable and StoreError."""
        settled = await self._ledger.settle(settlement)
        if self._local is not None:
            self._local.charged(settlement.hold_id)
        return settled

    async def _charge_or_journal(self, settlement: Settlement, answer: asyncio.Future[Any]) -> None:
        """Charge again, or write to the journal until the ledger is back. A repeated settlement counts once."""
        try:
            if not (await answer or settlement.unheld):  # not charged before: the ledger has lost the hold
                settlement = replace(settlement, unheld=True)
                await self.charge(settlement)
        except (Unavailable, StoreError) as error:  # Redis is lost or misconfigured: the charge must survive both
            if isinstance(error, Unavailable) and not error.is_sent:
                settlement = replace(settlement, unheld=True)  # a failover may lose its hold; its marker counts it once
            await self._journal.append(settlement)
        except asyncio.CancelledError:
            await self._journal.append(settlement)
            raise
        finally:
            self.pending -= 1

    def _settlement(self, exchange: Exchange, request: HoldRequest, *, unheld: bool) -> Settlement:
        """Build the settlement of an exchange."""
        candidate = exchange.candidate
        price = exchange.price or (candidate.price if candidate is not None else None)
        age_s = self._clock() - exchange.call.received_at
        recording = exchange.recording
        kept_ms = recording.ttl_ms if recording is not None and exchange.complete else -1
        return Settlement(
            hold_id=request.hold_id,
            request_id=exchange.call.request_id,
            account=request.account,
            key_id=request.key_id,
            session=request.session,
            model=exchange.model,
            upstream=candidate.upstream if candidate is not None else "",
            usage=exchange.usage,
            usage_source=exchange.usage_source,
            outcome=exchange.outcome,
            cost_nusd=exchange.cost_nusd,
            started_ms=int((self._wall_clock() - age_s) * 1000),
            price=_price_json(price) if price is not None else "{}",
            unheld=unheld,
            attempts=exchange.attempts,
            code=exchange.code,
            upstream_status=exchange.upstream_status,
            replay=recording.record if recording is not None else None,
            replay_ttl_ms=kept_ms if recording is not None else 0,
            budgets=request.budgets,
            account_budgets=request.account_budgets,
        )
