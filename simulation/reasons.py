"""Whether refusals and failures have a true reason and a true wait, and whether limits hold."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from simulation.accounts import DAY_S, Bucket
from simulation.bills import (
    TIMER_S,
    TOOL_NAME_TOKENS,
    died_unsettled,
    estimates,
    least_held,
    most_held_for,
    nusd,
    over_at,
    silence,
)
from simulation.breakers import ASKED_S, is_failing, may_all_be_open
from simulation.client import Sight
from simulation.history import (
    ALLOWANCE_NUSD,
    DEFAULT_OUTPUT_TOKENS,
    HEARTBEAT_S,
    HOLD_TTL_S,
    LEASE_TOKENS,
    MAX_OUTPUT_TOKENS,
    STANDARD_TIERS,
    STORE_TIMEOUT_S,
    TEMPLATE,
)
from simulation.invalid import INVALID
from simulation.provider import Call
from simulation.record import (
    HOP_S,
    LATENCY_S,
    PERIODS,
    PROPAGATION_S,
    RECOVERY_S,
    STORE,
    Sample,
    View,
    cut_short,
    date_of,
)

FOUND_S: Final = 2.0 + 5 * HOP_S  # in which a store that is back is found: the pause of 2 s, and the way there
BUCKET_S: Final = 60.0  # after which a bucket is full again
LATE_S: Final = 4 * HOP_S  # that a deadline may be passed: a connection is made, and the answer is under way
SETTLE_S: Final = 0.3  # within which a request that is over is settled, if nothing fails
DETACHED_S: Final = 120.0  # that a request with an Idempotency-Key may run on without its client
RENEWED_S: Final = 10.0  # that a stream waits for the store's credit before it ends (docs/ledger.md)
KNOWN_S: Final = 3_600.0  # for which a worker knows a key without the store (docs/ledger.md)
FRAME_BYTES: Final = 8  # of an event beside its data
KEPT_BYTES: Final = 1_048_576  # of an answer for repeats, by default (docs/configuration.md)
HEAD_BYTES: Final = 1_000  # that an answer's headers and what the gateway adds to it have at most
WORKER_CHARACTERS: Final = 12  # that the ids of a worker's holds begin with
TEMPLATE_TOKENS: Final = 60  # that a template adds to a prompt at most
REFUSALS: Final = frozenset({"request", "model"})  # what a provider may refuse, and not the gateway
REFUSED: Final = frozenset(
    {400, 401, 402, 403, 404, 405, 409, 413, 415, 422, 429}
)  # by the gateway, before it takes anything
FIRST: Final = frozenset({401, 403, 503})  # what refuses a request before anything is known of it
NOT_ALLOWED, UNPROCESSABLE = 405, 422
USD: Final = r"(-?[0-9]+\.[0-9]+)"
BUDGET: Final = re.compile(
    rf"The (key|session|account) (total|daily|monthly) budget of {USD} USD leaves too little:"
    rf" {USD} USD spent or held, {USD} USD needed"
)


def statuses_have_reasons(view: View) -> Iterator[str]:
    """Every refusal and every failure has a reason among what happened."""
    for sight in view.record.sights:
        code = sight.error.get("code")
        status = sight.status if sight.status != 200 else _status_of(code)
        if sight.ended != "whole" or status in {0, 200}:
            continue
        if not any(reason(view, sight) for reason in (_invalid, *REASONS.get(status, ()))):
            yield f"{sight.request_id}: {sight.status} {code} without a reason: {str(sight.error.get('message'))[:90]}"


def _status_of(code: object) -> int:
    """Return the status that belongs to the code of an error event; 0 if there is none."""
    if code is None:
        return 0
    codes = {
        "insufficient_credits": 402,
        "spend_limit_exceeded": 402,
        "rate_limit_exceeded": 429,
        "gateway_timeout": 504,
        "idempotency_conflict": 409,
        "ledger_unavailable": 503,
        "overloaded": 503,
        "provider_not_available": 503,
        "upstream_error": 502,
        "internal_error": 500,
    }
    return codes.get(str(code), 400)


def _invalid(view: View, sight: Sight) -> bool:
    """Whether it is what an invalid request gets."""
    del view
    wrong = INVALID.get(sight.request.invalid)
    return wrong is not None and (sight.status, sight.error.get("code")) == (wrong.status, wrong.code)


def invalid_requests_are_refused(view: View) -> Iterator[str]:
    """Check that an invalid request is refused for what is wrong with it, costs nothing, and leaves its connection open.

    What refuses a request whatever it asks for may come first: a key that was suspended, a store that is lost, a drain.
    """
    for sight in view.record.sights:
        wrong = INVALID.get(sight.request.invalid)
        if wrong is None:
            continue
        if view.calls.get(sight.marker) or sight.request_id in view.settled:
            yield f"{sight.request_id} has {sight.request.invalid}, and was let through"
        if sight.ended != "whole" or (sight.status in FIRST and sight.status != wrong.status):
            continue
        error, right = sight.error, {"status": wrong.status, "code": wrong.code, "param": wrong.param}
        found = {"status": sight.status, "code": error.get("code"), "param": error.get("param")}
        if found != right:
            yield f"{sight.request_id} has {sight.request.invalid}, and got {found}; {right} would be right"
        if (wrong.status == UNPROCESSABLE) is not bool(error.get("details")):
            yield f"{sight.request_id} has {sight.request.invalid}, and the details are {error.get('details')}"
        if wrong.status == NOT_ALLOWED and sight.headers.get("allow") != "POST":
            yield f"{sight.request_id}: {sight.headers.get('allow')} is allowed"
        if sight.headers.get("connection") == "close" and not view.feels(sight, "drained"):
            yield f"{sight.request_id} has {sight.request.invalid}, and its connection is closed"


def _revoked(view: View, sight: Sight) -> bool:
    """Whether its key was revoked, or had expired: that needs no word from the store."""
    return any(
        done.what in {"revoke", "expire"} and done.key == sight.request.key and done.began_at <= sight.ended_at
        for done in view.record.changes
    )


def _suspended(view: View, sight: Sight) -> bool:
    return any(
        done.began_at <= sight.ended_at and done.concerns(sight.request.key, view.key(sight))
        for done in view.record.changes
        if done.what in {"suspend", "suspend_account"}
    )


def may_not_use(view: View, sight: Sight) -> bool:
    """Whether a request names a model that its key may not use, as a fallback too."""
    models, request = view.history.keys[sight.request.key].models, sight.request
    return bool(models) and not {request.model, *request.fallbacks} <= set(models)


def _refused_by_provider(view: View, sight: Sight) -> bool:
    said = {call.answer.status for call in view.calls_for(sight) if call.answer.refuses in REFUSALS}
    return bool(said) if sight.status == 200 else sight.status in said  # an event has no status


def _out_of_credit(view: View, sight: Sight) -> bool:
    """Whether the account's credit, or a budget, was as short as the refusal says."""
    message = str(sight.error.get("message"))
    if sight.error.get("code") == "spend_limit_exceeded":
        return not _is_surely_short(view, sight) and _over_budget(view, sight, message)
    told = re.search(rf"has {USD} USD available.*?: {USD} USD needed", message)
    is_prompt = sight.request.reads not in {"slowly", "stalls"} and not view.feels(sight, *STORE)
    since = sight.ended_at - LATENCY_S if sight.is_stream and is_prompt else -math.inf
    samples = credit_samples(view, sight, since)
    left = [sample.balance - sample.held for sample in samples]
    if sight.is_stream:
        return not left or min(left) < _most_renewed(view, sight)
    if told is None:
        return False
    available, needed = nusd(told[1]), nusd(told[2])
    if needed > most_held(view, sight):
        return False
    if most_workers(view, sight) and _allowed_at_least(view, sight) <= available < needed:
        return True
    return any(each == available < needed for each in left) if left else available < needed


def most_workers(view: View, sight: Sight) -> int:
    """Return among how many workers an account's limits and allowance may be shared that a request got without the store.

    One that has ended is counted for a while. 0: the store admits it, or nothing does.
    """
    if not view.history.local or not view.feels(sight, *STORE):
        return 0
    ends = [
        each for each in view.record.troubles if each.what in {"killed", "drained"} and each.start <= sight.ended_at
    ]
    return view.history.workers + len(ends)


def known_workers(view: View, worker: str, at: float) -> int:
    """Return the fewest workers that one may have known at a time, by its reports: the last reply may be unread."""
    lost = {trouble.start for trouble in view.record.troubles if trouble.what == "lost_reply"}
    beats = [beat for beat in view.record.beats if beat.worker == worker and beat.at <= at]
    told = [beat.told for beat in beats if beat.at not in lost]
    return min(max(told[-2:], default=1), max(told[-3:-1], default=max(told, default=1)))


def may_lose_hold(view: View, sight: Sight) -> bool:
    """Whether a failover may have lost the hold by which the store admitted a request."""
    admitted_by = min([sight.ended_at, *(call.at for call in view.own_calls(sight))])
    return any(trouble.loses(sight.began_at, admitted_by) for trouble in view.record.troubles)


def _allowed_at_least(view: View, sight: Sight) -> int:
    """Return the least that is left of a worker's share of the allowance, when a request came."""
    has_successor = any(each.what in {"killed", "drained"} for each in view.record.troubles)
    others = [
        view.owed(other)  # which may be above its hold, of a provider that ignores its cap
        if view.settled.get(other.request_id) and over_at(view, other) + LATENCY_S < sight.began_at
        else max(most_held(view, other, most_made(view, other)), view.owed(other))
        for other in view.record.sights
        if other is not sight and view.key(other) == view.key(sight) and other.began_at <= sight.ended_at
        if has_successor or view.worker(other) == view.worker(sight)
        if _may_be_owed(view, other, sight.began_at)
    ]
    return ALLOWANCE_NUSD // most_workers(view, sight) - sum(others)


def _may_be_owed(view: View, sight: Sight, at: float) -> bool:
    """Whether a request may count against the allowance at a time: it does until the store has charged it.

    The worker may not know that if the reply was lost, or either ended in that moment.
    """
    events = view.settled.get(sight.request_id)
    if view.clock_jumps or not events:
        return True
    charged_at = max(int(event["settled_ms"]) for event in events) / 1000 - view.record.store_offset_s
    return charged_at + LATENCY_S >= at or any(
        trouble.start <= charged_at + LATENCY_S
        and charged_at <= (trouble.end if trouble.what in {"lost_reply", "slow"} else trouble.start + LATENCY_S)
        for trouble in view.record.troubles
    )


def _is_surely_short(view: View, sight: Sight) -> bool:
    """Whether the store's credit was too short for a request all the time: then no budget and no limit refuses it.

    Credit is checked first (docs/errors.md). A stream that runs is refused its next slice, of another amount.
    """
    samples = credit_samples(view, sight)
    if sight.status == 200 or most_workers(view, sight) or not samples:
        return False
    return max(sample.balance - sample.held for sample in samples) < least_needed(view, sight)


def least_needed(view: View, sight: Sight) -> int:
    """Return the least credit that admits a request: its prompt, and a whole answer's own cap or a slice."""
    request = sight.request
    models = [model for name in (request.model, *request.fallbacks) for model in view.models(sight, name)]
    most = LEASE_TOKENS if request.stream or request.max_tokens is None else MAX_OUTPUT_TOKENS
    output = min(request.max_tokens or most, most) * request.n
    prompt = least_held(json.loads(sight.body))
    return min(price.cost(prompt, 0, output) for model in models for price in model.prices)


def _over_budget(view: View, sight: Sight, message: str) -> bool:
    told = BUDGET.search(message)
    if told is None:
        return sight.is_stream and bool(view.budgets(sight))
    scope, period, budget = told[1], told[2], nusd(told[3])
    if (scope, period, budget) not in view.budgets(sight):
        return False
    made = most_made(view, sight) if sight.is_stream else 0
    most_spent = sum(
        max(
            view.charge_of(other, period, sight),
            most_held(view, other, most_made(view, other)) if may_be_held(view, sight, other) else 0,
        )
        for other in view.record.sights
        if other is not sight and view.is_of(scope, sight, other) and other.began_at <= sight.ended_at
    )
    spent, needed = nusd(told[4]), nusd(told[5])
    return (
        spent + needed > budget
        and spent <= most_spent + (most_held(view, sight, made) if made else 0)
        and needed <= most_held(view, sight, made)
    )


def _is_surely_spent(view: View, sight: Sight) -> bool:
    """Whether a budget left too little when a request came: then no limit refuses it. Budgets come first (docs/errors.md)."""
    if most_workers(view, sight) or view.clock_jumps or any(each.what == "failover" for each in view.record.troubles):
        return False
    least_nusd = least_needed(view, sight)
    began_ms, ended_ms = ((at + view.record.store_offset_s) * 1000 for at in (sight.began_at, sight.ended_at))
    for scope, period, budget in view.budgets(sight):
        form = PERIODS[period]
        events = [
            event
            for other in view.record.sights
            if view.is_of(scope, sight, other)
            if scope != "session"
            or view.history.keys[other.request.key].session_budget_nusd is not None  # else uncounted
            for event in view.settled.get(other.request_id, ())
            if int(event["settled_ms"]) < began_ms - 1
            and date_of(int(event["settled_ms"]), form) == date_of(ended_ms, form)
        ]
        if budget - sum(int(event["cost_nusd"]) for event in events) < least_nusd:
            return True
    return False


def may_be_held(view: View, sight: Sight, other: Sight) -> bool:
    """Whether another request may not have been settled yet when this one was admitted, or its hold was left behind."""
    over = over_at(view, other)
    kept_s = HOLD_TTL_S if view.feels(other, until=over) else 0.0
    if kept_s and view.feels(sight):
        return True  # its settlement waits
    return over + kept_s + LATENCY_S >= sight.began_at


def most_made(view: View, sight: Sight) -> int:
    """Return the most tokens that a stream may be held for beside its next slice: an estimate of what had been sent."""
    calls = view.calls.get(sight.marker, ())
    named = TOOL_NAME_TOKENS * sight.request.n
    return max(
        (
            estimates(call.shown_begun, call.shown_begun, named if call.answer.kind == "tool" else 0)[1]
            for call in calls
        ),
        default=0,
    )


def _most_renewed(view: View, sight: Sight) -> int:
    """Return the most that a stream may need for its next slice, in nano-USD, beside what it holds."""
    held = [int(event["held_nusd"]) for event in view.settled.get(sight.request_id, ()) if event["hold"] == "live"]
    return most_held(view, sight, most_made(view, sight)) - min(held, default=0)


def most_held(view: View, sight: Sight, made: int = 0) -> int:
    """Return the most that one request may hold: its prompt by the coarsest estimate, and its output.

    `made`: the tokens that its provider made.
    """
    request = sight.request
    output = (request.max_tokens or MAX_OUTPUT_TOKENS) * request.n
    names = [request.model, *request.fallbacks]
    models = [model for name in names for model in view.models(sight, name)]
    if request.stream and not any(model.hidden_reasoning for model in models):
        output = min(output, made + LEASE_TOKENS * request.n)
    prompt = most_held_for(json.loads(sight.body)) + (TEMPLATE_TOKENS if request.template else 0)
    return max(price.cost(prompt, 0, output) for model in models for price in model.prices)


def credit_samples(view: View, sight: Sight, since: float = -math.inf) -> list[Sample]:
    """Return the account's credit while a request ran, and just before: from a time on, if that is later."""
    account, began_at = view.key(sight), max(since, sight.began_at)
    within = [sample for sample in view.record.samples if sample.account == account and sample.at <= sight.ended_at]
    before = [sample for sample in within if sample.at < began_at][-1:]
    return before + [sample for sample in within if sample.at >= began_at]


def scope_of(message: str) -> str:
    """Return whose limit the message of a 429 names: the key's or the account's."""
    return "account" if ": account " in message else "key"


def others_of(view: View, sight: Sight, scope: str) -> list[Sight]:
    """Return the other requests of a request's key or account that began before it ended."""
    return [
        other
        for other in view.record.sights
        if other is not sight and view.is_of(scope, sight, other) and other.began_at <= sight.ended_at
    ]


def limits_named(view: View, sight: Sight, message: str) -> list[Bucket]:
    """Return the buckets of requests that the message of a 429 may name: the key's limit may have been changed."""
    scope = scope_of(message)
    plan = view.plan(sight, scope)
    if "requests per day" in message:
        return (
            []
            if plan.requests_per_day is None
            else [Bucket("requests", plan.requests_per_day, plan.requests_per_day, DAY_S)]
        )
    if "requests per minute" not in message:
        return []
    changed = changed_limits(view, sight.request.key) if scope == "key" else []
    limits = [limit for limit in (plan.requests_per_minute, *changed) if limit is not None]
    return [Bucket("requests", limit, plan.burst or limit) for limit in limits]


def _left_behind_s(view: View, sight: Sight) -> float:
    """Return for how long a request's slot may be taken once it is over: until its hold's deadline, if its worker died."""
    set_back_s = sum(max(0.0, -fault.delay_s) for fault in view.history.faults if fault.what == "clock")
    return 0.0 if sight.ended == "whole" and not died_unsettled(view, sight) else HOLD_TTL_S + set_back_s


def _limited(view: View, sight: Sight) -> bool:
    """Whether a limit that its message names was reached."""
    message = str(sight.error.get("message"))
    scope = scope_of(message)
    plan = view.plan(sight, scope)
    if _is_surely_short(view, sight) or _is_surely_spent(view, sight):
        return False
    others = others_of(view, sight, scope)
    counted = [
        other
        for other in others
        if (other.status not in REFUSED or "x-mesh-attempts" in other.headers)
        and not (other.request.keyed and "idempotent-replayed" in other.headers)
    ]
    share = max(1, most_workers(view, sight))  # of each limit, at least one
    if "parallel" in message:
        surely_alone = view.history.local and any(
            each.what in {"gone", "failover"}
            and each.start <= sight.began_at
            and sight.ended_at <= each.end - RECOVERY_S
            for each in view.record.troubles
        )  # then its worker counts what it runs itself
        open_ = [
            other
            for other in counted
            if (not surely_alone or view.worker(other) == view.worker(sight))
            and (
                over_at(view, other) + _left_behind_s(view, other) + LATENCY_S >= sight.began_at
                or (
                    view.feels(other, *STORE)
                    and view.feels(sight, *STORE)
                    and not surely_alone
                    and over_at(view, other) + HOLD_TTL_S + LATENCY_S >= sight.began_at  # its settlement waits
                )
            )
        ]
        return plan.max_parallel is not None and len(open_) >= max(plan.max_parallel // share, 1)
    if "requests per" in message:
        sizes = [bucket.size for bucket in limits_named(view, sight, message)]
        return bool(sizes) and len(counted) >= max(min(sizes) // share, 1)
    if "tokens per minute" in message:
        tokens = sum(len(other.body) // 2 + 50 + MAX_OUTPUT_TOKENS * 2 for other in counted)
        own = len(sight.body) // 2 + 50 + (sight.request.max_tokens or DEFAULT_OUTPUT_TOKENS) * sight.request.n
        return plan.tokens_per_minute is not None and bool(counted) and tokens + own > plan.tokens_per_minute // share
    return False


def changed_limits(view: View, key: int) -> list[int]:
    """Return the requests a minute that a key was given in between."""
    return [done.amount for done in view.record.changes if done.what == "requests_per_minute" and done.key == key]


def _asked_to_wait(view: View, sight: Sight) -> bool:
    """Whether the providers were busy, or had failed so often that they are left alone."""
    if sight.error.get("code") != "provider_not_available":
        return False
    if is_failing(sight):
        return may_all_be_open(view, sight)
    return any(call.answer.status == 429 for call in view.calls_for(sight))


def _stopping(view: View, sight: Sight) -> bool:
    return sight.error.get("code") == "overloaded" and cut_short(view, sight)


def _without_ledger(view: View, sight: Sight) -> bool:
    """Whether the store was lost when the request ended, or it had not been found again (docs/ledger.md).

    A stream that runs waits ten seconds for it, and in local mode a key that its worker knows goes on.
    """
    if sight.error.get("code") != "ledger_unavailable" or _may_go_on(view, sight):
        return False
    is_slow = sight.request.reads in {"slowly", "stalls"}
    if not _is_lost(view, sight.began_at if is_slow else sight.ended_at, sight.ended_at):
        return False
    if sight.status != 200 or is_slow or view.is_anothers(sight):  # a repeat has no hold of its own
        return True
    return _is_lost(view, sight.ended_at - RENEWED_S, sight.ended_at - RENEWED_S + HOP_S)


def _is_lost(view: View, since: float, until: float) -> bool:
    """Whether the store was lost between two times, or it had not been found again."""
    return any(
        trouble.what in STORE
        and trouble.what != "clock"
        and trouble.start <= until
        and since <= trouble.end - RECOVERY_S + FOUND_S + (STORE_TIMEOUT_S if trouble.what == "slow" else 0.0)
        for trouble in view.record.troubles
    )


def _may_go_on(view: View, sight: Sight) -> bool:
    """Whether a worker admits a request without the store: it served the key in the last hour, and its journal has room.

    An Idempotency-Key, a template, and a key that is not known, may need the store.
    """
    request = sight.request
    disks = any(trouble.what.startswith("disk") for trouble in view.record.troubles)
    if not view.history.local or view.history.journal_bytes is not None or disks or sight.status == 200:
        return False
    if request.keyed or request.template or request.invalid:
        return False
    worker = view.worker(sight)
    return any(
        other.request.key == request.key
        and other.status == 200
        and view.worker(other) == worker
        and sight.began_at - KNOWN_S < other.began_at
        and other.ended_at < sight.began_at
        and not any(
            trouble.worker == worker and trouble.start <= sight.ended_at and other.began_at <= trouble.end
            for trouble in view.record.troubles
        )
        for other in view.record.sights
    )


def _failed_there(view: View, sight: Sight) -> bool:
    """Whether a provider failed, or refused the gateway."""
    if sight.error.get("code") != "upstream_error":
        return False
    calls = view.calls_for(sight)
    others = [other for other in view.group(sight) if other is not sight and view.is_anothers(sight)]
    if any(
        other.error
        or (other.ended != "whole" and sight.ended_at - other.began_at > DETACHED_S)
        or _was_killed(view, other, sight.began_at)
        or has_lost_record(view, other)
        or view.feels(other, *STORE)  # its record has a gap
        for other in others
    ):
        return True
    if others and any(call.answer.is_silent for call in calls):  # for which the first one's client may not have waited
        return True
    return any(call.answer.error or not (call.answer.is_good or call.answer.is_silent) for call in calls) or (
        not calls and "gone" in _routes(view, sight)
    )


def has_lost_record(view: View, sight: Sight) -> bool:
    """Whether a failover may have lost a part of what is recorded of an answer for repeats."""
    until = over_at(view, sight) + LATENCY_S
    return any(trouble.loses(sight.began_at, until) for trouble in view.record.troubles)


def _was_killed(view: View, sight: Sight, at: float) -> bool:
    """Whether a request's worker was killed while it ran, so that a repeat at a time reads along until its record ends."""
    return any(
        trouble.what == "killed"
        and trouble.worker == view.worker(sight)
        and sight.began_at <= trouble.start <= over_at(view, sight) + HOP_S
        and at <= trouble.start + HOLD_TTL_S
        for trouble in view.record.troubles
    )


def _routes(view: View, sight: Sight) -> set[str]:
    names = [sight.request.model, *sight.request.fallbacks]
    return {route for name in names for model in view.models(sight, name) for route in model.routes}


def _timed_out(view: View, sight: Sight) -> bool:
    """Whether its own deadline ended a request, or a provider was left that had been silent for as long as it may be.

    A repeat gets the first stream's error.
    """
    calls = view.calls_for(sight)
    return met_deadline(view, sight) or any(
        call.at <= sight.ended_at and _was_silent(call) and call.ended_at <= sight.ended_at + 2 * HOP_S
        for call in calls
    )


def met_deadline(view: View, sight: Sight) -> bool:
    """Whether a request's own `timeout` ended it: by then its stream had not begun, or its whole answer wasn't there."""
    timeout_s = sight.request.timeout_s
    if timeout_s is None or sight.ended_at - sight.began_at < timeout_s - TIMER_S:
        return False
    if view.is_anothers(sight):
        return True  # a repeat begins with the first event that it reads along
    return not (sight.request.stream and _begun_at(view, sight, surely=True) < sight.began_at + timeout_s - HOP_S)


def _begun_at(view: View, sight: Sight, *, surely: bool) -> float:
    """Return when the stream began of the provider that was asked last: with its head; `surely`, or at the earliest.

    If the head doesn't say that it is a stream's, the bytes after it do, and surely the first event.
    """
    calls = [call for call in view.calls_for(sight) if call.at <= sight.ended_at][-1:]
    for call in calls:
        answer = call.answer
        head_at = call.at + answer.delay_s
        broke_off = (
            call.ended == "cut" and answer.end != "stalls" and call.ended_at <= sight.ended_at and not call.lines_at
        )
        if not call.head_sent or answer.error or answer.other_shape or (surely and broke_off):
            continue  # in the last case another provider may be on its way
        if answer.content_type == "":
            return head_at
        return min(call.lines_at, default=math.inf) if surely else head_at + answer.pause_s
    return math.inf


def _was_silent(call: Call) -> bool:
    """Whether the gateway left a provider that had been silent for as long as it may be."""
    silent_s, most_s = silence(call)
    return call.ended in {"cut", "closed"} and silent_s >= most_s - 2 * HOP_S


def _conflict(view: View, sight: Sight) -> bool:
    """Whether another body has the Idempotency-Key, or the answer to its first request may not have been kept."""
    if any(_may_be_too_large(view, call) for call in view.calls.get(sight.marker, ())):
        return True
    others = [other for other in view.group(sight) if other is not sight and other.began_at <= sight.ended_at]
    return any(
        other.body != sight.body
        or has_lost_record(view, other)
        or view.feels(other, *STORE, "killed", until=over_at(view, other))
        for other in others
    )


def _may_be_too_large(view: View, call: Call) -> bool:
    """Whether an answer may be larger than one that is kept for repeats."""
    kept = view.history.kept_bytes or KEPT_BYTES
    size = sum(len(line.encode()) + FRAME_BYTES for line in call.lines) if call.lines else len(call.body_bytes)
    return size * (2 if call.answer.other_shape else 1) + HEAD_BYTES > kept


def _unknown_template(view: View, sight: Sight) -> bool:
    del view
    return sight.error.get("code") == "template_not_found" and sight.request.template not in {"", TEMPLATE}


def _unfilled(view: View, sight: Sight) -> bool:
    del view
    is_missing = sight.request.template == TEMPLATE and sight.request.manner is None
    return is_missing and "manner" in str(sight.error.get("message"))


def _unpriced(view: View, sight: Sight) -> bool:
    return is_unpriced(view, sight) and sight.error.get("param") == "service_tier"


def is_unpriced(view: View, sight: Sight) -> bool:
    """Whether a request is for a service tier that has no price in a model that may serve."""
    request = sight.request
    models = [view.record.prices[0][1][name] for name in (request.model, *request.fallbacks)]
    lacking = [model for model in models if request.tier not in dict(model.services) and not model.from_usage_cost]
    return bool(request.tier) and request.tier not in STANDARD_TIERS and bool(lacking)


Reason = Callable[[View, Sight], bool]
REASONS: Final[Mapping[int, tuple[Reason, ...]]] = {
    400: (_refused_by_provider,),
    401: (_revoked,),
    402: (_out_of_credit,),
    403: (_suspended, may_not_use, _refused_by_provider),
    404: (_unknown_template, _refused_by_provider),
    409: (_conflict,),
    413: (_refused_by_provider,),
    422: (_refused_by_provider, _unfilled, _unpriced),
    429: (_limited,),
    502: (_failed_there,),
    503: (_asked_to_wait, _stopping, _without_ledger),
    504: (_timed_out,),
}


def waits_are_true(view: View) -> Iterator[str]:
    """Check that a request that is sent again exactly when a 429 said so isn't refused again.

    Other requests in between may have taken its place.
    """
    for sight in view.record.sights:
        if not sight.again:
            continue
        first = next(other for other in view.record.sights if other.request is sight.request and not other.again)
        message = str(sight.error.get("message"))
        counts_tokens, scope = "tokens" in message, scope_of(message)
        calls = [call for call in view.record.calls if call.at <= sight.ended_at + ASKED_S]
        between = [
            call
            for other in view.record.sights
            if other is not first and other is not sight and view.is_of(scope, sight, other)
            for call in view.calls.get(other.marker, ())
            if other.began_at <= sight.ended_at
            # admitted since, or settled since, which may take more tokens
            and (
                call.at >= first.ended_at - LATENCY_S / 100
                or (counts_tokens and call.ended_at >= first.began_at - SETTLE_S)
            )
        ]
        changed = any(
            done.ended_at + PROPAGATION_S >= first.began_at and done.what == "requests_per_minute"
            for done in view.record.changes
        )
        if (
            sight.status == 429
            and "parallel" not in message
            and not between
            and not changed
            and not view.feels(sight, *STORE, before_s=BUCKET_S)
        ):
            waited_ms = first.headers["retry-after-ms"]
            yield f"{sight.request_id} waited {waited_ms} ms, and got 429 again: {message}"
        probes = [call for call in calls if call.ended_at > first.began_at - ASKED_S]
        if is_failing(sight) and is_failing(first) and not probes:
            yield f"{sight.request_id} waited {first.headers['retry-after-ms']} ms, and its providers are still failing"


def deadlines_hold(view: View) -> Iterator[str]:
    """Check that a whole answer has come, or a stream begun, when the request's `timeout` has passed.

    And that a provider that is silent is left after `first_byte_timeout_s` or `idle_timeout_s`.
    """
    for sight in view.record.sights:
        timeout_s = sight.request.timeout_s
        if timeout_s is None or sight.ended != "whole" or sight.request.reads == "slowly" or view.feels(sight, *STORE):
            continue
        if "idempotent-replayed" in sight.headers:
            continue
        until = sight.began_at + timeout_s
        has_begun = sight.request.stream and (
            _begun_at(view, sight, surely=False) <= until + HOP_S
            # a repeat's answer begins with the first one's head, and that with a ping
            or any(other.began_at + HEARTBEAT_S - HOP_S <= until for other in view.group(sight) if other is not sight)
        )
        late_s = sight.ended_at - sight.began_at - timeout_s
        if late_s > LATE_S and not has_begun:
            yield f"{sight.request_id} has a timeout of {timeout_s} s, and waited {timeout_s + late_s:.2f} s"
    slow = {sight.marker for sight in view.record.sights if sight.request.reads in {"slowly", "stalls"}}
    for call in view.record.calls:
        silent_s, most_s = silence(call)
        if call.marker not in slow and call.ended in {"cut", "closed", ""} and silent_s > most_s + LATE_S:
            yield f"{call.upstream} was silent for {silent_s:.2f} s in {call.marker}, and may be for {most_s:g}"
