"""Rules on money: what the ledger's books say, against what providers billed and operators granted."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

from simulation.bills import (
    allowed_charges,
    caps,
    estimates,
    is_lost,
    over_at,
    ran_short,
    runs_on,
    seen_tokens,
    told_cost,
)
from simulation.client import Sight
from simulation.provider import Call
from simulation.record import HOP_S, LATENCY_S, RECOVERY_S, Look, Sample, Trouble, View
from simulation.told import usd_of

AT_ONCE_S: Final = 0.1
LOST: Final = 74  # the exit code of a process that lost a settlement (docs/ledger.md)
METRICS: Final = (  # of an hour, with requests and costs (docs/ledger.md)
    *("prompt", "completion", "cached", "cache_write", "reasoning", "audio_prompt", "audio_completion"),
)
PARTS: Final = 2  # of a report: the prompt and the output
UNUSED: Final = frozenset(
    {"cache_write", "cache_write_1h", "audio_prompt", "audio_completion"}
)  # of the providers here
MS: Final = 0.001  # a time of the ledger is in whole milliseconds
IMPOSSIBLE: Final = frozenset({"absurd", "negative", "words"})  # lies about the output that nothing can believe


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
        for name, left in book.budgeted.items():
            yield f"a{number}: {left} nano-USD of the budget of {name} are held, and nothing runs"
        expected = sums_of(charged)
        for field in sorted(expected.keys() | book.sums):
            found, right = book.sums.get(field, 0), expected.get(field, 0)
            if found != right:
                yield f"a{number}: {field[0]} has {found} of {field[-1]} for {field[1:-1]}, the events {right}"
        balance = 0
        for event in book.events:
            balance += int(event.get("amount_nusd", 0)) - int(event.get("cost_nusd", 0))
            if event["event"] == "grant" and int(event["balance_nusd"]) != balance:
                yield f"a{number}: a grant left {event['balance_nusd']}, and the events before it {balance}"


def sums_of(settled: Iterable[dict[str, str]]) -> dict[tuple[str, ...], int]:
    """Return what the aggregates of hours and months have of settlements, by the time at which their requests began."""
    sums: dict[tuple[str, ...], int] = {}
    for event in settled:
        began_at = datetime.fromtimestamp(int(event["started_ms"]) / 1000, UTC)
        counts = {"requests": 1, "cost": int(event["cost_nusd"])}
        counts |= {metric: int(event.get(f"{metric}_tokens", 0)) for metric in METRICS}
        for name, session in ((f"hour:{began_at:%Y-%m-%dT%H}", event["session"]), (f"month:{began_at:%Y-%m}", "~")):
            for metric, count in counts.items():
                field = (name, event["key"], event["model"], session, metric)
                sums[field] = sums.get(field, 0) + count
    return {field: count for field, count in sums.items() if count}


def grants_count_once(view: View) -> Iterator[str]:
    """Check that an account was granted what was granted: once for each ref."""
    for number, book in view.record.books.items():
        sure: dict[str, int] = {}
        maybe: dict[str, int] = {}
        for done in view.record.changes:
            if done.what == "grant" and done.account == number:
                (sure if done.ok else maybe)[done.ref] = done.amount
        most = sum(sure.values()) + sum(amount for ref, amount in maybe.items() if ref not in sure)
        least = sum(sure.values()) - sum(lost_grants(view, number).values())
        if not least <= book.granted <= most:
            yield f"a{number}: granted {book.granted}, and {least} to {most} were"


def lost_grants(view: View, account: int) -> dict[str, int]:
    """Return the grants by ref that a failover may have lost."""
    done = [each for each in view.record.changes if each.what == "grant" and each.account == account and each.ok]
    troubles = view.record.troubles
    lost = {each for each in done if any(trouble.loses(each.began_at, each.ended_at) for trouble in troubles)}
    kept = {each.ref for each in done if each not in lost}
    return {each.ref: each.amount for each in lost if each.ref not in kept}


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
        if len(charged) - len(failed) - len(cut) > 1:
            yield f"the Idempotency-Key of {marker} was charged for {[sight.request_id for sight in charged]}"


def charges_are_bills(view: View) -> Iterator[str]:
    """Each request is charged what its provider bills, within the tolerance where nothing was reported."""
    for sight in view.record.sights:
        charge = view.owed(sight)
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
            if event["session"] != sight.request.session:
                yield f"{sight.request_id} of session {sight.request.session!r} is in {event['session']!r}"
            account, key_id = f"a{view.key(sight)}", view.record.key_ids[sight.request.key]
            if (event["account"], event["key"]) != (account, key_id):
                yield f"{sight.request_id} of {account}'s {key_id} is that of {event['account']}'s {event['key']}"
            began_at = int(event["started_ms"]) / 1000 - view.record.wall_offset_s
            calls_at = [call.at for call in view.own_calls(sight) if call.at >= sight.began_at]
            asked_at = min(calls_at, default=over_at(view, sight) + HOP_S)
            if not sight.began_at - MS <= began_at <= asked_at + MS:
                yield f"{sight.request_id} began at {began_at}, between {sight.began_at} and {asked_at} would be right"
            wrong = {name for name in UNUSED if int(event.get(f"{name}_tokens", 0))}
            if wrong:
                yield f"{sight.request_id} has tokens of {sorted(wrong)}, which no provider has"
            calls = view.own_calls(sight)
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
                {name: int(event[f"{name}_tokens"]) for name in ("prompt", "cached", "completion", "reasoning")},
            )
            if calls[0].is_true == {"prompt", "completion"} and found != {
                "prompt": bill.prompt,
                "cached": bill.cached,
                "completion": bill.completion,
                "reasoning": bill.reasoning,
            }:
                yield f"{sight.request_id}: {found} tokens were billed as {bill}"


def settlements_come(view: View) -> Iterator[str]:
    """Check that a request is settled when it is over, or when the store, its disk or its worker is there again."""
    for sight in view.record.sights if not view.clock_jumps else ():
        if sight.request.reads in {"slowly", "stalls"} or ran_short(view, sight):
            continue
        for event in view.settled.get(sight.request_id, ()):
            due = over = over_at(view, sight)
            for trouble in sorted(view.record.troubles, key=lambda each: each.start):
                if trouble.start <= due + LATENCY_S and trouble.end >= over and trouble.worker in view.workers(sight):
                    due = max(due, trouble.end)
            late_s = int(event["settled_ms"]) / 1000 - view.first_offset_s - due
            if late_s > LATENCY_S:
                yield f"{sight.request_id} was settled {late_s:.1f} s after it was over and could be"


def sources_are_told(view: View) -> Iterator[str]:
    """Check that a settlement says where its tokens are from: the provider's report, an estimate, or that nothing was used."""
    for sight in view.record.sights:
        calls = view.own_calls(sight)
        for event in view.settled.get(sight.request_id, ()) if calls else ():
            source, right = event["usage_source"], _sources(view, sight, calls[-1])
            if source not in right:
                yield f"{sight.request_id}: its tokens are {source}, and {' or '.join(sorted(right))} would be right"


def _sources(view: View, sight: Sight, call: Call) -> set[str]:
    """Return what a settlement may say of its tokens, by what the provider had sent (docs/ledger.md)."""
    ended_well = sight.ended == "whole" and sight.status == 200 and not sight.error
    if call.ended == "error":
        return {"none"} if sight.ended == "whole" else {"none", "estimated"}  # it left before the gateway had the error
    is_reported = _is_reported(call)
    if ended_well and is_reported:
        return {"reported"}
    if ended_well:
        has_used = call.shown or (call.reported and call.answer.lie in IMPOSSIBLE)
        return {"estimated", *(() if has_used else ("none",)), *(() if is_reported is False else ("reported",))}
    found = {"estimated"} if seen_tokens(sight) else {"none", "estimated"}
    if is_reported is False:
        return found
    is_gone = sight.ended != "whole" or sight.status == 504 or sight.error.get("code") == "gateway_timeout"
    runs_to_its_end = is_gone and runs_on(view, sight) and call.complete
    if (
        runs_to_its_end
        and is_reported
        and not (view.feels(sight, until=over_at(view, sight)) or ran_short(view, sight))
    ):
        told_at = call.lines_at[-1] if call.lines_at else call.last_at  # before its body ends
        return {"drained"} if told_at > sight.ended_at + 2 * HOP_S else {"reported", "drained"}
    return found | {"reported", *({"drained"} if is_gone and runs_on(view, sight) else ())}


def _is_reported(call: Call) -> bool | None:
    """Whether all numbers of a call are its provider's. None: perhaps.

    A report without output where no text was may be all that there is, and an older report may have more output than an
    estimate of the text that came until the end, which no cap exceeds.
    """
    if call.answer.gzip and call.sent_bytes and not call.complete:
        return None  # how much a part of what is compressed says isn't known
    if call.reported and len(call.is_true) == PARTS and not call.outdated:
        return True
    if not call.shown:
        return None if (call.reported or call.answer.lie == "zeros") and call.answer.lie not in IMPOSSIBLE else False
    told = call.shown // 2 + call.answer.per_event * max(1, call.body.get("n") or 1) + call.made - call.shown
    sent = call.shown if call.complete else min(call.shown, call.shown_begun)
    covers = call.answer.lie == "early" and min([estimates(sent, sent)[0], *caps(call)]) <= told
    return None if call.reported and covers else False


def costs_are_told(view: View) -> Iterator[str]:
    """`x-mesh-cost` of a whole answer, and what a finished stream says last, are the charge."""
    for sight in view.record.sights:
        if sight.ended != "whole" or sight.status != 200 or sight.error:
            continue
        if is_lost(view, sight):
            continue
        told = told_cost(sight)
        # a repeat says what its first request cost; its head doesn't say that it is one if a ping came before the answer
        charged = {view.owed(other) for other in view.group(sight) if other is sight or not view.owed(sight)}
        if told is None:
            yield f"{sight.request_id} doesn't say what it cost"
        elif "idempotent-replayed" not in sight.headers and told not in charged and not _waived(view, sight):
            yield f"{sight.request_id} says that it cost {told}, and was charged {view.owed(sight)}"


def _waived(view: View, sight: Sight) -> bool:
    return any(int(event.get("waived_nusd") or 0) for event in view.settled.get(sight.request_id, ()))


def accounts_are_told(view: View) -> Iterator[str]:
    """Check what the API says of an account: its credit at a time, and in the end what each request and all cost."""
    for look in view.record.looks:
        samples = [sample for sample in view.record.samples if sample.account == look.account]
        before = [sample for sample in samples if sample.at < look.began_at][-1:]
        within = [sample for sample in samples if look.began_at <= sample.at <= look.ended_at]
        if look.available != look.balance - look.held:
            yield f"a{look.account}: {look.available} is available of {look.balance} less {look.held}"
        elif not _failed_over_unseen(view, before, look) and (look.balance, look.held) not in {
            (each.balance, each.held) for each in before + within
        }:
            yield f"a{look.account}: /v1/key says balance {look.balance} and held {look.held}, and neither was so"
    for number, told in view.record.told.items():
        book = view.record.books[number]
        charged = [event for event in book.events if event["event"] == "settled"]
        events = {event["request_id"]: event for event in told.events}
        for event in charged:
            yield from _differences(event["request_id"], events.pop(event["request_id"], {}), shown_event(event))
        if events:
            yield f"a{number}: the API has events of {sorted(events)}, and the ledger none"
        rows = {_group(row): row for row in told.rows}
        for row in shown_rows(charged):
            yield from _differences(f"a{number}: a row of /v1/usage", rows.pop(_group(row), {}), row)
        if rows:
            yield f"a{number}: /v1/usage has rows of {sorted(rows)}, and the ledger none"


def _group(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("key", "model", "session_id"))


def _differences(what: str, found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """Find the fields of an answer of the API that aren't what the ledger's events say."""
    wrong = {name: found.get(name) for name, right in expected.items() if name not in found or found[name] != right}
    if wrong:
        yield f"{what} has {wrong}, and { ({name: expected[name] for name in wrong}) } would be right"


def shown_event(event: dict[str, str]) -> dict[str, Any]:
    """Return what `/v1/usage/events` says of a settlement (docs/api.md)."""
    times = {name: int(event[f"{name}_ms"]) for name in ("started", "settled")}
    shown = {
        f"{name}_at": f"{datetime.fromtimestamp(ms // 1000, UTC):%FT%T}.{ms % 1000:03d}Z" for name, ms in times.items()
    }
    kept = {name: event[name] for name in ("request_id", "account", "model", "outcome", "usage_source")}
    tokens = {f"{metric}_tokens": int(event.get(f"{metric}_tokens", 0)) for metric in METRICS}
    named = {"key_id": event["key"], "session_id": event["session"] or None, "code": event.get("code")}
    counted = {"attempts": int(event["attempts"]), "cost_usd": usd_of(int(event["cost_nusd"]))}
    return {**kept, **tokens, **named, **counted, **shown}


def shown_rows(charged: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """Return what `/v1/usage` says of settlements by key, model and session."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for event in charged:
        groups.setdefault((event["key"], event["model"], event["session"]), []).append(event)
    rows = []
    for (key, model, session), events in groups.items():
        tokens = {
            f"{metric}_tokens": sum(int(event.get(f"{metric}_tokens", 0)) for event in events) for metric in METRICS
        }
        named = {"key": key, "model": model, "session_id": session or None, "requests": len(events)}
        rows.append({**named, **tokens, "cost_usd": usd_of(sum(int(event["cost_nusd"]) for event in events))})
    return rows


def _failed_over_unseen(view: View, before: list[Sample], look: Look) -> bool:
    """Whether the store may have failed over since the last sample before a look: then what it had was never seen."""
    since = min((sample.at for sample in before), default=0.0)
    return any(
        trouble.what == "failover" and trouble.start <= look.ended_at and since <= trouble.end - RECOVERY_S + LATENCY_S
        for trouble in view.record.troubles
    )


def losses_are_told(view: View) -> Iterator[str]:
    """Check that a process ends with code 74 if it lost a settlement, which the log has whole, and otherwise with 0."""
    known = {sight.request_id for sight in view.record.sights}
    for loss in view.record.losses:
        if loss.request_id not in known or not loss.hold_id:
            yield f"{loss.process} lost a settlement of nothing known: {loss}"
    lossy = {loss.process for loss in view.record.losses}
    for process, code in view.record.exits:
        if code not in {LOST if process in lossy else 0, -9}:
            yield f"{process} ended with {code}, and {'lost a settlement' if process in lossy else 'lost nothing'}"


def full_journals_deny(view: View) -> Iterator[str]:
    """Check that nothing is admitted without the store whose settlement the journal has no room for, or its disk refuses."""
    if view.is_strict:
        return
    yield from _admitted_without_room(view)
    for refused_at, process in view.record.unkept:
        disk = _during(view, refused_at, "disk_full", "disk_fails")
        outage = _during(view, refused_at, "gone", "refused")
        if disk is None or outage is None:
            continue
        until = min(disk.end, outage.end) - RECOVERY_S
        number = int(process.partition("-")[2].partition(".")[0])
        for sight in view.record.sights:
            is_there = sight.worker % view.history.workers == number and not _restarted(view, refused_at, sight)
            is_within = sight.began_at > refused_at + AT_ONCE_S and sight.ended_at < until
            if is_there and is_within and sight.status == 200 and "idempotent-replayed" not in sight.headers:
                yield f"{sight.request_id} was served, though {process} can keep no settlement"


def _admitted_without_room(view: View) -> Iterator[str]:
    """Find settlements that were lost of requests that were admitted without the store, where nothing else took the room."""
    if any(trouble.what.startswith("disk") for trouble in view.record.troubles):
        return
    for loss in view.record.losses:
        sight = next((sight for sight in view.record.sights if sight.request_id == loss.request_id), None)
        outage = next(
            (each for each in view.record.troubles if sight and each.start <= sight.began_at <= each.end), None
        )
        if not loss.unheld or sight is None or outage is None:
            continue
        before = [other for other in view.record.sights if other.began_at <= outage.start <= other.ended_at + LATENCY_S]
        if not before:
            yield f"{loss.request_id} was admitted, and {loss.process} had no room for its settlement"


def _restarted(view: View, since: float, sight: Sight) -> bool:
    """Whether a process may have ended between a time and a request: its successor learns of the disk anew."""
    ends = (trouble for trouble in view.record.troubles if trouble.what in {"killed", "drained"})
    return any(end.start <= sight.ended_at and since - RECOVERY_S <= end.end for end in ends)


def _during(view: View, at: float, *whats: str) -> Trouble | None:
    """Return the trouble of one of these kinds that lasts at a time."""
    found = (each for each in view.record.troubles if each.what in whats and each.start <= at <= each.end - RECOVERY_S)
    return next(found, None)
