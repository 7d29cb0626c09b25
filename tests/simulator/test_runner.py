"""Starting, serving and stopping."""

import asyncio

import pytest
from aiohttp import ClientSession

from meshproxy.simulator import start


async def test_it_listens_until_it_is_closed():
    running = await start()
    async with ClientSession() as session, session.get(f"{running.base_url}/models") as answer:
        assert answer.status == 200
    await running.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(running.host, running.port)


async def test_a_port_in_use_is_an_os_error(simulator):
    with pytest.raises(OSError, match="in use"):
        await start(port=simulator.port)


async def test_closing_cuts_what_is_open(wire, simulator):
    wire.ask(model="sim/fast+stall", stream=True)
    await wire.until(b"\r\n\r\n")
    async with asyncio.timeout(5):
        await simulator.close()
        await wire.to_the_end()
    assert simulator.history.open_streams == 0


async def test_an_ipv6_address_is_written_as_one():
    running = await start("::1")
    assert running.base_url == f"http://[::1]:{running.port}/v1"
    await running.close()
