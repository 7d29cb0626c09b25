"""How far hundreds of streams can overdraw one account: by a slice each, however fast and lumpy they are."""

import asyncio

import pytest

from tests.money.conftest import INPUT_NUSD, OUTPUT_NUSD, PROMPT_ESTIMATE, Client, figure, scaled

LEASE = 16
TOKENS = 400
SLICE_NUSD = LEASE * OUTPUT_NUSD
HELD_AT_FIRST_NUSD = PROMPT_ESTIMATE * INPUT_NUSD + SLICE_NUSD
PACES = {
    "fast": f"sim/fast?tokens={TOKENS}",
    "paced": f"sim/plain?tokens={TOKENS}&tps=150",
    "burst": f"sim/burst?tokens={TOKENS}",
    "telling": f"sim/fast+usage-every?tokens={TOKENS}",
    "silent": f"sim/burst+no-usage?tokens={TOKENS}",
}


@pytest.fixture(scope="module")
def running(shared):
    return shared(
        credits={"lease_output_tokens": LEASE}, models={pace: ("sim", model) for pace, model in PACES.items()}
    )


@pytest.fixture
def valkey(running):
    return running[0]


@pytest.fixture
def proxy(running):
    return running[1]


async def test_streams_of_an_account_that_runs_out(proxy, books, session):
    for pace in PACES:
        await run_out(Client, proxy, books, session, pace, scaled(100, 500))


async def run_out(client_of, proxy, books, session, pace, streams):
    caller = await books.key(f"acme-{pace}", credit="0")
    await books.ledger.grant(
        caller.account, streams * HELD_AT_FIRST_NUSD * 5 // 4
    )  # every stream may begin, few can end
    client = client_of(session, proxy, caller)
    outcomes = await asyncio.gather(*(client.chat(model=pace, stream=True) for _ in range(streams)))
    balance = await books.closed(caller.account)
    settled = await books.events(caller.account, "settled")
    overdraft, bound = max(0, -balance.balance_nusd), streams * SLICE_NUSD
    past_hold = [int(event["cost_nusd"]) - int(event["held_nusd"]) for event in settled]
    cut = [outcome for outcome in outcomes if outcome.status == 200 and not outcome.is_done]
    figure(
        "overdraft", pace=pace, streams=streams, cut=len(cut), overdraft_nusd=overdraft, bound_nusd=bound,
        worst_stream_nusd=max(past_hold), slice_nusd=SLICE_NUSD,
    )  # fmt: skip

    assert overdraft <= bound
    assert max(past_hold) <= SLICE_NUSD
    assert {outcome.status for outcome in outcomes} - {402} == {200}
    assert {outcome.code for outcome in cut} == {"insufficient_credits"}
    assert all(outcome.is_whole for outcome in outcomes if outcome.is_done)
    assert len(settled) == sum(outcome.status == 200 for outcome in outcomes)
    assert len(cut) == [event["outcome"] for event in settled].count("insufficient_credits")
    delivered = max(outcome.body.count(b'"delta":{"content"') for outcome in cut)
    charged = max(int(event["completion_tokens"]) for event in settled)
    assert delivered <= 1.1 * charged, pace  # text without a report is estimated: two events may be one token


async def test_streams_of_an_account_that_can_pay_are_whole_however_lumpy(proxy, books, session):
    """Credit is asked for behind their back, and what comes faster than the answers waits for them."""
    caller = await books.key("rich")
    client = Client(session, proxy, caller)
    paces = [pace for pace in PACES if pace != "paced"] * scaled(10, 50)
    outcomes = await asyncio.gather(*(client.chat(model=pace, stream=True) for pace in paces))
    assert [True] * len(paces) == [outcome.is_done for outcome in outcomes]
    await books.closed(caller.account)
    settled = await books.events(caller.account, "settled")
    past_hold = max(int(event["cost_nusd"]) - int(event["held_nusd"]) for event in settled)
    assert past_hold <= SLICE_NUSD
