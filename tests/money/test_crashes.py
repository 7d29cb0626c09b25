"""SIGKILL, of a worker and of everything, in the middle of hundreds of streams; Redis away while requests end. Whatever was
known is charged once, whatever was lost is named, and nothing stays held.
"""

import asyncio
import os
import time
from functools import partial

import pytest

from tests.harness.clients import Answer
from tests.harness.process import free_port
from tests.harness.waiting import until
from tests.money.conftest import (
    HOLD_TTL_S,
    INPUT_NUSD,
    OUTPUT_NUSD,
    PROMPT_ESTIMATE,
    Client,
    figure,
    full_only,
    scaled,
)

STREAMS = scaled(100, 200)
TOKENS = 60
MODELS = {"slow": ("sim", f"sim/plain?tokens={TOKENS}&tps=25"), "brisk": ("sim", "sim/plain?tokens=40&tps=40")}
WHOLE_NUSD = 6 * INPUT_NUSD + TOKENS * OUTPUT_NUSD
LOCAL = {"timeout_s": 0.5, "on_failure": "local"}
LATE_S = 1.0  # what reading the balance may be late, on a busy machine


@pytest.fixture
def proxy(start_proxy):
    return start_proxy(models=MODELS)


def held_at_first(lease):
    return PROMPT_ESTIMATE * INPUT_NUSD + lease * OUTPUT_NUSD


async def in_flight(proxy, books, client, account, streams):
    """Begin streams and wait until each has its hold and some of its tokens."""
    answers = [Answer() for _ in range(streams)]
    running = [asyncio.create_task(client.chat(model="slow", stream=True, into=answer)) for answer in answers]
    await books.until(account, lambda now: now.held_nusd >= streams * held_at_first(16))
    await until(lambda: all(len(answer.times) > 2 for answer in answers), "tokens of each")
    return running


async def released_within(books, account):
    """Seconds until nothing is held, and the balance then."""
    began = time.monotonic()
    balance = await books.until(account, lambda now: now.held_nusd == 0, timeout_s=10 * HOLD_TTL_S)
    return time.monotonic() - began, balance


async def test_sigkill_of_one_worker_in_the_middle_of_streams(proxy, books, session):
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    running = await in_flight(proxy, books, client, caller.account, STREAMS)
    killed = proxy.kill_worker()
    outcomes = await asyncio.gather(*running)
    whole = [outcome for outcome in outcomes if outcome.is_whole]
    waited_s, balance = await released_within(books, caller.account)
    await books.closed(caller.account)
    settled = {event["hold_id"]: event for event in await books.events(caller.account, "settled")}
    abandoned = {event["hold_id"]: event for event in await books.events(caller.account, "abandoned")}
    assert len(whole) == len(settled)
    assert len(settled) + len(abandoned) == STREAMS
    assert 0 < len(abandoned) < STREAMS
    assert settled.keys() & abandoned.keys() == set()
    assert len(whole) * WHOLE_NUSD == balance.settled_nusd
    assert waited_s <= HOLD_TTL_S + LATE_S
    assert killed not in proxy.pids()
    again = await client.chat()
    assert again.is_whole
    figure("SIGKILL of a worker", streams=STREAMS, abandoned=len(abandoned), waited_s=round(waited_s, 2), leaked=0)


async def test_sigkill_of_the_whole_proxy_in_the_middle_of_streams(proxy, books, session):
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    running = await in_flight(proxy, books, client, caller.account, STREAMS)
    await asyncio.to_thread(proxy.kill)
    outcomes = await asyncio.gather(*running)
    assert [outcome for outcome in outcomes if outcome.is_whole] == []
    waited_s, balance = await released_within(books, caller.account)
    await books.closed(caller.account)
    abandoned = [event["hold_id"] for event in await books.events(caller.account, "abandoned")]
    settled = [event["hold_id"] for event in await books.events(caller.account, "settled")]
    assert STREAMS == len(set(abandoned)) == len(abandoned)
    assert (balance.settled_nusd, settled) == (0, [])
    assert waited_s <= HOLD_TTL_S + LATE_S
    await asyncio.to_thread(proxy.start)
    assert (await client.chat()).is_whole
    await books.until(caller.account, lambda now: now.settled_nusd > 0)
    await books.closed(caller.account)
    figure("SIGKILL of all", streams=STREAMS, abandoned=len(abandoned), waited_s=round(waited_s, 2), leaked=0)


@full_only
async def test_a_proxy_that_lives_keeps_its_holds_past_their_deadline(proxy, books, session):
    """Streams of a little more than the time to live."""
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    outcomes = await asyncio.gather(*(client.chat(model="slow", stream=True) for _ in range(STREAMS // 2)))
    assert all(outcome.is_whole for outcome in outcomes)
    balance = await books.closed(caller.account)
    assert await books.events(caller.account, "abandoned") == []
    assert balance.settled_nusd == STREAMS // 2 * WHOLE_NUSD


async def each_answered(proxy):
    """Redis holds credit a moment before the gateway hears of it."""
    await until(lambda: proxy.metric("meshproxy_upstream_requests_total") >= STREAMS, "the provider's answers")


async def away(valkey, how):
    if how == "frozen":
        valkey.freeze()
    else:
        valkey.kill()


async def back(valkey, how):
    if how == "frozen":
        valkey.thaw()
    else:
        await asyncio.to_thread(valkey.start)


@pytest.mark.parametrize("how", [pytest.param("frozen", marks=full_only), "killed"])
async def test_settlements_while_redis_is_away_are_charged_once_when_it_is_back(
    start_proxy, books, session, valkey, how
):
    proxy = start_proxy(models=MODELS, redis={"timeout_s": 0.5}, credits={"lease_output_tokens": 64})
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    running = [asyncio.create_task(client.chat(model="brisk", stream=True)) for _ in range(STREAMS)]
    await books.until(caller.account, lambda now: now.held_nusd >= STREAMS * held_at_first(64))
    await each_answered(proxy)
    await away(valkey, how)
    outcomes = await asyncio.gather(*running)
    assert [outcome.is_done for outcome in outcomes] == [True] * STREAMS
    await until(lambda: proxy.journaled() >= STREAMS, "each on disk")
    refused = await client.chat()
    assert (refused.status, refused.code) == (503, "ledger_unavailable")
    await back(valkey, how)
    cost = STREAMS * (6 * INPUT_NUSD + 40 * OUTPUT_NUSD)
    await books.until(caller.account, lambda now: now.settled_nusd >= cost)
    balance = await books.closed(caller.account)
    assert balance.settled_nusd == cost
    settled = await books.events(caller.account, "settled")
    assert len({event["hold_id"] for event in settled}) == STREAMS
    await until(lambda: not proxy.journaled(), "an empty journal")
    figure("Redis away", how=how, settlements=STREAMS, journaled=STREAMS, lost=0, charged_twice=0)


async def test_the_proxy_killed_while_redis_is_away_replays_at_its_next_start(start_proxy, books, session, valkey):
    proxy = start_proxy(models=MODELS, redis={"timeout_s": 0.5}, credits={"lease_output_tokens": 64})
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    running = [asyncio.create_task(client.chat(model="brisk", stream=True)) for _ in range(STREAMS)]
    await books.until(caller.account, lambda now: now.held_nusd >= STREAMS * held_at_first(64))
    await each_answered(proxy)
    valkey.kill()
    await asyncio.gather(*running)
    await until(lambda: proxy.journaled() >= STREAMS, "each on disk")
    await asyncio.to_thread(proxy.kill)
    await asyncio.to_thread(partial(proxy.start, degraded=True))  # Redis is still away: it starts all the same
    refused = await client.chat()
    assert (refused.status, refused.code) == (503, "ledger_unavailable")
    await asyncio.to_thread(valkey.start)
    cost = STREAMS * (6 * INPUT_NUSD + 40 * OUTPUT_NUSD)
    await books.until(caller.account, lambda now: now.settled_nusd >= cost)
    balance = await books.closed(caller.account)
    assert balance.settled_nusd == cost
    assert len(await books.events(caller.account, "settled")) == STREAMS
    assert (await client.chat()).is_whole
    figure("proxy killed while Redis is away", settlements=STREAMS, lost=0, charged_twice=0)


@full_only
async def test_a_drain_settles_everything_and_ends_well(proxy, books, session):
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    running = await in_flight(proxy, books, client, caller.account, STREAMS // 2)
    code = await asyncio.to_thread(proxy.stop)
    outcomes = await asyncio.gather(*running)
    assert code == 0
    assert all(outcome.is_whole for outcome in outcomes)
    balance = await books.ledger.balance(caller.account)
    assert (balance.held_nusd, balance.settled_nusd) == (0, STREAMS // 2 * WHOLE_NUSD)


async def test_admission_without_redis_is_charged_once_when_it_is_back(start_proxy, books, session, valkey):
    """redis.on_failure = "local": an allowance of one dollar an account, shared by the workers."""
    proxy = start_proxy(models=MODELS, redis=LOCAL)
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    known = await asyncio.gather(*(client.chat() for _ in range(20)))  # every worker knows the key now
    assert all(outcome.is_whole for outcome in known)
    valkey.kill()
    outcomes = await asyncio.gather(*(client.chat(max_tokens=8, stream=number % 2 == 0) for number in range(STREAMS)))
    served = [outcome for outcome in outcomes if outcome.is_whole]
    assert {outcome.status for outcome in outcomes} - {402, 503} == {200}
    assert len(served) > STREAMS // 2
    await asyncio.to_thread(valkey.start)
    cost = (20 + len(served)) * (6 * INPUT_NUSD + 8 * OUTPUT_NUSD)
    await books.until(caller.account, lambda now: now.settled_nusd >= cost)
    balance = await books.closed(caller.account)
    assert balance.settled_nusd == cost
    settled = await books.events(caller.account, "settled")
    assert len(served) == len([event for event in settled if event["hold"] == "none"])
    figure("admitted without Redis", requests=len(served), lost=0, charged_twice=0)


async def test_a_redis_that_refuses_writes_costs_no_more_than_the_allowance(start_proxy, books, session, valkey):
    """It lives and denies another account for its credit: that is no sign that it takes charges again."""
    allowance_nusd = 2_000_000
    proxy = start_proxy(models=MODELS, redis={**LOCAL, "local_allowance_usd": "0.002"})
    rich = await books.key("acme")
    poor = await books.key("poor", credit="0.000000001")
    spender, denied = Client(session, proxy, rich), Client(session, proxy, poor)
    assert (await spender.chat()).is_whole
    before = (await books.closed(rich.account)).settled_nusd
    assert valkey.request("CONFIG", "SET", "maxmemory", "1") == b"+OK"
    statuses = [(await client.chat(max_tokens=8)).status for _ in range(60) for client in (spender, denied)]
    assert valkey.request("CONFIG", "SET", "maxmemory", "0") == b"+OK"
    served = statuses.count(200)
    request_nusd = 6 * INPUT_NUSD + 8 * OUTPUT_NUSD
    assert 0 < served * request_nusd <= allowance_nusd + request_nusd
    await books.until(rich.account, lambda now: now.settled_nusd == before + served * request_nusd)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_full_disk_at_the_end_loses_nothing_in_silence(start_proxy, books, session, valkey, tmp_path, workers):
    """What neither Redis nor the disk takes is logged whole, and the exit code tells of it. One worker's disk is full."""
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "settlements.0").symlink_to("/dev/full")
    proxy = start_proxy(models=MODELS, server={"workers": workers}, redis={"timeout_s": 0.5})
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    running = [asyncio.create_task(client.chat(stream=True, model="brisk")) for _ in range(20)]
    await books.until(caller.account, lambda now: now.held_nusd >= 20 * held_at_first(16))
    valkey.kill()
    await asyncio.gather(*running)
    assert await asyncio.to_thread(proxy.stop) == os.EX_IOERR
    lost = [line["settlement"] for line in proxy.logged("settlement_lost")]
    assert {(caller.key.id, "acme")} == {(settlement["key_id"], settlement["account"]) for settlement in lost}
    assert len(lost) + proxy.journaled() == 20


async def test_a_journal_is_found_by_another_spelling_of_the_url(
    start_proxy, session, valkey, books, tmp_path, monkeypatch
):
    """What another spelling of the same Redis is owed is settled; what another Redis is owed is named."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    proxy = start_proxy(models=MODELS, server={"workers": 1}, redis={"timeout_s": 0.5})
    config = proxy.config.read_text()

    def restart(url, *, degraded=False):
        lines = [line for line in config.splitlines() if not line.startswith("journal = ")]
        proxy.stop()
        proxy.config.write_text("\n".join(lines).replace(valkey.url, url))
        proxy.start(degraded=degraded)

    restart(f"redis://127.0.0.1:{valkey.port}")
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    running = asyncio.create_task(client.chat(stream=True, model="brisk"))
    await books.until(caller.account, lambda now: now.held_nusd > 0)
    valkey.kill()
    await running
    await asyncio.to_thread(partial(restart, f"redis://localhost:{free_port()}/0", degraded=True))
    await until(lambda: proxy.logged("journal_of_another_redis"), "the line")
    await asyncio.to_thread(valkey.start)
    await asyncio.to_thread(restart, f"redis://LOCALHOST:{valkey.port}/0")
    await books.until(caller.account, lambda now: now.settled_nusd > 0)


async def test_a_full_journal_denies(start_proxy, books, session, valkey):
    """Nothing is admitted whose settlement might not be kept: what was served is charged."""
    proxy = start_proxy(
        models=MODELS, server={"workers": 1}, redis={"timeout_s": 0.5, "on_failure": "local", "journal_max_bytes": 5000}
    )
    caller = await books.key("acme")
    client = Client(session, proxy, caller)
    assert (await client.chat()).is_whole
    before = (await books.closed(caller.account)).settled_nusd
    valkey.kill()
    outcomes = [await client.chat(max_tokens=8) for _ in range(12)]
    served = sum(outcome.is_whole for outcome in outcomes)
    assert 0 < served < 12
    assert {outcome.code for outcome in outcomes if not outcome.is_whole} == {"ledger_unavailable"}
    await asyncio.to_thread(valkey.start)
    cost = served * (6 * INPUT_NUSD + 8 * OUTPUT_NUSD)
    assert (
        before + cost == (await books.until(caller.account, lambda now: now.settled_nusd >= before + cost)).settled_nusd
    )
    assert not proxy.logged("settlement_lost")
