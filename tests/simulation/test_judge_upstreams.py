"""The judge of which upstreams are asked: those of the configuration that a request begins with, and of its session.

A request begins at 10.0, and its provider is asked at 10.1. Both sides of each bound.
"""

import pytest
from msgspec.structs import replace

from simulation.history import MODELS, Answer, Price, Request, WorkerEvent
from simulation.record import View
from tests.simulation.judged import COST, REQUEST, Case, book, envelope, failed_before, judge, settled

MOVED = MODELS | {"plain": replace(MODELS["plain"], routes=("two",))}
DEARER = MODELS | {"plain": replace(MODELS["plain"], price=Price(5_000_000_000, 20_000_000_000))}


def reloaded(at, models=MODELS, place=""):
    """Let all gateways have read another configuration at a time."""
    case = Case()
    case.record.history = replace(
        case.record.history, steps=(REQUEST, WorkerEvent(at, "reloaded", routes=(("plain", ("two",)),)))
    )
    case.record.prices.append((at, models))
    case.record.places = [{}, {"one": place}]
    return case


def rules(case):
    return {finding.rule for finding in judge(case.record)}


@pytest.mark.parametrize(
    ("at", "upstream", "is_right"),
    [
        pytest.param(7.89, "one", False, id="two seconds before, and the old one is asked"),
        pytest.param(7.89, "two", True, id="two seconds before, and the new one is asked"),
        pytest.param(7.91, "one", True, id="less before, and the old one is asked"),
        pytest.param(10.09, "two", True, id="before it is asked, and the new one is asked"),
        pytest.param(10.11, "two", False, id="while it runs, and the new one is asked"),
        pytest.param(10.11, "one", True, id="while it runs, and the old one is asked"),
        pytest.param(10.05, "gone", False, id="and another one is asked"),
    ],
)
def test_a_request_asks_the_upstreams_of_its_configuration(at, upstream, is_right):
    case = reloaded(at, MOVED)
    case.call.upstream = upstream
    if upstream == "two":
        case.call.body["max_completion_tokens"] = case.call.body.pop("max_tokens", None)
        case.call.body = {name: value for name, value in case.call.body.items() if value is not None}
    assert ("upstreams_are_right" not in rules(case)) == is_right


@pytest.mark.parametrize(
    ("at", "place", "is_right"),
    [
        (7.89, "", False),
        (7.89, "new", True),
        (7.91, "", True),
        (10.11, "new", False),
        (10.09, "new", True),
        (9.0, "b", False),
    ],
)
def test_a_request_asks_them_at_their_address(at, place, is_right):
    case = reloaded(at, place="new")
    case.call.place = place
    assert ("upstreams_are_right" not in rules(case)) == is_right


@pytest.mark.parametrize(
    ("at", "cost", "is_right"),
    [(7.89, COST, False), (7.91, COST, True), (10.09, 2 * COST, True), (10.11, 2 * COST, False), (10.11, COST, True)],
)
def test_a_request_is_billed_by_its_configuration(at, cost, is_right):
    case = reloaded(at, DEARER)
    case.record.books = {0: book(settled(cost_nusd=cost))}
    case.sight.headers["x-mesh-cost"] = f"0.{cost:09d}"
    assert ("charges_are_bills" not in rules(case)) == is_right


def test_what_is_known_of_upstreams_begins_anew_where_they_are_changed():
    assert (View(reloaded(9.0).record).moves_upstreams, View(Case().record).moves_upstreams) == (True, False)


def of_sessions(one="s1", other="s1", to="two", model="shared", failed_at=None):
    """Let two requests of sessions have gone to the upstream `one` and to another."""
    case = Case(replace(REQUEST, model=model, session=one))
    case.twice(request=Request("q9", model=model, session=other), marker="mk1q9z", request_id="id-q9")
    case.call.body["model"] = f"up-{model}"
    case.record.calls.append(replace(case.call, marker="mk1q9z", upstream=to))
    if failed_at is not None:
        failed_before(3, failed_at)(case)
        for sight, call in zip(case.record.sights[2:], case.record.calls[2:], strict=True):
            sight.request = replace(sight.request, model=model)
            call.body = call.body | {"model": f"up-{model}"}
    case.serve(model)
    return case


@pytest.mark.parametrize(
    ("changes", "is_right"),
    [
        pytest.param({}, False, id="to another"),
        pytest.param({"to": "one"}, True, id="to the same"),
        pytest.param({"other": "s2"}, True, id="of another session"),
        pytest.param({"one": "", "other": ""}, True, id="of none"),
        pytest.param({"model": "pair"}, True, id="of upstreams that are no equals"),
        pytest.param({"failed_at": 9.0}, True, id="where the first may be ejected"),
        pytest.param({"failed_at": 4.0}, False, id="where the first has come back"),
    ],
)
def test_a_session_stays_with_its_upstream(changes, is_right):
    assert ("sessions_stay" not in rules(of_sessions(**changes))) == is_right


@pytest.mark.parametrize(
    ("model", "upstream", "is_right"),
    [
        pytest.param("shared", "one", True, id="one of the equals"),
        pytest.param("shared", "two", True, id="the other one"),
        pytest.param("shared", "drained", False, id="what comes after them"),
        pytest.param("skewed", "two", True, id="the heavier one"),
        pytest.param("skewed", "one", False, id="the lighter one"),
        pytest.param("pair", "two", False, id="the second of two that are no equals"),
    ],
)
def test_equals_have_no_order(model, upstream, is_right):
    case = Case(replace(REQUEST, model=model))
    case.call.body["model"], case.call.upstream = f"up-{model}", upstream
    case.serve(model)
    assert ("ejections_hold" not in rules(case)) == is_right


def ejected(upstream, *others, asked):
    """Let upstreams have asked to be left alone for a minute, and one of them have been asked."""
    case = Case(replace(REQUEST, model="shared"))
    case.call.body["model"], case.call.upstream = "up-shared", asked
    case.serve("shared")
    for number, each in enumerate((upstream, *others)):
        name = f"q{number + 5}"
        case.twice(request=Request(name, model="shared"), marker=f"mk1{name}z", request_id=f"id-{name}", status=503)
        sight = case.record.sights[-1]
        sight.began_at, sight.ended_at, sight.payload = 8.0, 9.0, envelope(request_id=f"id-{name}")
        call = replace(case.call, marker=f"mk1{name}z", upstream=each, at=8.1, ended="error", ended_at=8.9)
        call.answer = Answer(status=429, error="limit", wait_s=60.0)
        case.record.calls.append(call)
    return case


@pytest.mark.parametrize(
    ("case", "is_right"),
    [
        pytest.param(ejected("one", asked="two"), True, id="the equal of one that is ejected"),
        pytest.param(ejected("one", asked="one"), False, id="one that is ejected"),
        pytest.param(ejected("one", "two", asked="one"), True, id="one of two that are: half stays in use"),
        pytest.param(ejected("one", asked="drained"), False, id="what comes after the equal of one that is"),
    ],
)
def test_half_of_a_group_stays_in_use(case, is_right):
    assert ("ejections_hold" not in rules(case)) == is_right
