"""The path of one request, in order: authenticate, resolve, admit, attempt, relay or answer, settle.

A denial is returned as a value, an error raised as an exception. Either way the client gets the envelope, the hold is
settled, and one log line is written.
"""

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable
from functools import partial

from meshproxy.errors import (
    ErrorResponse,
    GatewayError,
    UpstreamError,
    internal_error,
    overloaded,
)
from meshproxy.gateway.admit import Admitter, Lease, limit_headers
from meshproxy.gateway.attempts import Attempts, EarlyHead, OneHead, answer_deadline, may_drain, within
from meshproxy.gateway.entry import (
    LARGE_BYTES,
    MIN_UNADMITTED,
    Authenticator,
    BodyMemory,
    LoginRefused,
    NamedLocks,
    PathLimiter,
    check_version,
)
from meshproxy.gateway.exchange import (
    SHUTTING_DOWN,
    ActiveConfig,
    Call,
    Downstream,
    Exchange,
    Headers,
    Reply,
    denial_response,
    error_reply,
)
from meshproxy.gateway.health import Health
from meshproxy.gateway.idempotency import MAX_WAITING, IdempotencyKeys, Recording
from meshproxy.gateway.in_flight import Detacher, InFlight
from meshproxy.gateway.record import Recorder
from meshproxy.gateway.relay import Relay
from meshproxy.gateway.resolve import Plan, resolve
from meshproxy.gateway.settle import Settler, bill, bill_prompt
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.local import LocalAdmission
from meshproxy.ledger.records import Denial
from meshproxy.openai.event_stream import StreamScanner
from meshproxy.openai.events import FORM_BYTES, Whole, as_whole, form_of
from meshproxy.openai.headers import downstream_headers
from meshproxy.openai.output import answer_tokens, audio_format
from meshproxy.openai.request import decode_repeated
from meshproxy.openai.usage import decode_answer
from meshproxy.policy.failover import classify_error, ended_early, stream_error
from meshproxy.policy.principal import Principal
from meshproxy.telemetry.tasks import Tasks
from meshproxy.units import format_usd
from meshproxy.upstream.response import Response

JSON_HEADERS: Headers = [("content-type", "application/json")]
STREAM_HEADERS: Headers = [
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
]


class Gateway:
    """The pipeline of one worker.

    `clock` is monotonic seconds, `wall_clock` Unix time in seconds. `random` returns a random number in [0, 1). `boot_id`
    makes this worker's hold ids unique.
    """

    def __init__(
        self,
        *,
        active: ActiveConfig,
        ledger: Ledger,
        local: LocalAdmission | None,
        directory: Directory,
        authenticator: Authenticator,
        idempotence: IdempotencyKeys,
        settler: Settler,
        recorder: Recorder,
        tasks: Tasks,
        live: InFlight,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        random: Callable[[], float],
        boot_id: str,
    ) -> None:
        self.active = active
        self.draining = False
        self._shut_down = False
        self.bodies = BodyMemory(
            lambda: self.active.settings.server.max_bodies_bytes,
            lambda: max(MIN_UNADMITTED, self.active.settings.server.max_in_flight // 2),
        )
        self.path_limiter = PathLimiter(clock)
        self.locks = NamedLocks()
        self._admitter = Admitter(ledger, local, tasks)
        self._directory = directory
        self._authenticator = authenticator
        self._idempotence = idempotence
        self._settler = settler
        self._recorder = recorder
        self._live = live
        self._clock = clock
        self._random = random
        self.health = Health(recorder.breaker_changed, clock, random)
        self._attempts = Attempts(self.health, recorder, clock, wall_clock)
        self._boot_id = boot_id
        self._count = itertools.count(1)
        self._detacher = Detacher(tasks, self._close, clock)

    async def chat(self, call: Call, downstream: Downstream) -> Reply | None:
        """Serve one chat completion. Return None if the answer was streamed to `downstream`."""
        exchange = Exchange(call, f"{self._boot_id}{next(self._count):x}")
        if self._recorder.in_flight >= self.active.settings.server.max_in_flight:
            return self._shed(exchange)
        self._recorder.begin(exchange)
        active = self.active
        try:
            principal = exchange.principal = await self._authenticator.principal(call.authorization, call.client)
            if call.api_version is not None:
                check_version(call.api_version)
            reservation = exchange.reservation = self.bodies.reserve(principal.account.name)
            body = await call.read_body(reservation.take)
            process = self._process if call.idempotency_key is None else self._process_once
            return await process(exchange, principal, body, active, downstream)
        except LoginRefused as error:
            exchange.principal = error.principal
            return self._refuse(exchange, error.response)
        except GatewayError as error:
            return self._refuse(exchange, error.response)
        except asyncio.CancelledError:
            exchange.mark_cut("shutdown" if self._shut_down else "client_disconnected")
            if self._shut_down and (exchange.phase != "stream" or _awaits_answer(exchange)):
                return self._refuse(exchange, overloaded(SHUTTING_DOWN, may_have_run=exchange.repeat_may_be_billed))
            raise
        except Exception as error:  # noqa: BLE001 - a bug of ours: logged, and answered with 500
            self._recorder.log_bug(exchange, error)
            return self._refuse(exchange, internal_error())
        finally:
            if not exchange.detached:
                self._close(exchange)

    def shut_down(self) -> None:
        """End all streams now, each with an error event.

        From here on a cancelled request is answered as shut down, not taken for a hang-up, and no work outlives its
        client.
        """
        self.draining = self._shut_down = self._detacher.closed = True
        for relay in tuple(self._live.relays):
            relay.shut_down(overloaded(SHUTTING_DOWN, may_have_run=True))

    def interrupt(self) -> None:
        """End what goes on without its client, after `shut_down`: it has no connection whose end would."""
        self._detacher.interrupt()

    def _close(self, exchange: Exchange) -> None:
        """End a request: settle it, then count and log it."""
        if exchange.outcome == "client_disconnected" and exchange.may_be_billed and exchange.usage_source == "none":
            bill_prompt(exchange)
        self._attempts.conclude(exchange)
        if exchange.recording is not None:
            self._live.recordings.discard(exchange.recording)
            exchange.recording.conclude(complete=exchange.complete)
        self._settler.settle(exchange)
        self._recorder.end(exchange)
        if exchange.reservation is not None:
            exchange.reservation.release()

    def _shed(self, exchange: Exchange) -> Reply | None:
        """Refuse a request beyond `max_in_flight`, before it counts as in flight."""
        exchange.refused_by = "max_in_flight"
        reply = self._refuse(exchange, overloaded("This instance has too many requests in flight."))
        self._recorder.shed(exchange)
        return reply

    async def _process_once(
        self, exchange: Exchange, principal: Principal, body: bytes, active: ActiveConfig, downstream: Downstream
    ) -> Reply | None:
        """Process the first request of an Idempotency-Key; replay its answer to the others, which get pings meanwhile."""
        settings = active.settings
        early_head: EarlyHead | None = None
        while True:
            entered = await self._idempotence.enter(
                exchange.call,
                principal,
                body,
                downstream,
                settings=settings.idempotency,
                running_ttl_ms=int(settings.credits.hold_ttl_s * 1000),
                owner=exchange.hold_id,
            )
            if isinstance(entered, Recording):
                exchange.recording = entered
                self._live.recordings.add(entered)
                return await self._process(exchange, principal, body, active, entered)
            with contextlib.suppress(LookupError):  # the first one failed: this request may now be the first
                most = min(MAX_WAITING, max(1, settings.server.max_in_flight // 8))
                repeated = decode_repeated(body)
                if repeated.timeout is not None:
                    exchange.limit_to(repeated.timeout)
                left_s = exchange.deadline - self._clock() if math.isfinite(exchange.deadline) else None
                if early_head is None:
                    early_head = exchange.early_head = EarlyHead(
                        downstream,
                        lambda: [*STREAM_HEADERS, ("x-request-id", exchange.call.request_id)],
                        exchange.mark_streaming,
                        self._clock,
                    )
                    downstream = OneHead(downstream, early_head)
                if repeated.stream:
                    self._live.early_heads.add(early_head)
                try:
                    reply = await entered.play(exchange, downstream, settings.server.heartbeat_s, most, left_s)
                finally:
                    self._live.early_heads.discard(early_head)
                exchange.outcome = "replayed"
                return reply

    async def _process(
        self, exchange: Exchange, principal: Principal, body: bytes, active: ActiveConfig, downstream: Downstream
    ) -> Reply | None:
        """Resolve and admit a request, then answer it."""
        exchange.phase = "resolve"
        if len(body) > LARGE_BYTES:
            async with self.bodies.reading:
                plan = exchange.plan = await resolve(body, principal, active, self._directory, self._random())
        else:
            plan = exchange.plan = await resolve(body, principal, active, self._directory, self._random())
        exchange.model, exchange.is_stream = plan.model, plan.request.stream
        if plan.request.timeout_s is not None:
            exchange.limit_to(plan.request.timeout_s)
        exchange.phase = "admit"
        answer = await self._admitter.admit(exchange, plan, principal, active)
        if isinstance(answer, Denial):
            self._recorder.count_denial(answer)
            exchange.refused_by = answer.which.replace(" ", "_")
            return self._refuse(exchange, denial_response(answer), limit_headers(answer.buckets))
        if exchange.reservation is not None:
            exchange.reservation.shrink(len(body))
        lease = exchange.lease = answer
        plan = exchange.plan = lease.plan
        if exchange.reservation is not None and plan.prompt.template_bytes > LARGE_BYTES:
            await exchange.reservation.take(len(body) + plan.prompt.template_bytes)
        exchange.phase = "attempt"
        exchange.deadline = answer_deadline(exchange, plan, active)
        work = self._respond(exchange, plan, lease, active, downstream)
        if exchange.recording is not None or (active.draining and may_drain(plan, active)):
            return await self._detacher.run(exchange, work, active.draining)
        return await work

    async def _respond(
        self, exchange: Exchange, plan: Plan, lease: Lease, active: ActiveConfig, downstream: Downstream
    ) -> Reply | None:
        """Run the request after admission; its hold is kept alive meanwhile."""
        self._live.leases.add(lease)
        try:
            if plan.request.stream:
                response = await self._first_answer(exchange, plan, active, downstream)
                await self._relay(exchange, plan, response, lease, active, downstream)
                return None
            response = await self._attempts.first_answer(exchange, plan, active)
            reply = await self._answer(exchange, plan, response)
            if exchange.recording is not None:
                exchange.recording.reply(reply)
            return reply
        finally:
            self._live.leases.discard(lease)
            lease.end()

    async def _first_answer(
        self, exchange: Exchange, plan: Plan, active: ActiveConfig, downstream: Downstream
    ) -> Response:
        """Return the response to stream from; the client gets pings while it waits for it."""
        as_repeat = exchange.early_head
        early_head = exchange.early_head = EarlyHead(
            downstream,
            lambda: [*STREAM_HEADERS, *self._own_headers(exchange)],
            exchange.mark_streaming,
            self._clock,
        )
        if as_repeat is not None and as_repeat.is_sent:
            early_head.is_sent, early_head.written_at = True, as_repeat.written_at
        self._live.early_heads.add(early_head)
        try:
            response = await self._attempts.first_answer(exchange, plan, active)
            early_head.waits = False
            if not early_head.is_sent:
                exchange.early_head = None
            return response
        finally:
            self._live.early_heads.discard(early_head)

    async def _answer(self, exchange: Exchange, plan: Plan, response: Response) -> Reply:
        """Pass a whole answer on. Its bytes are unchanged, unless it came as an event stream."""
        try:
            if plan.request.timeout_s is None or exchange.detachable:
                body = await response.read()
            else:
                body = await within(exchange, exchange.deadline - self._clock(), response.read())
            read_at = self._clock()
            whole = None
            if body[:1] != b"{" and form_of(body[:FORM_BYTES]) == "stream":
                whole = _assembled(body)
                body = whole.body
            answer = decode_answer(body)
            if answer.error:
                wait_s = self._attempts.wait_s(response)
                raise classify_error(answer.error, otherwise="The provider failed.", wait_s=wait_s, may_have_run=True)
        except UpstreamError as error:
            exchange.record_failure(error)
            raise
        seen = partial(_seen, body, plan)
        report, outdated = (answer.report, False) if whole is None else (whole.report, whole.is_outdated)
        bill(
            exchange,
            report,
            answer.model,
            lambda: seen()[0],
            audio_output=lambda: seen()[1],
            outdated=outdated,
            served_tier=answer.service_tier,
        )
        if not exchange.detached:  # else it was sent a 504, or nothing
            exchange.status = 200
        exchange.outcome = "completed"
        exchange.complete = True
        headers = [
            *_json_headers(response),
            *self._own_headers(exchange),
            ("x-mesh-cost", format_usd(exchange.cost_nusd)),
        ]
        exchange.overhead_s += self._clock() - read_at
        return Reply(200, headers, body)

    async def _relay(
        self,
        exchange: Exchange,
        plan: Plan,
        response: Response,
        lease: Lease,
        active: ActiveConfig,
        downstream: Downstream,
    ) -> None:
        """Pass a stream on, event by event."""
        upstream = exchange.candidate.upstream if exchange.candidate is not None else ""
        scanner = StreamScanner(
            hide_usage=not (plan.request.include_usage or exchange.call.sees_usage),
            max_event_bytes=active.settings.upstreams[upstream].max_event_bytes,
            audio_format=audio_format(plan.request.fields),
            reads_tier=exchange.candidate is not None
            and bool(exchange.candidate.services or exchange.candidate.natives),
        )
        relay = Relay(response, downstream, exchange, lease, scanner, self._clock)
        lease.watch(relay.renewed)
        if not exchange.detached:
            exchange.status = 200
        if exchange.early_head is None or not exchange.early_head.begun:
            exchange.phase = "stream"
            downstream.begin(
                [
                    *downstream_headers(response.headers, without=STREAM_HEADERS),
                    *STREAM_HEADERS,
                    *self._own_headers(exchange),
                ]
            )
        response.headers = []  # a stream may last for minutes, and nothing needs them any more
        self._live.relays.add(relay)
        try:
            await relay.run()
        finally:
            if relay.ended or exchange.end_sent:  # else its client left, or the gateway failed
                exchange.outcome = relay.outcome
                exchange.complete = relay.outcome == "completed"
            self._live.relays.discard(relay)
            exchange.events = scanner.events
            if not exchange.complete:  # a complete stream is billed already: the client was told its cost
                relay.bill()

    def _own_headers(self, exchange: Exchange) -> Headers:
        """Return the gateway's own headers for an answer.

        They are its id, `x-ratelimit-*` as of admission, the serving model and the number of attempts, also by the names of
        Mesh's SDKs, and a cap on output that the gateway set.
        """
        plan, model, attempts = exchange.plan, exchange.model, str(exchange.attempts)
        headers = [
            ("x-request-id", exchange.call.request_id),
            *(limit_headers(exchange.lease.hold.buckets) if exchange.lease is not None else ()),
            ("x-mesh-model", model),
            ("x-mesh-attempts", attempts),
            ("x-resolved-model-id", model),
            ("x-mesh-routing-attempts", attempts),
        ]
        if exchange.attempts > 1 or (plan is not None and model != plan.model):
            headers += [("x-mesh-routing-fallback", "true"), ("x-mesh-routing-model", model)]
        if plan is not None and plan.imposed_cap is not None:
            headers.append(("x-mesh-max-tokens", str(plan.imposed_cap)))
        return headers

    def _refuse(
        self, exchange: Exchange, error_response: ErrorResponse, headers: Headers | None = None
    ) -> Reply | None:
        """Send the client an error response: as a reply, or as an event where the stream's head was already sent."""
        exchange.code = error_response.code
        request_id, masked = exchange.call.request_id, exchange.mask_secrets(error_response)
        early_head = exchange.early_head
        if early_head is not None and early_head.is_sent and early_head.waits:
            recording = exchange.recording if exchange.detached or not early_head.begun else None
            early_head.end(masked, request_id, recording and recording.client)
            return None
        exchange.status = error_response.status
        return error_reply(masked, request_id, _error_headers(exchange) if headers is None else headers)


def _awaits_answer(exchange: Exchange) -> bool:
    """Return whether a stream's client waits for an answer to begin."""
    return exchange.early_head is not None and exchange.early_head.waits


def _assembled(stream: bytes) -> Whole:
    """Assemble a whole answer from an event stream in its place. Raises UpstreamError if that failed or broke off."""
    whole = as_whole(stream)
    if whole.error is not None:
        raise stream_error(whole.error)
    if not whole.is_complete:
        raise ended_early()
    return whole


def _json_headers(response: Response) -> Headers:
    """Return the provider's headers for a whole answer, with JSON as the content type whatever the provider sent."""
    content_type = response.header("content-type") or ""
    if content_type == "application/json" or "json" in content_type.lower():
        return downstream_headers(response.headers)
    return [*downstream_headers(response.headers, without=JSON_HEADERS), *JSON_HEADERS]


def _seen(body: bytes, plan: Plan) -> tuple[int, int]:
    """Estimate the output tokens of a whole answer, and the audio's part."""
    return answer_tokens(body, audio_format(plan.request.fields))


def _error_headers(exchange: Exchange) -> Headers:
    """Return `x-ratelimit-*` as of admission, if the request was admitted, and how many providers were asked, if any was."""
    limits = limit_headers(exchange.lease.hold.buckets) if exchange.lease is not None else []
    attempts = str(exchange.attempts)
    asked = [("x-mesh-attempts", attempts), ("x-mesh-routing-attempts", attempts)] if exchange.attempts else []
    return [*limits, *asked]
