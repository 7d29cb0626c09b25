"""Admit: one round trip that takes a request's place in the buckets and holds its credit, or says why not."""

import math

from meshproxy.config import Credits, Defaults
from meshproxy.errors import Problem, insufficient_credits, rate_limit_exceeded, spend_limit_exceeded
from meshproxy.gateway.call import Headers
from meshproxy.gateway.resolve import Plan
from meshproxy.ledger.records import Admitted, Ask, BucketState, Denied, Kind
from meshproxy.money import format_usd
from meshproxy.policy.principal import Limits, Principal
from meshproxy.wire.headers import ratelimit_headers

# Of what an account has, for a hold that doesn't fit and may be smaller: the next requests find something too.
SHORT_SHARE_PERCENT = 50


def first_slice(plan: Plan, credit: Credits) -> int:
    """Tokens of output that the hold covers at first: a stream's slice, or all that may come where that can't be counted on the
    way. Where credit isn't strict, what is expected is enough.
    """
    if plan.holds_whole:
        return plan.output_bound if credit.strict else plan.output_tokens
    return min(credit.lease_output_tokens * plan.request.n, plan.output_tokens)


def clamps(principal: Principal, credit: Credits) -> bool:
    """Whether a request that the account can't pay in full is cut short instead of refused."""
    return credit.clamp if principal.key.clamp is None else principal.key.clamp


def affordable(plan: Plan, admitted: Admitted, *, clamp: bool) -> Plan:
    """The plan within what was held, or where `clamp` is on what is there at all for a stream, which holds it bit by bit.

    An output that nothing bounds but the model gets a cap where the account has no more than twice what was held, so that a
    `max_output_tokens` that is too low overdraws no account that is nearly empty.
    """
    if not plan.holds_whole:
        return plan.clamped_to(admitted.amount_nusd + max(admitted.available_nusd, 0)) if clamp else plan
    held = plan.clamped_to(admitted.amount_nusd)
    is_bounded = held.clamped or plan.request.max_tokens is not None
    return held if is_bounded or admitted.available_nusd >= admitted.amount_nusd else held.capped_at(held.output_limit)


def _least(plan: Plan, credit: Credits, *, clamp: bool) -> int | None:
    """Tokens of output that have to be covered for the request to be admitted with a cap; None: all or nothing.

    A client's own cap isn't lowered unasked, but for what it has above the model's `max_output_tokens`.
    """
    if clamp:
        return plan.request.n
    if not (plan.holds_whole and credit.strict):
        return None
    if plan.request.max_tokens is None:
        return min(credit.lease_output_tokens * plan.request.n, plan.output_bound)
    return plan.output_tokens if plan.output_tokens < plan.output_bound else None


def ask_for(
    plan: Plan,
    covered: int,
    principal: Principal,
    hold_id: str,
    credit: Credits,
    defaults: Defaults,
    *,
    enforce_mid_stream: bool,
) -> Ask:
    """What the ledger is asked: to hold the prompt and the `covered` first tokens of output. Tokens are reserved by estimate: the
    prompt and all the output that may come, or where token buckets are enforced in the stream (`enforce_mid_stream`) what is
    covered.
    """
    key = principal.key
    clamp = clamps(principal, credit)
    least = _least(plan, credit, clamp=clamp)
    return Ask(
        hold_id=hold_id,
        account=principal.account.name,
        key_id=key.id,
        session=plan.request.session_id,
        amount_nusd=plan.hold_nusd(covered),
        amount_min_nusd=None if least is None else plan.hold_nusd(least),
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
    """The key's own limits, and the configuration's where it has none."""
    own = principal.key.limits
    requests, tokens = own.requests_per_minute, own.tokens_per_minute
    return Limits(
        defaults.requests_per_minute if requests is None else requests,
        defaults.tokens_per_minute if tokens is None else tokens,
        own.burst,
        own.requests_per_day,
        own.max_parallel,
    )


def refused(denied: Denied) -> Problem:
    """What the client is told of a denial."""
    if denied.reason == "rate_limit":
        wait = denied.retry_after_s
        if wait is None:
            return rate_limit_exceeded(f"Rate limit reached: no {denied.which} are allowed.", math.inf)
        limit = (
            denied.which if denied.which.endswith((" per day", " parallel requests")) else f"{denied.which} per minute"
        )
        return rate_limit_exceeded(f"Rate limit reached: {limit}. Try again in {wait:.3f} s.", wait)
    needed = format_usd(denied.needed_nusd)
    if denied.reason == "spend_limit":
        budget, spent = format_usd(denied.budget_nusd), format_usd(denied.spent_nusd)
        return spend_limit_exceeded(
            f"The {denied.which} of {budget} USD leaves too little: {spent} USD spent or held, {needed} USD needed."
        )
    available = format_usd(max(denied.available_nusd, 0))
    return insufficient_credits(
        f"The account has {available} USD available, less than this request may cost: {needed} USD needed."
    )


def limit_headers(buckets: tuple[BucketState, ...]) -> Headers:
    """x-ratelimit-* of the tightest bucket of each kind, requests before tokens."""
    tightest: dict[Kind, BucketState] = {}
    for bucket in buckets:
        other = tightest.get(bucket.kind)
        if other is None or bucket.remaining < other.remaining:
            tightest[bucket.kind] = bucket
    headers: Headers = []
    for kind, bucket in tightest.items():
        headers += ratelimit_headers(kind, bucket.limit, bucket.remaining, bucket.reset_s)
    return headers
