"""Entry: what a request passes before it is parsed: its key, its address, and its account's share of this worker.

`Authenticator` finds the caller by the secret in the request. `BodyMemory`, `PathLimiter` and `NamedLocks` bound what
one account can take of a worker, so that it can't take the worker from the others.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from meshproxy.errors import (
    ErrorResponse,
    GatewayError,
    Source,
    forbidden,
    invalid_api_version,
    overloaded,
    rate_limit_exceeded,
    unauthorized,
)
from meshproxy.ledger.directory import Directory
from meshproxy.openai.headers import API_VERSIONS, bearer
from meshproxy.policy.principal import Access, Principal

NO_KEY = unauthorized("Send your key as `Authorization: Bearer rsk_...`.")
OTHER_KEY = unauthorized(
    "This is not a key of this gateway: its keys begin with `rsk_`. Send one as `Authorization: Bearer rsk_...`."
)
WRONGLY_SENT = unauthorized(
    "The key is not sent as it should be. Send `Authorization: Bearer rsk_...`, and nothing more."
)
UNKNOWN_KEY = unauthorized("This key is not known.")


class LoginRefused(GatewayError):
    """A caller may not use the gateway. `principal`: the caller, if its key is known, for the log."""

    def __init__(self, response: ErrorResponse, principal: Principal | None) -> None:
        super().__init__(Source.CLIENT, response)
        self.principal = principal


class Authenticator:
    """Turns an `Authorization` header into a `Principal`.

    It raises a GatewayError: 401 or 403, or 429 for an address with too many failed logins. `wall_clock` is Unix time
    and `clock` monotonic time, in seconds. A reload replaces `access`.
    """

    def __init__(
        self, directory: Directory, access: Access, wall_clock: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self.access = access
        self._directory = directory
        self._wall_clock = wall_clock
        self._clock = clock

    async def principal(self, authorization: str | None, client: str | None) -> Principal:
        """Return the caller, active and with a key that hasn't expired. `client`: its address; None on a unix socket."""
        access = self.access
        if not access.is_open:
            self._check_address(client, access)
        secret = bearer(authorization)
        principal = await self._directory.principal(secret) if secret is not None else None
        if principal is None:
            response = UNKNOWN_KEY if secret is not None else _unreadable(authorization)
        elif (refusal := self._refusal_of(principal)) is None:
            return principal
        else:
            response = refusal
        if response.status == 401:
            access.failed(client, self._clock())
        raise LoginRefused(response, principal)

    def _check_address(self, client: str | None, access: Access) -> None:
        """Raise 403 for an address that isn't allowed, 429 for one with too many failed logins."""
        if not access.admits(client):
            raise GatewayError(Source.CLIENT, forbidden("This gateway takes no requests from your address."))
        wait_s = access.wait_s(client, self._clock())
        if wait_s:
            raise GatewayError(Source.CLIENT, rate_limit_exceeded("Too many failed logins from your address.", wait_s))

    def _refusal_of(self, principal: Principal) -> ErrorResponse | None:
        """Return the error response for a key or an account that may not be used; None if both may."""
        key = principal.key
        if key.status == "revoked":
            return unauthorized("This key was revoked.")
        if key.expires_at is not None and key.expires_at <= self._wall_clock():
            return unauthorized("This key has expired.")
        if key.status == "suspended":
            return forbidden("This key is suspended.")
        if principal.account.status != "active":
            return forbidden("This account is suspended.")
        return None


def _unreadable(authorization: str | None) -> ErrorResponse:
    """Return the error response for an `Authorization` header without a key that can be looked up."""
    if not authorization:
        return NO_KEY
    return WRONGLY_SENT if "rsk_" in authorization else OTHER_KEY


def check_version(version: str) -> None:
    """Raise GatewayError `invalid_api_version` if the request relies on a version of Mesh's API that there isn't."""
    if version not in API_VERSIONS:
        raise GatewayError(Source.CLIENT, invalid_api_version(version, API_VERSIONS))


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
        """Reserve memory for a body of `size` bytes, and wait for it.

        Raises GatewayError `overloaded` after MEMORY_WAIT_S.
        """
        if size > max(self.size, SMALL_BYTES):
            await self._bodies.take(self, size)

    def shrink(self, size: int) -> None:
        """Reserve only the body's `size` from now on, or nothing if it isn't large: the request was admitted."""
        if self.size:
            self._bodies.give_back(self, size if size > LARGE_BYTES else 0)
        if self.is_counted:
            self._bodies.mark_admitted(self)

    def release(self) -> None:
        """Release the memory: the body isn't needed any more."""
        if self.size:
            self._bodies.give_back(self, 0)
        if self.is_counted:
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
        """Return an empty `BodyReservation` for a request.

        Raises GatewayError `overloaded` if the account has too many unadmitted.
        """
        count = self._unadmitted.get(account, 0)
        if count >= self._most_requests():
            raise GatewayError(Source.GATEWAY, overloaded(TOO_MANY_UNADMITTED))
        self._unadmitted[account] = count + 1
        return BodyReservation(self, account)

    def mark_admitted(self, reservation: BodyReservation) -> None:
        """Stop counting a request as unadmitted: it was admitted, or is over."""
        reservation.is_counted = False
        left = self._unadmitted.pop(reservation.account) - 1
        if left:
            self._unadmitted[reservation.account] = left

    async def take(self, reservation: BodyReservation, size: int) -> None:
        """Give a reservation `size` bytes, in order of arrival; see `BodyReservation.take`."""
        if not self._waiting and self._is_free(reservation, size) and self._is_within_share(reservation, size):
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
        """Reduce a reservation to `size` bytes."""
        self._give(reservation, size)
        if self._waiting:
            self._admit_waiting()

    def _give(self, reservation: BodyReservation, size: int) -> None:
        """Set a reservation's size, and update the totals."""
        more, reservation.size = size - reservation.size, size
        self._taken += more
        left = self._by_account.get(reservation.account, 0) + more
        if left:
            self._by_account[reservation.account] = left
        else:
            self._by_account.pop(reservation.account, None)

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
