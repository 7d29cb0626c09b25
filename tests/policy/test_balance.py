import heapq
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.policy.catalog import Candidate
from meshproxy.policy.pricing import Price
from meshproxy.policy.route_health import PeakEwma, RouteHealth, order_candidates

PRICE = Price(0, 0, 0, 0, 0, 0, 0)
OPEN = RouteHealth(is_open=True)


def candidate(name, weight=None, model="a/one"):
    return Candidate(name, "openai", "one", model, 1, 1, PRICE, weight=weight)


def equals(**weights):
    return [candidate(name, weight) for name, weight in weights.items()]


def ejected(seconds):
    return RouteHealth(ejected_s=seconds)


def names(attempts, session=None, **standings):
    return "".join(
        a.upstream for a in order_candidates(attempts, lambda a: standings.get(a.upstream, RouteHealth()), session)
    )


# Who is passed over.


@pytest.mark.parametrize(
    "standings, expected",
    [
        ({}, "abc"),
        ({"a": OPEN}, "bc"),
        ({"a": OPEN, "b": OPEN, "c": OPEN}, ""),
        ({"a": ejected(5)}, "bca"),
        ({"a": ejected(5), "b": ejected(2)}, "cba"),
        ({"a": ejected(5), "b": ejected(2), "c": ejected(9)}, "bac"),
        ({"a": OPEN, "b": ejected(2)}, "cb"),
    ],
)
def test_routes_without_equals_keep_their_order_but_for_those_that_ask_to_be_spared(standings, expected):
    assert names([candidate(name) for name in "abc"], **standings) == expected


@pytest.mark.parametrize(
    "standings, expected",
    [
        ({"a": ejected(5)}, "bcda"),
        ({"a": ejected(5), "b": ejected(9)}, "cdab"),
        ({"a": ejected(5), "b": ejected(9), "c": ejected(2)}, "cdab"),
        ({name: ejected(time) for name, time in zip("abcd", (5, 9, 2, 7), strict=True)}, "acdb"),
        ({"a": OPEN, "b": ejected(9), "c": ejected(2)}, "cdb"),
        ({"a": OPEN, "b": OPEN, "c": ejected(2)}, "cd"),
        ({"a": OPEN, "b": OPEN, "c": OPEN, "d": ejected(2)}, "d"),
        (dict.fromkeys("abcd", OPEN), ""),
    ],
)
def test_of_equals_no_more_than_half_are_ejected(standings, expected):
    assert names(equals(a=1, b=1, c=1, d=1), **standings) == expected


def test_of_three_equals_one_is_ejected():
    assert names(equals(a=1, b=1, c=1), a=ejected(9), b=ejected(5)) == "bca"


def test_the_ejected_are_asked_after_the_fallbacks():
    attempts = [*equals(a=1, b=1), candidate("f"), candidate("m", model="b/two")]
    assert names(attempts, a=ejected(1)) == "bfma"
    assert names(attempts, f=ejected(1)) == "abmf"


def test_the_equals_of_two_models_are_not_equals():
    attempts = [candidate("a", 1), candidate("b", 1, model="b/two")]
    assert names(attempts, a=RouteHealth(in_flight=100)) == "ab"


# Which of two goes first.


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (RouteHealth(), RouteHealth(), "ab"),
        (RouteHealth(in_flight=1), RouteHealth(), "ab"),
        (RouteHealth(in_flight=2), RouteHealth(), "ba"),
        (RouteHealth(in_flight=12), RouteHealth(in_flight=11), "ab"),
        (RouteHealth(in_flight=12), RouteHealth(in_flight=10), "ba"),
        (RouteHealth(1.0), RouteHealth(0.51), "ab"),
        (RouteHealth(1.0), RouteHealth(0.5), "ab"),
        (RouteHealth(1.0), RouteHealth(0.49), "ba"),
        (RouteHealth(9.0), RouteHealth(), "ab"),
        (RouteHealth(), RouteHealth(0.1), "ab"),
        (RouteHealth(in_flight=5), RouteHealth(0.1), "ba"),
        (RouteHealth(0.1, in_flight=5), RouteHealth(), "ba"),
        (RouteHealth(1.0, in_flight=1), RouteHealth(0.9), "ba"),
    ],
)
def test_the_second_of_equals_goes_first_only_if_it_is_better_off(a, b, expected):
    assert names(equals(a=1, b=1), a=a, b=b) == expected


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (RouteHealth(in_flight=9), RouteHealth(), "ab"),
        (RouteHealth(in_flight=11), RouteHealth(), "ba"),
        (RouteHealth(in_flight=18), RouteHealth(in_flight=1), "ab"),
        (RouteHealth(in_flight=19), RouteHealth(in_flight=1), "ba"),
        (RouteHealth(1.0), RouteHealth(0.17), "ab"),
        (RouteHealth(1.0), RouteHealth(0.16), "ba"),
    ],
)
def test_load_is_seen_by_weight(a, b, expected):
    assert names(equals(a=9, b=1), a=a, b=b) == expected


def test_only_the_two_that_were_drawn_are_compared():
    assert names(equals(a=1, c=1, b=1), a=RouteHealth(0.5), c=RouteHealth(0.4), b=RouteHealth(0.001)) == "acb"


# Sessions.


def test_a_session_stays_where_it_is_whatever_was_drawn():
    drawn = [equals(a=1, b=1, c=1), equals(c=1, b=1, a=1), equals(b=1, a=1, c=1)]
    busy = {"a": RouteHealth(9.0, 50)}
    assert len({names(attempts, "s1", **standings) for attempts in drawn for standings in ({}, busy)}) == 1


def test_when_a_sessions_upstream_is_away_no_other_session_moves():
    sessions = [f"session-{number}" for number in range(200)]
    before = {session: names(equals(a=1, b=1, c=1), session) for session in sessions}
    after = {session: names(equals(a=1, b=1, c=1), session, a=OPEN) for session in sessions}
    assert {session: order.replace("a", "") for session, order in before.items()} == after


def test_sessions_are_spread_by_weight():
    first = Counter(names(equals(a=3, b=1), f"session-{number}")[0] for number in range(4000))
    assert 0.72 < first["a"] / 4000 < 0.78


def test_where_a_session_goes_is_the_same_in_every_worker_and_release():
    assert [names(equals(a=1, b=1, c=1), session) for session in ("s1", "s2", "s3")] == ["bca", "cab", "bac"]


def test_a_sessions_upstream_that_asks_to_be_spared_is_spared():
    assert names(equals(a=1, b=1, c=1), "s1", b=ejected(1)) == "cab"


@given(
    st.lists(st.tuples(st.none() | st.integers(1, 9), st.sampled_from(["x", "y"])), max_size=8),
    st.lists(st.builds(RouteHealth, st.floats(0, 9), st.integers(0, 9), st.floats(0, 9), st.booleans()), max_size=8),
    st.none() | st.text(max_size=3),
)
def test_all_but_the_open_are_asked_once(routes, standings, session):
    attempts = [candidate(str(index), weight, model) for index, (weight, model) in enumerate(routes)]
    known = dict(zip((a.upstream for a in attempts), standings, strict=False))
    arranged = order_candidates(attempts, lambda a: known.get(a.upstream, RouteHealth()), session)
    usable = [a for a in attempts if not known.get(a.upstream, RouteHealth()).is_open]
    assert sorted(a.upstream for a in usable) == sorted(a.upstream for a in arranged)


# Latency.


def latency(*observed, now):
    ewma = PeakEwma()
    for seconds, at in observed:
        ewma.observe(seconds, at)
    return ewma.read(now)


def test_a_latency_is_unknown_before_and_long_after():
    assert latency(now=100.0) == 0.0
    assert [latency((0.5, 100.0), now=now) for now in (100.0, 159.9, 160.0)] == [0.5, 0.5, 0.0]


def test_a_slow_answer_is_believed_at_once_and_a_fast_one_slowly():
    assert latency((0.1, 100.0), (9.0, 100.1), now=100.1) == 9.0
    assert latency((9.0, 100.0), (1.0, 100.0), now=100.0) == 9.0
    assert pytest.approx(1.0 + 8.0 / 2.718281828) == latency((9.0, 100.0), (1.0, 110.0), now=110.0)


def test_what_was_forgotten_counts_no_more():
    assert latency((9.0, 100.0), (1.0, 160.0), now=161.0) == 1.0


# All of it together: streams of ten times their time to the first event come in by chance, `rate` a second.


def shares(rate, weights, latencies, requests=4000):
    chance = random.Random(1)
    ewmas = {name: PeakEwma() for name in weights}
    in_flight, went = Counter(), Counter()
    due = []
    now = 0.0
    for _ in range(requests):
        now += chance.expovariate(rate)
        while due and due[0][0] <= now:
            at, name, latency_s = heapq.heappop(due)
            if latency_s:
                ewmas[name].observe(latency_s, at)
            else:
                in_flight[name] -= 1
        drawn = sorted(equals(**weights), key=lambda a: chance.expovariate(a.weight))
        standings = {one: RouteHealth(ewmas[one].read(now), in_flight[one]) for one in weights}
        name = names(drawn, **standings)[0]
        went[name] += 1
        in_flight[name] += 1
        latency_s = latencies[name] * chance.uniform(0.7, 1.3)
        heapq.heappush(due, (now + latency_s, name, latency_s))
        heapq.heappush(due, (now + 10 * latency_s, name, 0.0))
    return {name: count / requests for name, count in went.items()}


@pytest.mark.parametrize("rate", [0.1, 1, 5, 50])
def test_where_all_do_equally_well_the_weights_decide(rate):
    assert pytest.approx(0.9, abs=0.03) == shares(rate, {"a": 9, "b": 1}, {"a": 0.3, "b": 0.3})["a"]


@pytest.mark.parametrize("rate, most", [(1, 0.08), (5, 0.06), (50, 0.06)])
def test_an_upstream_four_times_slower_is_shunned_but_still_tried(rate, most):
    share = shares(rate, {"a": 1, "b": 1, "c": 1}, {"a": 1.2, "b": 0.3, "c": 0.3})["a"]
    assert 0.01 < share < most
