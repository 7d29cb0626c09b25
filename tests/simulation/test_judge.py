"""The judge: a record of one good exchange breaks no rule, and each change of it that breaks a promise is found."""

import json
import math
from collections import Counter

import pytest
from msgspec.structs import replace

from simulation.breakers import FAILING
from simulation.client import Sight, body_of, trace_of
from simulation.history import (
    ALLOWANCE_NUSD,
    MODELS,
    PROVIDER_SECRET,
    Answer,
    Fault,
    History,
    KeyPlan,
    Request,
    WorkerEvent,
    rendered,
)
from simulation.judge import MESH_FIELDS, RULES
from simulation.judge import judge as judge_record
from simulation.limits import Bucket, Taken, level_at_least, level_at_most
from simulation.planted import PLANTED, ROOT
from simulation.provider import Bill, Call, error_of
from simulation.record import (
    LATENCY_S,
    RECOVERY_S,
    Beat,
    Book,
    Done,
    Drain,
    Finding,
    Look,
    Loss,
    Record,
    Sample,
    Told,
    Trouble,
    marker_of,
)
from simulation.story import played
from simulation.told import LIMITS, usd_of

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
ERROR = {"message": "No.", "type": "x", "param": None, "code": "upstream_error", "request_id": "id-q0"}


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
        "model": "plain",
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
        "started_ms": 10_000,
        "settled_ms": 11_000,
    }
    return {name: str(value) for name, value in {**event, **fields}.items()}


def book(*events, **fields):
    costs = sum(int(event["cost_nusd"]) for event in events)
    hours = {"requests": len(events), "cost": costs}
    for metric in ("prompt", "completion", "cached", "reasoning"):
        hours[metric] = sum(int(event[f"{metric}_tokens"]) for event in events)
    sessions = Counter(event["session"] for event in events)
    granted = {"event": "grant", "amount_nusd": str(GRANTED)}
    sums = {"balance": GRANTED - costs, "granted": GRANTED, "settled": costs}
    return Book(
        **{**sums, "events": (granted, *events), "hours": hours, "months": hours, "sessions": sessions, **fields}
    )


def judge(record):
    """Return the findings, where requests and calls have the bodies that their plans say, unless they have others."""
    for sight in record.sights:
        sight.body = sight.body or body_of(sight.request, sight.marker)
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
    errors = {sight.request_id: sight.error["code"] for sight in record.sights if sight.error}
    for event in (each for book in record.books.values() for each in book.events if each["event"] == "settled"):
        event.update({"code": errors[event["request_id"]]} if event["request_id"] in errors else {})
    if not record.failed:
        record.failed = [failure_of(call, record.sights) for call in record.calls if is_failure(call)]
    record.logged = record.logged or [line_of(record, sight) for sight in record.sights]
    return judge_record(record)


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
    line = {
        "request_id": sight.request_id,
        "account": f"a{record.history.keys[sight.request.key].account}",
        "status": sight.status,
        "code": error.get("code"),
        "level": "warning" if sight.status >= 500 else "info",
        "stream": sight.request.stream,
        "model": calls[-1].body["model"].removeprefix("up-") if calls else sight.headers.get("x-mesh-model", "plain"),
        "upstream": calls[-1].upstream if calls else None,
        "upstream_status": calls[-1].answer.status if calls else None,
        "attempts": 0 if replayed else int(sight.headers.get("x-mesh-attempts", 0)),
        "refused_by": limits[0] if limits else error.get("code") if refused else None,
        "outcome": event.get("outcome", "replayed" if replayed else "failed" if error else "completed"),
        "cost_usd": usd_of(int(event.get("cost_nusd", 0))),
        "usage_source": event.get("usage_source", "none"),
        **{name: int(event.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")},
        "duration_ms": (sight.ended_at - sight.began_at) * 1000 - 1,
        "trace_id": trace_of(sight.request_id).split("-")[1] if sight.request.keyed else None,
        "ttft_ms": 1.0 if sight.request.stream and not replayed else None,
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


def test_a_good_exchange_breaks_no_rule():
    assert judge(Case().record) == []


def test_a_good_stream_breaks_no_rule():
    assert judge(Case(Request("q0", stream=True)).record) == []


def test_a_true_failure_breaks_no_rule():
    case = Case()
    case.failed(502)
    assert judge(case.record) == []


def unbalanced(case):
    case.record.books = {0: book(settled(), balance=GRANTED)}


def hold_left(case):
    case.record.books = {0: book(settled(), held=5, holds=1)}


def hour_lost(case):
    case.record.books = {
        0: book(settled(), hours={"requests": 1, "prompt": 20, "completion": 8, "cached": 0, "cost": 1})
    }


def granted_twice(case):
    case.record.books = {0: replace(book(settled()), granted=2 * GRANTED, balance=2 * GRANTED - COST)}


def settled_twice(case):
    case.record.books = {0: book(settled(), settled())}


def key_charged_twice(case):
    case.sight.request = replace(case.sight.request, keyed=True)
    case.twice()


def overcharged(case):
    case.record.books = {0: book(settled(cost_nusd=COST + 1))}


def not_charged(case):
    case.record.books = {0: book()}


def failure_charged(case):
    case.failed(502)
    case.record.books = {0: book(settled())}


def tokens_of_another_kind(case):
    case.record.books = {0: book(settled(prompt_tokens=60, completion_tokens=-2))}


def session_of_another(case):
    case.record.books = {0: book(settled(session="s2"))}


def estimate_called_reported(case):
    case.call.reported, case.call.is_true = False, frozenset()


def cost_not_told(case):
    del case.sight.headers["x-mesh-cost"]


def another_cost_told(case):
    case.sight.headers["x-mesh-cost"] = "0.00014"


def silent_success(case):
    case.call.complete, case.call.ended, case.call.lines = False, "cut", []


def no_end(case):
    case.sight.payload = STREAM.replace(b"data: [DONE]\n\n", b"")


def closed(case):
    case.sight.ended = "closed"


def hung(case):
    case.sight.ended = "hung"


def no_envelope(case):
    case.failed(502)
    case.sight.payload = b"oops"


def other_request_id(case):
    case.failed(502, request_id="id-q7")


def other_waits(case):
    case.failed(502, retry_after_seconds=2)
    case.sight.headers |= {"retry-after": "3", "retry-after-ms": "2500"}


def answer_lost(case):
    case.sight.status, case.sight.payload = 502, envelope()
    case.record.books = {0: book()}


def other_bytes(case):
    case.sight.payload = WHOLE.replace(b"river", b"rover")


def event_dropped(case):
    case.call.lines = [LINE, LINE]


def usage_unasked(case):
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 20}})
    case.sight.payload = STREAM.replace(b": x-mesh", f"data: {usage}\n\n: x-mesh".encode())
    case.call.lines = [LINE, usage]


def crossed(case):
    case.sight.payload = WHOLE.replace(MARKER.encode(), b"mk1q9z")
    case.call.body_bytes = case.sight.payload


def key_leaked(case):
    case.call.headers = {"authorization": "Bearer rsk_x"}


def own_field_sent(case):
    case.call.body["session_id"] = "s"


def two_caps(case):
    case.call.body["max_completion_tokens"] = 5


def cap_lost(case):
    del case.call.body["max_tokens"]


def asked_for(**fields):
    """Let the provider have got these fields, and not those that are None."""

    def change(case):
        case.call.body |= fields
        for name in [name for name, value in fields.items() if value is None]:
            del case.call.body[name]

    return change


def said(text, raw=None):
    """Let the provider have got this text as the client's message, in these bytes."""

    def change(case):
        case.call.body["messages"] = [{"role": "user", "content": text}]
        case.call.raw = b"" if raw is None else raw.encode()

    return change


def silent_stream(case):
    case.sight.ended_at = 30.0


def false_402(case):
    case.failed(402, code="insufficient_credits", message="The account has 1.00 USD available, ...: 2.00 USD needed.")


def false_429(case):
    case.key(requests_per_minute=60)
    case.failed(429, code="rate_limit_exceeded", message="Rate limit reached: key requests per minute.")


def false_503(case):
    case.failed(503, code="ledger_unavailable")


def false_504(case):
    case.failed(504, code="gateway_timeout")


def internal_error(case):
    case.failed(500, code="internal_error")


def false_wait(case):
    case.key(requests_per_minute=1)
    case.failed(429, code="rate_limit_exceeded", message="Rate limit reached: key requests per minute.")
    case.sight.headers["retry-after-ms"] = "1000"
    case.twice(
        request=case.sight.request, again=True, status=429, payload=case.sight.payload, began_at=12.0, ended_at=12.1
    )
    case.record.books = {0: book()}


def too_late(case):
    case.sight.ended_at = 20.0


def limit_passed(case):
    case.key(requests_per_minute=1)
    case.twice()


def overdrawn(case):
    case.record.samples = [Sample(9.0, 0, 10, 20)]


def beyond_the_hold(case):
    case.record.books = {0: book(settled(held_nusd=1))}


def budget_passed(case):
    case.key(budget_nusd=100)


def renewal_lowers(case):
    case.record.samples = [Sample(10.2, 0, GRANTED, 900_000, "renew"), Sample(10.5, 0, GRANTED, 400_000, "renew")]


def hold_too_large(case):
    case.record.books = {0: book(settled(held_nusd=4_100_000))}


def hold_abandoned(case):
    case.record.books = {0: book(settled(hold="abandoned"))}


def tokens_kept(case):
    case.key(tokens_per_minute=1000)
    case.tell_limits(tokens=100)


def not_failed_over(case):
    case.failed(502)
    case.sight.request = replace(case.sight.request, model="pair")
    case.call.body["model"] = "up-pair"


def asked_in_spite_of_failures(case):
    failed_before(10, 9.0)(case)


def repeats_differ(case):
    case.sight.request = replace(case.sight.request, keyed=True)
    case.twice(payload=WHOLE.replace(b"river", b"rover"))
    case.record.sights[1].headers["idempotent-replayed"] = "true"


def revoked_and_served(case):
    case.record.changes.append(Done("revoke", 1.0, 2.0, 0, 0))


def tier_unpriced(case):
    case.sight.request = replace(case.sight.request, tier="scale")
    case.call.body["service_tier"] = "scale"


def billed_in_another_tier(case):
    case.sight.request = replace(case.sight.request, model="served", tier="flex")
    case.serve("served")
    case.call.body |= {"model": "up-served", "service_tier": "flex"}
    case.call.upstream = "two"


def billed_below_its_tier(case):
    case.sight.request = replace(case.sight.request, model="tiered")
    case.serve("tiered")
    case.call.body["model"] = "up-tiered"
    case.call.bill = Bill(21, 0, 8)


def old_template(case):
    case.prompted(rendered(1, "few"))


def slot_unfilled(case):
    case.prompted(rendered(2, "{{ manner }}"))


def template_left_out(case):
    case.prompted()


def balance_told_wrong(case):
    case.record.looks = [Look(0, 8.0, 9.5, GRANTED - 1, 0, GRANTED - 1)]


def event_told_wrong(case):
    case.record.told = {0: Told({"id-q0": COST - 1}, COST, 1)}


def usage_told_wrong(case):
    case.record.told = {0: Told({"id-q0": COST}, COST, 2)}


def loss_not_told(case):
    case.record.losses = [Loss("gateway-0", "id-q0", "h1", COST, unheld=False)]


def false_exit(case):
    case.record.exits = [("gateway-0", 74)]


def admitted_with_a_full_journal(case):
    case.record.history = replace(case.record.history, local=True)
    case.record.troubles = [Trouble("disk_full", 5.0, 40.0), Trouble("gone", 5.0, 40.0)]
    case.record.unkept = [(7.0, "gateway-0")]


def admitted_without_room(case):
    case.record.history = replace(case.record.history, local=True, journal_bytes=1_500)
    case.record.troubles = [Trouble("gone", 9.5, 40.0)]
    case.record.losses = [Loss("gateway-0", "id-q0", "h1", COST, unheld=True)]


def spent_beyond_the_allowance(case):
    case.record.history = replace(case.record.history, local=True)
    costs = [settled(hold_id=f"h{at}", hold="none", cost_nusd=9_000_000, held_nusd=0) for at in range(4)]
    case.record.books = {0: book(*costs, granted=0, balance=-36_000_000)}


def hang_up_unnoticed(case):
    case.sight.request = replace(case.sight.request, reads="half_closes")
    case.sight.ended, case.call.ended_at = "left", 31.0


def ended_late(case):
    case.record.drains = [Drain(0, 10.5, 12.0)]


def left_behind(case):
    case.record.left = ["tasks: gateway-0: settle"]


def broke(case):
    case.record.errors = ["gateway-0: task_failed"]


STREAMED, GOOD = Request("q0", stream=True), Answer()
BREAKS = [
    (unbalanced, "books_balance"),
    (hold_left, "books_balance"),
    (hour_lost, "books_balance"),
    (granted_twice, "grants_count_once"),
    (settled_twice, "charged_once"),
    (key_charged_twice, "charged_once"),
    (overcharged, "charges_are_bills"),
    (not_charged, "charges_are_bills"),
    (failure_charged, "charges_are_bills"),
    (tokens_of_another_kind, "tokens_are_reported"),
    (session_of_another, "tokens_are_reported"),
    (estimate_called_reported, "sources_are_told"),
    (cost_not_told, "costs_are_told"),
    (another_cost_told, "costs_are_told"),
    (silent_success, "ends_are_honest"),
    (no_end, "ends_are_honest", STREAMED),
    (closed, "ends_are_honest"),
    (hung, "ends_are_honest"),
    (no_envelope, "ends_are_honest"),
    (other_request_id, "ids_are_told"),
    (other_waits, "ends_are_honest"),
    (answer_lost, "answers_are_not_lost"),
    (other_bytes, "answers_are_not_lost"),
    (event_dropped, "answers_are_not_lost", STREAMED),
    (usage_unasked, "answers_are_not_lost", STREAMED),
    (crossed, "bytes_are_ones_own"),
    (key_leaked, "bytes_are_ones_own"),
    (own_field_sent, "requests_are_clean"),
    (two_caps, "requests_are_clean"),
    (cap_lost, "requests_are_clean", Request("q0", max_tokens=9)),
    (silent_stream, "streams_are_alive", STREAMED),
    (false_402, "statuses_have_reasons"),
    (false_429, "statuses_have_reasons"),
    (false_503, "statuses_have_reasons"),
    (false_504, "statuses_have_reasons"),
    (internal_error, "statuses_have_reasons"),
    (false_wait, "waits_are_true"),
    (too_late, "deadlines_hold", Request("q0", timeout_s=2.0)),
    (limit_passed, "limits_hold"),
    (overdrawn, "credit_is_not_overdrawn"),
    (beyond_the_hold, "credit_is_not_overdrawn"),
    (budget_passed, "budgets_hold"),
    (hold_too_large, "holds_are_needed"),
    (hold_abandoned, "holds_are_kept"),
    (renewal_lowers, "renewals_raise"),
    (tokens_kept, "buckets_are_right"),
    (not_failed_over, "failover_happens"),
    (asked_in_spite_of_failures, "breakers_hold"),
    (repeats_differ, "repeats_agree"),
    (revoked_and_served, "changes_hold"),
    (tier_unpriced, "requests_are_clean"),
    (billed_in_another_tier, "charges_are_bills"),
    (billed_below_its_tier, "charges_are_bills"),
    (old_template, "templates_hold"),
    (slot_unfilled, "templates_hold"),
    (template_left_out, "templates_hold"),
    (balance_told_wrong, "accounts_are_told"),
    (event_told_wrong, "accounts_are_told"),
    (usage_told_wrong, "accounts_are_told"),
    (loss_not_told, "losses_are_told"),
    (false_exit, "losses_are_told"),
    (admitted_with_a_full_journal, "full_journals_deny"),
    (admitted_without_room, "full_journals_deny"),
    (spent_beyond_the_allowance, "credit_is_not_overdrawn"),
    (hang_up_unnoticed, "hang_ups_are_noticed"),
    (ended_late, "drains_end"),
    (left_behind, "nothing_is_left"),
    (broke, "nothing_broke"),
]


@pytest.mark.parametrize(
    ("change", "rule", "request_"),
    [(*row, REQUEST)[:3] for row in BREAKS],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_breaks_a_promise_is_found(change, rule, request_):
    case = Case(request_)
    change(case)
    assert rule in {finding.rule for finding in judge(case.record)}


def test_each_rule_has_such_a_case():
    found = {rule for _, rule, *_ in BREAKS}.union(*(broken for *_, broken in SEEN.values()))
    assert {rule.__name__ for rule in RULES} == found


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_each_planted_fault_has_one_place(planted):
    assert (ROOT / "meshproxy" / planted.path).read_text().count(planted.old) == 1


def test_a_killed_worker_excuses_a_charge_that_is_missing():
    case = Case()
    not_charged(case)
    case.sight.ended = "closed"
    case.record.troubles = [Trouble("killed", 10.5, math.inf)]
    assert judge(case.record) == []


def test_a_loss_that_the_log_has_whole_is_charged_by_hand():
    case = Case()
    not_charged(case)
    case.record.losses = [Loss("gateway-0", "id-q0", "h1", COST, unheld=False)]
    case.record.exits = [("gateway-0", 74)]
    assert judge(case.record) == []


@pytest.mark.parametrize(("changed_at", "found"), [(7.89, ["waits_are_true"]), (7.91, [])])
def test_a_limit_that_was_changed_just_before_excuses_a_false_wait(changed_at, found):
    case = Case()
    false_wait(case)
    case.record.changes.append(Done("requests_per_minute", 1.0, changed_at, 0, 0, 1))
    assert [each.rule for each in judge(case.record) if each.rule == "waits_are_true"] == found


def test_a_finding_names_the_request():
    case = Case()
    overcharged(case)
    found = Finding("charges_are_bills", "id-q0 was charged 130001, and 130000 would be right")
    assert found in judge(case.record)


# Money: both sides of each bound. Rows are a change of the good record, its request, and the rules that it breaks.


def estimated(prompt, completion):
    """Let nothing have been reported, and so many tokens have been charged."""

    def change(case):
        case.call.reported, case.call.bill, case.call.is_true = False, Bill(), frozenset()
        charged(prompt * 2_500 + completion * 10_000, usage_source="estimated")(case)

    return change


def charged(cost, **fields):
    def change(case):
        case.record.books = {0: book(settled(cost_nusd=cost, **fields))}
        case.sight.headers["x-mesh-cost"] = f"0.{cost:09d}"

    return change


def sourced(source, lie="true", *, is_true=("prompt", "completion"), left_at=None, **call):
    """Let the settlement name this source of its tokens, where a provider's answer was like this, and its client left."""

    def change(case):
        case.record.books = {0: book(settled(usage_source=source))}
        case.call.answer, case.call.is_true = Answer(lie=lie), frozenset(is_true)
        for name, value in call.items():
            setattr(case.call, name, value)
        if left_at is not None:
            case.sight.request = replace(case.sight.request, keyed=True, reads="leaves")
            case.sight.ended, case.sight.ended_at = "left", left_at

    return change


def capped(told, cap, available=GRANTED):
    """Let a cap have gone out that the client was told, while so much credit was available."""

    def change(case):
        case.call.body["max_tokens"] = cap
        case.record.samples.append(Sample(9.6, 0, available, 0))
        if told is not None:
            case.sight.headers["x-mesh-max-tokens"] = str(told)

    return change


def budgeted(budget):
    """Let a cap have gone out for a key with a budget."""

    def change(case):
        case.key(budget_nusd=budget)
        capped(60, 60)(case)

    return change


def shared(budget, ended_at):
    """Let another request of a key with a budget have ended at a time, which cost nothing."""

    def change(case):
        budgeted(budget)(case)
        other = Sight(Request("q1"), "mk1q1z", "id-q1", b"", 8.0, sent_at=8.0, ended="left", ended_at=ended_at)
        case.record.sights.append(other)

    return change


def left_in_a_head(ended_at):
    """Let a client have left before it had read the head of its answer, and nothing have been charged."""

    def change(case):
        case.sight.ended, case.sight.ended_at, case.sight.status, case.sight.payload = "left", ended_at, 0, b""
        case.sight.headers, case.sight.times = {}, [(ended_at, 4)]
        case.call.complete = case.call.head_sent = case.call.reported = False
        case.call.shown_begun, case.call.ended, case.call.ended_at = 0, "closed", ended_at
        case.record.books = {0: book()}

    return change


def felt(change, at, what="gone"):
    """Let a trouble of the store have begun at a time too."""
    return troubled(change, Trouble(what, at, at + 1))


def troubled(change, *troubles):
    def changed(case):
        change(case)
        case.record.history = replace(case.record.history, workers=2)
        case.record.troubles += troubles

    return changed


def cut(cost, dialect="openai"):
    """Let a provider that served the tier "priority" have broken off after two tokens of a request for "flex"."""

    def change(case):
        error = envelope().decode()
        case.sight.payload = f"data: {LINE}\n\ndata: {error}\n\n".encode()
        case.serve("served")
        case.call.answer = Answer(dialect=dialect, end="resets", tier="priority")
        case.call.body |= {"model": "up-served", "service_tier": "flex"}
        case.call.upstream, case.call.tier, case.call.shown_begun = "two", "priority", 2
        case.call.reported, case.call.bill, case.call.is_true = False, Bill(), frozenset()
        case.call.complete, case.call.ended = False, "cut"
        case.record.books = {0: book(settled(cost_nusd=cost, model="served", usage_source="estimated"))}

    return change


def remaining(tokens, **fields):
    """Let a bucket of 1,000 tokens have had so many after an admission that took 84 to `MOST_TOKENS`."""

    def change(case):
        case.key(tokens_per_minute=1000)
        case.tell_limits(tokens=tokens)
        case.record.books = {0: book(settled(settled_ms=11_000, **fields))}

    return change


def headed(**headers):
    """Let the answer have had these headers."""

    def change(case):
        case.sight.headers |= {name.replace("_", "-"): value for name, value in headers.items()}

    return change


def reset(kind, told, **fields):
    """Let a bucket's reset be told, of a key with 1,000 tokens or with limits of requests."""

    def change(case):
        limits = {name: value for name, value in fields.items() if name != "requests"}
        case.key(**(limits or {"tokens_per_minute": 1000}))
        case.tell_limits(**{f"reset_{kind}": told}, **{name: fields[name] for name in fields if name == "requests"})

    return change


def unknown(change):
    """Let another request of the key have been lost, so that nothing is known of what it took."""

    def changed(case):
        change(case)
        other = Sight(Request("q1"), "mk1q1z", "id-q1", b"", 10.0, sent_at=10.0, ended="left", ended_at=10.05)
        case.record.sights.append(other)

    return changed


def without(name):
    def change(case):
        del case.sight.headers[name]

    return change


def changed_to(limit, at):
    """Let the head name another limit of requests, to which the key's was changed at a time."""

    def change(case):
        case.record.changes.append(Done("requests_per_minute", at, at + 1, 0, 0, limit))
        case.sight.headers |= {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(limit - 1),
            "x-ratelimit-reset-requests": "1s",
        }

    return change


def out_of_credit(cost, **fields):
    """Let a stream of many tokens have ended for lack of credit, with a hold of 100,000."""

    def change(case):
        error = envelope(code="insufficient_credits").decode()
        case.sight.payload = f"data: {LINE}\n\ndata: {error}\n\n".encode()
        case.call.made = case.call.shown = case.call.shown_begun = 300
        case.call.reported, case.call.bill, case.call.is_true = False, Bill(), frozenset()
        case.call.complete, case.call.ended = False, "closed"
        short = {"outcome": "insufficient_credits", "usage_source": "estimated", "held_nusd": 100_000, **fields}
        case.record.books = {0: book(settled(cost_nusd=cost, **short))}
        case.record.samples.append(Sample(9.6, 0, 1_000, 0))

    return change


def billed_beyond_credit(cost):
    """Let the provider of a stream that ended for lack of credit have reported more than its hold allowed for."""

    def change(case):
        out_of_credit(cost, usage_source="reported")(case)
        case.call.reported, case.call.bill, case.call.is_true = (
            True,
            Bill(20, 0, 300),
            frozenset({"prompt", "completion"}),
        )
        case.call.shown = case.call.shown_begun = 5  # the rest is hidden

    return change


def gone_in_the_head(cost, *troubles):
    """Let a client have gone as the first bytes came, and its provider have been left."""

    def change(case):
        case.sight.ended, case.sight.status, case.sight.payload, case.sight.times = "left", 0, b"", []
        case.sight.request = replace(case.sight.request, reads="half_closes")
        case.call.complete, case.call.ended, case.call.reported = False, "closed", False
        case.call.shown = case.call.shown_sent = case.call.shown_begun = 0
        case.record.books = {0: book(settled(cost_nusd=cost, usage_source="estimated"))}
        case.record.troubles = list(troubles)

    return change


def out_of_credit_in_a_dearer_tier(cost):
    """Let a stream for "flex" have ended for lack of credit, in "priority" at five times the price."""

    def change(case):
        out_of_credit(cost, model="served")(case)
        case.serve("served")
        case.call.answer, case.call.tier, case.call.upstream = Answer(tier="priority"), "priority", "two"
        case.call.body |= {"model": "up-served", "service_tier": "flex"}

    return change


def held(amount):
    """Let the request have held so much."""

    def change(case):
        case.record.books = {0: book(settled(held_nusd=amount))}

    return change


def spent_before(cost):
    """Let another request have cost so much before one was refused for a hold of all, with nothing left of the allowance."""

    def change(case):
        short_of(FULL_HOLD, 0)(case)
        other = Sight(Request("q1", max_tokens=1), "mk1q1z", "id-q1", b"", 9.6, sent_at=9.6, ended="left", ended_at=9.7)
        case.record.sights.append(other)
        case.record.books = {0: book(settled(request_id="id-q1", hold="none", cost_nusd=cost, held_nusd=0))}

    return change


def alone(change, start=9.5):
    """Let one of two workers have answered while the store was lost, from a time on."""

    def changed(case):
        change(case)
        case.record.history = replace(case.record.history, workers=2, local=True)
        case.record.troubles.append(Trouble("gone", start, 40.0))

    return changed


def short_of(needed, available=None):
    """Let the request have been refused for a hold of so much, of which all but one nano-USD was there."""

    def change(case):
        if available is None:
            case.record.samples.append(Sample(9.6, 0, needed - 1, 0))
        usd = [f"0.{amount:09d}" for amount in (needed - 1 if available is None else available, needed)]
        case.failed(
            402, code="insufficient_credits", message=f"It has {usd[0]} USD available, ...: {usd[1]} USD needed."
        )
        case.record.calls = []
        case.sight.headers |= {"x-mesh-attempts": "0", "x-mesh-routing-attempts": "0"}

    return change


def beside_costly(left):
    """Let so much have been left of a worker's share, where another request had cost 2,500,000 in spite of its cap."""

    def change(case):
        alone(short_of(FULL_HOLD, left))(case)
        request = Request("q1", max_tokens=1)
        body = body_of(request, "mk1q1z")
        other = Sight(request, "mk1q1z", "id-q1", body, 9.0, sent_at=9.0, ended="left", ended_at=9.1)
        asked = {**json.loads(body), "model": "up-plain"}
        call = Call("mk1q1z", "one", 0, 9.05, Answer(heeds_cap=False), asked, {}, lines=[])
        call.made = call.shown = call.shown_begun = 245
        call.bill, call.is_true = Bill(20, 0, 245), frozenset({"prompt", "completion"})
        call.reported = call.complete = True
        call.ended, call.ended_at = "whole", 9.1
        case.record.sights.append(other)
        case.record.calls = [call]
        case.record.books = {
            0: book(settled(cost_nusd=2_500_000, request_id="id-q1", hold="none", held_nusd=0, completion_tokens=245))
        }

    return change


def out_of_slices(left, since=9.9):
    """Let a stream have ended for lack of credit, while so much was left from a time on, and little before."""

    def change(case):
        out_of_credit(100_000)(case)
        case.call.made = case.call.shown = case.call.shown_begun = 8
        case.record.samples[-1:] = [Sample(9.6, 0, 1_000, 0), Sample(since, 0, left, 0)]

    return change


def beyond(excess, *, made=8, shown=8, **call):
    """Let a reported charge have exceeded its hold by so much."""

    def change(case):
        source = "reported" if call.get("reported", True) else "estimated"
        case.record.books = {0: book(settled(held_nusd=COST - excess, usage_source=source))}
        case.call.made, case.call.shown = made, shown
        for name, value in call.items():
            setattr(case.call, name, value)

    return change


BODY_BYTES = len(body_of(REQUEST, MARKER))
MESSAGE_BYTES = len(json.dumps([{"role": "user", "content": f"{MARKER}: the river is old, and"}]))
PROMPT_HELD = MESSAGE_BYTES // 3 + 12  # tokens, by the coarsest estimate
FULL_HOLD = PROMPT_HELD * 2_500 + 400 * 10_000
MOST_TOKENS = BODY_BYTES // 3 + 12 + 64  # that an admission takes from a bucket
SERVED = Request("q0", model="served", tier="flex", stream=True)
SLICE_NUSD = PROMPT_HELD * 2_500 + (12 + 16) * 10_000 - 100_000  # with 8 tokens seen, beside a hold of 100,000
OVERDRAWN, BUCKETS = {"credit_is_not_overdrawn"}, {"buckets_are_right"}
CLEAN, BILLS = {"requests_are_clean"}, {"charges_are_bills"}
MONEY = {
    "an estimate of 0.8": (estimated(16, 6), REQUEST, set()),
    "a prompt below 0.8": (estimated(15, 6), REQUEST, BILLS),
    "output below 0.8": (estimated(16, 5), REQUEST, BILLS),
    "an estimate of 1.4": (estimated(28, 12), REQUEST, set()),
    "a prompt above 1.4": (estimated(29, 12), REQUEST, BILLS),
    "output above 1.4": (estimated(28, 13), REQUEST, BILLS),
    "an estimate up to the cap": (estimated(28, 8), Request("q0", max_tokens=8), set()),
    "an estimate above the cap": (estimated(28, 9), Request("q0", max_tokens=8), BILLS),
    "an estimate with a tool's name": (
        estimated(28, 15),
        Request("q0", answers=(Answer(kind="tool"),)),
        set(),
    ),
    "an estimate above a tool's name": (estimated(28, 16), Request("q0", answers=(Answer(kind="tool"),)), BILLS),
    "a session without its name": (charged(COST, session="~"), Request("q0", session="s1"), {"tokens_are_reported"}),
    "a cut stream of another tier": (cut(20 * 5_000 + 2 * 20_000), SERVED, set()),
    "a cut stream in the tier asked for": (cut(20 * 1_000 + 2 * 4_000), SERVED, BILLS),
    "a cut stream that names its tier at its end": (cut(20 * 1_000 + 2 * 4_000, "anthropic"), SERVED, set()),
    "tokens of the least estimate": (remaining(1000 - 84), REQUEST, set()),
    "tokens that were hardly taken": (remaining(1000 - 83), REQUEST, BUCKETS),
    "tokens of the most": (remaining(1000 - MOST_TOKENS), REQUEST, set()),
    "tokens beyond the most": (remaining(1000 - MOST_TOKENS - 1), REQUEST, BUCKETS),
    "tokens of a store that was lost": (felt(remaining(5), 10.9), REQUEST, BUCKETS),
    "tokens of a store that failed over before": (felt(remaining(5), 10.9, "failover"), REQUEST, set()),
    "tokens of a store that failed over later": (felt(remaining(5), 11.1, "failover"), REQUEST, BUCKETS),
    "tokens of a clock that jumped": (felt(remaining(5), 12.9, "clock"), REQUEST, set()),
    "tokens of a clock that jumped later": (felt(remaining(5), 13.1, "clock"), REQUEST, BUCKETS),
    "a reset of tokens": (reset("tokens", "6s"), REQUEST, set()),
    "a reset of tokens that is too short": (reset("tokens", "5s"), REQUEST, BUCKETS),
    "a reset of tokens that is too long": (reset("tokens", "7s"), REQUEST, BUCKETS),
    "a reset that nothing can read": (reset("tokens", "6 s"), REQUEST, BUCKETS),
    "a request of sixty": (reset("requests", "1s", requests_per_minute=60), REQUEST, set()),
    "none of sixty": (reset("requests", "0s", requests_per_minute=60, requests=60), REQUEST, BUCKETS),
    "two of sixty": (reset("requests", "2s", requests_per_minute=60, requests=58), REQUEST, BUCKETS),
    "two of sixty, of one of which nothing is known": (
        unknown(reset("requests", "2s", requests_per_minute=60, requests=58)),
        REQUEST,
        set(),
    ),
    "a reset of a burst": (reset("requests", "20s", requests_per_minute=3, burst=2), REQUEST, set()),
    "a reset of another size": (reset("requests", "40s", requests_per_minute=3, burst=2), REQUEST, BUCKETS),
    "a reset of requests that is halved": (reset("requests", "50ms"), REQUEST, BUCKETS),
    "another limit": (headed(x_ratelimit_limit_requests="60"), REQUEST, BUCKETS),
    "no limit": (without("x-ratelimit-limit-requests"), REQUEST, BUCKETS),
    "a limit that was changed before": (changed_to(60, 10.9), REQUEST, set()),
    "a limit that was changed later": (changed_to(60, 11.1), REQUEST, BUCKETS),
    "a hold and a slice": (out_of_credit(100_000 + 16 * 10_000), STREAMED, set()),
    "more than a hold and a slice": (out_of_credit(100_001 + 16 * 10_000), STREAMED, BILLS | OVERDRAWN),
    "a bill above a hold and a slice": (billed_beyond_credit(100_000 + 16 * 10_000), STREAMED, set()),
    "a hold for a longer prompt, and a slice": (billed_beyond_credit(70_000 + 16 * 10_000), STREAMED, set()),
    "less than that": (billed_beyond_credit(69_999 + 16 * 10_000), STREAMED, BILLS),
    "the head of a worker's end": (gone_in_the_head(0, Trouble("drained", -9.0, 31.0, 0)), REQUEST, set()),
    "the head of what ran on another worker": (gone_in_the_head(0, Trouble("drained", -9.0, 31.0, 1)), REQUEST, BILLS),
    "a head that nothing ended": (gone_in_the_head(0), REQUEST, BILLS),
    "a hold and a slice of a dearer tier": (out_of_credit_in_a_dearer_tier(500_000 + 16 * 30_000), SERVED, set()),
    "more than that": (out_of_credit_in_a_dearer_tier(500_001 + 16 * 30_000), SERVED, BILLS),
    "a hold and a slice for each of two": (out_of_credit(100_000 + 320_000), Request("q0", stream=True, n=2), set()),
    "a whole answer at its hold": (beyond(0), REQUEST, set()),
    "a whole answer beyond its hold": (beyond(1), REQUEST, OVERDRAWN),
    "a whole answer of a provider that ignores caps": (beyond(80_000, answer=Answer(heeds_cap=False)), REQUEST, set()),
    "a slice, and a fifth of the text that no estimate sees": (beyond((16 + 2) * 10_000), STREAMED, set()),
    "more than a slice": (beyond((16 + 2) * 10_000 + 1), STREAMED, OVERDRAWN),
    "a slice and hidden reasoning": (beyond((16 + 2 + 5) * 10_000, made=13), STREAMED, set()),
    "an unreported slice": (beyond(16 * 10_000 + 1, reported=False), STREAMED, OVERDRAWN),
    "a field that the client didn't send": (asked_for(seed=7), REQUEST, CLEAN),
    "a field that is lost": (asked_for(n=None), Request("q0", n=2), CLEAN),
    "another model": (asked_for(model="up-pair"), REQUEST, CLEAN | {"attempts_are_told"}),
    "a stream that isn't asked for its usage": (asked_for(stream_options=None), STREAMED, CLEAN),
    "a message without its end": (said(f"{MARKER}: the river is old, an"), REQUEST, CLEAN),
    "a message in other bytes": (
        said(f"{MARKER}: the river is old, and", f'{{"messages":[{{"role":"user","content":"{MARKER}..."}}]}}'),
        REQUEST,
        CLEAN,
    ),
    "a larger cap": (capped(None, 10), Request("q0", max_tokens=9), CLEAN),
    "a smaller cap": (capped(None, 8), Request("q0", max_tokens=9), CLEAN),
    "a hold of all": (held(FULL_HOLD), REQUEST, set()),
    "a hold of more": (held(FULL_HOLD + 1), REQUEST, {"holds_are_needed"}),
    "a hold of a cap": (held(PROMPT_HELD * 2_500 + 90_000), Request("q0", max_tokens=9), set()),
    "a hold of more than a cap": (
        held(PROMPT_HELD * 2_500 + 90_001),
        Request("q0", max_tokens=9),
        {"holds_are_needed"},
    ),
    "a hold of a slice": (held(PROMPT_HELD * 2_500 + (12 + 16) * 10_000), STREAMED, set()),
    "a hold of more than a slice": (held(PROMPT_HELD * 2_500 + 280_001), STREAMED, {"holds_are_needed"}),
    "a refusal for a hold": (short_of(FULL_HOLD), REQUEST, set()),
    "a refusal for more than a hold": (short_of(FULL_HOLD + 1), REQUEST, {"statuses_have_reasons"}),
    "a refusal for a share of the allowance": (alone(short_of(FULL_HOLD, ALLOWANCE_NUSD // 2)), REQUEST, set()),
    "a refusal for what is left of a share": (alone(spent_before(ALLOWANCE_NUSD // 2)), REQUEST, BILLS),
    "a refusal for less than is left": (
        alone(spent_before(ALLOWANCE_NUSD // 2 - 1)),
        REQUEST,
        BILLS | {"statuses_have_reasons"},
    ),
    "a refusal for less than a share": (
        alone(short_of(FULL_HOLD, ALLOWANCE_NUSD // 2 - 1)),
        REQUEST,
        {"statuses_have_reasons"},
    ),
    "a refusal for what a costly request left of a share": (beside_costly(500_000), REQUEST, set()),
    "a refusal for less than it left": (beside_costly(499_999), REQUEST, {"statuses_have_reasons"}),
    "a refusal for a share before the store is lost": (
        alone(short_of(FULL_HOLD, ALLOWANCE_NUSD // 2), 12.1),
        REQUEST,
        {"statuses_have_reasons"},
    ),
    "a slice that is lacking": (out_of_slices(SLICE_NUSD - 1), STREAMED, set()),
    "a slice that is left": (out_of_slices(SLICE_NUSD), STREAMED, {"statuses_have_reasons"}),
    "a slice that was lacking until a second before": (out_of_slices(SLICE_NUSD, 10.1), STREAMED, set()),
    "a cap of the gateway's": (capped(60, 60, 2 * FULL_HOLD - 1), REQUEST, set()),
    "a cap that wasn't needed": (capped(60, 60, 2 * FULL_HOLD), REQUEST, CLEAN),
    "a cap above the model's": (capped(401, 401, 1_000), REQUEST, CLEAN),
    "a cap that isn't told": (capped(None, 60, 1_000), REQUEST, CLEAN),
    "another cap that is told": (capped(61, 60, 1_000), REQUEST, CLEAN),
    "a cap within a budget": (budgeted(2 * FULL_HOLD - 1), REQUEST, set()),
    "a cap that its budget didn't need": (budgeted(2 * FULL_HOLD), REQUEST, CLEAN),
    "a cap while another request holds the budget": (shared(3 * FULL_HOLD - 1, 9.8), REQUEST, set()),
    "a cap of what another request had given back": (shared(3 * FULL_HOLD - 1, 8.5), REQUEST, CLEAN),
    "a deadline's answer that wasn't read": (left_in_a_head(10.5), Request("q0", stream=True, timeout_s=0.5), set()),
    "an answer left before its deadline": (left_in_a_head(10.4), Request("q0", stream=True, timeout_s=0.5), BILLS),
    "an answer left without a deadline": (left_in_a_head(10.5), STREAMED, BILLS),
    "a cap of a stream": (capped(60, 60, 1_000), STREAMED, CLEAN),
}


@pytest.mark.parametrize(("change", "request_", "broken"), MONEY.values(), ids=MONEY.keys())
def test_money_is_judged_at_its_bounds(change, request_, broken):
    case = Case(request_)
    change(case)
    assert {finding.rule for finding in judge(case.record)} == broken


SOURCES = {
    "a report": (sourced("reported"), True),
    "a report that is called an estimate": (sourced("estimated"), False),
    "a report that is called drained though its client stayed": (sourced("drained"), False),
    "a report without a prompt": (sourced("estimated", "no_prompt", is_true=["completion"]), True),
    "an estimate that is called a report": (sourced("reported", "no_prompt", is_true=["completion"]), False),
    "an answer without text or a report": (sourced("none", "none", is_true=[], shown=0, reported=False), True),
    "an answer without text or a report, which can't be": (
        sourced("none", "absurd", is_true=[], shown=0, reported=False),
        True,
    ),
    "an answer without text that was reported": (sourced("none", shown=0), False),
    "an answer without text whose output can't be": (sourced("reported", "absurd", is_true=["prompt"], shown=0), False),
    "an answer without text whose prompt is reported": (
        sourced("reported", "no_completion", is_true=["prompt"], shown=0),
        True,
    ),
    "half of the text": (sourced("reported", "early", is_true=["prompt"], shown=20, made=24), False),
    "half of the text, and reasoning": (sourced("reported", "early", is_true=["prompt"], shown=20, made=25), True),
    "half of a long text, of which half came": (
        sourced(
            "reported", "early", is_true=["prompt"], shown=45, made=45, shown_begun=28, complete=False, ended="cut"
        ),
        True,
    ),
    "half of a long text that came": (
        sourced("reported", "early", is_true=["prompt"], shown=45, made=45, shown_begun=45),
        False,
    ),
    "a report that came after a hang-up": (sourced("drained", left_at=10.79), True),
    "a report after a hang-up that isn't called drained": (sourced("reported", left_at=10.79), False),
    "a report after a hang-up that wasn't read": (sourced("estimated", left_at=10.79), False),
    "a report that came as its client left": (sourced("reported", left_at=10.81), True),
    "a report that came before its client left, whose body lingered": (
        sourced("reported", left_at=10.79, last_at=10.98),
        True,
    ),
    "a report that came later, whose body lingered": (sourced("reported", left_at=10.77, last_at=10.98), False),
    "a provider's error": (sourced("none", ended="error"), True),
    "a provider's error that is called an estimate": (sourced("estimated", ended="error"), False),
}


@pytest.mark.parametrize(("change", "is_right"), SOURCES.values(), ids=SOURCES.keys())
def test_the_source_of_the_tokens_is_judged(change, is_right):
    case = Case()
    change(case)
    assert ("sources_are_told" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("keyed", "start", "excused"), [(True, ": ping", True), (False, ": ping", False), (True, "data: {}", False)]
)
def test_credit_refuses_a_repeat_behind_its_pings(keyed, start, excused):
    case = Case(Request("q0", stream=True, keyed=keyed))
    words = {**ERROR, "code": "insufficient_credits", "message": "The account has 0.00 USD available, ..."}
    case.sight.payload = f"{start}\n\ndata: {json.dumps({'error': words})}\n\n".encode()
    case.record.calls, case.record.books = [], {0: book()}
    case.record.logged = [line_of(case.record, case.sight, refused_by="credit")]
    assert ("requests_are_logged" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(
    ("waited_s", "delay_s", "excused"), [(30.0, 31.0, True), (29.9, 31.0, False), (30.0, 29.0, False)]
)
def test_a_provider_that_never_began_is_paid_by_no_client_that_takes_nothing(waited_s, delay_s, excused):
    case = Case(Request("q0", stream=True, reads="stalls"), answer=Answer(delay_s=delay_s))
    gone_in_the_head(0)(case)
    case.sight.ended_at, case.call.at, case.call.head_sent = 90.0, 12.0, False
    case.call.ended_at = 12.0 + waited_s
    assert ("charges_are_bills" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(("ran", "excused"), [("id-q1", True), ("id-q0", False)])
def test_a_request_that_left_before_it_ran_has_no_tokens_of_another_s(ran, excused):
    case = Case(Request("q0", keyed=True, reads="leaves"))
    case.sight.ended, case.sight.ended_at = "left", 10.5
    case.twice(ended_at=12.0)
    case.call.headers = {"traceparent": trace_of(ran)}
    case.record.books = {0: book(settled(usage_source="none"), settled(hold_id="h2", request_id="id-q1"))}
    assert ("sources_are_told" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(
    ("start", "end", "excused"), [(1.1, 10.0, True), (1.11, 10.0, False), (1.1, 9.99, False), (-5.0, 10.0, True)]
)
def test_a_slot_may_be_taken_while_a_settlement_waits_for_the_store(start, end, excused):
    case = Case()
    limited(1.0, 1, Trouble("refused", start, end), max_parallel=1)(case)
    case.record.sights[1].ended = "whole"
    assert ("statuses_have_reasons" not in {finding.rule for finding in judge(case.record)}) == excused


# What clients see: both sides of each bound. Rows are a change of the good record, its request, and the rules that it breaks.


def sent_at(event_at, end_at=11.0, *troubles):
    """Let the provider have sent its event and its end at these times; its client had both at 11.0."""

    def change(case):
        case.call.lines_at, case.call.ended_at = [event_at], end_at
        case.record.troubles = list(troubles)

    return change


def replayed(sent_at, came_at):
    """Let a repeat, which was sent at 10.0, have got at a time what the first request's provider had sent."""

    def change(case):
        case.sight.request = replace(case.sight.request, keyed=True)
        case.twice(ended_at=came_at, times=[(came_at, len(STREAM))])
        case.record.sights[1].request = replace(case.record.sights[1].request, stream=True)
        case.record.sights[1].headers["idempotent-replayed"] = "true"
        case.call.lines_at, case.call.ended_at = [sent_at], sent_at
        case.sight.ended_at, case.sight.times = sent_at, [(sent_at, len(STREAM))]
        case.sight.began_at = case.sight.sent_at = case.call.at = sent_at - 1
        case.record.books = {0: book(settled())}

    return change


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


def cut_short_at(ended_at, *troubles):
    """Let a stream's worker have had these troubles, and the stream have ended as if it had been cut short."""

    def change(case):
        error = envelope(code="overloaded").decode()
        case.sight.payload = f"data: {LINE}\n\ndata: {error}\n\n".encode()
        case.sight.ended_at = ended_at
        case.sight.times = [
            (at, len(case.sight.payload)) for at in (11.0, 16.0, 21.0, 26.0, ended_at) if at <= ended_at
        ]
        case.call.complete, case.call.ended, case.call.ended_at, case.call.reported = False, "closed", ended_at, False
        case.record.books = {0: book(settled(usage_source="estimated"))}
        case.record.troubles = list(troubles)
        case.record.history = replace(case.record.history, workers=2)

    return change


def repeated(*troubles, code="upstream_error", ended_at=30.0, answer=GOOD):
    """Let worker 1 have had a request that broke off, and a repeat at another worker have ended with an error."""

    def change(case):
        case.sight.request = replace(case.sight.request, keyed=True, reads="leaves")
        case.sight.worker, case.sight.ended, case.sight.ended_at = 1, "left", 10.6
        error = b"data: %b\n\n" % envelope(code=code)
        headers = {**case.sight.headers, "idempotent-replayed": "true", "x-request-id": "id-q1"}
        case.twice(began_at=11.0, sent_at=11.0, ended_at=ended_at, payload=error, headers=headers)
        case.record.sights[1].request = replace(REQUEST, name="q1", stream=True, keyed=True)
        case.record.sights[1].times = [(at, len(error)) for at in (11.0, 16.0, 21.0, 26.0, ended_at)]
        case.call.answer, case.call.ended, case.call.ended_at = answer, "cut", 10.6
        case.call.complete = case.call.reported = False
        case.record.books = {0: book(settled(cost_nusd=130_000, usage_source="estimated"))}
        case.record.troubles = list(troubles)
        case.record.history = replace(case.record.history, workers=3)

    return change


def stalled(last_at, left_at, *, head=True, code="gateway_timeout", keyed=False):
    """Let a provider that was asked at 10.1 have stalled, and been left at a time, when the stream ended with an error."""

    def change(case):
        if keyed:
            repeated(code=code, ended_at=left_at, answer=Answer(end="stalls"))(case)
        else:
            error = b"data: %b\n\n" % envelope(code=code)
            heard_at(*range(11, int(left_at), 5), left_at)(case)
            case.sight.payload = case.sight.payload.replace(STREAM, error)
            case.call.answer, case.call.ended = Answer(end="stalls", at=0.05 * head), "cut"
            case.call.complete = case.call.reported = False
            case.call.shown_begun, case.record.books = 0, {0: book()}
        case.call.head_sent, case.call.last_at, case.call.ended_at = head, last_at, left_at

    return change


def logged(*lines):
    """Let the log have had these lines of the request, each with other fields than it should have."""

    def change(case):
        case.record.logged = [line_of(case.record, case.sight, **fields) for fields in lines]
        if not lines:
            case.record.logged = [line_of(case.record, case.sight, request_id="id-q7")]

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


def traced(traceparent):
    """Let the provider have been told of another trace."""

    def change(case):
        case.call.headers = {"traceparent": traceparent}

    return change


def failed_as(change, **fields):
    """Let the log's line of the first failed attempt have had these fields."""

    def changed(case):
        change(case)
        first, *others = case.record.calls
        case.record.failed = [failure_of(first, case.record.sights, **fields)]
        case.record.failed += [failure_of(call, case.record.sights) for call in others]

    return changed


def unlogged_until(ended_at):
    """Let the log have no line of a request whose provider is read to its end, at a time."""

    def change(case):
        case.twice(
            request=Request("q7", reads="leaves"),
            request_id="id-q7",
            marker="mk1q7z",
            ended="left",
            headers={},
            status=0,
            payload=b"",
        )
        case.record.books = {0: book(settled(model="drained"))}
        case.sight.request = replace(REQUEST, model="drained")
        case.serve("drained")
        case.call.upstream, case.call.body["model"], case.call.ended_at = "drained", "up-drained", ended_at
        case.record.logged = [line_of(case.record, case.record.sights[1])]

    return change


def misnamed(change, **ids):
    """Let the client's error have had these ids, in itself or beside it."""

    def changed(case):
        change(case)
        got = json.loads(case.sight.data[-1]) if case.sight.is_stream else json.loads(case.sight.payload)
        got["request_id"], got["error"]["request_id"] = ids.get("beside", "id-q0"), ids.get("within", "id-q0")
        payload = json.dumps(got).encode()
        case.sight.payload = b": ping\n\n" * 5 + b"data: %b\n\n" % payload if case.sight.is_stream else payload

    return changed


def replayed_as(*, says, has_run, pinged=False):
    """Let a repeat have been answered, and its head say or not that the answer is another request's."""

    def change(case):
        replayed(5.0, 11.0)(case)
        repeat = case.record.sights[1]
        if not says:
            del repeat.headers["idempotent-replayed"]
        if pinged:
            repeat.payload = b": ping\n\n" + repeat.payload
        if has_run:
            case.record.books = {0: book(settled(), settled(hold_id="h2", request_id="id-q1", cost_nusd=0))}

    return change


def timed_out(took_s, *, head_at=None, **answer):
    """Let the request's own deadline have ended it after a time, with the provider's head at a time, or none."""

    def change(case):
        refused(504, "gateway_timeout", **{"x-should-retry": "false"})(case)
        case.sight.headers |= {"x-mesh-attempts": "1", "x-mesh-routing-attempts": "1"}
        case.record.calls, case.call.answer = [case.call], Answer(delay_s=(head_at or 0.1) - 0.1, **answer)
        case.call.lines_at = []
        case.call.head_sent, case.call.complete, case.call.reported = head_at is not None, False, False
        case.call.ended, case.call.ended_at = "closed", 10.0 + took_s
        case.sight.ended_at, case.sight.times = 10.0 + took_s, [(10.0 + took_s, 300)]

    return change


def closed_at(sent_at, *troubles):
    """Let the connection of a request that was sent at a time have been closed without an answer."""

    def change(case):
        case.sight.ended, case.sight.sent_at, case.sight.status, case.sight.payload = "closed", sent_at, 0, b""
        case.record.troubles, case.record.calls, case.record.books = list(troubles), [], {0: book()}
        case.record.history = replace(case.record.history, workers=2)

    return change


def slow(ended_at, reads="slowly"):
    """Let the stream of a client whose worker was drained at 11.0 have been closed at a time."""

    def change(case):
        cut_short_at(ended_at, Trouble("drained", 11.0, 32.0, 0))(case)
        case.sight.request = replace(case.sight.request, reads=reads)
        case.sight.ended, case.sight.payload = "closed", f"data: {LINE}\n\n".encode()

    return change


def kept(change):
    """Let the request have come on a connection that had been used before."""

    def changed(case):
        change(case)
        case.sight.reused = True

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


def called(*answers, asked=(), ended_after_s=0.2, **sight):
    """Let the request have failed with these calls, of the upstreams `asked`."""

    def change(case):
        case.failed(502)
        case.record.calls.clear()
        case.sight.headers |= {"x-mesh-attempts": str(len(answers)), "x-mesh-routing-attempts": str(len(answers))}
        for number, (answer, upstream) in enumerate(zip(answers, asked, strict=True)):
            at = 10.1 + number * ended_after_s
            call = Call(MARKER, upstream, number, at, answer, {**case.call.body, "model": "up-pair"}, {}, lines=[])
            if upstream == "two" and "max_tokens" in call.body:
                call.body["max_completion_tokens"] = call.body.pop("max_tokens")
            call.head_sent = answer.at > 0
            call.ended, call.ended_at = "error" if answer.error else "cut", at + ended_after_s
            case.record.calls.append(call)
        case.sight.ended_at = case.record.calls[-1].ended_at
        case.sight.times = [(case.sight.ended_at, len(case.sight.payload))]
        for name, value in sight.items():
            setattr(case.sight, name, value)

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


KINDS = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "max_parallel": "parallel",
}


def limited(wait_s, others=1, *troubles, **limits):
    """Let a 429 name this wait, after so many requests of the same key 10 s before."""

    def change(case):
        kind = next(KINDS[limit] for limit in limits if limit in KINDS)
        case.key(**limits)
        case.record.troubles = list(troubles)
        refused(429, "rate_limit_exceeded", wait_s, message=f"Rate limit reached: key {kind}.")(case)
        for number in range(others):
            other = Sight(Request(f"q{number + 1}"), f"mk1q{number + 1}z", f"id-q{number + 1}", b"", 0.0, sent_at=0.0)
            other.headers, other.payload = {}, b""
            other.ended, other.ended_at = "left", 0.1
            case.record.sights.append(other)

    return change


def tokens_left(*troubles):
    def change(case):
        tokens_kept(case)
        case.record.troubles = list(troubles)

    return change


def broken_call(sight, ended_at):
    """Return a call for a request at 5.0, which failed."""
    body = json.loads(body_of(sight.request, sight.marker)) | {"model": "up-plain"}
    call = Call(sight.marker, "one", 0, 5.0, BROKE, body, {}, lines=[])
    call.ended, call.ended_at = "error", ended_at
    return call


def waited(settled_at):
    """Let a request for tokens have waited as it was told, in vain, and another have been over at a time."""

    def change(case):
        case.key(tokens_per_minute=1000)
        refused(429, "rate_limit_exceeded", 0.001, message="Rate limit reached: key tokens per minute.")(case)
        payload = case.sight.payload.replace(b"id-q0", b"id-q1")
        case.twice(request=case.sight.request, again=True, status=429, began_at=12.0, ended_at=12.1, payload=payload)
        other = Sight(Request("q7"), "mk1q7z", "id-q7", b"", 5.0, sent_at=5.0, ended="left", ended_at=settled_at)
        case.record.sights.append(other)
        case.record.calls = [broken_call(other, settled_at)]
        case.record.books = {0: book()}

    return change


def handed_on(answer, wait_s, status=502, code="upstream_error", *, says_no=False):
    """Let a provider have asked for a wait, and the client have been told another."""

    def change(case):
        refused(status, code, wait_s)(case)
        case.record.calls = [case.call]
        case.call.answer = answer
        case.sight.headers |= {"x-mesh-attempts": "1", "x-mesh-routing-attempts": "1"}
        if says_no:
            case.sight.headers["x-should-retry"] = "false"

    return change


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


def asked_late(asked_at):
    """Let a provider have been asked at a time, and the client have been told at 11.0 that the instance shuts down."""

    def change(case):
        refused(503, "overloaded", 1.0, **{"x-should-retry": "false"})(case)
        case.sight.headers |= {"x-mesh-attempts": "1", "x-mesh-routing-attempts": "1"}
        case.record.calls, case.call.at, case.call.ended_at = [case.call], asked_at, asked_at + 0.1
        case.call.complete, case.call.ended = False, "closed"
        case.record.troubles = [Trouble("drained", -9.0, 20.0, 0)]

    return change


def early_headed(asked_at):
    """Let the client have got a head and a ping at 15.1, and a second provider have been asked at a time."""

    def change(case):
        case.serve("pair")
        heard_at(15.1, 16.0)(case)
        case.call.body["model"] = "up-pair"
        first = Call(MARKER, "one", 0, 10.1, BROKE, dict(case.call.body), {}, lines=[])
        first.ended, first.ended_at = "error", asked_at
        case.call.upstream, case.call.at = "two", asked_at
        case.record.calls.insert(0, first)
        case.record.books = {0: book(settled(model="pair"))}

    return change


def behind_a_dead_one(case):
    """Let the second route of a model have served, where nothing listens at the first."""
    headed(x_mesh_attempts="2", x_mesh_routing_attempts="2", x_mesh_routing_fallback="true")(case)
    case.serve("gone-first")
    case.sight.headers["x-mesh-routing-model"] = "gone-first"
    case.call.upstream, case.call.body["model"] = "two", "up-gone-first"
    case.call.bill = Bill(25, 0, 0)
    charged(75_000, model="gone-first", prompt_tokens=25, completion_tokens=0)(case)


def left_at(upstream, provider_left_at, answer=GOOD):
    """Let the client have left at 11.0, and the provider have been left at another time."""

    def change(case):
        case.sight.ended, case.call.upstream, case.call.answer = "left", upstream, answer
        case.call.ended, case.call.ended_at, case.call.complete = "closed", provider_left_at, False
        case.sight.request = replace(case.sight.request, reads="hangs_up")

    return change


def told_off(what, ended_at, *troubles):
    """Let the key have been revoked or suspended, or another version of the template stored, before the request at 10.0."""

    def change(case):
        case.record.changes.append(Done(what, 5.0, ended_at, 0, 0, 2))
        case.record.troubles = list(troubles)

    return change


def templated(ended_at, version, *troubles):
    """Let version 2 of the template have been stored by a time, and the provider have got another, at 10.1."""

    def change(case):
        case.prompted(rendered(version, "few"))
        case.record.changes[-1] = case.record.changes[-1]._replace(began_at=min(ended_at, 10.3), ended_at=ended_at)
        case.record.troubles = list(troubles)
        case.call.bill = Bill(20, 0, 8)

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


def failing(count, *, ended_at=5.1, wait_s=1.0, **seen):
    """Let the provider have failed so often, and the request have been refused for it."""

    def change(case):
        refused(503, "provider_not_available", wait_s, message=FAILING)(case)
        failed_before(count, ended_at, **seen)(case)

    return change


def unavailable(*troubles):
    """Let the request have got 503 since the store was lost."""

    def change(case):
        refused(503, "ledger_unavailable", 1.0)(case)
        case.record.troubles = list(troubles)

    return change


def read_along(*troubles, began_at):
    """Let a repeat that began at a time have read along until an error, with a first request that ended with its worker."""

    def change(case):
        case.sight.request = replace(case.sight.request, keyed=True)
        case.twice(
            status=502, payload=envelope(request_id="id-q1"), began_at=began_at, sent_at=began_at, ended_at=began_at + 9
        )
        case.record.sights[1].headers |= {"x-should-retry": "false", "content-type": "application/json"}
        case.sight.ended, case.sight.ended_at, case.sight.payload = "left", 10.5, b""
        case.call.complete, case.call.ended, case.call.ended_at, case.call.reported = False, "closed", 11.0, False
        case.record.books = {0: book()}
        case.record.troubles = list(troubles)

    return change


def echoed(text):
    def change(case):
        case.failed(502, message=f"No. {text}")

    return change


PAIR, PAIR_STREAM = Request("q0", model="pair"), Request("q0", model="pair", stream=True)
LOST, CUT, BROKE = Answer(end="resets", at=0.0), Answer(end="resets", at=0.001), Answer(status=500, error="failed")
ENDS, PROMPT, ALIVE, WAITS = {"ends_are_honest"}, {"answers_are_prompt"}, {"streams_are_alive"}, {"waits_are_told"}
LOGGED = {"requests_are_logged"}
DEADLINES, TOLD_ERRORS, IDS = {"deadlines_hold"}, {"refusals_are_told"}, {"ids_are_told"}
LONG, LARGE = Answer(status=400, error="context"), Answer(status=413, error="large")
NO_KEY, ITS = Answer(status=401, error="key"), dict.fromkeys(("code", "param", "provider_code", "words"), "its")
FLAGGED, TOO_POOR = Answer(status=403, error="flagged"), Answer(status=400, error="balance")
NO_CODE = {"code": "provider_refused", "provider_code": None}
LIMIT = Answer(status=429, error="limit")
ITS["provider_error"] = {"message": "No."}
PAIR_OF_MODELS = Request("q0", fallbacks=("fee",))
BREAKERS = {"breakers_hold"}
REASONS, FAILOVER, TOLD = {"statuses_have_reasons"}, {"failover_happens"}, {"attempts_are_told"}
SEEN = {
    "an event on its way": (sent_at(10.61), STREAMED, set()),
    "an event that was held": (sent_at(10.59), STREAMED, PROMPT),
    "an end on its way": (sent_at(11.0, 10.61), STREAMED, set()),
    "an end that was held": (sent_at(11.0, 10.59), STREAMED, PROMPT),
    "an event that waits for a slow store": (sent_at(10.2, 11.0, Trouble("slow", 10.5, 20.0)), STREAMED, set()),
    "an event after a slow store": (sent_at(10.2, 11.0, Trouble("slow", 1.0, 9.9)), STREAMED, PROMPT),
    "an event before a slow store": (sent_at(10.2, 11.0, Trouble("slow", 12.1, 20.0)), STREAMED, PROMPT),
    "an event while a disk is full": (sent_at(10.2, 11.0, Trouble("disk_full", 10.0, 20.0)), STREAMED, PROMPT),
    "a repeat of a running stream": (replayed(11.01, 12.0), STREAMED, set()),
    "a repeat that lags behind": (replayed(10.99, 12.0), STREAMED, PROMPT),
    "a repeat of a finished stream": (replayed(5.0, 11.29), STREAMED, set()),
    "a repeat that waits for nothing": (replayed(5.0, 11.31), STREAMED, PROMPT),
    "a first ping in time": (heard_at(16.4), STREAMED, set()),
    "a first ping too late": (heard_at(16.6), STREAMED, ALIVE),
    "a ping in time": (heard_at(11.0, 17.1), STREAMED, set()),
    "a ping too late": (heard_at(11.0, 17.3), STREAMED, ALIVE),
    "cut short after drain_s": (cut_short_at(31.1, Trouble("drained", 11.0, 32.0, 0)), STREAMED, set()),
    "cut short before drain_s": (cut_short_at(30.9, Trouble("drained", 11.0, 32.0, 0)), STREAMED, REASONS),
    "cut short by a second signal": (
        cut_short_at(20.0, Trouble("drained", 11.0, 32.0, 0), Trouble("drained", 19.9, 32.0, 0)),
        STREAMED,
        set(),
    ),
    "cut short before a second signal": (
        cut_short_at(20.0, Trouble("drained", 11.0, 32.0, 0), Trouble("drained", 20.1, 32.0, 0)),
        STREAMED,
        REASONS,
    ),
    "cut short by the end of another worker": (
        cut_short_at(31.1, Trouble("drained", 11.0, 32.0, 1)),
        STREAMED,
        REASONS,
    ),
    "cut short by a drain long ago": (cut_short_at(31.1, Trouble("drained", 1.0, 9.0, 0)), STREAMED, REASONS),
    "a repeat of a stalled stream at the first one's time-out": (stalled(10.1, 29.95, keyed=True), STREAMED, set()),
    "a repeat that ended before the first one's time-out": (stalled(10.1, 29.85, keyed=True), STREAMED, REASONS),
    "a repeat of what a killed worker ran": (repeated(Trouble("killed", 10.5, 30.0, 1)), STREAMED, set()),
    "a repeat of what another worker ran": (repeated(Trouble("killed", 10.5, 30.0, 2)), STREAMED, REASONS),
    "a repeat of what ran after a worker's death": (repeated(Trouble("killed", 9.9, 30.0, 1)), STREAMED, REASONS),
    "cut short as it came": (cut_short_at(11.0, Trouble("drained", -10.9, 20.0, 0)), STREAMED, set()),
    "cut short as it came much later": (cut_short_at(11.0, Trouble("drained", -11.1, 20.0, 0)), STREAMED, REASONS),
    "a silence after the head": (stalled(11.0, 31.3), STREAMED, set()),
    "a silence that ended too early": (stalled(11.0, 30.7), STREAMED, REASONS),
    "a silence that ended too late": (stalled(11.0, 31.5), STREAMED, DEADLINES),
    "a silence before the head": (stalled(0.0, 40.4, head=False), STREAMED, set()),
    "a silence before the head that ended too early": (stalled(0.0, 39.8, head=False), STREAMED, REASONS),
    "a silence before the head that ended too late": (stalled(0.0, 40.6, head=False), STREAMED, DEADLINES),
    "a silence that is told as a failure": (stalled(11.0, 31.3, code="upstream_error"), STREAMED, REASONS),
    "a whole answer's own deadline": (timed_out(0.5, head_at=0.2), Request("q0", timeout_s=0.5), set()),
    "a whole answer's deadline too early": (timed_out(0.48), Request("q0", timeout_s=0.5), REASONS),
    "a whole answer's deadline too late": (timed_out(0.91), Request("q0", timeout_s=0.5), DEADLINES),
    "a deadline of a stream without a head": (timed_out(0.5), Request("q0", stream=True, timeout_s=0.5), set()),
    "a deadline as a stream begins": (timed_out(0.5, head_at=0.41), Request("q0", stream=True, timeout_s=0.5), set()),
    "a deadline of a stream whose head doesn't say so": (
        timed_out(0.5, head_at=0.2, content_type=None),
        Request("q0", stream=True, timeout_s=0.5),
        set(),
    ),
    "a deadline of a stream that had begun": (
        timed_out(0.5, head_at=0.39),
        Request("q0", stream=True, timeout_s=0.5),
        REASONS,
    ),
    "a whole answer that broke where another asks to wait": (called(LIMIT, CUT, asked=("one", "two")), PAIR, set()),
    "a stream that broke there before its first event": (
        called(LIMIT, CUT, asked=("one", "two")),
        PAIR_STREAM,
        TOLD_ERRORS,
    ),
    "a failed whole answer isn't, of a key": (with_a_repeat(called(BROKE, asked=("one",))), PAIR, FAILOVER),
    "two attempts are told, of a key": (
        with_a_repeat(headed(x_mesh_attempts="2", x_mesh_routing_attempts="2")),
        REQUEST,
        TOLD,
    ),
    "an end that was held, of a key": (with_a_repeat(sent_at(11.0, 10.59)), STREAMED, PROMPT),
    "its own trace": (with_a_repeat(traced(trace_of("id-q0"))), REQUEST, set()),
    "another request's trace": (with_a_repeat(traced(trace_of("id-q7"))), REQUEST, CLEAN | BILLS),
    **{
        f"an attempt that failed, logged with {name} {wrong}": (
            failed_as(denied(BROKE, NO_KEY), **{name: wrong}),
            PAIR,
            WAITS | {"failures_are_logged"},
        )
        for name, wrong in {
            "upstream": "gone",
            "model": "plain",
            "status": 503,
            "attempt": 3,
            "request_id": "id-q7",
        }.items()
    },
    "attempts that failed, logged": (failed_as(denied(BROKE, NO_KEY)), PAIR, WAITS),
    "a line in the log": (logged({}), REQUEST, set()),
    "two lines in the log": (logged({}, {}), REQUEST, LOGGED),
    "no line in the log": (logged(), REQUEST, LOGGED),
    "no line of a killed worker's that ran on": (
        troubled(unlogged_until(12.5), Trouble("killed", 13.4, 20.0, 0)),
        REQUEST,
        set(),
    ),
    "no line of a killed worker's that had run on": (
        troubled(unlogged_until(12.3), Trouble("killed", 13.4, 20.0, 0)),
        REQUEST,
        LOGGED,
    ),
    "a line as long as the way": (logged({"duration_ms": 600.1}), REQUEST, set()),
    "a line that is too short": (logged({"duration_ms": 599.9}), REQUEST, LOGGED),
    "a short line of a worker that begins": (
        troubled(logged({"duration_ms": 1.0}), Trouble("killed", 5.0, 8.0, 0)),
        REQUEST,
        set(),
    ),
    "a short line of a worker that has begun": (
        troubled(logged({"duration_ms": 1.0}), Trouble("killed", 5.0, 7.9, 0)),
        REQUEST,
        LOGGED,
    ),
    "a line that is too long": (logged({"duration_ms": 1000.1}), REQUEST, LOGGED),
    **{
        f"a line with {name} {wrong}": (logged({name: wrong}), REQUEST, LOGGED)
        for name, wrong in {
            "account": "a1",
            "status": 502,
            "code": "upstream_error",
            "level": "warning",
            "stream": True,
            "model": "pair",
            "upstream": "two",
            "upstream_status": 500,
            "attempts": 2,
            "refused_by": "credit",
            "outcome": "failed",
            "cost_usd": "0.00014",
            "usage_source": "estimated",
            "prompt_tokens": 21,
            "completion_tokens": 7,
            "ttft_ms": 1.0,
        }.items()
    },
    "a line of a stream without its first event": (logged({"ttft_ms": None}), STREAMED, LOGGED),
    "another request's id": (headed(x_request_id="id-q7"), REQUEST, IDS),
    "an error event of another request": (misnamed(stalled(11.0, 31.3), within="id-q7"), STREAMED, IDS),
    "an error event in another request's name": (misnamed(stalled(11.0, 31.3), beside="id-q7"), STREAMED, IDS),
    "an error in another request's name": (misnamed(denied(BROKE), beside="id-q7"), REQUEST, WAITS | IDS),
    "a repeat that says so": (replayed_as(says=True, has_run=False), STREAMED, set()),
    "a repeat that doesn't say so": (replayed_as(says=False, has_run=False), STREAMED, IDS),
    "a repeat whose ping came first": (replayed_as(says=False, has_run=False, pinged=True), STREAMED, set()),
    "a repeat that has run and says that it hasn't": (replayed_as(says=True, has_run=True), STREAMED, IDS),
    "a refusal in its own words": (denied(LONG, status=400, **ITS), REQUEST, set()),
    "a refusal with another status": (denied(LONG, status=422, **ITS), REQUEST, REASONS | TOLD_ERRORS),
    "a refusal with another code": (denied(LONG, status=400, **ITS | {"code": "bad"}), REQUEST, TOLD_ERRORS),
    "a refusal with another param": (denied(LONG, status=400, **ITS | {"param": None}), REQUEST, TOLD_ERRORS),
    "a refusal in other words": (denied(LONG, status=400, **ITS | {"words": "No."}), REQUEST, TOLD_ERRORS),
    "a refusal without the provider's error": (
        denied(LONG, status=400, **ITS | {"provider_error": "text"}),
        REQUEST,
        TOLD_ERRORS,
    ),
    "a flagged request": (denied(FLAGGED, status=403, **ITS | NO_CODE), PAIR, set()),
    "a flagged request that is told as a failure": (denied(FLAGGED), REQUEST, TOLD_ERRORS),
    "a flagged request that goes to another provider": (
        denied(FLAGGED, FLAGGED, status=403, **ITS | NO_CODE),
        PAIR,
        FAILOVER,
    ),
    "a credit that is too low": (denied(TOO_POOR), REQUEST, set()),
    "a credit that is too low, told to the client": (
        denied(TOO_POOR, status=400, **ITS | NO_CODE),
        REQUEST,
        REASONS | TOLD_ERRORS,
    ),
    "a refusal without a code": (
        denied(LARGE, status=413, **ITS | {"code": "provider_refused", "provider_code": None}),
        REQUEST,
        set(),
    ),
    "a refusal that is told as a failure": (denied(LONG), REQUEST, TOLD_ERRORS),
    "the first of two refusals": (denied(LONG, LARGE, status=400, **ITS), PAIR_OF_MODELS, set()),
    "the second of two refusals": (
        denied(LONG, LARGE, status=413, by=1, **ITS | {"code": "provider_refused", "provider_code": None}),
        PAIR_OF_MODELS,
        TOLD_ERRORS,
    ),
    "a refusal of the gateway": (denied(NO_KEY, provider_code="its"), REQUEST, set()),
    "a refusal of the gateway without its code": (denied(NO_KEY), REQUEST, TOLD_ERRORS),
    "a refusal of the gateway in its own words": (
        denied(NO_KEY, provider_code="its", words="its"),
        REQUEST,
        TOLD_ERRORS,
    ),
    "a code that no provider gave": (denied(BROKE, provider_code="bad", words="its"), REQUEST, WAITS | TOLD_ERRORS),
    "a failure where another asks to wait": (
        denied(LIMIT, NO_KEY, by=1, provider_code="its"),
        PAIR,
        TOLD_ERRORS,
    ),
    "a deadline": (sent_at(11.0), Request("q0", timeout_s=0.61), set()),
    "a deadline that has passed": (sent_at(11.0), Request("q0", timeout_s=0.59), {"deadlines_hold"}),
    "closed as its worker was drained": (closed_at(10.0, Trouble("drained", 10.09, 20.0, 0)), REQUEST, set()),
    "closed though it had come before the drain": (closed_at(10.0, Trouble("drained", 10.11, 20.0, 0)), REQUEST, ENDS),
    "closed as another worker was drained": (closed_at(10.0, Trouble("drained", 10.0, 20.0, 1)), REQUEST, ENDS),
    "closed after a drain": (closed_at(10.0, Trouble("drained", 1.0, 9.9, 0)), REQUEST, ENDS),
    "closed on a slow client that was cut short": (slow(31.1), STREAMED, set()),
    "closed on a slow client before it was cut short": (slow(30.9), STREAMED, ENDS),
    "closed on a client that reads all": (slow(31.1, "all"), STREAMED, ENDS),
    "closed on a kept connection just after a drain": (
        kept(closed_at(10.0, Trouble("drained", 1.0, 9.91, 0))),
        REQUEST,
        set(),
    ),
    "closed on a kept connection after a drain": (
        kept(closed_at(10.0, Trouble("drained", 1.0, 9.89, 0))),
        REQUEST,
        ENDS,
    ),
    "closed on a kept connection just after a death": (
        kept(closed_at(10.0, Trouble("killed", 9.9, 9.91, 0))),
        REQUEST,
        set(),
    ),
    "closed on a kept connection after a death": (
        kept(closed_at(10.0, Trouble("killed", 9.8, 9.89, 0))),
        REQUEST,
        ENDS,
    ),
    "closed on a new connection just after a death": (closed_at(10.0, Trouble("killed", 9.9, 9.91, 0)), REQUEST, ENDS),
    "closed as its worker was killed": (closed_at(10.0, Trouble("killed", 10.5, 20.0, 0)), REQUEST, set()),
    "closed as another worker was killed": (closed_at(10.0, Trouble("killed", 10.5, 20.0, 1)), REQUEST, ENDS),
    "closed long before its worker was killed": (closed_at(10.0, Trouble("killed", 12.1, 20.0, 0)), REQUEST, ENDS),
    "another body behind a key": (conflicting(12.0, 409), REQUEST, set()),
    "another body behind a key is answered": (conflicting(10.21), REQUEST, {"conflicts_are_refused"}),
    "another body at the same time": (conflicting(10.19), REQUEST, set()),
    "another body after its worker's end": (conflicting(12.0, 200, Trouble("killed", 10.9, 20.0, 0)), REQUEST, set()),
    "a lost stream is asked for elsewhere": (called(LOST, BROKE, asked=("one", "two")), PAIR_STREAM, set()),
    "a lost stream isn't": (called(LOST, asked=("one",)), PAIR_STREAM, FAILOVER),
    "a lost whole answer is": (called(LOST, BROKE, asked=("one", "two")), PAIR, FAILOVER),
    "a lost whole answer isn't": (called(LOST, asked=("one",)), PAIR, set()),
    "a failed whole answer isn't": (called(BROKE, asked=("one",)), PAIR, FAILOVER),
    "a stream that broke while its head was held isn't": (
        called(CUT, asked=("one",), ended_after_s=1.7),
        PAIR_STREAM,
        FAILOVER,
    ),
    "a stream that broke as its head was sent": (called(CUT, asked=("one",), ended_after_s=1.9), PAIR_STREAM, set()),
    "a stream that broke later is": (
        called(CUT, BROKE, asked=("one", "two"), ended_after_s=2.3),
        PAIR_STREAM,
        FAILOVER,
    ),
    "a provider that is asked while its client is told": (asked_late(11.09), REQUEST, set()),
    "a provider that is asked later": (asked_late(11.11), REQUEST, TOLD),
    "no attempts are told": (headed(x_mesh_attempts="0", x_mesh_routing_attempts="0"), REQUEST, TOLD),
    "another provider was asked while the head was on its way": (early_headed(15.01), PAIR_STREAM, set()),
    "another provider was asked before the head": (early_headed(14.99), PAIR_STREAM, TOLD),
    "two attempts are told": (headed(x_mesh_attempts="2", x_mesh_routing_attempts="2"), REQUEST, TOLD),
    "an attempt that nothing listened to": (
        behind_a_dead_one,
        Request("q0", model="gone-first"),
        set(),
    ),
    "another model is told": (
        headed(x_mesh_model="pair", x_resolved_model_id="pair"),
        REQUEST,
        {"tokens_are_reported", *TOLD},
    ),
    "a fallback is told": (headed(x_mesh_routing_fallback="true", x_mesh_routing_model="plain"), REQUEST, TOLD),
    "another model by its other name": (headed(x_resolved_model_id="pair"), REQUEST, TOLD),
    "another number by its other name": (headed(x_mesh_routing_attempts="2"), REQUEST, TOLD),
    "a fallback's model where none was": (headed(x_mesh_routing_model="plain"), REQUEST, TOLD),
    "another version": (headed(x_mesh_version="2026-07"), REQUEST, TOLD),
    "a 503 with a wait": (refused(503, "ledger_unavailable", 1.0), REQUEST, REASONS),
    "a 503 without": (refused(503, "ledger_unavailable"), REQUEST, {*REASONS, *WAITS}),
    "a 402 with a wait": (refused(402, "insufficient_credits", 1.0), REQUEST, {*REASONS, *WAITS}),
    "a 503 that no provider saw says no": (
        refused(503, "ledger_unavailable", 1.0, **{"x-should-retry": "false"}),
        REQUEST,
        {*REASONS, *WAITS},
    ),
    "a wait for a request": (limited(50.0, requests_per_minute=1), REQUEST, set()),
    "a wait for a request that is too long": (limited(50.3, requests_per_minute=1), REQUEST, WAITS),
    "a wait for a share of the requests": (alone(limited(30.0, 2, requests_per_minute=4)), REQUEST, set()),
    "a wait for a share of one request": (alone(limited(30.0, 1, requests_per_minute=4)), REQUEST, REASONS),
    "a wait for a share that is too long": (alone(limited(30.2, 2, requests_per_minute=4)), REQUEST, WAITS),
    "a wait for a share of the tokens": (alone(limited(25.6, 1, tokens_per_minute=300)), REQUEST, set()),
    "a wait for that share that is too long": (alone(limited(25.8, 1, tokens_per_minute=300)), REQUEST, WAITS),
    "a wait for a share of the slots": (alone(limited(1.0, 1, max_parallel=3)), REQUEST, set()),
    "a wait for a share that is free": (alone(limited(1.0, 1, max_parallel=4)), REQUEST, REASONS),
    "a wait for a request of a burst": (limited(20.0, 3, requests_per_minute=3, burst=2), REQUEST, set()),
    "a wait for tokens": (limited(25.6, 3, tokens_per_minute=300), REQUEST, set()),
    "a wait for tokens that is too long": (limited(25.8, 3, tokens_per_minute=300), REQUEST, WAITS),
    "tokens that were kept": (tokens_left(), REQUEST, {"buckets_are_right"}),
    "tokens by a clock that jumps": (tokens_left(Trouble("clock", 12.9, 41.0)), REQUEST, set()),
    "a wait after an outage": (limited(55.0, 1, Trouble("gone", -70, -49.9), requests_per_minute=1), REQUEST, set()),
    "a wait that is too long after an outage": (
        limited(55.3, 1, Trouble("gone", -70, -49.9), requests_per_minute=1),
        REQUEST,
        WAITS,
    ),
    "a wait long after one": (limited(55.0, 1, Trouble("gone", -70, -50.1), requests_per_minute=1), REQUEST, WAITS),
    "a wait by a clock that had jumped": (
        limited(59.0, 1, Trouble("clock", 10.9, 40.0), requests_per_minute=1),
        REQUEST,
        set(),
    ),
    "a wait by a clock that jumps later": (
        limited(59.0, 1, Trouble("clock", 11.1, 40.0), requests_per_minute=1),
        REQUEST,
        WAITS,
    ),
    "a wait for tokens of a template": (
        limited(9.3, 9, tokens_per_minute=1000),
        Request("q0", template="greeting", manner="few"),
        set(),
    ),
    "a wait for tokens of no template": (
        limited(9.5, 9, tokens_per_minute=1000),
        Request("q0", template="greeting", manner="few"),
        WAITS,
    ),
    "a wait for a slot": (limited(1.0, max_parallel=1), REQUEST, set()),
    "a wait for a slot that is too long": (limited(1.2, max_parallel=1), REQUEST, WAITS),
    "a wait while another is settled": (waited(9.71), REQUEST, set()),
    "a wait in vain": (waited(9.69), REQUEST, {"waits_are_true"}),
    "a provider's wait": (handed_on(Answer(status=503, error="busy", wait_s=7.0), 7.0), REQUEST, set()),
    "a provider's wait that is lost": (handed_on(Answer(status=503, error="busy", wait_s=7.0), None), REQUEST, WAITS),
    "a provider's wait of more than a minute": (
        handed_on(Answer(status=429, error="limit", wait_s=90.0), 90.0, 503, "provider_not_available", says_no=True),
        REQUEST,
        set(),
    ),
    "a wait of more than a minute that SDKs obey": (
        handed_on(Answer(status=429, error="limit", wait_s=90.0), 90.0, 503, "provider_not_available"),
        REQUEST,
        WAITS,
    ),
    "a 429 without a wait": (
        handed_on(Answer(status=429, error="limit"), 1.0, 503, "provider_not_available"),
        REQUEST,
        set(),
    ),
    "a spent quota": (
        handed_on(Answer(status=429, error="quota", wait_s=7.0), 600.0, 503, "provider_not_available", says_no=True),
        REQUEST,
        set(),
    ),
    "a spent quota that is waited for too soon": (
        handed_on(Answer(status=429, error="quota", wait_s=7.0), 7.0, 503, "provider_not_available"),
        REQUEST,
        WAITS,
    ),
    "a failure that may be paid twice": (handed_on(BROKE, None), REQUEST, WAITS),
    "a failure that says so": (handed_on(BROKE, None, says_no=True), REQUEST, set()),
    "a revocation that is new": (told_off("revoke", 7.91), REQUEST, set()),
    "a revocation that holds": (told_off("revoke", 7.89), REQUEST, {"changes_hold"}),
    "a revocation that a failover lost": (told_off("revoke", 6.0, Trouble("failover", 7.09, 9.0)), REQUEST, set()),
    "a revocation before a failover": (
        told_off("revoke", 6.0, Trouble("failover", 7.11, 9.0)),
        REQUEST,
        {"changes_hold"},
    ),
    "a suspension that is new": (told_off("suspend", 7.91), REQUEST, set()),
    "a suspension that holds": (told_off("suspend", 7.89), REQUEST, {"changes_hold"}),
    "an edited template": (templated(7.89, 2), REQUEST, set()),
    "a template before its edit": (templated(7.91, 1), REQUEST, set()),
    "a template long before its edit": (templated(7.89, 1), REQUEST, {"templates_hold"}),
    "a template that isn't stored yet": (templated(10.3, 2), REQUEST, {"templates_hold"}),
    "a template while the store is lost": (templated(7.89, 1, Trouble("gone", 9.0, 10.0)), REQUEST, set()),
    "a template after the store was lost": (templated(7.89, 1, Trouble("gone", 8.0, 9.9)), REQUEST, {"templates_hold"}),
    "a provider that failed ten times": (failing(10, ended="left"), REQUEST, set()),
    "a provider that failed nine times": (failing(9), REQUEST, REASONS),
    "a breaker that may still be open": (failing(10, ended_at=2.3), REQUEST, set()),
    "a breaker that can't be": (failing(10, ended_at=2.1), REQUEST, REASONS),
    "a breaker's longest wait": (failing(10, wait_s=1.8), REQUEST, set()),
    "a wait that is longer": (failing(10, wait_s=2.0), REQUEST, BREAKERS),
    "a breaker's shortest wait": (failing(10, ended_at=9.0, wait_s=0.6), REQUEST, set()),
    "a wait that is shorter": (failing(10, ended_at=9.0, wait_s=0.4), REQUEST, BREAKERS),
    "a provider that failed ten times is asked": (failed_before(10, 9.0), REQUEST, BREAKERS),
    "a provider that failed nine times is asked": (failed_before(9, 9.0), REQUEST, set()),
    "a provider is asked that failed for clients that left": (failed_before(10, 9.0, ended="left"), REQUEST, set()),
    "a provider is asked when its breaker may let a probe through": (failed_before(10, 7.5), REQUEST, set()),
    "a store that isn't found yet": (unavailable(Trouble("gone", 5.0, 8.5 + RECOVERY_S)), REQUEST, set()),
    "a store that was found again": (unavailable(Trouble("gone", 5.0, 8.49 + RECOVERY_S)), REQUEST, REASONS),
    "a store that was slow": (unavailable(Trouble("slow", 5.0, 6.5 + RECOVERY_S)), REQUEST, set()),
    "a store that was slow before": (unavailable(Trouble("slow", 5.0, 6.49 + RECOVERY_S)), REQUEST, REASONS),
    "a store that is lost at the end": (unavailable(Trouble("gone", 11.0, 20.0)), REQUEST, set()),
    "a store that is lost later": (unavailable(Trouble("gone", 11.01, 20.0)), REQUEST, REASONS),
    "a store whose clock alone jumped": (unavailable(Trouble("clock", 5.0, 40.0)), REQUEST, REASONS),
    "a store without which nothing failed": (unavailable(Trouble("disk_full", 5.0, 20.0)), REQUEST, REASONS),
    "a repeat of what its worker left": (read_along(Trouble("killed", 10.9, 12.0, 0), began_at=30.8), REQUEST, set()),
    "a repeat that knows": (read_along(Trouble("killed", 10.9, 12.0, 0), began_at=31.0), REQUEST, REASONS),
    "a repeat whose first worker lives": (
        read_along(Trouble("killed", 10.9, 12.0, 1), began_at=12.0),
        REQUEST,
        {*REASONS, *BILLS, "what_runs_on_is_read"},
    ),
    "a secret of the provider": (echoed(PROVIDER_SECRET), REQUEST, {"bytes_are_ones_own"}),
    "eight characters of it": (echoed(PROVIDER_SECRET[:8]), REQUEST, {"bytes_are_ones_own"}),
    "seven characters of it": (echoed(PROVIDER_SECRET[:7]), REQUEST, set()),
    "a drained answer is left": (left_at("drained", 130.9), REQUEST, {"what_runs_on_is_read"}),
    "a drained answer is left before its client has": (left_at("drained", 10.9), REQUEST, set()),
    "a drained answer is left as its client has": (left_at("drained", 11.0), REQUEST, {"what_runs_on_is_read"}),
    "a drained answer is left in the end": (left_at("drained", 131.1), REQUEST, set()),
    "an answer is left with its client": (left_at("one", 11.9), REQUEST, set()),
    "an empty answer whose head had come": (left_at("one", 16.0, Answer(error="empty", delay_s=0.89)), REQUEST, set()),
    "an empty answer whose head hadn't": (
        left_at("one", 16.0, Answer(error="empty", delay_s=0.91)),
        REQUEST,
        {"hang_ups_are_noticed"},
    ),
    "an answer is left too late": (left_at("one", 12.1), REQUEST, {"hang_ups_are_noticed"}),
}


def test_the_store_is_back_when_the_last_of_its_outages_is_over():
    steps = (Fault(1.0, "gone", for_s=3.0), Fault(1.5, "failover", for_s=0.1))
    transcript = played(History(1, "felt", steps=steps)).outcome.transcript
    assert [line.split()[0][:1] for line in transcript if line.endswith("store: back")] == ["4"]


@pytest.mark.parametrize(
    ("step", "felt_s", "worker"),
    [
        (Fault(0.5, "gone", for_s=1.0), 6.0, None),
        (Fault(0.5, "disk_full", for_s=2.0), 7.0, None),
        (Fault(0.5, "clock", delay_s=-3.0), 23.0, None),
        (WorkerEvent(0.5, "killed", worker=3, for_s=2.0), 2.0, 1),
    ],
    ids=lambda value: getattr(value, "what", None),
)
def test_how_long_a_trouble_can_be_felt(step, felt_s, worker):
    """By what docs/simulation.md says: five seconds after a fault, and until a killed worker's successor runs."""
    (trouble,) = played(History(1, "felt", workers=2, steps=(step,))).record.troubles
    assert (round(trouble.end - trouble.start, 1), trouble.worker) == (felt_s, worker)


def test_a_kept_connection_has_the_worker_that_it_was_opened_to():
    requests = Request("q0", connection="c1"), Request("q1", at_s=1.0, connection="c1", worker=1)
    record = played(History(1, "kept", workers=2, steps=requests)).record
    assert [sight.worker for sight in record.sights] == [0, 0]


@pytest.mark.parametrize(("change", "request_", "broken"), SEEN.values(), ids=SEEN.keys())
def test_what_clients_see_is_judged_at_its_bounds(change, request_, broken):
    case = Case(request_)
    change(case)
    assert {finding.rule for finding in judge(case.record)} == broken


@pytest.mark.parametrize(
    ("remaining", "reset", "is_right"),
    [
        (599, "100ms", True),  # the store's, of 600 a minute
        (299, "200ms", True),  # a half
        (299, "199ms", True),  # it may be full by a part of a millisecond
        (299, "202ms", False),
        (298, "400ms", True),
        (298, "200ms", True),  # of 1 to 2 that are taken
        (298, "190ms", False),
        (300, "0s", True),
        (300, "100ms", False),
        (199, "300ms", False),  # a third
        (0, "1m0s", True),
        (0, "1m1s", False),
    ],
)
def test_a_worker_tells_its_share_of_a_limit_without_the_store(remaining, reset, is_right):
    case = Case()
    case.record.history = replace(case.record.history, local=True, workers=2)
    case.record.troubles = [Trouble("gone", 9.0, 60.0)]
    case.sight.headers |= {"x-ratelimit-remaining-requests": str(remaining), "x-ratelimit-reset-requests": reset}
    assert ("buckets_are_right" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("taken", "least", "most"),
    [
        pytest.param(Taken(0.0, 0.1, 100, 110, 600, 1.0), 9.0, 31.0, id="made right upwards"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 10, 1.0), 599.0, 600.0, id="made right downwards"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 600, 5.0), 509.0, 521.0, id="not yet made right"),
        pytest.param(Taken(1.9, 3.0, 100, 110, 600, 5.0), 490.0, 600.0, id="perhaps not yet admitted"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 600, 2.05), 9.0, 521.0, id="perhaps made right"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 10, 2.101), 509.0, 600.0, id="made right in the same moment"),
        pytest.param(Taken(0.0, 0.1, 100, 110, 10, 2.103), 509.0, 521.0, id="made right a moment later"),
        pytest.param(Taken(2.2, 3.0, 100, 110, 600, 5.0), 600.0, 600.0, id="later"),
    ],
)
def test_a_bucket_s_level_has_bounds(taken, least, most):
    bounds = level_at_least(BUCKET, [taken], 2.0, 2.1), level_at_most(BUCKET, [taken], 2.0, 2.1)
    assert bounds == pytest.approx((least, most), abs=0.11)


BUCKET = Bucket("tokens", 600, 600)
UNPAID = {"charges_are_bills", "costs_are_told"}
OVER = 20.0  # when the request of these tests is
OUTAGE = Trouble("gone", OVER - 0.5, 60.0)
FULL = Trouble("disk_full", OVER - 0.5, 31.0 + RECOVERY_S - 2 * LATENCY_S)  # whose disk has taken all at 31.0


def killed(at, worker=0):
    return Trouble("killed", at, at + 5, worker)


def failover(at, gone_s=0.05):
    return Trouble("failover", at, at + gone_s + RECOVERY_S)


@pytest.mark.parametrize(
    ("troubles", "broken"),
    [
        pytest.param([killed(10.0)], set(), id="killed as it began"),
        pytest.param([killed(9.99)], UNPAID, id="killed before it began"),
        pytest.param([killed(OVER + 1)], set(), id="killed as it was settled"),
        pytest.param([killed(OVER + 1.01)], UNPAID, id="killed after it was settled"),
        pytest.param([killed(OVER, worker=1)], UNPAID, id="another worker was killed"),
        pytest.param([killed(OVER + 5), OUTAGE], set(), id="killed while the store was awaited"),
        pytest.param([killed(OVER + 5.01), OUTAGE], UNPAID, id="killed when its journal had it"),
        pytest.param([killed(24.0), OUTAGE._replace(start=24.01)], UNPAID, id="killed before the store was lost"),
        pytest.param([killed(24.0), OUTAGE._replace(start=5.0, end=19.99)], UNPAID, id="killed after an outage"),
        pytest.param([killed(31.0), OUTAGE, FULL], set(), id="killed with a full disk"),
        pytest.param([killed(31.01), OUTAGE, FULL], UNPAID, id="killed when the disk had room"),
        pytest.param([killed(31.0), FULL], UNPAID, id="killed with a full disk that was not needed"),
        pytest.param([failover(OVER)], set(), id="failed over as it was over"),
        pytest.param([failover(OVER - 0.01)], UNPAID, id="failed over before it was over"),
        pytest.param([failover(OVER + 2)], set(), id="failed over a second after the settlement"),
        pytest.param([failover(OVER + 2.01)], UNPAID, id="failed over later"),
        pytest.param([failover(61.0), OUTAGE], set(), id="failed over after the journal was replayed"),
        pytest.param([failover(61.01), OUTAGE], UNPAID, id="failed over long after the journal was replayed"),
        pytest.param([failover(11.1), OUTAGE], set(), id="its hold was lost, and the reply to its settlement"),
        pytest.param([failover(11.11), OUTAGE], UNPAID, id="its hold was not lost"),
        pytest.param([failover(9.99), OUTAGE], UNPAID, id="an older hold was lost"),
        pytest.param([failover(11.1), Trouble("lost_reply", 15.0, OVER)], set(), id="its hold was lost, and a reply"),
        pytest.param([failover(11.1), Trouble("lost_reply", 15.0, OVER - 0.01)], UNPAID, id="a reply was lost before"),
        pytest.param([failover(11.1, gone_s=30.0)], UNPAID, id="its hold was lost, and the store was gone at its end"),
    ],
)
def test_a_charge_may_be_missing_only_where_it_was_lost(troubles, broken):
    case = Case()
    case.sight.ended_at = case.call.ended_at = OVER
    troubled(not_charged, *troubles)(case)
    assert {finding.rule for finding in judge(case.record)} - {"answers_are_prompt"} == broken


@pytest.mark.parametrize(
    ("stream", "at", "excused"), [(True, OVER + 15, True), (True, OVER + 15.01, False), (False, OVER + 15, False)]
)
def test_a_stream_without_its_client_may_wait_for_credit_before_it_is_settled(stream, at, excused):
    case = Case(Request("q0", keyed=True, stream=stream, reads="leaves"))
    case.sight.ended, case.sight.ended_at, case.call.ended_at = "left", 10.5, OVER
    troubled(not_charged, killed(at), OUTAGE)(case)
    assert ("charges_are_bills" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(("lost_until", "excused"), [(OVER, True), (OVER - 0.01, False)])
def test_a_charge_may_be_lost_when_its_provider_has_ended_and_its_client_reads_on(lost_until, excused):
    case = Case(Request("q0", stream=True, reads="stalls"))
    case.call.ended_at, case.sight.ended, case.sight.ended_at = OVER, "left", OVER + 50
    troubled(not_charged, failover(11.1), Trouble("lost_reply", 15.0, lost_until))(case)
    assert ("charges_are_bills" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(("reported", "excused"), [(True, True), (False, False)])
def test_a_client_that_left_behind_a_report_of_zeros_and_no_text_is_charged_nothing(reported, excused):
    case = Case(Request("q0", stream=True, reads="leaves"))
    gone_in_the_head(0)(case)
    case.sight.status, case.call.reported, case.call.is_true, case.call.bill = 200, reported, frozenset(), Bill()
    assert ("charges_are_bills" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(
    ("local", "lost_at", "broken"), [(True, OVER, set()), (False, OVER, OVERDRAWN), (True, 30.0, OVERDRAWN)]
)
def test_a_balance_may_have_been_below_zero_for_a_settlement_that_a_failover_lost(local, lost_at, broken):
    case = Case()
    case.sight.ended_at = case.call.ended_at = OVER
    case.record.history = replace(case.record.history, local=local)
    case.record.samples.append(Sample(OVER, 0, -COST, 0))
    troubled(not_charged, failover(lost_at))(case)
    assert {finding.rule for finding in judge(case.record)} & OVERDRAWN == broken


@pytest.mark.parametrize(("ended_at", "broken"), [(10.51, set()), (10.53, UNPAID)])
def test_a_settlement_that_was_sent_into_a_failover_may_be_missing_with_its_hold(ended_at, broken):
    case = Case()
    case.sight.ended_at = case.call.ended_at = ended_at
    troubled(not_charged, failover(10.42, gone_s=0.3))(case)
    assert {finding.rule for finding in judge(case.record)} - {"answers_are_prompt"} == broken


@pytest.mark.parametrize(
    ("complete", "end", "found"), [(True, "resets", False), (False, "no_done", False), (False, "resets", True)]
)
def test_a_repeat_gets_what_a_client_that_left_would_have_got(complete, end, found):
    case = Case()
    case.twice(headers=case.sight.headers | {"x-request-id": "id-q1", "idempotent-replayed": "true"})
    for sight in case.record.sights:
        sight.request = replace(sight.request, keyed=True)
    case.sight.ended, case.call.answer, case.call.complete = "left", Answer(end=end), complete
    assert ("repeats_agree" in {finding.rule for finding in judge(case.record)}) == found


def test_no_trouble_excuses_another_answer_to_a_repeat():
    case = Case()
    repeats_differ(case)
    case.record.troubles = [Trouble("gone", 9.0, 20.0)]
    assert "repeats_agree" in {finding.rule for finding in judge(case.record)}


def not_kept(case):
    """Let a repeat at 15.0 have been told that the answer to its first request, from 10.0 to 11.0, was not kept."""
    conflicting(15.0, 409)(case)
    case.record.sights[1].request = replace(REQUEST, name="q1", keyed=True)


@pytest.mark.parametrize(
    ("change", "rule", "at", "excused"),
    [
        (renewal_lowers, "renewals_raise", 10.19, False),
        (renewal_lowers, "renewals_raise", 10.2, True),
        (renewal_lowers, "renewals_raise", 10.5, True),
        (renewal_lowers, "renewals_raise", 10.51, False),
        (limit_passed, "limits_hold", 9.99, False),
        (limit_passed, "limits_hold", 10.0, True),
        (limit_passed, "limits_hold", 12.0, True),
        (limit_passed, "limits_hold", 12.01, False),
        (not_kept, "statuses_have_reasons", 4.8, False),
        (not_kept, "statuses_have_reasons", 13.0, True),
        (not_kept, "statuses_have_reasons", 13.01, False),
    ],
)
def test_a_failover_excuses_what_it_loses(change, rule, at, excused):
    case = Case()
    change(case)
    case.record.troubles = [Trouble("failover", at, at + 0.1)]
    assert (rule not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(("jumps_at", "found"), [(12.0, False), (12.01, True)])
def test_requests_before_the_clock_jumps_keep_to_their_limit(jumps_at, found):
    case = Case()
    limit_passed(case)
    case.record.troubles = [Trouble("clock", jumps_at, jumps_at + 20)]
    assert ("limits_hold" in {finding.rule for finding in judge(case.record)}) == found


@pytest.mark.parametrize(("at", "lost"), [(0.99, False), (1.0, True), (3.0, True), (3.01, False)])
def test_a_grant_may_be_missing_only_where_it_was_lost(at, lost):
    case = Case()
    case.record.books = {0: replace(book(settled()), granted=0)}
    case.record.troubles = [failover(at)]
    assert ("grants_count_once" in {finding.rule for finding in judge(case.record)}) != lost


@pytest.mark.parametrize(
    ("what", "start", "end", "excused"),
    [
        ("gone", 11.0, 12.0, True),
        ("gone", 11.01, 12.0, False),
        ("gone", 5.0, 10.0, True),
        ("gone", 5.0, 9.99, False),
        ("killed", 5.0, 9.9, True),  # with an admission on its way
        ("killed", 5.0, 9.89, False),
        ("clock", 50.0, 60.0, True),  # by which its time is no longer known
    ],
)
def test_a_hold_may_be_lost_only_in_its_time(what, start, end, excused):
    case = Case()
    case.record.books = {0: book(settled(hold="abandoned"))}
    case.record.troubles = [Trouble(what, start, end)]
    assert ("holds_are_kept" in {finding.rule for finding in judge(case.record)}) != excused


@pytest.mark.parametrize(
    ("start", "end", "excused"),
    [(9.5, 30.0, True), (9.51, 30.0, False), (4.0, 6.0 + RECOVERY_S, True), (4.0, 5.99 + RECOVERY_S, False)],
)
def test_a_balance_that_nobody_saw_may_be_told_only_after_a_failover(start, end, excused):
    case = Case()
    balance_told_wrong(case)
    case.record.samples.insert(0, Sample(7.0, 0, GRANTED, 0))
    case.record.troubles = [Trouble("failover", start, end)]
    assert ("accounts_are_told" in {finding.rule for finding in judge(case.record)}) != excused


@pytest.mark.parametrize(
    ("status", "limits", "other_nusd", "is_right"),
    [
        (504, {}, 0, False),
        (504, {"budget_nusd": COST + 162_000}, 0, True),
        (504, {"session_budget_nusd": COST + 162_000}, 0, True),
        (504, {"budget_nusd": GRANTED}, 0, False),
        (504, {"budget_nusd": GRANTED}, GRANTED - COST, True),
        (200, {"budget_nusd": COST}, 0, False),
    ],
)
def test_a_budget_may_end_an_answer_that_runs_on(status, limits, other_nusd, is_right):
    case = Case(Request("q0", keyed=True, timeout_s=0.5))
    case.key(**limits)
    case.sight.status, case.sight.payload = status, envelope(code="gateway_timeout") if status == 504 else WHOLE
    sources = [settled(usage_source="estimated")]
    if other_nusd:
        case.twice()
        case.record.sights[1].request, case.record.sights[1].marker = Request("q1"), "mk1q1z"
        sources.append(settled(hold_id="h2", request_id="id-q1", held_nusd=other_nusd))
    case.record.books = {0: book(*sources)}
    assert ("sources_are_told" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("status", "timeout_s", "attempts", "broken"),
    [
        (504, 0.5, 1, set()),
        (504, 0.5, 2, {"attempts_are_told"}),
        (504, None, 1, {"attempts_are_told", "waits_are_told"}),
        (502, 0.5, 1, {"attempts_are_told", "waits_are_told"}),
    ],
)
def test_a_deadline_may_pass_while_a_provider_is_connected_to(status, timeout_s, attempts, broken):
    case = Case(Request("q0", timeout_s=timeout_s))
    case.failed(status, code="gateway_timeout" if status == 504 else "upstream_error")
    case.sight.headers |= {"x-mesh-attempts": str(attempts), "x-mesh-routing-attempts": str(attempts)}
    case.record.calls = []
    found = {finding.rule for finding in judge(case.record)}
    assert found & {"attempts_are_told", "waits_are_told"} == broken


def local(number, cost, charged_at=60.0, worker="worker-00001", **fields):
    """A settlement of a whole answer that was admitted without the store, of a worker."""
    ids = {"hold_id": f"{worker}{number}", "request_id": f"id-q{number}"}
    return settled(hold="none", held_nusd=0, cost_nusd=cost, settled_ms=round(charged_at * 1000), **ids, **fields)


@pytest.mark.parametrize(
    ("events", "told", "is_right", "troubles"),
    [
        pytest.param([local(0, 3_000_000), local(1, 3_000_000)], [1], True, [], id="an allowance"),
        pytest.param([local(0, 3_000_000), local(1, 3_000_001)], [1], False, [], id="more than that"),
        pytest.param([local(0, 3_000_000), local(1, 1)], [2], False, [], id="more than a share"),
        pytest.param([local(0, 3_000_000), local(1, 1)], [1, 2], True, [], id="which is perhaps not read"),
        pytest.param([local(0, 3_000_000), local(1, 1)], [1, 2, 2], False, [], id="which is read"),
        pytest.param([local(0, 3_000_000), local(1, 1)], [2, 1], False, [], id="more, as a lower number is told once"),
        pytest.param(
            [local(0, 3_000_000), local(1, 1)], [2, 1, 1], True, [], id="more, as a lower number is told twice"
        ),
        pytest.param([local(0, 3_000_000), local(1, 1)], [], True, [], id="which was never asked for"),
        pytest.param(
            [local(0, 3_000_000), local(1, 3_000_000, worker="worker-00002")],
            [2],
            True,
            [],
            id="two shares of two workers",
        ),
        pytest.param(
            [local(0, 3_000_000, 20.0), local(1, 3_000_000, started_ms=20_001)],
            [2],
            True,
            [],
            id="a share, charged, and another",
        ),
        pytest.param(
            [local(0, 3_000_000, 20.0), local(1, 3_000_000, started_ms=19_999)],
            [2],
            False,
            [],
            id="another before it is charged",
        ),
        pytest.param(
            [local(0, 3_000_000), settled(cost_nusd=4_000_000, hold_id="h2", request_id="id-q1")],
            [2],
            True,
            [],
            id="a hold",
        ),
        pytest.param(
            [local(0, 3_000_000), local(1, 3_000_000)],
            [2],
            True,
            [Trouble("failover", 10.2, 30.0)],
            id="holds that were lost",
        ),
        pytest.param(
            [local(0, 3_000_000), local(1, 3_000_000)],
            [2],
            False,
            [Trouble("failover", 11.2, 30.0)],
            id="holds that weren't",
        ),
    ],
)
def test_a_worker_spends_its_share_of_the_allowance_without_the_store(events, told, is_right, troubles):
    case = Case()
    case.twice()
    case.record.sights[1].marker, other = "mk1q1z", replace(case.call, marker="mk1q1z")
    case.record.calls.append(other)
    case.record.history = replace(case.record.history, local=True, workers=2)
    case.record.troubles = [Trouble("gone", 9.0, 60.0), *troubles]
    case.record.beats = [
        Beat(1.0 + at, worker, count) for at, count in enumerate(told) for worker in ("worker-00001", "worker-00002")
    ]
    case.record.books = {0: book(*events)}
    assert ("credit_is_not_overdrawn" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(("lost", "is_right"), [(0, False), (1, False), (2, True)])
def test_a_lost_reply_has_one_request_admitted_without_the_store(lost, is_right):
    """And no whole allowance: three of 5,000,000 and one at each of the workers exceed one allowance."""
    case = Case()
    case.record.history = replace(case.record.history, local=True)
    costs = [local(number, 5_000_000, charged_at=11.0, worker=f"worker-{number:05}") for number in range(4)]
    case.record.books = {0: book(*costs, granted=0, balance=-20_000_000)}
    case.record.troubles = [Trouble("lost_reply", 9.0 + at, 15.0) for at in range(lost)]
    assert ("credit_is_not_overdrawn" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("settled_at", "fields", "is_right"),
    [
        pytest.param(41.0, {}, True, id="30 s later"),
        pytest.param(40.99, {}, False, id="before"),
        pytest.param(40.99, {"outcome": "upstream_failed"}, True, id="before, by its provider"),
        pytest.param(44.0, {}, True, id="when it is looked at"),
        pytest.param(44.01, {}, False, id="too late"),
        pytest.param(44.01, {"outcome": "completed"}, False, id="too late, as it is complete"),
        pytest.param(44.01, {"size": 65_000}, True, id="with all under way to it"),
        pytest.param(44.01, {"timeout_s": 10.0}, True, id="with an answer that goes on without it"),
        pytest.param(54.0, {"keyed": True}, True, id="when the rest has run on"),
        pytest.param(54.01, {"keyed": True}, False, id="after the rest has run on"),
        pytest.param(44.01, {"trouble": Trouble("slow", 44.9, 60.0)}, True, id="while the store is slow"),
        pytest.param(44.01, {"trouble": Trouble("slow", 45.1, 60.0)}, False, id="before the store is slow"),
    ],
)
def test_a_client_that_takes_nothing_is_given_up_in_time(settled_at, fields, is_right):
    """By what its provider had sent at 11.5, of which the way to it takes 64 KiB."""
    keyed, timeout_s = fields.get("keyed", False), fields.get("timeout_s")
    case = Case(Request("q0", stream=True, reads="stalls", keyed=keyed, timeout_s=timeout_s))
    case.sight.ended, case.sight.ended_at = "left", 101.0
    case.call.lines, case.call.lines_at = ["-" * fields.get("size", 66_000)], [11.5]
    case.call.answer = Answer(gap_s=10.0)
    outcome = fields.get("outcome", "client_disconnected")
    case.record.books = {0: book(settled(settled_ms=round(settled_at * 1000), outcome=outcome))}
    case.record.troubles = [fields["trouble"]] if "trouble" in fields else []
    assert ("holds_are_kept" not in {finding.rule for finding in judge(case.record)}) == is_right


STALLS = Request("q0", reads="stalls")
SIGNAL = 10.5  # when an instance is told to end whose request ends at 11.0


@pytest.mark.parametrize(
    ("ended_at", "request_", "others", "is_right"),
    [
        pytest.param(11.5, REQUEST, [], True, id="when its request is over"),
        pytest.param(11.51, REQUEST, [], False, id="later"),
        pytest.param(11.51, REQUEST, [Drain(1, 11.2, 11.5)], False, id="later, as another was told"),
        pytest.param(SIGNAL + 20 + 4.5, STALLS, [], True, id="after drain_s"),
        pytest.param(SIGNAL + 20 + 4.51, STALLS, [], False, id="long after drain_s"),
        pytest.param(12.0 + 4.5, STALLS, [Drain(0, 12.0, 16.5)], True, id="after a second signal"),
        pytest.param(12.0 + 4.51, STALLS, [Drain(0, 12.0, 16.51)], False, id="long after a second signal"),
        pytest.param(11.5 + 30, REQUEST, [Trouble("gone", 11.0, 60.0)], True, id="without the store"),
        pytest.param(11.51 + 30, REQUEST, [Trouble("gone", 11.0, 60.0)], False, id="long after that"),
        pytest.param(11.51, REQUEST, [Trouble("gone", 1.0, 10.4)], False, id="when the store is back"),
        pytest.param(11.51, REQUEST, [Trouble("killed", 11.0, 60.0, 1)], False, id="when another was killed"),
    ],
)
def test_an_instance_ends_in_time(ended_at, request_, others, is_right):
    case = Case(request_)
    case.record.history = replace(case.record.history, workers=2)
    case.record.drains = [Drain(0, SIGNAL, ended_at), *(each for each in others if isinstance(each, Drain))]
    case.record.troubles = [each for each in others if isinstance(each, Trouble)]
    assert ("drains_end" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(
    ("left_at", "signals", "answer", "is_right"),
    [
        (SIGNAL - 0.1, [SIGNAL], GOOD, True),
        (SIGNAL, [SIGNAL], GOOD, False),
        (SIGNAL, [SIGNAL], Answer(gap_s=20.01), True),  # for its silence
        (SIGNAL + 19.89, [SIGNAL], GOOD, False),
        (SIGNAL + 19.91, [SIGNAL], GOOD, True),
        (14.89, [SIGNAL, 15.0], GOOD, False),
        (14.91, [SIGNAL, 15.0], GOOD, True),
    ],
)
def test_what_runs_on_is_waited_for_by_an_instance_that_ends(left_at, signals, answer, is_right):
    case = Case(replace(REQUEST, keyed=True, reads="leaves"), answer=answer)
    case.sight.ended, case.sight.ended_at, case.call.ended, case.call.ended_at = "left", 10.2, "closed", left_at
    case.record.drains = [Drain(0, signal, max(left_at, *signals) + 0.2) for signal in signals]
    assert ("drains_end" not in {finding.rule for finding in judge(case.record)}) == is_right


@pytest.mark.parametrize(("complete", "charge", "broken"), [(True, 0, True), (True, COST, False), (False, 0, False)])
def test_a_request_that_runs_on_past_its_deadline_is_charged(complete, charge, broken):
    case = Case(Request("q0", keyed=True, timeout_s=0.5))
    case.sight.status, case.sight.payload = 504, envelope(code="gateway_timeout")
    case.call.complete = complete
    case.record.books = {0: book(settled(cost_nusd=charge))}
    assert ("charges_are_bills" in {finding.rule for finding in judge(case.record)}) == broken
