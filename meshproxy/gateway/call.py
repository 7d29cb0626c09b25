"""What comes in and what goes out, as the gateway sees it: no socket and no framework."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from meshproxy.errors import Fault, Problem, Source, overloaded
from meshproxy.value import Value
from meshproxy.wire.replies import envelope, problem_headers

Headers = list[tuple[str, str]]

SMALL_BYTES = 65_536  # a body up to this is read without asking for room
LARGE_BYTES = 1_048_576  # a body above this has room to its request's end, and is taken apart when no other is
ROOM_WAIT_S = 10.0
MAX_WAITING_BODIES = 1024
NO_ROOM = "Too many large requests are being read here."


class Call(Value, frozen=True):
    """One request. `read_body` is given what makes room for the body (`Room.take`), and raises a Fault for one that is too large
    or never arrives; `received_at` is monotonic, in seconds; `forward` are the client's headers that may go to a provider;
    `trace_id` is W3C's, 32 hex digits; `client` is the client's address; `sees_usage`: the client
    reads a stream's usage though it can't ask for it.
    """

    request_id: str
    authorization: str | None
    read_body: Callable[[Callable[[int], Awaitable[None]]], Awaitable[bytes]]
    received_at: float
    forward: Sequence[tuple[str, str]] = ()
    idempotency_key: str | None = None
    trace_id: str | None = None
    deadline: float = math.inf
    api_version: str | None = None
    client: str | None = None
    sees_usage: bool = False


class Room:
    """What one request's body takes of its worker's memory: counted while it is read, and to the request's end if it is large."""

    __slots__ = ("_bodies", "account", "size")

    def __init__(self, bodies: "Bodies", account: str) -> None:
        self._bodies = bodies
        self.account = account
        self.size = 0

    async def take(self, size: int) -> None:
        """Have room for a body of `size` bytes, when there is some. Fault `overloaded` if there is none in time."""
        if size > max(self.size, SMALL_BYTES):
            await self._bodies.take(self, size)

    def shrink(self, size: int) -> None:
        """The body is read, and admitted: count only what it has, and nothing if that isn't large."""
        if self.size:
            self._bodies.give_back(self, size if size > LARGE_BYTES else 0)

    def leave(self) -> None:
        """The body is needed no more."""
        if self.size:
            self._bodies.give_back(self, 0)


class Bodies:
    """The memory that the bodies of one worker's requests may take together. An account has half of it at most, so that it leaves
    some to others; one body has room whatever its size, if there is no other. `most_bytes`: of all, as of now.
    """

    def __init__(self, most_bytes: Callable[[], int]) -> None:
        self.reading = asyncio.Lock()  # held while a large body is taken apart: between two of them the loop turns
        self._most_bytes = most_bytes
        self._taken = 0
        self._by_account: dict[str, int] = {}
        self._waiting: dict[asyncio.Future[None], tuple[Room, int]] = {}

    def room(self, account: str) -> Room:
        """Room for one request of an account; empty at first."""
        return Room(self, account)

    async def take(self, room: Room, size: int) -> None:
        """Give a room so many bytes, in turn; see Room.take."""
        if not self._waiting and self._fits(room, size):
            self._give(room, size)
            return
        if len(self._waiting) >= MAX_WAITING_BODIES:
            raise Fault(Source.GATEWAY, overloaded(NO_ROOM))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = room, size
        self._let_in()
        try:
            async with asyncio.timeout(ROOM_WAIT_S):
                await turn
        except TimeoutError as error:
            raise Fault(Source.GATEWAY, overloaded(NO_ROOM)) from error
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


class Reply(Value, frozen=True):
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes


class Downstream(Protocol):
    """The client's side of a stream. Nothing here blocks or raises for a client that has gone: its handler is cancelled."""

    def begin(self, headers: Headers) -> None:
        """Send the head of a 200 event stream."""

    def write(self, payload: bytes, frame: bytes | None = None) -> None:
        """Send body bytes; `frame` is the same payload already in chunk framing (RFC 9112, section 7.1), if there is one."""

    def finish(self) -> None:
        """End the body."""

    def congested(self) -> bool:
        """Whether more waits for this client than should."""

    async def drained(self) -> None:
        """Return when the client has caught up."""


class Passing:
    """A `Downstream` that passes everything on to another: for who wants to have a hand in some of it."""

    __slots__ = ("_downstream",)

    def __init__(self, downstream: Downstream) -> None:
        self._downstream = downstream

    def begin(self, headers: Headers) -> None:
        """Send the head of a stream."""
        self._downstream.begin(headers)

    def finish(self) -> None:
        """End the body."""
        self._downstream.finish()

    def congested(self) -> bool:
        """As the client's side is."""
        return self._downstream.congested()

    async def drained(self) -> None:
        """As the client's side is."""
        await self._downstream.drained()


def refusal(problem: Problem, request_id: str, headers: Sequence[tuple[str, str]] = ()) -> Reply:
    """The reply that tells a problem in the one envelope."""
    return Reply(
        problem.status,
        [("x-request-id", request_id), *problem_headers(problem), *headers],
        envelope(problem, request_id),
    )
