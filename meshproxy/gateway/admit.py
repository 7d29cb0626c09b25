"""Admit: take a request's place in the rate-limit buckets and hold its credit, in one round trip, or return a `Denial`.

A request that is admitted has a `Lease`: the hold and the output tokens that it covers. A stream's lease is renewed
slice by slice in the background; a renewal is retried at most `MAX_RENEW_RETRIES` times.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from msgspec.structs import replace

from meshproxy.config import Credits, Defaults
from meshproxy.errors import ErrorResponse, ledger_unavailable
from meshproxy.gateway.exchange import ActiveConfig, Exchange, Headers
from meshproxy.gateway.resolve import Plan
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.local import LocalAdmission
from meshproxy.ledger.records import NO_LIMITS, BucketState, Denial, Hold, HoldRequest, Kind
from meshproxy.ledger.store import StoreError, Unavailable
from meshproxy.openai.headers import format_reset
from meshproxy.policy.principal import Limits, Principal
from meshproxy.telemetry.tasks import Tasks

# The share of the available credit that a hold takes if its full amount doesn't fit, so that later requests find some.
SHORT_SHARE_PERCENT = 50


def first_slice(plan: Plan, credit: Credits) -> int:
    """Return the output tokens that the hold covers at first.

    A stream begins with one slice. An output that can't be counted while it streams (`holds_whole`) is covered whole;
    without strict credit, as far as it is expected.
    """
    if plan.holds_whole:
        return plan.output_bound if credit.strict else plan.output_tokens
    return min(credit.lease_output_tokens * plan.request.n, plan.output_tokens)


def may_clamp(principal: Principal, credit: Credits) -> bool:
    """Return whether a request that the account can't pay in full is cut short instead of refused."""
    return credit.clamp if principal.key.clamp is None else principal.key.clamp


def affordable(plan: Plan, hold: Hold, *, clamp: bool) -> Plan:
    """Return the plan capped at what was held; with `clamp`, a stream's plan capped at the credit available.

    An output that only the model bounds gets a cap where less than the held amount is still available. Otherwise a
    configured `max_output_tokens` that is too low could overdraw an account that is nearly empty.
    """
    if not plan.holds_whole:
        return plan.clamped_to(hold.amount_nusd + max(hold.available_nusd, 0)) if clamp else plan
    held = plan.clamped_to(hold.amount_nusd)
    is_bounded = held.clamped or plan.request.max_tokens is not None
    return held if is_bounded or hold.available_nusd >= hold.amount_nusd else held.capped_at(held.output_limit)


def _minimum_output(plan: Plan, credit: Credits, *, clamp: bool) -> int | None:
    """Return the least output tokens to cover for the request to be admitted with a cap; None: all or nothing.

    A client's own cap is lowered only by `clamp`, or to the model's `max_output_tokens` where it is above that.
    """
    if clamp:
        return plan.request.n
    if not (plan.holds_whole and credit.strict):
        return None
    if plan.request.max_tokens is None:
        return min(credit.lease_output_tokens * plan.request.n, plan.output_bound)
    return plan.output_tokens if plan.output_cap < plan.output_limit else None


def make_hold_request(
    plan: Plan,
    covered: int,
    principal: Principal,
    hold_id: str,
    credit: Credits,
    defaults: Defaults,
    *,
    enforce_mid_stream: bool,
) -> HoldRequest:
    """Build the hold request: the cost of the prompt and of the first `covered` tokens of output.

    Tokens are reserved by estimate: the prompt and all output that may come. Where token buckets are enforced
    mid-stream (`enforce_mid_stream`), only the `covered` output is reserved.
    """
    key = principal.key
    clamp = may_clamp(principal, credit)
    minimum_output = _minimum_output(plan, credit, clamp=clamp)
    return HoldRequest(
        hold_id=hold_id,
        account=principal.account.name,
        key_id=key.id,
        session=plan.request.session_id,
        amount_nusd=plan.hold_nusd(covered),
        amount_min_nusd=None if minimum_output is None else plan.hold_nusd(minimum_output),
        share_percent=SHORT_SHARE_PERCENT if plan.holds_whole and not (clamp and plan.request.max_tokens) else 100,
        tokens=plan.prompt_tokens + (covered if enforce_mid_stream else plan.output_tokens),
        ttl_ms=int(credit.hold_ttl_s * 1000),
        strict=credit.strict,
        key_limits=limits_of(principal, defaults),
        account_limits=principal.account.limits,
        budgets=key.budgets,
        session_budgets=key.session,
        account_budgets=principal.account.budgets,
    )


def limits_of(principal: Principal, defaults: Defaults) -> Limits:
    """Return the key's own limits, with the configuration's defaults where it has none."""
    own = principal.key.limits
    requests, tokens = own.requests_per_minute, own.tokens_per_minute
    return Limits(
        defaults.requests_per_minute if requests is None else requests,
        defaults.tokens_per_minute if tokens is None else tokens,
        own.burst,
        own.requests_per_day,
        own.max_parallel,
    )


def limit_headers(buckets: tuple[BucketState, ...]) -> Headers:
    """Return `x-ratelimit-*` for the tightest bucket of each kind, requests before tokens."""
    tightest: dict[Kind, BucketState] = {}
    for bucket in buckets:
        other = tightest.get(bucket.kind)
        if other is None or bucket.remaining < other.remaining:
            tightest[bucket.kind] = bucket
    headers: Headers = []
    for kind, bucket in tightest.items():
        headers += (
            (f"x-ratelimit-limit-{kind}", str(bucket.limit)),
            (f"x-ratelimit-remaining-{kind}", str(bucket.remaining) if bucket.remaining > 0 else "0"),  # or in debt
            (f"x-ratelimit-reset-{kind}", format_reset(bucket.reset_s)),
        )
    return headers


RENEW_RETRY_S = 0.25
MAX_RENEW_RETRIES = 40  # ten seconds; after that a stream that has neither credit nor a ledger ends


class Renewer:
    """Renews the holds of leases.

    `local` is None where a lost Redis denies (`redis.on_failure`). `enforce_tokens`: an empty token bucket ends a
    stream too.
    """

    __slots__ = ("_enforce_tokens", "_ledger", "_local", "_tasks")

    def __init__(self, ledger: Ledger, local: LocalAdmission | None, tasks: Tasks, *, enforce_tokens: bool) -> None:
        self._ledger = ledger
        self._local = local
        self._tasks = tasks
        self._enforce_tokens = enforce_tokens

    def spawn(self, renewal: Coroutine[Any, Any, None]) -> None:
        """Run a renewal in the background."""
        self._tasks.spawn("renew", renewal)

    def renew(self, hold: Hold, amount_nusd: int, tokens: int) -> Awaitable[Hold | Denial]:
        """Raise a hold to a new total and set its deadline. Raises Unavailable and StoreError."""
        return self._ledger.renew(hold, amount_nusd=amount_nusd, tokens=tokens, enforce_tokens=self._enforce_tokens)

    def admit_anew(self, request: HoldRequest, amount_nusd: int, tokens: int) -> Awaitable[Hold | Denial]:
        """Admit a hold in place of one that the ledger has lost. Raises Unavailable and StoreError.

        Credit and budgets must cover the full amount. Rate limits are left out: the request has already counted against
        them.
        """
        anew = replace(
            request,
            amount_nusd=amount_nusd,
            amount_min_nusd=None,
            tokens=tokens,
            key_limits=NO_LIMITS,
            account_limits=NO_LIMITS,
        )
        return self._ledger.admit(anew)

    def hold_locally(self, request: HoldRequest, more_nusd: int) -> bool:
        """Hold more of the local allowance; return False if there is none or too little is left."""
        return self._local is not None and self._local.hold_more(request, more_nusd)


class Lease:
    """One hold, the output tokens it covers, and the plan that was admitted with it.

    `is_local`: admitted without Redis. `unheld`: the settlement can't rely on a hold, because it was local, or because
    the ledger has lost it (lost data, or this worker was stuck past the deadline) and denied a new one. `watermark`:
    the output tokens above which the relay has to call `record_output`.
    """

    __slots__ = (
        "_cap",
        "_on_change",
        "_over",
        "_renewer",
        "_renewing",
        "_slice",
        "_used",
        "covered",
        "hold",
        "is_local",
        "plan",
        "unheld",
        "watermark",
    )

    def __init__(
        self, hold: Hold, plan: Plan, covered: int, slice_tokens: int, renewer: Renewer, *, is_local: bool
    ) -> None:
        self.hold = hold
        self.plan = plan
        self.covered = covered
        self.is_local = is_local
        self.unheld = is_local
        self._cap = plan.output_bound
        self._slice = slice_tokens
        self._renewer = renewer
        self._used = 0
        self._renewing = False
        self._over = False
        self._on_change: Callable[[Denial | ErrorResponse | None], None] = _do_nothing
        self.watermark = self._renew_at()

    def watch(self, on_change: Callable[[Denial | ErrorResponse | None], None]) -> None:
        """Set the callback of renewals: it is given None when one succeeds, or what refused it."""
        self._on_change = on_change

    @property
    def bound(self) -> int:
        """The most output tokens that the client gets, and pays for, before a renewal: one slice more than is covered."""
        return self.covered + self._slice

    @property
    def exhausted(self) -> bool:
        """Whether more output was seen than the hold covers."""
        return self._used > self.covered < self._cap

    def record_output(self, tokens: int) -> bool:
        """Record the output tokens seen so far and renew in time. Return whether they exceed what the hold covers."""
        self._used = tokens
        if tokens > self.watermark and not self._renewing and self.covered < self._cap:
            self._renewing = True
            self.watermark = self.covered
            self._renewer.spawn(self._extend())
        return self.exhausted

    def _renew_at(self) -> int:
        """Return the output tokens at which to renew: half a slice before the covered end, or never if all is covered."""
        return self.covered - self._slice // 2 if self.covered < self._cap else self._cap

    async def renew_deadline(self) -> None:
        """Extend the hold's deadline, so that it outlives a slow request."""
        if not self.is_local:
            denied = await self._renew(self.hold.amount_nusd, self.covered)
            if denied is not None:
                self._on_change(denied)

    def end(self) -> None:
        """End the lease: the request is over, so renew nothing more."""
        self._over = True
        self._on_change = _do_nothing

    async def _extend(self) -> None:
        """Hold another slice and notify the stream of the result, even after an exception: it may be waiting."""
        refusal: Denial | ErrorResponse | None = ledger_unavailable()
        try:
            refusal = await self._renew_slice()
        finally:
            self._renewing = False
            if refusal is None and not self._over:
                self.record_output(self._used)  # more output may have come in the meantime than the new slice covers
            self._on_change(refusal)

    async def _renew_slice(self) -> Denial | ErrorResponse | None:
        """Renew until the ledger answers, at most `MAX_RENEW_RETRIES` times. Return None on success, else the refusal."""
        refusal: Denial | ErrorResponse | None
        for _ in range(MAX_RENEW_RETRIES):
            covered = min(self._used + self._slice, self._cap)
            try:
                refusal = await self._renew(self.plan.hold_nusd(covered), covered)
                break
            except (Unavailable, StoreError):
                refusal = None if self._over else self._extend_locally(covered)
                if refusal is None:
                    break
                await asyncio.sleep(RENEW_RETRY_S)
        if refusal is None:
            self.covered = covered
            self.watermark = self._renew_at()
        return refusal

    def _extend_locally(self, covered: int) -> ErrorResponse | None:
        """Take another slice's cost from the local allowance; return an error response if too little is left."""
        more_nusd = self.plan.hold_nusd(covered) - self.plan.hold_nusd(self.covered)
        return None if self._renewer.hold_locally(self.hold.request, more_nusd) else ledger_unavailable()

    async def _renew(self, amount_nusd: int, covered: int) -> Denial | None:
        """Renew the hold, or admit a new one where the ledger has lost it. Return None on success.

        An output that is held whole takes no more tokens from the buckets than its admission estimated.
        """
        tokens = self.hold.request.tokens if self.plan.holds_whole else self.plan.prompt_tokens + covered
        answer = await self._renewer.renew(self.hold, amount_nusd, tokens)
        if isinstance(answer, Denial) and answer.which == "hold":
            self.unheld = True
            if self._over:
                return None
            answer = await self._renewer.admit_anew(self.hold.request, amount_nusd, tokens)
        if isinstance(answer, Denial):
            return answer
        self.hold = replace(answer, request=self.hold.request, buckets=self.hold.buckets)
        self.unheld = False
        return None


def _do_nothing(_refusal: Denial | ErrorResponse | None) -> None:
    """Do nothing: the callback of a lease that no stream watches."""


class Admitter:
    """Admits the requests of one worker. `local` is None where a lost Redis denies."""

    def __init__(self, ledger: Ledger, local: LocalAdmission | None, tasks: Tasks) -> None:
        self._ledger = ledger
        self._local = local
        self._renewers = {enforce: Renewer(ledger, local, tasks, enforce_tokens=enforce) for enforce in (False, True)}

    async def admit(self, exchange: Exchange, plan: Plan, principal: Principal, active: ActiveConfig) -> Lease | Denial:
        """Return a lease on what the plan may cost, or the denial.

        Raises Unavailable if neither ledger nor `local` can admit.
        """
        settings = active.settings
        credit = settings.credits
        enforce = settings.limits.enforce_mid_stream and plan.request.stream
        covered = first_slice(plan, credit)
        request = make_hold_request(
            plan, covered, principal, exchange.hold_id, credit, settings.defaults, enforce_mid_stream=enforce
        )
        is_local = False
        try:
            answer = await self._ledger.admit(request)
        except Unavailable:
            if self._local is None or not self._local.has_room(request):
                raise
            answer, is_local = self._local.admit(request), True
        except BaseException:  # the ledger may still admit: release that hold at the request's end
            exchange.unanswered = request
            raise
        if isinstance(answer, Denial):
            return answer
        if self._local is not None and not is_local:
            self._local.drop_buckets()
        if request.amount_min_nusd is not None:
            plan = affordable(plan, answer, clamp=may_clamp(principal, credit))
            covered = first_slice(plan, credit)
        slice_tokens = credit.lease_output_tokens * plan.request.n
        return Lease(answer, plan, covered, slice_tokens, self._renewers[enforce], is_local=is_local)
