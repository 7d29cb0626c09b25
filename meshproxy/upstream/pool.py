"""The connections to one provider: never more than `limit`, the one used last is used first.

A connection is this pool's from the moment its slot is taken, before it is dialled, until it is lost. Who finds no slot waits
in line, and is handed either an idle connection or the slot of one that was lost.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from meshproxy.upstream import faults
from meshproxy.upstream.connection import Connection, Patience


class Pool:
    """See the charter. `dial` connects a connection or raises; `wait_s`: how long to wait in line."""

    def __init__(
        self, dial: Callable[[Connection], Awaitable[None]], patience: Patience, *, limit: int, wait_s: float
    ) -> None:
        self._dial = dial
        self._patience = patience
        self._limit = limit
        self._wait_s = wait_s
        self._idle: list[Connection] = []
        self._live: set[Connection] = set()
        self._line: deque[asyncio.Future[Connection]] = deque()
        self._closed = False
        self._retired = False

    def take(self) -> Connection | None:
        """An idle connection that seems alive. Those that turn out to be stale are closed on the way."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and not connection.heard_something():
                return connection
            connection.abort()
        return None

    async def open(self) -> Connection:
        """A fresh connection, or if there is no slot the first that becomes free; UpstreamFault, always safe to repeat."""
        if self._closed:
            raise faults.closing()
        connection = self._new() or await self._stand_in_line()
        if connection.made:
            return connection
        try:
            await self._dial(connection)
        except BaseException:
            connection.abort()
            self._lost(connection)
            raise
        if self._closed:
            connection.abort()
            raise faults.closing()
        return connection

    def retire(self) -> None:
        """Keep nothing idle from now on."""
        self._retired = True
        for connection in tuple(self._idle):
            connection.abort()
        self._idle.clear()

    async def close(self) -> None:
        """Close every connection, busy ones too, and wait until the sockets are gone."""
        self._closed = True
        for waiter in self._line:
            if not waiter.done():
                waiter.set_exception(faults.closing())
        self._line.clear()
        live = [connection for connection in self._live if connection.made]
        for connection in live:
            connection.abort(faults.dropped())
        if live:
            await asyncio.wait([connection.lost for connection in live])

    def _new(self) -> Connection | None:
        if len(self._live) >= self._limit:
            return None
        connection = Connection(self._patience, self._freed, self._lost)
        self._live.add(connection)
        return connection

    async def _stand_in_line(self) -> Connection:
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._line.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s):
                return await waiter
        except TimeoutError as error:
            self._leave_line(waiter)
            raise faults.exhausted(self._limit) from error
        except asyncio.CancelledError:
            self._leave_line(waiter)
            raise

    def _leave_line(self, waiter: asyncio.Future[Connection]) -> None:
        """What was handed to someone who had just given up goes to the next."""
        if waiter in self._line:
            self._line.remove(waiter)
        if waiter.cancelled() or not waiter.done() or waiter.exception() is not None:
            return
        connection = waiter.result()
        if not connection.made:
            self._lost(connection)
        elif connection.usable:
            self._freed(connection)

    def _freed(self, connection: Connection) -> None:
        """An exchange is over and its connection can be used again."""
        if self._closed:
            connection.abort()
        elif self._hand_over(connection):
            return
        elif self._retired:
            connection.abort()
        else:
            self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        """A connection is no more; its slot goes to the first in line."""
        if connection not in self._live:
            return
        self._live.remove(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._line and (heir := self._new()) is not None and not self._hand_over(heir):
            self._live.remove(heir)

    def _hand_over(self, connection: Connection) -> bool:
        while self._line:
            waiter = self._line.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False
