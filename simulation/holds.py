"""Rules on holds: the credit and the budgets that they keep to, and how long they live."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from simulation.accounts import Limits
from simulation.bills import allowed_charges, has_passed_deadline, is_lost, least_held, runs_on
from simulation.books import lost_grants
from simulation.client import Sight
from simulation.history import ALLOWANCE_NUSD, IDLE_S, LEASE_TOKENS, MAX_OUTPUT_TOKENS, WRITE_TIMEOUT_S
from simulation.provider import Call
from simulation.reasons import (
    WORKER_CHARACTERS,
    credit_samples,
    known_workers,
    may_be_held,
    may_lose_hold,
    most_held,
    most_made,
)
from simulation.record import HOP_S, LATENCY_S, PERIODS, RECOVERY_S, View, date_of

WAY_BYTES: Final = 65_536  # under way to a client at most (docs/simulation.md)
EVENT_BYTES: Final = 8  # of an event beside its data
CHUNK_BYTES: Final = 7  # of HTTP's framing at most, if an event has a chunk of its own
WRITTEN_S: Final = 0.5  # by which the way to a client is full sooner or later than its events tell
CHECK_S: Final = 1.0  # how often the gateway looks whether clients take something, here
SHORT_OF: Final = 2  # holds that an account has to have for a whole answer to go out without a cap (docs/api.md)
PERCENTS: Final = (50, 80, 100)  # of a budget, of which an event tells (docs/ledger.md, "The usage stream")
THRESHOLD: Final = ("which", "key", "percent", "budget_nusd", "spent_nusd")
OUTAGES: Final = frozenset({"gone", "failover", "refused", "slow", "full"})


def credit_is_not_overdrawn(view: View) -> Iterator[str]:
    """Check that available = balance - held is never below 0 but for what streams used beyond their hold, a slice each."""
    for number, book in view.record.books.items():
        charged = [event for event in book.events if event["event"] == "settled"]
        excess = sum(
            max(0, int(event["cost_nusd"]) - (int(event["held_nusd"]) if event["hold"] == "live" else 0))
            for event in charged
        )
        taken = sum(
            -done.amount
            for done in view.record.changes
            if done.what == "grant" and done.account == number and done.amount < 0
        )
        lowest = min(
            (sample.balance - sample.held for sample in view.record.samples if sample.account == number), default=0
        )
        lost = sum(lost_grants(view, number).values()) + _lost_costs(view, number)
        if lowest < -excess - taken - lost:
            yield f"a{number}: available fell to {lowest}, and at most {excess} was used beyond holds"
        for event in charged:
            yield from _excess_faults(view, event)
        if not view.is_strict:
            least = _least_balance(view, charged) - taken - lost
            if book.balance < least:
                yield f"a{number}: the balance is {book.balance}, and with the allowance {least} would be the least"
            yield from _allowance_faults(view, number, charged)


def _lost_costs(view: View, account: int) -> int:
    """Return the most that requests cost whose settlements a failover may have lost, without a hold or beyond it."""
    return sum(
        max((cost.most for cost in allowed_charges(view, sight)), default=0)
        for sight in view.record.sights
        if view.key(sight) == account and not view.settled.get(sight.request_id)
        if view.history.local
        or sight.request.stream
        or not all(each.answer.heeds_cap for each in view.own_calls(sight))
        if any(trouble.what == "failover" for trouble in view.record.troubles) and is_lost(view, sight)
    )


def _least_balance(view: View, charged: list[dict[str, str]]) -> int:
    """Return the least that an account can have left: without its allowance in each outage, and a request above a hold.

    Outages in which nothing was admitted without the store, or that overlap, so that nothing is charged in between, count
    no more. A reply that is lost has one request admitted without the store.
    """
    whats = Counter(trouble.what for trouble in view.record.troubles)
    lost = sorted((each.start, each.end) for each in view.record.troubles if each.what in OUTAGES)
    outages = 0
    admitted = [_life(view, event)[0] for event in charged if event["hold"] == "none"]
    until = -math.inf  # of what overlaps, if something was admitted in it
    for start, end in lost:
        if (view.clock_jumps or any(start - LATENCY_S <= at <= end for at in admitted)) and start > until:
            outages, until = outages + 1, end - RECOVERY_S
    beyond = [  # an abandoned hold was available to others
        max(0, int(event["cost_nusd"]) - (int(event["held_nusd"]) if event["hold"] == "live" else 0))
        for event in charged
        if event["hold"] != "none"
    ]
    local = [int(event["cost_nusd"]) for event in charged if event["hold"] == "none"]
    requests = view.history.workers + whats["lost_reply"]
    return -ALLOWANCE_NUSD * max(bool(local), outages) - sum(beyond) - max(local, default=0) * requests


def _allowance_faults(view: View, account: int, charged: list[dict[str, str]]) -> Iterator[str]:
    """Find a worker that had more spent without the store than its share of the allowance, which charges alone refill.

    The share is by how many workers there were when it last asked. A failover may have lost a hold of the store's. A
    worker that is started again counts what the journal has of the one before it.
    """
    if view.clock_jumps:
        return
    is_one = view.history.workers == 1 and not any(each.what.startswith("disk") for each in view.record.troubles)
    spent: dict[str, list[_Spent]] = {}
    for event in charged:
        sight = view.sight(event["request_id"])
        if event["hold"] == "none" and sight is not None and not may_lose_hold(view, sight):
            cost, (since, until) = int(event["cost_nusd"]), _life(view, event)
            bound = _excess_bound(view, sight, event)
            beyond = cost if bound is None else min(bound, cost)
            worker = event["hold_id"][:WORKER_CHARACTERS]
            spent.setdefault("" if is_one else worker, []).append(_Spent(since, until, cost, beyond, worker))
    for of_worker in spent.values():
        for at, worker in sorted((each.since, each.worker) for each in of_worker):
            owed = [each for each in of_worker if each.since <= at < each.until]
            most = ALLOWANCE_NUSD // known_workers(view, worker, at) + sum(each.beyond for each in owed)
            if sum(each.cost for each in owed) > most:
                yield f"a{account}: {sum(each.cost for each in owed)} was spent without the store by {worker}, of {most}"
                break


class _Spent(NamedTuple):
    """What a request cost that was admitted without the store, when it began and was charged, and what may exceed its hold."""

    since: float
    until: float
    cost: int
    beyond: int
    worker: str


def _excess_faults(view: View, event: dict[str, str]) -> Iterator[str]:
    """Find a settlement that exceeds its hold by more than it may."""
    sight = view.sight(event["request_id"])
    if sight is None or event["hold"] != "live" or not view.is_strict or view.feels(sight, "failover"):
        return
    excess, bound = int(event["cost_nusd"]) - int(event["held_nusd"]), _excess_bound(view, sight, event)
    if bound is not None and excess > bound:
        yield f"{sight.request_id} cost {event['cost_nusd']}, {excess} more than it held; {bound} may be"


def _excess_bound(view: View, sight: Sight, event: dict[str, str]) -> int | None:
    """Return by how much a settlement may exceed its hold; None: it isn't known."""
    calls = view.own_calls(sight)
    if not calls:
        return None
    call, request = calls[-1], sight.request
    models = view.models(sight, event["model"])
    prices = [each for model in models for price in model.prices for each in price.all]
    if call.bill.cost_nusd is not None and any(model.from_usage_cost for model in models):
        return None
    if any(
        model.price_in(call.tier, request.tier) not in {model.price, model.price_in(request.tier)} for model in models
    ):
        return None  # a dearer service tier than was requested
    held_for = min(least_held(call.body) for call in calls)
    beyond = LEASE_TOKENS * request.n if request.stream else 0
    if call.reported:
        beyond += call.made - call.shown if request.stream else 0  # hidden reasoning
        beyond += -(-call.shown // 4) if request.stream else 0  # text of which an estimate sees 0.8
        beyond = beyond if call.answer.heeds_cap else max(beyond, call.made)
    prompt = int(event["prompt_tokens"])
    if any(held_for <= above < prompt for model in models for price in model.prices for above, _ in price.tiers):
        return None  # the prompt has reached a tier that its hold didn't know of
    more_prompt = max(0, prompt - held_for)
    return max(price.of_output(beyond) + -(-more_prompt * price.input // 1_000_000) for price in prices)


def imposed_cap_faults(view: View, sight: Sight, call: Call) -> Iterator[str]:
    """Find a cap that a request without one got for another reason than short credit, or that its client isn't told."""
    request = sight.request
    cap = next((call.body[name] for name in ("max_tokens", "max_completion_tokens") if name in call.body), None)
    imposed = cap if request.max_tokens is None else None
    told = sight.headers.get("x-mesh-max-tokens")
    group = view.group(sight)
    is_own = sight.status == 200 and len(group) == 1
    if is_own and sight.headers and told != (None if imposed is None else str(imposed)):
        yield f"{sight.request_id} has x-mesh-max-tokens {told}, and {call.upstream} got the cap {imposed}"
    if imposed is None or (
        view.history.local and any(view.feels(each, before_s=RECOVERY_S) for each in group)
    ):  # the allowance
        return
    models = [model for name in (request.model, *request.fallbacks) for model in view.models(sight, name)]
    if request.stream and not any(model.hidden_reasoning for model in models):
        yield f"{call.upstream} got the cap {imposed} for the stream {sight.request_id}, which has none"
    samples = [sample for other in group for sample in credit_samples(view, other)]
    left = min((sample.balance - sample.held for sample in samples), default=0)
    left = min([left, *(budget - _most_spent(view, sight, scope) for scope, _, budget in view.budgets(sight))])
    if not 1 <= imposed <= MAX_OUTPUT_TOKENS or left >= SHORT_OF * most_held(view, sight):
        yield f"{call.upstream} got the cap {imposed} for {sight.request_id}, and {left} nano-USD were available"


def _most_spent(view: View, sight: Sight, scope: str) -> int:
    """Return the most that others of its key, session or account may have spent or held when a request was admitted."""
    return sum(
        max(view.charge(other), most_held(view, other) if may_be_held(view, sight, other) else 0)
        for other in view.record.sights
        if other is not sight and view.is_of(scope, sight, other) and other.began_at <= sight.ended_at
    )


class _Budget(NamedTuple):
    """A budget: whose it is, its period, its amount, and the day or month that it is of."""

    of: str
    period: str
    amount: int
    date: str


def budgets_hold(view: View) -> Iterator[str]:
    """Check that no key, session and account spends more than its budget, but for what was used beyond holds.

    A cost counts on the day, and in the month, in which it is settled. A hold counts in all that it lives in.
    """
    spent: Counter[_Budget] = Counter()
    beyond: Counter[_Budget] = Counter()
    for sight in view.record.sights if view.is_strict else ():
        request = sight.request
        names = {"key": f"k{request.key}", "session": f"{request.session} of k{request.key}"}
        names["account"] = f"a{view.key(sight)}"
        for scope, period, amount in view.budgets(sight):
            for event in view.settled.get(sight.request_id, ()):
                of = _Budget(names[scope], period, amount, date_of(int(event["settled_ms"]), PERIODS[period]))
                cost, held = int(event["cost_nusd"]), int(event["held_nusd"]) if event["hold"] == "live" else 0
                spent[of] += cost
                beyond[of] += max(0, cost - held)
    for of, cost in spent.items():
        if cost > of.amount + beyond[of]:
            yield f"{of.of}: {cost} was spent of a {of.period} budget of {of.amount}, {beyond[of]} of it beyond holds"


def thresholds_are_told(view: View) -> Iterator[str]:
    """Check that each settlement has the events of the shares of budgets and of credit that it passed, and no others."""
    for number, book in view.record.books.items():
        spent: Counter[tuple[str, str, str]] = Counter()
        balance = topped = 0
        told: list[tuple[str, ...]] = []
        for event in book.events:
            if event["event"] == "threshold":
                told.append(tuple(event[name] for name in THRESHOLD))
            elif event["event"] == "grant":
                balance += int(event["amount_nusd"])
                topped = balance if int(event["amount_nusd"]) > 0 else topped
            elif event["event"] == "settled" and event["cost_nusd"] != "0":
                cost = int(event["cost_nusd"])
                balance -= cost
                expected: list[tuple[str, ...]] = []
                plans: dict[str, Limits] = {"account": view.history.account(number)}
                if event["key"] in view.record.key_ids:
                    plans = {"key": view.history.keys[view.record.key_ids.index(event["key"])], **plans}
                for period, form in PERIODS.items():
                    for scope, plan in plans.items():
                        key = event["key"] if scope == "key" else ""
                        of = (f"{scope} {period} budget", key, date_of(int(event["settled_ms"]), form))
                        spent[of] += cost
                        expected += _passed(*of[:2], plan.budgets.get(period, 0), spent[of], cost)
                expected += _passed("credit", "", topped, topped - balance, cost)
                if told != expected:
                    yield f"a{number}: {event['request_id']} told of {told}, and {expected} would be right"
                told = []
        if told:
            yield f"a{number}: {told} was told of nothing that was settled"


def _passed(which: str, key: str, budget: int, spent: int, cost: int) -> Iterator[tuple[str, ...]]:
    """Return the events of the shares of a budget that a cost has passed."""
    for percent in PERCENTS:
        mark = -(-budget * percent // 100)
        if budget > 0 and spent - cost < mark <= spent:
            yield which, key, str(percent), str(budget), str(spent)


def holds_are_needed(view: View) -> Iterator[str]:
    """Check that no request holds more than it may cost: its prompt by the coarsest estimate, and its output or a slice."""
    for sight in view.record.sights:
        most = most_held(view, sight, most_made(view, sight))
        for event in view.settled.get(sight.request_id, ()):
            if int(event["held_nusd"]) > most:
                yield f"{sight.request_id} held {event['held_nusd']}, and {most} would do"


def renewals_raise(view: View) -> Iterator[str]:
    """Check that no renewal lowers what an account holds (docs/ledger.md), unless it released a hold past its deadline."""
    for number, book in view.record.books.items():
        falls_back = any(trouble.what == "failover" for trouble in view.record.troubles)
        if any(event["event"] == "abandoned" for event in book.events) or (view.clock_jumps and falls_back):
            continue  # the failover may have lost that event
        samples = [sample for sample in view.record.samples if sample.account == number]
        for before, after in itertools.pairwise(samples):
            fell_back = any(
                trouble.what == "failover" and before.at <= trouble.start <= after.at
                for trouble in view.record.troubles
            )
            if after.script == "renew" and after.held < before.held and not fell_back:
                yield f"a{number}: a renewal lowered what is held from {before.held} to {after.held}"


def holds_are_kept(view: View) -> Iterator[str]:
    """Check that no hold is lost without a reason, and that a client that reads nothing keeps its own for a while alone."""
    for number, book in view.record.books.items():
        for event in book.events:
            if event["event"] == "abandoned" or event.get("hold", "live") != "live":
                since, until = _life(view, event)
                in_time = any(
                    each.start <= until and each.end + (HOP_S if each.what == "killed" else 0) >= since
                    for each in view.record.troubles  # an admission of a killed worker may still be on its way
                )
                if not (in_time or view.clock_jumps):
                    yield f"a{number}: the hold {event['hold_id']} was abandoned"
    for sight in view.record.sights:
        if sight.request.reads == "stalls" and sight.ended == "left" and sight.times and len(view.group(sight)) == 1:
            yield from _stall_faults(view, sight)


def _stall_faults(view: View, sight: Sight) -> Iterator[str]:
    """Find a client that read nothing more and was given up at another time than `write_timeout_s` later.

    It takes what fits on the way to it, so that time begins when that is full. Afterwards an answer may run on.
    """
    calls = view.own_calls(sight)
    full_at = _full_at(sight, calls[-1], EVENT_BYTES) if calls else None
    full_from = _full_at(sight, calls[-1], EVENT_BYTES + CHUNK_BYTES) if calls else None
    if full_at is None or full_from is None or has_passed_deadline(sight):  # then it is given up already
        return
    least, latest = (max(at, sight.times[-1][0]) + WRITE_TIMEOUT_S - WRITTEN_S for at in (full_from, full_at))
    answer = calls[-1].answer
    rest_s = answer.gap_s * len(calls[-1].lines) + answer.pause_s + answer.lingers_s if runs_on(view, sight) else 0.0
    rest_s += IDLE_S if answer.is_silent and runs_on(view, sight) else 0.0
    most = latest + 2 * WRITTEN_S + 2 * CHECK_S + rest_s
    for event in () if view.clock_jumps or view.feels(sight, until=most) else view.settled.get(sight.request_id, ()):
        settled_at = int(event["settled_ms"]) / 1000 - view.record.store_offset_s
        is_given_up = event["outcome"] == "client_disconnected"
        if settled_at > most or (is_given_up and settled_at < least):
            took_s = settled_at - least - WRITTEN_S + WRITE_TIMEOUT_S
            yield f"{sight.request_id} was settled {took_s:.1f} s after its client had taken the last byte"


def _full_at(sight: Sight, call: Call, framing_bytes: int) -> float | None:
    """Return when a stream had more than its client had read and the way to it takes; None if it had not."""
    sizes = itertools.accumulate(len(line) + framing_bytes for line in call.lines)
    return next(
        (at for size, at in zip(sizes, call.lines_at, strict=False) if size > len(sight.payload) + WAY_BYTES), None
    )


def _life(view: View, event: dict[str, str]) -> tuple[float, float]:
    """Return when the hold of an event began, and when it was settled or abandoned, by the loop's clock."""
    ended_ms = event["settled_ms"] if event["event"] == "settled" else event["abandoned_ms"]
    return int(event["started_ms"]) / 1000 - view.record.store_offset_s, int(
        ended_ms
    ) / 1000 - view.record.store_offset_s
