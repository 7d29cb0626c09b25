"""Commands and replies stay in step, and trouble comes as one of two exceptions, soon."""

import asyncio
import gc
import os
import signal
import socket

import pytest
from redis.asyncio import UnixDomainSocketConnection

from meshproxy.config import ConfigError, Redis
from meshproxy.errors import GatewayError, Source
from meshproxy.ledger import link as link_module
from meshproxy.ledger.connection import StoreError, Unavailable, connect
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.link import BACKOFF_MAX_S, BACKOFF_MIN_S, RedisConnection, jittered_backoff_s
from meshproxy.ledger.store import NOTHING, Script, ScriptCall
from tests.harness.waiting import turns, until

DOUBLE = Script.of("double", "redis.call('INCR', KEYS[1]) return 2 * ARGV[1]")


@pytest.fixture
async def server():
    async with Embedded() as server:
        yield server


async def demand_password(server, password):
    store = await connect(Redis(url=server.url))
    await store.execute("CONFIG", "SET", "requirepass", password)
    await store.close()


class Recorder:
    """A transport that keeps what is written, each write by itself."""

    def __init__(self):
        self.writes = []
        self.aborted = False

    def write(self, data):
        self.writes.append(data)

    def abort(self):
        self.aborted = True


@pytest.fixture
async def wire():
    """A link and what it writes; the test plays the server."""
    link, transport = RedisConnection(timeout_s=5), Recorder()
    link.connection_made(transport)
    yield link, transport
    link.lose("closed", "the test is over")


async def test_replies_of_every_kind(store):
    assert await store.execute("SET", "key", "väl") == b"OK"
    assert await store.execute("GET", "key") == "väl".encode()
    assert await store.execute("GET", "nothing") is None
    assert await store.execute("INCRBY", "n", 7) == 7
    assert await store.execute("HSET", "hash", "a", b"\x00\xff") == 1
    assert await store.execute("HGETALL", "hash") == [b"a", b"\x00\xff"]
    assert await store.execute("SMEMBERS", "set") == []


async def test_a_bug_is_no_unavailability(store):
    await store.execute("SET", "text", "x")
    with pytest.raises(StoreError) as caught:
        await store.execute("INCR", "text")
    assert caught.value.kind == "ERR"
    with pytest.raises(StoreError) as caught:
        await store.execute("HGET", "text", "x")
    assert caught.value.kind == "WRONGTYPE"


async def test_a_script_runs_whether_the_server_knows_it_or_not(store):
    assert await store.run(DOUBLE, ["runs"], [21]) == 42
    await store.execute("SCRIPT", "FLUSH")
    assert await store.run(DOUBLE, ["runs"], [21]) == 42
    assert await store.run(DOUBLE, ["runs"], [21]) == 42
    assert await store.execute("GET", "runs") == b"3"


async def test_commands_of_one_turn_share_a_write(wire):
    link, transport = wire
    asked = [link.send("GET", ("GET", name)) for name in "abc"]
    assert transport.writes == []
    await turns(1)
    assert transport.writes == [b"".join(b"*2\r\n$3\r\nGET\r\n$1\r\n%c\r\n" % name for name in b"abc")]
    link.data_received(b"$1\r\n1\r\n$1\r\n2\r\n$1\r\n3\r\n")
    assert [await future for future in asked] == [b"1", b"2", b"3"]


async def test_a_script_that_nobody_waits_for_is_not_sent_again(wire):
    link, transport = wire
    two = Script.of("two", "return 2")
    calls = (ScriptCall(b"packed", two, 0, NOTHING, (name,), NOTHING) for name in "ab")
    abandoned, waited_for = (link.send("two", call) for call in calls)
    await turns(1)
    abandoned.cancel()
    link.data_received(b"-NOSCRIPT none\r\n-NOSCRIPT none\r\n")
    await turns(1)
    assert transport.writes[1:] == [b"*4\r\n$4\r\nEVAL\r\n$8\r\nreturn 2\r\n$1\r\n0\r\n$1\r\nb\r\n"]
    link.data_received(b":2\r\n")
    assert await waited_for == 2


async def test_many_turns_may_be_in_flight(wire):
    link, transport = wire
    first = link.send("GET", ("GET", "a"))
    await turns(1)
    second = link.send("GET", ("GET", "b"))
    await turns(1)
    assert len(transport.writes) == 2
    link.data_received(b":1\r\n:2\r\n")
    assert (await first, await second) == (1, 2)


@pytest.mark.parametrize("cut", range(1, 25))
async def test_a_reply_may_come_in_pieces(wire, cut):
    link, _ = wire
    asked = [link.send("X", ("X",)) for _ in range(3)]
    replies = b"*2\r\n:1\r\n$-1\r\n$2\r\nab\r\n+OK\r\n"
    link.data_received(replies[:cut])
    link.data_received(replies[cut:])
    assert [await future for future in asked] == [[1, None], b"ab", b"OK"]


async def test_the_reply_of_a_cancelled_waiter_is_not_the_next_ones(wire):
    link, _ = wire
    first, second = link.send("GET", ("GET", "a")), link.send("GET", ("GET", "b"))
    first.cancel()
    link.data_received(b":1\r\n")
    assert not second.done()
    link.data_received(b":2\r\n")
    assert await second == 2


async def test_cancelled_waiters_on_a_real_server(server_store):
    await server_store.execute("MSET", *(part for n in range(100) for part in (f"k{n}", n)))

    async def read(n):
        return int(await server_store.execute("GET", f"k{n}"))

    tasks = [asyncio.create_task(read(n)) for n in range(100)]
    await turns(1)
    for task in tasks[::3]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [n for n in range(100) if n % 3] == [r for r in results if isinstance(r, int)]


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("loading", b"-LOADING Redis is loading the dataset in memory\r\n"),
        ("busy", b"-BUSY Redis is busy running a script\r\n"),
        ("oom", b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"),
        ("clusterdown", b"-CLUSTERDOWN Hash slot not served\r\n"),
        ("masterdown", b"-MASTERDOWN Link with MASTER is down\r\n"),
        ("noreplicas", b"-NOREPLICAS Not enough good replicas to write.\r\n"),
        ("tryagain", b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"),
        ("misconf", b"-MISCONF Redis is configured to save RDB snapshots\r\n"),
    ],
)
async def test_what_will_pass_is_unavailable(wire, kind, reply):
    link, transport = wire
    asked = link.send("GET", ("GET", "a"))
    link.data_received(reply)
    with pytest.raises(GatewayError) as caught:
        await asked
    response = caught.value.response
    assert (response.status, response.code, caught.value.kind) == (503, "ledger_unavailable", kind)
    assert caught.value.source is Source.GATEWAY
    assert not transport.aborted


async def test_a_replica_is_left_with_everything_pending(wire):
    link, transport = wire
    asked = [link.send("SET", ("SET", "a", "1")) for _ in range(3)]
    link.data_received(b"-READONLY You can't write against a read only replica.\r\n+OK\r\n")
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [r.kind for r in results] == ["readonly"] * 3
    assert transport.aborted


async def test_an_answer_that_nobody_asked_for_ends_the_link(wire):
    link, transport = wire
    link.data_received(b"+OK\r\n")
    assert (transport.aborted, link.lost.kind) == (True, "protocol")


async def test_nonsense_ends_the_link(wire):
    link, transport = wire
    asked = link.send("GET", ("GET", "a"))
    link.data_received(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(Unavailable) as caught:
        await asked
    assert (transport.aborted, caught.value.kind) == (True, "protocol")


async def test_pending_commands_are_bounded(wire, monkeypatch):
    monkeypatch.setattr(link_module, "MAX_PENDING", 2)
    link, _ = wire
    kept = [link.send("GET", ("GET", name)) for name in "ab"]
    with pytest.raises(Unavailable) as caught:
        await link.send("GET", ("GET", "c"))
    assert caught.value.kind == "overflow"
    link.data_received(b":1\r\n:2\r\n")
    assert [await future for future in kept] == [1, 2]


async def test_metrics_are_told_of_commands_that_are_not_sent(server, monkeypatch):
    told = []
    store = await connect(Redis(url=server.url), on_op=lambda *op: told.append(op))
    monkeypatch.setattr(link_module, "MAX_PENDING", 1)
    answered = store.execute("GET", "a")
    overflown = store.execute("GET", "b")
    await asyncio.gather(answered, overflown, return_exceptions=True)
    await store.close()
    await asyncio.gather(store.execute("GET", "c"), return_exceptions=True)
    kinds = [(seconds is None, kind) for op, seconds, kind in told if op == "GET"]
    assert kinds == [(True, "overflow"), (False, None), (True, "disconnected")]


async def test_a_bad_argument_leaves_the_queue_alone(wire):
    link, transport = wire
    with pytest.raises(TypeError):
        link.send("SET", ("SET", "a", object()))
    asked = link.send("GET", ("GET", "a"))
    await turns(1)
    link.data_received(b":1\r\n")
    assert (await asked, len(transport.writes)) == (1, 1)


async def test_finish_waits_for_what_is_pending(wire):
    link, transport = wire
    asked = link.send("GET", ("GET", "a"))
    link.finish()
    assert not transport.aborted
    link.data_received(b":1\r\n")
    assert (await asked, transport.aborted) == (1, True)


async def test_metrics_are_told_of_every_command(server):
    told = []
    store = await connect(Redis(url=server.url), on_op=lambda *op: told.append(op))
    told.clear()
    await store.execute("SET", "x", "text")
    with pytest.raises(StoreError):
        await store.execute("INCR", "x")
    await store.run(DOUBLE, ["runs"], [1])
    await store.close()
    assert [(t[0], t[2]) for t in told] == [("SET", None), ("INCR", "error"), ("double", "noscript"), ("double", None)]
    assert all(0 <= seconds < 1 for _, seconds, _ in told)


async def test_a_server_that_dies_fails_what_is_pending_and_recovers(tmp_path):
    server = Embedded("--appendonly", "yes", "--dir", str(tmp_path))
    await server.start()
    store = await connect(Redis(url=server.url, timeout_s=5))
    await store.execute("SET", "x", 1)
    paused = server.process.pid
    os.kill(paused, signal.SIGSTOP)
    pending = [store.execute("INCR", "x") for _ in range(50)]
    await turns(1)
    os.kill(paused, signal.SIGKILL)
    results = await asyncio.gather(*pending, return_exceptions=True)
    assert [r.kind for r in results] == ["connection"] * 50
    assert not store.connected
    with pytest.raises(Unavailable):
        await store.execute("GET", "x")
    await server.launch()
    await until(lambda: store.connected)
    assert await store.execute("GET", "x") == b"1"
    await store.close()
    await server.stop()


async def test_a_server_that_says_nothing_is_given_up_at_the_deadline(server):
    store = await connect(Redis(url=server.url, timeout_s=0.05))
    await store.execute("CLIENT", "PAUSE", 1000)
    started = asyncio.get_running_loop().time()
    results = await asyncio.gather(*(store.execute("GET", "x") for _ in range(3)), return_exceptions=True)
    waited = asyncio.get_running_loop().time() - started
    assert [r.kind for r in results] == ["timeout"] * 3
    assert 0.04 <= waited < 1
    await until(lambda: store.connected)
    assert await store.execute("GET", "x") is None
    await store.close()


async def test_a_demoted_master_is_dialled_anew(server):
    store = await connect(Redis(url=server.url))
    admin = await connect(Redis(url=server.url))
    await admin.execute("REPLICAOF", "127.0.0.1", 1)
    with pytest.raises(Unavailable) as caught:
        await store.execute("SET", "x", 1)
    assert caught.value.kind == "readonly"
    await admin.execute("REPLICAOF", "NO", "ONE")
    await until(lambda: store.connected)
    assert await store.execute("SET", "x", 1) == b"OK"
    await store.close()
    await admin.close()


async def test_a_full_server_is_unavailable(server):
    store = await connect(Redis(url=server.url))
    await store.execute("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(Unavailable) as caught:
        await store.run(DOUBLE, ["x"], [1])
    assert caught.value.kind == "oom"
    await store.close()


async def test_a_database_and_a_password(tmp_path):
    async with Embedded() as server:
        path = server.url.removeprefix("unix://")
        await demand_password(server, "geh/eim")
        store = await connect(Redis(url=f"unix://:geh%2Feim@{path}?db=3"))
        await store.execute("SET", "x", 1)
        assert b"db=3" in await store.execute("CLIENT", "INFO")
        assert b"name=meshproxy" in await store.execute("CLIENT", "INFO")
        await store.close()


async def test_a_wrong_password_is_told_without_it(caplog):
    async with Embedded() as server:
        await demand_password(server, "right")
        path = server.url.removeprefix("unix://")
        with pytest.raises(Unavailable) as caught:
            await connect(Redis(url=f"unix://:hunter2@{path}"))
    assert "invalid username-password pair" in caught.value.reason
    assert "hunter2" not in caught.value.reason + repr(caught.value) + caplog.text


@pytest.mark.parametrize("scheme", ["redis", "unix"])
async def test_a_server_that_quotes_a_login_is_not_quoted(tmp_path, scheme):
    """Before 6.0 an unknown command's arguments are in the error."""

    async def refuse(reader, writer):
        command = await reader.read(1000)
        quoted = b" ".join(command.split(b"\r\n")[2::2])
        writer.write(b"-ERR unknown command, with args beginning with: %s\r\n" % quoted)
        await reader.read()
        writer.close()

    if scheme == "unix":
        old = await asyncio.start_unix_server(refuse, tmp_path / "old")
        url = f"unix://:hunter2@{tmp_path}/old"
    else:
        old = await asyncio.start_server(refuse, "127.0.0.1", 0)
        url = f"redis://:hunter2@127.0.0.1:{old.sockets[0].getsockname()[1]}"
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=url))
    assert ("refused" in caught.value.reason, "hunter2" in caught.value.reason) == (True, False)
    old.close()
    await old.wait_closed()


async def test_a_user_that_may_not_set_a_name(server):
    store = await connect(Redis(url=server.url))
    await store.execute("ACL", "SETUSER", "bob", "on", ">pw", "~*", "+@all", "-client")
    await store.close()
    named = await connect(Redis(url=server.url.replace("unix://", "unix://bob:pw@")))
    assert await named.execute("ACL", "WHOAMI") == b"bob"
    await named.close()


async def test_a_database_that_the_server_does_not_have(server):
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=server.url + "?db=99"))
    assert "DB index is out of range" in caught.value.reason


async def test_redis_py_hands_its_socket_over(server):
    """By `_writer`, the one private name of redis-py that is used: this test is to fail when redis-py changes it."""
    opened = UnixDomainSocketConnection(path=server.url.removeprefix("unix://"))
    await opened.connect()
    link = RedisConnection(timeout_s=5)
    link.take_over(opened)
    assert not opened.is_connected
    del opened
    gc.collect()
    assert await link.send("PING", ("PING",)) == b"PONG"
    link.lose("closed", "the test is over")


async def test_no_server_is_a_fault_at_once_or_later_as_wished(tmp_path):
    url = f"unix://{tmp_path}/nobody"
    with pytest.raises(Unavailable):
        await connect(Redis(url=url))
    store = await connect(Redis(url=url), wait=False)
    with pytest.raises(Unavailable):
        await store.execute("PING")
    await store.close()


async def test_a_server_that_never_greets_is_given_up():
    async def say_nothing(reader, writer):
        await reader.read()
        writer.close()

    mute = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = mute.sockets[0].getsockname()[1]
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=f"redis://127.0.0.1:{port}", timeout_s=0.05))
    assert "no reply within" in caught.value.reason or "did not answer within" in caught.value.reason
    mute.close()
    await mute.wait_closed()


async def test_a_refused_port_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unavailable) as caught:
        await connect(Redis(url=f"redis://user:hunter2@127.0.0.1:{port}"))
    assert f"127.0.0.1:{port}" in caught.value.reason
    assert "hunter2" not in caught.value.reason


async def test_close_fails_what_is_pending(server):
    store = await connect(Redis(url=server.url))
    pending = store.execute("GET", "x")
    await store.close()
    with pytest.raises(Unavailable):
        await pending
    assert not store.connected


async def test_missing_tls_files_are_told():
    with pytest.raises(ConfigError, match="TLS files"):
        await connect(Redis(url="rediss://127.0.0.1?ca_file=/no/such/file"))


@pytest.mark.parametrize("failures", [1, 2, 6, 1000])
def test_backoff_is_bounded(failures):
    assert BACKOFF_MIN_S / 2 <= jittered_backoff_s(failures) <= BACKOFF_MAX_S
