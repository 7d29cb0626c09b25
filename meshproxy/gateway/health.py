"""How this worker's upstreams are doing: who is asked, who is spared, and what each attempt says of whom it asked.

All of it belongs to a route, an upstream with its name for the model: latency, load, rate limits and failures differ by model,
and a request that makes one model fail must not close the others to everybody. What is kept is bounded by the configuration.
"""

from collections.abc import Callable, Iterable, Sequence

from meshproxy.errors import Fault, Source, UpstreamFault, provider_not_available
from meshproxy.policy.balance import PeakEwma, Standing, arrange
from meshproxy.policy.breaker import Breaker
from meshproxy.policy.catalog import Attempt
from meshproxy.policy.failover import asks_to_wait_s, is_unwell

UNWELL_S = 10.0  # a failure counts as an answer that took so long, lest who fails fast look fast
OUTLIER_FAILURES = 3  # in a row on one route, before its breaker opens: its equals are asked first for OUTLIER_S
OUTLIER_S = 5.0


class Route:
    """One upstream's one model. `ejected_until` is monotonic seconds; `is_open`: whether its breaker isn't closed."""

    __slots__ = ("breaker", "ejected_until", "failures", "in_flight", "is_open", "latency")

    def __init__(self) -> None:
        self.breaker = Breaker()
        self.is_open = False
        self.latency = PeakEwma()
        self.in_flight = 0
        self.failures = 0  # in a row
        self.ejected_until = 0.0

    def standing(self, now: float) -> Standing:
        """How it does."""
        is_open = self.is_open and self.breaker.retry_after_s(now) > 0.0
        return Standing(self.latency.read(now), self.in_flight, max(0.0, self.ejected_until - now), is_open)


class Upstream:
    """One upstream's routes, by its names of their models. `is_open`: whether any of their breakers is, as was last told."""

    __slots__ = ("is_open", "name", "routes")

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_open = False
        self.routes: dict[str, Route] = {}

    def route(self, model: str) -> Route:
        """The route to one of its models."""
        found = self.routes.get(model)
        if found is None:
            found = self.routes[model] = Route()
        return found


class Trial:
    """One attempt, for what can be learned from it. The first of `succeeded`, `failed` and `abandoned` ends it, and the others
    then do nothing.
    """

    __slots__ = ("_health", "_is_over", "_is_probe", "_route", "_upstream")

    def __init__(self, health: "Health", upstream: Upstream, route: Route, *, is_probe: bool) -> None:
        self._health = health
        self._upstream = upstream
        self._route = route
        self._is_probe = is_probe
        self._is_over = False
        route.in_flight += 1

    def answered(self, latency_s: float | None) -> None:
        """It begins to answer as it should, which is all that a probe is to find out: a stream may go on for minutes.
        `latency_s` is told of streams alone: a whole answer's time is that of its length.
        """
        now = self._health.clock()
        if latency_s is not None:
            self._route.latency.observe(latency_s, now)
        if self._is_probe:
            self._is_probe = False
            self._route.breaker.succeeded(now)
            self._health.note(self._upstream, self._route, now)

    def succeeded(self) -> None:
        """The answer was whole."""
        if self._ends():
            self._route.failures = 0
            if not self._route.is_open:
                self._route.breaker.succeeded(self._health.clock())

    def failed(self, fault: UpstreamFault) -> None:
        """There was no answer, or it was none."""
        wait_s = asks_to_wait_s(fault)
        if wait_s:
            route = self._route
            route.ejected_until = max(route.ejected_until, self._health.clock() + wait_s)
        if is_unwell(fault):
            self.broke_off()
        elif fault.answered is not None:
            self.answered(None)
            self.abandoned()
        else:
            self.abandoned()

    def broke_off(self) -> None:
        """It failed by the upstream's own fault."""
        if self._ends():
            health, route = self._health, self._route
            now = health.clock()
            route.latency.observe(UNWELL_S, now)
            route.failures += 1
            if route.failures >= OUTLIER_FAILURES:
                route.ejected_until = max(route.ejected_until, now + OUTLIER_S)
            route.breaker.failed(now, health.spin())
            health.note(self._upstream, route, now)

    def abandoned(self) -> None:
        """It ended without saying anything of the upstream."""
        if self._ends() and self._is_probe:
            self._route.breaker.abandoned()

    def _ends(self) -> bool:
        if self._is_over:
            return False
        self._is_over = True
        self._route.in_flight -= 1
        return True


class Health:
    """The registry of one worker. `on_change` hears of each breaker that opens or closes; `clock` is monotonic seconds; `spin`
    gives a random number in [0, 1).
    """

    def __init__(
        self, on_change: Callable[[str, bool], None], clock: Callable[[], float], spin: Callable[[], float]
    ) -> None:
        self.clock = clock
        self.spin = spin
        self._on_change = on_change
        self._upstreams: dict[str, Upstream] = {}

    def order(self, attempts: Sequence[Attempt], session: str | None) -> Sequence[Attempt]:
        """The attempts in the order to make them."""
        if len(attempts) == 1:
            return attempts
        now = self.clock()
        return arrange(attempts, lambda attempt: self._standing(attempt, now), session)

    def begin(self, attempt: Attempt) -> Trial | None:
        """Begin an attempt; None if the route's breaker is open, or half-open with its probe under way."""
        upstream = self._upstream(attempt.upstream)
        route = upstream.route(attempt.upstream_model)
        if route.is_open and not route.breaker.allows(self.clock()):
            return None
        return Trial(self, upstream, route, is_probe=route.is_open)

    def nobody(self, attempts: Iterable[Attempt]) -> Fault:
        """What is told when every breaker is open: come back when the first one may be probed."""
        now = self.clock()
        wait_s = min((self._route(attempt).breaker.retry_after_s(now) for attempt in attempts), default=0.0)
        return Fault(Source.UPSTREAM, provider_not_available("Every provider of this model is failing.", wait_s))

    def keep(self, names: Iterable[str]) -> None:
        """A reload: forget all upstreams but these, whose settings didn't change."""
        kept = frozenset(names)
        for name in [name for name in self._upstreams if name not in kept]:
            if self._upstreams.pop(name).is_open:
                self._on_change(name, False)  # noqa: FBT003 - closed

    def note(self, upstream: Upstream, route: Route, now: float) -> None:
        """A route's breaker may have changed: tell, if the upstream is still in use and none or the first of its is open now."""
        route.is_open = route.breaker.state(now) != "closed"
        is_open = any(other.is_open for other in upstream.routes.values())
        if is_open != upstream.is_open:
            upstream.is_open = is_open
            if self._upstreams.get(upstream.name) is upstream:
                self._on_change(upstream.name, is_open)

    def _standing(self, attempt: Attempt, now: float) -> Standing:
        return self._route(attempt).standing(now)

    def _route(self, attempt: Attempt) -> Route:
        return self._upstream(attempt.upstream).route(attempt.upstream_model)

    def _upstream(self, name: str) -> Upstream:
        found = self._upstreams.get(name)
        if found is None:
            found = self._upstreams[name] = Upstream(name)
        return found
