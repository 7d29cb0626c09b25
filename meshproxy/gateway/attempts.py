"""Attempt: ask providers in their order until one accepts. Another is asked only while nothing was sent to the client, what
failed is safe to repeat, the client's time isn't over and the retry budget allows it.

A whole answer may have cost its provider's full price once the request was written, so what died after that isn't asked for
again unless the provider itself said that it failed. A stream that died before its first event has cost next to nothing.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import TypeVar

from meshproxy.errors import Fault, Source, UpstreamFault, gateway_timeout, upstream_error
from meshproxy.gateway.deployment import Deployment
from meshproxy.gateway.exchange import Exchange
from meshproxy.gateway.first_event import beginning, first_bytes, first_event
from meshproxy.gateway.health import Health, Trial
from meshproxy.gateway.record import Recorder
from meshproxy.gateway.resolve import Plan
from meshproxy.policy.budget import RetryBudget
from meshproxy.policy.catalog import Attempt
from meshproxy.policy.failover import after_event, after_status, foremost
from meshproxy.upstream.response import Response
from meshproxy.wire.convert import as_stream, form_of
from meshproxy.wire.replies import concealed, without_secrets
from meshproxy.wire.usage import decode_reply

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

    async def first_answer(self, exchange: Exchange, plan: Plan, deployment: Deployment) -> Response:
        """The first response that is an answer: 200, and an event stream where one was asked for. Otherwise the Fault of the
        attempt that matters most. `conclude` the exchange when the answer is over.
        """
        exchange.deadline = _deadline(exchange, plan, deployment)
        self._budget.deposit(self._clock())
        failures: list[UpstreamFault] = []
        refused_by: set[str] = set()  # models that aren't asked again, whoever serves them
        account = exchange.account
        for attempt in self._health.order(plan.attempts, plan.request.session_id, account):
            if attempt.model in refused_by:
                continue
            self._raise_if_late(exchange, failures)
            trial = self._health.begin(attempt, account)
            if trial is None:
                continue
            if failures and not self._budget.withdraw(self._clock()):
                trial.abandoned()
                break
            exchange.trial = trial
            exchange.attempt = attempt
            exchange.attempts += 1
            try:
                return await self._attempt(exchange, trial, attempt, plan, deployment)
            except UpstreamFault as fault:
                exchange.is_at_work = False
                trial.failed(fault)
                self._note(exchange, attempt, fault)
                failures.append(fault)
                if fault.another_model:
                    refused_by.add(attempt.model)
                elif not _may_go_on(fault, streamed=plan.request.stream):
                    break
            except Fault as fault:
                trial.abandoned()
                if fault.problem.status == 504:
                    self._recorder.attempted(attempt.upstream, "timeout")
                raise
        raise foremost(failures) if failures else self._health.nobody(plan.attempts, account)

    def conclude(self, exchange: Exchange) -> None:
        """An exchange is over: what it says of the upstream that served it, if one did."""
        trial = exchange.trial
        if trial is None:
            return
        if exchange.failure is not None and exchange.attempt is not None:
            self._recorder.attempt_failed(exchange, exchange.attempt, exchange.failure)
        if exchange.failure is not None and exchange.failure.unreadable:
            trial.abandoned()
        elif exchange.outcome == "completed":
            trial.succeeded()
        elif exchange.failure is not None and exchange.failure.unreadable:
            trial.abandoned()
        elif exchange.outcome == "upstream_failed" or (
            exchange.outcome == "failed" and exchange.code in UPSTREAM_FAILED
        ):
            trial.broke_off()
        else:
            trial.abandoned()

    def _raise_if_late(self, exchange: Exchange, failures: list[UpstreamFault]) -> None:
        """No attempt begins after the client's deadline."""
        if self._clock() >= exchange.deadline:
            raise too_late(may_have_run=any(failure.problem.may_have_run for failure in failures))

    def _note(self, exchange: Exchange, attempt: Attempt, fault: UpstreamFault) -> None:
        """Count and log an attempt that failed. From here on nothing of it names a secret."""
        fault.problem = without_secrets(fault.problem, exchange.secrets)
        fault.words = concealed(fault.words, exchange.secrets)
        self._recorder.attempted(attempt.upstream, _label(fault))
        self._recorder.attempt_failed(exchange, attempt, fault)

    async def _attempt(
        self, exchange: Exchange, trial: Trial, attempt: Attempt, plan: Plan, deployment: Deployment
    ) -> Response:
        provider = deployment.providers[attempt.upstream]
        exchange.secrets = provider.secrets
        body = await self._built(plan, attempt) if plan.is_slow_to_build(attempt) else plan.body_for(attempt)
        exchange.response = None
        exchange.sent_at = self._clock()
        if exchange.attempts == 1:
            exchange.overhead_s = exchange.sent_at - exchange.call.received_at
        left_s = exchange.deadline - exchange.sent_at
        if exchange.detachable and not plan.request.stream:
            left_s = math.inf  # the client is told in time, and the answer is still read: see Detacher
        asked = provider.post(CHAT_PATH, exchange.call.forward, body, exchange.sent)
        response = await (asked if left_s > _patience_s(attempt, deployment) else within(left_s, asked))
        exchange.response = response
        streamed = plan.request.stream
        try:
            if response.status != 200:
                raise await self._refusal(response)
            if streamed:
                response = await self._stream_of(response, self._hold_s(exchange, deployment))
        except BaseException:
            response.close()
            raise
        trial.answered(self._clock() - exchange.sent_at if streamed else None)
        self._recorder.attempted(attempt.upstream, "200")
        return response

    async def _built(self, plan: Plan, attempt: Attempt) -> bytes:
        """Build a body in a thread, one at a time: others' streams go on, and few intermediate copies are there together."""
        async with self._building:
            return await asyncio.to_thread(plan.body_for, attempt)

    async def _refusal(self, response: Response) -> UpstreamFault:
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
            raise UpstreamFault(problem, safe_to_repeat=False, answered=200, unreadable=True)
        if form == "json":
            return await _converted(response)
        try:
            await first_event(response, hold_s, self._clock)
        except UpstreamFault:
            if form_of(beginning(response)) != "json":
                raise
            return await _converted(response)
        return response

    def _hold_s(self, exchange: Exchange, deployment: Deployment) -> float:
        """How long the client's head may wait for the first event: not past its first ping, nor its patience."""
        server = deployment.settings.server
        return min(server.first_event_hold_s, server.heartbeat_s, exchange.deadline - self._clock())


def outlives(plan: Plan, deployment: Deployment) -> bool:
    """Whether hanging up may leave the provider at work, and its bill growing."""
    draining = deployment.draining
    return bool(draining) and any(attempt.upstream in draining for attempt in plan.attempts)


def _deadline(exchange: Exchange, plan: Plan, deployment: Deployment) -> float:
    """When an answer must have begun: by the request's own deadline, and while its client waits. A client's patience is with
    silence (httpx's read timeout), and a stream that gets pings in time isn't silent.
    """
    call = exchange.call
    gets_pings = (
        plan.request.stream and deployment.settings.server.heartbeat_s + PULSE_S < call.deadline - call.received_at
    )
    return exchange.deadline if gets_pings else min(exchange.deadline, call.deadline)


def _patience_s(attempt: Attempt, deployment: Deployment) -> float:
    """After so long an attempt has failed by itself if no answer began."""
    settings = deployment.settings.upstreams[attempt.upstream]
    return settings.connect_timeout_s + settings.first_byte_timeout_s


async def within(left_s: float, answering: Coroutine[None, None, Result]) -> Result:
    """Wait for an answer, or its body, as long as the client gives it time. That it takes longer isn't the provider's fault: a
    client that gives no time to anyone must not open a breaker. Fault of the client, 504, when the time is over.
    """
    try:
        async with asyncio.timeout(left_s):
            return await answering
    except TimeoutError as error:
        raise too_late(may_have_run=True) from error


def too_late(*, may_have_run: bool) -> Fault:
    """504: the client's time is over, which is no provider's fault."""
    message = "The time that the client gives an answer is over."
    return Fault(Source.CLIENT, gateway_timeout(message, may_have_run=may_have_run))


def _may_go_on(fault: UpstreamFault, *, streamed: bool) -> bool:
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


def _label(fault: UpstreamFault) -> str:
    """How an attempt that failed is counted."""
    if fault.answered is not None:
        return str(fault.answered) if fault.answered != 200 else "protocol_error"
    if fault.problem.status == 504:
        return "timeout"
    return "connect_error" if fault.safe_to_repeat else "reset"
