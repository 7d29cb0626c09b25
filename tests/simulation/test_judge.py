"""The judge: a record of one good exchange breaks no rule, and each change of it that breaks a promise is found."""

import json

import pytest
from msgspec.structs import replace

from simulation.history import Request, rendered
from simulation.judge import RULES
from simulation.planted import PLANTED, ROOT
from simulation.provider import Bill
from simulation.record import Done, Drain, Finding, Loss, Sample, Told, Trouble
from tests.simulation.judged import (
    COST,
    GRANTED,
    LINE,
    MARKER,
    REQUEST,
    STREAM,
    STREAMED,
    WHOLE,
    Case,
    balance_told_wrong,
    book,
    broken_by,
    envelope,
    failed_before,
    false_wait,
    judge,
    limit_passed,
    not_charged,
    renewal_lowers,
    repeats_differ,
    settled,
    tokens_kept,
    told_of,
)
from tests.simulation.test_judge_attempts import ATTEMPTS
from tests.simulation.test_judge_clients import SEEN
from tests.simulation.test_judge_log import LOG


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


def budget_left(case):
    case.record.books = {0: book(settled(), budgeted={"key:k1": 1})}


def hour_lost(case):
    case.record.books = {0: book(settled(), sums={("hour:1970-01-01T00", "key_0", "plain", "", "requests"): 1})}


def granted_twice(case):
    case.record.books = {0: replace(book(settled()), granted=2 * GRANTED, balance=2 * GRANTED - COST)}


def settled_twice(case):
    case.record.books = {0: book(settled(), settled())}


def key_charged_twice(case):
    case.sight.request = replace(case.sight.request, keyed=True)
    case.twice()


def overcharged(case):
    case.record.books = {0: book(settled(cost_nusd=COST + 1))}


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


def other_type(case):
    case.failed(502, type="invalid_request_error")


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


def header_sent(case):
    case.call.headers = {"x-request-id": "id-q0"}


def key_leaked(case):
    case.call.headers = {"authorization": "Bearer rsk_x"}


def own_field_sent(case):
    case.call.body["session_id"] = "s"


def two_caps(case):
    case.call.body["max_completion_tokens"] = 5


def cap_lost(case):
    del case.call.body["max_tokens"]


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


def too_late(case):
    case.sight.ended_at = 20.0


def overdrawn(case):
    case.record.samples = [Sample(9.0, 0, 10, 20)]


def beyond_the_hold(case):
    case.record.books = {0: book(settled(held_nusd=1))}


def budget_passed(case):
    case.key(budget_nusd=100)


def threshold_untold(case):
    case.key(budget_nusd=COST)


def let_through(case):
    case.record.books = {0: book(settled())}


def session_moved(case):
    case.call.body["model"] = "up-shared"
    case.twice(request=replace(case.sight.request, name="q1"), marker="mk1q1z")
    case.record.calls.append(replace(case.call, marker="mk1q1z", upstream="two"))


def another_address(case):
    case.call.place = "new"


def hold_too_large(case):
    case.record.books = {0: book(settled(held_nusd=4_100_000))}


def hold_abandoned(case):
    case.record.books = {0: book(settled(hold="abandoned"))}


def not_failed_over(case):
    case.failed(502)
    case.sight.request = replace(case.sight.request, model="pair")
    case.call.body["model"] = "up-pair"


def asked_in_spite_of_failures(case):
    failed_before(10, 9.0)(case)


def revoked_and_served(case):
    case.record.changes.append(Done("revoke", 1.0, 2.0, 0, 0))


def model_not_allowed(case):
    case.key(models=("pair",))


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


def budget_told_wrong(case):
    look = case.record.looks[0]
    case.record.key_ids, case.record.books = ["key_0"], {0: book(settled(key="key_0"))}
    case.record.looks = [look._replace(told=told_of(case.record, look, budgets={"total_usd": "1.00"}))]


def event_told_wrong(case):
    case.record.told = {0: Told([], [{"key": "key_0", "model": "plain", "session_id": None}])}


def usage_told_wrong(case):
    case.record.told = {0: Told([], [])}


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


def settled_late(case):
    case.record.books = {0: book(settled(settled_ms=13_000))}


def read_in_spite_of_its_client(case):
    case.sight.payload, case.call.sent_bytes = b"", 400_000


def second_asked_first(case):
    case.serve("pair")
    case.call.upstream, case.call.body["model"] = "two", "up-pair"


def left_behind(case):
    case.record.left = ["tasks: gateway-0: settle"]


def broke(case):
    case.record.errors = ["gateway-0: task_failed"]


BREAKS = [
    (unbalanced, "books_balance"),
    (hold_left, "books_balance"),
    (budget_left, "books_balance"),
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
    (other_type, "ends_are_honest"),
    (other_request_id, "ids_are_told"),
    (other_waits, "ends_are_honest"),
    (answer_lost, "answers_are_not_lost"),
    (other_bytes, "answers_are_not_lost"),
    (event_dropped, "answers_are_not_lost", STREAMED),
    (usage_unasked, "answers_are_not_lost", STREAMED),
    (crossed, "bytes_are_ones_own"),
    (key_leaked, "bytes_are_ones_own"),
    (own_field_sent, "requests_are_clean"),
    (header_sent, "requests_are_clean"),
    (two_caps, "requests_are_clean"),
    (cap_lost, "requests_are_clean", Request("q0", max_tokens=9)),
    (silent_stream, "streams_are_alive", STREAMED),
    (false_402, "statuses_have_reasons"),
    (false_429, "statuses_have_reasons"),
    (false_503, "statuses_have_reasons"),
    (false_504, "statuses_have_reasons"),
    (internal_error, "statuses_have_reasons"),
    (let_through, "invalid_requests_are_refused", Request("q0", invalid="no messages")),
    (false_wait, "waits_are_true"),
    (too_late, "deadlines_hold", Request("q0", timeout_s=2.0)),
    (limit_passed, "limits_hold"),
    (overdrawn, "credit_is_not_overdrawn"),
    (beyond_the_hold, "credit_is_not_overdrawn"),
    (budget_passed, "budgets_hold"),
    (threshold_untold, "thresholds_are_told"),
    (hold_too_large, "holds_are_needed"),
    (hold_abandoned, "holds_are_kept"),
    (renewal_lowers, "renewals_raise"),
    (tokens_kept, "buckets_are_right"),
    (not_failed_over, "failover_happens"),
    (asked_in_spite_of_failures, "breakers_hold"),
    (settled_late, "settlements_come"),
    (read_in_spite_of_its_client, "streams_wait", Request("q0", stream=True, reads="stalls")),
    (another_address, "upstreams_are_right"),
    (session_moved, "sessions_stay", Request("q0", model="shared", session="s1")),
    (second_asked_first, "ejections_hold", Request("q0", model="pair")),
    (repeats_differ, "repeats_agree"),
    (revoked_and_served, "changes_hold"),
    (model_not_allowed, "requests_are_clean"),
    (tier_unpriced, "requests_are_clean"),
    (billed_in_another_tier, "charges_are_bills"),
    (billed_below_its_tier, "charges_are_bills"),
    (old_template, "templates_hold"),
    (slot_unfilled, "templates_hold"),
    (template_left_out, "templates_hold"),
    (balance_told_wrong, "accounts_are_told"),
    (budget_told_wrong, "keys_are_told"),
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
    assert rule in broken_by(change, request_)


def test_each_rule_has_such_a_case():
    found = {rule for _, rule, *_ in BREAKS}.union(*(broken for *_, broken in (SEEN | ATTEMPTS | LOG).values()))
    assert {rule.__name__ for rule in RULES} == found


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_each_planted_fault_has_one_place(planted):
    assert (ROOT / "meshproxy" / planted.path).read_text().count(planted.old) == 1


def test_a_finding_names_the_request():
    case = Case()
    overcharged(case)
    found = Finding("charges_are_bills", "id-q0 was charged 130001, and 130000 would be right")
    assert found in judge(case.record)
