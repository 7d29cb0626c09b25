"""What each attempt says of whom it asked, and what follows for the next. Time and chance are the tests'."""

import pytest

from meshproxy.errors import UpstreamError, gateway_timeout, overloaded, provider_not_available, upstream_error
from meshproxy.gateway.health import Health
from meshproxy.policy.catalog import Candidate
from meshproxy.policy.pricing import Price

PRICE = Price(0, 0, 0, 0, 0, 0, 0)
DEAD = UpstreamError(upstream_error("reset", may_have_run=True), safe_to_repeat=False)
SILENT = UpstreamError(gateway_timeout("silent", may_have_run=True), safe_to_repeat=False)
NO_SLOT = UpstreamError(overloaded("no connection is free"), safe_to_repeat=True)
FULL = UpstreamError(provider_not_available("full", 7.0), safe_to_repeat=True, upstream_status=429)
REFUSED = UpstreamError(upstream_error("not found", may_have_run=False), safe_to_repeat=True, upstream_status=404)


def candidate(upstream, model="gpt", weight=None):
    return Candidate(upstream, "openai", model, "m", 1, 1, PRICE, weight=weight)


A, B = candidate("a"), candidate("b")


class Worker:
    """A registry, its clock, and the changes that it told of."""

    def __init__(self):
        self.now = 1000.0
        self.changes = []
        self.health = Health(lambda *change: self.changes.append(change), lambda: self.now, lambda: 0.5)

    def begin(self, candidate=A):
        attempt = self.health.begin(candidate)
        assert attempt is not None
        return attempt

    def open(self, candidate=A):
        """Open a breaker; it may be probed in five seconds."""
        for _ in range(10):
            self.begin(candidate).failed(DEAD)

    def order(self, *attempts, session=None):
        return "".join(candidate.upstream for candidate in self.health.order(attempts, session))

    @property
    def in_flight(self):
        return self.health.upstreams["a"].routes["gpt"].in_flight


@pytest.fixture
def worker():
    return Worker()


@pytest.mark.parametrize("error", [DEAD, SILENT])
def test_failures_in_a_row_open_the_breaker_which_is_told_once(worker, error):
    trials = [worker.begin() for _ in range(12)]
    for attempt in trials:
        attempt.failed(error)
    assert worker.changes == [("a", True)]
    assert worker.health.begin(A) is None
    assert worker.in_flight == 0


@pytest.mark.parametrize("error", [NO_SLOT, FULL, REFUSED])
def test_what_isnt_the_upstreams_fault_opens_nothing(worker, error):
    for _ in range(50):
        worker.begin().failed(error)
    assert (worker.changes, worker.in_flight) == ([], 0)


def test_a_trial_ends_once(worker):
    attempt = worker.begin()
    attempt.succeeded()
    for _ in range(9):
        attempt.broke_off()
        attempt.failed(DEAD)
        attempt.abandoned()
    assert (worker.changes, worker.in_flight) == ([], 0)


def test_streams_that_begin_well_and_die_open_the_breaker(worker):
    for _ in range(10):
        attempt = worker.begin()
        attempt.answered(0.2)
        attempt.broke_off()
    assert worker.changes == [("a", True)]


def test_one_probe_at_a_time(worker):
    worker.open()
    worker.now += 5.0
    probe = worker.begin()
    assert worker.health.begin(A) is None
    probe.answered(0.1)
    assert worker.changes == [("a", True), ("a", False)]
    assert worker.health.begin(A) is not None


def test_a_probe_that_fails_opens_it_for_longer_and_isnt_told_again(worker):
    worker.open()
    worker.now += 5.0
    worker.begin().failed(DEAD)
    worker.now += 9.9
    assert worker.health.begin(A) is None
    worker.now += 0.1
    assert worker.health.begin(A) is not None
    assert worker.changes == [("a", True)]


@pytest.mark.parametrize("error", [FULL, REFUSED])
def test_a_probe_that_is_refused_shows_that_the_upstream_is_there(worker, error):
    worker.open()
    worker.now += 5.0
    worker.begin().failed(error)
    assert worker.changes == [("a", True), ("a", False)]


@pytest.mark.parametrize("end", [lambda attempt: attempt.abandoned(), lambda attempt: attempt.failed(NO_SLOT)])
def test_a_probe_that_says_nothing_makes_room_for_the_next(worker, end):
    worker.open()
    worker.now += 5.0
    end(worker.begin())
    assert worker.health.begin(A) is not None
    assert worker.changes == [("a", True)]


def test_an_abandoned_request_from_before_frees_no_probes_place(worker):
    early = worker.begin()
    worker.open()
    worker.now += 5.0
    worker.begin()
    early.abandoned()
    assert worker.health.begin(A) is None


def test_an_answer_from_before_closes_nothing(worker):
    early = worker.begin()
    worker.open()
    worker.now += 5.0
    worker.begin()
    early.answered(0.1)
    early.succeeded()
    assert worker.changes == [("a", True)]


def test_when_all_are_open_the_client_is_told_when_the_first_may_be_probed(worker):
    worker.open(A)
    worker.now += 2.0
    worker.open(B)
    response = worker.health.none_available([A, B]).response
    assert (response.status, response.code, response.retry_after_s) == (503, "provider_not_available", 3.0)
    assert worker.order(A, B) == ""


def test_an_open_upstream_is_passed_over_until_it_may_be_probed(worker):
    worker.open(A)
    assert worker.order(A, B) == "b"
    worker.now += 5.0
    assert worker.order(A, B) == "ab"


def test_who_is_full_is_asked_last_for_as_long_as_it_asks(worker):
    worker.begin().failed(FULL)
    assert worker.order(A, B) == "ba"
    worker.now += 7.0
    assert worker.order(A, B) == "ab"


def test_who_is_full_for_one_model_serves_the_others(worker):
    worker.begin().failed(FULL)
    assert worker.order(candidate("a", "other"), B) == "ab"


def test_an_outlier_is_asked_last_until_it_has_rested(worker):
    for _ in range(3):
        worker.begin().failed(DEAD)
    assert worker.order(A, B) == "ba"
    worker.now += 5.0
    assert worker.order(A, B) == "ab"


def test_a_success_between_failures_makes_no_outlier(worker):
    for fails in (True, True, False, True, True):
        attempt = worker.begin()
        attempt.failed(DEAD) if fails else attempt.succeeded()
    assert worker.order(A, B) == "ab"


def test_the_slower_and_the_busier_of_two_equals_goes_second(worker):
    a, b = candidate("a", weight=1), candidate("b", weight=1)
    worker.begin(a).answered(1.0)
    worker.begin(b).answered(0.2)
    assert worker.order(a, b) == "ba"
    for _ in range(20):
        worker.begin(b)
    assert worker.order(a, b) == "ab"


def test_who_fails_fast_doesnt_look_fast(worker):
    a, b = candidate("a", weight=1), candidate("b", weight=1)
    for one in (a, b):
        attempt = worker.begin(one)
        attempt.answered(1.0)
        attempt.succeeded()
    worker.begin(a).failed(DEAD)
    assert worker.order(a, b) == "ba"


def test_what_is_kept_is_bounded_by_the_configuration(worker):
    for _ in range(100):
        worker.begin(A).succeeded()
        worker.begin(B).succeeded()
    worker.health.retain(["a"])
    assert (list(worker.health.upstreams), list(worker.health.upstreams["a"].routes)) == (["a"], ["gpt"])


def test_an_upstream_that_a_reload_changed_begins_anew_and_late_failures_say_nothing_of_it(worker):
    late = [worker.begin() for _ in range(10)]
    worker.open()
    worker.health.retain([])
    for attempt in late:
        attempt.failed(DEAD)
    assert worker.changes == [("a", True), ("a", False)]
    assert worker.health.begin(A) is not None


def test_an_accounts_failures_are_forgotten(worker):
    for _ in range(10):
        attempt = worker.health.begin(A, "poisoner")
        attempt.broke_off()
    assert worker.health.begin(A, "poisoner") is None
    assert worker.changes[-1] == (A.upstream, True)
    worker.now += 121
    worker.health.begin(A, "other").succeeded()
    assert worker.changes[-1] == (A.upstream, False)


def test_a_poisoner_beside_who_succeeds_opens_nothing_to_others(worker):
    for _ in range(40):
        attempt = worker.health.begin(A, "poisoner")
        if attempt is not None:
            attempt.broke_off()
        worker.health.begin(A, "other").succeeded()


def test_the_accounts_that_are_remembered_are_bounded(worker):
    for name in ["first"] * 10 + [f"account-{number}" for number in range(64)]:
        worker.health.begin(A, name).broke_off()
        worker.health.begin(A, "good").succeeded()
    assert worker.health.begin(A, "first") is not None
