"""Rules on what a client is told beside its answer, and the operator by the log: ids, errors, and a line for each request."""

import json
from collections.abc import Iterator
from typing import Any, Final

from simulation.bills import is_lost
from simulation.client import Sight
from simulation.provider import FAILURE, Call
from simulation.reasons import REFUSALS, met_deadline
from simulation.record import View, cut_short

OF_THE_ACCOUNT: Final = frozenset({401, 402, 403, 404, 429})  # statuses of words about the operator's account
OK: Final = 200
BUSY: Final = 429
PING: Final = b": ping"
OF_THE_GATEWAY: Final = frozenset({401, 402, 403, 404})  # statuses that refuse the gateway and not the request


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
        calls = view.calls.get(sight.marker, [])
        for call in calls:
            words = _words(call)
            if call.answer.status in OF_THE_ACCOUNT and words and words.encode() in sight.payload:
                yield f"{sight.request_id} was told what {call.upstream} said to the operator: {words}"
        if sight.ended != "whole" or not sight.error or len(view.group(sight)) > 1:
            continue
        told = sight.error.get("provider_code")
        codes = {_code(call) for call in calls}
        is_own = bool(calls) and all(call.answer.status in OF_THE_GATEWAY for call in calls)
        if told not in codes and (told is not None or (is_own and sight.error.get("code") == "upstream_error")):
            yield f"{sight.request_id} has provider_code {told}, and {codes} were the providers'"
        refusal = next((call for call in calls if call.answer.status in REFUSALS), None)
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
    return call.events_sent > 0 if sight.request.stream else call.head_sent


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
    return str(_error(call).get("message", "")).partition(f" {call.marker}")[0]


def _code(call: Call) -> str | None:
    """Return the code of a provider's error, also of an error event."""
    code = _error(call).get("code") if call.answer.error else FAILURE if call.answer.end == "error_event" else None
    return None if code is None else str(code)
