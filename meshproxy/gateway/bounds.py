"""What requests may cost a worker before they are admitted, or without ever being: memory for bodies, work for other paths.
Bounded for each account, so that one takes nothing from others.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from meshproxy.errors import GatewayError, Source, overloaded, rate_limit_exceeded

SMALL_BYTES = 65_536  # a body up to this is read without asking for room
LARGE_BYTES = 1_048_576  # a body above this has room to its request's end, and is taken apart when no other is
ROOM_WAIT_S = 10.0
MAX_WAITING_BODIES = 1024
MIN_UNADMITTED = 64
TOO_MANY_UNADMITTED = "Too many requests of this account wait to be admitted."
NO_ROOM = "Too many large requests are being read here."
VISITS_PER_S = 200.0  # of one account in one worker, to other paths than the chat; one that is work counts for several
VISITS_AT_ONCE = 1000.0
MAX_ACCOUNTS = 10_000  # whose visits are remembered
MAX_IN_TURN = 32  # that wait for one name
TOO_MANY_VISITS = "Too many requests of this account to other paths than the chat."
TOO_MANY_IN_TURN = "Too many requests of this account wait for each other."
IN_TURN_RETRY_S = 1.0


class Room:
    """What one request's body takes of its worker's memory: counted while it is read, and to the request's end if it is large."""

    __slots__ = ("_bodies", "account", "is_counted", "size")

    def __init__(self, bodies: "Bodies", account: str) -> None:
        self._bodies = bodies
        self.account = account
        self.is_counted = True  # among its account's requests that aren't admitted
        self.size = 0

    async def take(self, size: int) -> None:
        """Have room for a body of `size` bytes, when there is some. GatewayError `overloaded` if there is none in time."""
        if size > max(self.size, SMALL_BYTES):
            await self._bodies.take(self, size)

    def shrink(self, size: int) -> None:
        """The body is read, and admitted: count only what it has, and nothing if that isn't large."""
        if self.size:
            self._bodies.give_back(self, size if size > LARGE_BYTES else 0)
        self._bodies.count_out(self)

    def leave(self) -> None:
        """The body is needed no more."""
        if self.size:
            self._bodies.give_back(self, 0)
        self._bodies.count_out(self)


class Bodies:
    """The memory that the bodies of one worker's requests may take together. An account has half of it at most, so that it leaves
    some to others; one body has room whatever its size, if there is no other. `most_bytes`: of all, as of now; `most_requests`:
    of one account's that may be here and not admitted, for a body that doesn't come or another request's answer.
    """

    def __init__(self, most_bytes: Callable[[], int], most_requests: Callable[[], int]) -> None:
        self.reading = asyncio.Lock()  # held while a large body is taken apart: between two of them the loop turns
        self._most_bytes = most_bytes
        self._most_requests = most_requests
        self._unadmitted: dict[str, int] = {}
        self._taken = 0
        self._by_account: dict[str, int] = {}
        self._waiting: dict[asyncio.Future[None], tuple[Room, int]] = {}

    def room(self, account: str) -> Room:
        """Room for one request of an account; empty at first. GatewayError `overloaded` if too many of the account's are here."""
        count = self._unadmitted.get(account, 0)
        if count >= self._most_requests():
            raise GatewayError(Source.GATEWAY, overloaded(TOO_MANY_UNADMITTED))
        self._unadmitted[account] = count + 1
        return Room(self, account)

    def count_out(self, room: Room) -> None:
        """Count a request no more that is admitted, or over."""
        if room.is_counted:
            room.is_counted = False
            left = self._unadmitted.pop(room.account) - 1
            if left:
                self._unadmitted[room.account] = left

    async def take(self, room: Room, size: int) -> None:
        """Give a room so many bytes, in turn; see Room.take."""
        if not self._waiting and self._fits(room, size):
            self._give(room, size)
            return
        if len(self._waiting) >= MAX_WAITING_BODIES:
            raise GatewayError(Source.GATEWAY, overloaded(NO_ROOM))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = room, size
        self._let_in()
        try:
            async with asyncio.timeout(ROOM_WAIT_S):
                await turn
        except TimeoutError as error:
            raise GatewayError(Source.GATEWAY, overloaded(NO_ROOM)) from error
        finally:
            if self._waiting.pop(turn, None) is not None:
                self._let_in()

    def give_back(self, room: Room, size: int) -> None:
        """Let a room have `size` bytes from now on, which is less than it has."""
        self._give(room, size)
        if self._waiting:
            self._let_in()

    def _give(self, room: Room, size: int) -> None:
        more, room.size = size - room.size, size
        self._taken += more
        left = self._by_account.get(room.account, 0) + more
        if left:
            self._by_account[room.account] = left
        else:
            self._by_account.pop(room.account, None)

    def _fits(self, room: Room, size: int) -> bool:
        """Whether so much may be a room's own: there is as much, and the account has its share or nothing else yet."""
        return self._is_free(room, size) and self._is_within_share(room, size)

    def _is_free(self, room: Room, size: int) -> bool:
        others = self._taken - room.size
        return not others or others + size <= self._most_bytes()

    def _is_within_share(self, room: Room, size: int) -> bool:
        others = self._by_account.get(room.account, 0) - room.size
        return not others or others + size <= self._most_bytes() // 2

    def _let_in(self) -> None:
        """Let in the first in turn first. One whose account has its share is passed over; one for whom there is too little in all
        isn't, lest small bodies keep a large one waiting for ever.
        """
        for turn, (room, size) in list(self._waiting.items()):
            if turn.done() or not self._is_within_share(room, size):
                continue
            if not self._is_free(room, size):
                return
            self._give(room, size)
            del self._waiting[turn]
            turn.set_result(None)


class Turns:
    """Lets one at a time do something by its name."""

    def __init__(self) -> None:
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def turn(self, name: str, most: int | None = None) -> AsyncIterator[None]:
        """Wait for one's turn. GatewayError of 429 if `most` are there already."""
        lock, users = self._turns.get(name) or (asyncio.Lock(), 0)
        if most is not None and users >= most:
            raise GatewayError(Source.CLIENT, rate_limit_exceeded(TOO_MANY_IN_TURN, IN_TURN_RETRY_S))
        self._turns[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._turns.pop(name)
            if users > 1:
                self._turns[name] = lock, users - 1


class Visits:
    """How often an account may ask for anything but a chat completion, which no bucket of the ledger counts. `clock` is monotonic
    seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spent: dict[str, tuple[float, float]] = {}  # visits that aren't made good yet, and when

    def count(self, account: str, visits: float = 1.0) -> None:
        """Count one, or one that is as much work as several. GatewayError of 429 if the account has had too many."""
        now = self._clock()
        spent, at = self._spent.get(account, (0.0, now))
        spent = max(0.0, spent - (now - at) * VISITS_PER_S)
        if spent + visits > VISITS_AT_ONCE:
            wait_s = (spent + visits - VISITS_AT_ONCE) / VISITS_PER_S
            raise GatewayError(Source.CLIENT, rate_limit_exceeded(TOO_MANY_VISITS, wait_s))
        if len(self._spent) >= MAX_ACCOUNTS:
            self._spent.clear()
        self._spent[account] = spent + visits, now
