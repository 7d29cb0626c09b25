"""Bounds on a worker's memory for request bodies, and on requests to paths other than chat completions.

Each bound holds for one account, so that one account can't take the worker from the others.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from meshproxy.errors import GatewayError, Source, overloaded, rate_limit_exceeded

SMALL_BYTES = 65_536  # a body up to this size is read without reserving memory
LARGE_BYTES = 1_048_576  # a body above this is large: it keeps its memory to its request's end, and is parsed alone
MEMORY_WAIT_S = 10.0
MAX_WAITING_BODIES = 1024
MIN_UNADMITTED = 64
TOO_MANY_UNADMITTED = "Too many requests of this account wait to be admitted."
NO_MEMORY = "Too many large requests are being read here."
PATH_REQUESTS_PER_S = 200.0  # of one account in one worker, to paths other than chat; costly ones count as several
PATH_REQUESTS_BURST = 1000.0
MAX_ACCOUNTS = 10_000  # accounts whose visits are counted; beyond that all counts are dropped
MAX_LOCK_USERS = 32  # requests that wait for one name
TOO_MANY_PATH_REQUESTS = "Too many requests of this account to other paths than the chat."
TOO_MANY_LOCK_USERS = "Too many requests of this account wait for each other."
LOCK_RETRY_S = 1.0


class BodyReservation:
    """The memory that one request's body takes: counted while it is read, and until the request ends if it is large."""

    __slots__ = ("_bodies", "account", "is_counted", "size")

    def __init__(self, bodies: "BodyMemory", account: str) -> None:
        self._bodies = bodies
        self.account = account
        self.is_counted = True  # counted among its account's requests that aren't admitted yet
        self.size = 0

    async def take(self, size: int) -> None:
        """Reserve memory for a body of `size` bytes, and wait for it. Raises GatewayError `overloaded` after
        ROOM_WAIT_S.
        """
        if size > max(self.size, SMALL_BYTES):
            await self._bodies.take(self, size)

    def shrink(self, size: int) -> None:
        """Reserve only the body's `size` from now on, or nothing if it isn't large: the request was admitted."""
        if self.size:
            self._bodies.give_back(self, size if size > LARGE_BYTES else 0)
        self._bodies.mark_admitted(self)

    def release(self) -> None:
        """Release the memory: the body isn't needed any more."""
        if self.size:
            self._bodies.give_back(self, 0)
        self._bodies.mark_admitted(self)


class BodyMemory:
    """The memory that the bodies of one worker's requests may take together.

    An account gets at most half of it. A single body always fits if there is no other. `most_bytes`: the current limit
    for all. `most_requests`: how many of one account's requests may be here unadmitted, waiting for a body or for
    another request's answer.
    """

    def __init__(self, most_bytes: Callable[[], int], most_requests: Callable[[], int]) -> None:
        self.reading = asyncio.Lock()  # held while a large body is parsed: the event loop turns between two of them
        self._most_bytes = most_bytes
        self._most_requests = most_requests
        self._unadmitted: dict[str, int] = {}
        self._taken = 0
        self._by_account: dict[str, int] = {}
        self._waiting: dict[asyncio.Future[None], tuple[BodyReservation, int]] = {}

    def reserve(self, account: str) -> BodyReservation:
        """Return an empty `BodyReservation` for a request. Raises GatewayError `overloaded` if the account has too many
        unadmitted.
        """
        count = self._unadmitted.get(account, 0)
        if count >= self._most_requests():
            raise GatewayError(Source.GATEWAY, overloaded(TOO_MANY_UNADMITTED))
        self._unadmitted[account] = count + 1
        return BodyReservation(self, account)

    def mark_admitted(self, reservation: BodyReservation) -> None:
        """Stop counting a request as unadmitted: it was admitted, or is over."""
        if reservation.is_counted:
            reservation.is_counted = False
            left = self._unadmitted.pop(reservation.account) - 1
            if left:
                self._unadmitted[reservation.account] = left

    async def take(self, reservation: BodyReservation, size: int) -> None:
        """Give a room `size` bytes, in order of arrival; see `BodyReservation.take`."""
        if not self._waiting and self._fits(reservation, size):
            self._give(reservation, size)
            return
        if len(self._waiting) >= MAX_WAITING_BODIES:
            raise GatewayError(Source.GATEWAY, overloaded(NO_MEMORY))
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = reservation, size
        self._admit_waiting()
        try:
            async with asyncio.timeout(MEMORY_WAIT_S):
                await waiter
        except TimeoutError as error:
            raise GatewayError(Source.GATEWAY, overloaded(NO_MEMORY)) from error
        finally:
            if self._waiting.pop(waiter, None) is not None:
                self._admit_waiting()

    def give_back(self, reservation: BodyReservation, size: int) -> None:
        """Reduce a room to `size` bytes."""
        self._give(reservation, size)
        if self._waiting:
            self._admit_waiting()

    def _give(self, reservation: BodyReservation, size: int) -> None:
        """Set a room's size, and update the totals."""
        more, reservation.size = size - reservation.size, size
        self._taken += more
        left = self._by_account.get(reservation.account, 0) + more
        if left:
            self._by_account[reservation.account] = left
        else:
            self._by_account.pop(reservation.account, None)

    def _fits(self, reservation: BodyReservation, size: int) -> bool:
        """Return whether a room may have `size` bytes: they are free, and within the account's share."""
        return self._is_free(reservation, size) and self._is_within_share(reservation, size)

    def _is_free(self, reservation: BodyReservation, size: int) -> bool:
        others = self._taken - reservation.size
        return not others or others + size <= self._most_bytes()

    def _is_within_share(self, reservation: BodyReservation, size: int) -> bool:
        others = self._by_account.get(reservation.account, 0) - reservation.size
        return not others or others + size <= self._most_bytes() // 2

    def _admit_waiting(self) -> None:
        """Admit waiting bodies in order of arrival.

        A body whose account has used its share is passed over. One for which the total is too small blocks those behind
        it: otherwise small bodies could keep a large one waiting for ever.
        """
        for waiter, (reservation, size) in list(self._waiting.items()):
            if waiter.done() or not self._is_within_share(reservation, size):
                continue
            if not self._is_free(reservation, size):
                return
            self._give(reservation, size)
            del self._waiting[waiter]
            waiter.set_result(None)


class NamedLocks:
    """A lock for each name, kept only while it is used."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, name: str, most: int | None = None) -> AsyncIterator[None]:
        """Hold the lock of `name`. Raises GatewayError 429 if `most` requests hold or wait for it already."""
        lock, users = self._locks.get(name) or (asyncio.Lock(), 0)
        if most is not None and users >= most:
            raise GatewayError(Source.CLIENT, rate_limit_exceeded(TOO_MANY_LOCK_USERS, LOCK_RETRY_S))
        self._locks[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(name)
            if users > 1:
                self._locks[name] = lock, users - 1


class PathLimiter:
    """Limits an account's requests to paths other than chat completions, which no bucket of the ledger counts.

    `clock` is monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counted: dict[str, tuple[float, float]] = {}  # (visits not drained yet, when counted) by account

    def count(self, account: str, requests: float = 1.0) -> None:
        """Count one visit, or one as costly as several. Raises GatewayError 429 if the account made too many."""
        now = self._clock()
        counted, at = self._counted.get(account, (0.0, now))
        counted = max(0.0, counted - (now - at) * PATH_REQUESTS_PER_S)
        if counted + requests > PATH_REQUESTS_BURST:
            wait_s = (counted + requests - PATH_REQUESTS_BURST) / PATH_REQUESTS_PER_S
            raise GatewayError(Source.CLIENT, rate_limit_exceeded(TOO_MANY_PATH_REQUESTS, wait_s))
        if len(self._counted) >= MAX_ACCOUNTS:
            self._counted.clear()
        self._counted[account] = counted + requests, now
