"""The line between the supervisor and a worker."""

import asyncio
import socket

import msgspec
import pytest

from meshproxy.app.worker_process import MESSAGES, ControlChannel, ReportRequest


@pytest.fixture
async def pair():
    ours, theirs = socket.socketpair()
    ends = await ControlChannel.from_socket(ours), await ControlChannel.from_socket(theirs)
    yield ends
    for end in ends:
        end.close()


async def test_a_question_gets_its_answer(pair):
    supervisor, worker = pair
    asking = asyncio.create_task(supervisor.request(ReportRequest()))
    assert ReportRequest() == MESSAGES.decode(await worker.receive())
    worker.send(7)
    assert msgspec.msgpack.decode(await asking) == 7


async def test_the_answer_that_nobody_waited_for_is_not_taken_for_the_next(pair):
    supervisor, worker = pair
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(supervisor.request(ReportRequest()), 0.01)
    asking = asyncio.create_task(supervisor.request(ReportRequest()))
    await worker.receive()
    worker.send("late")
    await worker.receive()
    worker.send("fresh")
    assert msgspec.msgpack.decode(await asking) == "fresh"


async def test_one_who_is_gone_is_told_as_such_however_often_one_asks(pair):
    supervisor, worker = pair
    worker.close()
    for _ in range(3):
        with pytest.raises(ConnectionError):
            await supervisor.request(ReportRequest())
