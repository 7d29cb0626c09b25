"""Rules on what a client is told beside its answer, and the operator by the log: ids, errors, and a line for each request."""

import json
import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from simulation.accounts import MINUTE_S
from simulation.answers import HOLD_S
from simulation.bills import is_lost, nusd, over_at, runs_on
from simulation.breakers import routes_of
from simulation.client import Sight, trace_of
from simulation.history import HOLD_TTL_S, STORE_TIMEOUT_S, UPSTREAMS
from simulation.invalid import INVALID
from simulation.provider import FAILURE, Call
from simulation.reasons import REFUSALS, changed_limits, met_deadline
from simulation.record import HOP_S, LATENCY_S, PERIODS, RECOVERY_S, Look, View, cut_short, date_of

OK: Final = 200
REQUESTS_A_MINUTE, TOKENS_A_MINUTE = 600, 1_000_000  # of a key without limits of its own (docs/configuration.md)
CUT_SHORT: Final = frozenset({"gateway_timeout", "overloaded"})  # what ends a request while a provider answers
BUSY: Final = 429
WAY_S: Final = 4 * HOP_S  # of a request and its answer, and of the connection's beginning
LIMITS: Final = {  # the names of what refuses, as docs/operations.md has them, by words of the message
    "USD available": "credit",
    **{
        words: words.removesuffix(" per minute").replace(" ", "_")
        for scope in ("key", "account", "session")
        for kind in (
            *("requests per minute", "tokens per minute", "requests per day", "parallel requests"),
            *("total budget", "daily budget", "monthly budget"),
        )
        for words in [f"{scope} {kind}"]
    },
}
LEAST_MS: Final = 0.001  # of an admission: a turn is longer
AFTER_MS: Final = 1.0  # of the gateway's own part, from a provider's first byte on: some turns
PING: Final = b": ping"


class Span(NamedTuple):
    """Numbers from `least` to `most`."""

    least: float
    most: float

    def __contains__(self, number: object) -> bool:
        """Whether a number is among them."""
        return isinstance(number, int | float) and self.least <= number <= self.most


class Named(NamedTuple):
    """How `/v1/key` names a limit. `per`: "minute" or "day"; None: of requests in parallel."""

    scope: str
    kind: str
    per: str | None


def ids_are_told(view: View) -> Iterator[str]:
    """Check that each answer and each error has its request's id, and says so if it is another request's answer.

    A repeat that reads along gets the first one's error event. Its head comes before the answer if a ping does.
    """
    for sight in view.record.sights:
        if not sight.headers:
            continue
        name, group = sight.request_id, {other.request_id for other in view.group(sight)}
        if sight.headers.get("x-request-id") != name:
            yield f"{name} is called {sight.headers.get('x-request-id')}"
        error = sight.error if sight.ended == "whole" else {}
        if error and not {error.get("request_id"), _id_beside(sight)} <= (group if sight.status == 200 else {name}):
            yield f"{name}: its error is that of {error.get('request_id')}, {_id_beside(sight)}"
        if sight.ended != "whole" or sight.status != 200 or is_lost(view, sight):
            continue
        is_repeat, has_run = "idempotent-replayed" in sight.headers, name in view.settled or name in view.lost
        if is_repeat and (has_run or not sight.request.keyed):
            yield f"{name} says that its answer is another request's, and it has run"
        if sight.request.keyed and not (is_repeat or has_run or sight.payload.startswith(PING)):
            yield f"{name} doesn't say that its answer is another request's"


def _id_beside(sight: Sight) -> object:
    """Return the id beside an error, in its envelope."""
    return json.loads(sight.data[-1] if sight.is_stream else sight.payload).get("request_id")


def refusals_are_told(view: View) -> Iterator[str]:
    """Check that a provider's refusal of a request is told in its own words and code, and one of the gateway in neither.

    Of several attempts the first refusal of the request counts, and else a wait. A provider's code is told as `provider_code`.
    """
    for sight in view.record.sights:
        calls = view.calls_for(sight)
        for call in calls:
            words = _words(call)
            is_the_operators = call.answer.refuses == "gateway" or call.answer.status == BUSY
            if is_the_operators and words and words.encode() in sight.payload:
                yield f"{sight.request_id} was told what {call.upstream} said to the operator: {words}"
        if sight.ended != "whole" or not sight.error or view.is_anothers(sight):
            continue
        told = sight.error.get("provider_code")
        codes = {_code(call) for call in calls}
        is_own = bool(calls) and all(call.answer.refuses == "gateway" for call in calls)
        if told not in codes and (told is not None or (is_own and sight.error.get("code") == "upstream_error")):
            yield f"{sight.request_id} has provider_code {told}, and {codes} were the providers'"
        refusal = next((call for call in calls if call.answer.refuses in REFUSALS), None)
        if any(_has_its_own(sight, call) for call in calls[-1:]) or met_deadline(view, sight) or cut_short(view, sight):
            continue
        if refusal is not None:
            yield from _refusal_faults(sight, refusal)
        elif sight.error.get("code") == "upstream_error" and any(call.answer.status == BUSY for call in calls):
            yield f"{sight.request_id} was told of a failure, and a provider asked to wait"


def _has_its_own(sight: Sight, call: Call) -> bool:
    """Whether the last call's failure is told whatever others said: of an answer that began, or can't be read."""
    if call.answer.error:
        return call.answer.error == "page" or (call.answer.status == OK and not sight.request.stream)
    is_held = sight.request.stream and call.ended_at - call.at - call.answer.delay_s < HOLD_S - 2 * HOP_S
    return call.events_sent > 0 or (call.head_sent and not is_held)


def _refusal_faults(sight: Sight, call: Call) -> Iterator[str]:
    """Find what differs in a client's error from a provider's refusal of its request."""
    said, got = _error(call), sight.error
    expected = {"code": said["code"] or "provider_refused", "param": said["param"], "provider_code": said["code"]}
    wrong = {name: got.get(name) for name, right in expected.items() if got.get(name) != right}
    if sight.status not in {200, call.answer.status}:
        wrong["status"] = sight.status
    if _words(call) not in str(got.get("message")) or not isinstance(got.get("provider_error"), dict):
        wrong["message"] = got.get("message")
    if wrong:
        yield f"{sight.request_id} was told {wrong}, and {call.upstream} refused it with {call.answer.status} {said}"


def _error(call: Call) -> dict[str, Any]:
    """Return the error object of a provider's answer; empty if it has none."""
    try:
        body = json.loads(call.body_bytes if call.answer.error else b"")
    except ValueError:
        return {}
    (said,) = body if isinstance(body, list) else (body,)
    return dict(said["error"])


def _words(call: Call) -> str:
    """Return a provider's message, without what follows of the request and its secret."""
    return str(_error(call).get("message", "")).partition(f" {call.said}")[0]


def _code(call: Call) -> str | None:
    """Return the code of a provider's error, also of an error event."""
    code = _error(call).get("code") if call.answer.error else FAILURE if call.answer.end == "error_event" else None
    return None if code is None else str(code)


def requests_are_logged(view: View) -> Iterator[str]:
    """Check that each request has one line in the log, whose fields are what its client saw and the ledger has of it."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in view.record.logged:
        lines.setdefault(line["request_id"], []).append(line)
    for sight in view.record.sights:
        found = lines.pop(sight.request_id, [])
        is_chat = not sight.request.invalid or INVALID[sight.request.invalid].is_logged
        is_due = is_chat and sight.ended == "whole" and not view.feels(sight, "killed", until=over_at(view, sight))
        if len(found) > 1 or (is_due and not found):
            yield f"{sight.request_id} has {len(found)} lines in the log"
        for line in found:
            is_known = line["model"] is not None
            seen = {**_seen(view, sight), "stream": [is_known and sight.request.stream]}
            seen["overhead_ms"] = _overhead_ms(view, sight) if line["attempts"] else [0]
            expected = [*seen.items(), *_booked(view, sight).items()]
            right = {name: each for name, each in expected if line[name] not in each}
            if right:
                wrong = {name: line[name] for name in right}
                yield f"{sight.request_id} is logged with {wrong}, and {right} would be right"
            for event in view.settled.get(sight.request_id, ()):
                kept = {name: line[name] for name in ("account", "key_id", "model", "upstream", "attempts")}
                kept |= {"code": line["code"], "upstream_status": line["upstream_status"] if line["code"] else None}
                wrong = {name: held for name, held in _kept(event).items() if held != kept[name]}
                if wrong:
                    yield f"{sight.request_id} is settled with {wrong}, and logged with {kept}"
    for name in lines:
        yield f"{name} has a line in the log, and no client sent it"


def failures_are_logged(view: View) -> Iterator[str]:
    """Check that each attempt that a provider refused or failed has a line in the log, and that no other has one."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in view.record.failed:
        lines.setdefault(line["request_id"], []).append(line)
    for sight in view.record.sights:
        found, calls = lines.pop(sight.request_id, []), view.own_calls(sight)
        told = [(line["upstream"], line["model"], line["status"]) for line in found]
        for call in calls:
            told_of = (call.upstream, str(call.body["model"]).removeprefix("up-"), call.answer.status)
            is_read = call is not calls[-1] or (sight.ended == "whole" and sight.error.get("code") not in CUT_SHORT)
            if (
                call.ended == "error"
                and call.answer.status != OK
                and is_read
                and not view.is_anothers(sight)
                and told_of not in told
            ):
                yield f"{sight.request_id}: the log has no line of {told_of}, but {told}"
        asked = {call.upstream for call in calls if not call.answer.is_good or call.ended != "whole"}
        gone = {route for route, _ in routes_of(view, sight) if not UPSTREAMS[route].is_there}
        for line in found:
            if line["upstream"] not in asked | gone or not 1 <= line["attempt"] <= len(calls) + len(gone):
                yield f"{sight.request_id}: attempt {line['attempt']} at {line['upstream']} didn't fail, as the log says"
    for name in lines:
        yield f"the log has a failed attempt of {name}, which no client sent"


def _seen(view: View, sight: Sight) -> dict[str, Any]:
    """Return what a request's line may have of what its client saw."""
    key = view.history.keys[sight.request.key]
    is_named = [] if sight.status not in {0, 401, 503} else [None]
    seen: dict[str, Any] = {"account": [f"a{key.account}", *is_named], "client": [view.record.client]}
    seen["key_id"] = [view.record.key_ids[sight.request.key], *is_named]
    calls = view.own_calls(sight)
    ends = [each for each in view.record.troubles if each.what in {"killed", "drained"}]
    sent = [each for each in calls[-1:] if each.complete or each.ended == "error"]
    end_at = max((each.last_at if each in sent else each.ended_at or math.inf for each in calls[-1:]), default=0.0)
    if sight.ended == "left" and end_at > sight.ended_at + LATENCY_S and not ends:
        seen["outcome"] = ["client_disconnected"]  # whatever became of it then (docs/reliability.md)
    if sight.ended != "whole":
        return seen
    error, replayed = sight.error, "idempotent-replayed" in sight.headers
    seen |= {
        "trace_id": [trace_of(sight.request_id).split("-")[1] if sight.request.keyed else None],
        "status": [sight.status],
        "code": [error.get("code")],
        "level": ["warning" if sight.status >= 500 else "info"],
    }
    if not error:
        replays = ["replayed"] if replayed or (sight.request.keyed and sight.payload.startswith(PING)) else []
        seen["outcome"] = replays if replayed else ["completed", *replays]
    if not sight.payload.startswith(PING):  # else its head came before another provider was asked
        seen["attempts"] = [0 if replayed else int(sight.headers.get("x-mesh-attempts", 0))]
        seen |= {} if error else {"model": [sight.headers.get("x-mesh-model")]}
    is_read = bool(calls) and calls[-1].ended == "error" and calls[-1].ended_at < sight.ended_at
    if not view.is_anothers(sight) and calls and (not error or is_read):
        call = calls[-1]
        gone = [route for route, _ in routes_of(view, sight) if error and not UPSTREAMS[route].is_there]  # asked unseen
        statuses = [call.answer.status, *([None] if gone else [])]
        seen |= {"upstream": [call.upstream, *gone], "upstream_status": statuses}
        seen |= {} if error else {"model": [str(call.body["model"]).removeprefix("up-")]}
    took_ms = (sight.ended_at - sight.began_at) * 1000
    if sight.request.reads == "all":  # what goes on after a client's deadline ends later
        goes_on = error.get("code") == "gateway_timeout" and runs_on(view, sight)
        waits = view.feels(sight, "killed", "drained", before_s=STORE_TIMEOUT_S)  # for a worker that begins
        seen["duration_ms"] = Span(0 if waits else took_ms - WAY_S * 1000, math.inf if goes_on else took_ms)
    seen["refused_by"] = _refused_by(sight)
    if sight.request.stream and not error and "replayed" not in seen["outcome"]:
        seen["ttft_ms"] = _first_event_ms(view, sight)
    elif not sight.request.stream:
        seen["ttft_ms"] = [None]
    return seen


def _first_event_ms(view: View, sight: Sight) -> Span:
    """Return how long a stream's first event may have taken, by when its provider sent and its client got it."""
    begins = sight.payload.find(b"data:")
    got_at = next((at for at, size in sight.times if size > begins), sight.ended_at)
    calls = [call for call in view.own_calls(sight) if call.at >= sight.began_at]
    waits = view.feels(sight, "killed", "drained", before_s=STORE_TIMEOUT_S)
    least_s = 0.0 if waits or not calls else calls[-1].at + calls[-1].answer.delay_s - sight.began_at - WAY_S
    return Span(max(0.0, least_s * 1000), (got_at - sight.began_at) * 1000)


def _overhead_ms(view: View, sight: Sight) -> Span:
    """Return what may be the gateway's own part of a request for which a provider was asked: most of it before."""
    calls_at = [call.at for call in view.own_calls(sight) if call.at >= sight.began_at]
    least_ms = LEAST_MS if view.is_strict else 0.0  # no turn passes without the store
    return Span(least_ms, (min(calls_at) - sight.began_at) * 1000 + AFTER_MS if calls_at else math.inf)


def _refused_by(sight: Sight) -> list[str | None]:
    """Return what may have refused a request before it ran, by its message; behind the pings of a repeat too."""
    message = str(sight.error.get("message"))
    found = [name for words, name in LIMITS.items() if words in message][:1] or [str(sight.error.get("code"))]
    if sight.status == 200:
        return [None, *(found if sight.request.keyed and sight.payload.startswith(PING) else ())]
    return [*found] if sight.status in {402, 429} else [None]


def _booked(view: View, sight: Sight) -> dict[str, list[Any]]:
    """Return what a request's line may have of its settlement; nothing if that may be lost."""
    events = view.settled.get(sight.request_id, [])
    if not events:
        return {}
    cost, waived = int(events[0]["cost_nusd"]), int(events[0]["waived_nusd"] or 0)
    return {
        "cost_usd": [usd_of(cost), usd_of(cost + waived)],
        "usage_source": [events[0]["usage_source"]],
        "outcome": [events[0]["outcome"]],
        "code": [events[0].get("code")],
        **{name: [int(events[0][name])] for name in ("prompt_tokens", "completion_tokens")},
    }


def _kept(event: dict[str, str]) -> dict[str, Any]:
    """Return what a settlement has that is in its request's line too."""
    status, code = int(event.get("upstream_status", 0)), event.get("code")
    kept = {"account": event["account"], "key_id": event["key"], "model": event["model"], "code": code}
    attempts, upstream = int(event["attempts"]), event["upstream"] or None
    return {**kept, "upstream": upstream, "attempts": attempts, "upstream_status": (status or None) if code else None}


def keys_are_told(view: View) -> Iterator[str]:
    """Check what `/v1/key` says of its key: whose it is, its limits and slots, its budgets, and what it has spent."""
    for look in view.record.looks:
        told, spent = look.told, spends_of(view, look)
        wrong = {name: told.get(name) for name, right in key_of(view, look).items() if told.get(name, "") != right}
        limits = limits_of(view, look)
        for bucket in told["limits"]:
            named = Named(*(bucket[name] for name in Named._fields))
            sizes, left = limits.get(named, {}), bucket["remaining"]
            size, name = sizes.get(bucket["limit"], 0), " ".join(filter(None, named))
            if bucket["limit"] not in sizes:
                wrong[name] = bucket
            elif left not in (slots_of(view, look, named.scope, size) if named.per is None else Span(0, size)):
                wrong[f"{name} left"] = left
            elif (left == size) != (bucket["reset"] in {"0s", None}) and named.per is not None:
                wrong[f"{name} reset"] = bucket["reset"]
        if (kinds := [tuple(bucket[name] for name in Named._fields) for bucket in told["limits"]]) != list(limits):
            wrong["limits"] = kinds
        for name, right in spent.items():
            if nusd(told["spend"][name]) not in right:
                wrong[name] = told["spend"][name]
        if wrong:
            yield f"a{look.account}: /v1/key of k{look.key} says {wrong}, {key_of(view, look)} and {spent} would be right"


def key_of(view: View, look: Look) -> dict[str, Any]:
    """Return what `/v1/key` says of a key that doesn't change."""
    key = view.history.keys[look.key]
    budgets = {f"{period}_usd": usd_of(key.budgets[period]) if period in key.budgets else None for period in PERIODS}
    named = {"id": view.record.key_ids[look.key], "account": f"a{look.account}", "budgets": budgets}
    unset = {"default_model": None, **({"expires_at": None} if key.expires_s is None else {})}
    return {**named, **unset, "models": list(key.models) or None}


def limits_of(view: View, look: Look) -> dict[Named, dict[int, int]]:
    """Return the limits of a key and its account that `/v1/key` names, in its order: what each may be, and its size then.

    A limit of a key's requests may have been changed.
    """
    key, account = view.history.keys[look.key], view.history.account(look.account)
    buckets = [("key", bucket) for bucket in key.buckets(REQUESTS_A_MINUTE, TOKENS_A_MINUTE)]
    buckets += [("account", bucket) for bucket in account.buckets()]
    limits: dict[Named, dict[int, int]] = {}
    for scope, bucket in sorted(buckets, key=lambda each: each[1].period_s):  # those of a minute first
        named = Named(scope, bucket.kind, "minute" if bucket.period_s == MINUTE_S else "day")
        limits[named] = {int(bucket.limit): int(bucket.size)}
        if named == Named("key", "requests", "minute"):
            limits[named] |= {limit: key.burst or limit for limit in changed_limits(view, look.key)}
    for scope, most in (("key", key.max_parallel), ("account", account.max_parallel)):
        if most is not None:
            limits[Named(scope, "parallel", None)] = {most: most}
    return limits


def slots_of(view: View, look: Look, scope: str, most: int) -> Span:
    """Return how many slots may be free: all long after the last requests, and none of those that surely run."""
    keys = (
        [look.key]
        if scope == "key"
        else [at for at, key in enumerate(view.history.keys) if key.account == look.account]
    )
    own = [sight for sight in view.record.sights if sight.request.key in keys and sight.began_at <= look.ended_at]
    are_over = all(over_at(view, sight) + HOLD_TTL_S + RECOVERY_S < look.began_at for sight in own)
    calls = [call for sight in own for call in view.own_calls(sight)[-1:]]
    running = {call.marker for call in calls if call.at <= look.began_at and call.ended_at >= look.ended_at}
    return Span(most if are_over else 0, most - (0 if view.record.troubles else len(running)))


def spends_of(view: View, look: Look) -> dict[str, Span]:
    """Return what a key may have spent in all, this day and this month: what was settled before the look, or during it."""
    troubles = view.record.troubles
    if view.clock_jumps or any(each.what == "failover" and each.end >= look.began_at for each in troubles):
        return {}
    events = (event for kept in view.settled.values() for event in kept)
    own = [event for event in events if event["key"] == view.record.key_ids[look.key]]
    began_ms, ended_ms = ((at + view.record.store_offset_s) * 1000 for at in (look.began_at, look.ended_at))
    spent = {}
    for name, form in (("total_usd", ""), ("day_usd", "%Y-%m-%d"), ("month_usd", "%Y-%m")):
        period = date_of(began_ms, form)
        costs = [
            (int(event["settled_ms"]), int(event["cost_nusd"]))
            for event in own
            if date_of(int(event["settled_ms"]), form) == period
        ]
        before, by = (sum(cost for at_ms, cost in costs if at_ms <= ms) for ms in (began_ms - 1, ended_ms))
        if date_of(ended_ms, form) == period:
            spent[name] = Span(before, by)
    return spent


def usd_of(amount_nusd: int) -> str:
    """Return nano-USD as docs/operations.md has it: USD with two to nine decimals."""
    whole, fraction = divmod(amount_nusd, 1_000_000_000)
    return f"{whole}.{f'{fraction:09d}'.rstrip('0').ljust(2, '0')}"
