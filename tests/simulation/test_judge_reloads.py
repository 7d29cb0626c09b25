"""The judge of reloads: a request keeps the configuration that it begins with.

It begins at 10.0, and its provider is asked at 10.1. Both sides of each bound.
"""

import pytest
from msgspec.structs import replace

from simulation.history import MODELS, Price, WorkerEvent
from simulation.record import View
from tests.simulation.judged import COST, REQUEST, Case, book, judge, settled

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
