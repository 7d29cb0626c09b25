"""What comes in and what goes out, as the gateway sees it: no socket and no framework."""

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from meshproxy.errors import Problem
from meshproxy.value import Value
from meshproxy.wire.replies import envelope, problem_headers

Headers = list[tuple[str, str]]


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
