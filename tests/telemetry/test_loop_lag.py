import pytest

from meshproxy.telemetry.loop_lag import INTERVAL_S, watch


class Clock:
    def __init__(self, lags):
        self.now = 100.0
        self.lags = iter(lags)

    def __call__(self):
        return self.now

    async def sleep(self, delay_s):
        lag = next(self.lags, None)
        if lag is None:
            raise InterruptedError
        self.now += delay_s + lag


async def test_observes_how_late_it_woke():
    seen = []
    clock = Clock([0.0, 0.02, -0.001, 3.0])
    with pytest.raises(InterruptedError):
        await watch(seen.append, clock=clock, sleep=clock.sleep)
    assert pytest.approx([0.0, 0.02, 0.0, 3.0]) == seen


async def test_takes_the_loops_own_clock():
    seen = []

    async def sleep(delay_s):
        assert delay_s == INTERVAL_S
        if seen:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        await watch(seen.append, sleep=sleep)
    assert seen == [0.0]
