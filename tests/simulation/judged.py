"""The record of one good exchange, its parts and the changes of it that several of the judge's tests make."""

import json
import math

from msgspec.structs import replace

from simulation.books import shown_event, shown_rows, sums_of
from simulation.client import Sight, body_of, trace_of
from simulation.history import MODELS, Answer, History, KeyPlan, Request
from simulation.judge import ERROR_TYPES, MESH_FIELDS, STREAM_STATUSES
from simulation.judge import judge as judge_record
from simulation.provider import Bill, Call, error_of
from simulation.record import Book, Done, Look, Record, Sample, Told, Trouble, View, marker_of
from simulation.told import LIMITS, key_of, limits_of, spends_of, usd_of

GRANTED = 1_000_000_000
COST = 20 * 2_500 + 8 * 10_000
REQUEST = Request("q0")
MARKER = marker_of(1, REQUEST)
WHOLE = json.dumps(
    {
        "id": f"chatcmpl-{MARKER}",
        "choices": [{"index": 0, "message": {"content": " the river"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 8},
    }
).encode()
LINE = json.dumps({"id": f"chatcmpl-{MARKER}", "choices": [{"index": 0, "delta": {"content": " the river"}}]})
STREAM = f"data: {LINE}\n\n: x-mesh-cost=0.00013\n\ndata: [DONE]\n\n".encode()
ERROR = {"message": "No.", "type": "right", "param": None, "code": "upstream_error", "request_id": "id-q0"}
STREAMED, PAIR = Request("q0", stream=True), Request("q0", model="pair")
OVERDRAWN, CLEAN, BILLS = {"credit_is_not_overdrawn"}, {"requests_are_clean"}, {"charges_are_bills"}
WAITS, REASONS = {"waits_are_told"}, {"statuses_have_reasons"}
BROKE, NO_KEY = Answer(status=500, error="failed"), Answer(status=401, error="key")


def format_reset(seconds):
    """Write a wait as OpenAI does, rounded up to ms or to seconds."""
    millis = math.ceil(round(seconds * 1000, 3))
    whole = math.ceil(millis / 1000)
    return f"{millis}ms" if millis < 1000 else f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60}s"


def envelope(**members):
    error = {**ERROR, **members}
    return json.dumps({"error": error, "request_id": error["request_id"]}).encode()


def settled(**fields):
    event = {
        "event": "settled",
        "hold_id": "h1",
        "request_id": "id-q0",
        "session": "",
        "prompt_tokens": 20,
        "completion_tokens": 8,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "cost_nusd": COST,
        "held_nusd": fields.get("cost_nusd", COST),
        "hold": "live",
        "usage_source": "reported",
        "waived_nusd": 0,
        "outcome": "completed",
        "settled_ms": 11_000,
    }
    return {name: str(value) for name, value in {**event, **fields}.items()}


def book(*events, **fields):
    costs = sum(int(event.get("cost_nusd", 0)) for event in events)
    granted = {"event": "grant", "amount_nusd": str(GRANTED), "balance_nusd": str(GRANTED)}
    sums = {"balance": GRANTED - costs, "granted": GRANTED, "settled": costs}
    return Book(**{**sums, "events": (granted, *events), **fields})


def judge(record):
    """Return the findings, where requests and calls have the bodies that their plans say, unless they have others.

    An error of the type "right" has that of its status, or of its code in a stream.
    """
    for sight in record.sights:
        sight.body = sight.body or body_of(sight.request, sight.text or sight.marker)
        status = STREAM_STATUSES.get(sight.error.get("code"), 500) if sight.is_stream else sight.status
        kind = ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        sight.payload = sight.payload.replace(b'"type": "right"', f'"type": "{kind}"'.encode())
    for call in record.calls:
        members = (f'"{name}":{json.dumps(value)}' for name, value in call.body.items())
        call.raw = call.raw or f"{{{','.join(members)}}}".encode()
        call.last_at = call.last_at or call.ended_at
        said = json.dumps(call.body["messages"][-1]).encode()
        keyed = (each for each in record.sights if each.marker == call.marker and each.request.keyed)
        for owner in [each for each in keyed if said in each.body][:1]:
            call.headers = {"traceparent": trace_of(owner.request_id)} | call.headers
        if call.answer.error and call.body_bytes in {b"", WHOLE}:
            call.body_bytes = error_of(call.answer, call.marker, {})[2]
    record.key_ids = record.key_ids or [f"key_{number}" for number in range(len(record.history.keys))]
    for number, kept in record.books.items():
        charged = [event for event in kept.events if event["event"] == "settled"]
        for event in charged:
            complete_event(event, record)
        record.books[number] = replace(kept, sums=kept.sums or sums_of(charged))
        record.told.setdefault(number, Told([*map(shown_event, charged)], shown_rows(charged)))
    if not record.failed:
        record.failed = [failure_of(call, record.sights) for call in record.calls if is_failure(call)]
    record.looks = [look if look.told else look._replace(told=told_of(record, look)) for look in record.looks]
    record.logged = record.logged or [line_of(record, sight) for sight in record.sights]
    return judge_record(record)


def complete_event(event, record):
    """Give a settlement what the log and the clients have of its request, unless it has other fields."""
    sight = next((sight for sight in record.sights if sight.request_id == event["request_id"]), record.sights[0])
    line = line_of(record, sight)
    named = {"account": line["account"], "key": line["key_id"], "upstream": line["upstream"] or ""}
    named |= {
        "model": line["model"],
        "attempts": str(line["attempts"]),
        "started_ms": str(round(sight.began_at * 1000)),
    }
    if sight.error:
        named |= {"code": sight.error["code"], "upstream_status": str(line["upstream_status"] or 0)}
    event.update({name: value for name, value in named.items() if name not in event})


def told_of(record, look, **fields):
    """Return what `/v1/key` says when nothing runs and all buckets are full, as it should be, but for these fields."""
    view = View(record)
    limits = [
        {**named._asdict(), "limit": limit, "remaining": size, "reset": named.per and "0s"}
        for named, sizes in limits_of(view, look).items()
        for limit, size in list(sizes.items())[:1]
    ]
    spend = dict.fromkeys(("total_usd", "day_usd", "month_usd"), "0.00")
    spend |= {name: usd_of(int(span.least)) for name, span in spends_of(view, look).items()}
    return {**key_of(view, look), "limits": limits, "spend": spend, **fields}


def is_failure(call):
    return call.ended == "error" and call.answer.status != 200


def failure_of(call, sights, **fields):
    """Return the line in the log of an attempt that failed, as it should be, but for these fields."""
    names = [sight.request_id for sight in sights if sight.marker == call.marker]
    model = call.body["model"].removeprefix("up-")
    line = {"request_id": names[0], "upstream": call.upstream, "model": model, "status": call.answer.status}
    return line | {"attempt": call.number + 1} | fields


def line_of(record, sight, **fields):
    """Return the line in the log of a request, as it should be, but for these fields."""
    events = [event for book in record.books.values() for event in book.events]
    event = next((each for each in events if each.get("request_id") == sight.request_id), {})
    calls = [call for call in record.calls if call.marker == sight.marker]
    replayed, error = "idempotent-replayed" in sight.headers, sight.error
    message, refused = str(error.get("message")), sight.status in {402, 429}
    limits = [name for words, name in LIMITS.items() if refused and words in message]
    named = calls[-1].body["model"].removeprefix("up-") if calls else sight.headers.get("x-mesh-model", "plain")
    begins = sight.payload.find(b"data:")
    first_at = next((at for at, size in sight.times if size > begins), sight.ended_at)
    line = {
        "request_id": sight.request_id,
        "account": f"a{record.history.keys[sight.request.key].account}",
        "key_id": f"key_{sight.request.key}",
        "status": sight.status,
        "code": error.get("code"),
        "level": "warning" if sight.status >= 500 else "info",
        "stream": sight.request.stream,
        "model": event.get("model", named),
        "upstream": calls[-1].upstream if calls else None,
        "upstream_status": calls[-1].answer.status if calls else None,
        "attempts": 0 if replayed else int(sight.headers.get("x-mesh-attempts", 0)),
        "refused_by": limits[0] if limits else error.get("code") if refused else None,
        "outcome": event.get("outcome", "replayed" if replayed else "failed" if error else "completed"),
        "cost_usd": usd_of(int(event.get("cost_nusd", 0))),
        "usage_source": event.get("usage_source", "none"),
        **{name: int(event.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")},
        "client": record.client,
        "overhead_ms": 1.0 if int(sight.headers.get("x-mesh-attempts", 0)) and not replayed else 0.0,
        "duration_ms": (sight.ended_at - sight.began_at) * 1000 - 1,
        "trace_id": trace_of(sight.request_id).split("-")[1] if sight.request.keyed else None,
        "ttft_ms": (first_at - sight.began_at) * 1000 - 1 if sight.request.stream and not replayed else None,
    }
    return line | fields


class Case:
    """A record of one whole answer, to be changed."""

    def __init__(self, request=REQUEST, *, answer=None):
        self.sight = Sight(request, MARKER, "id-q0", b"", 10.0, sent_at=10.0, ended="whole", ended_at=11.0, status=200)
        self.sight.headers = {
            "content-type": "application/json",
            "x-request-id": "id-q0",
            "x-mesh-version": "2026-08",
            "x-mesh-model": "plain",
            "x-resolved-model-id": "plain",
            "x-mesh-cost": "0.00013",
            "x-mesh-attempts": "1",
            "x-mesh-routing-attempts": "1",
        }
        self.sight.payload, self.sight.times = WHOLE, [(11.0, len(WHOLE))]
        sent = json.loads(body_of(request, MARKER))
        body = {name: value for name, value in sent.items() if name not in MESH_FIELDS} | {"model": "up-plain"}
        body |= {"stream_options": {"include_usage": True}} if request.stream else {}
        self.call = Call(MARKER, "one", 0, 10.1, answer or request.answers[0], body, {}, lines=[])
        self.call.made = self.call.shown = self.call.shown_sent = self.call.shown_begun = 8
        self.call.bill, self.call.is_true = Bill(20, 0, 8), frozenset({"prompt", "completion"})
        self.call.reported = self.call.complete = self.call.head_sent = True
        self.call.ended, self.call.ended_at, self.call.body_bytes = "whole", 11.0, WHOLE
        if request.stream:
            self.sight.headers["content-type"] = "text/event-stream"
            self.sight.payload, self.call.lines, self.call.lines_at = STREAM, [LINE], [11.0]
            self.sight.times = [(11.0, len(STREAM))]
        self.record = Record(
            History(1, "", steps=(request,)),
            sights=[self.sight],
            calls=[self.call],
            books={0: book(settled())},
            samples=[Sample(9.0, 0, GRANTED, 0)],
            changes=[Done("grant", 1.0, 2.0, 0, 0, GRANTED, ok=True, ref="first")],
            troubles=[],
            prices=[(0.0, MODELS)],
            left=[],
            errors=[],
            looks=[Look(0, 8.0, 9.5, GRANTED, 0, GRANTED)],
            told={},
            losses=[],
            exits=[("gateway-0", 0)],
            logged=[],
            failed=[],
            quoted=[],
            client="10.1.0.6",
        )
        self.tell_limits()

    def tell_limits(self, **told):
        """Let the head say what is left of the key's limits after an admission, or what is told."""
        key, request = self.record.history.keys[0], self.sight.request
        limits = {"requests": key.requests_per_minute or 600, "tokens": key.tokens_per_minute or 1_000_000}
        sizes = {"requests": key.burst or limits["requests"], "tokens": limits["tokens"]}
        prompt = len(json.dumps(self.call.body["messages"])) // 3 + 6
        taken = {"requests": 1, "tokens": prompt + (request.max_tokens or 64) * request.n}
        for kind, limit in limits.items():
            left = told.get(kind, sizes[kind] - taken[kind])
            reset = told.get(f"reset_{kind}", format_reset((sizes[kind] - left) * 60 / limit))
            named = {"limit": limit, "remaining": max(0, left), "reset": reset}
            self.sight.headers |= {f"x-ratelimit-{name}-{kind}": str(value) for name, value in named.items()}

    def failed(self, status, **error):
        """Let the client have got an error, and the provider have failed."""
        self.sight.status = status
        self.sight.payload = envelope(**error)
        self.sight.headers["content-type"] = "application/json"
        if status >= 500:
            self.sight.headers["x-should-retry"] = "false"
        self.call.answer, self.call.complete, self.call.ended = Answer(status=500, error="failed"), False, "error"
        self.record.books = {0: book()}

    def serve(self, model):
        """Let another model have served."""
        self.sight.headers |= {"x-mesh-model": model, "x-resolved-model-id": model}

    def key(self, **limits):
        self.record.history = replace(self.record.history, keys=(KeyPlan(**limits),))
        self.tell_limits()

    def twice(self, **sight):
        """Add a second request like it, with a settlement of its own."""
        other = Sight(Request("q1", keyed=self.sight.request.keyed), MARKER, "id-q1", b"", 10.0, sent_at=10.0)
        other.headers, other.payload, other.times = dict(self.sight.headers), self.sight.payload, self.sight.times
        other.headers["x-request-id"] = "id-q1"
        other.ended, other.ended_at, other.status = "whole", 11.0, 200
        for name, value in sight.items():
            setattr(other, name, value)
        self.record.sights.append(other)
        self.record.books = {0: book(settled(), settled(hold_id="h2", request_id="id-q1"))}

    def prompted(self, *texts):
        """Let the request have named a template, and its provider have got these system messages."""
        self.sight.request = replace(self.sight.request, template="greeting", manner="few")
        edits = [Done("template", at, at + 1, amount=version) for at, version in ((1.0, 1), (5.0, 2))]
        self.record.changes += edits
        self.call.body["messages"][:0] = [{"role": "system", "content": text} for text in texts]
        self.tell_limits()


def broken_by(change, request):
    """Return the rules that a changed record of one good exchange breaks."""
    case = Case(request)
    change(case)
    return {finding.rule for finding in judge(case.record)}


def not_charged(case):
    case.record.books = {0: book()}


def false_wait(case):
    case.key(requests_per_minute=1)
    case.failed(429, code="rate_limit_exceeded", message="Rate limit reached: key requests per minute.")
    case.sight.headers["retry-after-ms"] = "1000"
    case.twice(
        request=case.sight.request, again=True, status=429, payload=case.sight.payload, began_at=12.0, ended_at=12.1
    )
    case.record.books = {0: book()}


def limit_passed(case):
    case.key(requests_per_minute=1)
    case.twice()


def renewal_lowers(case):
    case.record.samples = [Sample(10.2, 0, GRANTED, 900_000, "renew"), Sample(10.5, 0, GRANTED, 400_000, "renew")]


def tokens_kept(case):
    case.key(tokens_per_minute=1000)
    case.tell_limits(tokens=100)


def repeats_differ(case):
    case.sight.request = replace(case.sight.request, keyed=True)
    case.twice(payload=WHOLE.replace(b"river", b"rover"))
    case.record.sights[1].headers["idempotent-replayed"] = "true"


def balance_told_wrong(case):
    case.record.looks = [Look(0, 8.0, 9.5, GRANTED - 1, 0, GRANTED - 1)]


def charged(cost, **fields):
    def change(case):
        case.record.books = {0: book(settled(cost_nusd=cost, **fields))}
        case.sight.headers["x-mesh-cost"] = f"0.{cost:09d}"

    return change


def troubled(change, *troubles):
    def changed(case):
        change(case)
        case.record.history = replace(case.record.history, workers=2)
        case.record.troubles += troubles

    return changed


def headed(**headers):
    """Let the answer have had these headers."""

    def change(case):
        case.sight.headers |= {name.replace("_", "-"): value for name, value in headers.items()}

    return change


def alone(change, start=9.5):
    """Let one of two workers have answered while the store was lost, from a time on."""

    def changed(case):
        change(case)
        case.record.history = replace(case.record.history, workers=2, local=True)
        case.record.troubles.append(Trouble("gone", start, 40.0))

    return changed


def heard_at(*times):
    """Let the client of a stream have got pings at these times, and all the rest at the last one."""

    def change(case):
        pings = b": ping\n\n" * (len(times) - 1)
        case.sight.payload = pings + STREAM
        case.sight.times = [(at, 8 * (number + 1)) for number, at in enumerate(times)]
        case.sight.times[-1] = times[-1], len(case.sight.payload)
        case.sight.ended_at = case.call.ended_at = times[-1]
        case.call.lines_at = [times[-1]]

    return change


def with_a_repeat(change):
    """Let the request have had an Idempotency-Key, and a repeat of it have come and gone."""

    def changed(case):
        change(case)
        case.sight.request = replace(case.sight.request, keyed=True)
        other = Sight(replace(case.sight.request, name="q1", repeats="q0"), MARKER, "id-q1", b"", 10.0, sent_at=10.0)
        other.headers, other.payload, other.times, other.ended, other.ended_at = {}, b"", [], "left", 10.05
        case.record.sights.append(other)

    return changed


def conflicting(began_at, status=200, *troubles):
    """Let another body have come with the Idempotency-Key of a request that was at its provider at 10.1."""

    def change(case):
        case.sight.request = replace(case.sight.request, keyed=True)
        payload = WHOLE if status == 200 else envelope(code="idempotency_conflict", request_id="id-q1")
        case.twice(began_at=began_at, sent_at=began_at, ended_at=began_at + 1, status=status, payload=payload)
        case.record.sights[1].times = [(began_at + 1, len(payload))]
        other = case.record.sights[1].request = replace(case.record.sights[1].request, other_body=True, prompt_words=7)
        case.record.troubles = list(troubles)
        if status == 200:
            body = case.call.body | {"messages": json.loads(body_of(other, MARKER))["messages"]}
            call = replace(case.call, number=1, at=began_at, body=body, ended_at=began_at + 1)
            call.answer, call.complete = Answer(end="no_done"), False
            case.record.calls.append(call)
        else:
            case.record.sights[1].headers["x-should-retry"] = "false"
            case.record.books = {0: book(settled())}

    return change


def refused(status, code, wait_s=None, **headers):
    """Let the request have been refused with a wait, before it came to a provider."""

    def change(case):
        case.failed(status, code=code, message=headers.pop("message", "No."))
        case.record.calls, case.sight.headers = (
            [],
            {"content-type": "application/json", "x-request-id": "id-q0", "x-mesh-version": "2026-08", **headers},
        )
        if wait_s is not None:
            whole_s = max(1, math.ceil(wait_s))
            case.sight.headers |= {"retry-after": str(whole_s), "retry-after-ms": str(round(wait_s * 1000))}
            error = json.loads(case.sight.payload)["error"] | {"retry_after_seconds": whole_s}
            case.sight.payload = envelope(**error)

    return change


def broken_call(sight, ended_at):
    """Return a call for a request at 5.0, which failed."""
    body = json.loads(body_of(sight.request, sight.marker)) | {"model": "up-plain"}
    call = Call(sight.marker, "one", 0, 5.0, BROKE, body, {}, lines=[])
    call.ended, call.ended_at = "error", ended_at
    return call


def denied(*answers, status=502, by=0, words="Upstream.", **error):
    """Let providers have answered with these errors, and the client have got another, in the words of one of them."""

    def change(case):
        code = error.get("code", "upstream_error")
        refused(status, code, 1.0 if status == 503 else None)(case)
        said = json.loads(error_of(answers[by], MARKER, {})[2])["error"]
        told = {"param": None, **{name: value for name, value in error.items() if value != "its"}}
        told |= {name: said["code" if name == "provider_code" else name] for name in error if error[name] == "its"}
        message = f"The provider refused it: {said['message']}" if words == "its" else words
        got = json.loads(case.sight.payload)["error"] | told | {"message": message}
        case.sight.payload = envelope(**got)
        case.sight.headers |= {"x-mesh-attempts": str(len(answers)), "x-mesh-routing-attempts": str(len(answers))}
        for number, answer in enumerate(answers):
            call = Call(MARKER, ("one", "two")[number], number, 10.1, answer, dict(case.call.body), {}, lines=[])
            names = (case.sight.request.model, *case.sight.request.fallbacks)
            call.body["model"] = f"up-{names[min(number, len(names) - 1)]}"
            call.head_sent, call.ended, call.ended_at = True, "error", 11.0
            case.record.calls.append(call)

    return change


def failed_before(count, ended_at, **seen):
    """Let other requests of the account have failed at a time. Their clients got a 502."""

    def change(case):
        for number in range(count):
            began_at, name = ended_at - 0.2, f"q{number + 1}"
            sight = Sight(Request(name), f"mk1{name}z", f"id-{name}", b"", began_at, sent_at=began_at)
            sight.ended, sight.ended_at, sight.status = "whole", ended_at, 502
            sight.payload = envelope(request_id=sight.request_id)
            attempts = {"x-mesh-attempts": "1", "x-mesh-routing-attempts": "1", "x-mesh-version": "2026-08"}
            attempts["x-should-retry"] = "false"
            sight.headers = {"content-type": "application/json", "x-request-id": sight.request_id, **attempts}
            sight.times = [(ended_at, 1)]
            for name, value in seen.items():
                setattr(sight, name, value)
            case.record.sights.append(sight)
            case.record.calls.append(broken_call(sight, ended_at))
            case.record.calls[-1].at = ended_at - 0.1

    return change
