"""Rules on breakers, by docs/failover.md: when a provider is left alone, for how long, and what its clients are told.

A breaker is known by its provider's calls alone. What surely failed or was surely answered is told from what may have,
so each rule has the bound that surely holds.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, Literal, NamedTuple

from simulation.client import Sight
from simulation.history import UPSTREAMS
from simulation.provider import Call
from simulation.record import HOP_S, View

IN_A_ROW: Final = 10  # failures that open a breaker
MOST_OF_ACCOUNT: Final = 5  # failures of one account that count against a route within WINDOW_S
WINDOW_S: Final = 30.0
LEAST_CALLS: Final = 20  # within WINDOW_S, of which half failed, that open it too
OPEN_S: Final = 5.0  # doubled after each probe that failed, times 0.5 to 1.5
MOST_OPEN_S: Final = 60.0
LEAST_SHARE, MOST_SHARE = 0.5, 1.5
REFUSED: Final = range(400, 500)
MAY_HAVE_FAILED: Final = frozenset({"failed", "unclear"})
FAILING: Final = "Every provider of this model is failing."
ASKED_S: Final = 4 * HOP_S  # that an attempt is on its way to its provider: the last answer, a connection, the request


What = Literal["failed", "answered", "refused", "unclear"]


EJECTING: Final = frozenset({429, 503, 529})  # with a wait, for which the route is ejected
LIMIT_S, MOST_EJECTED_S = 1.0, 60.0  # of a 429 without a wait; of any wait
SPENT: Final = "quota"  # of a 429: the gateway's quota there is, until it is paid for
FAILED_S: Final = 5.0  # for which a route is ejected after as many failures in a row
FAILED_IN_A_ROW: Final = 3


class Result(NamedTuple):
    """One call of a worker's to a route, and what it shows. "refused": not a failure. "unclear": perhaps one."""

    began_at: float
    ended_at: float
    account: int
    what: What


class Open(NamedTuple):
    """Since when a breaker is surely open, and until when at least."""

    since: float
    until: float


def breakers_hold(view: View) -> Iterator[str]:
    """Check that no provider is asked whose breaker is open, but for one probe at a time, and the wait until the next."""
    if len(view.record.calls) < IN_A_ROW:
        return
    routes = {(call.upstream, model_of(call)) for call in view.record.calls}
    for upstream, model in sorted(routes):
        for worker in range(view.history.workers):
            known = _results(view, worker, upstream, model)
            for account, opening in _surely_open(view, worker, known):
                for each in known:
                    is_theirs = account is None or each.account == account
                    if is_theirs and opening.since + ASKED_S < each.began_at < opening.until - HOP_S:
                        yield (
                            f"{upstream} was asked for {model} by a{each.account} {each.began_at - opening.since:.2f} s"
                            f" after its breaker had opened, which is open for {opening.until - opening.since:.1f} s"
                        )
    for sight in view.record.sights:
        if is_failing(sight):
            yield from _wait_faults(view, sight)


def ejections_hold(view: View) -> Iterator[str]:
    """Check that upstreams are asked in their order, but for those that are ejected, which are asked last."""
    for sight in view.record.sights:
        orders = orders_of(view, sight)
        routes = [route for route in orders[0] if UPSTREAMS[route[0]].is_there] if len(orders) == 1 else []
        calls = view.own_calls(sight)[:1] if len(routes) > 1 and not view.is_anothers(sight) else []
        for call in calls:
            asked = call.upstream, model_of(call)
            if asked not in routes:
                continue
            is_ejected = _is_surely_ejected(view, sight, *asked, call.at)
            equals = [(route, asked[1]) for route in view.models(sight, asked[1])[0].equals(asked[0])]
            before = [route for route in routes if route != asked] if is_ejected else routes[: routes.index(asked)]
            if equals and is_ejected:  # half of a group stays in use
                before = [route for route in before if route in equals]
            elif equals and asked[1] != "skewed":
                before = [route for route in before if route not in equals]
            free = [
                route
                for route in before
                if not _may_be_ejected(view, sight, *route, call.at) and not may_be_open(view, sight, *route)
            ]
            if free:
                why = "is ejected" if is_ejected else "comes later"
                yield f"{sight.request_id}: {asked[0]} was asked for {asked[1]}, which {why}, and not {free[0]}"


def sessions_stay(view: View) -> Iterator[str]:
    """Check that requests of a session go to the same one of equal upstreams, where that may not be unavailable."""
    first: dict[tuple[int, str, str], list[tuple[Sight, Call]]] = {}
    for sight in view.record.sights:
        name, session = sight.request.model, sight.request.session
        for call in view.own_calls(sight)[:1] if session and not view.is_anothers(sight) and not sight.again else ():
            if model_of(call) == name and any(model.weights for model in view.models(sight, name)):
                first.setdefault((view.key(sight), session, name), []).append((sight, call))
    for (_, session, name), asked in first.items():
        for (one, call), (other, other_call) in itertools.combinations(asked, 2):
            pairs = ((one, call, other_call.upstream), (other, other_call, call.upstream))
            if call.upstream != other_call.upstream and not any(
                _may_be_ejected(view, sight, upstream, name, its.at) or may_be_open(view, sight, upstream, name)
                for sight, its, upstream in pairs
            ):
                where = f"{call.upstream} and {other_call.upstream}"
                yield f"{one.request_id} and {other.request_id} of the session {session} went to {where} for {name}"


def upstreams_are_right(view: View) -> Iterator[str]:
    """Check that the upstreams that are asked are the model's, at their addresses, as a request's configuration has them."""
    for call in view.record.calls:
        name, group = model_of(call), [sight for sight in view.record.sights if sight.marker == call.marker]
        right = {
            (route, view.place(index, route))
            for sight in group
            for index in view.configurations(sight)
            for route in view.record.prices[index][1][name].routes
        }
        if group and (call.upstream, call.place) not in right:
            at = f"{call.upstream}.{call.place}".rstrip(".")
            yield f"{at} was asked for {name} in {call.marker}, and {sorted(right)} are its upstreams"


def _ejected_s(call: Call) -> float:
    """Return for how long a call's answer has its route ejected, by what it asks for."""
    answer = call.answer
    if call.ended != "error":
        return 0.0
    if answer.error == SPENT:
        return MOST_EJECTED_S
    if answer.status not in EJECTING:
        return 0.0
    return min(call.wait_s or (LIMIT_S if answer.status == 429 else 0.0), MOST_EJECTED_S)


def _calls_to(view: View, worker: int, upstream: str, model: str) -> Iterator[tuple[Call, bool]]:
    """Return a worker's calls to a route, and whether each of them surely ran to its end there."""
    for call in view.record.calls:
        if (call.upstream, model_of(call)) == (upstream, model):
            group = [sight for sight in view.record.sights if sight.marker == call.marker]
            workers = {view.worker(sight) for sight in group}
            if worker in workers:
                stayed = all(sight.ended == "whole" and sight.request.timeout_s is None for sight in group)
                yield call, stayed and len(workers) == 1


def _is_surely_ejected(view: View, sight: Sight, upstream: str, model: str, until: float) -> bool:
    """Whether a route was surely ejected from a request's beginning until a time."""
    worker = view.worker(sight)
    if view.moves_upstreams or any(trouble.worker == worker for trouble in view.record.troubles):
        return False  # another process knows nothing of it, and other settings begin anew
    for call, is_sure in _calls_to(view, worker, upstream, model):
        early_s = call.answer.pause_s + HOP_S if call.answer.dated else 0.0  # by which a date may be nearer
        ejected_at = call.at + call.answer.delay_s  # at the earliest, by its head
        is_over = is_sure and call.ended_at + HOP_S < sight.began_at
        if is_over and _ejected_s(call) and until < ejected_at + _ejected_s(call) - early_s:
            return True
    known = _results(view, worker, upstream, model)
    ended = [each for each in known if each.ended_at + HOP_S < sight.began_at][-FAILED_IN_A_ROW:]
    if len(ended) < FAILED_IN_A_ROW or until >= ended[-1].ended_at + FAILED_S:
        return False
    since, last_at = ended[0].ended_at - HOP_S, ended[-1].ended_at + HOP_S
    return all(each.what == "failed" for each in known if since <= each.ended_at <= last_at)


def _may_be_ejected(view: View, sight: Sight, upstream: str, model: str, until: float) -> bool:
    """Whether a route may have been ejected at some time from a request's beginning until another."""
    failures: list[float] = []
    for call, is_sure in _calls_to(view, view.worker(sight), upstream, model):
        if call.at <= until:
            ended_at = call.ended_at or math.inf
            if _ejected_s(call) and sight.began_at <= ended_at + _ejected_s(call) + 2 * HOP_S:
                return True
            if not (is_sure and call.answer.is_good):
                failures.append(ended_at)
    return len(failures) >= FAILED_IN_A_ROW and sight.began_at <= max(failures) + FAILED_S + 2 * HOP_S


def is_failing(sight: Sight) -> bool:
    """Whether a request was refused because all breakers of its model are open."""
    return sight.error.get("code") == "provider_not_available" and FAILING in str(sight.error.get("message"))


def may_all_be_open(view: View, sight: Sight) -> bool:
    """Whether the breakers of all providers that a request may ask may have been open when it ended."""
    orders = orders_of(view, sight)
    return any(all(may_be_open(view, sight, *route) for route in order) for order in orders)


def may_be_open(view: View, sight: Sight, upstream: str, model: str) -> bool:
    """Whether the breaker of a route, or of a request's account there, may have been open while the request ran."""
    if not UPSTREAMS[upstream].is_there:
        return True  # nothing knows who tried to connect
    if len(view.record.calls) < IN_A_ROW:
        return False
    times = [sight.began_at, *(call.at for call in view.calls.get(sight.marker, ())), sight.ended_at]
    return any(_most_wait_s(view, sight, upstream, model, at) is not None for at in times)


def _wait_faults(view: View, sight: Sight) -> Iterator[str]:
    """Find a wait that isn't the time until the next probe."""
    wait_s = float(sight.headers.get("retry-after-ms", "nan")) / 1000
    if len(orders_of(view, sight)) > 1:
        return
    most = [
        _most_wait_s(view, sight, upstream, model, sight.ended_at) if UPSTREAMS[upstream].is_there else math.inf
        for upstream, model in routes_of(view, sight)
    ]
    longest_s = min((each for each in most if each is not None), default=math.inf)
    shortest_s = min(_least_wait_s(view, sight, upstream, model) for upstream, model in routes_of(view, sight))
    if wait_s > longest_s or wait_s < shortest_s:
        yield f"{sight.request_id} is to wait {wait_s:.2f} s, and {shortest_s:.2f} to {longest_s:.2f} s would be right"


def routes_of(view: View, sight: Sight) -> list[tuple[str, str]]:
    """Return the upstreams that a request may ask, each with the name of the model."""
    return list(dict.fromkeys(route for order in orders_of(view, sight) for route in order))


def orders_of(view: View, sight: Sight) -> list[list[tuple[str, str]]]:
    """Return in which order a request may ask its upstreams: in one, unless its configuration isn't known."""
    names = (sight.request.model, *sight.request.fallbacks)
    orders = []
    for index in view.configurations(sight):
        order = [(upstream, name) for name in names for upstream in view.record.prices[index][1][name].routes]
        orders += [] if order in orders else [order]
    return orders


def model_of(call: Call) -> str:
    """Return the name of the model that a call was for."""
    return str(call.body.get("model", "")).removeprefix("up-")


def _results(view: View, worker: int, upstream: str, model: str) -> list[Result]:
    """Return what a worker's calls to a route show, in the order of their ends."""
    found = []
    for call in view.record.calls:
        if (call.upstream, model_of(call)) == (upstream, model):
            group = [sight for sight in view.record.sights if sight.marker == call.marker]
            workers = {view.worker(sight) for sight in group}
            if worker in workers:
                what = _what(group, call) if len(workers) == 1 else "unclear"
                found.append(Result(call.at, call.ended_at or math.inf, view.key(group[0]), what))
    return sorted(found, key=lambda each: each.ended_at)


def _what(group: list[Sight], call: Call) -> What:
    """Return whether a call surely counts as a failure of its provider, or surely doesn't."""
    if call.ended == "error" and call.answer.status in REFUSED:
        return "refused"
    if any(sight.ended != "whole" or sight.request.timeout_s is not None for sight in group):
        return "unclear"
    if call.ended == "error" and call.answer.status >= 500:
        return "failed"
    is_served = any(sight.status == 200 and not sight.error for sight in group)
    return "answered" if is_served and call.answer.is_good and call.ended == "whole" else "unclear"


def _surely_open(view: View, worker: int, known: Sequence[Result]) -> Iterator[tuple[int | None, Open]]:
    """Return when the breakers of a route are surely open: an account's, or the route's (None), for all accounts."""
    if view.moves_upstreams or any(trouble.worker == worker for trouble in view.record.troubles):
        return  # another process, and other settings, have breakers of their own
    for account in sorted({each.account for each in known}):
        yield from ((account, opening) for opening in _openings([each for each in known if each.account == account]))
    counted: list[Result] = []
    for each in known:
        of_account = [other for other in counted if other.account == each.account and other.what == "failed"]
        if each.what != "failed" or len(of_account) < MOST_OF_ACCOUNT:
            counted.append(each)
    for opening in _openings(counted)[:1]:  # the failure of a probe may not count
        if opening.since - counted[0].ended_at < WINDOW_S:
            yield None, opening


def _openings(known: Sequence[Result]) -> list[Open]:
    """Return when a breaker is surely open that learns of these results: after ten failures in a row, and after probes."""
    since = _opened_at(known[: LEAST_CALLS - 1])  # with more calls it may have opened before
    if since is None:
        return []
    open_s, found = OPEN_S, [Open(since, since + LEAST_SHARE * OPEN_S)]
    while probes := [each for each in known if each.began_at > found[-1].until - HOP_S]:
        probe = min(probes)
        if probe.what != "failed":
            break
        found.append(Open(probe.began_at - ASKED_S, probe.ended_at + HOP_S))  # one probe at a time
        if any(each is not probe and each.began_at < probe.ended_at + ASKED_S for each in probes):
            break
        open_s = min(2 * open_s, MOST_OPEN_S)
        found.append(Open(probe.ended_at, probe.ended_at + LEAST_SHARE * open_s))
    return found


def _opened_at(known: Sequence[Result]) -> float | None:
    """Return when ten failures in a row had come, if their order is sure."""
    others = [each.ended_at for each in known if each.what != "failed"]
    failed = [each.ended_at for each in known if each.what == "failed"]
    for first, last in zip(failed, failed[IN_A_ROW - 1 :], strict=False):
        if not any(first - HOP_S <= other <= last + HOP_S for other in others):
            return last
    return None


def _least_wait_s(view: View, sight: Sight, upstream: str, model: str) -> float:
    """Return the least that a refused request is to wait for a route."""
    worker, now = view.worker(sight), sight.ended_at
    openings = _surely_open(view, worker, _results(view, worker, upstream, model))
    theirs = [opening for account, opening in openings if account in {None, view.key(sight)}]
    late_s = ASKED_S + HOP_S  # the refusal was on its way for a while
    return max((each.until - now for each in theirs if each.since + late_s < now < each.until), default=0.0)


def _most_wait_s(view: View, sight: Sight, upstream: str, model: str, now: float) -> float | None:
    """Return the most that a request is told to wait for a route at a time. None: no breaker can be open."""
    known = _results(view, view.worker(sight), upstream, model)
    known = [each for each in known if each.began_at <= now + ASKED_S]
    own = [each for each in known if each.account == view.key(sight)]
    waits = [_most_open_s(own, now, of_route=False), _most_open_s(known, now, of_route=True)]
    return max((wait_s for wait_s in waits if wait_s is not None), default=None)


def _most_open_s(known: Sequence[Result], now: float, *, of_route: bool) -> float | None:
    """Return how long a breaker that learns of these results may still let nothing through at a time. None: it is closed.

    Against a route few failures of an account count.
    """
    ended = [each for each in known if each.ended_at <= now + HOP_S]
    run: list[Result] = []  # of failures since an answer that had begun after the last one
    for each in ended:
        if each.what in MAY_HAVE_FAILED:
            run.append(each)
        elif (
            each.what == "answered"
            and each.ended_at + ASKED_S < now
            and all(other.ended_at < each.began_at for other in run)
        ):
            run = []
    counted = partial(_most_counted, ended, of_route=of_route)
    failed = counted([each for each in ended if each.what in MAY_HAVE_FAILED])
    is_half = failed >= LEAST_CALLS // 2 and len(ended) >= LEAST_CALLS
    if counted(run) < IN_A_ROW and not is_half:
        return None
    opened_at = run[IN_A_ROW - 1].ended_at if len(run) >= IN_A_ROW else -math.inf
    probes = sum(each.began_at > opened_at for each in run)
    longest_s = MOST_SHARE * min(OPEN_S * 2**probes, MOST_OPEN_S)
    left_s = max((each.ended_at for each in run), default=-math.inf) + longest_s + 3 * HOP_S - now
    if any(each.ended_at > now - ASKED_S for each in known):  # a probe may run
        left_s = max(left_s, longest_s / MOST_SHARE)
    return left_s if left_s >= 0 else None


def _most_counted(ended: Sequence[Result], failed: Sequence[Result], *, of_route: bool) -> int:
    """Return how many of some failures count at most, given all that ended: against a route few of each account."""
    if not (failed and of_route):
        return len(failed)
    windows = 1 + int((failed[-1].ended_at - ended[0].ended_at) // WINDOW_S)
    counts = [sum(each.account == account for each in failed) for account in {each.account for each in failed}]
    return sum(min(each, MOST_OF_ACCOUNT * windows) for each in counts)
