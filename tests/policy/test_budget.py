from hypothesis import given
from hypothesis import strategies as st

from meshproxy.policy.route_health import RetryBudget


def withdrawn(budget, now, tries):
    return sum(budget.withdraw(now) for _ in range(tries))


def test_a_quiet_worker_has_the_floor_every_ten_seconds():
    budget = RetryBudget()
    assert [withdrawn(budget, now, 50) for now in (100.0, 109.9, 115.0)] == [10, 0, 5]


def test_a_busy_worker_has_a_fifth_on_top():
    budget = RetryBudget()
    for _ in range(100):
        budget.deposit(100.0)
    assert withdrawn(budget, 100.0, 50) == 30


def test_what_was_spent_comes_back_with_time():
    budget = RetryBudget(share=0.0, floor=4.0, window_s=10.0)
    assert [withdrawn(budget, now, 9) for now in (100.0, 109.0, 115.0, 135.0)] == [4, 0, 2, 4]


def test_a_refusal_costs_nothing():
    budget = RetryBudget(share=0.5, floor=0.0)
    assert withdrawn(budget, 100.0, 1000) == 0
    budget.deposit(100.0)
    budget.deposit(100.0)
    assert withdrawn(budget, 100.0, 1000) == 1


@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 3)), max_size=200))
def test_never_more_than_the_share_and_the_floor(requests):
    budget = RetryBudget(share=0.2, floor=2.0, window_s=1e9)
    now = extra = 0.0
    for number, (later, wanted) in enumerate(requests, start=1):
        now += later
        budget.deposit(now)
        extra += withdrawn(budget, now, wanted)
        assert extra <= 2.0 + 0.2 * number
