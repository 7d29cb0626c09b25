"""Rules on limits: the requests, tokens and slots that a key may have, and what its buckets say of them."""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from simulation.bills import BYTES_A_TOKEN, TOKENS_OF_FRAMES, TOOL_NAME_TOKENS, estimates, least_held
from simulation.client import Sight
from simulation.history import DEFAULT_OUTPUT_TOKENS, LEASE_TOKENS, MAX_OUTPUT_TOKENS, TURNS
from simulation.provider import TOKENS_OF_A_MESSAGE
from simulation.reasons import TEMPLATE_TOKENS
from simulation.record import LATENCY_S, View

CLOCK_S: Final = 0.002  # the store's clock has milliseconds


def limits_hold(view: View) -> Iterator[str]:
    """No more requests are admitted than a key's bucket and its slots allow."""
    if not view.is_strict or view.is_lossy or any(trouble.what == "clock" for trouble in view.record.troubles):
        return
    for number, key in enumerate(view.history.keys):
        ran = [
            sight for sight in view.record.sights if sight.request.key == number and view.settled.get(sight.request_id)
        ]
        limits = [
            key.requests_per_minute,
            *(done.amount for done in view.record.changes if done.what == "requests_per_minute" and done.key == number),
        ]
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


class Taken(NamedTuple):
    """What a request took from its key's bucket of tokens, where bounds are all that is known of it.

    It was admitted between `from_` and `until`. `least` and `most`: what it took by estimate, `used`: what it was made
    right to at `settled_at`.
    """

    from_: float
    until: float
    least: int
    most: int
    used: int
    settled_at: float


def buckets_are_right(view: View) -> Iterator[str]:
    """Check that a bucket of tokens is debited by estimate at admission, and made right at settlement, up and down.

    When something was settled is known by the store's clock alone: a jump of it, also a later one, hides that.
    """
    if any(trouble.what == "clock" for trouble in view.record.troubles):
        return
    for number, key in enumerate(view.history.keys):
        size = key.tokens_per_minute
        if size is None:
            continue
        ours = [sight for sight in view.record.sights if sight.request.key == number]
        taken = {sight.request_id: _taken(view, sight) for sight in ours if view.settled.get(sight.request_id)}
        unsettled = [
            sight.began_at
            for sight in ours
            if sight.request_id not in taken and view.calls.get(sight.marker) and len(view.group(sight)) == 1
        ]
        for sight in ours:
            remaining = sight.headers.get("x-ratelimit-remaining-tokens")
            if (
                remaining is None
                or sight.headers.get("x-ratelimit-limit-tokens") != str(size)
                or "idempotent-replayed" in sight.headers
                or view.clock_jumps
                or any(trouble.start <= sight.ended_at for trouble in view.record.troubles)
                or any(began_at <= sight.ended_at for began_at in unsettled)  # of a worker that was killed later
            ):
                continue
            others = [other for name, other in taken.items() if name != sight.request_id]
            own = taken.get(sight.request_id)
            began_at, until = sight.began_at, _admitted_by(view, sight)
            most = level_at_most(size, others, began_at, until) - (own.least if own else 0)
            least = level_at_least(size, others, began_at, until) - (own.most if own else 0)
            if not least - 1 < int(remaining) <= max(0, most):
                yield f"{sight.request_id}: {remaining} of {size} tokens remain, and {least:.1f} to {most:.1f} may"


def level_at_most(size: int, others: Iterable[Taken], began_at: float, until: float) -> float:
    """Return the most that a bucket of `size` a minute may have between two times, given what took from it before."""
    steps = [(other.from_, -other.least) for other in others if other.until < began_at]
    for other in others:
        change = (other.most if other.until < began_at else 0) - other.used
        if other.settled_at < began_at - CLOCK_S or (change > 0 and other.settled_at <= until + CLOCK_S):
            steps.append((other.settled_at, change))
    return _level(size, steps, until)


def level_at_least(size: int, others: Iterable[Taken], began_at: float, until: float) -> float:
    """Return the least that a bucket of `size` a minute may have between two times, given what took from it before."""
    steps = [(min(other.until, began_at), -other.most) for other in others if other.from_ <= until]
    for other in others:
        change = other.least - other.used
        if other.settled_at < began_at - CLOCK_S or (change < 0 and other.settled_at <= until + CLOCK_S):
            steps.append((other.settled_at, change))
    return _level(size, steps, began_at)


def _level(size: int, steps: list[tuple[float, int]], at: float) -> float:
    """Return what a bucket of `size` a minute has at a time, full at first, after changes at other times."""
    level, last = float(size), -math.inf
    for when, change in sorted(steps):
        level = min(size, min(size, level + (when - last) * size / 60) + change)
        last = when
    return min(size, level + max(0.0, at - last) * size / 60)


def _taken(view: View, sight: Sight) -> Taken:
    """Return what is known of what an admitted request took."""
    calls = view.calls.get(sight.marker, [])
    n, cap = sight.request.n, sight.request.max_tokens
    messages = [call.body["messages"] for call in calls] or [json.loads(sight.body).get("messages", [])]
    prompts = [least_held(each) for each in messages]
    output = (cap or DEFAULT_OUTPUT_TOKENS) * n
    most = max(*prompts, len(sight.body) // BYTES_A_TOKEN) + _frame_tokens(sight) + output
    if cap is None and sight.request.stream:  # slices beyond the estimate
        seen = max(
            (estimates(call.shown_begun, call.shown_begun, TOOL_NAME_TOKENS * n)[1] for call in calls), default=0
        )
        most += max(0, min(seen + LEASE_TOKENS * n, MAX_OUTPUT_TOKENS * n) - output)
    event = view.settled[sight.request_id][0]
    used = int(event["prompt_tokens"]) + int(event["completion_tokens"])
    settled_at = int(event["settled_ms"]) / 1000 - view.record.store_offset_s
    until = min(_admitted_by(view, sight), settled_at)
    return Taken(sight.began_at, until, min(prompts) + output, most, used, settled_at)


def _admitted_by(view: View, sight: Sight) -> float:
    """Return the time by which a request was admitted or refused: its provider was asked, or its client got bytes."""
    alone = len(view.group(sight)) == 1
    asked = [call.at for call in view.calls.get(sight.marker, ()) if alone]
    return min([*asked[:1], *(at for at, _ in sight.times[:1]), sight.ended_at])


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
        if len(open_) > most and not view.record.troubles:
            yield f"k{number}: {len(open_)} requests run at once, and {most} may"
            return
