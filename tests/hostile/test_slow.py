"""Clients that take their time: a head and a body have to come within a while, and what lies between requests may be idle."""

import asyncio
import json
import socket
import time

import pytest

from meshproxy.policy.principal import Limits
from tests.harness.clients import answers_in, chat_bytes, next_answer
from tests.harness.mesh import model
from tests.hostile.corpus import BODY, END, LENGTH, request
from tests.hostile.test_requests import counted

SHORT_S = 0.1
PATIENCE_S = 10.0


@pytest.fixture
async def hasty(start_mesh):
    return await start_mesh(server={"header_timeout_s": SHORT_S, "body_timeout_s": SHORT_S})


@pytest.mark.parametrize(
    "begun", [b"G", b"GET / HTTP/1.1\r\n", b"POST /v1/ch", request(LENGTH, body=b"")[:-1], b"\r\n"]
)
async def test_half_a_head_is_given_up(hasty, begun):
    ((status, headers, body),) = answers_in(await hasty.raw(begun))
    told = json.loads(body)
    assert (status, told["error"]["code"]) == (408, "request_timeout")
    assert (headers["connection"], headers["x-request-id"]) == ("close", told["request_id"])
    assert counted(hasty, 408) == 1


async def test_bytes_that_trickle_in_buy_no_time(hasty):
    reader, writer = await asyncio.open_connection(hasty.host, hasty.port)
    began = asyncio.get_running_loop().time()
    trickle = asyncio.create_task(_trickle(writer))
    status, _, _ = await next_answer(reader)  # and no more: what trickles in behind it is answered with a reset
    assert status == 408
    assert asyncio.get_running_loop().time() - began < SHORT_S + 1
    trickle.cancel()
    writer.close()


async def test_a_connection_that_says_nothing_is_closed_without_a_word(hasty):
    assert await hasty.raw(b"") == b""


@pytest.mark.parametrize(
    "usual, status", [(END.replace(b"close", b"keep-alive"), 404), (request(LENGTH, body=BODY), 200)]
)
async def test_a_connection_may_be_idle_between_requests_and_then_has_a_new_while(hasty, usual, status):
    asked = usual.replace(b"KEY", (await hasty.key()).secret.encode())
    reader, writer = await asyncio.open_connection(hasty.host, hasty.port)
    for _ in range(2):
        writer.write(asked)
        assert (await next_answer(reader))[0] == status
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * SHORT_S):
                await reader.read(1)
    writer.write(b"GET / HT")
    ((late, _, _),) = answers_in(await reader.read(-1))
    assert late == 408
    writer.close()


@pytest.mark.parametrize("path", ["/health", "/v1/chat/completions"])
async def test_half_a_head_behind_a_request_is_given_up(hasty, path):
    caller = await hasty.key()
    whole = request(LENGTH, body=BODY, target=path.encode()).replace(b"KEY", caller.secret.encode())
    statuses = [status for status, _, _ in answers_in(await hasty.raw(whole + b"GET / HT"))]
    assert (len(statuses), statuses[-1]) == (2, 408)


@pytest.mark.parametrize(
    ("framing", "body", "rest"),
    [
        (LENGTH, BODY[:5], BODY[5:]),
        (b"Transfer-Encoding: chunked", b"2\r\n{}\r\n", b"0\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n", b"\r\n"),
    ],
)
async def test_a_body_that_ends_after_its_answer_begins_no_head(hasty, framing, body, rest):
    reader, writer = await asyncio.open_connection(hasty.host, hasty.port)
    writer.write(request(framing, body=body, target=b"/v1/templates"))  # with no key: answered from its head
    assert (await next_answer(reader))[0] == 401
    writer.write(rest)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3 * SHORT_S):
            await reader.read(1)
    writer.close()


@pytest.mark.parametrize(
    "begun",
    [
        request(LENGTH, body=BODY[:-1]),
        request(b"Transfer-Encoding: chunked", body=b"5\r\n{"),
        request(LENGTH, body=b"", target=b"/v1/templates"),
    ],
)
async def test_half_a_body_is_given_up(hasty, begun):
    caller = await hasty.key()
    reader, writer = await asyncio.open_connection(hasty.host, hasty.port)
    writer.write(begun.replace(b"KEY", caller.secret.encode()))
    status, headers, body = await next_answer(reader)
    assert (status, json.loads(body)["error"]["code"]) == (408, "request_timeout")
    assert headers["connection"] == "close"
    writer.close()
    assert hasty.received == []
    assert await hasty.spent(caller) == 0
    assert [line for line in hasty.log.lines if (line["status"], line["code"]) != (408, "request_timeout")] == []


async def test_nobody_without_a_key_is_waited_for(hasty):
    reader, writer = await asyncio.open_connection(hasty.host, hasty.port)
    writer.write(request(LENGTH, body=b""))
    status, _, _ = await next_answer(reader)
    assert status == 401
    writer.close()


async def test_a_large_body_gets_a_second_more_for_each_64_kib(hasty):
    caller = await hasty.key()
    body = BODY[:-1] + b" " * 200_000 + b"}"
    reader, writer = await asyncio.open_connection(hasty.host, hasty.port)
    head = request(b"Content-Length: %d" % len(body), body=b"").replace(b"KEY", caller.secret.encode())
    writer.write(head + body[:100])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5 * SHORT_S):
            await reader.read(1)
    writer.write(body[100:])
    status, _, _ = await next_answer(reader)
    assert status == 200
    writer.close()


async def test_a_stream_that_nobody_reads_frees_all_that_it_has(start_mesh):
    """Its slot, its hold and its provider's connection."""
    models = {"sim/long": model("sim", "sim/fast?tokens=10000")}
    mesh = await start_mesh(server={"write_timeout_s": SHORT_S}, models=models, send_buffer=4096)
    caller = await mesh.key(credit="1000", limits=Limits(None, 1_000_000_000))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((mesh.host, mesh.port))
        client.sendall(chat_bytes(caller.auth, model="sim/long", stream=True))
        await mesh.until(lambda: mesh.simulator.history.open_streams == 1)
        await mesh.until(lambda: mesh.simulator.history.open_streams == 0)
        balance = await mesh.balance(caller)
    assert balance.held_nusd == 0
    assert balance.settled_nusd > 0
    assert [line["outcome"] for line in mesh.log.lines] == ["client_disconnected"]


async def test_a_stream_that_may_go_on_goes_on_when_its_client_reads_nothing(start_mesh):
    """With an Idempotency-Key it is read to its end, also if it waited for its client to catch up."""
    models = {"sim/long": model("sim", "sim/fast?tokens=10000")}
    mesh = await start_mesh(server={"write_timeout_s": SHORT_S}, models=models, send_buffer=4096)
    caller = await mesh.key(credit="1000", limits=Limits(None, 1_000_000_000))
    auth = {**caller.auth, "idempotency-key": "once"}
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((mesh.host, mesh.port))
        client.sendall(chat_bytes(auth, model="sim/long", stream=True))
        await mesh.until(lambda: mesh.simulator.history.open_streams == 1)
        event = await mesh.settlement(caller)
    assert (event["completion_tokens"], event["usage_source"]) == ("10000", "drained")


async def _trickle(writer):
    for byte in b"GET / HTTP/1.1\r\nx: " + b"y" * 10_000:
        writer.write(bytes([byte]))
        await asyncio.sleep(SHORT_S / 10)  # noqa: TID251 - the client's pace


async def test_a_loop_that_was_busy_does_not_take_redis_for_lost(start_mesh):
    mesh = await start_mesh(redis={"timeout_s": 0.2})
    asked = mesh.worker.store.execute("GET", "nothing")
    time.sleep(0.5)  # noqa: TID251 - all stands still, as while a large body is taken apart
    assert await asked is None
    assert mesh.worker.store.connected
