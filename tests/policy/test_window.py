import pytest

from meshproxy.policy.route_health import Window


def counted(*events, now):
    window = Window(10.0)
    for at, marked in events:
        window.add(at, marked=marked)
    window.advance(now)
    return window.calls, window.marked


@pytest.mark.parametrize(
    "now, expected",
    [
        (101.0, (2, 1)),
        (109.9, (2, 1)),
        (110.0, (2.0, 1.0)),
        (115.0, (1.0, 0.5)),
        (119.0, (pytest.approx(0.2), pytest.approx(0.1))),
        (120.0, (0, 0)),
        (125.0, (0, 0)),
        (500.0, (0, 0)),
    ],
)
def test_what_is_older_than_the_window_fades(now, expected):
    assert counted((100.0, True), (101.0, False), now=now) == expected


@pytest.mark.parametrize(
    "second, now, expected",
    [
        (109.9, 115.0, (1.0, 0.5)),
        (110.0, 115.0, (1.5, 0.5)),
        (112.0, 115.0, (1.5, 0.5)),
        (120.0, 125.0, (1.0, 0.0)),
    ],
)
def test_a_new_window_begins_where_the_old_one_ended(second, now, expected):
    assert counted((100.0, True), (second, False), now=now) == expected


def test_forgetting_forgets_all():
    window = Window(10.0)
    window.add(1.0, marked=True)
    window.reset()
    assert (window.calls, window.marked) == (0, 0)
