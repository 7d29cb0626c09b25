import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshproxy.policy.route_health import Breaker, BreakerSettings

T0 = 1000.0


def opened(**settings):
    """A breaker that opened at T0, for 5 s."""
    breaker = Breaker(BreakerSettings(consecutive=1, **settings))
    breaker.failed(T0)
    return breaker


@pytest.mark.parametrize("now", [0.0, T0])
def test_closed_it_allows(now):
    breaker = Breaker()
    assert (breaker.state(now), breaker.allows(now), breaker.retry_after_s(now)) == ("closed", True, 0.0)


def test_failures_in_a_row_open_it():
    breaker = Breaker(BreakerSettings(consecutive=3))
    states = []
    for _ in range(3):
        breaker.failed(T0)
        states.append(breaker.state(T0))
    assert states == ["closed", "closed", "open"]
    assert (breaker.allows(T0), breaker.retry_after_s(T0)) == (False, 5.0)


@pytest.mark.parametrize("failures, expected", [(9, "closed"), (10, "open")])
def test_ten_failures_in_a_row_are_too_many(failures, expected):
    breaker = Breaker()
    for _ in range(failures):
        breaker.failed(T0)
    assert breaker.state(T0) == expected


def test_a_success_breaks_the_row():
    breaker = Breaker(BreakerSettings(consecutive=2))
    for _ in range(9):
        breaker.failed(T0)
        breaker.succeeded(T0)
    assert breaker.state(T0) == "closed"


@pytest.mark.parametrize("calls, expected", [(18, "closed"), (20, "open"), (22, "open")])
def test_a_share_of_failures_opens_it_once_there_are_enough_calls(calls, expected):
    breaker = Breaker()
    for _ in range(calls // 2):
        breaker.succeeded(T0)
        breaker.failed(T0)
    assert breaker.state(T0) == expected


def test_fewer_failures_than_the_share_are_forgiven():
    breaker = Breaker()
    for _ in range(100):
        breaker.succeeded(T0)
        breaker.succeeded(T0)
        breaker.failed(T0)
    assert breaker.state(T0) == "closed"


@pytest.mark.parametrize(
    "later, expected", [(1, "open"), (15, "open"), (29, "open"), (31, "open"), (61, "closed"), (200, "closed")]
)
def test_old_failures_are_forgotten(later, expected):
    breaker = Breaker(BreakerSettings(consecutive=100))
    for _ in range(15):
        breaker.succeeded(T0)
    for _ in range(14):
        breaker.failed(T0)
    for _ in range(2):
        breaker.failed(T0 + later)
    assert breaker.state(T0 + later) == expected


def test_the_elder_window_fades():
    breaker = Breaker(BreakerSettings(consecutive=100))
    for _ in range(10):
        breaker.failed(T0)
    breaker.succeeded(T0)
    for _ in range(14):
        breaker.failed(T0 + 45)  # halfway into the next window, the 11 of the elder count for 5.5
    assert breaker.state(T0 + 45) == "closed"
    breaker.failed(T0 + 45)
    assert breaker.state(T0 + 45) == "open"


@pytest.mark.parametrize("draw, expected", [(0.0, 2.5), (0.5, 5.0), (0.999, 7.495)])
def test_the_time_it_stays_open_is_spread(draw, expected):
    breaker = Breaker(BreakerSettings(consecutive=1))
    breaker.failed(T0, draw)
    assert pytest.approx(expected) == breaker.retry_after_s(T0)


def test_half_open_lets_one_probe_through():
    breaker = opened()
    assert [breaker.allows(T0 + 4.9), breaker.allows(T0 + 5), breaker.allows(T0 + 5)] == [False, True, False]
    assert (breaker.state(T0 + 5), breaker.retry_after_s(T0 + 5)) == ("half-open", 5.0)


def test_asking_for_the_state_takes_no_probe():
    breaker = opened()
    assert [breaker.state(T0 + 4), breaker.state(T0 + 5), breaker.state(T0 + 5)] == ["open", "half-open", "half-open"]
    assert breaker.allows(T0 + 5) is True


def test_a_good_probe_closes_it_and_all_is_forgotten():
    breaker = opened()
    breaker.allows(T0 + 5)
    breaker.succeeded(T0 + 6)
    assert (breaker.state(T0 + 6), breaker.allows(T0 + 6), breaker.allows(T0 + 6)) == ("closed", True, True)
    breaker.failed(T0 + 7)
    assert breaker.retry_after_s(T0 + 7) == 5.0


def test_a_good_probe_forgets_the_share_that_failed():
    breaker = Breaker(BreakerSettings(consecutive=100))
    for _ in range(20):
        breaker.failed(T0)
    breaker.allows(T0 + 5)
    breaker.succeeded(T0 + 5)
    breaker.failed(T0 + 5)
    assert breaker.state(T0 + 5) == "closed"


def test_each_bad_probe_opens_it_for_twice_as_long_up_to_a_minute():
    breaker, now, waits = opened(), T0, []
    for _ in range(6):
        now += breaker.retry_after_s(now)
        breaker.allows(now)
        breaker.failed(now)
        waits.append(breaker.retry_after_s(now))
    assert waits == [10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


def test_an_abandoned_probe_frees_its_place():
    breaker = opened()
    breaker.allows(T0 + 5)
    breaker.abandoned()
    assert [breaker.allows(T0 + 5), breaker.allows(T0 + 5)] == [True, False]


def test_a_probe_that_never_comes_back_is_given_up():
    breaker = opened(probe_s=30.0)
    breaker.allows(T0 + 5)
    assert [breaker.allows(T0 + 34.9), breaker.allows(T0 + 35)] == [False, True]


@pytest.mark.parametrize("late", ["succeeded", "failed"])
def test_late_answers_change_nothing_while_it_is_open(late):
    breaker = opened()
    getattr(breaker, late)(T0 + 1)
    assert (breaker.state(T0 + 1), breaker.retry_after_s(T0 + 1)) == ("open", 4.0)


def test_a_request_abandoned_while_open_or_closed_changes_nothing():
    breaker = opened()
    breaker.abandoned()
    assert (breaker.state(T0), breaker.retry_after_s(T0)) == ("open", 5.0)


class Life(RuleBasedStateMachine):
    """Any life of a breaker: never two probes at once, and never shut for good."""

    def __init__(self):
        super().__init__()
        self.breaker = Breaker(BreakerSettings(consecutive=3, least_calls=5))
        self.now = T0

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def ask(self):
        state = self.breaker.state(self.now)
        allowed = self.breaker.allows(self.now)
        assert allowed is (state == "closed") or state == "half-open"
        assert state == "closed" or self.breaker.allows(self.now) is False

    @rule()
    def succeed(self):
        self.breaker.succeeded(self.now)

    @rule(draw=st.floats(0, 1, exclude_max=True))
    def fail(self, draw):
        self.breaker.failed(self.now, draw)

    @rule()
    def abandon(self):
        self.breaker.abandoned()

    @invariant()
    def the_wait_is_bounded(self):
        assert 0.0 <= self.breaker.retry_after_s(self.now) <= 90.0
        assert (self.breaker.state(self.now) == "closed") <= (self.breaker.retry_after_s(self.now) == 0.0)


TestLife = Life.TestCase


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 10)), max_size=50))
def test_without_failures_it_never_opens(calls):
    breaker, now = Breaker(), T0
    for abandoned, seconds in calls:
        now += seconds
        breaker.abandoned() if abandoned else breaker.succeeded(now)
    assert breaker.state(now) == "closed"
