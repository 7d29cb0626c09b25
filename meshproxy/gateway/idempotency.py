"""Idempotency-Key: the same key and body attach to the running request or get the finished answer again, charged once.

The first request records what its client is sent, behind its back and within a bound. Those that come later read the record:
a finished answer at once, a running one as it grows. A request that failed leaves nothing: whoever repeats it runs it anew.
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
    rate_limit_exceeded,
    upstream_error,
)
from meshproxy.gateway.bounds import Turns
from meshproxy.gateway.exchange import Call, Downstream, Headers, Passing, Reply
from meshproxy.ledger.replays import FAILED_TTL_MS, Claim, Conclusion, Replays, body_digest
from meshproxy.ledger.store import StoreError, Unavailable
from meshproxy.openai.errors import error_event
from meshproxy.openai.event_stream import PING
from meshproxy.policy.principal import Principal
from meshproxy.telemetry.tasks import Tasks

MAX_KEY_CHARS = 255
POLL_S = 0.05  # how far an attached stream is behind, at most, where this worker doesn't follow dozens
MAX_COMMANDS_PER_S = 800  # that a worker asks Redis for the answers which its requests wait for
MAX_WAITING = 512  # requests of one account, in one worker
WAITING = "Too many requests of this account wait for the answer of another one."
WAITING_RETRY_S = 1.0
FULL = "This account has as many Idempotency-Keys and answers kept as it may: send this without one, or when some have ended."
FULL_RETRY_S = 60.0
PATIENCE_S = 1.0  # between two looks at whether a ping is due
TELL_RETRY_S = 0.25
CHARGED_S = 15.0  # between a settlement and what is told of the answer: ten seconds of retries, and some
MAX_TELL_RETRIES = 40  # ten seconds without Redis
TOO_LARGE = "This request was served, and its answer was not kept for a replay: it was too large, or its worker died."
REPLAYED = ("idempotent-replayed", "true")


class Head(Struct, frozen=True):
    """The first part of a recorded answer."""

    status: int
    headers: list[tuple[str, str]]
    stream: bool


class Recording(Passing):
    """A `Downstream` that passes everything on and keeps a copy in Redis."""

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
        self._size = 0
        self._sending = False
        self._conclusion: Conclusion = "running"

    @property
    def record(self) -> str:
        """The key of the record in Redis, which the settlement marks as charged."""
        return self._claim.record

    @property
    def ttl_ms(self) -> int:
        """How long an answer is kept."""
        return int(self._settings.ttl_s * 1000)

    def begin(self, headers: Headers) -> None:
        """Send and keep the head of a stream."""
        super().begin(headers)
        self._keep(msgspec.json.encode(Head(200, headers, stream=True)))

    def write(self, payload: bytes, frame: bytes | None = None) -> None:
        """Send and keep body bytes."""
        self._downstream.write(payload, frame)
        if payload != PING:
            self._keep(payload)

    def reply(self, reply: Reply) -> None:
        """Keep a whole answer."""
        self._keep(msgspec.json.encode(Head(reply.status, reply.headers, stream=False)))
        self._keep(reply.body)

    def conclude(self, *, complete: bool) -> None:
        """The request is over: what was kept is its answer, or is worth nothing."""
        if not complete:
            self._conclusion = "failed"
        elif self._conclusion == "running":
            self._conclusion = "finished"
        self._send()

    async def keep_alive(self) -> None:
        """Put the record's end off while the request runs."""
        if self._conclusion == "running":
            await self._replays.conclude(self._claim, "running", self._running_ttl_ms)

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._conclusion != "running":
            return
        if self._size > self._settings.max_bytes:
            self._lose()
        else:
            self._unsent.append(part)
        self._send()

    def _send(self) -> None:
        if not self._sending:
            self._sending = True
            self._tasks.spawn("idempotency", self._send_all())

    async def _send_all(self) -> None:
        """One batch after the other; what comes meanwhile makes the next."""
        told: Conclusion = "running"
        try:
            await self._send_parts()
            while told != self._conclusion:
                told = self._conclusion
                await self._tell(told)
        finally:
            self._sending = False

    async def _send_parts(self) -> None:
        try:
            while self._unsent:
                parts, self._unsent = self._unsent, []
                await self._replays.append(self._claim, parts, self._running_ttl_ms)
        except Unavailable:
            self._lose()  # perhaps it has these parts, perhaps not: an answer with a hole in it must not be replayed

    async def _tell(self, conclusion: Conclusion) -> None:
        """Say it until it is heard; at last the record's own end says that a repeat may run anew."""
        ttl_ms = FAILED_TTL_MS if conclusion == "failed" else int(self._settings.ttl_s * 1000)
        for _ in range(MAX_TELL_RETRIES):
            try:
                await self._replays.conclude(self._claim, conclusion, ttl_ms)
            except Unavailable:
                await asyncio.sleep(TELL_RETRY_S)
            else:
                return

    def _lose(self) -> None:
        """The answer can't be replayed."""
        self._unsent.clear()
        if self._conclusion != "failed":
            self._conclusion = "lost"


class Answer:
    """The answer of the request that has a key, read from Redis once for all of this worker's requests that wait for it."""

    def __init__(self, claim: Claim, body_digest: str, replays: Replays, clock: Callable[[], float]) -> None:
        self.body_digest = body_digest
        self.parts: list[bytes] = []
        self.state: str | None = "running"
        self.waiting = 0
        self.is_followed = False
        self.record = claim.record
        self._claim = claim
        self._replays = replays
        self._clock = clock
        self._charged_at: float | None = None
        self._trouble: GatewayError | StoreError | None = None
        self._news: asyncio.Future[None] | None = None

    async def follow(self, pause_s: Callable[[], float]) -> None:
        """Read what comes while there are requests that wait for it; `pause_s`: how long not to ask, as of now."""
        try:
            while self.waiting and self.state == "running":
                state, parts = await self._replays.read(self._claim, len(self.parts))
                self.parts += parts
                self.state = self._state_of(state)
                if parts or self.state != "running":
                    self._wake()
                if self.state == "running":
                    await asyncio.sleep(pause_s())
        except (GatewayError, StoreError) as trouble:
            self._trouble = trouble
        finally:
            self._wake()

    async def after(self, count: int, patience_s: float) -> list[bytes] | None:
        """The parts behind the first `count`, when there are some; none after a while without any. None: that was all.

        LookupError if there will be none, for the request has failed or its record is gone. Raises Unavailable and StoreError.
        """
        if len(self.parts) == count and self.state == "running" and self._trouble is None:
            if self._news is None:
                self._news = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._news], timeout=patience_s)
        if len(self.parts) > count:
            return self.parts[count:]
        if self._trouble is not None:
            raise self._trouble
        if self.state == "running":
            return []
        if self.state == "finished":
            return None
        raise LookupError

    def _state_of(self, state: str | None) -> str | None:
        """What the record says; `charged`: its worker tells next how far the answer is, or is dead."""
        if state != "charged":
            return state
        if self._charged_at is None:
            self._charged_at = self._clock()
        return "running" if self._clock() - self._charged_at < CHARGED_S else "lost"

    def _wake(self) -> None:
        news, self._news = self._news, None
        if news is not None:
            news.set_result(None)


class Answers:
    """The answers that requests of this worker wait for, by the record of their key. How often Redis is asked is bounded for all
    of them together, and how many requests of one account wait.
    """

    def __init__(self, replays: Replays, tasks: Tasks) -> None:
        self._replays = replays
        self._tasks = tasks
        self._followed: dict[str, Answer] = {}
        self._waiting: Counter[str] = Counter()
        self.turns = Turns()  # to claim a key: those behind find what the first found, and don't ask again

    def followed(self, record: str) -> Answer | None:
        """The answer that is being read for others, if it is."""
        return self._followed.get(record)

    @contextlib.contextmanager
    def wait(self, answer: Answer, account: str, most: int) -> Iterator[None]:
        """Have the answer read meanwhile. GatewayError of 429 if `most` requests of the account wait already."""
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
    """The answer of the request that has the key, for one that asks the same."""

    def __init__(self, answer: Answer, answers: Answers, account: str, clock: Callable[[], float]) -> None:
        self._answer = answer
        self._answers = answers
        self._account = account
        self._clock = clock

    async def play(
        self, call: Call, downstream: Downstream, heartbeat_s: float, most_waiting: int = MAX_WAITING
    ) -> Reply | None:
        """Give the answer as it comes: a whole one is returned, a stream goes to `downstream`. `most_waiting`: so many requests
        of one account may wait for answers.

        LookupError if the other request failed, or its answer became too large to be kept, before anything was sent here.
        """
        with self._answers.wait(self._answer, self._account, most_waiting):
            return await self._play(call, downstream, heartbeat_s)

    async def _play(self, call: Call, downstream: Downstream, heartbeat_s: float) -> Reply | None:
        parts = self._parts(heartbeat_s)
        head = await _head_of(parts)
        own = [("x-request-id", call.request_id)]
        headers = [*own, *(header for header in head.headers if header[0] != "x-request-id"), REPLAYED]
        if not head.stream:
            return Reply(head.status, headers, b"".join([part async for part in parts]))
        downstream.begin(headers)
        try:
            await self._relay(parts, downstream, heartbeat_s)
        except LookupError:
            problem = upstream_error("The request that this one repeats has failed.", may_have_run=True)
            downstream.write(error_event(problem, call.request_id))
        except Unavailable as lost:
            downstream.write(error_event(lost.problem, call.request_id))
        downstream.finish()
        return None

    async def _relay(self, parts: AsyncIterator[bytes], downstream: Downstream, heartbeat_s: float) -> None:
        written_at = self._clock()
        async for part in parts:
            if downstream.congested():
                await downstream.drained()
            if part or self._clock() - written_at >= heartbeat_s:
                downstream.write(part or PING)
                written_at = self._clock()

    async def _parts(self, heartbeat_s: float) -> AsyncIterator[bytes]:
        """The answer's parts as they come, and an empty one now and then while there is none. LookupError if there will be
        none.
        """
        count = 0
        while (parts := await self._answer.after(count, min(PATIENCE_S, heartbeat_s / 2))) is not None:
            count += len(parts)
            for part in parts or (b"",):
                yield part


async def _head_of(parts: AsyncIterator[bytes]) -> Head:
    async for part in parts:
        if part:
            return msgspec.json.decode(part, type=Head)
    raise LookupError


class Idempotence:
    """Decides whether a request is the first of its key. `settings` are those of the moment."""

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
        """A Recording for the first, a Replay for every other. GatewayError of 409 for another body, of 422 for an unusable
        key.
        """
        name = call.idempotency_key or ""
        if not 0 < len(name) <= MAX_KEY_CHARS or not name.isprintable():
            raise GatewayError(
                Source.CLIENT, invalid(f"An Idempotency-Key has 1 to {MAX_KEY_CHARS} printable characters.")
            )
        account = principal.account.name
        wanted = self._replays.claimed(account, principal.key.id, name, owner)
        digest = body_digest(body)
        async with self._answers.turns.turn(wanted.record):
            answer = self._answers.followed(wanted.record)
            if answer is not None and answer.state == "running" and answer.body_digest == digest:
                return Replay(answer, self._answers, account, self._clock)
            try:
                claim = await self._replays.claim(
                    wanted,
                    digest,
                    running_ttl_ms,
                    most_keys=settings.max_keys,
                    most_bytes=settings.max_account_bytes,
                )
            except asyncio.CancelledError:
                self._tasks.spawn("idempotency", self._give_up(wanted))
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
                raise GatewayError(Source.CLIENT, ErrorResponse(409, "idempotency_conflict", TOO_LARGE))

    async def _give_up(self, claim: Claim) -> None:
        """Nobody waits for what the claim came to: let the next one have the key. Without Redis, its time to live does that."""
        with contextlib.suppress(Unavailable):
            await self._replays.conclude(claim, "failed", FAILED_TTL_MS)
