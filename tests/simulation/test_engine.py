"""The machine room does what an operating system, a network and Redis do: each test is a story, told with several seeds."""

import asyncio
import os
import random
import socket
import struct
import time
import uuid

import pytest
from fakeredis._helpers import SimpleError, SimpleString

from simulation import commands
from simulation.loop import SimLoop, Stuck
from simulation.run import World, run
from simulation.store import OOM, READONLY, Fate, Store

SEEDS = range(20)
BIG = bytes(range(256)) * 2_000
WRITTEN = "/simulated/file"


def played(story, seed=1):
    """What a story returned; what it raised is raised."""
    outcome = run(seed, story)
    if outcome.failure is not None:
        raise outcome.failure
    return outcome.result


async def open_pair(world: World, port: int = 80, limit: int = 1 << 16):
    """The streams of a client (of the world) and of a server (a process of its own)."""
    accepted: asyncio.Future = asyncio.get_running_loop().create_future()
    process = world.process("server")

    async def serve() -> None:
        async def keep(*streams: object) -> None:
            accepted.set_result(streams)

        await asyncio.start_server(keep, "server", port, limit=limit)

    await world.spawn(process, serve())
    reader, writer = await asyncio.open_connection("server", port)
    return (reader, writer), await accepted, process


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_arrive_whole_and_in_order(seed):
    async def story(world):
        (_, writer), (reader, _), _ = await open_pair(world)
        for at in range(0, len(BIG), 7_001):
            writer.write(BIG[at : at + 7_001])
            await asyncio.sleep(world.rng.random() / 1000)
        writer.write_eof()
        return await reader.read(-1)

    assert played(story, seed) == BIG


def test_reads_join_and_split_writes():
    class Sizes(asyncio.Protocol):
        def __init__(self):
            self.sizes = set()

        def data_received(self, data):
            self.sizes.add(len(data))

    async def story(world):
        sizes = Sizes()
        await world.loop.create_server(lambda: sizes, "server", 80)
        _, writer = await asyncio.open_connection("server", 80)
        for _ in range(200):
            writer.write(bytes(500))
            await asyncio.sleep(0.000_1)
        await asyncio.sleep(1)
        return sizes.sizes

    assert any(size % 500 for size in played(story))


def test_a_reader_that_stops_stops_its_writer():
    async def story(world):
        (_, writer), (reader, _), _ = await open_pair(world)
        writer.write(bytes(1 << 20))
        draining = asyncio.ensure_future(writer.drain())
        await asyncio.sleep(10)
        stalled = not draining.done()
        left = 1 << 20
        while left:
            left -= len(await reader.read(left))
        await draining
        return stalled

    assert played(story)


def test_an_end_that_is_half_closed_still_receives():
    async def story(world):
        (reader, writer), (theirs, answer), _ = await open_pair(world)
        writer.write(b"question")
        writer.write_eof()
        asked = await theirs.read(-1)
        answer.write(b"answer")
        answer.close()
        return asked, await reader.read(-1)

    assert played(story) == (b"question", b"answer")


def test_an_end_closed_with_unread_bytes_resets_the_other():
    async def story(world):
        (reader, writer), (_, theirs), _ = await open_pair(world)
        theirs.transport.pause_reading()
        writer.write(b"x")
        await asyncio.sleep(1)
        theirs.transport.abort()
        await reader.read(-1)

    with pytest.raises(ConnectionResetError):
        played(story)


def test_so_linger_of_0_resets():
    async def story(world):
        (reader, _writer), (_, theirs), _ = await open_pair(world)
        sock = theirs.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.transport.abort()
        await reader.read(-1)

    with pytest.raises(ConnectionResetError):
        played(story)


def test_a_link_is_cut_at_its_byte():
    async def story(world):
        world.network.on_link = lambda link: link.cut_after.update(to_server=1_000)
        (_, writer), (reader, _), process = await open_pair(world)
        writer.write(bytes(5_000))
        try:
            return len(await world.spawn(process, reader.readexactly(5_000)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return len(reader._buffer)  # noqa: SLF001 - what came before the cut can't be read any more

    assert played(story) == 1_000


def test_nobody_listening_refuses():
    with pytest.raises(ConnectionRefusedError):
        played(lambda _: asyncio.open_connection("127.0.0.1", 1))


def test_an_unknown_name_is_not_found():
    with pytest.raises(socket.gaierror):
        played(lambda _: asyncio.open_connection("nowhere", 1))


def test_a_black_hole_says_nothing():
    async def story(world):
        world.network.black_holes.add(("10.9.9.9", 1))
        async with asyncio.timeout(60):
            await asyncio.open_connection("10.9.9.9", 1)

    with pytest.raises(TimeoutError):
        played(story)


def test_a_killed_process_runs_no_finally():
    async def story(world):
        done = []

        async def wait() -> None:
            try:
                await asyncio.sleep(1)
            finally:
                done.append("finally")

        process = world.process("victim")
        world.spawn(process, wait())
        await asyncio.sleep(0.5)
        world.kill(process)
        await asyncio.sleep(5)
        return tuple(done)

    assert played(story) == ()


def test_a_killed_process_s_peers_see_the_end():
    async def story(world):
        (reader, _writer), _, process = await open_pair(world)
        world.kill(process)
        return await reader.read(-1)

    assert played(story) == b""


def test_a_killed_process_listens_no_more():
    async def story(world):
        _, _, process = await open_pair(world)
        world.kill(process)
        await asyncio.open_connection("server", 80)

    with pytest.raises(ConnectionRefusedError):
        played(story)


def test_a_process_killed_in_a_write_leaves_a_part_of_it_at_times():
    async def story(world):
        async def write() -> None:
            fd = os.open(WRITTEN, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            await asyncio.to_thread(os.write, fd, b"0123456789")
            await asyncio.sleep(9)

        process = world.process("victim")
        world.spawn(process, write())
        await asyncio.sleep(0.000_2 * world.rng.random())
        world.kill(process)
        return len(world.disk.files[WRITTEN].data) if WRITTEN in world.disk.files else 0

    assert {0, 10} < {played(story, seed) for seed in range(60)}


def test_a_full_disk_takes_what_fits():
    async def story(world):
        world.disk.room = 4
        fd = os.open(WRITTEN, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        return os.write(fd, b"0123456789")

    assert played(story) == 4


def test_an_hour_passes_at_once():
    async def story(_world):
        began_at = time.time(), time.monotonic()
        await asyncio.sleep(3600)
        return [round(now - then) for now, then in zip((time.time(), time.monotonic()), began_at, strict=True)]

    assert played(story) == [3600, 3600]


def test_entropy_is_the_seed_s():
    async def story(_world):
        return str(uuid.uuid4()), random.random(), os.urandom(4)

    found = [played(story, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))


def test_clocks_and_sockets_are_put_back():
    before = time.time, time.monotonic, socket.socket, os.urandom, os.open, random.getstate()
    played(lambda _: asyncio.sleep(1))
    assert before == (time.time, time.monotonic, socket.socket, os.urandom, os.open, random.getstate())


def test_work_in_a_thread_takes_virtual_time():
    async def story(world):
        began_at = world.now
        found = await asyncio.to_thread(sum, (1, 2))
        return found, world.now > began_at

    assert played(story) == (3, True)


def test_a_story_that_can_not_go_on_is_stuck():
    with pytest.raises(Stuck):
        played(lambda _: asyncio.get_running_loop().create_future())


async def ask(*words):
    """The answer of the store, over the network, encoded."""
    reader, writer = await asyncio.open_connection("store", 6379)
    told = [word.encode() for word in words]
    writer.write(b"*%d\r\n" % len(told) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in told))
    writer.write_eof()
    try:
        return await reader.read(-1)
    except ConnectionError as error:
        return type(error)
    finally:
        writer.close()


WRITE = "redis.call('SET', KEYS[1], ARGV[1]) return 1"
FREE_AND_WRITE = "redis.call('DEL', KEYS[1]) redis.call('SET', KEYS[1], ARGV[1]) return 1"
WRITE_SHA = "9f1d5b1a1f5ad0d0b0a5c0f8c1c2f1d3b2b2b2b2"
STORE_CASES = {
    "a script's number": (("EVAL", "return {1, 'a', false, 2.9}", "0"), b"*4\r\n:1\r\n$1\r\na\r\n$-1\r\n:2\r\n"),
    "an unknown script": (("EVALSHA", WRITE_SHA, "0"), b"-NOSCRIPT No matching script. Please use EVAL.\r\n"),
    "an error of a script": (("EVAL", "return redis.error_reply('OH no')", "0"), b"-OH no\r\n"),
    "a status": (("PING",), b"+PONG\r\n"),
}


@pytest.mark.parametrize("name", STORE_CASES)
def test_the_store_answers(name):
    words, expected = STORE_CASES[name]
    assert played(lambda _: ask(*words)) == expected


@pytest.mark.parametrize(
    ("refusal", "script", "expected"),
    [
        (OOM, WRITE, f"-{OOM}\r\n".encode()),
        (OOM, FREE_AND_WRITE, b":1\r\n"),
        (READONLY, FREE_AND_WRITE, f"-{READONLY}\r\n".encode()),
    ],
)
def test_a_store_that_refuses_writes(refusal, script, expected):
    async def story(world):
        world.store.refusal = refusal
        return await ask("EVAL", script, "1", "k", "v")

    assert played(story) == expected


@pytest.mark.parametrize(
    ("fate", "expected", "kept"),
    [
        (Fate.DROP_BEFORE, ConnectionResetError, None),
        (Fate.DROP_AFTER, ConnectionResetError, b"v"),
        (Fate.LOSE_REPLY, b"", b"v"),
    ],
)
def test_a_command_s_fate(fate, expected, kept):
    async def story(world):
        world.store.on_command = lambda fields: fate if fields[0] == b"SET" else Fate.RUN
        return await ask("SET", "k", "v"), world.store.ask("GET", "k")

    assert played(story) == (expected, kept)


def test_a_failover_loses_the_last_second():
    async def story(world):
        world.store.keeps_replica = True
        await ask("SET", "old", "v")
        await asyncio.sleep(3)
        await ask("SET", "new", "v")
        world.store.fail_over()
        return world.store.ask("GET", "old"), world.store.ask("GET", "new")

    assert played(story) == (b"v", None)


def test_what_expires_is_gone_when_its_time_has_come():
    async def story(world):
        await ask("SET", "k", "v", "EX", "10")
        await asyncio.sleep(5)
        before = world.store.ask("GET", "k")
        await asyncio.sleep(6)
        return before, world.store.ask("GET", "k")

    assert played(story) == (b"v", None)


def test_the_store_s_clock_jumps():
    async def story(world):
        before = int((await ask("TIME")).split()[2])
        world.store.jump(-100)
        return before - int((await ask("TIME")).split()[2])

    assert played(story) in range(90, 101)


def test_a_store_that_is_down_refuses_and_comes_back():
    async def story(world):
        world.store.go_down()
        try:
            down = await ask("PING")
        except ConnectionRefusedError as error:
            down = type(error)
        world.store.come_back()
        await asyncio.sleep(1)
        return down, await ask("PING")

    assert played(story) == (ConnectionRefusedError, b"+PONG\r\n")


def test_an_outside_question_s_error_is_raised():
    async def story(world):
        world.store.ask("HGETALL", "k") or world.store.ask("NOTHING")

    with pytest.raises((ValueError, SimpleError)):
        played(story)


FIELDS, NUMBERS = (
    (b"a", b"b", b"7"),
    (b"0", b"1", b"-3", b"007", b"-0", b"x", b"9007199254740993", b"-9223372036854775808"),
)
WORDS = {  # of each command after its key
    **dict.fromkeys(("GET", "HGETALL", "HKEYS", "HLEN", "ZCARD", "PTTL"), ()),
    **dict.fromkeys(("HGET", "HEXISTS", "HDEL", "ZREM"), (FIELDS,)),
    **dict.fromkeys(("HMGET",), (FIELDS, FIELDS)),
    "HSET": (FIELDS, NUMBERS, FIELDS, NUMBERS),
    "HINCRBY": (FIELDS, NUMBERS),
    "ZADD": (NUMBERS, FIELDS),
    "ZRANGEBYSCORE": ((b"-inf", b"0"), NUMBERS, (b"LIMIT",), (b"0", b"1"), (b"1", b"-1")),
    "ZREMRANGEBYSCORE": ((b"-inf", b"(1"), NUMBERS),
    "EXISTS": ((b"h1", b"z1"),),
    "PEXPIRE": (NUMBERS,),
    "EXPIRE": (NUMBERS,),
    "SET": (FIELDS, (b"", b"NX", b"XX")),
    "KEYS": ((b"*", b"h*", b"?1", b"[hz]*"),),
    "XADD": ((b"*", b"1-1"), FIELDS, NUMBERS),
    "XRANGE": ((b"-", b"1-1", b"1-2"), (b"+", b"1-1", b"1-2")),
}
ECHO = b"return redis.call(unpack(ARGV))"


@pytest.mark.parametrize("is_script", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_quick_commands_do_what_fakeredis_does(seed, is_script, monkeypatch):
    def replies(is_quick):
        if not is_quick:
            monkeypatch.setattr("simulation.store.READING", {})
            monkeypatch.setattr("simulation.store.WRITING", {})
        rng = random.Random(seed)
        loop = SimLoop(random.Random(seed), max_turns=1)
        store = Store(loop)
        monkeypatch.setattr(time, "time", loop.wall)
        for _ in range(1_500):
            name = rng.choice(sorted(WORDS))
            key = rng.choice((b"h1", b"h2", b"z1", b"z2", b"s1", b"x1"))
            after = [word for word in map(rng.choice, WORDS[name]) if word]
            words = [name.encode(), *([key] if name != "KEYS" else []), *after]
            loop.now += rng.choice((0.0, 0.001, 2.0))
            reply = store.run(store.client, [b"EVAL", ECHO, b"0", *words] if is_script else words)
            yield words, reply.value if isinstance(reply, (SimpleError, SimpleString)) else reply
        yield "the end", {key: store.ask("TYPE", key).value for key in sorted(store.ask("KEYS", "*"))}
        loop.dispose()
        store.put_away()

    assert list(replies(is_quick=True)) == list(replies(is_quick=False))


def test_every_quick_command_is_compared():
    assert {name.decode() for name in commands.READING | commands.WRITING} - {"TIME"} <= set(WORDS)
