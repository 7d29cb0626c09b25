"""Which of a model's equals is asked first, and who is passed over for now.

Pure: how each does at this moment comes in as its `Standing`, the random number is in the order that the catalogue drew.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import groupby

from meshproxy.policy.catalog import Attempt
from meshproxy.value import Value

DECAY_S = 10.0  # a slow answer weighs 1/e of itself after so long, if faster ones came since
FORGET_S = 60.0  # after so long without an answer nothing is known


class Standing(Value, frozen=True):
    """How a route does. `latency_s`: the peak EWMA of its time to the first event, 0.0 if unknown; `ejected_s`: how much
    longer it should be left alone, 0.0 if it needn't be; `is_open`: its breaker lets nothing through.
    """

    latency_s: float = 0.0
    in_flight: int = 0
    ejected_s: float = 0.0
    is_open: bool = False


StandingOf = Callable[[Attempt], Standing]


class PeakEwma:
    """A latency that believes a slow answer at once and a fast one slowly, so that trouble is seen early (Finagle's Peak EWMA).
    Times are monotonic seconds.
    """

    __slots__ = ("_at", "_value_s")

    def __init__(self) -> None:
        self._value_s = 0.0
        self._at = -math.inf

    def observe(self, seconds: float, now: float) -> None:
        """An answer took so long."""
        if seconds >= self._value_s or now - self._at >= FORGET_S:
            self._value_s = seconds
        else:
            kept = math.exp((self._at - now) / DECAY_S)
            self._value_s = self._value_s * kept + seconds * (1.0 - kept)
        self._at = now

    def read(self, now: float) -> float:
        """The latency, or 0.0 if it isn't known."""
        return self._value_s if now - self._at < FORGET_S else 0.0


def arrange(attempts: Sequence[Attempt], standing_of: StandingOf, session: str | None) -> list[Attempt]:
    """The attempts in the order to try them. Each group of equals keeps its place; those whose breaker is open are left out,
    and those that were ejected go to the end, as a last resort, the first to come back first.

    Of a group never more than half are ejected or open together, as long as ejecting is a choice: load that half of them
    can't carry would only bring the others down. A route without equals may be, for there is a fallback or there is no other.
    """
    willing: list[Attempt] = []
    ejected: list[tuple[float, Attempt]] = []
    for group in _groups(attempts):
        standings = [(attempt, standing_of(attempt)) for attempt in group]
        closed = [(attempt, standing) for attempt, standing in standings if not standing.is_open]
        most = max(1, len(group) // 2) - (len(group) - len(closed))
        out = _longest_ejected(closed, most)
        ejected += [(standing.ejected_s, attempt) for attempt, standing in out]
        willing += _ordered([pair for pair in closed if pair not in out], session)
    return willing + [attempt for _, attempt in sorted(ejected, key=lambda pair: pair[0])]


_Pairs = list[tuple[Attempt, Standing]]


def _groups(attempts: Iterable[Attempt]) -> Iterable[list[Attempt]]:
    """Weighted neighbours of one model together, every other attempt alone."""
    for (_, weighted), neighbours in groupby(attempts, key=lambda attempt: (attempt.model, attempt.weight is not None)):
        if weighted:
            yield list(neighbours)
        else:
            yield from ([attempt] for attempt in neighbours)


def _longest_ejected(pairs: _Pairs, most: int) -> _Pairs:
    out = [pair for pair in pairs if pair[1].ejected_s > 0.0]
    out.sort(key=lambda pair: pair[1].ejected_s, reverse=True)
    return out[: max(0, most)]


def _ordered(pairs: _Pairs, session: str | None) -> list[Attempt]:
    """By affinity to the session, where there is one; else as drawn, but that the second goes first if it is better off."""
    if len(pairs) < 2:
        return [attempt for attempt, _ in pairs]
    if session is not None:
        return sorted((attempt for attempt, _ in pairs), key=lambda attempt: _distance(session, attempt))
    if _is_worse(pairs):
        pairs[0], pairs[1] = pairs[1], pairs[0]
    return [attempt for attempt, _ in pairs]


def _is_worse(pairs: _Pairs) -> bool:
    """Power of two choices: both were drawn by weight, and the first is kept unless the second, with this request on top, would
    still be better off. So among equals that do equally well the weights alone decide. (Mitzenmacher, "The Power of Two
    Choices in Randomized Load Balancing", 2001; load as latency times requests in flight: Finagle.)
    """
    (first, now), (second, then) = pairs[:2]
    mean = sum(attempt.share for attempt, _ in pairs) / len(pairs)
    known = now.latency_s > 0.0 and then.latency_s > 0.0
    load = 1.0 + now.in_flight * mean / first.share
    load_after = 1.0 + (then.in_flight + 1) * mean / second.share
    if known:
        return now.latency_s * load > then.latency_s * load_after
    return load > load_after


def _distance(session: str, attempt: Attempt) -> float:
    """Weighted rendezvous hashing: the nearest serves the session, everywhere and without anything to remember; when it is
    away the next nearest does, and no other session moves. (Thaler and Ravishankar, 1998; the weights: Schindelhauer and
    Schomaker, "Weighted distributed hash tables", 2005.)
    """
    name = f"{session}\0{attempt.upstream}\0{attempt.upstream_model}"
    digest = blake2b(name.encode(), digest_size=8).digest()
    point = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return -math.log(point) / attempt.share
