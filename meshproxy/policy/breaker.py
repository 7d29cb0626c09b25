"""A circuit breaker: stops asking an upstream that fails, and finds out with one request at a time whether it has come back.

Closed, it counts; open, it lets nothing through until its time is up; half-open, it lets one probe through, whose outcome closes
it or opens it for longer. It reads no clock and draws no number: both come as arguments, `now` in monotonic seconds.
(Nygard, "Release It!", "Circuit Breaker".)
"""

from typing import Literal

from meshproxy.policy.window import Window
from meshproxy.value import Value

State = Literal["closed", "open", "half-open"]


class Tolerance(Value, frozen=True, kw_only=True):
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
