"""Idempotency-Key, below HTTP: what is recorded, what is replayed, and what Redis's absence makes of it."""

import asyncio
import json
from collections import Counter

import pytest

from meshproxy import config
from meshproxy.config import Idempotency
from meshproxy.errors import GatewayError, insufficient_credits
from meshproxy.gateway import idempotency as module
from meshproxy.gateway.exchange import Call, Exchange, Reply
from meshproxy.gateway.idempotency import IdempotencyKeys, Recording, Replay
from meshproxy.ledger.connection import Store, connect
from meshproxy.ledger.replays import Replays
from meshproxy.ledger.store import Unavailable
from meshproxy.openai.errors import error_event
from meshproxy.openai.event_stream import PING
from meshproxy.policy.principal import Account, Key, Principal
from meshproxy.telemetry.tasks import Tasks
from tests.gateway import parts
from tests.harness.waiting import turns, until

PRINCIPAL = Principal(Key("k1", "acme", 0.0), Account("acme"))
HEADERS = [("x-request-id", "r1"), ("content-type", "text/event-stream")]
SETTINGS = Idempotency(ttl_s=60, max_bytes=1000)


class Flaky(Store):
    """A store that can be lost: before a command runs, or after."""

    connected = True

    def __init__(self, store):
        self._store = store
        self.is_lost = False
        self.loses_replies_of = None
        self.asked = Counter()

    async def _lost(self, op, command):
        self.asked[op] += 1
        if self.is_lost:
            raise Unavailable("connection", "gone")
        reply = await self._store.send(op, command)
        if op == self.loses_replies_of:
            self.loses_replies_of = None
            raise Unavailable("timeout", "no reply")
        return reply

    def send(self, op, command):
        return self._lost(op, command)

    async def close(self):
        await self._store.close()


class Client(parts.Client):
    """One that is sent a stream from its head on, and the exchange of its request."""

    headers = None

    def __init__(self):
        super().__init__()
        self.exchange = Exchange(call("once", "r2"), "h")

    def begin(self, headers):
        self.headers = headers


class House:
    """Idempotence over a store, and its clients."""

    def __init__(self, store, tasks):
        self.store, self.tasks = store, tasks
        self.now = 0.0
        self.idempotence = IdempotencyKeys(Replays(store), tasks, lambda: self.now)
        self.client = Client()

    async def enter(self, owner, *, name="once", body=b"{}", settings=SETTINGS, running_ttl_ms=60_000):
        return await self.idempotence.enter(
            call(name), PRINCIPAL, body, self.client, settings=settings, running_ttl_ms=running_ttl_ms, owner=owner
        )

    async def play(self, replay, client=None, heartbeat_s=15, **more):
        client = client or Client()
        return await replay.play(client.exchange, client, heartbeat_s, **more)


def call(name, request_id="r1"):
    async def read():
        return b"{}"

    return Call(request_id, None, read, 0.0, idempotency_key=name)


@pytest.fixture
async def house(monkeypatch, store_server):
    monkeypatch.setattr(module, "POLL_S", 0)
    monkeypatch.setattr(module, "CONCLUDE_RETRY_S", 0)
    store = Flaky(await connect(config.Redis(url=store_server)))
    tasks = Tasks(on_failure=lambda name: pytest.fail(f"{name} failed"))
    await store.execute("FLUSHALL")
    yield House(store, tasks)
    store.is_lost = False
    await tasks.finish(5)
    await store.close()
    assert len(tasks) == 0


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", "a\x00", "\x7f"])
async def test_unusable_keys_are_refused(house, name):
    with pytest.raises(GatewayError) as caught:
        await house.enter("h1", name=name)
    assert caught.value.response.status == 422


@pytest.mark.parametrize("name", ["x", "x" * 255, "ü {acme}:*"])
async def test_every_other_key_will_do(house, name):
    assert isinstance(await house.enter("h1", name=name), Recording)


async def test_another_body_is_a_conflict(house):
    await house.enter("h1")
    with pytest.raises(GatewayError) as caught:
        await house.enter("h2", body=b"[]")
    assert (caught.value.response.status, caught.value.response.code) == (409, "idempotency_conflict")


async def test_a_whole_answer_is_replayed_with_the_repeats_own_id(house):
    recording = await house.enter("h1")
    recording.reply(Reply(200, [("x-request-id", "r1"), ("content-type", "application/json")], b'{"a": 1}'))
    recording.conclude(complete=True)
    await house.tasks.finish(5)
    reply = await house.play(await house.enter("h2"))
    assert (reply.status, reply.body) == (200, b'{"a": 1}')
    assert reply.headers == [
        ("x-request-id", "r2"),
        ("content-type", "application/json"),
        ("idempotent-replayed", "true"),
    ]


async def test_a_repeat_waits_no_longer_than_its_own_deadline(house):
    recording = await house.enter("h1")
    with pytest.raises(GatewayError) as caught:
        await house.play(await house.enter("h2"), left_s=0.01)
    recording.conclude(complete=False)
    assert (caught.value.response.status, caught.value.response.code) == (504, "gateway_timeout")


async def test_a_stream_is_replayed_byte_by_byte_but_for_its_pings(house):
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    for payload in (b"data: 1\n\n", PING, b"data: 2\n\n", b"data: [DONE]\n\n"):
        recording.write(payload, b"frame")
    recording.finish()
    recording.conclude(complete=True)
    await house.tasks.finish(5)
    client = Client()
    assert await house.play(await house.enter("h2"), client) is None
    assert (client.text, client.finished) == (b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n", True)
    assert ("idempotent-replayed", "true") in client.headers
    assert b": ping" in house.client.text


async def test_one_that_is_attached_gets_what_comes(house):
    recording = await house.enter("h1")
    client = Client()
    playing = asyncio.create_task(house.play(await house.enter("h2"), client))
    recording.begin(HEADERS)
    for number in range(5):
        recording.write(event := b"data: %d\n\n" % number)
        await until(lambda event=event: client.text.endswith(event), poll_s=0)
    recording.conclude(complete=True)
    await asyncio.wait_for(playing, 5)
    assert (client.text, client.finished) == (house.client.text, True)


async def test_a_silent_stream_is_kept_open(house):
    recording = await house.enter("h1")
    client = Client()
    playing = asyncio.create_task(house.play(await house.enter("h2"), client))
    recording.begin(HEADERS)
    await until(lambda: client.headers is not None, poll_s=0)
    house.now = 16.0
    await until(lambda: PING in client.text, poll_s=0)
    recording.conclude(complete=True)
    await asyncio.wait_for(playing, 5)


async def test_a_failure_is_not_replayed_and_the_next_one_runs(house):
    recording = await house.enter("h1")
    playing = asyncio.create_task(house.play(await house.enter("h2")))
    recording.conclude(complete=False)
    with pytest.raises(LookupError):
        await asyncio.wait_for(playing, 5)
    assert isinstance(await house.enter("h2"), Recording)


async def halfway(house):
    """A recording, a replay that has begun to play it, and who hears that."""
    recording = await house.enter("h1")
    client = Client()
    playing = asyncio.create_task(house.play(await house.enter("h2"), client))
    recording.begin(HEADERS)
    recording.write(b"data: 1\n\n")
    await until(lambda: client.text, poll_s=0)
    return recording, playing, client


async def test_a_stream_that_failed_halfway_ends_in_an_error_for_all(house):
    recording, playing, client = await halfway(house)
    recording.conclude(complete=False)
    await asyncio.wait_for(playing, 5)
    assert b'"code":"upstream_error"' in client.text
    assert client.exchange.code == "upstream_error"
    assert (client.finished, b"[DONE]" not in client.text) == (True, True)


async def test_a_stream_that_ended_in_an_error_ends_in_the_same_one_for_all(house):
    recording, playing, client = await halfway(house)
    recording.write(error_event(insufficient_credits("Credit ran out."), "r1"))
    recording.finish()
    recording.conclude(complete=False)
    await asyncio.wait_for(playing, 5)
    assert (client.text, client.finished) == (house.client.text, True)
    assert client.exchange.code == "insufficient_credits"


async def test_a_replay_that_is_interrupted_ends_in_an_error(house):
    recording, playing, client = await halfway(house)
    playing.cancel()
    await asyncio.wait([playing])
    assert (b'"code":"overloaded"' in client.text, client.finished) == (True, True)
    assert client.exchange.code == "overloaded"
    recording.conclude(complete=True)


async def test_a_replay_whose_store_is_lost_halfway_ends_in_an_error(house):
    recording, playing, client = await halfway(house)
    house.store.is_lost = True
    assert await asyncio.wait_for(playing, 5) is None
    assert (client.text[:9], client.finished) == (b"data: 1\n\n", True)
    assert b'"ledger_unavailable"' in client.text
    house.store.is_lost = False
    recording.conclude(complete=True)


@pytest.mark.parametrize("loss", ["store", "record"])
async def test_a_replay_that_has_all_of_a_stream_needs_no_more(house, loss):
    recording, playing, client = await halfway(house)
    recording.write(b": x-mesh-cost=0.01\n\ndata: [DONE]\n\n")
    await until(lambda: client.text.endswith(b"data: [DONE]\n\n"), poll_s=0)
    house.store.is_lost = loss == "store"
    recording.conclude(complete=loss == "store")
    await asyncio.wait_for(playing, 5)
    assert (client.text, client.finished) == (house.client.text, True)


async def test_an_answer_too_large_is_passed_on_and_not_kept(house):
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    for _ in range(3):
        recording.write(b"x" * 400)
    await house.tasks.finish(5)
    with pytest.raises(GatewayError) as caught:
        await house.enter("h2")
    assert (caught.value.response.status, len(house.client.text)) == (409, 1200)
    recording.conclude(complete=True)
    await house.tasks.finish(5)
    with pytest.raises(GatewayError):
        await house.enter("h3")


async def test_a_large_one_that_fails_leaves_the_key_free(house):
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    recording.write(b"x" * 1001)
    recording.conclude(complete=False)
    await house.tasks.finish(5)
    assert isinstance(await house.enter("h2"), Recording)


async def test_keeping_it_alive_does_not_bring_back_what_was_lost(house):
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    recording.write(b"x" * 1001)
    await house.tasks.finish(5)
    await recording.keep_alive()
    with pytest.raises(GatewayError):
        await house.enter("h2")


@pytest.mark.parametrize("loss", ["before", "after"])
async def test_an_answer_with_a_hole_in_it_is_never_replayed(house, loss):
    """Redis is lost while a part is on its way: whether it has the part or not, nobody gets an answer without it."""
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    await house.tasks.finish(5)
    if loss == "before":
        house.store.is_lost = True
    else:
        house.store.loses_replies_of = "append"
    recording.write(b"data: 1\n\n")
    await turns(20)
    house.store.is_lost = False
    recording.write(b"data: 2\n\n")
    recording.conclude(complete=True)
    await house.tasks.finish(5)
    with pytest.raises(GatewayError) as caught:
        await house.enter("h2")
    assert caught.value.response.status == 409
    assert house.client.text == b"data: 1\n\ndata: 2\n\n"


async def test_the_end_is_told_when_redis_is_back(house):
    """Else the record would end, and a repeat would be charged again."""
    recording = await house.enter("h1")
    recording.reply(Reply(200, [], b"{}"))
    await house.tasks.finish(5)
    house.store.is_lost = True
    recording.conclude(complete=True)
    await turns(20)
    house.store.is_lost = False
    await house.tasks.finish(5)
    assert (await house.play(await house.enter("h2"))).body == b"{}"


async def test_a_running_answer_with_a_hole_is_not_replayed_after_a_long_outage(house):
    """Its record lasts as long without Redis: a repeat would get the part before the hole, and an error."""
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    await house.tasks.finish(5)
    house.store.is_lost = True
    recording.write(b"data: 1\n\n")
    await until(lambda: house.store.asked["conclude"] >= 100, poll_s=0)
    house.store.is_lost = False
    await house.tasks.finish(5)
    with pytest.raises(GatewayError) as caught:
        await house.enter("h2")
    assert caught.value.response.status == 409


async def test_an_answer_whose_first_parts_have_expired_is_not_replayed(house):
    """Redis was lost for longer than a record lives, while the provider was silent."""
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    await house.tasks.finish(5)
    await house.store.execute("FLUSHALL")
    recording.write(b"data: 1\n\n")
    await house.tasks.finish(5)
    assert await house.store.execute("KEYS", "*replay-parts*") == []
    await house.store.execute("HSET", recording.record, "owner", "h1", "state", "charged", "charged_ms", "0")  # settled
    recording.conclude(complete=True)
    await house.tasks.finish(5)
    with pytest.raises(GatewayError) as caught:
        await house.enter("h2")
    assert caught.value.response.status == 409


async def test_a_repeat_that_reads_along_when_a_part_is_lost_gets_the_conflict(house):
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    await house.tasks.finish(5)
    client = Client()
    playing = asyncio.create_task(house.play(await house.enter("h2"), client))
    await until(lambda: client.headers, poll_s=0)
    house.store.loses_replies_of = "append"
    recording.write(b"data: 1\n\n")
    await playing
    assert json.loads(client.text.split(b"data: ")[-1])["error"]["code"] == "idempotency_conflict"


async def test_a_repeat_of_an_answer_that_is_gone_though_its_record_is_not_gets_the_conflict(house):
    recording = await house.enter("h1")
    recording.begin(HEADERS)
    recording.conclude(complete=True)
    await house.tasks.finish(5)
    first = await house.enter("h2")
    await house.store.execute("DEL", Replays.claim_by(PRINCIPAL.account.name, PRINCIPAL.key.id, "once", "h1").parts)
    with pytest.raises(GatewayError) as caught:
        await house.play(first, Client())
    assert caught.value.response.code == "idempotency_conflict"


async def test_after_a_while_it_is_told_no_more(house):
    recording = await house.enter("h1", running_ttl_ms=10)
    house.store.is_lost = True
    recording.conclude(complete=True)
    assert await house.tasks.finish(5) == 0


async def test_a_claim_whose_client_has_gone_leaves_the_key_free(store_server):
    """However far the claim had come when the handler was cancelled: on a real server, where commands keep their order."""
    store = await connect(config.Redis(url=store_server))
    house = House(store, Tasks())
    for steps in range(200):
        name = f"once-{steps}"
        entering = asyncio.create_task(house.enter(f"h{steps}", name=name))
        await turns(steps)
        came_through = not entering.cancel()
        await asyncio.wait([entering])
        await house.tasks.finish(5)
        if came_through:
            break
        assert isinstance(await house.enter("another", name=name), Recording), steps
    assert came_through
    await store.close()


async def test_a_reader_hears_that_the_record_is_gone(house):
    await house.enter("h1")
    replay = await house.enter("h2")
    assert isinstance(replay, Replay)
    await house.store.execute("FLUSHALL")
    with pytest.raises(LookupError):
        await house.play(replay)


async def test_one_reader_serves_all_that_wait_and_the_store_is_asked_once(house):
    recording = await house.enter("h1")
    before = house.store.asked["claim"]
    playing = [asyncio.create_task(house.play(await house.enter(f"w{number}"))) for number in range(3)]
    await turns(1)
    playing += [asyncio.create_task(house.play(await house.enter(f"x{number}"))) for number in range(50)]
    recording.reply(Reply(200, [], b"{}"))
    recording.conclude(complete=True)
    replies = await asyncio.gather(*playing)
    assert [reply.body for reply in replies] == [b"{}"] * 53
    assert house.store.asked["claim"] - before <= 3


async def test_another_body_is_a_conflict_while_others_wait(house):
    recording = await house.enter("h1")
    playing = asyncio.create_task(house.play(await house.enter("h2")))
    await turns(1)
    with pytest.raises(GatewayError) as caught:
        await house.enter("h3", body=b"[]")
    assert caught.value.response.status == 409
    recording.reply(Reply(200, [], b"{}"))
    recording.conclude(complete=True)
    await playing


async def test_as_many_of_an_account_wait_as_may(house):
    recording = await house.enter("h1")
    playing = asyncio.create_task(house.play(await house.enter("h2")))
    await turns(1)
    replay = await house.enter("h3")
    with pytest.raises(GatewayError) as caught:
        await house.play(replay, most_waiting=1)
    assert (caught.value.response.status, caught.value.response.code) == (429, "rate_limit_exceeded")
    recording.reply(Reply(200, [], b"{}"))
    recording.conclude(complete=True)
    await playing
