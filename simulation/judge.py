"""Decide whether what came of a history is right, by a plain model of the contract.

It knows what providers billed and clients saw, and docs/; nothing of the gateway's code. Each rule is a function from
a record to the words of what breaks it. docs/simulation.md lists the rules.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, Final

from simulation.bills import allowed_charges, is_usage_only, text_of, told_cost
from simulation.client import Sight
from simulation.history import (
    ALLOWANCE_NUSD,
    HEARTBEAT_S,
    LEASE_TOKENS,
    MAX_OUTPUT_TOKENS,
    UPSTREAMS,
    WRITE_TIMEOUT_S,
)
from simulation.provider import Call
from simulation.reasons import buckets_are_right, deadlines_hold, limits_hold, statuses_have_reasons, waits_are_true
from simulation.record import LATENCY_S, PROPAGATION_S, RECOVERY_S, Finding, Record, Rule, View

MARKER: Final = re.compile(r"mk\d+q\w+?z")
MESH_FIELDS: Final = frozenset({"session_id", "timeout", "models", "template", "variables", "transforms", "cache"})
_COST: Final = re.compile(r',"cost":"[0-9.]+"(?=\}$)')  # what the gateway adds to the event with the usage


def books_balance(view: View) -> Iterator[str]:
    """Granted = balance + settled; holds are gone; events, hourly aggregates and the sums agree."""
    for number, book in view.record.books.items():
        charged = [event for event in book.events if event["event"] == "settled"]
        granted = sum(int(event["amount_nusd"]) for event in book.events if event["event"] == "grant")
        costs = sum(int(event["cost_nusd"]) for event in charged)
        if book.granted != book.balance + book.settled:
            yield f"a{number}: granted {book.granted}, but balance {book.balance} and settled {book.settled}"
        if costs != book.settled:
            yield f"a{number}: settled {book.settled}, but the events say {costs}"
        if granted != book.granted:
            yield f"a{number}: granted {book.granted}, but the events say {granted}"
        if book.held or book.holds or book.running:
            yield f"a{number}: {book.held} nano-USD in {book.holds} holds and {book.running} slots are left"
        for metric, field in (
            ("cost", "cost_nusd"),
            ("prompt", "prompt_tokens"),
            ("completion", "completion_tokens"),
            ("cached", "cached_tokens"),
        ):
            total = sum(int(event[field]) for event in charged)
            if book.hours.get(metric, 0) != total:
                yield f"a{number}: the hours have {book.hours.get(metric, 0)} of {metric}, the events {total}"
        if book.hours.get("requests", 0) != len(charged):
            yield f"a{number}: the hours have {book.hours.get('requests', 0)} requests, the events {len(charged)}"


def grants_count_once(view: View) -> Iterator[str]:
    """Check that an account was granted what was granted: once for each ref."""
    for number, book in view.record.books.items():
        sure: dict[str, int] = {}
        maybe: dict[str, int] = {}
        for done in view.record.changes:
            if done.what == "grant" and done.account == number:
                (sure if done.ok else maybe)[done.ref] = done.amount
        least = sum(sure.values())
        most = least + sum(amount for ref, amount in maybe.items() if ref not in sure)
        if not (0 if view.is_lossy else least) <= book.granted <= most:
            yield f"a{number}: granted {book.granted}, and {least} to {most} were"


def charged_once(view: View) -> Iterator[str]:
    """Check that a hold is settled once, a request too, and an Idempotency-Key is charged once."""
    holds: dict[str, int] = {}
    for request_id, events in view.settled.items():
        for event in events:
            holds[event["hold_id"]] = holds.get(event["hold_id"], 0) + 1
        if len(events) > 1:
            yield f"{request_id} has {len(events)} settlements"
    for hold, count in holds.items():
        if count > 1:
            yield f"hold {hold} was settled {count} times"
    for marker in {sight.marker for sight in view.record.sights if sight.request.keyed}:
        group = [sight for sight in view.record.sights if sight.marker == marker]
        charged = [sight for sight in group if view.charge(sight) > 0]
        failed = [sight for sight in charged if sight.error or sight.ended not in {"whole", "left", "closed"}]
        cut = [call for call in view.calls.get(marker, ()) if not call.complete]
        if len(charged) - len(failed) - len(cut) > 1 and not any(view.feels(sight) for sight in group):
            yield f"the Idempotency-Key of {marker} was charged for {[sight.request_id for sight in charged]}"


def charges_are_bills(view: View) -> Iterator[str]:
    """Each request is charged what its provider bills, within the tolerance where nothing was reported."""
    for sight in view.record.sights:
        charge = view.charge(sight)
        allowed = allowed_charges(view, sight)
        if not any(cost.holds(charge) for cost in allowed):
            told = ", ".join(
                f"{cost.least}..{cost.most}" if cost.least != cost.most else str(cost.least)
                for cost in dict.fromkeys(allowed)
            )
            yield f"{sight.request_id} was charged {charge}, and {told or 'nothing'} would be right"


def tokens_are_reported(view: View) -> Iterator[str]:
    """Check that a settlement has the tokens of the provider's report, and the request's key, session and model."""
    for sight in view.record.sights:
        for event in view.settled.get(sight.request_id, ()):
            if event["session"] not in {sight.request.session, "~"}:
                yield f"{sight.request_id} of session {sight.request.session!r} is in {event['session']!r}"
            calls = view.calls.get(sight.marker, [])
            named = sight.headers.get("x-mesh-model")
            if (
                named
                and sight.status == 200
                and not sight.is_stream
                and named != event["model"]
                and event["cost_nusd"] != "0"
            ):
                yield f"{sight.request_id} names {named} and is billed as {event['model']}"
            if (
                event["usage_source"] not in {"reported", "drained"}
                or len(calls) != 1
                or not calls[0].complete
                or sight.error
                or sight.ended != "whole"
            ):
                continue
            bill, found = (
                calls[0].bill,
                {name: int(event[f"{name}_tokens"]) for name in ("prompt", "cached", "completion")},
            )
            if calls[0].is_true == {"prompt", "completion"} and found != {
                "prompt": bill.prompt,
                "cached": bill.cached,
                "completion": bill.completion,
            }:
                yield f"{sight.request_id}: {found} tokens were billed as {bill}"


def costs_are_told(view: View) -> Iterator[str]:
    """`x-mesh-cost` of a whole answer, and what a finished stream says last, are the charge."""
    for sight in view.record.sights:
        if sight.ended != "whole" or sight.status != 200 or sight.error or view.is_lossy or view.feels(sight, "killed"):
            continue
        told = told_cost(sight)
        if told is None:
            yield f"{sight.request_id} doesn't say what it cost"
        elif "idempotent-replayed" not in sight.headers and told != view.charge(sight) and not _waived(view, sight):
            yield f"{sight.request_id} says that it cost {told}, and was charged {view.charge(sight)}"


def _waived(view: View, sight: Sight) -> bool:
    return any(int(event.get("waived_nusd") or 0) for event in view.settled.get(sight.request_id, ()))


def ends_are_honest(view: View) -> Iterator[str]:
    """Check that a client that stayed got an end: [DONE], an error event, or an envelope; never a silent success."""
    for sight in view.record.sights:
        name, request = sight.request_id, sight.request
        if sight.ended in {"hung", "overrun"}:
            yield f"{name}: {sight.ended} after {sight.ended_at - sight.began_at:.1f} s"
        if sight.ended in {"closed", "unconnected"} and not _may_close(view, sight):
            yield f"{name}: the connection was {sight.ended} with status {sight.status}"
        if sight.ended != "whole":
            continue
        if sight.status != 200:
            yield from _envelope_faults(sight)
            continue
        calls = view.calls.get(sight.marker, [])
        if sight.is_stream:
            data = sight.data
            done = data[-1:] == ["[DONE]"]
            if not done and not sight.error:
                yield f"{name}: the stream ends with neither [DONE] nor an error"
            if "[DONE]" in data[:-1]:
                yield f"{name}: there is something after [DONE]"
            if not done:
                continue
        elif request.stream:
            yield f"{name} asked for a stream and got {sight.headers.get('content-type')}"
        if not any(call.complete or call.ended == "whole" or _nearly(call) for call in calls):
            yield f"{name}: a success, and no provider gave a whole answer"


def _nearly(call: Call) -> bool:
    """Whether all but the last bytes of an answer's end went out."""
    return call.ended == "cut" and call.events_sent >= len(call.lines) and bool(call.lines)


def _may_close(view: View, sight: Sight) -> bool:
    """Whether the gateway may close a connection without an answer: it died, or its client read nothing for too long."""
    if sight.request.reads == "stalls" and sight.ended_at - sight.began_at >= WRITE_TIMEOUT_S:
        return True
    return view.feels(sight, "killed", "drained", before_s=PROPAGATION_S)


def _envelope_faults(sight: Sight) -> Iterator[str]:
    error, name = sight.error, sight.request_id
    if (
        sight.headers.get("content-type") != "application/json"
        or not {"message", "type", "param", "code", "request_id"} <= error.keys()
    ):
        yield f"{name}: {sight.status} without an envelope: {sight.payload[:80]!r}"
    elif not error["request_id"] == name == sight.headers.get("x-request-id"):
        yield f"{name}: its error names {error['request_id']}"
    wait = sight.headers.get("retry-after")
    if wait is not None and error.get("retry_after_seconds") != int(wait):
        yield f"{name}: Retry-After {wait}, but retry_after_seconds {error.get('retry_after_seconds')}"
    wait_ms = sight.headers.get("retry-after-ms")
    if wait is not None and wait_ms is not None and int(wait) != max(0, math.ceil(float(wait_ms) / 1000)):
        yield f"{name}: Retry-After {wait}, but retry-after-ms {wait_ms}"


def answers_are_not_lost(view: View) -> Iterator[str]:
    """Check that an answer that a provider gave whole arrives whole, byte for byte, at a client that stayed."""
    for sight in view.record.sights:
        calls = view.calls.get(sight.marker, [])
        if sight.ended != "whole" or not calls or sight.request.timeout_s is not None or len(view.group(sight)) > 1:
            continue
        call = calls[-1]
        code = sight.error.get("code")
        if not (call.complete and call.answer.is_good) or code in {
            "insufficient_credits",
            "spend_limit_exceeded",
            "ledger_unavailable",
        }:
            continue
        if sight.status != 200 or code is not None:
            if not view.feels(sight):
                yield f"{sight.request_id}: a whole answer became {sight.status} {code}"
            continue
        if call.answer.other_shape:
            got = "".join(map(text_of, sight.data)) if sight.is_stream else text_of(sight.payload.decode())
            sent = "".join(map(text_of, call.lines)) if call.lines else text_of(call.body_bytes.decode())
            if sorted(got) != sorted(sent):
                yield f"{sight.request_id}: other text than the provider's"
        elif not sight.is_stream:
            if sight.payload != call.body_bytes and sight.payload != call.body_bytes.lstrip():
                yield f"{sight.request_id}: other bytes than the provider's"
        else:
            yield from _stream_faults(sight, call)


def _stream_faults(sight: Sight, call: Call) -> Iterator[str]:
    """Where a stream differs from the provider's, its usage chunks aside."""
    got = [_COST.sub("", line) for line in sight.data[:-1] if not is_usage_only(line)]
    sent = [line for line in call.lines if not is_usage_only(line)]
    if got != sent:
        at = next(
            (at for at, (one, other) in enumerate(zip(got, sent, strict=False)) if one != other),
            min(len(got), len(sent)),
        )
        yield f"{sight.request_id}: event {at} of {len(sent)} isn't the provider's ({len(got)} came)"
    chunks = [line for line in sight.data[:-1] if is_usage_only(line)]
    if chunks and not sight.request.include_usage:
        yield f"{sight.request_id}: a usage chunk that it didn't ask for"
    if sight.request.include_usage and len(chunks) != sum(map(is_usage_only, call.lines)):
        yield f"{sight.request_id}: {len(chunks)} usage chunks"


def bytes_are_ones_own(view: View) -> Iterator[str]:
    """No byte of one client's reaches another, and no client's key a provider."""
    for sight in view.record.sights:
        others = {found for found in MARKER.findall(sight.payload.decode(errors="replace")) if found != sight.marker}
        if others:
            yield f"{sight.request_id} got what belongs to {sorted(others)}"
        if any("rsk_" in value for value in sight.headers.values()) or b"rsk_" in sight.payload:
            yield f"{sight.request_id} got a key"
    for call in view.record.calls:
        if any("rsk_" in value for value in call.headers.values()):
            yield f"{call.upstream} got a client's key"


def requests_are_clean(view: View) -> Iterator[str]:
    """Check that what goes to a provider has none of Mesh's fields, one cap under the right name, and not what it refuses."""
    plans = {sight.marker: sight.request for sight in view.record.sights}
    for call in view.record.calls:
        request, upstream = plans.get(call.marker), UPSTREAMS[call.upstream]
        if request is None:
            yield f"{call.upstream} got a request of nobody's: {call.marker}"
            continue
        extra = MESH_FIELDS & call.body.keys()
        if extra:
            yield f"{call.upstream} got {sorted(extra)}"
        if not upstream.asks_usage and "stream_options" in call.body and not request.include_usage:
            yield f"{call.upstream} refuses stream_options and got them"
        if upstream.asks_usage and request.stream and not (call.body.get("stream_options") or {}).get("include_usage"):
            yield f"{call.upstream} wasn't asked for usage in {call.marker}"
        caps = {name: call.body[name] for name in ("max_tokens", "max_completion_tokens") if name in call.body}
        if set(caps) - {upstream.cap_field}:
            yield f"{call.upstream} reads {upstream.cap_field} and got {caps}"
        told: Any = call.body.get(upstream.cap_field)
        if request.max_tokens is not None and (told is None or told > max(request.max_tokens, MAX_OUTPUT_TOKENS)):
            yield f"{call.upstream} got the cap {told} for {request.max_tokens}"
        if bool(call.body.get("stream")) != request.stream or (call.body.get("n") or 1) != request.n:
            yield f"{call.upstream} got stream={call.body.get('stream')}, n={call.body.get('n')} for {request}"


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
        if not view.calls.get(sight.marker) or view.feels(sight, before_s=RECOVERY_S) or sight.ended == "unconnected":
            continue
        times = [sight.sent_at, *(at for at, _ in sight.times), sight.ended_at]
        longest = max(later - earlier for earlier, later in itertools.pairwise(times))
        if longest > HEARTBEAT_S + LATENCY_S + 0.5:
            yield f"{sight.request_id} heard nothing for {longest:.2f} s"


def credit_is_not_overdrawn(view: View) -> Iterator[str]:
    """Check that available = balance - held is never below 0 but for what streams used beyond their hold, a slice each."""
    for number, book in view.record.books.items():
        charged = [event for event in book.events if event["event"] == "settled"]
        excess = sum(
            max(0, int(event["cost_nusd"]) - (int(event["held_nusd"]) if event["hold"] == "live" else 0))
            for event in charged
        )
        taken = sum(
            -done.amount
            for done in view.record.changes
            if done.what == "grant" and done.account == number and done.amount < 0
        )
        lowest = min(
            (sample.balance - sample.held for sample in view.record.samples if sample.account == number), default=0
        )
        if lowest < -excess - taken and not view.is_lossy:
            yield f"a{number}: available fell to {lowest}, and at most {excess} was used beyond holds"
        for event in charged:
            yield from _excess_faults(view, event)
        if not view.is_strict and book.balance < -ALLOWANCE_NUSD - excess:
            yield f"a{number}: the balance is {book.balance}, below the allowance of {ALLOWANCE_NUSD}"


def _excess_faults(view: View, event: dict[str, str]) -> Iterator[str]:
    """Find a settlement that exceeds its hold by more than it may."""
    sight = next((sight for sight in view.record.sights if sight.request_id == event["request_id"]), None)
    if sight is None or event["hold"] != "live" or not view.is_strict or view.record.troubles:
        return
    calls = view.calls.get(sight.marker, [])
    if not calls:
        return
    call, request = calls[-1], sight.request
    models = view.models(sight, event["model"])
    excess = int(event["cost_nusd"]) - int(event["held_nusd"])
    slack = max(model.price.cost(10, 0, 10 * request.n) for model in models)
    if call.bill.cost_nusd is not None and any(model.from_usage_cost for model in models):
        return
    if not call.answer.heeds_cap:
        bound = max(model.price.cost(0, 0, call.made) for model in models)
    elif request.stream:
        beyond = LEASE_TOKENS * request.n + call.made - call.shown + int(call.shown * 0.5)
        bound = max(model.price.cost(0, 0, beyond) for model in models)
    else:
        bound = 0
    if excess > bound + slack:
        yield f"{sight.request_id} cost {event['cost_nusd']}, {excess} more than it held; {bound} may be"


def failover_happens(view: View) -> Iterator[str]:
    """Where another provider may be asked after a failure, it is."""
    for sight in view.record.sights:
        calls = view.calls.get(sight.marker, [])
        request = sight.request
        if (
            len(calls) != 1
            or len(view.group(sight)) > 1
            or request.timeout_s is not None
            or sight.ended != "whole"
            or view.feels(sight)
        ):
            continue
        answer = calls[0].answer
        model = view.record.prices[0][1][request.model]
        has_next = (len(model.routes) > 1 and calls[0].upstream == model.routes[0]) or bool(request.fallbacks)
        gateway_refused = (answer.error and answer.status in {401, 402, 404, 429, 500, 503, 529}) or (
            answer.status,
            answer.error,
        ) == (403, "permission")
        if has_next and gateway_refused and sight.error:
            yield f"{sight.request_id}: {answer.status} from {calls[0].upstream}, and no other was asked"


def repeats_agree(view: View) -> Iterator[str]:
    """All that get the answer of one Idempotency-Key get the same one, and it runs once."""
    for marker in {sight.marker for sight in view.record.sights if sight.request.keyed}:
        group = [sight for sight in view.record.sights if sight.marker == marker]
        if any(view.feels(sight) for sight in group):
            continue
        good = [sight for sight in group if sight.ended == "whole" and sight.status == 200 and not sight.error]
        texts = {
            tuple(line for line in sight.data if not is_usage_only(line)) if sight.is_stream else sight.payload
            for sight in good
        }
        if len(texts) > 1:
            yield f"the answers of {marker} differ"
        whole = [
            call
            for call in view.calls.get(marker, ())
            if call.complete and call.answer.is_good and call.ended == "whole"
        ]
        if len(whole) > 1 and not any(sight.status >= 400 for sight in group):
            yield f"the Idempotency-Key of {marker} ran {len(whole)} times"


def changes_hold(view: View) -> Iterator[str]:
    """Check that a revoked or suspended key is refused two seconds later, and a reload's prices are charged."""
    for done in view.record.changes:
        if done.what not in {"revoke", "suspend"} or not done.ok or view.is_lossy:
            continue
        for sight in view.record.sights:
            late = sight.request.key == done.key and sight.began_at > done.ended_at + PROPAGATION_S
            if (
                late
                and sight.ended == "whole"
                and sight.status not in {401, 403, 503}
                and not view.feels(sight, before_s=RECOVERY_S)
            ):
                yield (
                    f"{sight.request_id} got {sight.status} with a key that was {done.what}d"
                    f" {sight.began_at - done.ended_at:.1f} s before"
                )


def budgets_hold(view: View) -> Iterator[str]:
    """Check that a key spends no more than its budget, but for what was used beyond holds."""
    for number, key in enumerate(view.history.keys):
        events = [
            event
            for sight in view.record.sights
            if sight.request.key == number
            for event in view.settled.get(sight.request_id, ())
        ]
        spent = sum(int(event["cost_nusd"]) for event in events)
        beyond = sum(max(0, int(event["cost_nusd"]) - int(event["held_nusd"])) for event in events)
        if key.budget_nusd is not None and view.is_strict and spent > key.budget_nusd + beyond:
            yield f"k{number}: {spent} was spent of a budget of {key.budget_nusd}, {beyond} of it beyond holds"


def holds_are_kept(view: View) -> Iterator[str]:
    """Check that no hold is lost without a reason, and that a client that reads nothing keeps its own for a while alone."""
    if view.record.troubles:
        return
    for number, book in view.record.books.items():
        for event in book.events:
            if event["event"] == "abandoned" or event.get("hold", "live") != "live":
                yield f"a{number}: the hold {event['hold_id']} was abandoned"
    for sight in view.record.sights:
        if (
            sight.request.reads != "stalls"
            or sight.ended != "left"
            or sight.request.keyed
            or sight.request.model == "drained"
        ):
            continue
        for event in view.settled.get(sight.request_id, ()):
            settled_at = int(event["settled_ms"]) / 1000 - view.record.store_offset_s
            if settled_at > sight.ended_at - 1:
                yield f"{sight.request_id} was settled when its client gave up, and not after write_timeout_s"


def nothing_is_left(view: View) -> Iterator[str]:
    """No task, timer, socket, journal line or connection is left past its time."""
    yield from view.record.left


def nothing_broke(view: View) -> Iterator[str]:
    """No exception was left to nobody, and no log line tells of a bug."""
    yield from view.record.errors


RULES: Final[tuple[Rule, ...]] = (
    books_balance,
    grants_count_once,
    charged_once,
    charges_are_bills,
    tokens_are_reported,
    costs_are_told,
    ends_are_honest,
    answers_are_not_lost,
    bytes_are_ones_own,
    requests_are_clean,
    streams_are_alive,
    statuses_have_reasons,
    waits_are_true,
    deadlines_hold,
    limits_hold,
    buckets_are_right,
    credit_is_not_overdrawn,
    budgets_hold,
    failover_happens,
    repeats_agree,
    changes_hold,
    holds_are_kept,
    nothing_is_left,
    nothing_broke,
)


def judge(record: Record) -> list[Finding]:
    """Everything that is wrong with what came of a history."""
    view = View(record)
    return [Finding(rule.__name__, words) for rule in RULES for words in rule(view)]
