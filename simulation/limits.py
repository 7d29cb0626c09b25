"""Rules on limits: the requests, tokens and slots that a key may have, and what its buckets say of them."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from simulation.bills import BYTES_A_TOKEN, TOKENS_OF_FRAMES, TOOL_NAME_TOKENS, estimates, least_held, over_at
from simulation.client import Sight
from simulation.history import DEFAULT_OUTPUT_TOKENS, LEASE_TOKENS, MAX_OUTPUT_TOKENS, TURNS
from simulation.provider import TOKENS_OF_A_MESSAGE
from simulation.reasons import (
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
REFUSED: Final = frozenset({401, 402, 403, 404, 409, 422, 429})  # by the gateway, before a request takes anything


def limits_hold(view: View) -> Iterator[str]:
    """No more requests are admitted than a key's bucket and its slots allow."""
    if not view.is_strict:
        yield from _shares_passed(view)
        return
    for number, key in enumerate(view.history.keys):
        ran = [
            sight
            for sight in view.record.sights
            if sight.request.key == number
            and view.settled.get(sight.request_id)
            and sight.ended_at < view.first_jump - LATENCY_S  # by a clock that is known
            and not any(each.loses(sight.began_at, _admitted_by(view, sight)) for each in view.record.troubles)
        ]
        limits = _limits_of(view, number)
        if all(limit is not None for limit in limits):
            rate = max(limit for limit in limits if limit is not None) / 60
            size = key.burst or rate * 60
            ordered = sorted(ran, key=lambda sight: sight.began_at)
            for first in range(len(ordered)):
                for last in range(first, len(ordered)):
                    ends = min(
                        max(sight.ended_at for sight in ordered[first : last + 1]),
                        ordered[last].began_at + LATENCY_S * 10,
                    )
                    if last - first + 1 > size + (ends - ordered[first].began_at) * rate + 1e-6:
                        yield (
                            f"k{number}: {last - first + 1} requests of {size:g} and {rate:g}/s from"
                            f" {ordered[first].request_id} to {ordered[last].request_id}"
                        )
                        return
        if key.max_parallel is not None:
            yield from _slots_taken(view, number, key.max_parallel)


def _shares_passed(view: View) -> Iterator[str]:
    """Find a worker that admitted more requests of a key in an outage than its share of the bucket, or of the slots.

    The share is by how many workers it knew, and at least one (docs/ledger.md). No admission by the store renews it meanwhile.
    """
    for trouble in view.record.troubles:
        if trouble.what not in {"gone", "refused", "full"} or view.clock_jumps:
            continue
        admitted: dict[tuple[str, int], list[Sight]] = {}
        for sight in sorted(view.record.sights, key=lambda sight: sight.began_at):
            if trouble.start <= sight.began_at and _admitted_by(view, sight) <= trouble.end - RECOVERY_S:
                for event in view.settled.get(sight.request_id, ()):
                    if event["hold"] == "none" and not may_lose_hold(view, sight):
                        admitted.setdefault((event["hold_id"][:WORKER_CHARACTERS], sight.request.key), []).append(sight)
        for (worker, number), sights in admitted.items():
            known = known_workers(view, worker, sights[-1].began_at)
            key, limits = view.history.keys[number], _limits_of(view, number)
            if None not in limits:
                limit = max(each for each in limits if each is not None)
                size, rate = max((key.burst or limit) / known, 1.0), max(limit / known, 1.0) / 60
                for first, last in itertools.combinations_with_replacement(range(len(sights)), 2):
                    took_s = _admitted_by(view, sights[last]) - sights[first].began_at
                    if last - first + 1 > size + took_s * rate + 1e-6:
                        yield f"k{number}: {worker} admitted {last - first + 1} requests in {took_s:.1f} s of a share of {size:g}"
                        return
            if key.tokens_per_minute is not None:
                size = max(key.tokens_per_minute / known, 1.0)
                for first, last in itertools.combinations(range(len(sights)), 2):
                    took_s = _admitted_by(view, sights[last]) - sights[first].began_at
                    *before, own = (tokens_taken(view, sight)[0] for sight in sights[first : last + 1])
                    if sum(before) + min(own, size) > size + took_s * size / 60 + 1e-6:  # none for more than it has
                        tokens = f"{sum(before)} tokens and {own}"
                        yield f"k{number}: {worker} admitted {tokens} in {took_s:.1f} s of a share of {size:g}"
                        return
            if key.max_parallel is not None:
                share = min(key.max_parallel, max(key.max_parallel // known, 1))
                calls = [call for sight in sights for call in view.own_calls(sight)]
                for call in calls:
                    open_ = {other.marker for other in calls if other.at <= call.at < other.ended_at - LATENCY_S / 2}
                    if len(open_) > share:
                        yield f"k{number}: {len(open_)} requests run at once at {worker}, and {share} may"
                        return


def _limits_of(view: View, number: int) -> list[int | None]:
    """Return the requests a minute that a key had at some time."""
    return [view.history.keys[number].requests_per_minute, *changed_limits(view, number)]


class Bucket(NamedTuple):
    """A key's bucket of requests or of tokens: what it regains a minute, and what it has when it is full."""

    kind: str
    limit: float
    size: float

    def told_s(self, level: float) -> float:
        """Return the reset that is told at a level: the time until it is full, in whole ms, or in whole seconds from 1 s on."""
        millis = math.ceil(round((self.size - level) * 60_000 / self.limit, 3))
        return millis / 1000 if millis < 1000 else math.ceil(millis / 1000)


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
    """Check what an answer's `x-ratelimit-*` say of its key's buckets.

    A bucket of requests is debited at admission, one of tokens by estimate then, and made right at settlement, up and
    down. Both are full again when their reset says so.
    """
    for number, key in enumerate(view.history.keys):
        ours = [sight for sight in view.record.sights if sight.request.key == number]
        requests = key.requests_per_minute or DEFAULT_REQUESTS
        tokens = key.tokens_per_minute or DEFAULT_TOKENS
        for bucket in (Bucket("requests", requests, key.burst or requests), Bucket("tokens", tokens, tokens)):
            taken = {sight.request_id: _taken(view, sight, bucket.kind) for sight in ours if _may_take(sight)}
            for sight in ours:
                if "idempotent-replayed" not in sight.headers:
                    yield from _bucket_faults(view, sight, bucket, taken)


def _bucket_faults(view: View, sight: Sight, bucket: Bucket, taken: Mapping[str, Taken]) -> Iterator[str]:
    """Find what an answer's head says wrong of a bucket."""
    limit, remaining, reset = (
        sight.headers.get(f"x-ratelimit-{name}-{bucket.kind}") for name in ("limit", "remaining", "reset")
    )
    if limit is None or remaining is None or reset is None:
        if sight.status == 200 and "x-mesh-model" in sight.headers:
            yield f"{sight.request_id}: its bucket of {bucket.kind} is {remaining} of {limit}, full in {reset}"
        return
    changes = _changes_by(view, sight) if bucket.kind == "requests" else set()
    if limit != str(bucket.limit):
        if limit not in changes:
            yield f"{sight.request_id} has a limit of {limit} {bucket.kind}, and {bucket.limit} would be right"
            return
        bucket = bucket._replace(limit=int(limit), size=view.history.keys[sight.request.key].burst or int(limit))
    shares, reset_s = most_workers(view, sight), seconds(reset)
    if shares:
        if not any(_is_share(bucket, workers, int(remaining), reset_s) for workers in range(1, shares + 1)):
            yield f"{sight.request_id}: {remaining} of {limit} {bucket.kind}, full in {reset}, is no share of {shares} workers"
        return
    least, most = -math.inf, float(bucket.size)
    if not changes and not _is_unknown(view, sight):
        others = [other for name, other in taken.items() if name != sight.request_id]
        own = taken.get(sight.request_id, NOTHING)
        began_at, until = sight.began_at, _admitted_by(view, sight)
        most = level_at_most(bucket, others, began_at, until) - own.least
        least = level_at_least(bucket, others, began_at, until) - own.most - bucket.limit * CLOCK_S // 60
    if not least - 1 < int(remaining) <= max(0, most):
        yield f"{sight.request_id}: {remaining} of {limit} {bucket.kind} remain, and {least:.1f} to {most:.1f} may"
        return
    low = max(least, int(remaining)) if int(remaining) or bucket.kind == "requests" else least  # tokens may be owed
    high = min(most, int(remaining) + 1)
    if not bucket.told_s(high) - CLOCK_S <= reset_s <= (math.inf if low == -math.inf else bucket.told_s(low)):
        yield f"{sight.request_id}: {bucket.kind} are to be full in {reset}, with {remaining} of {limit} and {low} to {high}"


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
    size, rate = bucket.size, bucket.limit / 60
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
    if event is None:  # nothing, or what its worker's end or a lost reply left behind
        most = 1 if kind == "requests" else tokens_taken(view, sight)[1]
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
    return Taken(sight.began_at, until, least, most, used, settled_at, settled_at if has_slices else -math.inf)


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


def _slots_taken(view: View, number: int, most: int) -> Iterator[str]:
    plans = {sight.marker: sight.request for sight in view.record.sights}
    calls = [
        call
        for call in view.record.calls
        if call.marker in plans and plans[call.marker].key == number and call.ended_at - call.at > LATENCY_S
    ]
    for call in calls:
        open_ = {other.marker for other in calls if other.at <= call.at < other.ended_at - LATENCY_S / 2}
        if len(open_) > most and {trouble.what for trouble in view.record.troubles} <= {"killed"}:
            yield f"k{number}: {len(open_)} requests run at once, and {most} may"
            return
