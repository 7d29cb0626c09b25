"""Calls, and how many of them were of a kind, over about the last so many seconds: what a rate is taken from."""


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
