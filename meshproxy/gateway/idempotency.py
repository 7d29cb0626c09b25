"""Idempotency-Key: a repeat with the same key and body gets the answer of the first request, which is charged once.

The first request records in Redis what its client is sent, in the background and within a bound (`max_bytes`). A repeat
reads the record: a finished answer at once, a running one as it grows. A record's state is `running`, then `finished`,
`lost` (the answer can't be replayed) or `failed` (the key is free, so a repeat runs anew); `charged` is set at
settlement.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
from msgspec import Struct

from meshproxy.config import Idempotency
from meshproxy.errors import (
    ErrorResponse,
    GatewayError,
    Source,
    idempotency_conflict,
    invalid,
    overloaded,
    rate_limit_exceeded,
    upstream_error,
)
from meshproxy.gateway.attempts import within
from meshproxy.gateway.entry import NamedLocks
from meshproxy.gateway.exchange import (
    SHUTTING_DOWN,
    Call,
    Downstream,
    DownstreamWrapper,
    Exchange,
    Headers,
    Reply,
)
from meshproxy.ledger.replays import FAILED_TTL_MS, Answer, Claim, Conclusion, Replays, body_digest
from meshproxy.ledger.store import Unavailable
from meshproxy.openai.errors import code_of_event, error_event
from meshproxy.openai.event_stream import DONE, PING
from meshproxy.policy.principal import Principal
from meshproxy.telemetry.tasks import Tasks

MAX_KEY_CHARS = 255
POLL_S = 0.05  # the most that a replayed stream lags behind, unless this worker follows dozens of records
MAX_COMMANDS_PER_S = 800  # of one worker to Redis, for reading the answers that its requests wait for
MAX_WAITING = 512  # requests of one account that wait in one worker
WAITING = "Too many requests of this account wait for the answer of another one."
WAITING_RETRY_S = 1.0
FULL = "This account has as many Idempotency-Keys and answers kept as it may: send this without one, or when some have ended."
FULL_RETRY_S = 60.0
PING_CHECK_S = 1.0  # between two looks at whether a ping is due
CONCLUDE_RETRY_S = 0.25
NOT_KEPT = ErrorResponse(
    409,
    "idempotency_conflict",
    "The answer to this request can't be replayed: it was too large, its worker died, or Redis lost a part of it.",
)
REPLAYED = ("idempotent-replayed", "true")


class Head(Struct, frozen=True):
    """The first part of a recorded answer, as JSON."""

    status: int
    headers: list[tuple[str, str]]
    stream: bool


class Recording(DownstreamWrapper):
    """A `Downstream` that passes everything on and records it in Redis."""

    def __init__(
        self,
        downstream: Downstream,
        claim: Claim,
        replays: Replays,
        settings: Idempotency,
        running_ttl_ms: int,
        tasks: Tasks,
    ) -> None:
        super().__init__(downstream)
        self._claim = claim
        self._replays = replays
        self._settings = settings
        self._running_ttl_ms = running_ttl_ms
        self._tasks = tasks
        self._unsent: list[bytes] = []
        self._sent = 0  # parts
        self._size = 0
        self._sending = False
        self._conclusion: Conclusion = "running"

    @property
    def client(self) -> Downstream:
        """The client's side, past the recording."""
        return self._downstream

    @property
    def record(self) -> str:
        """The record's key in Redis, which the settlement marks as charged."""
        return self._claim.record

    @property
    def ttl_ms(self) -> int:
        """How long an answer is kept, in milliseconds."""
        return int(self._settings.ttl_s * 1000)

    def begin(self, headers: Headers) -> None:
        """Send and record the head of a stream."""
        super().begin(headers)
        self._record(msgspec.json.encode(Head(200, headers, stream=True)))

    def write(self, payload: bytes, frame: bytes | None = None) -> None:
        """Send body bytes and record them, except pings."""
        self._downstream.write(payload, frame)
        if payload != PING:
            self._record(payload)

    def reply(self, reply: Reply) -> None:
        """Record a whole answer."""
        self._record(msgspec.json.encode(Head(reply.status, reply.headers, stream=False)))
        self._record(reply.body)

    def conclude(self, *, complete: bool) -> None:
        """Set the record's final state: `finished` if the answer is complete and was kept, else `failed` or `lost`."""
        if not complete:
            self._conclusion = "failed"
        elif self._conclusion == "running":
            self._conclusion = "finished"
        self._send()

    async def keep_alive(self) -> None:
        """Extend the record's time to live while the request runs."""
        if self._conclusion == "running":
            await self._replays.conclude(self._claim, "running", self._running_ttl_ms)

    def _record(self, part: bytes) -> None:
        """Record a part; drop the record if it exceeds `max_bytes`."""
        self._size += len(part)
        if self._conclusion != "running":
            return
        if self._size > self._settings.max_bytes:
            self._mark_lost()
        else:
            self._unsent.append(part)
        self._send()

    def _send(self) -> None:
        if not self._sending:
            self._sending = True
            self._tasks.spawn("idempotency", self._send_all())

    async def _send_all(self) -> None:
        """Send recorded parts in batches, then the final state; what arrives in the meantime makes the next batch."""
        written: Conclusion = "running"
        try:
            await self._send_parts()
            while written != self._conclusion:
                written = self._conclusion
                await self._write_conclusion(written)
        finally:
            self._sending = False

    async def _send_parts(self) -> None:
        try:
            while self._unsent:
                parts, self._unsent = self._unsent, []
                if not await self._replays.append(self._claim, parts, self._running_ttl_ms, self._sent):
                    self._mark_lost()
                self._sent += len(parts)
        except Unavailable:
            self._mark_lost()  # Redis may or may not have these parts: an answer with a gap must not be replayed

    async def _write_conclusion(self, conclusion: Conclusion) -> None:
        """Write the final state, with retries for as long as Redis keeps the record; then a repeat may run anew."""
        ttl_ms = FAILED_TTL_MS if conclusion == "failed" else int(self._settings.ttl_s * 1000)
        clock = asyncio.get_running_loop().time
        gone_at = clock() + self._running_ttl_ms / 1000
        while clock() < gone_at:
            try:
                await self._replays.conclude(self._claim, conclusion, ttl_ms, self._sent)
            except Unavailable:
                await asyncio.sleep(CONCLUDE_RETRY_S)
            else:
                return

    def _mark_lost(self) -> None:
        """Drop the recorded parts: the answer can't be replayed."""
        self._unsent.clear()
        if self._conclusion != "failed":
            self._conclusion = "lost"


class Answers:
    """The answers that requests of this worker wait for, by record key.

    Commands to Redis are bounded for all of them together, and waiting requests for each account.
    """

    def __init__(self, replays: Replays, tasks: Tasks) -> None:
        self._replays = replays
        self._tasks = tasks
        self._followed: dict[str, Answer] = {}
        self._waiting: Counter[str] = Counter()
        self.locks = NamedLocks()  # taken to claim a key: who waits finds the first one's result

    def followed(self, record: str) -> Answer | None:
        """Return the answer that is already being read for other requests, if there is one."""
        return self._followed.get(record)

    @contextlib.contextmanager
    def wait(self, answer: Answer, account: str, most: int) -> Iterator[None]:
        """Have the answer read while the block runs.

        Raises GatewayError 429 if `most` of the account's requests wait already.
        """
        if self._waiting[account] >= most:
            raise GatewayError(Source.CLIENT, rate_limit_exceeded(WAITING, WAITING_RETRY_S))
        self._waiting[account] += 1
        answer.waiting += 1
        if not answer.is_followed:
            answer.is_followed = True
            self._followed.setdefault(answer.record, answer)
            self._tasks.spawn("idempotency", self._follow(answer))
        try:
            yield
        finally:
            answer.waiting -= 1
            self._waiting[account] -= 1
            if not self._waiting[account]:
                del self._waiting[account]

    async def _follow(self, answer: Answer) -> None:
        try:
            await answer.follow(lambda: max(POLL_S, len(self._followed) * 2 / MAX_COMMANDS_PER_S))
        finally:
            answer.is_followed = False
            if self._followed.get(answer.record) is answer:
                del self._followed[answer.record]


class Replay:
    """The answer of the first request, for a repeat of it."""

    def __init__(self, answer: Answer, answers: Answers, account: str, clock: Callable[[], float]) -> None:
        self._answer = answer
        self._answers = answers
        self._account = account
        self._clock = clock

    async def play(
        self,
        exchange: Exchange,
        downstream: Downstream,
        heartbeat_s: float,
        most_waiting: int = MAX_WAITING,
        left_s: float | None = None,
    ) -> Reply | None:
        """Pass the answer on: return a whole one, write a stream to `downstream`. A stream ends as the first one ended.

        The exchange gets the answer's model, its status, the code of an error event, and whether it is a stream.
        At most `most_waiting` requests of one account may wait, each at most `left_s` seconds for the answer to begin
        (then GatewayError 504). Raises LookupError, before anything was sent here, if the first request failed or its
        answer became too large to keep.
        """
        with self._answers.wait(self._answer, self._account, most_waiting):
            return await self._play(exchange, downstream, heartbeat_s, left_s)

    async def _play(
        self, exchange: Exchange, downstream: Downstream, heartbeat_s: float, left_s: float | None
    ) -> Reply | None:
        parts = self._parts(heartbeat_s)
        head = await within(exchange, left_s, _head_of(parts))
        exchange.model = dict(head.headers).get("x-mesh-model", "")
        own = [("x-request-id", exchange.call.request_id)]
        headers = [*own, *(header for header in head.headers if header[0] != "x-request-id"), REPLAYED]
        if not head.stream:
            reply = Reply(head.status, headers, b"".join([part async for part in parts]))
            exchange.status = head.status
            return reply
        exchange.is_stream = True
        exchange.mark_streaming()
        downstream.begin(headers)
        try:
            exchange.code = await self._relay(parts, downstream, heartbeat_s) or ""
        except LookupError:
            failed = upstream_error("The request that this one repeats has failed.", may_have_run=True)
            _stop(exchange, downstream, NOT_KEPT if self._answer.state == "lost" else failed)
        except Unavailable as lost:
            _stop(exchange, downstream, lost.response)
        except asyncio.CancelledError:  # the gateway shuts down, or the client has gone and hears nothing
            _stop(exchange, downstream, overloaded(SHUTTING_DOWN, may_have_run=True))
            raise
        else:
            downstream.finish()
        return None

    async def _relay(self, parts: AsyncIterator[bytes], downstream: Downstream, heartbeat_s: float) -> str | None:
        """Pass a stream's parts on; return the code of the error event that ends it, None if it is complete."""
        written_at = self._clock()
        async for part in parts:
            if downstream.congested():
                await downstream.drained()
            if part or self._clock() - written_at >= heartbeat_s:
                downstream.write(part or PING)
                written_at = self._clock()
            code = code_of_event(part)
            if code is not None or part.endswith(DONE):
                return code  # the stream has its end, whatever becomes of its record
        return None

    async def _parts(self, heartbeat_s: float) -> AsyncIterator[bytes]:
        """Yield the answer's parts as they come, and an empty one at intervals without any, so that pings are sent.

        Raises LookupError if no more will come.
        """
        count = 0
        while (parts := await self._answer.after(count, min(PING_CHECK_S, heartbeat_s / 2))) is not None:
            count += len(parts)
            for part in parts or (b"",):
                yield part


def _stop(exchange: Exchange, downstream: Downstream, error_response: ErrorResponse) -> None:
    """End a repeat's stream with an error event."""
    exchange.code = error_response.code
    downstream.write(error_event(error_response, exchange.call.request_id))
    downstream.finish()


async def _head_of(parts: AsyncIterator[bytes]) -> Head:
    """Return an answer's head. Raises LookupError if the first request failed, GatewayError 409 if nothing was kept."""
    async for part in parts:
        if part:
            return msgspec.json.decode(part, type=Head)
    raise GatewayError(Source.CLIENT, NOT_KEPT)  # it has ended, and a new claim would find the same


class IdempotencyKeys:
    """Decides whether a request is the first of its key."""

    def __init__(self, replays: Replays, tasks: Tasks, clock: Callable[[], float]) -> None:
        self._replays = replays
        self._tasks = tasks
        self._clock = clock
        self._answers = Answers(replays, tasks)

    async def enter(
        self,
        call: Call,
        principal: Principal,
        body: bytes,
        downstream: Downstream,
        *,
        settings: Idempotency,
        running_ttl_ms: int,
        owner: str,
    ) -> Recording | Replay:
        """Return a `Recording` for the first request of a key, a `Replay` for a repeat.

        Raises GatewayError: 409 for another body or an answer that wasn't kept, 422 for an unusable key, 429 for an
        account whose keys and answers reach their bound.
        """
        name = call.idempotency_key or ""
        if not 0 < len(name) <= MAX_KEY_CHARS or not name.isprintable():
            message = f"An Idempotency-Key has 1 to {MAX_KEY_CHARS} printable characters."
            raise GatewayError(Source.CLIENT, invalid(message, param="idempotency-key", place="header"))
        account = principal.account.name
        requested = self._replays.claim_by(account, principal.key.id, name, owner)
        digest = body_digest(body)
        async with self._answers.locks.hold(requested.record):
            answer = self._answers.followed(requested.record)
            if answer is not None and answer.state == "running" and answer.body_digest == digest:
                return Replay(answer, self._answers, account, self._clock)
            try:
                claim = await self._replays.claim(
                    requested,
                    digest,
                    running_ttl_ms,
                    most_keys=settings.max_keys,
                    most_bytes=settings.max_account_bytes,
                )
            except asyncio.CancelledError:
                self._tasks.spawn("idempotency", self._release(requested))
                raise
            if claim.state in {"running", "finished"}:
                answer = Answer(claim, digest, self._replays, self._clock)
                return Replay(answer, self._answers, account, self._clock)
        match claim.state:
            case "claimed":
                return Recording(downstream, claim, self._replays, settings, running_ttl_ms, self._tasks)
            case "conflict":
                raise GatewayError(Source.CLIENT, idempotency_conflict())
            case "full":
                raise GatewayError(Source.CLIENT, rate_limit_exceeded(FULL, FULL_RETRY_S))
            case _:
                raise GatewayError(Source.CLIENT, NOT_KEPT)

    async def _release(self, claim: Claim) -> None:
        """Release a claim whose request was cancelled. If Redis is lost, the claim expires by its time to live."""
        with contextlib.suppress(Unavailable):
            await self._replays.conclude(claim, "failed", FAILED_TTL_MS)
