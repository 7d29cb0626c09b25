"""One socket to one Redis server. Requests are pipelined: what one turn of the event loop asks goes out in one write, many
turns may be in flight, and replies resolve futures in the order of the requests (RESP2 has no other order).

The life of a command: `send` packs it and queues its future; the flush at the end of the turn writes; `data_received` parses
and resolves. There is no task and no timer per command: one timer watches the oldest. A future that its waiter cancelled
keeps its place in the queue, so that its reply is dropped and not taken for the next one's.

A server that lets its oldest command wait past the deadline is given up with everything that it still owes: replies come in
order, so nothing behind that command can be answered sooner. A loop that was busy for long comes to its timers before its
sockets, where the reply may lie already: hence a few more turns of it before the server is taken for lost.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis

from meshproxy.ledger.store import Argument, OnOp, Unavailable, kind_of, refusal

LOOKS = 3  # turns of the loop between a time-out and giving up, in each of which the socket is read
LOOK_S = 0.05
MAX_PENDING = 16_384  # commands without a reply on one socket; a healthy server has some hundreds at most

_NOTHING = object()  # what the parser says when it needs more bytes

# a future, what it is for, when it was asked (loop time), the request's bytes
Pending = tuple["asyncio.Future[Any]", str, float, bytes]
Redirect = Callable[[str, Pending], bool]  # a MOVED or ASK reply and what it answers; True if it was sent on elsewhere


class Link(asyncio.Protocol):
    """A connected socket. `on_lost` is called once, after everything pending was failed."""

    def __init__(self, timeout_s: float, on_op: OnOp | None = None, redirect: Redirect | None = None) -> None:
        self.on_lost: Callable[[Link], None] | None = None
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
        self._turn_at = 0.0
        self._finishing = False
        self._looks_left = LOOKS

    def send(self, op: str, command: tuple[Argument, ...]) -> "asyncio.Future[Any]":
        """Queue one command. The future's errors: Unavailable, StoreError."""
        if self.lost is not None:
            return failed(Unavailable(self.lost.kind, self.lost.reason))
        if len(self._pending) >= MAX_PENDING:
            return failed(Unavailable("overflow", f"{MAX_PENDING} commands are waiting for a reply"))
        packed = hiredis.pack_command(command)  # type: ignore[arg-type]
        if not self._outgoing:
            self._begin_turn()
        future = self._loop.create_future()
        self._outgoing.append(packed)
        self._pending.append((future, op, self._turn_at, packed))
        return future

    def resend(self, pending: Pending, *, asking: bool) -> None:
        """Queue what another server sent here, right after ASKING where that server said so."""
        if self.lost is not None:
            _fail(pending[0], Unavailable(self.lost.kind, self.lost.reason))
            return
        if asking:
            self.send("ASKING", ("ASKING",))
        if not self._outgoing:
            self._begin_turn()
        self._outgoing.append(pending[3])
        self._pending.append(pending)

    def lose(self, kind: str, reason: str) -> None:
        """Give the socket up: everything pending fails now."""
        if self.lost is not None:
            return
        self.lost = Unavailable(kind, reason)
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        pending, self._pending = self._pending, deque()
        self._outgoing = []
        for future, op, asked_at, _ in pending:
            self._tell(op, asked_at, kind)
            _fail(future, Unavailable(kind, reason))
        if self.on_lost is not None:
            self.on_lost(self)

    def finish(self) -> None:
        """Close the socket as soon as everything asked is answered."""
        self._finishing = True
        if not self._pending:
            self.lose("closed", "the server isn't needed any more")

    def take_over(self, writer: asyncio.StreamWriter) -> None:
        """Take over an open socket. Its StreamWriter is kept, for one that is collected closes its socket."""
        self._writer = writer
        writer.transport.set_protocol(self)
        self.connection_made(writer.transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self.lose("connection", f"the connection was lost ({exc or 'closed by the server'})")

    def data_received(self, data: bytes) -> None:
        """Resolve the futures of every whole reply in `data` and in what was left before."""
        pending, gets = self._pending, self._reader.gets
        self._reader.feed(data)
        try:
            while self.lost is None and (reply := gets()) is not _NOTHING:
                asked = pending.popleft()
                if isinstance(reply, hiredis.ReplyError):
                    self._refused(asked, str(reply))
                    continue
                future = asked[0]
                if not future.done():
                    future.set_result(reply)
                if self._on_op is not None:
                    self._tell(asked[1], asked[2], None)
        except (hiredis.ProtocolError, IndexError):
            self.lose("protocol", "the server sent what isn't an answer")
        if self._finishing:
            self.finish()

    def _refused(self, asked: Pending, message: str) -> None:
        if self._redirect is not None and message.startswith(("MOVED ", "ASK ")) and self._redirect(message, asked):
            return
        error = refusal(message)
        self._tell(asked[1], asked[2], kind_of(error))
        _fail(asked[0], error)
        if isinstance(error, Unavailable) and error.kind == "readonly":
            self.lose("readonly", "the server is a replica now")

    def _begin_turn(self) -> None:
        self._turn_at = self._loop.time()
        self._loop.call_soon(self._flush)
        if self._timer is None:
            self._looks_left = LOOKS
            self._timer = self._loop.call_at(self._turn_at + self._timeout_s, self._check_oldest)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._transport is not None:
            self._transport.write(outgoing[0] if len(outgoing) == 1 else b"".join(outgoing))

    def _check_oldest(self) -> None:
        self._timer = None
        if not self._pending:
            return
        due = self._pending[0][2] + self._timeout_s
        if due > self._loop.time():
            self._looks_left = LOOKS
            self._timer = self._loop.call_at(due, self._check_oldest)
        elif self._looks_left:
            self._looks_left -= 1
            self._timer = self._loop.call_later(LOOK_S, self._check_oldest)
        else:
            self.lose("timeout", f"no reply within {self._timeout_s:g} s")

    def _tell(self, op: str, asked_at: float, kind: str | None) -> None:
        if self._on_op is not None:
            self._on_op(op, self._loop.time() - asked_at, kind)


def failed(error: Exception) -> "asyncio.Future[Any]":
    """A future that has failed already."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    _fail(future, error)
    return future


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # counts as seen: a waiter that went away is no reason for asyncio to complain
