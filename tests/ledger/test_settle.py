"""Settlement: charged once, whatever became of the hold; tokens put right; one event; the hour's aggregates."""

import pytest

from meshproxy.ledger.connection import Unavailable
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import Hold
from meshproxy.openai.usage import Usage
from meshproxy.policy.principal import Budgets, Limits


async def test_the_real_cost_is_charged_and_the_hold_released(ledger, ask, settlement, read, keys, store):
    await ledger.grant("acme", 250)
    await ledger.admit(ask())
    assert await ledger.settle(settlement()) is True
    assert await read.hash(keys.credit) == {"balance": "190", "granted": "250", "held": "0", "settled": "60"}
    assert (await read.hash(keys.holds), await store.execute("ZCARD", keys.deadlines)) == ({}, 0)


async def test_a_second_settlement_writes_nothing(ledger, ask, settlement, store, snapshot):
    await ledger.grant("acme", 250)
    await ledger.admit(ask())
    await ledger.settle(settlement())
    before = await snapshot(store)
    assert await ledger.settle(settlement(cost_nusd=99)) is False
    assert await snapshot(store) == before


async def test_what_was_never_admitted_is_not_charged(ledger, settlement, store, snapshot):
    assert await ledger.settle(settlement()) is False
    assert await snapshot(store) == {}


async def test_a_cost_above_the_hold_may_overdraw(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 100)
    await ledger.admit(ask())
    assert await ledger.settle(settlement(cost_nusd=130)) is True
    assert await read.hash(keys.credit) == {"balance": "-30", "granted": "100", "held": "0", "settled": "130"}


async def test_a_negative_cost_is_refused(ledger, settlement):
    with pytest.raises(ValueError, match="gift"):
        await ledger.settle(settlement(cost_nusd=-1))


async def test_what_never_started_costs_nothing_and_gives_its_tokens_back(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 100)
    await ledger.admit(ask(key_limits=Limits(requests_per_minute=1, tokens_per_minute=60)))
    nothing = settlement(usage=Usage(), usage_source="none", outcome="upstream_failed", cost_nusd=0)
    assert await ledger.settle(nothing) is True
    assert await read.hash(keys.credit) == {"balance": "100", "granted": "100", "held": "0"}
    assert await read.level(keys.key_bucket("k1"), "tokens") == 60
    assert await read.level(keys.key_bucket("k1"), "requests") == 0  # the request's place stays taken
    assert list(await read.hash(keys.key_spend("k1"))) == ["used_ms"]
    assert (await read.events(keys.usage))[-1]["outcome"] == "upstream_failed"


async def test_unused_tokens_come_back_and_used_ones_are_taken(store, ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 1000)
    limits = {"key_limits": Limits(tokens_per_minute=60), "account_limits": Limits(tokens_per_minute=1000)}
    await ledger.admit(ask("h1", **limits))
    await ledger.settle(settlement("h1"))
    assert 53 <= await read.level(keys.key_bucket("k1"), "tokens") < 54
    assert await read.level(keys.bucket, "tokens") >= 993
    await ledger.admit(ask("h2", **limits))
    await ledger.settle(settlement("h2", usage=Usage(100, 200)))
    assert -247 <= await read.level(keys.key_bucket("k1"), "tokens") < -246  # a debt
    assert 246_000 < await store.execute("PTTL", keys.key_bucket("k1")) <= 247_000 + 60_000


async def test_a_bucket_is_never_filled_above_its_size(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask(key_limits=Limits(tokens_per_minute=60)))
    await read.age(keys.key_bucket("k1"), 3_600_000)
    await ledger.settle(settlement(usage=Usage(1)))
    assert await read.level(keys.key_bucket("k1"), "tokens") == 60


async def test_a_bucket_that_went_while_idle_is_a_full_one(ledger, ask, settlement, read, store, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask(key_limits=Limits(tokens_per_minute=60)))
    await store.execute("DEL", keys.key_bucket("k1"))
    await ledger.settle(settlement(usage=Usage(30)))
    assert await read.level(keys.key_bucket("k1"), "tokens") == 40
    assert await store.execute("PTTL", keys.key_bucket("k1")) > 0


async def test_without_a_limit_there_is_no_bucket(ledger, ask, settlement, snapshot, store):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask())
    await ledger.settle(settlement())
    assert sorted(await snapshot(store)) == [
        "mesh:accounts", "mesh:{acme}:credit", "mesh:{acme}:grants", "mesh:{acme}:hour:2025-11-24T16",
        "mesh:{acme}:hours", "mesh:{acme}:month:2025-11",
        "mesh:{acme}:requests:2025-11-24", "mesh:{acme}:spend", "mesh:{acme}:spend:k1", "mesh:{acme}:usage",
    ]  # fmt: skip


async def test_the_event_tells_it_all(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask(session="s1"))
    usage = Usage(
        prompt=9,
        completion=8,
        cached=7,
        cache_write=2,
        reasoning=5,
        audio_prompt=1,
        audio_completion=2,
        cache_write_1h=1,
    )
    await ledger.settle(settlement(usage=usage, session="s1", price='{"input":1}', attempts=2))
    event = (await read.events(keys.usage))[-1]
    assert int(event.pop("settled_ms")) > 1_764_000_000_000
    assert event == {
        "event": "settled", "hold_id": "h1", "request_id": "req-h1", "key": "k1", "account": "acme", "session": "s1",
        "model": "openai/gpt-4o", "upstream": "openai", "prompt_tokens": "9", "completion_tokens": "8",
        "cached_tokens": "7", "cache_write_tokens": "2", "cache_write_1h_tokens": "1",
        "reasoning_tokens": "5", "audio_prompt_tokens": "1",
        "audio_completion_tokens": "2", "cost_nusd": "60", "held_nusd": "100", "usage_source": "reported",
        "outcome": "completed", "hold": "live", "price": '{"input":1}', "started_ms": "1764000000000",
        "attempts": "2", "waived_nusd": "0", "v": "1",
    }  # fmt: skip


async def test_the_hour_adds_up(ledger, ask, settlement, read, store, keys):
    await ledger.grant("acme", 1000)
    for hold_id, session in (("h1", "s1"), ("h2", "s1"), ("h3", None)):
        await ledger.admit(ask(hold_id, session=session))
        await ledger.settle(settlement(hold_id, session=session, usage=Usage(3, 4, cached=1)))
    hour = keys.hour("2025-11-24T16")
    s1, none = "k1\x1fopenai/gpt-4o\x1fs1\x1f", "k1\x1fopenai/gpt-4o\x1f\x1f"
    assert await read.hash(hour) == {
        f"{s1}requests": "2", f"{s1}prompt": "6", f"{s1}completion": "8", f"{s1}cached": "2", f"{s1}cost": "120",
        f"{none}requests": "1", f"{none}prompt": "3", f"{none}completion": "4", f"{none}cached": "1", f"{none}cost": "60",
    }  # fmt: skip
    assert 89 * 86_400 < await store.execute("TTL", hour) <= 90 * 86_400


async def test_an_hour_of_too_many_sessions_folds_the_rest(ledger, ask, settlement, read, store, keys):
    await ledger.grant("acme", 1000)
    hour = keys.hour("2025-11-24T16")
    fill = "for i = 1, 50000 do redis.call('HSET', KEYS[1], i, 1) end"
    await store.execute("EVAL", fill, 1, hour)
    await ledger.admit(ask(session="one too many"))
    await ledger.settle(settlement(session="one too many"))
    assert (await read.hash(hour))["k1\x1fopenai/gpt-4o\x1f~\x1frequests"] == "1"


async def test_the_key_s_spend_is_kept_by_day_and_month(ledger, ask, settlement, read, store, keys):
    await ledger.grant("acme", 1000)
    spend = keys.key_spend("k1")
    await store.execute("HSET", spend, "total", 5, "day:2020-01-31", 3, "day:2020-01-30", 2, "month:2020-01", 5)
    for hold_id in ("h1", "h2"):
        await ledger.admit(ask(hold_id))
        await ledger.settle(settlement(hold_id))
    fields = await read.hash(spend)
    assert int(fields.pop("used_ms")) > 1_764_000_000_000
    today = next(name for name in fields if name.startswith("day:"))
    assert fields == {"total": "125", today: "120", f"month:{today[4:11]}": "120", "month:2020-01": "5"}


async def test_a_session_s_spend_is_kept_where_it_has_a_budget(ledger, ask, settlement, read, store, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", session="plain"))
    await ledger.settle(settlement("h1", session="plain"))
    await ledger.admit(ask("h2", session="budgeted", session_budgets=Budgets(total_nusd=500)))
    await ledger.settle(settlement("h2", session="budgeted"))
    assert await read.hash(keys.session_spend("plain")) == {}
    assert (await read.hash(keys.session_spend("budgeted")))["total"] == "60"
    assert 61 * 86_400 < await store.execute("TTL", keys.session_spend("budgeted")) <= 62 * 86_400
    assert await read.hash(keys.held) == {}


async def test_an_abandoned_hold_is_settled_late_and_once(ledger, ask, settlement, read, store, keys, snapshot):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", ttl_ms=0, key_limits=Limits(tokens_per_minute=60)))
    await ledger.admit(ask("h2"))
    assert await ledger.settle(settlement("h1")) is True
    assert await read.hash(keys.credit) == {"balance": "940", "granted": "1000", "held": "100", "settled": "60"}
    assert (await read.hash(keys.abandoned), await store.execute("ZCARD", keys.deadlines)) == ({}, 1)
    assert (await read.events(keys.usage))[-1]["hold"] == "abandoned"
    assert await read.level(keys.key_bucket("k1"), "tokens") >= 53  # 3 + 4 used of the 10 that stayed taken
    before = await snapshot(store)
    assert await ledger.settle(settlement("h1")) is False
    assert await snapshot(store) == before


async def test_an_expired_hold_that_nobody_released_is_settled_in_time(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask(ttl_ms=0))
    assert await ledger.settle(settlement()) is True
    assert (await read.events(keys.usage))[-1]["hold"] == "live"


async def test_a_request_admitted_without_redis_is_charged_once(ledger, settlement, read, store, keys, snapshot):
    await ledger.grant("acme", 1000)
    journaled = settlement(unheld=True, session="s1")
    assert await ledger.settle(journaled) is True
    assert await read.hash(keys.credit) == {"balance": "940", "granted": "1000", "settled": "60"}
    assert (await read.hash(keys.session_spend("s1")))["total"] == "60"
    assert (await read.events(keys.usage))[-1]["hold"] == "none"
    assert 6 * 86_400 < await store.execute("TTL", keys.unheld + "h1") <= 7 * 86_400
    before = await snapshot(store)
    assert await ledger.settle(journaled) is False
    assert await snapshot(store) == before


async def test_a_hold_whose_admission_was_never_heard_of_is_settled_by_the_journal_once(
    ledger, ask, settlement, read, keys
):
    """The script ran, its reply was lost, and the request was let in without Redis under the same id."""
    await ledger.grant("acme", 1000)
    await ledger.admit(ask())
    assert [await ledger.settle(settlement(unheld=True)) for _ in range(2)] == [True, False]
    assert await read.hash(keys.credit) == {"balance": "940", "granted": "1000", "held": "0", "settled": "60"}


async def test_the_usage_stream_is_bounded(store, ask, settlement, keys):
    """Trimming is by whole nodes of the stream, a hundred entries each (stream-node-max-entries)."""
    ledger = Ledger(store, usage_events_kept=10)
    for number in range(250):
        await ledger.settle(settlement(f"h{number}", unheld=True))
    assert await store.execute("XLEN", keys.usage) < 220


async def test_a_full_server_denies_and_still_settles(server_store, ask, settlement, keys):
    """The first write of a settlement is a removal: after that, Redis no longer refuses a script for want of memory."""
    ledger = Ledger(server_store)
    await ledger.grant("acme", 1000)
    assert isinstance(await ledger.admit(ask("h1")), Hold)
    await server_store.execute("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(Unavailable) as refusal:
            await ledger.admit(ask("h2"))
        assert refusal.value.kind == "oom"
        assert await ledger.settle(settlement("h1")) is True
    finally:
        await server_store.execute("CONFIG", "SET", "maxmemory", "0")
    balance = await ledger.balance("acme")
    assert (balance.balance_nusd, balance.held_nusd) == (940, 0)


async def test_a_lowered_limit_holds_while_older_requests_settle(ledger, ask, settlement):
    """What an older request had reserved of the larger bucket isn't missing in the smaller one."""
    await ledger.grant("acme", 100_000)
    old, new = Limits(tokens_per_minute=60_000), Limits(tokens_per_minute=60)
    for number in range(20):
        await ledger.admit(ask(f"old-{number}", tokens=1000, key_limits=old))
    admitted = 0
    for number in range(20):
        answer = await ledger.admit(ask(f"new-{number}", tokens=30, key_limits=new))
        admitted += isinstance(answer, Hold)
        await ledger.settle(settlement(f"old-{number}"))
    assert admitted == 2


async def test_a_raised_limit_takes_back_what_was_not_used(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("old", tokens=60, key_limits=Limits(tokens_per_minute=60)))
    await ledger.admit(ask("new", tokens=0, key_limits=Limits(tokens_per_minute=600)))
    await ledger.settle(settlement("old"))
    assert 53 <= await read.level(keys.key_bucket("k1"), "tokens") < 60


async def test_a_share_of_a_budget_that_is_spent_is_told_once(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 10_000)
    budgets = {"budgets": Budgets(total_nusd=100), "account_budgets": Budgets(monthly_nusd=1000)}
    for number, cost in enumerate((49, 1, 20, 20, 30, 400)):
        await ledger.admit(ask(f"h{number}", amount_nusd=0))
        await ledger.settle(settlement(f"h{number}", cost_nusd=cost, **budgets))
    told = [event for event in await read.events(keys.usage) if event["event"] == "threshold"]
    assert [(event["which"], event["key"], event["percent"], event["spent_nusd"]) for event in told] == [
        ("key total budget", "k1", "50", "50"),
        ("key total budget", "k1", "80", "90"),
        ("key total budget", "k1", "100", "120"),
        ("account monthly budget", "", "50", "520"),
    ]


async def test_a_share_of_the_credit_that_is_spent_is_told_once_a_grant(ledger, settlement, read, keys):
    await ledger.grant("acme", 100)
    for number, cost in enumerate((50, 10, 50)):
        await ledger.settle(settlement(f"h{number}", cost_nusd=cost, unheld=True))
    await ledger.grant("acme", 110)
    await ledger.settle(settlement("h9", cost_nusd=80, unheld=True))
    told = [event for event in await read.events(keys.usage) if event["event"] == "threshold"]
    assert [(event["which"], event["percent"], event["budget_nusd"]) for event in told] == [
        ("credit", "50", "100"), ("credit", "80", "100"), ("credit", "100", "100"), ("credit", "50", "100"),
        ("credit", "80", "100"),
    ]  # fmt: skip


async def claimed(store, keys, owner, state="running"):
    record = keys.replay("k1", "digest")
    await store.execute("HSET", record, "body", "b", "owner", owner, "state", state)
    return {"replay": record, "replay_ttl_ms": 60_000}


@pytest.mark.parametrize("outcome", ["completed", "client_disconnected"])
async def test_a_complete_answer_settles_its_idempotency_key(ledger, ask, settlement, read, store, keys, outcome):
    """Its worker may die right behind: nobody runs it anew. It may have gone on without its client."""
    await ledger.grant("acme", 1000)
    record = await claimed(store, keys, "h1")
    await ledger.admit(ask("h1"))
    await ledger.settle(settlement("h1", session="s1", outcome=outcome, **record))
    assert (await read.hash(record["replay"]))["state"] == "charged"
    assert 50_000 < await store.execute("PTTL", record["replay"]) <= 60_000


@pytest.mark.parametrize(
    ("outcome", "ttl_ms"), [("upstream_failed", -1), ("client_disconnected", -1), ("upstream_failed", 60_000)]
)
async def test_a_failed_request_leaves_its_idempotency_key_as_it_is(
    ledger, ask, settlement, read, store, keys, outcome, ttl_ms
):
    await ledger.grant("acme", 1000)
    record = await claimed(store, keys, "h1") | {"replay_ttl_ms": ttl_ms}
    await ledger.admit(ask("h1"))
    await ledger.settle(settlement("h1", outcome=outcome, **record))
    assert (await read.hash(record["replay"]))["state"] == "running"


@pytest.mark.parametrize("state", ["finished", "charged", "lost"])
async def test_an_idempotency_key_that_another_request_has_is_charged_to_that_one(
    ledger, ask, settlement, read, store, keys, state
):
    """An older release has ended that one, and noted nothing but its state."""
    await ledger.grant("acme", 1000)
    record = await claimed(store, keys, "h2", state)
    await ledger.admit(ask("h1"))
    await ledger.admit(ask("h2"))
    assert await ledger.settle(settlement("h1", **record)) is True
    event = (await read.events(keys.usage))[-1]
    assert (event["cost_nusd"], event["waived_nusd"]) == ("0", "60")
    assert (await ledger.balance("acme")).balance_nusd == 1000


@pytest.mark.parametrize("outcome", ["completed", "upstream_failed"])
@pytest.mark.parametrize(
    ("order", "costs", "charged"),
    [
        (["h1", "h2"], {"h1": 60, "h2": 5}, {"h1": 60, "h2": 0}),
        (["h2", "h1"], {"h1": 60, "h2": 5}, {"h1": 0, "h2": 5}),
        (["h1", "h2"], {"h1": 0, "h2": 5}, {"h1": 0, "h2": 5}),
        (["h1", "h2"], {"h1": 60, "h2": 0}, {"h1": 60, "h2": 0}),
        (["h2", "h1"], {"h1": 60, "h2": 0}, {"h1": 60, "h2": 0}),
    ],
)
async def test_an_idempotency_key_is_charged_for_what_is_settled_first_and_costs_something(
    ledger, ask, settlement, read, store, keys, order, costs, charged, outcome
):
    """The first request was cut off for longer than its hold lives, and a repeat has its record."""
    await ledger.grant("acme", 1000)
    record = await claimed(store, keys, "h2")
    await ledger.admit(ask("h1"))
    await ledger.admit(ask("h2"))
    ends = {"h1": "completed", "h2": outcome}
    if order[0] == "h2" and outcome != "completed":
        charged = charged | {"h1": 60}  # a repeat that failed doesn't end the key
    for name in order:
        await ledger.settle(settlement(name, cost_nusd=costs[name], outcome=ends[name], **record))
    events = {event["hold_id"]: event for event in await read.events(keys.usage) if event["event"] == "settled"}
    assert {name: int(event["cost_nusd"]) for name, event in events.items()} == charged
    assert {name: int(event["waived_nusd"]) for name, event in events.items()} == {
        name: costs[name] - charged[name] for name in costs
    }


async def test_a_repeat_behind_one_that_failed_knows_what_was_charged(ledger, ask, settlement, store, keys):
    """The first request is settled while its repeat runs; that fails, and the next repeat claims its record."""
    await ledger.grant("acme", 1000)
    record = await claimed(store, keys, "h2")
    for name in ("h1", "h2", "h3"):
        await ledger.admit(ask(name))
    await ledger.settle(settlement("h1", **record))
    await ledger.settle(settlement("h2", cost_nusd=0, outcome="upstream_failed", **record))
    await store.execute("HSET", record["replay"], "state", "failed")
    await claimed(store, keys, "h3")
    await ledger.settle(settlement("h3", **record))
    assert (await ledger.balance("acme")).balance_nusd == 940


async def test_an_idempotency_key_that_another_request_has_only_claimed_is_charged_once(
    ledger, ask, settlement, read, store, keys
):
    """That one may be refused, and nothing would be charged; if it runs, it is the one that isn't charged."""
    await ledger.grant("acme", 1000)
    record = await claimed(store, keys, "h2")
    await ledger.admit(ask("h1"))
    await ledger.settle(settlement("h1", **record))
    found = await read.hash(record["replay"])
    assert (found["owner"], found["state"]) == ("h1", "charged")
    await ledger.admit(ask("h2"))
    await ledger.settle(settlement("h2", **record))
    assert (await ledger.balance("acme")).balance_nusd == 940


async def test_an_idempotency_key_whose_record_is_gone_is_charged(ledger, ask, settlement, read, keys):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1"))
    record = keys.replay("k1", "digest")
    await ledger.settle(settlement("h1", replay=record, replay_ttl_ms=60_000))
    assert (await read.hash(record))["owner"] == "h1"
    assert (await ledger.balance("acme")).balance_nusd == 940
