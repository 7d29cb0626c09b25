"""Decide whether what came of a history is right, by a plain model of the contract.

It knows what providers billed and clients saw, and docs/; nothing of the gateway's code. Each rule is a function from
a record to the words of what breaks it. docs/simulation.md lists the rules.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Final

from simulation.answers import (
    answers_are_prompt,
    attempts_are_told,
    drains_end,
    failover_happens,
    streams_are_alive,
    streams_wait,
    waits_are_told,
    what_runs_on_is_read,
)
from simulation.bills import is_usage_only, ran_short, runs_on, text_of, without_cost
from simulation.books import (
    accounts_are_told,
    books_balance,
    charged_once,
    charges_are_bills,
    costs_are_told,
    full_journals_deny,
    grants_count_once,
    losses_are_told,
    settlements_come,
    sources_are_told,
    tokens_are_reported,
)
from simulation.breakers import breakers_hold, ejections_hold, sessions_stay, upstreams_are_right
from simulation.client import Sight, data_of
from simulation.history import PROVIDER_SECRET, UPSTREAMS, WRITE_TIMEOUT_S, rendered
from simulation.holds import (
    budgets_hold,
    credit_is_not_overdrawn,
    holds_are_kept,
    holds_are_needed,
    imposed_cap_faults,
    renewals_raise,
    thresholds_are_told,
)
from simulation.invalid import INVALID
from simulation.limits import buckets_are_right, limits_hold
from simulation.provider import Call
from simulation.reasons import (
    KEPT_BYTES,
    deadlines_hold,
    invalid_requests_are_refused,
    is_unpriced,
    may_not_use,
    met_deadline,
    statuses_have_reasons,
    waits_are_true,
)
from simulation.record import HOP_S, PROPAGATION_S, STORE, Finding, Record, Rule, View, cut_short
from simulation.told import failures_are_logged, ids_are_told, keys_are_told, refusals_are_told, requests_are_logged

PING: Final = b": ping\n\n"
REFUSED_WITH: Final = {"revoke": 401, "expire": 401, "suspend": 403, "suspend_account": 403}  # docs/errors.md
MARKER: Final = re.compile(r"mk\d+q\w+?z")
KEY: Final = re.compile(r"rsk_\w")  # a key of the gateway's, and not the words that say what one looks like
MESH_FIELDS: Final = frozenset({"session_id", "timeout", "models", "template", "variables", "transforms", "cache"})
CAPS: Final = frozenset({"max_tokens", "max_completion_tokens"})
SENT_HEADERS: Final = frozenset(  # what a provider gets: the connection's, the upstream's own, and what is passed on
    {
        *("host", "user-agent", "accept-encoding", "content-type", "content-length", "authorization", "api-key"),
        *("traceparent", "tracestate", "http-referer", "x-title", "openai-beta"),  # docs/api.md, "Request headers"
    }
)
ERROR_TYPES: Final = {  # docs/errors.md; the others below 500 have `invalid_request_error`, from 500 on `api_error`
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
STREAM_STATUSES: Final = {"insufficient_credits": 402, "spend_limit_exceeded": 402, "rate_limit_exceeded": 429} | (
    dict.fromkeys(("upstream_error", "gateway_timeout", "ledger_unavailable", "overloaded"), 500)
)  # what an error event's code stands for (docs/errors.md, "In a stream")
SECRET_PART: Final = 8  # of a provider's secret, which nothing shows: more than all of its kind begin with
HANG_UP_S: Final = 1.0  # after which a provider's connection is closed whose client has gone


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
        status = STREAM_STATUSES.get(str(sight.error.get("code")))
        if status is not None:
            yield from _type_faults(sight, status)
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
    if sight.request.reads in {"slowly", "stalls"} and cut_short(view, sight):
        return True  # it doesn't take the stream's last event in time
    known_s = HOP_S if sight.reused else 0.0  # after which a client knows that a connection which it keeps is closed
    if view.feels(sight, "killed", before_s=known_s):
        return True
    return any(  # a request that came when the listener had closed
        trouble.what == "drained"
        and trouble.worker == view.worker(sight)
        and (sight.sent_at is None or sight.sent_at >= trouble.start - HOP_S)
        and sight.began_at <= trouble.end + known_s
        for trouble in view.record.troubles
    )


def _envelope_faults(sight: Sight) -> Iterator[str]:
    error, name = sight.error, sight.request_id
    if (
        sight.headers.get("content-type") != "application/json"
        or not {"message", "type", "param", "code", "request_id"} <= error.keys()
    ):
        yield f"{name}: {sight.status} without an envelope: {sight.payload[:80]!r}"
    yield from _type_faults(sight, sight.status)
    wait = sight.headers.get("retry-after")
    if wait is not None and error.get("retry_after_seconds") != int(wait):
        yield f"{name}: Retry-After {wait}, but retry_after_seconds {error.get('retry_after_seconds')}"
    wait_ms = sight.headers.get("retry-after-ms")
    if wait is not None and wait_ms is not None and int(wait) != max(0, math.ceil(float(wait_ms) / 1000)):
        yield f"{name}: Retry-After {wait}, but retry-after-ms {wait_ms}"


def _type_faults(sight: Sight, status: int) -> Iterator[str]:
    """Find an error whose `type` isn't that of its status."""
    right = ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    if sight.error.get("type") != right:
        yield f"{sight.request_id}: an error {status} of the type {sight.error.get('type')}, and {right} would be right"


def answers_are_not_lost(view: View) -> Iterator[str]:
    """Check that an answer that a provider gave whole arrives whole, byte for byte, at a client that stayed."""
    for sight in view.record.sights:
        calls = view.calls_for(sight)
        code = sight.error.get("code")
        if sight.ended != "whole" or not calls or (code == "gateway_timeout" and met_deadline(view, sight)):
            continue
        if view.is_anothers(sight) and (len(calls) > 1 or code is not None):
            continue  # another's call
        call = calls[-1]
        if not (call.complete and call.answer.is_good) or code in {
            "insufficient_credits",
            "spend_limit_exceeded",
            "ledger_unavailable",
        }:
            continue
        if sight.status != 200 or code is not None:
            if not (code == "overloaded" and cut_short(view, sight)):
                yield f"{sight.request_id}: a whole answer became {sight.status} {code}"
            continue
        if call.answer.other_shape:
            got = "".join(map(text_of, sight.data)) if sight.is_stream else text_of(sight.payload.decode())
            sent = "".join(map(text_of, call.lines)) if call.lines else text_of(call.body_bytes.decode())
            if sorted(got) != sorted(sent):
                yield f"{sight.request_id}: other text than the provider's"
        elif not sight.is_stream:
            if sight.payload not in {call.body_bytes, call.body_bytes.lstrip()}:
                yield f"{sight.request_id}: other bytes than the provider's"
        else:
            yield from _stream_faults(sight, call)


def _stream_faults(sight: Sight, call: Call) -> Iterator[str]:
    """Find where a stream differs from the provider's, its usage chunks aside; `id:` and `retry:` don't pass."""
    got = [without_cost(line) for line in sight.data[:-1] if not is_usage_only(line)]
    sent = [line for line in call.lines if not is_usage_only(line)]
    pairs = zip(got, sent, strict=False)
    at = next((at for at, (one, other) in enumerate(pairs) if not _is_passed_on(one, other)), None)
    if at is not None or len(got) != len(sent):
        at = min(len(got), len(sent)) if at is None else at
        yield f"{sight.request_id}: event {at} of {len(sent)} isn't the provider's ({len(got)} came)"
    others = [(sum(not is_usage_only(each) for each in call.lines[:at]), line) for at, line in call.others]
    came = list(_beside_data(sight))
    if came != others:
        yield f"{sight.request_id}: other lines beside the data than the provider's: {came[:3]}, not {others[:3]}"
    chunks = [line for line in sight.data[:-1] if is_usage_only(line)]
    if chunks and not sight.request.include_usage:
        yield f"{sight.request_id}: a usage chunk that it didn't ask for"
    if sight.request.include_usage and len(chunks) != sum(map(is_usage_only, call.lines)):
        yield f"{sight.request_id}: {len(chunks)} usage chunks"


def _is_passed_on(got: str, sent: str) -> bool:
    """Whether an event's data is the provider's. One with a cost is written in one line."""
    return got == sent or ('"usage"' in sent and got == sent.replace("\n", " "))


def _beside_data(sight: Sight) -> Iterator[tuple[int, str]]:
    """Return a stream's lines that are neither data nor the gateway's own comments, with the number of events before each."""
    before = 0
    for event in sight.payload.decode(errors="replace").split("\n\n"):
        others = [line for line in event.split("\n") if line and not line.startswith("data:")]
        data = data_of(event)
        before += data is not None and not is_usage_only(data)
        for line in others:
            if line != ": ping" and not line.startswith(": x-mesh-cost="):
                yield before, line


def bytes_are_ones_own(view: View) -> Iterator[str]:
    """No byte of one client's reaches another, and no client's key a provider."""
    for sight in view.record.sights:
        own = sight.text or sight.marker
        others = {found for found in MARKER.findall(sight.payload.decode(errors="replace")) if found != own}
        if others:
            yield f"{sight.request_id} got what belongs to {sorted(others)}"
        if any(map(KEY.search, (*sight.headers.values(), sight.payload.decode(errors="replace")))):
            yield f"{sight.request_id} got a key"
        if PROVIDER_SECRET[:SECRET_PART].encode() in sight.payload:
            yield f"{sight.request_id} got the secret of a provider, or the beginning of it"
    for call in view.record.calls:
        if any(map(KEY.search, call.headers.values())):
            yield f"{call.upstream} got a client's key"
    for line in view.record.quoted:
        yield f"the log has a request's text: {line}"


def requests_are_clean(view: View) -> Iterator[str]:
    """Check that a provider gets what the client sent, byte for byte, but for the changes that docs/api.md names.

    None of Mesh's fields, the provider's name of the model, one cap under the right name, and usage asked for where it
    may be. A template's messages come before the client's. Of the client's headers it gets those that docs/api.md names.
    """
    sights: dict[str, list[Sight]] = {}
    for sight in view.record.sights:
        sights.setdefault(sight.marker, []).append(sight)
    for call in view.record.calls:
        for name in sorted(call.headers.keys() - SENT_HEADERS):
            yield f"{call.upstream} got the header {name} in {call.marker}"
        group = sights.get(call.marker)
        if group is None:
            yield f"{call.upstream} got a request of nobody's: {call.marker}"
            continue
        if may_not_use(view, group[0]):
            yield f"{call.upstream} got a request for models that its key may not use: {group[0].request}"
        if is_unpriced(view, group[0]):
            yield f"{call.upstream} got the service tier {call.body.get('service_tier')} for {group[0].request}"
        owner = next((sight for sight in group if any(own is call for own in view.own_calls(sight))), None)
        if owner is None:
            yield f"{call.upstream} got the trace {call.headers.get('traceparent')} in {call.marker}"
            continue
        yield from itertools.islice(_changes_of(owner, call), 1)
        yield from imposed_cap_faults(view, group[0], call)


def _changes_of(sight: Sight, call: Call) -> Iterator[str]:
    """Find what differs in a call's body from what the gateway may make of a request's."""
    sent, got, upstream = json.loads(sight.body), dict(call.body), UPSTREAMS[call.upstream]
    messages, own = got.pop("messages"), sent.pop("messages")
    name = str(got.pop("model")).removeprefix("up-")
    if name not in (sight.request.model, *sight.request.fallbacks):
        yield f"{call.upstream} got the model {name} in {call.marker}"
    expected = {field: value for field, value in sent.items() if field not in MESH_FIELDS | CAPS | {"model"}}
    kept = {field: value for field, value in expected.items() if field != "stream_options"}
    if not upstream.asks_usage:
        expected.pop("stream_options", None)
    elif sight.request.stream:
        expected["stream_options"] = {**sent.get("stream_options", {}), "include_usage": True}
    cap = sight.request.max_tokens or got.get(upstream.cap_field)  # one of the gateway's own is judged elsewhere
    expected |= {} if cap is None else {upstream.cap_field: cap}
    for field in sorted(expected.keys() | got):
        told, right = got.get(field, "nothing"), expected.get(field, "nothing")
        if told != right:
            yield f"{call.upstream} got {told} for {field} in {call.marker}, and {right} would be right"
    as_sent = partial(json.dumps, ensure_ascii=sight.request.escaped)
    if messages[-len(own) :] != own or as_sent(own).encode()[1:-1] not in call.raw:
        yield f"{call.upstream} got other messages in {call.marker} than {own}: {messages}"
    for field, value in kept.items():
        if f'"{field}":{as_sent(value)}'.encode() not in call.raw:
            yield f"{call.upstream} got other bytes of {field} in {call.marker} than {value}"


def templates_hold(view: View) -> Iterator[str]:
    """Check that a prompt has the template's text, as it was stored at most two seconds before, with its slot filled."""
    for marker, calls in view.calls.items():
        group = [sight for sight in view.record.sights if sight.marker == marker]
        for call in calls if group else ():
            request, messages = group[0].request, call.body["messages"]
            others = messages[: len(messages) - len(json.loads(group[0].body)["messages"])]
            texts = [message["content"] for message in others if message["role"] == "system"]
            wanted = (
                [[]]
                if not request.template or request.manner is None
                else [[rendered(version, request.manner)] for version in _versions(view, group, call)]
            )
            if len(texts) != len(others) or texts not in wanted:
                yield f"{call.upstream} got {texts} in {marker}, and {wanted} would be right"


def _versions(view: View, group: list[Sight], call: Call) -> set[int]:
    """Return the versions of its account's template that a call may have."""
    edits = [done for done in view.record.changes if done.what == "template" and done.account == view.key(group[0])]
    began_at = min(sight.began_at for sight in group)
    if any(view.feels(sight, *STORE) for sight in group):
        began_at = 0.0
    found = set()
    for at, edit in enumerate(edits):
        ended_at = min((later.ended_at for later in edits[at + 1 :] if later.ok), default=math.inf)
        if edit.began_at <= call.at and ended_at + PROPAGATION_S >= began_at:
            found.add(edit.amount)
    return found


def hang_ups_are_noticed(view: View) -> Iterator[str]:
    """Check that a provider is left at once when its client has hung up or half-closed, but for what runs on."""
    for sight in view.record.sights:
        if sight.ended != "left" or sight.request.reads == "stalls" or runs_on(view, sight):
            continue
        for call in view.calls.get(sight.marker, ()):
            if call.answer.error == "empty" and call.at + call.answer.delay_s <= sight.ended_at + HOP_S:
                continue  # its head was all of it
            if not call.ended_at or call.ended_at > sight.ended_at + HANG_UP_S:
                yield f"{call.upstream} went on with {sight.request_id} until {call.ended_at - sight.ended_at:.1f} s later"


def repeats_agree(view: View) -> Iterator[str]:
    """Check that a repeat that didn't run gets the answer of a request with its Idempotency-Key, and that one alone runs.

    An answer that is too large isn't kept.
    """
    for marker in {sight.marker for sight in view.record.sights if sight.request.keyed}:
        group = [sight for sight in view.record.sights if sight.marker == marker]
        good = [sight for sight in group if sight.ended == "whole" and sight.status == 200 and not sight.error]
        calls = [call for call in view.calls.get(marker, ()) if not call.answer.error]
        calls = [call for call in calls if call.complete or call.answer.end == "no_done" or _nearly(call)]
        given = {_text(sight) for sight in good if view.own_calls(sight)} | set(map(_text_given, calls))
        kept = view.history.kept_bytes or KEPT_BYTES
        for sight in good:
            size = len(sight.payload.replace(PING, b""))
            if not view.own_calls(sight) and size > kept:
                yield f"{sight.request_id} got an answer of {size} bytes again, and {kept} are kept"
            if not (view.own_calls(sight) or _text(sight) in given or any(call.answer.other_shape for call in calls)):
                yield f"{sight.request_id} got another answer than {marker}'s"
        whole = [call for call in calls if call.complete and call.answer.is_good and call.ended == "whole"]
        is_excused = any(
            sight.status >= 400 or sight.error or view.feels(sight) or ran_short(view, sight) for sight in group
        )
        if len(whole) > 1 and not is_excused:
            yield f"the Idempotency-Key of {marker} ran {len(whole)} times"


def _text(sight: Sight) -> tuple[str, ...]:
    """Return the events that a client got, without costs and what it may not have asked for; or its whole answer."""
    lines = [line for line in sight.data if not is_usage_only(line)] if sight.is_stream else [sight.payload.decode()]
    return tuple(without_cost(line).replace("\n", " ").lstrip() for line in lines if line != "[DONE]")


def _text_given(call: Call) -> tuple[str, ...]:
    """Return what a client gets of a whole answer, as `_text` has it."""
    lines = [line for line in call.lines if not is_usage_only(line)] if call.lines else [call.body_bytes.decode()]
    return tuple(line.replace("\n", " ").lstrip() for line in lines)


def conflicts_are_refused(view: View) -> Iterator[str]:
    """Check that a request with the Idempotency-Key of another body, which runs or was answered, gets 409."""
    for sight in view.record.sights:
        if not sight.request.keyed or sight.status in {0, 401, 403, 409} or view.feels(sight):
            continue
        for other in view.group(sight):
            has_run = other.ended == "whole" and other.status == 200 and not other.error
            if (
                other.body != sight.body
                and has_run
                and _began_at(view, other) + HOP_S < sight.began_at
                and not view.feels(other)
            ):
                yield f"{sight.request_id} has the Idempotency-Key of {other.request_id}'s other body, and got {sight.status}"


def _began_at(view: View, sight: Sight) -> float:
    """Return when a provider was first asked by a request's own body; else when its answer was over."""
    own = json.loads(sight.body)["messages"][-1]
    return min(
        (call.at for call in view.calls.get(sight.marker, ()) if call.body["messages"][-1] == own),
        default=sight.ended_at,
    )


def changes_hold(view: View) -> Iterator[str]:
    """Check that a revoked or suspended key, or account, is refused two seconds later, and a key that expires at once.

    Where several hold, either is told.
    """
    ends = [done for done in view.record.changes if done.what in REFUSED_WITH and done.ok]
    for done in ends:
        holds_at = done.ended_at + (0.0 if done.what == "expire" else PROPAGATION_S)
        for sight in view.record.sights if not view.has_lost(done) else ():
            if sight.request.invalid and INVALID[sight.request.invalid].names_no_key:
                continue
            key, account = sight.request.key, view.key(sight)
            is_late = done.concerns(key, account) and sight.began_at > holds_at and sight.ended == "whole"
            refused_with = {REFUSED_WITH[other.what] for other in ends if other.concerns(key, account)}
            if is_late and sight.status not in {*refused_with, 503} and not view.feels(sight, *STORE):
                yield f"{sight.request_id} got {sight.status} {sight.began_at - done.ended_at:.1f} s after {done.what}"


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
    sources_are_told,
    settlements_come,
    costs_are_told,
    ends_are_honest,
    answers_are_not_lost,
    bytes_are_ones_own,
    requests_are_clean,
    answers_are_prompt,
    streams_are_alive,
    streams_wait,
    statuses_have_reasons,
    invalid_requests_are_refused,
    ids_are_told,
    refusals_are_told,
    requests_are_logged,
    failures_are_logged,
    waits_are_true,
    waits_are_told,
    attempts_are_told,
    deadlines_hold,
    limits_hold,
    buckets_are_right,
    credit_is_not_overdrawn,
    budgets_hold,
    thresholds_are_told,
    failover_happens,
    breakers_hold,
    ejections_hold,
    upstreams_are_right,
    sessions_stay,
    repeats_agree,
    conflicts_are_refused,
    changes_hold,
    holds_are_kept,
    drains_end,
    holds_are_needed,
    renewals_raise,
    accounts_are_told,
    keys_are_told,
    losses_are_told,
    full_journals_deny,
    templates_hold,
    hang_ups_are_noticed,
    what_runs_on_is_read,
    nothing_is_left,
    nothing_broke,
)


def judge(record: Record) -> list[Finding]:
    """Everything that is wrong with what came of a history."""
    view = View(record)
    return [Finding(rule.__name__, words) for rule in RULES for words in rule(view)]
