"""Rules on money: what the ledger's books say, against what providers billed and operators granted."""

import itertools
import json
from collections.abc import Iterator
from typing import Final

from simulation.bills import BYTES_A_TOKEN, allowed_charges, is_lost, over_at, runs_on, told_cost
from simulation.client import Sight
from simulation.history import ALLOWANCE_NUSD, LEASE_TOKENS, MAX_OUTPUT_TOKENS
from simulation.provider import Call
from simulation.reasons import credit_samples, is_of_session, most_held
from simulation.record import HOP_S, LATENCY_S, RECOVERY_S, Look, Sample, Trouble, View

AT_ONCE_S: Final = 0.1
LOST: Final = 74  # the exit code of a process that lost a settlement (docs/ledger.md)
SHORT_OF: Final = 2  # holds that an account has to have for a whole answer to go out without a cap (docs/api.md)
OUTAGES: Final = frozenset({"gone", "failover", "refused", "slow", "full", "lost_reply"})


def books_balance(view: View) -> Iterator[str]:
    """Granted = balance + settled; holds are gone; events, hourly aggregates and the sums agree."""
    for number, book in view.record.books.items():
        charged = [event for event in book.events if event["event"] == "settled"]
        granted = sum(int(event["amount_nusd"]) for event in book.events if event["event"] == "grant")
        costs = sum(int(event["cost_nusd"]) for event in charged)
        if book.granted != book.balance + book.settled:
            yield f"a{number}: granted {book.granted}, but balance {book.balance} and settled {book.settled}"
        if costs != book.settled:
            yield f"a{number}: settled {book.settled}, but the events say {costs}"
        if granted != book.granted:
            yield f"a{number}: granted {book.granted}, but the events say {granted}"
        if book.held or book.holds or book.running:
            yield f"a{number}: {book.held} nano-USD in {book.holds} holds and {book.running} slots are left"
        for metric, field in (
            ("cost", "cost_nusd"),
            ("prompt", "prompt_tokens"),
            ("completion", "completion_tokens"),
            ("cached", "cached_tokens"),
            ("reasoning", "reasoning_tokens"),
        ):
            total = sum(int(event[field]) for event in charged)
            for name, sums in (("hours", book.hours), ("months", book.months)):
                if sums.get(metric, 0) != total:
                    yield f"a{number}: the {name} have {sums.get(metric, 0)} of {metric}, the events {total}"
        for name, sums in (("hours", book.hours), ("months", book.months)):
            if sums.get("requests", 0) != len(charged):
                yield f"a{number}: the {name} have {sums.get('requests', 0)} requests, the events {len(charged)}"
        of_sessions: dict[str, int] = {}
        for event in charged:
            of_sessions[event["session"]] = of_sessions.get(event["session"], 0) + 1
        if book.sessions != of_sessions:
            yield f"a{number}: the hours have {book.sessions} requests by session, the events {of_sessions}"


def grants_count_once(view: View) -> Iterator[str]:
    """Check that an account was granted what was granted: once for each ref."""
    for number, book in view.record.books.items():
        sure: dict[str, int] = {}
        maybe: dict[str, int] = {}
        for done in view.record.changes:
            if done.what == "grant" and done.account == number:
                (sure if done.ok else maybe)[done.ref] = done.amount
        most = sum(sure.values()) + sum(amount for ref, amount in maybe.items() if ref not in sure)
        least = sum(sure.values()) - sum(_lost_grants(view, number).values())
        if not least <= book.granted <= most:
            yield f"a{number}: granted {book.granted}, and {least} to {most} were"


def _lost_grants(view: View, account: int) -> dict[str, int]:
    """Return the grants by ref that a failover may have lost."""
    done = [each for each in view.record.changes if each.what == "grant" and each.account == account and each.ok]
    troubles = view.record.troubles
    lost = {each for each in done if any(trouble.loses(each.began_at, each.ended_at) for trouble in troubles)}
    kept = {each.ref for each in done if each not in lost}
    return {each.ref: each.amount for each in lost if each.ref not in kept}


def charged_once(view: View) -> Iterator[str]:
    """Check that a hold is settled once, a request too, and an Idempotency-Key is charged once."""
    holds: dict[str, int] = {}
    for request_id, events in view.settled.items():
        for event in events:
            holds[event["hold_id"]] = holds.get(event["hold_id"], 0) + 1
        if len(events) > 1:
            yield f"{request_id} has {len(events)} settlements"
    for hold, count in holds.items():
        if count > 1:
            yield f"hold {hold} was settled {count} times"
    for marker in {sight.marker for sight in view.record.sights if sight.request.keyed}:
        group = [sight for sight in view.record.sights if sight.marker == marker]
        charged = [sight for sight in group if view.charge(sight) > 0]
        failed = [sight for sight in charged if sight.error or sight.ended not in {"whole", "left", "closed"}]
        cut = [call for call in view.calls.get(marker, ()) if not call.complete]
        if len(charged) - len(failed) - len(cut) > 1:
            yield f"the Idempotency-Key of {marker} was charged for {[sight.request_id for sight in charged]}"


def charges_are_bills(view: View) -> Iterator[str]:
    """Each request is charged what its provider bills, within the tolerance where nothing was reported."""
    for sight in view.record.sights:
        charge = view.owed(sight)
        allowed = allowed_charges(view, sight)
        if not any(cost.holds(charge) for cost in allowed):
            told = ", ".join(
                f"{cost.least}..{cost.most}" if cost.least != cost.most else str(cost.least)
                for cost in dict.fromkeys(allowed)
            )
            yield f"{sight.request_id} was charged {charge}, and {told or 'nothing'} would be right"


def tokens_are_reported(view: View) -> Iterator[str]:
    """Check that a settlement has the tokens of the provider's report, and the request's key, session and model."""
    for sight in view.record.sights:
        for event in view.settled.get(sight.request_id, ()):
            if event["session"] != sight.request.session:
                yield f"{sight.request_id} of session {sight.request.session!r} is in {event['session']!r}"
            calls = view.calls.get(sight.marker, [])
            named = sight.headers.get("x-mesh-model")
            if (
                named
                and sight.status == 200
                and not sight.is_stream
                and named != event["model"]
                and event["cost_nusd"] != "0"
            ):
                yield f"{sight.request_id} names {named} and is billed as {event['model']}"
            if (
                event["usage_source"] not in {"reported", "drained"}
                or len(calls) != 1
                or not calls[0].complete
                or sight.error
                or sight.ended != "whole"
            ):
                continue
            bill, found = (
                calls[0].bill,
                {name: int(event[f"{name}_tokens"]) for name in ("prompt", "cached", "completion", "reasoning")},
            )
            if calls[0].is_true == {"prompt", "completion"} and found != {
                "prompt": bill.prompt,
                "cached": bill.cached,
                "completion": bill.completion,
                "reasoning": bill.reasoning,
            }:
                yield f"{sight.request_id}: {found} tokens were billed as {bill}"


def costs_are_told(view: View) -> Iterator[str]:
    """`x-mesh-cost` of a whole answer, and what a finished stream says last, are the charge."""
    for sight in view.record.sights:
        if sight.ended != "whole" or sight.status != 200 or sight.error:
            continue
        if is_lost(view, sight):
            continue
        told = told_cost(sight)
        # a repeat says what its first request cost; its head doesn't say that it is one if a ping came before the answer
        charged = {view.owed(other) for other in view.group(sight) if other is sight or not view.owed(sight)}
        if told is None:
            yield f"{sight.request_id} doesn't say what it cost"
        elif "idempotent-replayed" not in sight.headers and told not in charged and not _waived(view, sight):
            yield f"{sight.request_id} says that it cost {told}, and was charged {view.owed(sight)}"


def _waived(view: View, sight: Sight) -> bool:
    return any(int(event.get("waived_nusd") or 0) for event in view.settled.get(sight.request_id, ()))


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
        lost = sum(_lost_grants(view, number).values()) + _lost_costs(view, number)
        if lowest < -excess - taken - lost:
            yield f"a{number}: available fell to {lowest}, and at most {excess} was used beyond holds"
        for event in charged:
            yield from _excess_faults(view, event)
        if not view.is_strict:
            least = _least_balance(view, charged)
            if book.balance < least:
                yield f"a{number}: the balance is {book.balance}, and with the allowance {least} would be the least"


def _lost_costs(view: View, account: int) -> int:
    """Return the most that requests without a hold cost whose settlements a failover may have lost."""
    return sum(
        max((cost.most for cost in allowed_charges(view, sight)), default=0)
        for sight in view.record.sights
        if view.history.local and view.key(sight) == account and not view.settled.get(sight.request_id)
        if any(trouble.what == "failover" for trouble in view.record.troubles) and is_lost(view, sight)
    )


def _least_balance(view: View, charged: list[dict[str, str]]) -> int:
    """Return the least that an account can have left: without its allowance in each outage, and a request above a hold."""
    outages = sum(trouble.what in OUTAGES for trouble in view.record.troubles)
    beyond = [max(0, int(event["cost_nusd"]) - int(event["held_nusd"])) for event in charged if event["hold"] != "none"]
    local = [int(event["cost_nusd"]) for event in charged if event["hold"] == "none"]
    return -ALLOWANCE_NUSD * max(1, outages) - sum(beyond) - max(local, default=0) * view.history.workers


def _excess_faults(view: View, event: dict[str, str]) -> Iterator[str]:
    """Find a settlement that exceeds its hold by more than it may."""
    sight = next((sight for sight in view.record.sights if sight.request_id == event["request_id"]), None)
    if sight is None or event["hold"] != "live" or not view.is_strict or view.feels(sight, "failover"):
        return
    calls = view.calls.get(sight.marker, [])
    if not calls:
        return
    call, request = calls[-1], sight.request
    models = view.models(sight, event["model"])
    excess = int(event["cost_nusd"]) - int(event["held_nusd"])
    prices = [each for model in models for price in model.prices for each in price.all]
    if call.bill.cost_nusd is not None and any(model.from_usage_cost for model in models):
        return
    if any(
        model.price_in(call.tier, request.tier) not in {model.price, model.price_in(request.tier)} for model in models
    ):
        return  # a dearer service tier than was requested
    held_for = min(len(json.dumps(call.body["messages"])) for call in calls) // BYTES_A_TOKEN
    beyond = LEASE_TOKENS * request.n if request.stream else 0
    if call.reported:
        beyond += call.made - call.shown if request.stream else 0  # hidden reasoning
        beyond += -(-call.shown // 4) if request.stream else 0  # text of which an estimate sees 0.8
        beyond = beyond if call.answer.heeds_cap else max(beyond, call.made)
    prompt = int(event["prompt_tokens"])
    if any(held_for <= above < prompt for model in models for price in model.prices for above, _ in price.tiers):
        return  # the prompt has reached a tier that its hold didn't know of
    more_prompt = max(0, prompt - held_for)
    bound = max(price.of_output(beyond) + -(-more_prompt * price.input // 1_000_000) for price in prices)
    if excess > bound:
        yield f"{sight.request_id} cost {event['cost_nusd']}, {excess} more than it held; {bound} may be"


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
    key = view.history.keys[request.key]
    budgets = [key.budget_nusd, key.session_budget_nusd if request.session else None]
    left = min([left, *(budget - _most_spent(view, sight) for budget in budgets if budget is not None)])
    if not 1 <= imposed <= MAX_OUTPUT_TOKENS or left >= SHORT_OF * most_held(view, sight):
        yield f"{call.upstream} got the cap {imposed} for {sight.request_id}, and {left} nano-USD were available"


def _most_spent(view: View, sight: Sight) -> int:
    """Return the most that other requests of its key or session may have spent or held when this one was admitted."""
    return sum(
        max(view.charge(other), 0 if over_at(view, other) + LATENCY_S < sight.began_at else most_held(view, other))
        for other in view.record.sights
        if other is not sight
        and (other.request.key == sight.request.key or is_of_session(view, sight, other))
        and other.began_at <= sight.ended_at
    )


def budgets_hold(view: View) -> Iterator[str]:
    """Check that a key, and each of its sessions, spends no more than its budget, but for what was used beyond holds."""
    for number, key in enumerate(view.history.keys if view.is_strict else ()):
        ours = [sight for sight in view.record.sights if sight.request.key == number]
        sessions = {sight.request.session for sight in ours if sight.request.session}
        scopes = [(f"k{number}", key.budget_nusd, ours)] + [
            (f"{name} of k{number}", key.session_budget_nusd, [each for each in ours if each.request.session == name])
            for name in sorted(sessions)
        ]
        for name, budget, sights in scopes:
            events = [event for sight in sights for event in view.settled.get(sight.request_id, ())]
            spent = sum(int(event["cost_nusd"]) for event in events)
            beyond = sum(max(0, int(event["cost_nusd"]) - int(event["held_nusd"])) for event in events)
            if budget is not None and spent > budget + beyond:
                yield f"{name}: {spent} was spent of a budget of {budget}, {beyond} of it beyond holds"


def renewals_raise(view: View) -> Iterator[str]:
    """Check that no renewal lowers what an account holds (docs/ledger.md), unless it released a hold past its deadline."""
    for number, book in view.record.books.items():
        if any(event["event"] == "abandoned" for event in book.events):
            continue
        samples = [sample for sample in view.record.samples if sample.account == number]
        for before, after in itertools.pairwise(samples):
            if after.script == "renew" and after.held < before.held and not view.is_lossy:
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
        if sight.request.reads != "stalls" or sight.ended != "left" or sight.request.keyed or runs_on(view, sight):
            continue
        for event in () if view.feels(sight) or view.clock_jumps else view.settled.get(sight.request_id, ()):
            settled_at = int(event["settled_ms"]) / 1000 - view.record.store_offset_s
            if settled_at > sight.ended_at - 1:
                yield f"{sight.request_id} was settled when its client gave up, and not after write_timeout_s"


def _life(view: View, event: dict[str, str]) -> tuple[float, float]:
    """Return when the hold of an event began, and when it was settled or abandoned, by the loop's clock."""
    ended_ms = event["settled_ms"] if event["event"] == "settled" else event["abandoned_ms"]
    return int(event["started_ms"]) / 1000 - view.record.store_offset_s, int(
        ended_ms
    ) / 1000 - view.record.store_offset_s


def accounts_are_told(view: View) -> Iterator[str]:
    """Check what the API says of an account: its credit at a time, and in the end what each request and all cost."""
    for look in view.record.looks:
        samples = [sample for sample in view.record.samples if sample.account == look.account]
        before = [sample for sample in samples if sample.at < look.began_at][-1:]
        within = [sample for sample in samples if look.began_at <= sample.at <= look.ended_at]
        if look.available != look.balance - look.held:
            yield f"a{look.account}: {look.available} is available of {look.balance} less {look.held}"
        elif not _failed_over_unseen(view, before, look) and (look.balance, look.held) not in {
            (each.balance, each.held) for each in before + within
        }:
            yield f"a{look.account}: /v1/key says balance {look.balance} and held {look.held}, and neither was so"
    for number, told in view.record.told.items():
        book = view.record.books[number]
        charged = [event for event in book.events if event["event"] == "settled"]
        costs = {event["request_id"]: int(event["cost_nusd"]) for event in charged}
        if told.events != costs:
            wrong = sorted(name for name in told.events.keys() | costs if told.events.get(name) != costs.get(name))
            yield f"a{number}: the API's events say {told.events} of {wrong}, and the ledger {costs}"
        if (told.cost, told.requests) != (book.settled, len(charged)):
            yield f"a{number}: /v1/usage says {told.cost} for {told.requests} requests, {book.settled} for {len(charged)}"


def _failed_over_unseen(view: View, before: list[Sample], look: Look) -> bool:
    """Whether the store may have failed over since the last sample before a look: then what it had was never seen."""
    since = min((sample.at for sample in before), default=0.0)
    return any(
        trouble.what == "failover" and trouble.start <= look.ended_at and since <= trouble.end - RECOVERY_S + LATENCY_S
        for trouble in view.record.troubles
    )


def losses_are_told(view: View) -> Iterator[str]:
    """Check that a process ends with code 74 if it lost a settlement, which the log has whole, and otherwise with 0."""
    known = {sight.request_id for sight in view.record.sights}
    for loss in view.record.losses:
        if loss.request_id not in known or not loss.hold_id:
            yield f"{loss.process} lost a settlement of nothing known: {loss}"
    lossy = {loss.process for loss in view.record.losses}
    for process, code in view.record.exits:
        if code not in {LOST if process in lossy else 0, -9}:
            yield f"{process} ended with {code}, and {'lost a settlement' if process in lossy else 'lost nothing'}"


def full_journals_deny(view: View) -> Iterator[str]:
    """Check that nothing is admitted without the store whose settlement the journal has no room for, or its disk refuses."""
    if view.is_strict:
        return
    yield from _admitted_without_room(view)
    for refused_at, process in view.record.unkept:
        disk = _during(view, refused_at, "disk_full", "disk_fails")
        outage = _during(view, refused_at, "gone", "refused")
        if disk is None or outage is None:
            continue
        until = min(disk.end, outage.end) - RECOVERY_S
        number = int(process.partition("-")[2].partition(".")[0])
        for sight in view.record.sights:
            is_there = sight.worker % view.history.workers == number and not _restarted(view, refused_at, sight)
            is_within = sight.began_at > refused_at + AT_ONCE_S and sight.ended_at < until
            if is_there and is_within and sight.status == 200 and "idempotent-replayed" not in sight.headers:
                yield f"{sight.request_id} was served, though {process} can keep no settlement"


def _admitted_without_room(view: View) -> Iterator[str]:
    """Find settlements that were lost of requests that were admitted without the store, where nothing else took the room."""
    if any(trouble.what.startswith("disk") for trouble in view.record.troubles):
        return
    for loss in view.record.losses:
        sight = next((sight for sight in view.record.sights if sight.request_id == loss.request_id), None)
        outage = next(
            (each for each in view.record.troubles if sight and each.start <= sight.began_at <= each.end), None
        )
        if not loss.unheld or sight is None or outage is None:
            continue
        before = [other for other in view.record.sights if other.began_at <= outage.start <= other.ended_at + LATENCY_S]
        if not before:
            yield f"{loss.request_id} was admitted, and {loss.process} had no room for its settlement"


def _restarted(view: View, since: float, sight: Sight) -> bool:
    """Whether a process may have ended between a time and a request: its successor learns of the disk anew."""
    ends = (trouble.start for trouble in view.record.troubles if trouble.what in {"killed", "drained"})
    return any(since - RECOVERY_S <= start <= sight.ended_at for start in ends)


def _during(view: View, at: float, *whats: str) -> Trouble | None:
    """Return the trouble of one of these kinds that lasts at a time."""
    found = (each for each in view.record.troubles if each.what in whats and each.start <= at <= each.end - RECOVERY_S)
    return next(found, None)
