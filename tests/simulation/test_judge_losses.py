"""The judge of what a trouble loses, and excuses.

Both sides of each bound: rows are a change of the good record, its request, and the rules that it breaks.
"""

import math

import pytest
from msgspec.structs import replace

from simulation.client import trace_of
from simulation.history import Answer, Fault, History, Request, WorkerEvent, rendered
from simulation.provider import Bill
from simulation.record import LATENCY_S, RECOVERY_S, Done, Loss, Sample, Trouble
from simulation.story import played
from tests.simulation.judged import (
    BILLS,
    COST,
    GRANTED,
    LINE,
    OVERDRAWN,
    REASONS,
    REQUEST,
    STREAMED,
    WHOLE,
    Case,
    balance_told_wrong,
    book,
    broken_by,
    conflicting,
    envelope,
    judge,
    limit_passed,
    not_charged,
    refused,
    renewal_lowers,
    repeats_differ,
    settled,
    troubled,
)


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


def unavailable(*troubles):
    """Let the request have got 503 since the store was lost."""

    def change(case):
        refused(503, "ledger_unavailable", 1.0)(case)
        case.record.troubles = list(troubles)

    return change


def ended_unavailable(*troubles):
    """Let a stream have ended at 30.0 since it had to wait for the store."""

    def change(case):
        error = envelope(code="ledger_unavailable").decode()
        case.sight.payload = f"data: {LINE}\n\ndata: {error}\n\n".encode()
        case.sight.ended_at = 30.0
        case.record.troubles = list(troubles)

    return change


def served_before(ended_at, change=unavailable, worker=0, *more):
    """Let a key that a worker of two served until a time have got 503 from the first one, in local mode."""

    def changed(case):
        change(Trouble("gone", 9.5, 40.0))(case)
        case.twice(began_at=5.0, sent_at=5.0, ended_at=ended_at, worker=worker)
        case.record.troubles += more
        case.record.history = replace(case.record.history, workers=2, local=True)

    return changed


def keyed_before(case):
    served_before(9.0)(case)
    case.sight.request = replace(case.sight.request, keyed=True)


def short_journal_before(case):
    served_before(9.0)(case)
    case.record.history = replace(case.record.history, journal_bytes=4_000)


def strict_before(case):
    served_before(9.0)(case)
    case.record.history = replace(case.record.history, local=False)


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


EXCUSES = {
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
    "an account's suspension that is new": (told_off("suspend_account", 7.91), REQUEST, set()),
    "an account's suspension that holds": (told_off("suspend_account", 7.89), REQUEST, {"changes_hold"}),
    "a key just before it expires": (told_off("expire", 10.0), REQUEST, set()),
    "a key just after it has expired": (told_off("expire", 9.99), REQUEST, {"changes_hold"}),
    "an edited template": (templated(7.89, 2), REQUEST, set()),
    "a template before its edit": (templated(7.91, 1), REQUEST, set()),
    "a template long before its edit": (templated(7.89, 1), REQUEST, {"templates_hold"}),
    "a template that isn't stored yet": (templated(10.3, 2), REQUEST, {"templates_hold"}),
    "a template while the store is lost": (templated(7.89, 1, Trouble("gone", 9.0, 10.0)), REQUEST, set()),
    "a template after the store was lost": (templated(7.89, 1, Trouble("gone", 8.0, 9.9)), REQUEST, {"templates_hold"}),
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
}


@pytest.mark.parametrize(
    ("change", "is_right"),
    [
        pytest.param(ended_unavailable(Trouble("gone", 20.1, 60.0)), True, id="ten seconds"),
        pytest.param(ended_unavailable(Trouble("gone", 20.11, 60.0)), False, id="less"),
        pytest.param(ended_unavailable(Trouble("gone", 15.0, 32.49), Trouble("gone", 15.0, 60.0)), True, id="twice"),
        pytest.param(
            ended_unavailable(Trouble("gone", 10.0, 17.49 + RECOVERY_S), Trouble("gone", 25.0, 60.0)),
            False,
            id="with the store in between",
        ),
    ],
)
def test_a_stream_waits_for_the_store_for_ten_seconds(change, is_right):
    assert ("statuses_have_reasons" not in broken_by(change, STREAMED)) == is_right


@pytest.mark.parametrize(
    ("change", "is_right"),
    [
        pytest.param(served_before(9.0), False, id="a key that the worker knows"),
        pytest.param(served_before(10.0), True, id="a key that it served only then"),
        pytest.param(served_before(9.0, worker=1), True, id="a key that another worker knows"),
        pytest.param(served_before(9.0, unavailable, 0, Trouble("killed", 9.2, 9.3, 0)), True, id="a new worker"),
        pytest.param(
            served_before(9.0, unavailable, 0, Trouble("killed", 9.2, 9.3, 1)), False, id="another new worker"
        ),
        pytest.param(served_before(9.0, unavailable, 0, Trouble("disk_full", 9.2, 9.3)), True, id="a full disk"),
        pytest.param(keyed_before, True, id="an Idempotency-Key"),
        pytest.param(short_journal_before, True, id="a journal without room"),
        pytest.param(strict_before, True, id="a key in strict mode"),
    ],
)
def test_a_key_that_its_worker_knows_goes_on_without_the_store(change, is_right):
    assert ("statuses_have_reasons" not in broken_by(change, REQUEST)) == is_right


@pytest.mark.parametrize(("change", "request_", "broken"), EXCUSES.values(), ids=EXCUSES.keys())
def test_excuses_are_judged_at_their_bounds(change, request_, broken):
    assert broken_by(change, request_) == broken


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


@pytest.mark.parametrize(
    ("local", "heeds_cap", "lost_at", "broken"),
    [
        (True, True, OVER, set()),
        (False, True, OVER, OVERDRAWN),
        (False, False, OVER, set()),
        (True, True, 30.0, OVERDRAWN),
        (False, False, 30.0, OVERDRAWN),
    ],
)
def test_a_balance_may_have_been_below_zero_for_a_settlement_that_a_failover_lost(local, heeds_cap, lost_at, broken):
    case = Case(answer=Answer(heeds_cap=heeds_cap))
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


@pytest.mark.parametrize(
    ("kept_bytes", "excused"), [(len(WHOLE) + 999, True), (len(WHOLE) + 1_000, False), (None, False)]
)
def test_a_repeat_may_be_refused_an_answer_that_is_too_large(kept_bytes, excused):
    case = Case()
    not_kept(case)
    case.record.history = replace(case.record.history, kept_bytes=kept_bytes)
    assert ("statuses_have_reasons" not in {finding.rule for finding in judge(case.record)}) == excused


@pytest.mark.parametrize(("kept_bytes", "found"), [(None, False), (len(WHOLE), False), (len(WHOLE) - 1, True)])
def test_a_repeat_may_not_get_an_answer_that_is_too_large(kept_bytes, found):
    case = Case()
    case.twice(headers=case.sight.headers | {"x-request-id": "id-q1", "idempotent-replayed": "true"})
    for sight in case.record.sights:
        sight.request = replace(sight.request, keyed=True)
    case.call.headers = {"traceparent": trace_of("id-q0")}
    case.record.history = replace(case.record.history, kept_bytes=kept_bytes)
    assert ("repeats_agree" in {finding.rule for finding in judge(case.record)}) == found


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


GONE = Trouble("gone", 10.5, 20.0)


@pytest.mark.parametrize(
    ("settled_at", "troubles", "reads", "is_right"),
    [
        pytest.param(12.0, [], "all", True, id="when it is over"),
        pytest.param(12.01, [], "all", False, id="later"),
        pytest.param(12.01, [Trouble("gone", 1.0, 10.9)], "all", False, id="later, and the store was there again"),
        pytest.param(21.0, [GONE], "all", True, id="when the store is there again"),
        pytest.param(21.01, [GONE], "all", False, id="after the store is there again"),
        pytest.param(31.0, [GONE, Trouble("slow", 21.0, 30.0)], "all", True, id="when it isn't slow any more"),
        pytest.param(31.0, [GONE, Trouble("slow", 21.01, 30.0)], "all", False, id="after it could be before"),
        pytest.param(16.0, [Trouble("killed", 11.5, 15.0, 0)], "all", True, id="by its worker's successor"),
        pytest.param(16.0, [Trouble("killed", 11.5, 15.0, 1)], "all", False, id="while another was started"),
        pytest.param(99.0, [Trouble("clock", 11.5, 15.0)], "all", True, id="by another clock"),
        pytest.param(60.0, [], "slowly", True, id="when its client has taken all"),
    ],
)
def test_a_request_is_settled_when_it_is_over(settled_at, troubles, reads, is_right):
    case = Case(replace(REQUEST, reads=reads))
    case.record.history = replace(case.record.history, workers=2)
    case.record.troubles = troubles
    case.record.books = {0: book(settled(settled_ms=round(settled_at * 1000)))}
    assert ("settlements_come" not in {finding.rule for finding in judge(case.record)}) == is_right
