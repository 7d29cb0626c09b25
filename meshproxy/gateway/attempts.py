"""Attempts: send a request to one candidate after the other until one answers.

While no head was sent to the client, a stream that fails before its first event can be retried elsewhere or refused
with a true status: `first_event` waits for that event, for a bounded time. From `heartbeat_s` on, `EarlyHead` sends the
client a 200 head and pings; an error after that becomes an error event. Retries are bounded by the plan's candidates, a
retry budget and the deadline.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import TypeVar

from meshproxy.errors import ErrorResponse, GatewayError, UpstreamError, upstream_error
from meshproxy.gateway.exchange import ActiveConfig, Downstream, DownstreamWrapper, Exchange, Headers
from meshproxy.gateway.health import Attempt, Health
from meshproxy.gateway.record import Recorder
from meshproxy.gateway.resolve import Plan
from meshproxy.openai.errors import error_event
from meshproxy.openai.event_stream import PING, StreamScanner
from meshproxy.openai.events import FORM_BYTES, as_stream, begins_plainly, form_of
from meshproxy.openai.headers import upstream_request_id
from meshproxy.openai.provider_errors import conceal_secrets, without_secrets
from meshproxy.openai.usage import decode_answer
from meshproxy.policy.catalog import Candidate
from meshproxy.policy.failover import classify_error, classify_status, error_to_report, is_refusal, wait_of
from meshproxy.policy.route_health import RetryBudget
from meshproxy.upstream.response import Response

SCAN_BYTES = 2048  # bytes scanned at a time while looking for the first event
MAX_WAIT_S = 3600.0  # longer than any sensible idle_timeout_s; then the wait starts again


async def first_event(
    response: Response, hold_s: float, clock: Callable[[], float], wait_s: float | None = None
) -> None:
    """Return when an event has arrived, or after `hold_s` without one. No bytes of the body are consumed.

    Raises UpstreamError if the stream broke off, ended or reported an error before any event; `wait_s` is the wait that
    its headers ask for then.
    """
    until = clock() + hold_s
    if not response.early and response.may_receive_more:
        await response.wait_for_more(hold_s)
    if response.early and begins_plainly(response.early[0][0]):
        return
    scanner = StreamScanner(hide_usage=False)
    scanned = 0
    while True:
        for payload, _ in response.early[scanned:]:
            _look_for_event(payload, scanner)
            scanned += 1
        if not response.may_receive_more:
            _raise_if_empty(response, scanner, wait_s)
            return
        _raise_if_first(scanner, wait_s)
        left_s = until - clock()
        if scanner.events or scanner.done or left_s <= 0:
            return
        await response.wait_for_more(left_s)


class OneHead(DownstreamWrapper):
    """The client's side of a repeat, which sends one head: an early one, or that of the answer."""

    def __init__(self, downstream: Downstream, early_head: "EarlyHead") -> None:
        super().__init__(downstream)
        self._early_head = early_head

    def begin(self, headers: Headers) -> None:
        """Send the head unless the client has one."""
        self._early_head.waits = False
        if not self._early_head.is_sent:
            self._downstream.begin(headers)

    def write(self, payload: bytes, frame: bytes | None = None) -> None:
        """Send body bytes."""
        self._downstream.write(payload, frame)


class EarlyHead:
    """The client's side of a stream until a provider's answer begins.

    After `heartbeat_s` of silence the client gets its head and pings; a later failure is sent as an error event.
    `headers` returns the head's current headers; `on_begin` is called when the head is sent early. `written_at`: when
    the client was last written to, or began to wait. `is_sent`: the client has a head, from here or, with `begun` false,
    from the time in which its request was a repeat.
    """

    __slots__ = ("_clock", "_downstream", "_headers", "_on_begin", "begun", "is_sent", "waits", "written_at")

    def __init__(
        self,
        downstream: Downstream,
        headers: Callable[[], Headers],
        on_begin: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.begun = self.is_sent = False
        self.waits = True  # no answer has begun
        self._downstream = downstream
        self._headers = headers
        self._on_begin = on_begin
        self._clock = clock
        self.written_at = clock()

    def ping_if_silent(self, now: float, heartbeat_s: float) -> None:
        """Ping the client if nothing was sent to it for `heartbeat_s`; before the first ping, send the head."""
        if not self.waits or now - self.written_at < heartbeat_s or self._downstream.congested():
            return
        if not self.begun:
            self.begun = self.is_sent = True
            self._downstream.begin(self._headers())
            self._on_begin()
        self._downstream.write(PING)
        self.written_at = now

    def end(self, error_response: ErrorResponse, request_id: str, client: Downstream | None = None) -> None:
        """End a stream whose head was sent but for which no answer came, with an error event.

        `client` gets it in place of the downstream where that goes on to record the answer.
        """
        self.waits = False
        downstream = client or self._downstream
        downstream.write(error_event(error_response, request_id))
        downstream.finish()


def beginning(response: Response) -> bytes:
    """Return the first bytes of a body, as far as they have arrived, without consuming them."""
    found = b""
    for payload, _ in response.early:
        found += payload[:FORM_BYTES]
        if len(found) >= FORM_BYTES:
            break
    return found


async def first_bytes(response: Response) -> None:
    """Return when enough of a body has arrived to recognise its form, or it is over. The idle timeout bounds the wait."""
    while response.may_receive_more and form_of(beginning(response)) is None:
        await response.wait_for_more(MAX_WAIT_S)


def _look_for_event(payload: bytes, scanner: StreamScanner) -> None:
    """Feed the scanner only as much of a payload as it takes to see an event: the relay scans all of it again."""
    for at in range(0, len(payload), SCAN_BYTES):
        if scanner.events or scanner.done:
            return
        scanner.feed(payload[at : at + SCAN_BYTES])


def _raise_if_empty(response: Response, scanner: StreamScanner, wait_s: float | None) -> None:
    """Raise if a stream that is over, or that may be held back no longer, has nothing for the client."""
    if response.ended and response.error is None:
        scanner.finish()
    _raise_if_first(scanner, wait_s)
    if scanner.events or scanner.done or not response.ended:
        return
    if response.error is not None:
        raise response.error
    error_response = upstream_error("The provider ended the stream before it began.", may_have_run=True)
    raise UpstreamError(error_response, safe_to_repeat=True, upstream_status=200)


def _raise_if_first(scanner: StreamScanner, wait_s: float | None) -> None:
    """Raise if the first event is an error. An error after other events is for the client, however fast it came."""
    if scanner.error is not None and scanner.events == 1:
        raise classify_error(scanner.error, otherwise="The provider failed before it began.", wait_s=wait_s)


Result = TypeVar("Result")

PING_DELAY_S = 1.0  # at most, by which a ping may be late: twice in_flight.PULSE_S
PROVIDER_PATH = "/chat/completions"  # behind an upstream's base_url
ANSWERED = frozenset({200, 201, 202, 203})  # RFC 9110, section 15.3: those that have what was asked for, or may
UPSTREAM_FAILED = frozenset({"upstream_error", "gateway_timeout"})


class Attempts:
    """Makes the attempts of one worker's requests. `clock` is monotonic seconds, `wall_clock` Unix time in seconds."""

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
        """Return the first response that is an answer: status 200, and an event stream where one was requested.

        Raises the most relevant of the attempts' errors if none succeeds. Call `conclude` when the answer is over.
        """
        self._budget.deposit(self._clock())
        failures: list[UpstreamError] = []
        refused_by: set[str] = set()  # models that refused: not retried at any upstream
        account = exchange.account
        for candidate in self._health.order(plan.candidates, plan.request.session_id, account):
            if candidate.model in refused_by:
                continue
            self._raise_if_late(exchange)
            attempt = self._health.begin(candidate, account)
            if attempt is None:
                continue
            if failures and not all(map(is_refusal, failures)) and not self._budget.withdraw(self._clock()):
                attempt.abandoned()
                break
            exchange.attempt = attempt
            exchange.candidate, exchange.model = candidate, candidate.model
            exchange.attempts += 1
            try:
                return await self._attempt(exchange, attempt, candidate, plan, active)
            except UpstreamError as error:
                exchange.may_be_billed = False
                exchange.may_have_run |= error.response.may_have_run
                attempt.failed(error)
                self._record_failure(exchange, candidate, error)
                failures.append(error)
                if error.another_model:
                    refused_by.add(candidate.model)
                elif not _may_try_next(error, streamed=plan.request.stream):
                    break
            except GatewayError as error:
                attempt.abandoned()
                if error.response.status == 504:
                    self._recorder.attempted(candidate.upstream, "timeout")
                raise
        raise error_to_report(failures) if failures else self._health.none_available(plan.candidates, account)

    def conclude(self, exchange: Exchange) -> None:
        """Report to the upstream's health how the exchange ended, if an upstream served it."""
        attempt = exchange.attempt
        if attempt is None:
            return
        if exchange.failure is not None and exchange.candidate is not None:
            self._recorder.attempt_failed(exchange, exchange.candidate, exchange.failure)
        if exchange.failure is not None and exchange.failure.unreadable:
            attempt.abandoned()
        elif exchange.outcome == "completed":
            attempt.succeeded()
        elif exchange.outcome == "upstream_failed" or (
            exchange.outcome == "failed" and exchange.code in UPSTREAM_FAILED
        ):
            attempt.broke_off()
        else:
            attempt.abandoned()

    def _raise_if_late(self, exchange: Exchange) -> None:
        """Raise 504 if the client's deadline has passed, or it has gone and no repeat may want an answer."""
        is_gone = exchange.detached and exchange.recording is None
        if is_gone or self._clock() >= exchange.deadline:
            raise exchange.too_late()

    def _record_failure(self, exchange: Exchange, candidate: Candidate, error: UpstreamError) -> None:
        """Remove secrets from the error of a failed attempt, then count and log it."""
        error.response = without_secrets(error.response, exchange.secrets)
        error.provider_message = conceal_secrets(error.provider_message, exchange.secrets)
        self._recorder.attempted(candidate.upstream, _label(error))
        self._recorder.attempt_failed(exchange, candidate, error)

    async def _attempt(
        self, exchange: Exchange, attempt: Attempt, candidate: Candidate, plan: Plan, active: ActiveConfig
    ) -> Response:
        """Make one attempt and return its response.

        Raises UpstreamError for a refusal or a failure, and the client's GatewayError 504 if its deadline passes.
        """
        provider = active.providers[candidate.upstream]
        exchange.secrets = provider.secrets
        exchange.upstream_status, exchange.upstream_request_id = 0, None
        body = await self._built(plan, candidate) if plan.is_slow_to_build(candidate) else plan.body_for(candidate)
        exchange.sent_at = self._clock()
        if exchange.attempts == 1:
            exchange.overhead_s = exchange.sent_at - exchange.call.received_at
        left_s = exchange.deadline - exchange.sent_at
        if exchange.detachable:
            left_s = math.inf  # the client gets its 504 in time, and the answer is still read: see `Detacher`
        answering = provider.post(PROVIDER_PATH, exchange.call.forward, body, exchange.mark_sent)
        if left_s < math.inf and left_s <= _attempt_timeout_s(candidate, active):
            answering = within(exchange, left_s, answering)
        response = await answering
        exchange.upstream_status, exchange.upstream_request_id = response.status, upstream_request_id(response.headers)
        streamed = plan.request.stream
        try:
            if response.status not in ANSWERED:
                raise await self._in_time(exchange, self._refusal(response))
            if streamed:
                response = await self._stream_of(exchange, response, self._hold_s(exchange, active))
        except BaseException:
            response.close()
            raise
        attempt.answered(self._clock() - exchange.sent_at if streamed else None)
        self._recorder.attempted(candidate.upstream, "200")
        return response

    async def _in_time(self, exchange: Exchange, reading: Coroutine[None, None, Result]) -> Result:
        """Read a body that is no stream by the client's deadline, if it has one.

        Raises the client's GatewayError 504 after that, unless the `Detacher` does.
        """
        if exchange.deadline == math.inf:
            return await reading
        exchange.reads_whole = True
        try:
            return await (
                reading if exchange.detachable else within(exchange, exchange.deadline - self._clock(), reading)
            )
        finally:
            exchange.reads_whole = False

    async def _built(self, plan: Plan, candidate: Candidate) -> bytes:
        """Build a large body in a thread, so that streams go on; one at a time, to bound memory."""
        async with self._building:
            return await asyncio.to_thread(plan.body_for, candidate)

    async def _refusal(self, response: Response) -> UpstreamError:
        """Translate a non-200 response into the client's error, which says whether another candidate may be tried."""
        verdict = classify_status(
            response.status,
            await response.read(),
            response.header("retry-after"),
            retry_after_ms=response.header("retry-after-ms"),
            content_type=response.header("content-type"),
            now=self._wall_clock(),
        )
        return verdict.to_error(response.status)

    def wait_s(self, response: Response) -> float | None:
        """Return the seconds that a response's headers ask to wait; None if they ask for none."""
        return wait_of(response.header("retry-after"), response.header("retry-after-ms"), self._wall_clock())

    async def _stream_of(self, exchange: Exchange, response: Response, hold_s: float) -> Response:
        """Return the response as an event stream whose first event has arrived, or was waited for long enough.

        The first bytes decide what the body is, since content types are wrong more often (docs/providers.md). Nearly
        every stream begins with a plain event; only others are scanned here, and all by the relay.
        """
        if response.early and begins_plainly(response.early[0][0]):
            return response
        is_labelled = _is_labelled(response)
        if not is_labelled:
            await self._in_time(exchange, first_bytes(response))
        form = form_of(beginning(response))
        if form == "other" and not is_labelled:
            error_response = upstream_error("The provider answered a stream with something else.", may_have_run=True)
            raise UpstreamError(error_response, safe_to_repeat=False, upstream_status=200, unreadable=True)
        wait_s = self.wait_s(response)
        if form == "json":
            return await self._in_time(exchange, _converted(response, wait_s))
        try:
            await first_event(response, hold_s, self._clock, wait_s)
        except UpstreamError:
            if form_of(beginning(response)) != "json":
                raise
            return await self._in_time(exchange, _converted(response, wait_s))
        return response

    def _hold_s(self, exchange: Exchange, active: ActiveConfig) -> float:
        """Return the seconds to hold the client's head back for the first event: to its first ping or deadline at most."""
        server = active.settings.server
        return min(server.first_event_hold_s, server.heartbeat_s, exchange.deadline - self._clock())


def may_drain(plan: Plan, active: ActiveConfig) -> bool:
    """Return whether an upstream of this plan is drained: after a hang-up it may go on working, and billing."""
    draining = active.draining
    return bool(draining) and any(candidate.upstream in draining for candidate in plan.candidates)


def answer_deadline(exchange: Exchange, plan: Plan, active: ActiveConfig) -> float:
    """Return when an answer must have begun, in monotonic seconds: by the request's or the client's deadline.

    The client's timeout is one of silence (httpx's read timeout), so it doesn't bound a stream that gets pings in time.
    """
    call = exchange.call
    gets_pings = (
        plan.request.stream and active.settings.server.heartbeat_s + PING_DELAY_S < call.deadline - call.received_at
    )
    return exchange.deadline if gets_pings else min(exchange.deadline, call.deadline)


def _attempt_timeout_s(candidate: Candidate, active: ActiveConfig) -> float:
    """Return the seconds after which an attempt fails by itself if no answer began."""
    settings = active.settings.upstreams[candidate.upstream]
    return settings.connect_timeout_s + settings.first_byte_timeout_s


async def within(exchange: Exchange, left_s: float | None, answering: Coroutine[None, None, Result]) -> Result:
    """Wait for an answer, or for its body, at most `left_s` seconds; None is for ever.

    Raises the client's GatewayError 504 after that: a short deadline of a client opens no breaker.
    """
    try:
        async with asyncio.timeout(left_s):
            return await answering
    except TimeoutError as error:
        raise exchange.too_late() from error


def _may_try_next(error: UpstreamError, *, streamed: bool) -> bool:
    """Return whether another candidate may be tried after this error."""
    return error.safe_to_repeat or (streamed and error.upstream_status is None)


def _is_labelled(response: Response) -> bool:
    return (response.header("content-type") or "").partition(";")[0].strip().lower() == "text/event-stream"


async def _converted(response: Response, wait_s: float | None) -> Response:
    """Convert a whole answer into the event stream that was requested."""
    body = await response.read()
    answer = decode_answer(body)
    if answer.error:
        raise classify_error(answer.error, otherwise="The provider failed.", wait_s=wait_s)
    return Response.whole(200, response.headers, as_stream(body))


def _label(error: UpstreamError) -> str:
    """Return the code under which a failed attempt is counted."""
    if error.upstream_status is not None:
        return str(error.upstream_status) if error.upstream_status != 200 else "protocol_error"
    if error.response.status == 504:
        return "timeout"
    return "connect_error" if error.safe_to_repeat else "reset"
