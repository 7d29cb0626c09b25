"""Rules on how an answer comes to its client: when, from which provider, and what its headers say of that."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Final, Literal

from simulation.bills import is_usage_only, over_at, ran_short, runs_on, without_cost
from simulation.breakers import may_be_open, model_of, orders_of, routes_of
from simulation.client import Sight, data_of
from simulation.history import (
    DRAIN_S,
    FIRST_BYTE_S,
    HEARTBEAT_S,
    UPSTREAMS,
)
from simulation.limits import most_reserved, tokens_taken
from simulation.provider import Call
from simulation.reasons import (
    BUCKET_S,
    DETACHED_S,
    has_lost_record,
    limits_named,
    most_workers,
    others_of,
    scope_of,
)
from simulation.record import HOP_S, RECOVERY_S, STORE, Drain, View, cut_short

PROMPT_S: Final = 4 * HOP_S  # an event's way over two connections, and a renewal's to the store and back
REPEATED_S: Final = 10 * HOP_S  # that a repeat takes longer: the first's parts go to the store, which it asks for news
LAST_BYTE_S: Final = (
    2.0 + 1.0
)  # that a body's end after its `[DONE]` is waited for (docs/reliability.md), looked at each second
BUFFERED_BYTES: Final = (
    128 * 1024 + 3 * 65_536
)  # by the gateway (docs/reliability.md), under way twice, in the provider
PING_LATE_S: Final = 1.0 + 2 * HOP_S  # that a ping may be behind `heartbeat_s`, where streams are looked at each second
ADMITTED_S: Final = 3 * HOP_S  # in which a request is let in: each of its calls to the store may be slow, and few are
API_VERSION: Final = "2026-08"  # docs/api.md
ENDED_S: Final = 0.5  # in which an instance ends whose requests are over: connections linger, and it looks at times
LAST_WORDS_S: Final = 4.0  # in which what is cut short is told so: streams, and then whole answers
SETTLED_S: Final = 30.0  # in which an instance settles without its store or its disk
RETRIES: Final = 10  # second attempts that a worker may make
RETRIES_WITHIN_S: Final = 20.0  # of which some count that were up to so long ago
WAY_S: Final = 3 * HOP_S  # of an answer, with which a date comes nearer
MS: Final = 0.001  # to which a wait is rounded up
HOLD_S: Final = 2.0  # `server.first_event_hold_s`, which holds a stream's head back
Verdict = Literal["next", "model", "end", "either"]


def answers_are_prompt(view: View) -> Iterator[str]:
    """Check that an event that a provider has sent is at its client at once, and so is an answer's end.

    A repeat reads along by way of the store.
    """
    for sight in view.record.sights:
        calls = view.calls_for(sight)
        is_repeat = "idempotent-replayed" in sight.headers
        is_slow = any(other.request.reads in {"slowly", "stalls"} for other in view.group(sight))  # and holds all back
        if not calls or is_slow or sight.sent_at is None:
            continue
        if view.feels(sight, *STORE):  # a renewal waits for the store
            continue
        if any(has_lost_record(view, other) for other in view.group(sight)):  # for whose end a repeat waits
            continue
        if view.is_anothers(sight) and (len(calls) > 1 or not is_repeat):
            continue  # another's call
        call, most_s = calls[-1], REPEATED_S if is_repeat else PROMPT_S
        asked_at = sight.sent_at + ADMITTED_S if is_repeat else 0.0
        if sight.is_stream and not call.answer.other_shape:
            came = [(line, at) for line, at in _arrivals(sight) if line != "[DONE]" and not is_usage_only(line)]
            sent = [pair for pair in zip(call.lines, call.lines_at, strict=False) if not is_usage_only(pair[0])]
            for number, ((got, came_at), (line, sent_at)) in enumerate(zip(came, sent, strict=False)):
                late_s = came_at - max(sent_at, asked_at)
                if got == line and late_s > most_s:
                    yield f"{sight.request_id}: event {number} came {late_s:.2f} s after it was sent"
                    break
            done_at = next((at for line, at in _arrivals(sight) if line == "[DONE]"), 0.0)
            late_s = done_at - max(call.last_at, asked_at)
            if call.complete and call.answer.end != "no_done" and late_s > most_s:
                yield f"{sight.request_id}: [DONE] came {late_s:.2f} s after the provider's"
        is_done = call.complete and bool(call.lines) and call.answer.end != "no_done"
        over_at = min(call.ended_at, call.last_at + LAST_BYTE_S) if is_done else call.ended_at
        late_s = sight.ended_at - max(over_at, asked_at)
        if sight.ended == "whole" and call.ended in {"whole", "error"} and late_s > most_s:
            yield f"{sight.request_id}: its end came {late_s:.2f} s after the provider's"


def _arrivals(sight: Sight) -> Iterator[tuple[str, float]]:
    """Return the data of each event, without what the gateway adds, and when it had come whole."""
    size, at = 0, 0.0
    times = iter(sight.times)
    reached = 0
    for event in sight.payload.split(b"\n\n")[:-1]:
        size += len(event) + 2
        while reached < size:
            at, reached = next(times, (sight.ended_at, size))
        data = data_of(event.decode(errors="replace"))
        if data is not None:
            yield without_cost(data), at


def streams_are_alive(view: View) -> Iterator[str]:
    """No stream is silent for longer than the heartbeat, before its head too."""
    for sight in view.record.sights:
        if (
            not sight.request.stream
            or sight.status not in {0, 200}
            or sight.sent_at is None
            or sight.request.reads not in {"all", "hangs_up", "leaves"}
        ):
            continue
        if not view.calls.get(sight.marker) or view.feels(sight, *STORE) or sight.ended == "unconnected":
            continue
        times = [sight.sent_at + ADMITTED_S, *(at for at, _ in sight.times), sight.ended_at]
        longest = max(later - earlier for earlier, later in itertools.pairwise(times))
        if longest > HEARTBEAT_S + PING_LATE_S:
            yield f"{sight.request_id} heard nothing for {longest:.2f} s"


def streams_wait(view: View) -> Iterator[str]:
    """Check that a stream is read from its provider no faster than its client takes it, but for what buffers hold."""
    for sight in view.record.sights:
        if sight.request.reads != "stalls" or not sight.request.stream or runs_on(view, sight):
            continue
        for call in view.own_calls(sight)[-1:]:
            largest = max(map(len, call.lines), default=0)
            waits = call.sent_bytes - len(sight.payload)
            is_plain = not (call.answer.error or call.answer.gzip or call.answer.other_shape)
            if is_plain and waits > BUFFERED_BYTES + 2 * largest:
                yield f"{sight.request_id}: {waits} bytes wait for its client, who takes none"


def failover_happens(view: View) -> Iterator[str]:
    """Check that another provider is asked where docs/failover.md says so, and nowhere else."""
    for sight in view.record.sights:
        calls = view.own_calls(sight)
        if not calls or view.is_anothers(sight):
            continue
        verdicts = [_verdict(sight, call) for call in calls]
        for call, verdict, later in zip(calls, verdicts, calls[1:], strict=False):
            if verdict == "end" or (verdict == "model" and model_of(call) == model_of(later)):
                yield f"{sight.request_id}: {later.upstream} was asked after {_told(call)}"
        if sight.ended != "whole" or not sight.error or sight.request.timeout_s is not None or cut_short(view, sight):
            continue
        refused_by = {model_of(call) for call, verdict in zip(calls, verdicts, strict=True) if verdict == "model"}
        asked = {(model_of(call), call.upstream) for call in calls}
        orders = orders_of(view, sight)
        left = [
            (name, route)
            for route, name in orders[0]
            if all((route, name) in order for order in orders)
            and UPSTREAMS[route].is_there
            and (name, route) not in asked
            and name not in refused_by
            and not may_be_open(view, sight, route, name)
        ]
        if left and verdicts[-1] in {"next", "model"} and not _is_budget_spent(view, sight):
            yield f"{sight.request_id}: {_told(calls[-1])}, and {left} were not asked"


def _is_budget_spent(view: View, sight: Sight) -> bool:
    """Whether a worker may have made all its second attempts: ten, and a fifth of the requests of the last 10 s or so."""
    second = [
        call
        for other in view.record.sights
        if view.worker(other) == view.worker(sight)
        for call in view.calls.get(other.marker, [])[1:]
        if 0 <= sight.ended_at - call.at <= RETRIES_WITHIN_S
    ]
    return len(second) >= RETRIES


def _told(call: Call) -> str:
    return f"{call.answer.status} {call.answer.error or call.answer.end} from {call.upstream}"


def _verdict(sight: Sight, call: Call) -> Verdict:
    """Decide who may be asked after a call: the next provider, another model, nobody, or whether it isn't known."""
    answer, streamed = call.answer, sight.request.stream
    if call.ended == "closed":
        waited_in_vain = not call.head_sent and abs(call.ended_at - call.at - FIRST_BYTE_S) < 2 * HOP_S
        return "either" if not waited_in_vain else "next" if streamed else "end"
    if call.ended == "cut" and not call.head_sent:
        return "next" if streamed else "end"
    if answer.error and answer.status != 200:
        verdicts: dict[str, Verdict] = {"model": "model", "request": "end"}
        return verdicts.get(answer.refuses, "next")
    if answer.error:
        return {"failed": "next" if streamed else "end", "page": "end"}.get(
            answer.error, "either" if streamed else "end"
        )
    if answer.end in {"whole", "done_twice", "late_error", "no_done"} or call.lines_at or not streamed:
        return "end"
    if answer.other_shape:
        return "either"
    waited_s = call.ended_at - call.at - answer.delay_s  # since its head
    if waited_s < HOLD_S - HOP_S * 2:
        return "next"
    return "end" if waited_s > HOLD_S + HOP_S * 2 else "either"


def attempts_are_told(view: View) -> Iterator[str]:
    """Check that the headers say how many providers were asked, and which model served, each by both of its names."""
    for sight in view.record.sights:
        if sight.status:
            yield from _header_faults(sight)
        calls = view.own_calls(sight)
        if sight.ended != "whole" or view.is_anothers(sight) or not sight.times:
            continue
        begun = [call for call in calls if call.at <= sight.times[0][0]]
        gone = sum(not UPSTREAMS[route].is_there for route, _ in routes_of(view, sight))
        told = int(sight.headers.get("x-mesh-attempts", 0))
        is_early = sight.payload.startswith(b": ping")  # the head was on its way while another provider was asked
        later = [call for call in begun[1:] if is_early and call.at > sight.times[0][0] - HOP_S]
        on_the_way = [call for call in calls if sight.times[0][0] < call.at <= sight.times[0][0] + HOP_S]
        never_came = _may_be_on_its_way(sight) and (sight.status == 504 or calls == begun)
        most = len(begun) + gone + max(len(on_the_way), never_came)
        if not len(begun) - len(later) <= told <= most:
            yield f"{sight.request_id} says {told} attempts, and {len(begun)} providers were asked"
        if sight.status != 200 or not begun:
            continue
        named = sight.headers.get("x-mesh-model")
        if named not in {model_of(call) for call in begun[-1 - len(later) :]}:
            yield f"{sight.request_id} names {named}, and {model_of(begun[-1])} served"
        is_fallback = told > 1 or named != sight.request.model
        if (sight.headers.get("x-mesh-routing-fallback") == "true") != is_fallback:
            yield f"{sight.request_id}: x-mesh-routing-fallback isn't {is_fallback}"


def _may_be_on_its_way(sight: Sight) -> bool:
    """Whether a deadline may have passed, or an instance have ended, while another provider was being connected to."""
    is_timed_out = sight.status == 504 and sight.request.timeout_s is not None
    return is_timed_out or (sight.status == 503 and sight.error.get("code") == "overloaded")


def _header_faults(sight: Sight) -> Iterator[str]:
    """Find headers of an answer that contradict each other (docs/api.md, "Response headers")."""
    head = sight.headers
    model = head.get("x-mesh-model")
    right = {
        "x-mesh-version": API_VERSION,
        "x-resolved-model-id": model,
        "x-mesh-routing-attempts": head.get("x-mesh-attempts"),
        "x-mesh-routing-model": model if "x-mesh-routing-fallback" in head else None,
    }
    for name, value in right.items():
        if head.get(name) != value:
            yield f"{sight.request_id}: {name} is {head.get(name)}, and {value} would be right"


def what_runs_on_is_read(view: View) -> Iterator[str]:
    """Check that an answer that goes on without its client is read to its end, for `DETACHED_S` at most."""
    for sight in view.record.sights:
        if sight.ended != "left" or not runs_on(view, sight) or ran_short(view, sight):
            continue
        for call in view.own_calls(sight):
            is_told = call.complete or call.broke_down  # then its body may be left
            is_left = call.ended == "closed" and not (call.answer.is_silent or is_told)
            if (
                is_left
                and sight.ended_at <= call.ended_at < sight.ended_at + DETACHED_S
                and not view.feels(sight, until=call.ended_at)
            ):
                yield f"{call.upstream} was left {call.ended_at - sight.ended_at:.2f} s after {sight.request_id}'s client"


def drains_end(view: View) -> Iterator[str]:
    """Check that an instance that is to end does so when its requests are over or cut short, and leaves none before.

    Its answers say `connection: close`, and connections without a request are closed. It has 30 s to settle where that
    fails (docs/operations.md, "Drain and restart").
    """
    for drain in view.record.drains:
        yield from _kept_connections(view, drain)
        signals = [each.start for each in view.record.drains if each.worker == drain.worker and each.end == drain.end]
        if drain.start > min(signals):
            continue  # the second signal, which is judged with the first one
        cut_at = min([drain.start + DRAIN_S, *(at for at in signals if at > drain.start)])
        ours = [sight for sight in view.record.sights if view.worker(sight) == drain.worker]
        ours = [sight for sight in ours if sight.began_at <= drain.end and over_at(view, sight) >= drain.start]
        is_slow = any(sight.request.reads in {"slowly", "stalls"} for sight in ours)
        last = math.inf if is_slow else max(map(partial(over_at, view), ours), default=drain.start)
        fails = [each for each in view.record.troubles if each.start <= drain.end and each.end >= drain.start]
        fails = [each for each in fails if each.what != "drained" and each.worker in {None, drain.worker}]
        until = max(drain.start, min(last, cut_at)) + ENDED_S
        until += (LAST_WORDS_S if last >= cut_at else 0.0) + (SETTLED_S if fails else 0.0)
        if drain.end > until:
            took_s = drain.end - drain.start
            yield f"gateway-{drain.worker} ended {took_s:.2f} s after it was told to, {drain.end - until:.2f} s too late"
        for sight in ours if not fails else ():
            if sight.ended == "left" and runs_on(view, sight) and not ran_short(view, sight):
                for call in view.own_calls(sight):
                    ended_at = min(cut_at, sight.ended_at + DETACHED_S) - HOP_S
                    is_left = call.ended == "closed" and not (call.answer.is_silent or call.complete)
                    if is_left and drain.start <= call.ended_at < ended_at:
                        left_s = call.ended_at - drain.start
                        yield f"{call.upstream} was left with {sight.request_id} {left_s:.2f} s after a drain began"


def _kept_connections(view: View, drain: Drain) -> Iterator[str]:
    """Find an answer of an instance that ends which lets its client keep the connection, and a connection that it keeps."""
    for sight in view.record.sights:
        if view.worker(sight) == drain.worker and sight.status:
            begins_at = min((at for at, _ in sight.times), default=math.inf)
            if drain.start + HOP_S < begins_at <= drain.end and sight.headers.get("connection") != "close":
                yield f"{sight.request_id} was answered {begins_at - drain.start:.2f} s after a drain began, to keep alive"
    for idle in view.record.idles:
        is_ours = idle.worker % view.history.workers == drain.worker
        since = max(idle.since, drain.start)
        if is_ours and idle.since <= drain.end and since + ENDED_S < idle.until:
            yield f"gateway-{drain.worker} kept a connection for {idle.until - since:.2f} s of a drain"


# Waits and repeats.

NO_CAPACITY: Final = frozenset({503, 529})
SLOT_S: Final = 1.0  # that a 429 for requests in parallel says: nothing knows when one ends
QUOTA_S: Final = 600.0  # docs/errors.md: that a spent quota is waited for


def waits_are_told(view: View) -> Iterator[str]:
    """Check Retry-After where docs/errors.md promises it, also a provider's, and `x-should-retry`."""
    for sight in view.record.sights:
        if sight.ended != "whole" or sight.status in {0, 200} or not sight.error:
            continue
        calls = view.calls_for(sight)
        wait_ms = sight.headers.get("retry-after-ms")
        wait_s = None if wait_ms is None else float(wait_ms) / 1000
        if sight.status in {429, 503} and wait_s is None:
            yield f"{sight.request_id}: {sight.status} {sight.error.get('code')} without Retry-After"
        if sight.status not in {429, 502, 503} and wait_s is not None:
            yield f"{sight.request_id}: {sight.status} {sight.error.get('code')} with Retry-After {wait_s}"
        if calls and not view.is_anothers(sight) and sight.status in {502, 503}:
            expected = _waits_of(sight, calls)
            if expected is not None and not any(_is_within(wait_s, each) for each in expected):
                yield f"{sight.request_id}: its wait is {wait_s}, and {sorted(map(str, expected))} were the providers'"
        if sight.status == 429 and wait_s is not None and view.first_jump > sight.ended_at:
            shared = most_workers(view, sight)
            longest_s = _longest_wait_s(view, sight, max(1, shared))
            has_failed = not shared and view.feels(sight, *STORE, before_s=BUCKET_S)
            late_s = RECOVERY_S if has_failed else 0.0  # by which another may have been let in later
            if wait_s > longest_s + HOP_S + late_s:
                yield f"{sight.request_id} is to wait {wait_s:.3f} s, and {longest_s:.3f} s would do"
        says_no = sight.headers.get("x-should-retry") == "false"
        may = _may_say_no(view, sight, calls, wait_s)
        if says_no is not may and may is not None:
            yield f"{sight.request_id}: {sight.status} {sight.error.get('code')} says x-should-retry: {not says_no}"


def _longest_wait_s(view: View, sight: Sight, workers: int) -> float:
    """Return the longest wait that a 429 may name: until its bucket, or a worker's share of it, has what the request takes."""
    message = str(sight.error.get("message"))
    scope = scope_of(message)
    others, tokens = others_of(view, sight, scope), view.plan(sight, scope).tokens_per_minute
    if "tokens per minute" in message and tokens:
        size = max(tokens / workers, 1)
        taken = sum(max(_used(view, other), most_reserved(other), tokens_taken(view, other)[1]) for other in others)
        return max(0.0, min(most_reserved(sight), size) - (size - taken)) * 60 / size
    buckets = limits_named(view, sight, message)
    if not buckets:
        return SLOT_S
    rate = min(max(bucket.limit / workers, 1) / bucket.period_s for bucket in buckets)
    if workers > 1:
        return 1 / rate  # of a bucket that has nothing left
    admitted_at = [
        max((call.at for call in view.calls.get(other.marker, ())), default=other.ended_at) for other in others
    ]
    levels = [
        min(bucket.size for bucket in buckets)
        + rate * max(0.0, sight.began_at - since)
        - sum(at >= since for at in admitted_at)
        for since in admitted_at
    ]
    return (1 - max(0.0, min(levels, default=1.0))) / rate


def _used(view: View, sight: Sight) -> int:
    events = view.settled.get(sight.request_id, ())
    return sum(int(event["prompt_tokens"]) + int(event["completion_tokens"]) for event in events)


def _is_within(wait_s: float | None, told: tuple[float, float] | None) -> bool:
    return wait_s is None if told is None else wait_s is not None and told[0] <= wait_s <= told[1]


def _waits_of(sight: Sight, calls: list[Call]) -> list[tuple[float, float] | None] | None:
    """Return what the answer's wait may be, at least and at most, by what the providers said; None: it isn't known.

    None among them: no wait. A date is nearer when it is read.
    """
    if sight.error.get("code") == "provider_not_available":
        limited = [call for call in calls if call.answer.error and call.answer.status == 429]
        waits = [
            (max(call.wait_s or 0.0, QUOTA_S),) * 2 if call.answer.error == "quota" else _told_wait(call) or (1.0, 1.0)
            for call in limited
        ]
        return [min(waits)] if waits else None
    if sight.error.get("code") == "upstream_error":
        return [_told_wait(call) if call.answer.error and call.answer.status in NO_CAPACITY else None for call in calls]
    return None


def _told_wait(call: Call) -> tuple[float, float] | None:
    """Return the least and the most that a provider's wait may be when the gateway has read it."""
    if call.wait_s is None or not call.answer.dated:
        return None if call.wait_s is None else (call.wait_s, call.wait_s)
    return call.wait_s - WAY_S - call.answer.pause_s, call.wait_s + MS


def _may_say_no(view: View, sight: Sight, calls: list[Call], wait_s: float | None) -> bool | None:
    """Return whether `x-should-retry: false` is due: a repeat may be paid twice, is in vain or comes too early. None: perhaps."""
    if sight.status == 409 or (wait_s is not None and wait_s > 60):
        return True
    if sight.status < 500:
        return False
    if view.is_anothers(sight) or (sight.status == 504 and sight.request.keyed):
        return None  # another request's calls, and a repeat that gets the answer
    is_late = any(call.ended_at > sight.ended_at - 2 * HOP_S for call in calls)
    if (is_late and sight.status == 504) or any(
        call.ended != "error" or call.answer.status in {200, 500} for call in calls
    ):
        return True
    is_on_its_way = _may_be_on_its_way(sight) and int(sight.headers.get("x-mesh-attempts", 0)) > len(calls)
    return None if is_late or is_on_its_way or any(call.answer.status in NO_CAPACITY for call in calls) else False
