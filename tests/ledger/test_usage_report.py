"""Settlements of real scripts, added up by whatever is asked for."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from meshproxy.errors import GatewayError
from meshproxy.ledger import usage_report
from meshproxy.ledger.records import AccountKeys, Settlement
from meshproxy.ledger.usage_report import (
    GROUPS,
    MAX_SPAN,
    ReportPeriod,
    UsageEvent,
    UsageRow,
    events,
    find_usage_event,
    shown_price,
    usage,
)
from meshproxy.openai.usage import Usage

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
NOW = NOON + timedelta(days=1)
DAY = {"since": NOON - timedelta(hours=12), "until": NOON + timedelta(hours=12), "now": NOW}


async def settle(ledger, at=NOON, account="acme", **fields):
    """A settlement of a request that was never held, as after an outage."""
    fields = {
        "hold_id": f"h{time.monotonic_ns()}",
        "key_id": "key_a",
        "model": "gpt",
        "usage": Usage(prompt=10, completion=5, cached=3, reasoning=2),
        "cost_nusd": 700,
        **fields,
    }
    fields = {"request_id": "r", "outcome": "completed", **fields}
    settlement = Settlement(
        account=account,
        upstream="openai",
        usage_source="reported",
        started_ms=int(at.timestamp() * 1000),
        unheld=True,
        **fields,
    )
    assert await ledger.settle(settlement)


async def test_sums_of_everything(store, ledger):
    await settle(ledger)
    await settle(
        ledger, at=NOON + timedelta(hours=3), usage=Usage(1, 1, cache_write=1, audio_prompt=1, audio_completion=1)
    )
    await settle(ledger, account="other")
    expected = UsageRow(
        requests=2,
        prompt_tokens=11,
        completion_tokens=6,
        cached_tokens=3,
        cache_write_tokens=1,
        reasoning_tokens=2,
        audio_prompt_tokens=1,
        audio_completion_tokens=1,
        cost_nusd=1400,
    )
    assert await usage(store, "acme", **DAY) == [expected]


async def test_nothing_used_is_no_rows(store):
    assert await usage(store, "acme", group_by=GROUPS, **DAY) == []


async def test_groups(store, ledger):
    await settle(ledger, session="s1")
    await settle(ledger, session="s2", model="claude")
    await settle(ledger, key_id="key_b")
    await settle(ledger, at=NOON - timedelta(hours=13), session="s1")

    async def grouped(*names):
        rows = await usage(
            store, "acme", group_by=names, since=NOON - timedelta(days=2), until=NOON + timedelta(days=1), now=NOW
        )
        return [(*(getattr(row, name) for name in names), row.requests, row.cost_nusd) for row in rows]

    assert await grouped("session_id") == [(None, 1, 700), ("s1", 2, 1400), ("s2", 1, 700)]
    assert await grouped("model") == [("claude", 1, 700), ("gpt", 3, 2100)]
    assert await grouped("key") == [("key_a", 3, 2100), ("key_b", 1, 700)]
    assert await grouped("day") == [("2026-11-23", 1, 700), ("2026-11-24", 3, 2100)]
    assert await grouped("day", "key") == [
        ("2026-11-23", "key_a", 1, 700),
        ("2026-11-24", "key_a", 2, 1400),
        ("2026-11-24", "key_b", 1, 700),
    ]


async def test_one_session(store, ledger):
    await settle(ledger, session="s1")
    await settle(ledger, session="s2")
    rows = await usage(store, "acme", group_by=["session_id"], session_id="s1", **DAY)
    assert [(row.session_id, row.requests) for row in rows] == [("s1", 1)]


async def test_a_session_may_have_any_characters(store, ledger):
    odd = "a\x1fb\x1frequests\n{}*ä"
    await settle(ledger, session=odd)
    rows = await usage(store, "acme", group_by=["session_id", "model"], **DAY)
    assert [(row.session_id, row.model, row.requests) for row in rows] == [(odd, "gpt", 1)]


@pytest.mark.parametrize(
    ("since", "until", "requests"),
    [
        (NOON, NOON + timedelta(minutes=1), 1),
        (NOON + timedelta(minutes=59), NOON + timedelta(hours=2), 1),  # hours are whole
        (NOON + timedelta(hours=1), NOON + timedelta(hours=2), 0),
        (NOON - timedelta(hours=2), NOON, 0),
        (NOON.astimezone(), NOON.astimezone() + timedelta(hours=1), 1),
        (NOON.replace(tzinfo=None), NOON.replace(tzinfo=None) + timedelta(hours=1), 1),
    ],
)
async def test_which_hours_count(store, ledger, since, until, requests):
    await settle(ledger, at=NOON + timedelta(minutes=30))
    assert sum(row.requests for row in await usage(store, "acme", since=since, until=until, now=NOW)) == requests


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"since": NOON, "until": NOON - timedelta(seconds=1), "now": NOW}, "since"),
        ({"since": NOON - MAX_SPAN - timedelta(seconds=1), "until": NOON, "now": NOW}, "since"),
        ({"group_by": ["colour"], **DAY}, "group_by"),
    ],
)
async def test_what_cannot_be_asked(store, arguments, param):
    with pytest.raises(GatewayError) as caught:
        await usage(store, "acme", **arguments)
    assert (caught.value.response.code, caught.value.response.param) == ("validation_error", param)


async def test_a_report_reads_so_much_and_no_more(store, monkeypatch):
    monkeypatch.setattr(usage_report, "MAX_FIELDS", 3)
    hour = AccountKeys("acme").hour("2026-11-24T12")
    for n in range(3):
        await store.execute("HSET", hour, f"key\x1fmodel\x1fs{n}\x1frequests", 1)
    assert [row.requests for row in await usage(store, "acme", **DAY)] == [3]
    await store.execute("HSET", hour, "key\x1fmodel\x1fs3\x1frequests", 1)
    with pytest.raises(GatewayError, match="shorter time"):
        await usage(store, "acme", **DAY)


async def test_many_hours_are_read_in_several_goes(store, ledger, monkeypatch):
    monkeypatch.setattr(usage_report, "BATCH_FIELDS", 7)
    for hours in range(5):
        await settle(ledger, at=NOON - timedelta(hours=hours))
    assert [row.requests for row in await usage(store, "acme", **DAY)] == [5]


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        ("2026-11-01T00:30", "2026-11-24T12:00", ReportPeriod((), "2026-11-01T00", "2026-11-24T12")),
        ("2026-08-27T12:00", "2026-11-24T12:01", ReportPeriod((), "2026-08-27T12", "2026-11-24T13")),
        ("2026-08-27T11:59", "2026-11-24T12:00", ReportPeriod(("2026-08",), "2026-09-01T00", "2026-11-24T12")),
        ("2026-05-10T00:00", "2026-06-01T00:00", ReportPeriod(("2026-05",), "2026-09-01T00", "2026-06-01T00")),
        (
            "2025-12-31T23:59",
            "2026-01-01T00:01",
            ReportPeriod(("2025-12", "2026-01"), "2026-09-01T00", "2026-01-01T01"),
        ),
    ],
)
def test_a_period_is_hours_and_before_those_that_are_kept_whole_months(since, until, expected):
    start, end = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (since, until))
    assert ReportPeriod.of(start, end, NOW) == expected


async def test_a_month_stays_by_model_and_key_when_its_hours_are_gone(store, ledger):
    await settle(ledger, session="s1")
    await settle(ledger, session="s2", model="claude")
    await store.execute("DEL", AccountKeys("acme").hour("2026-11-24T12"))
    later = {"since": NOON - timedelta(days=3), "until": NOON + timedelta(days=120), "now": NOON + timedelta(days=120)}
    rows = await usage(store, "acme", group_by=["session_id", "model", "key", "day"], **later)
    assert [
        (row.day, row.session_id, row.model, row.key, row.requests, row.prompt_tokens, row.cost_nusd) for row in rows
    ] == [("2026-11", "~", model, "key_a", 1, 10, 700) for model in ("claude", "gpt")]
    assert await usage(store, "acme", session_id="s1", **later) == []
    assert await store.execute("TTL", AccountKeys("acme").month("2026-11")) == -1


async def test_a_full_month_sums_further_keys_together(store, ledger):
    month = AccountKeys("acme").month("2026-11")
    for first in range(0, 20_000, 5_000):
        await store.execute("HSET", month, *(word for n in range(first, first + 5_000) for word in (f"k{n}", 1)))
    await settle(ledger)
    found = await store.execute("HMGET", month, "~\x1fgpt\x1f~\x1frequests", "key_a\x1fgpt\x1f~\x1frequests")
    assert found == [b"1", None]


async def test_the_index_has_the_hours_of_each_settlement(store, ledger):
    await settle(ledger)
    await settle(ledger, at=NOON + timedelta(hours=2))
    found = await store.execute("HGETALL", AccountKeys("acme").hours)
    assert dict(zip(found[::2], found[1::2], strict=True)) == {
        b"2026-11-24": b"000000000000101000000000",
        b"nusd": b"1400",
    }


async def test_the_index_forgets_its_first_days(store, ledger):
    for days in range(110):
        await settle(ledger, at=NOON - timedelta(days=days))
    fields = await store.execute("HKEYS", AccountKeys("acme").hours)
    assert (len(fields), b"2026-11-24" in fields, b"2026-08-10" in fields) == (100, True, False)


async def test_hours_without_an_index_are_found_and_indexed(store, ledger):
    """As an older version left them, and as it adds to them beside this one."""
    names = AccountKeys("acme")
    await settle(ledger)
    await store.execute("DEL", names.hours)
    assert [row.requests for row in await usage(store, "acme", **DAY)] == [1]
    assert await store.execute("HGET", names.hours, "nusd") == b"700"
    await settle(ledger, at=NOON + timedelta(hours=1))
    await store.execute("HDEL", names.hours, "2026-11-24")
    await store.execute("HINCRBY", names.hours, "nusd", -700)
    assert [row.requests for row in await usage(store, "acme", **DAY)] == [2]
    assert await store.execute("HGET", names.hours, "2026-11-24") == b"000000000000110000000000"


async def test_an_index_that_was_completed_from_a_day_on_is_completed_for_a_longer_report(store, ledger):
    await settle(ledger)
    await settle(ledger, at=NOON - timedelta(days=5))
    await store.execute("DEL", AccountKeys("acme").hours)
    week = {**DAY, "since": NOON - timedelta(days=7)}
    counts = [[row.requests for row in await usage(store, "acme", **period)] for period in (DAY, week, DAY)]
    assert counts == [[1], [2], [1]]


async def test_a_request_is_found_by_its_id_as_soon_as_it_is_settled(store, ledger):
    await settle(ledger, request_id="r1", session="s1", attempts=2)
    await settle(ledger, request_id="r2", cost_nusd=0, outcome="upstream_failed", usage=Usage())
    await settle(ledger, request_id="r3", account="other")
    first, failed = await events(store, "acme", ["r1", "none", "r2", "r3"], NOON)
    assert first == UsageEvent(
        request_id="r1", account="acme", key_id="key_a", session_id="s1", model="gpt", upstream="openai", attempts=2,
        outcome="completed", usage_source="reported", hold="none", prompt_tokens=10, completion_tokens=5, cached_tokens=3,
        cache_write_tokens=0, reasoning_tokens=2, audio_prompt_tokens=0, audio_completion_tokens=0, cost_nusd=700,
        price="{}", started_ms=int(NOON.timestamp() * 1000), settled_ms=first.settled_ms,
    )  # fmt: skip
    assert (failed.request_id, failed.outcome, failed.cost_nusd) == ("r2", "upstream_failed", 0)
    assert await events(store, "acme", [], NOON) == []


async def test_a_request_is_found_in_any_account(store, ledger):
    await settle(ledger, request_id="r1", account="other")
    assert (await find_usage_event(store, ["acme", "other"], "r1", NOON)).account == "other"
    assert await find_usage_event(store, ["acme"], "r1", NOON) is None


@pytest.mark.parametrize("days, found", [(-1, 1), (0, 1), (7, 1), (8, 0)])
async def test_requests_are_found_for_some_days(store, ledger, days, found):
    await settle(ledger, request_id="r1")
    assert len(await events(store, "acme", ["r1"], NOON + timedelta(days=days))) == found


async def test_an_event_that_was_trimmed_is_no_more(store, ledger):
    await settle(ledger, request_id="r1")
    await store.execute("XTRIM", AccountKeys("acme").usage, "MAXLEN", 0)
    assert await events(store, "acme", ["r1"], NOON) == []


async def test_hours_are_looked_up_in_one_round_trip(store, ledger, monkeypatch):
    """Of 720 hours one has anything: the index, the size of the hour, and the hour."""
    await settle(ledger)
    sent = []
    send = store.send
    monkeypatch.setattr(store, "send", lambda op, command: (sent.append(op), send(op, command))[1])
    await usage(store, "acme", since=NOON - timedelta(days=30), until=NOON + timedelta(hours=1), now=NOW)
    assert list(dict.fromkeys(sent[:-1])) + sent[-1:] == ["HGETALL", "HGET", "sizes", "HGETALL"]


def test_a_price_is_shown_in_usd_under_the_names_of_the_configuration():
    stored = {"input": 2_500_000_000, "cached": 1_250_000_000, "request": 20_000_000, "markup": 1_100_000_000}
    shown = {"input_usd_per_mtok": "2.50", "cached_input_usd_per_mtok": "1.25", "request_usd": "0.02", "markup": "1.10"}
    assert shown_price(stored) == shown
    assert shown_price({"tiers": [[200_000, {"output": 1}]]}) == {
        "price_tiers": [{"above_prompt_tokens": 200_000, "output_usd_per_mtok": "0.000000001"}]
    }
