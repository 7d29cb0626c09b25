"""The health of routes: retry budget, circuit breakers, latency, and the order in which candidates are tried.

A breaker is closed, open or half-open: enough failures open it, it lets one probe through after a time (half-open), and
the probe's success closes it. Times are monotonic seconds that never go back. The state of each object has a fixed
size.
"""

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Literal

from msgspec import Struct

from meshproxy.policy.catalog import Candidate, groups_of_equals


class Window:
    """Counts calls, and those that were marked, over about the last `width_s` seconds.

    Two fixed windows are kept; the elder counts by the share of it that still lies in the sliding window.
    """

    __slots__ = ("_began", "_elder", "_elder_marked", "_now", "_width_s", "_younger", "_younger_marked")

    def __init__(self, width_s: float) -> None:
        self._width_s = width_s
        self.reset()

    def reset(self) -> None:
        """Reset all counts."""
        self._began = self._now = 0.0
        self._elder = self._elder_marked = self._younger = self._younger_marked = 0

    def add(self, now: float, *, marked: bool) -> None:
        """Count one call."""
        if now - self._began >= self._width_s:
            self._turn(now)
        self._now = now
        self._younger += 1
        self._younger_marked += marked

    def advance(self, now: float) -> None:
        """Slide the window on to `now`."""
        if now - self._began >= self._width_s:
            self._turn(now)
        self._now = now

    @property
    def calls(self) -> float:
        """The calls counted in the window."""
        return self._younger + self._elder * self._share()

    @property
    def marked(self) -> float:
        """The marked calls counted in the window."""
        return self._younger_marked + self._elder_marked * self._share()

    def _share(self) -> float:
        return 1.0 - (self._now - self._began) / self._width_s

    def _turn(self, now: float) -> None:
        """Begin a new window. The last one becomes the elder, unless it ended more than a window ago."""
        adjacent = now - self._began < 2 * self._width_s
        self._elder, self._elder_marked = (self._younger, self._younger_marked) if adjacent else (0, 0)
        self._younger = self._younger_marked = 0
        self._began = self._began + self._width_s if adjacent else now


RETRY_SHARE = 0.2  # extra attempts for each request
RETRY_FLOOR = 10.0  # extra attempts in a window without requests, so that a quiet worker can fail over too
WINDOW_S = 10.0


class RetryBudget:
    """Bounds one worker's extra attempts, over about the last `window_s`, to a share of its requests plus a floor."""

    __slots__ = ("_floor", "_share", "_window")

    def __init__(self, share: float = RETRY_SHARE, floor: float = RETRY_FLOOR, window_s: float = WINDOW_S) -> None:
        self._share = share
        self._floor = floor
        self._window = Window(window_s)

    def deposit(self, now: float) -> None:
        """Count a request's first attempt."""
        self._window.add(now, marked=False)

    def withdraw(self, now: float) -> bool:
        """Return whether a request may make another attempt, and count the attempt if so."""
        window = self._window
        window.advance(now)
        extra = window.marked
        allowed = extra + 1 <= self._floor + self._share * (window.calls - extra)
        if allowed:
            window.add(now, marked=True)
        return allowed


State = Literal["closed", "open", "half-open"]


class BreakerSettings(Struct, frozen=True, kw_only=True):
    """When a breaker opens, and for how long.

    It opens after `consecutive` failures in a row, or when the share `failing` of at least `least_calls` calls in about
    `window_s` has failed. It stays open for `open_s`, doubled after each failed probe up to `most_open_s`, times a
    random 0.5 to 1.5. A probe without result after `probe_s` is given up.
    """

    consecutive: int = 10
    failing: float = 0.5
    least_calls: int = 20
    window_s: float = 30.0
    open_s: float = 5.0
    most_open_s: float = 60.0
    probe_s: float = 60.0


class Breaker:
    """A circuit breaker. While it is open, late results of requests from before it opened change nothing."""

    __slots__ = ("_in_a_row", "_open_s", "_probe_until", "_settings", "_state", "_until", "_window")

    _state: State
    _until: float
    _probe_until: float
    _open_s: float
    _in_a_row: int

    def __init__(self, settings: BreakerSettings | None = None) -> None:
        self._settings = settings or BreakerSettings()
        self._window = Window(self._settings.window_s)
        self._close()

    def state(self, now: float) -> State:
        """Return the state, as it would apply to a request now."""
        if self._state == "open" and now >= self._until:
            return "half-open"
        return self._state

    def allows(self, now: float) -> bool:
        """Return whether a request may go to the upstream. In half-open it becomes the probe: report its result."""
        if self._state == "closed":
            return True
        if now < (self._until if self._state == "open" else self._probe_until):
            return False
        self._state = "half-open"
        self._probe_until = now + self._settings.probe_s
        return True

    def retry_after_s(self, now: float) -> float:
        """Return the seconds until a request may be allowed; 0.0 if one may be now.

        When a probe will end isn't known: for as long as it is out, the seconds are those for which the breaker was open.
        """
        wait_s = self._until - now if self._state == "open" else min(self._probe_until - now, self._open_s)
        return max(0.0, wait_s)

    def succeeded(self, now: float) -> None:
        """Record a successful request; a probe's success closes the breaker."""
        if self._state == "closed":
            self._in_a_row = 0
            self._window.add(now, marked=False)
        elif self._state == "half-open":
            self._close()

    def failed(self, now: float, draw: float = 0.5) -> None:
        """Record a failure of the upstream.

        `draw`, random in [0, 1), spreads how long the breaker stays open, so that not all instances probe at once.
        """
        if self._state == "closed":
            self._in_a_row += 1
            self._window.add(now, marked=True)
            if self._has_enough():
                self._open(now, draw)
        elif self._state == "half-open":
            self._open_s = min(2 * self._open_s, self._settings.most_open_s)
            self._open(now, draw)

    def abandoned(self) -> None:
        """Record a request that shows nothing about the upstream, such as a hang-up. Another request may be the probe."""
        self._probe_until = 0.0

    def _has_enough(self) -> bool:
        settings = self._settings
        return self._in_a_row >= settings.consecutive or (
            self._window.calls >= settings.least_calls and self._window.marked >= settings.failing * self._window.calls
        )

    def _open(self, now: float, draw: float) -> None:
        self._state = "open"
        self._until = now + self._open_s * (0.5 + draw)

    def _close(self) -> None:
        self._state = "closed"
        self._until = self._probe_until = 0.0
        self._open_s = self._settings.open_s
        self._in_a_row = 0
        self._window.reset()


DECAY_S = 10.0  # the weight of a slow answer falls to 1/e in this time, if faster ones follow
FORGET_S = 60.0  # a latency older than this is unknown


class RouteHealth(Struct, frozen=True):
    """The health of one route, as the order of candidates depends on it.

    `latency_s`: the peak EWMA of its time to the first event, 0.0 if unknown. `ejected_s`: the seconds for which it is
    still avoided, 0.0 if it isn't. `is_open`: its breaker lets nothing through.
    """

    latency_s: float = 0.0
    in_flight: int = 0
    ejected_s: float = 0.0
    is_open: bool = False


RouteHealthOf = Callable[[Candidate], RouteHealth]


class PeakEwma:
    """A latency average that rises at once and falls gradually, to detect trouble early (Finagle's Peak EWMA).

    Times are monotonic seconds.
    """

    __slots__ = ("_at", "_value_s")

    def __init__(self) -> None:
        self._value_s = 0.0
        self._at = -math.inf

    def observe(self, seconds: float, now: float) -> None:
        """Record the time that an answer took, in seconds."""
        if seconds >= self._value_s or now - self._at >= FORGET_S:
            self._value_s = seconds
        else:
            kept = math.exp((self._at - now) / DECAY_S)
            self._value_s = self._value_s * kept + seconds * (1.0 - kept)
        self._at = now

    def read(self, now: float) -> float:
        """Return the latency in seconds, or 0.0 if it isn't known."""
        return self._value_s if now - self._at < FORGET_S else 0.0


def order_candidates(candidates: Sequence[Candidate], health_of: RouteHealthOf, session: str | None) -> list[Candidate]:
    """Return the candidates in the order to try them.

    Each group of equals keeps its place. Those whose breaker is open are left out. Ejected ones go to the end, as a
    last resort, the first to return first.

    At most half of a group is ejected or open together, as long as ejecting is a choice: fewer than half couldn't carry
    the load, and would fail too. A route without equals may be ejected, since there is a fallback or no other choice.
    """
    available: list[Candidate] = []
    ejected: list[tuple[float, Candidate]] = []
    for group in groups_of_equals(candidates, lambda candidate: candidate.model):
        healths = [(candidate, health_of(candidate)) for candidate in group]
        closed = [(candidate, health) for candidate, health in healths if not health.is_open]
        most = max(1, len(group) // 2) - (len(group) - len(closed))
        avoided = _longest_ejected(closed, most)
        ejected += [(health.ejected_s, candidate) for candidate, health in avoided]
        available += _ordered([pair for pair in closed if pair not in avoided], session)
    return available + [candidate for _, candidate in sorted(ejected, key=lambda pair: pair[0])]


_Pairs = list[tuple[Candidate, RouteHealth]]


def _longest_ejected(pairs: _Pairs, most: int) -> _Pairs:
    avoided = [pair for pair in pairs if pair[1].ejected_s > 0.0]
    avoided.sort(key=lambda pair: pair[1].ejected_s, reverse=True)
    return avoided[: max(0, most)]


def _ordered(pairs: _Pairs, session: str | None) -> list[Candidate]:
    """Return a group's order: by affinity to the session, else as drawn, with the second first if it is less loaded."""
    if len(pairs) < 2:
        return [candidate for candidate, _ in pairs]
    if session is not None:
        return sorted((candidate for candidate, _ in pairs), key=lambda candidate: _distance(session, candidate))
    if _is_worse(pairs):
        pairs[0], pairs[1] = pairs[1], pairs[0]
    return [candidate for candidate, _ in pairs]


def _is_worse(pairs: _Pairs) -> bool:
    """Return whether the first candidate of two is more loaded than the second would be with this request added.

    This is the power of two choices: both were drawn by weight, so among equally healthy ones the weights alone decide.
    (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001; load as latency times requests in
    flight: Finagle.)
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
    """Return a candidate's distance to a session by weighted rendezvous hashing; the nearest serves the session.

    All instances agree without stored state. When the nearest is unavailable the next one serves, and no other session
    moves. (Thaler and Ravishankar, 1998; the weights: Schindelhauer and Schomaker, "Weighted distributed hash tables",
    2005.)
    """
    name = f"{session}\0{candidate.upstream}\0{candidate.upstream_model}"
    digest = blake2b(name.encode(), digest_size=8).digest()
    point = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return -math.log(point) / candidate.share
