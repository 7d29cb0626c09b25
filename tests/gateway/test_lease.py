import pytest

from meshproxy.gateway.admit import Lease, Renewer
from meshproxy.ledger.records import Denial, Hold
from meshproxy.ledger.store import Unavailable
from meshproxy.telemetry.tasks import Tasks
from tests.gateway.parts import Renewals, ask, lease, plan
from tests.harness.waiting import turns

PROMPT_NUSD = 18 * 2_500
TOKEN_NUSD = 10_000
GONE = Denial("gone", "hold", 0)


@pytest.fixture
def ledger():
    return Renewals()


async def test_half_a_slice_before_the_end_the_next_is_asked_for(ledger):
    held = lease(ledger)
    assert not held.record_output(50)
    await turns()
    assert ledger.asked == []
    assert not held.record_output(51)
    await turns()
    assert ledger.asked == [PROMPT_NUSD + 151 * TOKEN_NUSD]


async def test_one_renewal_at_a_time(ledger):
    held = lease(ledger)
    for tokens in (60, 70, 80):
        held.record_output(tokens)
    await turns()
    assert len(ledger.asked) == 1


async def test_a_renewal_covers_more(ledger):
    held = lease(ledger)
    heard = []
    held.watch(heard.append)
    held.record_output(60)
    await turns()
    await ledger.answer()
    assert (held.covered, heard) == (160, [None])
    assert ledger.asked[-1] == held.hold.amount_nusd


async def test_what_is_past_the_hold_is_exhausted_until_it_is_renewed(ledger):
    held = lease(ledger)
    assert held.record_output(101)
    assert held.exhausted
    await turns()
    await ledger.answer()
    assert not held.exhausted


async def test_what_came_during_a_renewal_is_renewed_again(ledger):
    held = lease(ledger)
    held.record_output(60)
    await turns()
    held.record_output(400)
    await ledger.answer()
    assert held.exhausted
    assert ledger.asked == [PROMPT_NUSD + 160 * TOKEN_NUSD, PROMPT_NUSD + 500 * TOKEN_NUSD]
    await ledger.answer()
    assert not held.exhausted


async def test_no_more_is_held_than_there_can_be(ledger):
    held = lease(ledger, plan(output_cap=50, output_limit=120))
    held.record_output(60)
    await turns()
    await ledger.answer()
    assert ledger.asked == [PROMPT_NUSD + 120 * TOKEN_NUSD]
    assert not held.record_output(500)
    await turns()
    assert len(ledger.asked) == 1


async def test_where_all_is_covered_nothing_is_asked_for(ledger):
    held = lease(ledger, plan(output_cap=100, output_limit=100))
    assert not held.record_output(1000)
    await turns()
    assert ledger.asked == []


@pytest.mark.parametrize(
    "denied",
    [
        Denial("insufficient_credits", "credit", 5),
        Denial("spend_limit", "key daily budget", 5),
        Denial("rate_limit", "key tokens", 5, 1.0),
    ],
)
async def test_a_refusal_is_told(ledger, denied):
    held = lease(ledger)
    heard = []
    held.watch(heard.append)
    held.record_output(60)
    await turns()
    await ledger.answer(denied)
    assert [denied] == heard
    assert held.covered == 100


@pytest.mark.parametrize(("holds_whole", "tokens"), [(True, 1), (False, 18 + 100)])
async def test_what_is_held_whole_reserves_no_more_tokens_when_it_is_kept(ledger, holds_whole, tokens):
    keeping = Tasks().spawn("keep", lease(ledger, plan(holds_whole=holds_whole)).renew_deadline())
    await turns()
    await ledger.answer()
    await keeping
    assert ledger.tokens == [tokens]


async def test_a_hold_that_is_gone_is_admitted_anew(ledger):
    held = lease(ledger)
    heard = []
    held.watch(heard.append)
    held.record_output(60)
    await turns()
    await ledger.answer(GONE)
    assert (held.unheld, held.covered, heard) == (True, 100, [])
    await ledger.answer()
    assert (held.unheld, held.covered, heard) == (False, 160, [None])
    (asked,) = ledger.anew
    assert (asked.hold_id, asked.amount_nusd, asked.amount_min_nusd) == ("h", PROMPT_NUSD + 160 * TOKEN_NUSD, None)


async def test_a_hold_that_is_gone_and_refused_anew_is_settled_without_one(ledger):
    held = lease(ledger)
    heard = []
    held.watch(heard.append)
    held.record_output(60)
    await turns()
    await ledger.answer(GONE)
    denied = Denial("insufficient_credits", "credit", 5)
    await ledger.answer(denied)
    assert (held.unheld, held.covered, heard) == (True, 100, [denied])


async def test_no_hold_is_admitted_for_a_request_that_is_over(ledger):
    held = lease(ledger)
    held.record_output(60)
    await turns()
    held.end()
    await ledger.answer(GONE)
    assert (held.unheld, ledger.anew) == (True, [])


async def test_a_hold_that_is_gone_is_noticed_when_it_is_kept_alive(ledger):
    held = lease(ledger)
    heard = []
    held.watch(heard.append)
    task = Tasks().spawn("keep", held.renew_deadline())
    await turns()
    await ledger.answer(GONE)
    denied = Denial("insufficient_credits", "credit", 5)
    await ledger.answer(denied)
    await task
    assert [denied] == heard


async def test_without_a_ledger_it_is_asked_again(ledger, monkeypatch):
    monkeypatch.setattr("meshproxy.gateway.admit.RENEW_RETRY_S", 0)
    held = lease(ledger)
    held.record_output(60)
    await turns()
    await ledger.answer(Unavailable("timeout", "no reply"))
    assert len(ledger.asked) == 2
    await ledger.answer()
    assert held.covered == 160


@pytest.mark.parametrize(("is_over", "slices"), [(False, 1), (True, 0)])
async def test_without_a_ledger_the_local_allowance_pays_for_what_runs(ledger, is_over, slices):
    class Local:
        taken = 0

        def hold_more(self, account, amount_nusd):
            self.taken += amount_nusd
            return True

    local = Local()
    renewer = Renewer(ledger, local, Tasks(), enforce_tokens=False)
    held = Lease(Hold(ask(), 1, 0, ()), plan(), 100, 100, renewer, is_local=False)
    held.record_output(60)
    await turns()
    if is_over:
        held.end()
    await ledger.answer(Unavailable("timeout", "no reply"))
    assert (local.taken, held.covered) == (slices * 60 * TOKEN_NUSD, 160)
    assert len(ledger.asked) == 1


async def test_nobody_hears_of_a_request_that_is_over(ledger):
    held = lease(ledger)
    heard = []
    held.watch(heard.append)
    held.record_output(60)
    await turns()
    held.end()
    held.record_output(400)
    await ledger.answer()
    assert (heard, len(ledger.asked)) == ([], 1)


async def test_keeping_a_hold_asks_for_no_more(ledger):
    held = lease(ledger)
    keeping = held.renew_deadline()
    task = Tasks().spawn("keep", keeping)
    await turns()
    await ledger.answer()
    await task
    assert ledger.asked == [1]
