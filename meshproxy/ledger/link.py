"""The connection to one Redis server: `RedisConnection`, a pipelined socket, and `ReconnectingStore`, which keeps one open.

Commands are pipelined. The commands of one turn of the event loop go out in one write, several writes may be in flight,
and replies resolve futures in the order of the commands (RESP2 has no other order).

The way of a command: `send` packs it and queues its future, the flush at the end of the turn writes it, and
`data_received` parses the reply and resolves the future. A command has no task and no timer of its own: one timer
watches the oldest command. A cancelled future keeps its place in the queue, so that its reply is dropped and not taken
for the next command's.

If the oldest command has no reply by its deadline, the connection is closed and all pending commands fail: replies come
in order, so no later command can be answered sooner. After a long block the event loop runs timers before it reads
sockets, where the reply may wait already. So the connection is closed only after `GRACE_TURNS` more turns of the loop.
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import hiredis
import redis
from redis.asyncio.connection import AbstractConnection

from meshproxy.ledger.store import (
    Command,
    Endpoint,
    OnChange,
    OnOp,
    ScriptCall,
    Store,
    Unavailable,
    error_of_reply,
    kind_of,
)
from meshproxy.units import backoff_s

GRACE_TURNS = 3  # turns of the event loop between a time-out and closing the connection; each reads the socket
GRACE_TURN_S = 0.05
MAX_PENDING = 16_384  # commands without a reply on one socket; a healthy server has some hundreds at most

_NOTHING = object()  # returned by the parser when it needs more bytes

# future, operation name, time it was queued (loop time), command
Pending = tuple["asyncio.Future[Any]", str, float, Command]
Redirect = Callable[[str, Pending], bool]  # a MOVED or ASK reply and its command; True if sent to another server


class RedisConnection(asyncio.Protocol):
    """A connected socket. `on_lost` is called once, after all pending commands have failed."""

    def __init__(self, timeout_s: float, on_op: OnOp | None = None, redirect: Redirect | None = None) -> None:
        self.on_lost: Callable[[RedisConnection], None] | None = None
        self.lost: Unavailable | None = None
        self._timeout_s = timeout_s
        self._on_op = on_op
        self._redirect = redirect
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._pending: deque[Pending] = deque()
        self._outgoing: list[bytes] = []
        self._writer: asyncio.StreamWriter | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._finishing = False
        self._grace_turns_left = GRACE_TURNS

    def send(self, op: str, command: Command) -> "asyncio.Future[Any]":
        """Queue one command and return the future of its reply. The future raises Unavailable or StoreError."""
        if self.lost is not None:
            return failed(Unavailable(self.lost.kind, self.lost.reason, is_sent=False))
        if len(self._pending) >= MAX_PENDING:
            if self._on_op is not None:
                self._on_op(op, None, "overflow")
            reason = f"{MAX_PENDING} commands are waiting for a reply"
            return failed(Unavailable("overflow", reason, is_sent=False))
        packed = command.packed if type(command) is ScriptCall else hiredis.pack_command(command)  # type: ignore[arg-type]
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        future = self._loop.create_future()
        self._outgoing.append(packed)
        self._pending.append((future, op, self._loop.time(), command))
        return future

    def resend(self, pending: Pending, *, asking: bool = False) -> None:
        """Queue a command again that no server has executed, with the same future. `asking`: it was redirected by ASK."""
        if self.lost is not None:
            self._report_op(pending[1], pending[2], self.lost.kind)
            _fail(pending[0], Unavailable(self.lost.kind, self.lost.reason))
            return
        if asking:
            self.send("ASKING", ("ASKING",))
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        command = pending[3]
        packed = command.packed if isinstance(command, ScriptCall) else hiredis.pack_command(command)  # type: ignore[arg-type]
        self._outgoing.append(packed)
        self._pending.append(pending)

    def lose(self, kind: str, reason: str) -> None:
        """Close the socket and fail all pending commands."""
        if self.lost is not None:
            return
        self.lost = Unavailable(kind, reason)
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        pending, self._pending = self._pending, deque()
        self._outgoing = []
        for future, op, queued_at, *_ in pending:
            self._report_op(op, queued_at, kind)
            _fail(future, Unavailable(kind, reason))
        if self.on_lost is not None:
            self.on_lost(self)

    def finish(self) -> None:
        """Close the socket as soon as every pending command is answered."""
        self._finishing = True
        if not self._pending:
            self.lose("closed", "the server isn't needed any more")

    def take_over(self, server: AbstractConnection) -> None:
        """Take the socket of redis-py's connection. Keep its StreamWriter: a garbage-collected one closes its socket."""
        # `_writer` is the only private name of redis-py in use.
        self._writer, server._writer = server._writer, None  # noqa: SLF001 - there is no public way to hand a socket over
        self._writer.transport.set_protocol(self)  # type: ignore[union-attr]
        self.connection_made(self._writer.transport)  # type: ignore[union-attr]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport of the open socket."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail all pending commands: the socket is closed."""
        self.lose("connection", f"the connection was lost ({exc or 'closed by the server'})")

    def data_received(self, data: bytes) -> None:
        """Resolve the futures of all complete replies in the bytes received so far."""
        pending, gets, on_op, now = self._pending, self._reader.gets, self._on_op, self._loop.time()
        self._reader.feed(data)
        try:
            while self.lost is None and (reply := gets()) is not _NOTHING:
                entry = pending.popleft()
                if isinstance(reply, hiredis.ReplyError):
                    self._refused(entry, str(reply))
                    continue
                future = entry[0]
                if not future.done():
                    future.set_result(reply)
                if on_op is not None:
                    on_op(entry[1], now - entry[2], None)
        except (hiredis.ProtocolError, IndexError):
            self.lose("protocol", "the server sent what isn't an answer")
        if self._finishing:
            self.finish()

    def _refused(self, entry: Pending, message: str) -> None:
        if self._redirect is not None and message.startswith(("MOVED ", "ASK ")) and self._redirect(message, entry):
            return
        error = error_of_reply(message)
        future, op, queued_at, command = entry
        self._report_op(op, queued_at, kind_of(error))
        if error.kind == "NOSCRIPT" and isinstance(command, ScriptCall) and not future.done():
            self.resend((future, op, queued_at, command.by_text()))
            return
        _fail(future, error)
        if isinstance(error, Unavailable) and error.kind == "readonly":
            self.lose("readonly", "the server is a replica now")

    def _flush(self) -> None:
        """Write the commands of this turn. Runs once a turn that has some."""
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._transport is not None:
            if self._timer is None:
                self._grace_turns_left = GRACE_TURNS
                self._timer = self._loop.call_later(self._timeout_s, self._check_oldest)
            self._transport.write(outgoing[0] if len(outgoing) == 1 else b"".join(outgoing))

    def _check_oldest(self) -> None:
        """Close the connection if its oldest command is overdue after GRACE_TURNS looks; otherwise re-arm the timer."""
        self._timer = None
        if not self._pending:
            return
        due = self._pending[0][2] + self._timeout_s
        if due > self._loop.time():
            self._grace_turns_left = GRACE_TURNS
            self._timer = self._loop.call_at(due, self._check_oldest)
        elif self._grace_turns_left:
            self._grace_turns_left -= 1
            self._timer = self._loop.call_later(GRACE_TURN_S, self._check_oldest)
        else:
            self.lose("timeout", f"no reply within {self._timeout_s:g} s")

    def _report_op(self, op: str, queued_at: float, kind: str | None) -> None:
        if self._on_op is not None:
            self._on_op(op, self._loop.time() - queued_at, kind)


def failed(error: Exception) -> "asyncio.Future[Any]":
    """Return a future that has failed already."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    _fail(future, error)
    return future


def disconnected(op: str, reason: str, on_op: OnOp | None) -> "asyncio.Future[Any]":
    """Report a command that can't be sent without a connection; return the future that has failed with it."""
    if on_op is not None:
        on_op(op, None, "disconnected")
    return failed(Unavailable("connection", reason, is_sent=False))


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # marks the exception as retrieved, so that asyncio doesn't warn if the waiter is gone


BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 2.0
STEADY_S = 5.0  # a connection that lasted this long resets the backoff
CLIENT_NAME = "meshproxy"

Supervise = Callable[
    [str, Callable[[], Coroutine[Any, Any, None]]], "asyncio.Task[None]"
]  # starts a supervised, named task
Dial = Callable[[], Awaitable[RedisConnection]]


def run_unsupervised(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
    """Run the coroutine in an unsupervised task, for a program that ends soon. The caller keeps the reference."""
    return asyncio.create_task(work(), name=name)


class ReconnectingStore(Store):
    """A Store over one connection, which is dialled again whenever it is lost.

    `dial` finds the server and returns a connection that is ready for commands, or raises Unavailable. `on_change` is
    called with `name` for every connection made or lost, `on_op` for every command refused without one.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        supervise: Supervise = run_unsupervised,
        on_lost: Callable[[], None] | None = None,
        name: str = "",
        on_change: OnChange | None = None,
        on_op: OnOp | None = None,
    ) -> None:
        self.last_error: str | None = None  # the last error; None: connected
        self._dial = dial
        self._supervise = supervise
        self._on_lost = on_lost
        self._name = name
        self._on_change = on_change
        self._on_op = on_op
        self._connection: RedisConnection | None = None
        self._connected_at = 0.0
        self._failures = 0
        self._dial_task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    def send(self, op: str, command: Command) -> "asyncio.Future[Any]":
        """Queue one command, or fail at once without a connection."""
        connection = self._connection
        if connection is None:
            return disconnected(op, self.last_error or "not connected", self._on_op)
        return connection.send(op, command)

    @property
    def connection(self) -> RedisConnection | None:
        """The current connection, if there is one."""
        return self._connection

    async def open(self) -> None:
        """Dial once. Raises Unavailable if that fails."""
        self._adopt(await self._dial())

    def keep_dialling(self) -> None:
        """Dial in the background until there is a connection."""
        if self._dial_task is None and not self._closed:
            self._dial_task = self._supervise("ledger-dial", self._dial_until_connected)

    def retire(self) -> None:
        """Close the connection once every pending command is answered, and stop dialling."""
        self._closed = True
        if self._dial_task is not None:
            self._dial_task.cancel()
        if self._connection is not None:
            self._connection.finish()

    async def close(self) -> None:
        """Close the connection and stop dialling, for good."""
        self._closed = True
        if self._dial_task is not None:
            self._dial_task.cancel()
            await asyncio.wait([self._dial_task])
        if self._connection is not None:
            self._connection.lose("closed", "the store was closed")

    def _adopt(self, connection: RedisConnection) -> None:
        self._connection, self._connected_at, self.last_error = connection, asyncio.get_running_loop().time(), None
        connection.on_lost = self._lost
        self._report_change(is_connected=True)
        if connection.lost is not None:
            self._lost(connection)

    def _lost(self, connection: RedisConnection) -> None:
        """Dial again after a loss. The backoff starts anew if the connection lasted STEADY_S."""
        self._connection = None
        self.last_error = connection.lost.reason if connection.lost is not None else None
        if asyncio.get_running_loop().time() - self._connected_at >= STEADY_S:
            self._failures = 0
        self.keep_dialling()
        if self._closed:
            return
        self._report_change(is_connected=False)
        if self._on_lost is not None:
            self._on_lost()

    def _report_change(self, *, is_connected: bool) -> None:
        if self._on_change is not None:
            self._on_change(self._name, is_connected, self.last_error or "")

    async def _dial_until_connected(self) -> None:
        """Dial, with backoff, until there is a connection."""
        while self._connection is None:
            await asyncio.sleep(jittered_backoff_s(self._failures + 1))
            self._failures += 1
            try:
                connection = await self._dial()
            except Unavailable as error:
                self.last_error = error.reason
            else:
                self._dial_task = None
                self._adopt(connection)
                return


def jittered_backoff_s(failures: int) -> float:
    """Return the pause before the next attempt, random so that workers spread out."""
    return backoff_s(failures, BACKOFF_MIN_S, BACKOFF_MAX_S) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter is no secret


async def dial(
    endpoint: Endpoint, server: AbstractConnection, make: Callable[[], RedisConnection], *, master: bool = False
) -> RedisConnection:
    """Check that a server answers, and return a link that has taken over the socket which redis-py opened.

    `master`: a replica won't do. Raises Unavailable.
    """
    async with opened(endpoint, server):
        with suppress(redis.ResponseError):  # a name is a courtesy: some users may not set one
            await query(server, "CLIENT", "SETNAME", CLIENT_NAME)
        await query(server, "PING")
        if master and (await query(server, "ROLE"))[0] != b"master":
            raise redis.ConnectionError("the server is a replica")
        connection = make()
        connection.take_over(server)
    return connection


@asynccontextmanager
async def opened(endpoint: Endpoint, server: AbstractConnection) -> AsyncIterator[None]:
    """Have redis-py connect and log in, and close a socket in the end that no link has taken over.

    Raises Unavailable for whatever redis-py raises, and when all of it takes longer than the connection's time-out.
    """
    timeout_s, is_open = server.socket_timeout, False
    try:
        async with asyncio.timeout(timeout_s):
            await server.connect()  # type: ignore[no-untyped-call]
            is_open = True
            yield
    except (TimeoutError, redis.TimeoutError):
        reason = f"{endpoint} did not answer within {timeout_s:g} s"
    except redis.RedisError as error:
        reason = str(error) if is_open else _without_login(error, server)
    else:
        return
    finally:
        await server.disconnect(nowait=True)
    raise Unavailable("connection", reason if str(endpoint) in reason else f"{endpoint}: {reason}")


async def query(server: AbstractConnection, *command: str) -> Any:
    """Return the reply to one command, over redis-py's open connection."""
    await server.send_command(*command)
    return await server.read_response()


def _without_login(error: redis.RedisError, server: AbstractConnection) -> str:
    """Return an error's text, without what an old server quotes of a login that it doesn't understand."""
    refusal = error if isinstance(error, redis.ResponseError) else error.__cause__
    is_quoting = isinstance(refusal, redis.ResponseError) and server.password is not None
    return "the login or the database was refused" if is_quoting else str(error)
