import pytest

from meshproxy import config
from meshproxy.cli import usage as cli_usage
from meshproxy.cli.usage import TopRow, UsageWindow
from meshproxy.ledger.connection import connect


@pytest.fixture
async def link(store, store_server):
    link = await connect(config.Redis(url=store_server))
    yield link
    await link.close()


@pytest.fixture
def settled(store):
    """Add an event as a settlement does, some seconds before the server's now."""

    def add(account, model, *, cost_nusd=1, ago_s=0, event="settled"):
        seconds, micros = store.time()
        ms = seconds * 1000 + micros // 1000 - ago_s * 1000
        tokens = {"prompt_tokens": 10, "completion_tokens": 5}
        fields = {"event": event, "model": model, "cost_nusd": cost_nusd, "settled_ms": ms, **tokens}
        store.xadd(f"mesh:{{{account}}}:usage", fields, id=f"{ms}-*")

    return add


async def test_only_the_window_counts(link, settled):
    settled("acme", "old", ago_s=120)
    settled("acme", "m", cost_nusd=5, ago_s=30)
    settled("acme", "m", cost_nusd=7)
    settled("acme", "gift", event="grant")
    assert await UsageWindow(link, ["acme"], 60).read() == [TopRow("acme", "m", 2, 20, 10, 12)]


async def test_each_reading_adds_what_is_new(link, settled):
    window = UsageWindow(link, ["acme", "bolt"], 60)
    assert await window.read() == []
    settled("acme", "m", cost_nusd=5)
    assert await window.read() == [TopRow("acme", "m", 1, 10, 5, 5)]
    settled("acme", "m", cost_nusd=6)
    settled("bolt", "m", cost_nusd=50)
    assert await window.read() == [TopRow("bolt", "m", 1, 10, 5, 50), TopRow("acme", "m", 2, 20, 10, 11)]
    assert await window.read() == [TopRow("bolt", "m", 1, 10, 5, 50), TopRow("acme", "m", 2, 20, 10, 11)]


async def test_more_than_one_batch_is_read(link, settled, monkeypatch):
    monkeypatch.setattr(cli_usage, "BATCH_EVENTS", 2)
    monkeypatch.setattr(cli_usage, "BATCH_ACCOUNTS", 1)
    for cost in (1, 10, 100):
        settled("acme", "m", cost_nusd=cost)
    settled("bolt", "m")
    assert await UsageWindow(link, ["acme", "bolt"], 60).read() == [
        TopRow("acme", "m", 3, 30, 15, 111),
        TopRow("bolt", "m", 1, 10, 5, 1),
    ]


async def test_it_is_bounded(link, settled, monkeypatch):
    monkeypatch.setattr(cli_usage, "MAX_SUMS", 1)
    settled("acme", "m", cost_nusd=5)
    settled("acme", "n", cost_nusd=5)
    assert await UsageWindow(link, ["acme"], 60).read() == [TopRow("acme", "m", 1, 10, 5, 5)]
