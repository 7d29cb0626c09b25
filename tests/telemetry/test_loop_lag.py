import asyncio
import time

from meshproxy.telemetry import loop_lag


async def test_observes_how_late_it_woke(monkeypatch):
    monkeypatch.setattr(loop_lag, "INTERVAL_S", 0.01)
    seen = []
    watching = asyncio.create_task(loop_lag.watch(seen.append))
    await asyncio.sleep(0)
    time.sleep(0.1)  # the whole loop
    while not seen:
        await asyncio.sleep(0)
    watching.cancel()
    assert 0.08 < seen[0] < 5
