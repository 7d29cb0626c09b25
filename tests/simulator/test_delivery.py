"""Pace, and clients that go."""

import asyncio

import pytest

from meshproxy.simulator import SimulatorSettings
from meshproxy.simulator.behaviour import read_behaviour
from meshproxy.simulator.delivery import pace_of
from tests.harness.waiting import turns, until

SETTINGS = SimulatorSettings(tokens_per_second=50, first_token_s=0.2)


@pytest.mark.parametrize(
    "model, header, first_s, tenth_s",
    [
        ("gpt-4o", None, 0.2, 0.4),
        ("sim/fast", None, 0, 0),
        ("gpt-4o", "fast", 0, 0),
        ("sim/slow", None, 0.2, 10.2),
        ("sim/fast?tps=100&ttft=0.05", None, 0.05, 0.15),
        ("sim/plain?tps=100", "tps=10", 0.2, 1.2),
    ],
)
def test_the_pace_is_the_settings_the_models_or_the_headers(model, header, first_s, tenth_s):
    pace = pace_of(read_behaviour(model, header), SETTINGS)
    assert (pytest.approx(first_s), pytest.approx(tenth_s)) == (pace.due_s(0), pace.due_s(10))


@pytest.mark.parametrize("stream", [True, False])
async def test_tokens_take_their_time(sdk, stream):
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    answer = await sdk.chat.completions.create(
        model="sim/tokens-21?ttft=0.1&tps=100", messages=[{"role": "user", "content": "hi"}], stream=stream
    )
    if stream:
        assert len([chunk async for chunk in answer]) == 23
    assert 0.3 <= loop.time() - start_s < 3


async def test_a_late_reader_does_not_shift_the_schedule(wire, simulator):
    """Twenty streams side by side take as long as one."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()

    async def read_one():
        reader, writer = await asyncio.open_connection(simulator.host, simulator.port)
        other = type(wire)(reader, writer)
        other.ask(model="sim/tokens-100?ttft=0&tps=500", stream=True)
        await other.until(b"\r\n0\r\n\r\n")
        writer.close()

    await asyncio.gather(*(read_one() for _ in range(20)))
    assert 0.198 <= loop.time() - start_s < 2


async def test_a_client_that_goes_ends_the_stream_at_once(wire, simulator):
    wire.ask(model="sim/tokens-30000?ttft=0&tps=200", stream=True)
    await wire.until(b"\n\n")
    wire.writer.close()
    entry = simulator.history.requests[-1]
    await until(lambda: entry.ended != "open", poll_s=0)
    assert (entry.ended, entry.tokens < 200, simulator.history.open_streams) == ("client_closed", True, 0)


async def test_a_client_that_does_not_read_holds_the_stream_up(wire, simulator):
    """Backpressure: what isn't read isn't produced beyond the buffers of the sockets."""
    wire.writer.transport.pause_reading()
    wire.ask(model="sim/fast?tokens=32768&tag=greedy", n=4, stream=True)
    entries = simulator.history.requests
    await until(lambda: entries and entries[-1].tokens >= 100, poll_s=0)
    seen = -1
    while entries[-1].tokens != seen:
        seen = entries[-1].tokens
        await turns(1000)
    assert (entries[-1].ended, seen < 4 * 32_768) == ("open", True)


async def test_a_connection_is_kept_for_the_next_request(wire):
    for _ in range(3):
        wire.ask(model="sim/fast", stream=True)
        assert (await wire.until(b"\r\n0\r\n\r\n")).status == 200
    wire.ask(model="sim/fast", stream=True, headers={"connection": "close"})
    answer = await wire.to_the_end()
    assert (b"connection: close" in answer.head, answer.body.endswith(b"\r\n0\r\n\r\n")) == (True, True)
