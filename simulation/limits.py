"""Rules on limits: the requests, tokens and slots that a key may have, and what its buckets say of them."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from simulation.accounts import DAY_S, MINUTE_S, AccountPlan, Bucket, Limits
from simulation.bills import BYTES_A_TOKEN, TOKENS_OF_FRAMES, TOOL_NAME_TOKENS, estimates, least_held, over_at
from simulation.client import Sight
from simulation.history import DEFAULT_OUTPUT_TOKENS, LEASE_TOKENS, MAX_OUTPUT_TOKENS, TURNS
from simulation.provider import CITATION_TOKENS, TOKENS_OF_A_MESSAGE, prompt_tokens
from simulation.reasons import (
    REFUSED,
    TEMPLATE_TOKENS,
    WORKER_CHARACTERS,
    changed_limits,
    known_workers,
    may_lose_hold,
    most_workers,
)
from simulation.record import LATENCY_S, RECOVERY_S, STORE, View

CLOCK_S: Final = 0.002  # the store's clock has milliseconds
DEFAULT_REQUESTS, DEFAULT_TOKENS = (
    600,
    1_000_000,
)  # a minute, of a key without limits of its own (docs/configuration.md)


class Owner(NamedTuple):
    """A key or an account, and its limits."""

    scope: str
    number: int
    plan: Limits

    @property
    def name(self) -> str:
        """Its name, as histories have it."""
        return f"{self.scope[0]}{self.number}"

    def has(self, view: View, sight: Sight) -> bool:
        """Whether a request is its own."""
        return self.number == (sight.request.key if self.scope == "key" else view.key(sight))

    def buckets(self, view: View) -> list[Bucket]:
        """Return its buckets of requests that have a limit, each as it was at its largest."""
        buckets = [bucket for bucket in self.plan.buckets() if bucket.kind == "requests"]
        if self.scope == "account" or self.plan.requests_per_minute is None:
            return buckets
        limit = max(self.plan.requests_per_minute, *changed_limits(view, self.number), 0)
        return [
            Bucket("requests", limit, self.plan.burst or limit),
            *(each for each in buckets if each.period_s == DAY_S),
        ]


def owners(view: View) -> list[Owner]:
    """Return all keys, and the accounts that have a limit."""
    accounts = [Owner("account", number, plan) for number, plan in enumerate(view.history.accounts)]
    keys = [Owner("key", number, plan) for number, plan in enumerate(view.history.keys)]
    return [*keys, *(owner for owner in accounts if owner.plan != AccountPlan())]


def limits_hold(view: View) -> Iterator[str]:
    """No more requests are admitted than the buckets and the slots of a key, and of an account, allow."""
    if not view.is_strict:
        yield from _shares_passed(view)
        return
    for owner in owners(view):
        ran = [
            sight
            for sight in view.record.sights
            if owner.has(view, sight)
            and view.settled.get(sight.request_id)
            and sight.ended_at < view.first_jump - LATENCY_S  # by a clock that is known
            and not any(each.loses(sight.began_at, _admitted_by(view, sight)) for each in view.record.troubles)
        ]
        for bucket in owner.buckets(view):
            yield from itertools.islice(_too_many(owner, bucket, ran), 1)
        if owner.plan.max_parallel is not None:
            yield from _slots_taken(view, owner, owner.plan.max_parallel)


def _too_many(owner: Owner, bucket: Bucket, ran: Iterable[Sight]) -> Iterator[str]:
    """Find requests that a bucket can't have had."""
    ordered = sorted(ran, key=lambda sight: sight.began_at)
    for first, last in itertools.combinations_with_replacement(range(len(ordered)), 2):
        ends = min(
            max(sight.ended_at for sight in ordered[first : last + 1]),
            ordered[last].began_at + LATENCY_S * 10,
        )
        if last - first + 1 > bucket.size + (ends - ordered[first].began_at) * bucket.rate + 1e-6:
            yield (
                f"{owner.name}: {last - first + 1} requests of {bucket.size:g} and {bucket.rate:g}/s from"
                f" {ordered[first].request_id} to {ordered[last].request_id}"
            )


def _shares_passed(view: View) -> Iterator[str]:
    """Find a worker that admitted more requests in an outage than its share of a bucket, or of the slots.

    The share is by how many workers it knew, and at least one (docs/ledger.md). No admission by the store renews it meanwhile.
    """
    for trouble in view.record.troubles:
        if trouble.what not in {"gone", "refused", "full"} or view.clock_jumps:
            continue
        admitted: dict[str, list[Sight]] = {}
        for sight in sorted(view.record.sights, key=lambda sight: sight.began_at):
            if trouble.start <= sight.began_at and _admitted_by(view, sight) <= trouble.end - RECOVERY_S:
                for event in view.settled.get(sight.request_id, ()):
                    if event["hold"] == "none" and not may_lose_hold(view, sight):
                        admitted.setdefault(event["hold_id"][:WORKER_CHARACTERS], []).append(sight)
        for (worker, of_worker), owner in itertools.product(admitted.items(), owners(view)):
            sights = [sight for sight in of_worker if owner.has(view, sight)]
            if sights:
                known = known_workers(view, worker, sights[-1].began_at)
                yield from itertools.islice(_beyond_share(view, owner, worker, sights, known), 1)


def _beyond_share(view: View, owner: Owner, worker: str, sights: list[Sight], known: int) -> Iterator[str]:
    """Find requests of a key or an account that a worker admitted beyond its share, where it knew so many workers."""
    for bucket in owner.buckets(view):
        size, rate = max(bucket.size / known, 1.0), max(bucket.limit / known, 1.0) / bucket.period_s
        for first, last in itertools.combinations_with_replacement(range(len(sights)), 2):
            took_s = _admitted_by(view, sights[last]) - sights[first].began_at
            if last - first + 1 > size + took_s * rate + 1e-6:
                yield f"{owner.name}: {worker} admitted {last - first + 1} requests in {took_s:.1f} s of a share of {size:g}"
    for bucket in owner.plan.buckets():
        size = max(bucket.size / known, 1.0)
        for first, last in itertools.combinations(range(len(sights)), 2) if bucket.kind == "tokens" else ():
            took_s = _admitted_by(view, sights[last]) - sights[first].began_at
            *before, own = (tokens_taken(view, sight)[0] for sight in sights[first : last + 1])
            if (
                sum(before) + min(own, size) > size + took_s * size / bucket.period_s + 1e-6
            ):  # none for more than it has
                tokens = f"{sum(before)} tokens and {own}"
                yield f"{owner.name}: {worker} admitted {tokens} in {took_s:.1f} s of a share of {size:g}"
    if owner.plan.max_parallel is not None:
        share = min(owner.plan.max_parallel, max(owner.plan.max_parallel // known, 1))
        calls = [call for sight in sights for call in view.own_calls(sight)]
        for call in calls:
            open_ = {other.marker for other in calls if other.at <= call.at < other.ended_at - LATENCY_S / 2}
            if len(open_) > share:
                yield f"{owner.name}: {len(open_)} requests run at once at {worker}, and {share} may"


class Taken(NamedTuple):
    """What a request took from its key's bucket, where bounds are all that is known of it.

    It was admitted between `from_` and `until`, if at all: then `least` is above 0. `least` and `most`: what it took by
    estimate, `used`: what it was made right to at `settled_at`. `last`: when a stream took its last
    slice, at the latest.
    """

    from_: float
    until: float
    least: int
    most: int
    used: int
    settled_at: float
    last: float = -math.inf


NOTHING: Final = Taken(0.0, 0.0, 0, 0, 0, math.inf)


def buckets_are_right(view: View) -> Iterator[str]:
    """Check what an answer's `x-ratelimit-*` say of the buckets of its key and its account: of the tightest of each kind.

    A bucket of requests is debited at admission, one of tokens by estimate then, and made right at settlement, up and
    down. Both are full again when their reset says so.
    """
    own: list[tuple[Owner, Bucket, dict[str, Taken]]] = []
    for owner in owners(view):
        defaults = (DEFAULT_REQUESTS, DEFAULT_TOKENS) if owner.scope == "key" else ()
        sights = [sight for sight in view.record.sights if owner.has(view, sight) and _may_take(sight)]
        own += [
            (owner, bucket, {sight.request_id: _taken(view, sight, bucket.kind) for sight in sights})
            for bucket in owner.plan.buckets(*defaults)
        ]
    for sight in view.record.sights:
        if "idempotent-replayed" not in sight.headers:
            for kind in ("requests", "tokens"):
                buckets = [each for each in own if each[1].kind == kind and each[0].has(view, sight)]
                yield from _head_faults(view, sight, kind, buckets)


def _head_faults(
    view: View, sight: Sight, kind: str, buckets: list[tuple[Owner, Bucket, dict[str, Taken]]]
) -> Iterator[str]:
    """Find what an answer's head says wrong of its buckets of a kind: it is right for one, and no other has surely less."""
    told = [sight.headers.get(f"x-ratelimit-{name}-{kind}") for name in ("limit", "remaining", "reset")]
    limit, remaining, reset = told
    if limit is None or remaining is None or reset is None:
        if sight.status == 200 and "x-mesh-model" in sight.headers:
            yield f"{sight.request_id}: its bucket of {kind} is {remaining} of {limit}, full in {reset}"
        return
    head = Head(limit, int(remaining), reset)
    faults = [next(_bucket_faults(view, sight, each, head), None) for each in buckets]
    if all(faults):
        yield str(faults[0])
    elif not most_workers(view, sight):
        for owner, bucket, taken in (each for each, fault in zip(buckets, faults, strict=True) if fault):
            _, most = _levels(view, sight, bucket, taken)
            changed = owner.scope == "key" and kind == "requests" and _changes_by(view, sight)
            if max(0, math.floor(most)) < head.remaining and not changed:
                tighter = f"{owner.name} has {most:.1f} of {bucket.limit:g}"
                yield f"{sight.request_id}: {remaining} of {limit} {kind} remain, and {tighter}"


class Head(NamedTuple):
    """What an answer's head says of a bucket."""

    limit: str
    remaining: int
    reset: str


def _bucket_faults(
    view: View, sight: Sight, of: tuple[Owner, Bucket, Mapping[str, Taken]], head: Head
) -> Iterator[str]:
    """Find what is wrong with an answer's head if it is about this bucket."""
    owner, bucket, taken = of
    limit, remaining, reset = head
    changes = _changes_by(view, sight) if owner.scope == "key" and bucket[::3] == ("requests", MINUTE_S) else set()
    if limit != str(bucket.limit):
        if limit not in changes:
            yield f"{sight.request_id} has a limit of {limit} {bucket.kind}, and {bucket.limit} would be right"
            return
        bucket = bucket._replace(limit=int(limit), size=owner.plan.burst or int(limit))
    shares, reset_s = most_workers(view, sight), seconds(reset)
    if shares:
        if not any(_is_share(bucket, workers, remaining, reset_s) for workers in range(1, shares + 1)):
            yield f"{sight.request_id}: {remaining} of {limit} {bucket.kind}, full in {reset}, is no share of {shares} workers"
        return
    least, most = (-math.inf, float(bucket.size)) if changes else _levels(view, sight, bucket, taken)
    if not least - 1 < remaining <= max(0, most):
        yield f"{sight.request_id}: {remaining} of {limit} {bucket.kind} remain, and {least:.1f} to {most:.1f} may"
        return
    low = max(least, remaining) if remaining or bucket.kind == "requests" else least  # tokens may be owed
    high = min(most, remaining + 1)
    if not bucket.told_s(high) - CLOCK_S <= reset_s <= (math.inf if low == -math.inf else bucket.told_s(low)):
        yield f"{sight.request_id}: {bucket.kind} are to be full in {reset}, with {remaining} of {limit} and {low} to {high}"


def _levels(view: View, sight: Sight, bucket: Bucket, taken: Mapping[str, Taken]) -> tuple[float, float]:
    """Return the least and the most that a bucket may have after a request's admission."""
    if _is_unknown(view, sight):
        return -math.inf, float(bucket.size)
    others = [other for name, other in taken.items() if name != sight.request_id]
    own = taken.get(sight.request_id, NOTHING)
    began_at, until = sight.began_at, _admitted_by(view, sight)
    most = level_at_most(bucket, others, began_at, until) - own.least
    return level_at_least(bucket, others, began_at, until) - own.most - bucket.limit * CLOCK_S // bucket.period_s, most


def _is_share(bucket: Bucket, workers: int, remaining: int, reset_s: float) -> bool:
    """Whether a reset is right for what remains of a worker's share of a bucket, of one that so many have."""
    share = bucket._replace(limit=max(bucket.limit / workers, 1.0), size=max(bucket.size / workers, 1.0))
    longest_s = share.told_s(remaining) if remaining or bucket.kind == "requests" else math.inf
    return remaining <= share.size and share.told_s(min(share.size, remaining + 1)) - CLOCK_S <= reset_s <= longest_s


def seconds(text: str) -> float:
    """Return the seconds of a reset: `120ms`, `1s`, `6m0s`, `1h0m0s`."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?|(\d+)ms", text)
    if found is None or not text:
        return math.nan
    hours, minutes, whole, millis = (int(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + whole + millis / 1000


def _changes_by(view: View, sight: Sight) -> set[str]:
    """Return the limits of requests that a request's key may have been given before it ended."""
    return {
        str(done.amount)
        for done in view.record.changes
        if done.what == "requests_per_minute" and done.key == sight.request.key and done.began_at <= sight.ended_at
    }


def _is_unknown(view: View, sight: Sight) -> bool:
    """Whether the level of a bucket can't be known: the store's clock has jumped, a failover lost what was taken.

    Or instances may have admitted requests by themselves.
    """
    began = {trouble.what for trouble in view.record.troubles if trouble.start <= sight.ended_at}
    jumps_at = view.first_jump
    return bool("failover" in began or (began and not view.is_strict) or sight.ended_at > jumps_at - 2 * LATENCY_S)


def level_at_most(bucket: Bucket, others: Iterable[Taken], began_at: float, until: float) -> float:
    """Return the most that a bucket may have between two times, given what took from it before."""
    steps = [(other.from_, -other.least) for other in others if other.until < began_at]
    for other in others:
        change = (other.most if other.until < began_at else 0) - other.used
        if other.settled_at < began_at - CLOCK_S or (change > 0 and other.settled_at <= until + CLOCK_S):
            steps.append((other.settled_at, change))
    return _level(bucket, steps, until)


def level_at_least(bucket: Bucket, others: Iterable[Taken], began_at: float, until: float) -> float:
    """Return the least that a bucket may have between two times, given what took from it before."""
    steps = [(min(max(other.until, other.last), began_at), -other.most) for other in others if other.from_ <= until]
    for other in others:
        change = other.least - other.used
        if other.settled_at < began_at - CLOCK_S or (change < 0 and other.settled_at <= until + CLOCK_S):
            steps.append((min(other.settled_at, began_at), change))
    return _level(bucket, steps, began_at)


def _level(bucket: Bucket, steps: list[tuple[float, int]], at: float) -> float:
    """Return what a bucket has at a time, full at first, after changes at other times."""
    size, rate = bucket.size, bucket.rate
    level, last = float(size), -math.inf
    for when, change in sorted(steps):
        level = min(size, min(size, level + (when - last) * rate) + change)
        last = when
    return min(size, level + max(0.0, at - last) * rate)


def _may_take(sight: Sight) -> bool:
    """Whether a request may have been admitted: it has not been refused before."""
    return sight.ended != "whole" or sight.status not in REFUSED or "x-mesh-attempts" in sight.headers


def _taken(view: View, sight: Sight, kind: str) -> Taken:
    """Return what is known of what a request took."""
    event = next((each for each in view.settled.get(sight.request_id, ()) if each["hold"] != "none"), None)
    if event is None:  # nothing, or what its worker's end, a lost reply or a failover left behind
        most = 1 if kind == "requests" else max(tokens_taken(view, sight)[1], _used_at_most(view, sight))
        return Taken(sight.began_at, math.inf, 0, most, 0, math.inf)
    settled_at = int(event["settled_ms"]) / 1000 - view.first_offset_s
    others = (what for what in STORE if what != "clock")
    is_late = view.clock_jumps and view.feels(sight, *others, until=over_at(view, sight))
    if is_late or over_at(view, sight) > view.first_jump - LATENCY_S:
        settled_at = math.inf  # by which clock isn't known
    until = min(_admitted_by(view, sight), settled_at)
    if kind == "requests":  # which is never given back
        return Taken(sight.began_at, until, 1, 1, 1, settled_at)
    least, most = tokens_taken(view, sight)
    used = int(event["prompt_tokens"]) + int(event["completion_tokens"])
    has_slices = sight.request.stream and sight.request.max_tokens is None
    if settled_at == math.inf:  # it may be settled already
        least, most = min(least, used), max(most, used)
    return Taken(sight.began_at, until, least, most, used, settled_at, settled_at if has_slices else -math.inf)


def _used_at_most(view: View, sight: Sight) -> int:
    """Return the most tokens that a request may have been settled with, of which nothing is known any more."""
    used = [prompt_tokens(call.body) + CITATION_TOKENS + call.made for call in view.own_calls(sight)[-1:]]
    return estimates(0, max(used, default=0))[1]


def tokens_taken(view: View, sight: Sight) -> tuple[int, int]:
    """Return the least and the most tokens that an admitted request took by estimate."""
    calls = view.calls.get(sight.marker, [])
    n, cap = sight.request.n, sight.request.max_tokens
    prompts = [least_held(body) for body in ([call.body for call in calls] or [json.loads(sight.body)])]
    output = (cap or DEFAULT_OUTPUT_TOKENS) * n
    most = max(*prompts, len(sight.body) // BYTES_A_TOKEN) + _frame_tokens(sight) + output
    if cap is None and sight.request.stream:  # slices beyond the estimate
        seen = max(
            (estimates(call.shown_begun, call.shown_begun, TOOL_NAME_TOKENS * n)[1] for call in calls), default=0
        )
        most += max(0, min(seen + LEASE_TOKENS * n, MAX_OUTPUT_TOKENS * n) - output)
    return min(prompts) + output, most


def _admitted_by(view: View, sight: Sight) -> float:
    """Return the time by which a request was admitted or refused: its provider was asked, or its client got bytes.

    The admission of a client that left may still be on its way.
    """
    alone = len(view.group(sight)) == 1
    asked = [call.at for call in view.calls.get(sight.marker, ()) if alone]
    ended_at = sight.ended_at if sight.ended == "whole" else math.inf
    return min([*asked[:1], *(at for at, _ in sight.times[:1]), ended_at])


def _frame_tokens(sight: Sight) -> int:
    """Return the tokens that the estimate adds at most to a request's bytes, for its messages and fields."""
    return TOKENS_OF_FRAMES + TOKENS_OF_A_MESSAGE * sum(len(TURNS[name]) for name in sight.request.turns)


def most_reserved(sight: Sight) -> int:
    """Return the most tokens that an admission takes: a token for three bytes, some for the message, and the output."""
    prompt = (
        len(sight.body) // BYTES_A_TOKEN + _frame_tokens(sight) + (TEMPLATE_TOKENS if sight.request.template else 0)
    )
    return prompt + (sight.request.max_tokens or DEFAULT_OUTPUT_TOKENS) * sight.request.n


def _slots_taken(view: View, owner: Owner, most: int) -> Iterator[str]:
    markers = {sight.marker for sight in view.record.sights if owner.has(view, sight)}
    calls = [call for call in view.record.calls if call.marker in markers and call.ended_at - call.at > LATENCY_S]
    for call in calls:
        open_ = {other.marker for other in calls if other.at <= call.at < other.ended_at - LATENCY_S / 2}
        if len(open_) > most and {trouble.what for trouble in view.record.troubles} <= {"killed"}:
            yield f"{owner.name}: {len(open_)} requests run at once, and {most} may"
            return
