"""Health of this worker's upstreams: which to try, which to avoid, and what each attempt shows about its upstream.

All state belongs to a route, which is one upstream's one model: latency, load, rate limits and failures differ by
model, and a request that makes one model fail must not close the others. Nor may one account close a model to other
accounts: a failure that the request itself may have caused counts in full against its account, and at most
`MAX_COUNTED_OF_ACCOUNT` times against the route. Memory is bounded by the configuration's routes and `MAX_ACCOUNTS`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from meshproxy.errors import GatewayError, Source, UpstreamError, provider_not_available
from meshproxy.policy.catalog import Candidate
from meshproxy.policy.failover import is_upstream_failure, may_be_caused_by_request, requested_wait_s
from meshproxy.policy.route_health import Breaker, BreakerSettings, PeakEwma, RouteHealth, order_candidates

FAILURE_LATENCY_S = 10.0  # a failure counts as an answer with this latency; else an upstream that fails fast looks fast
OUTLIER_FAILURES = 3  # in a row on one route; below the breaker's count. Its equals are preferred for OUTLIER_S
OUTLIER_S = 5.0
# The failures of one account that count against a route within the breaker's window: half of what opens it, so that
# other accounts' requests must fail too.
MAX_COUNTED_OF_ACCOUNT = 5
MAX_ACCOUNTS = 64  # accounts whose failures a route remembers; beyond that the oldest is forgotten
WINDOW_S = BreakerSettings().window_s
FORGET_ACCOUNT_S = 120.0  # after the account's last failure


State = Literal["serving", "ejected", "open"]


class AccountFailures:
    """One account's failures on a route. `counted`: those counted against the route since `since` (monotonic seconds)."""

    __slots__ = ("breaker", "counted", "last_at", "since")

    def __init__(self, now: float) -> None:
        self.breaker = Breaker()
        self.counted = 0
        self.since = self.last_at = now


class RouteState:
    """The state of one upstream's one model.

    `ejected_until` is monotonic seconds. `is_open`: the route's breaker isn't closed. `accounts`: those that failed
    lately, each with its own breaker.
    """

    __slots__ = ("accounts", "breaker", "ejected_until", "failures", "in_flight", "is_open", "latency")

    def __init__(self) -> None:
        self.breaker = Breaker()
        self.is_open = False
        self.latency = PeakEwma()
        self.in_flight = 0
        self.failures = 0  # in a row
        self.ejected_until = 0.0
        self.accounts: dict[str, AccountFailures] = {}

    def retry_after_s(self, account: str, now: float) -> float:
        """Return the seconds until this account's requests may be let through."""
        own_failures = self.accounts.get(account)
        wait_s = self.breaker.retry_after_s(now)
        return wait_s if own_failures is None else max(wait_s, own_failures.breaker.retry_after_s(now))

    def breakers(self, account: str, now: float) -> tuple[Breaker, ...] | None:
        """Return the breakers that a request of this account probes; None if one of them doesn't let it through."""
        own_failures = self.accounts.get(account)
        probes: list[Breaker] = []
        for breaker in (self.breaker,) if own_failures is None else (own_failures.breaker, self.breaker):
            is_closed = breaker.state(now) == "closed"
            if not breaker.allows(now):
                for probe in probes:
                    probe.abandoned()
                return None
            if not is_closed:
                probes.append(breaker)
        return tuple(probes)

    def count(self, account: str, now: float, draw: float) -> bool:
        """Count a failure that a request of this account may have caused. Return whether it counts against the route too."""
        own_failures = self.accounts.get(account)
        if own_failures is None:
            if len(self.accounts) >= MAX_ACCOUNTS:
                del self.accounts[next(iter(self.accounts))]
            own_failures = self.accounts[account] = AccountFailures(now)
        own_failures.last_at = now
        own_failures.breaker.failed(now, draw)
        if now - own_failures.since >= WINDOW_S:
            own_failures.since, own_failures.counted = now, 0
        own_failures.counted += 1
        return own_failures.counted <= MAX_COUNTED_OF_ACCOUNT

    def forget(self, now: float) -> bool:
        """Forget the accounts that haven't failed for long. Return whether any was forgotten."""
        gone = [name for name, own_failures in self.accounts.items() if now - own_failures.last_at >= FORGET_ACCOUNT_S]
        for name in gone:
            del self.accounts[name]
        return bool(gone)

    def is_open_to_any(self, now: float) -> bool:
        """Return whether the route's breaker, or the breaker of any account, isn't closed."""
        return self.is_open or any(
            own_failures.breaker.state(now) != "closed" for own_failures in self.accounts.values()
        )

    def health_for(self, account: str, now: float) -> RouteHealth:
        """Return the route's health as this account sees it."""
        is_open = (self.is_open or account in self.accounts) and self.retry_after_s(account, now) > 0.0
        return RouteHealth(self.latency.read(now), self.in_flight, max(0.0, self.ejected_until - now), is_open)


class UpstreamHealth:
    """One upstream's routes, by its own model names. `is_open`: whether any breaker was open when last reported."""

    __slots__ = ("is_open", "name", "routes")

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_open = False
        self.routes: dict[str, RouteState] = {}

    def route(self, model: str) -> RouteState:
        """Return the route to one of the upstream's models."""
        found = self.routes.get(model)
        if found is None:
            found = self.routes[model] = RouteState()
        return found


class Attempt:
    """One attempt, from which its route's health is learned.

    The first call of `succeeded`, `failed`, `broke_off` or `abandoned` ends it; later ones do nothing.
    """

    __slots__ = ("_account", "_health", "_is_over", "_probes", "_route", "_upstream")

    def __init__(
        self, health: "Health", upstream: UpstreamHealth, route: RouteState, account: str, probes: tuple[Breaker, ...]
    ) -> None:
        self._health = health
        self._upstream = upstream
        self._route = route
        self._account = account
        self._probes = probes
        self._is_over = False
        route.in_flight += 1

    def answered(self, latency_s: float | None) -> None:
        """Record that the answer has begun: probes succeed now, since a stream may go on for minutes.

        `latency_s` is given for streams only: the time of a whole answer depends on its length.
        """
        if latency_s is not None:
            self._route.latency.observe(latency_s, self._health.clock())
        if self._probes:
            now = self._health.clock()
            probes, self._probes = self._probes, ()
            for breaker in probes:
                breaker.succeeded(now)
            self._health.update(self._upstream, self._route, now)

    def succeeded(self) -> None:
        """Record that the answer was complete."""
        if self._end():
            route = self._route
            route.failures = 0
            if not route.is_open:
                route.breaker.succeeded(self._health.clock())
            if route.accounts and (own_failures := route.accounts.get(self._account)) is not None:
                own_failures.breaker.succeeded(self._health.clock())

    def failed(self, error: UpstreamError) -> None:
        """Record an error in place of an answer."""
        wait_s = requested_wait_s(error)
        if wait_s:
            route = self._route
            route.ejected_until = max(route.ejected_until, self._health.clock() + wait_s)
        if is_upstream_failure(error):
            self.broke_off(by_request=may_be_caused_by_request(error))
        elif error.upstream_status is not None:
            self.answered(None)
            self.abandoned()
        else:
            self.abandoned()

    def broke_off(self, *, by_request: bool = True) -> None:
        """Record a failure of the upstream. `by_request`: the request itself may have caused it."""
        if self._end():
            health, route = self._health, self._route
            now, draw = health.clock(), health.random()
            route.latency.observe(FAILURE_LATENCY_S, now)
            route.failures += 1
            if route.failures >= OUTLIER_FAILURES:
                route.ejected_until = max(route.ejected_until, now + OUTLIER_S)
            if not by_request or route.count(self._account, now, draw):
                route.breaker.failed(now, draw)
            elif route.breaker in self._probes:
                route.breaker.abandoned()
            health.update(self._upstream, route, now)

    def abandoned(self) -> None:
        """End an attempt that shows nothing about the upstream."""
        if self._end():
            for breaker in self._probes:
                breaker.abandoned()

    def _end(self) -> bool:
        if self._is_over:
            return False
        self._is_over = True
        self._route.in_flight -= 1
        return True


class Health:
    """The health of one worker's upstreams.

    `on_change` is called with an upstream's name and whether it has an open breaker, when that changes. `clock` is
    monotonic seconds; `random` returns a number in [0, 1). `upstreams` are those that were used, by name.
    """

    def __init__(
        self, on_change: Callable[[str, bool], None], clock: Callable[[], float], random: Callable[[], float]
    ) -> None:
        self.clock = clock
        self.random = random
        self._on_change = on_change
        self.upstreams: dict[str, UpstreamHealth] = {}

    def order(self, candidates: Sequence[Candidate], session: str | None, account: str = "") -> Sequence[Candidate]:
        """Return the candidates in the order to try them for this account."""
        if len(candidates) == 1:
            return candidates
        now = self.clock()
        return order_candidates(candidates, lambda candidate: self._route(candidate).health_for(account, now), session)

    def begin(self, candidate: Candidate, account: str = "") -> Attempt | None:
        """Begin an attempt; None if the breaker of the route or the account is open, or half-open with a probe out."""
        upstream = self.upstreams.get(candidate.upstream) or self._upstream(candidate.upstream)
        route = upstream.routes.get(candidate.upstream_model) or upstream.route(candidate.upstream_model)
        if not route.is_open and not route.accounts:
            return Attempt(self, upstream, route, account, ())
        now = self.clock()
        if route.forget(now):
            self.update(upstream, route, now)
        probes = route.breakers(account, now)
        return None if probes is None else Attempt(self, upstream, route, account, probes)

    def state(self, name: str) -> State:
        """Return what an upstream is for the next request: `open`, `ejected` or `serving`.

        `open`: a breaker of it is open. `ejected`: one of its routes is tried after its equals. Else `serving`.
        """
        upstream, now = self.upstreams.get(name), self.clock()
        if upstream is None:
            return "serving"
        routes = upstream.routes.values()
        if any(route.is_open_to_any(now) for route in routes):
            return "open"
        return "ejected" if any(route.ejected_until > now for route in routes) else "serving"

    def none_available(self, candidates: Iterable[Candidate], account: str = "") -> GatewayError:
        """Return the 503 for when every breaker is open; its `Retry-After` is when the first may be probed."""
        now = self.clock()
        wait_s = min((self._route(candidate).retry_after_s(account, now) for candidate in candidates), default=0.0)
        return GatewayError(Source.UPSTREAM, provider_not_available("Every provider of this model is failing.", wait_s))

    def retain(self, names: Iterable[str]) -> None:
        """Forget all upstreams but `names`, those whose settings a reload left unchanged."""
        kept = frozenset(names)
        for name in [name for name in self.upstreams if name not in kept]:
            if self.upstreams.pop(name).is_open:
                self._on_change(name, False)  # noqa: FBT003 - closed

    def update(self, upstream: UpstreamHealth, route: RouteState, now: float) -> None:
        """Update the upstream's state when a route's breaker may have changed, and call `on_change` if it differs.

        An upstream that a reload has removed isn't reported.
        """
        route.is_open = route.breaker.state(now) != "closed"
        is_open = any(other.is_open_to_any(now) for other in upstream.routes.values())
        if is_open != upstream.is_open:
            upstream.is_open = is_open
            if self.upstreams.get(upstream.name) is upstream:
                self._on_change(upstream.name, is_open)

    def _route(self, candidate: Candidate) -> RouteState:
        return self._upstream(candidate.upstream).route(candidate.upstream_model)

    def _upstream(self, name: str) -> UpstreamHealth:
        found = self.upstreams.get(name)
        if found is None:
            found = self.upstreams[name] = UpstreamHealth(name)
        return found
