"""Calls, and how many of them were of a kind, over about the last so many seconds: what a rate is taken from."""

import math
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import groupby
from typing import Literal

from msgspec import Struct

from meshproxy.policy.catalog import Candidate


class Window:
    """Two fixed windows of `width_s`, of which the elder counts for as much of it as still lies in the sliding one. Times are
    monotonic seconds and never go back.
    """

    __slots__ = ("_began", "_elder", "_elder_marked", "_now", "_width_s", "_younger", "_younger_marked")

    def __init__(self, width_s: float) -> None:
        self._width_s = width_s
        self.forget()

    def forget(self) -> None:
        """As if nothing had been counted."""
        self._began = self._now = 0.0
        self._elder = self._elder_marked = self._younger = self._younger_marked = 0

    def add(self, now: float, *, marked: bool) -> None:
        """Count one call."""
        self.advance(now)
        self._younger += 1
        self._younger_marked += marked

    def advance(self, now: float) -> None:
        """Slide on to `now`."""
        if now - self._began >= self._width_s:
            self._turn(now)
        self._now = now

    @property
    def calls(self) -> float:
        """All that were counted."""
        return self._younger + self._elder * self._share()

    @property
    def marked(self) -> float:
        """Those of the kind."""
        return self._younger_marked + self._elder_marked * self._share()

    def _share(self) -> float:
        return 1.0 - (self._now - self._began) / self._width_s

    def _turn(self, now: float) -> None:
        """Begin a new window; the one before is the elder unless it is over for longer than a window."""
        adjacent = now - self._began < 2 * self._width_s
        self._elder, self._elder_marked = (self._younger, self._younger_marked) if adjacent else (0, 0)
        self._younger = self._younger_marked = 0
        self._began = self._began + self._width_s if adjacent else now


SHARE = 0.2  # extra attempts for each request
FLOOR = 10.0  # extra attempts in a window that need no requests behind them, so that a quiet worker can fail over too
WINDOW_S = 10.0


class RetryBudget:
    """One worker's budget, over about the last `window_s`."""

    __slots__ = ("_floor", "_share", "_window")

    def __init__(self, share: float = SHARE, floor: float = FLOOR, window_s: float = WINDOW_S) -> None:
        self._share = share
        self._floor = floor
        self._window = Window(window_s)

    def deposit(self, now: float) -> None:
        """A request makes its first attempt."""
        self._window.add(now, marked=False)

    def withdraw(self, now: float) -> bool:
        """Whether a request may make another attempt; a yes counts as one."""
        window = self._window
        window.advance(now)
        extra = window.marked
        allowed = extra + 1 <= self._floor + self._share * (window.calls - extra)
        if allowed:
            window.add(now, marked=True)
        return allowed


State = Literal["closed", "open", "half-open"]


class Tolerance(Struct, frozen=True, kw_only=True):
    """What an upstream is forgiven. It opens after `consecutive` failures in a row, or when of at least `least_calls` in about
    `window_s` the share `failing` failed. It stays open for `open_s`, twice as long after each probe that fails, `most_open_s`
    at most, and that times 0.5 to 1.5 by chance. A probe that hasn't come back after `probe_s` is given up.
    """

    consecutive: int = 10
    failing: float = 0.5
    least_calls: int = 20
    window_s: float = 30.0
    open_s: float = 5.0
    most_open_s: float = 60.0
    probe_s: float = 60.0


class Breaker:
    """The breaker of one route. What answers late, from before it opened, changes nothing while it is open."""

    __slots__ = ("_in_a_row", "_open_s", "_probe_until", "_state", "_tolerance", "_until", "_window")

    _state: State
    _until: float
    _probe_until: float
    _open_s: float
    _in_a_row: int

    def __init__(self, tolerance: Tolerance | None = None) -> None:
        self._tolerance = tolerance or Tolerance()
        self._window = Window(self._tolerance.window_s)
        self._close()

    def state(self, now: float) -> State:
        """What it would do with a request."""
        if self._state == "open" and now >= self._until:
            return "half-open"
        return self._state

    def allows(self, now: float) -> bool:
        """Whether a request may go to the upstream. In half-open a yes makes it the probe: say how it ended."""
        if self._state == "closed":
            return True
        if now < (self._until if self._state == "open" else self._probe_until):
            return False
        self._state = "half-open"
        self._probe_until = now + self._tolerance.probe_s
        return True

    def retry_after_s(self, now: float) -> float:
        """Seconds until it may allow something; 0.0 if it does already."""
        return max(0.0, (self._until if self._state == "open" else self._probe_until) - now)

    def succeeded(self, now: float) -> None:
        """A request was answered as it should be."""
        if self._state == "closed":
            self._in_a_row = 0
            self._window.add(now, marked=False)
        elif self._state == "half-open":
            self._close()

    def failed(self, now: float, spin: float = 0.5) -> None:
        """A request failed by the upstream's fault. `spin` in [0, 1) spreads how long it stays open, so that not all
        instances probe at once.
        """
        if self._state == "closed":
            self._in_a_row += 1
            self._window.add(now, marked=True)
            if self._has_enough():
                self._open(now, spin)
        elif self._state == "half-open":
            self._open_s = min(2 * self._open_s, self._tolerance.most_open_s)
            self._open(now, spin)

    def abandoned(self) -> None:
        """A request ended without saying anything of the upstream: the client hung up. A probe's place is free again."""
        self._probe_until = 0.0

    def _has_enough(self) -> bool:
        tolerance = self._tolerance
        return self._in_a_row >= tolerance.consecutive or (
            self._window.calls >= tolerance.least_calls
            and self._window.marked >= tolerance.failing * self._window.calls
        )

    def _open(self, now: float, spin: float) -> None:
        self._state = "open"
        self._until = now + self._open_s * (0.5 + spin)

    def _close(self) -> None:
        self._state = "closed"
        self._until = self._probe_until = 0.0
        self._open_s = self._tolerance.open_s
        self._in_a_row = 0
        self._window.forget()


DECAY_S = 10.0  # a slow answer weighs 1/e of itself after so long, if faster ones came since
FORGET_S = 60.0  # after so long without an answer nothing is known


class RouteHealth(Struct, frozen=True):
    """How a route does. `latency_s`: the peak EWMA of its time to the first event, 0.0 if unknown; `ejected_s`: how much
    longer it should be left alone, 0.0 if it needn't be; `is_open`: its breaker lets nothing through.
    """

    latency_s: float = 0.0
    in_flight: int = 0
    ejected_s: float = 0.0
    is_open: bool = False


RouteHealthOf = Callable[[Candidate], RouteHealth]


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


def arrange(attempts: Sequence[Candidate], standing_of: RouteHealthOf, session: str | None) -> list[Candidate]:
    """The attempts in the order to try them. Each group of equals keeps its place; those whose breaker is open are left out,
    and those that were ejected go to the end, as a last resort, the first to come back first.

    Of a group never more than half are ejected or open together, as long as ejecting is a choice: load that half of them
    can't carry would only bring the others down. A route without equals may be, for there is a fallback or there is no other.
    """
    willing: list[Candidate] = []
    ejected: list[tuple[float, Candidate]] = []
    for group in _groups(attempts):
        standings = [(candidate, standing_of(candidate)) for candidate in group]
        closed = [(candidate, standing) for candidate, standing in standings if not standing.is_open]
        most = max(1, len(group) // 2) - (len(group) - len(closed))
        out = _longest_ejected(closed, most)
        ejected += [(standing.ejected_s, candidate) for candidate, standing in out]
        willing += _ordered([pair for pair in closed if pair not in out], session)
    return willing + [candidate for _, candidate in sorted(ejected, key=lambda pair: pair[0])]


_Pairs = list[tuple[Candidate, RouteHealth]]


def _groups(attempts: Iterable[Candidate]) -> Iterable[list[Candidate]]:
    """Weighted neighbours of one model together, every other attempt alone."""
    for (_, weighted), neighbours in groupby(
        attempts, key=lambda candidate: (candidate.model, candidate.weight is not None)
    ):
        if weighted:
            yield list(neighbours)
        else:
            yield from ([candidate] for candidate in neighbours)


def _longest_ejected(pairs: _Pairs, most: int) -> _Pairs:
    out = [pair for pair in pairs if pair[1].ejected_s > 0.0]
    out.sort(key=lambda pair: pair[1].ejected_s, reverse=True)
    return out[: max(0, most)]


def _ordered(pairs: _Pairs, session: str | None) -> list[Candidate]:
    """By affinity to the session, where there is one; else as drawn, but that the second goes first if it is better off."""
    if len(pairs) < 2:
        return [candidate for candidate, _ in pairs]
    if session is not None:
        return sorted((candidate for candidate, _ in pairs), key=lambda candidate: _distance(session, candidate))
    if _is_worse(pairs):
        pairs[0], pairs[1] = pairs[1], pairs[0]
    return [candidate for candidate, _ in pairs]


def _is_worse(pairs: _Pairs) -> bool:
    """Power of two choices: both were drawn by weight, and the first is kept unless the second, with this request on top, would
    still be better off. So among equals that do equally well the weights alone decide. (Mitzenmacher, "The Power of Two
    Choices in Randomized Load Balancing", 2001; load as latency times requests in flight: Finagle.)
    """
    (first, now), (second, then) = pairs[:2]
    mean = sum(candidate.share for candidate, _ in pairs) / len(pairs)
    known = now.latency_s > 0.0 and then.latency_s > 0.0
    load = 1.0 + now.in_flight * mean / first.share
    load_after = 1.0 + (then.in_flight + 1) * mean / second.share
    if known:
        return now.latency_s * load > then.latency_s * load_after
    return load > load_after


def _distance(session: str, candidate: Candidate) -> float:
    """Weighted rendezvous hashing: the nearest serves the session, everywhere and without anything to remember; when it is
    away the next nearest does, and no other session moves. (Thaler and Ravishankar, 1998; the weights: Schindelhauer and
    Schomaker, "Weighted distributed hash tables", 2005.)
    """
    name = f"{session}\0{candidate.upstream}\0{candidate.upstream_model}"
    digest = blake2b(name.encode(), digest_size=8).digest()
    point = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return -math.log(point) / candidate.share
