"""The retry budget: second attempts may not add more than a share to the load of first ones, so that a fleet of gateways
doesn't finish off a provider that is merely struggling. (Beyer et al., "Site Reliability Engineering", ch. 21 and 22;
Finagle's RetryBudget.) It reads no clock: `now` is monotonic seconds.
"""

from meshproxy.policy.window import Window

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
