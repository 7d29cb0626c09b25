"""The wait between a provider's head and its first event: as long as the client's head is held back, a stream that comes to
nothing can still be asked for elsewhere, or be refused with an honest status.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import TypeVar

from meshproxy.errors import ErrorResponse, GatewayError, Source, UpstreamError, gateway_timeout, upstream_error
from meshproxy.gateway.exchange import ActiveConfig, Downstream, Exchange, Headers
from meshproxy.gateway.health import Attempt, Health
from meshproxy.gateway.record import Recorder
from meshproxy.gateway.resolve import Plan
from meshproxy.openai.errors import concealed, error_event, without_secrets
from meshproxy.openai.event_stream import PING, StreamScanner
from meshproxy.openai.events import LOOK_BYTES as FORM_BYTES
from meshproxy.openai.events import as_stream, form_of
from meshproxy.openai.usage import decode_reply
from meshproxy.policy.catalog import Candidate
from meshproxy.policy.failover import after_event, after_status, foremost
from meshproxy.policy.route_health import RetryBudget
from meshproxy.upstream.response import Response

LOOK_BYTES = 2048  # of one look for an event
LONG_S = 3600.0  # longer than any idle_timeout_s that makes sense; then it is looked again


async def first_event(response: Response, hold_s: float, clock: Callable[[], float]) -> None:
    """Return as soon as an event has arrived, or when none has for `hold_s`. Nothing of the body is taken.

    UpstreamError if the stream broke off, ended, or told of an error before any event.
    """
    scanner = StreamScanner(hide_usage=False)
    until = clock() + hold_s
    heard = 0
    while True:
        for payload in response.early(heard):
            _look_for_event(payload, scanner)
            heard += 1
        if not response.goes_on:
            _come_to_nothing(response, scanner)
            return
        _raise_if_first(scanner)
        left_s = until - clock()
        if scanner.events or scanner.done or left_s <= 0:
            return
        await response.hear(left_s)


class Opening:
    """A stream's client until a provider's answer begins. From `heartbeat_s` of silence on it gets its head and pings; what goes
    wrong after that is told in an error event. `headers` gives those of the moment; `on_begin` is called with the early head.
    """

    __slots__ = ("_clock", "_downstream", "_headers", "_on_begin", "_written_at", "begun", "waits")

    def __init__(
        self,
        downstream: Downstream,
        headers: Callable[[], Headers],
        on_begin: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.begun = False
        self.waits = True  # no answer has begun
        self._downstream = downstream
        self._headers = headers
        self._on_begin = on_begin
        self._clock = clock
        self._written_at = clock()

    def look_after(self, now: float, heartbeat_s: float) -> None:
        """Ping the client if it has heard nothing for too long."""
        if not self.waits or now - self._written_at < heartbeat_s or self._downstream.congested():
            return
        if not self.begun:
            self.begun = True
            self._downstream.begin(self._headers())
            self._on_begin()
        self._downstream.write(PING)
        self._written_at = now

    def end(self, problem: ErrorResponse, request_id: str) -> None:
        """End a stream that has begun and to which no answer came."""
        self.waits = False
        self._downstream.write(error_event(problem, request_id))
        self._downstream.finish()


def beginning(response: Response) -> bytes:
    """The first bytes of a body, as far as they have come."""
    found = b""
    for payload in response.early():
        found += payload[:FORM_BYTES]
        if len(found) >= FORM_BYTES:
            break
    return found


async def first_bytes(response: Response) -> None:
    """Return when enough of a body has come to tell its form, or when it is over. The connection's patience bounds the wait."""
    while response.goes_on and form_of(beginning(response)) is None:
        await response.hear(LONG_S)


def _look_for_event(payload: bytes, scanner: StreamScanner) -> None:
    """Feed as much of a payload as it takes to see an event: the relay reads all of it again."""
    for at in range(0, len(payload), LOOK_BYTES):
        if scanner.events or scanner.done:
            return
        scanner.feed(payload[at : at + LOOK_BYTES])


def _come_to_nothing(response: Response, scanner: StreamScanner) -> None:
    """The stream is over, or as long as may wait: raise unless there is something in it for the client."""
    if response.ended and response.fault is None:
        scanner.finish()
    _raise_if_first(scanner)
    if scanner.events or scanner.done or not response.ended:
        return
    if response.fault is not None:
        raise response.fault
    problem = upstream_error("The provider ended the stream before it began.", may_have_run=True)
    raise UpstreamError(problem, safe_to_repeat=True, answered=200)


def _raise_if_first(scanner: StreamScanner) -> None:
    """Raise if the first event is an error. One that came with events before it is the client's to hear of, however fast."""
    if scanner.error is not None and scanner.events == 1:
        raise after_event(scanner.error, otherwise="The provider failed before it began.")


Result = TypeVar("Result")

PULSE_S = 1.0  # by which a ping may be late, with some to spare (Live)
CHAT_PATH = "/chat/completions"
UPSTREAM_FAILED = frozenset({"upstream_error", "gateway_timeout"})


class Attempts:
    """How this worker makes the attempts of its requests. `clock` is monotonic seconds, `wall_clock` Unix time."""

    def __init__(
        self, health: Health, recorder: Recorder, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self._health = health
        self._recorder = recorder
        self._clock = clock
        self._wall_clock = wall_clock
        self._budget = RetryBudget()
        self._building = asyncio.Lock()

    async def first_answer(self, exchange: Exchange, plan: Plan, active: ActiveConfig) -> Response:
        """The first response that is an answer: 200, and an event stream where one was asked for. Otherwise the GatewayError
        of the attempt that matters most. `conclude` the exchange when the answer is over.
        """
        exchange.deadline = _deadline(exchange, plan, active)
        self._budget.deposit(self._clock())
        failures: list[UpstreamError] = []
        refused_by: set[str] = set()  # models that aren't asked again, whoever serves them
        account = exchange.account
        for candidate in self._health.order(plan.attempts, plan.request.session_id, account):
            if candidate.model in refused_by:
                continue
            self._raise_if_late(exchange, failures)
            attempt = self._health.begin(candidate, account)
            if attempt is None:
                continue
            if failures and not self._budget.withdraw(self._clock()):
                attempt.abandoned()
                break
            exchange.attempt = attempt
            exchange.candidate = candidate
            exchange.attempts += 1
            try:
                return await self._attempt(exchange, attempt, candidate, plan, active)
            except UpstreamError as fault:
                exchange.is_at_work = False
                attempt.failed(fault)
                self._note(exchange, candidate, fault)
                failures.append(fault)
                if fault.another_model:
                    refused_by.add(candidate.model)
                elif not _may_go_on(fault, streamed=plan.request.stream):
                    break
            except GatewayError as fault:
                attempt.abandoned()
                if fault.problem.status == 504:
                    self._recorder.attempted(candidate.upstream, "timeout")
                raise
        raise foremost(failures) if failures else self._health.nobody(plan.attempts, account)

    def conclude(self, exchange: Exchange) -> None:
        """An exchange is over: what it says of the upstream that served it, if one did."""
        attempt = exchange.attempt
        if attempt is None:
            return
        if exchange.failure is not None and exchange.candidate is not None:
            self._recorder.attempt_failed(exchange, exchange.candidate, exchange.failure)
        if exchange.failure is not None and exchange.failure.unreadable:
            attempt.abandoned()
        elif exchange.outcome == "completed":
            attempt.succeeded()
        elif exchange.failure is not None and exchange.failure.unreadable:
            attempt.abandoned()
        elif exchange.outcome == "upstream_failed" or (
            exchange.outcome == "failed" and exchange.code in UPSTREAM_FAILED
        ):
            attempt.broke_off()
        else:
            attempt.abandoned()

    def _raise_if_late(self, exchange: Exchange, failures: list[UpstreamError]) -> None:
        """No attempt begins after the client's deadline."""
        if self._clock() >= exchange.deadline:
            raise too_late(may_have_run=any(failure.problem.may_have_run for failure in failures))

    def _note(self, exchange: Exchange, candidate: Candidate, fault: UpstreamError) -> None:
        """Count and log an attempt that failed. From here on nothing of it names a secret."""
        fault.problem = without_secrets(fault.problem, exchange.secrets)
        fault.words = concealed(fault.words, exchange.secrets)
        self._recorder.attempted(candidate.upstream, _label(fault))
        self._recorder.attempt_failed(exchange, candidate, fault)

    async def _attempt(
        self, exchange: Exchange, attempt: Attempt, candidate: Candidate, plan: Plan, active: ActiveConfig
    ) -> Response:
        provider = active.providers[candidate.upstream]
        exchange.secrets = provider.secrets
        body = await self._built(plan, candidate) if plan.is_slow_to_build(candidate) else plan.body_for(candidate)
        exchange.response = None
        exchange.sent_at = self._clock()
        if exchange.attempts == 1:
            exchange.overhead_s = exchange.sent_at - exchange.call.received_at
        left_s = exchange.deadline - exchange.sent_at
        if exchange.detachable and not plan.request.stream:
            left_s = math.inf  # the client is told in time, and the answer is still read: see Detacher
        asked = provider.post(CHAT_PATH, exchange.call.forward, body, exchange.sent)
        response = await (asked if left_s > _patience_s(candidate, active) else within(left_s, asked))
        exchange.response = response
        streamed = plan.request.stream
        try:
            if response.status != 200:
                raise await self._refusal(response)
            if streamed:
                response = await self._stream_of(response, self._hold_s(exchange, active))
        except BaseException:
            response.close()
            raise
        attempt.answered(self._clock() - exchange.sent_at if streamed else None)
        self._recorder.attempted(candidate.upstream, "200")
        return response

    async def _built(self, plan: Plan, candidate: Candidate) -> bytes:
        """Build a body in a thread, one at a time: others' streams go on, and few intermediate copies are there together."""
        async with self._building:
            return await asyncio.to_thread(plan.body_for, candidate)

    async def _refusal(self, response: Response) -> UpstreamError:
        """What the client hears of an answer that is none, and whether another may be asked."""
        verdict = after_status(
            response.status,
            await response.read(),
            response.header("retry-after"),
            retry_after_ms=response.header("retry-after-ms"),
            content_type=response.header("content-type"),
            now=self._wall_clock(),
        )
        return verdict.fault(response.status)

    async def _stream_of(self, response: Response, hold_s: float) -> Response:
        """The response as an event stream, of which the first event has come or was waited for long enough. What it is its first
        bytes say: labels are wrong more often (docs/providers.md).
        """
        is_labelled = _is_labelled(response)
        if not is_labelled:
            await first_bytes(response)
        form = form_of(beginning(response))
        if form == "other" and not is_labelled:
            problem = upstream_error("The provider answered a stream with something else.", may_have_run=True)
            raise UpstreamError(problem, safe_to_repeat=False, answered=200, unreadable=True)
        if form == "json":
            return await _converted(response)
        try:
            await first_event(response, hold_s, self._clock)
        except UpstreamError:
            if form_of(beginning(response)) != "json":
                raise
            return await _converted(response)
        return response

    def _hold_s(self, exchange: Exchange, active: ActiveConfig) -> float:
        """How long the client's head may wait for the first event: not past its first ping, nor its patience."""
        server = active.settings.server
        return min(server.first_event_hold_s, server.heartbeat_s, exchange.deadline - self._clock())


def outlives(plan: Plan, active: ActiveConfig) -> bool:
    """Whether hanging up may leave the provider at work, and its bill growing."""
    draining = active.draining
    return bool(draining) and any(candidate.upstream in draining for candidate in plan.attempts)


def _deadline(exchange: Exchange, plan: Plan, active: ActiveConfig) -> float:
    """When an answer must have begun: by the request's own deadline, and while its client waits. A client's patience is with
    silence (httpx's read timeout), and a stream that gets pings in time isn't silent.
    """
    call = exchange.call
    gets_pings = plan.request.stream and active.settings.server.heartbeat_s + PULSE_S < call.deadline - call.received_at
    return exchange.deadline if gets_pings else min(exchange.deadline, call.deadline)


def _patience_s(candidate: Candidate, active: ActiveConfig) -> float:
    """After so long an attempt has failed by itself if no answer began."""
    settings = active.settings.upstreams[candidate.upstream]
    return settings.connect_timeout_s + settings.first_byte_timeout_s


async def within(left_s: float, answering: Coroutine[None, None, Result]) -> Result:
    """Wait for an answer, or its body, as long as the client gives it time. That it takes longer isn't the provider's fault: a
    client that gives no time to anyone must not open a breaker. GatewayError of the client, 504, when the time is over.
    """
    try:
        async with asyncio.timeout(left_s):
            return await answering
    except TimeoutError as error:
        raise too_late(may_have_run=True) from error


def too_late(*, may_have_run: bool) -> GatewayError:
    """504: the client's time is over, which is no provider's fault."""
    message = "The time that the client gives an answer is over."
    return GatewayError(Source.CLIENT, gateway_timeout(message, may_have_run=may_have_run))


def _may_go_on(fault: UpstreamError, *, streamed: bool) -> bool:
    """Whether another provider may be asked."""
    return fault.safe_to_repeat or (streamed and fault.answered is None)


def _is_labelled(response: Response) -> bool:
    return (response.header("content-type") or "").partition(";")[0].strip().lower() == "text/event-stream"


async def _converted(response: Response) -> Response:
    """A whole answer in the place of a stream, as the stream that it would have been."""
    body = await response.read()
    reply = decode_reply(body)
    if reply.error:
        raise after_event(reply.error, otherwise="The provider failed.")
    return Response.whole(200, response.headers, as_stream(body))


def _label(fault: UpstreamError) -> str:
    """How an attempt that failed is counted."""
    if fault.answered is not None:
        return str(fault.answered) if fault.answered != 200 else "protocol_error"
    if fault.problem.status == 504:
        return "timeout"
    return "connect_error" if fault.safe_to_repeat else "reset"
