"""Attempt: ask providers in their order until one accepts. Another is asked only while nothing was sent to the client and
what failed is safe to repeat.
"""

from collections.abc import Callable

from meshproxy.errors import Fault, Source, UpstreamFault, internal_error, upstream_error
from meshproxy.gateway.deployment import Deployment
from meshproxy.gateway.exchange import Exchange
from meshproxy.gateway.record import Recorder
from meshproxy.gateway.resolve import Plan
from meshproxy.policy.catalog import Attempt
from meshproxy.policy.failover import after_status
from meshproxy.upstream.response import Response

CHAT_PATH = "/chat/completions"


class Attempts:
    """How one request's attempts are made."""

    def __init__(self, deployment: Deployment, recorder: Recorder, clock: Callable[[], float]) -> None:
        self._deployment = deployment
        self._recorder = recorder
        self._clock = clock

    async def first_answer(self, exchange: Exchange, plan: Plan) -> Response:
        """The first response that is an answer: 200, and an event stream where one was asked for. Otherwise the Fault of the
        attempt that ended it.
        """
        failure = Fault(Source.GATEWAY, internal_error())
        for attempt in plan.attempts:
            exchange.attempt = attempt
            exchange.attempts += 1
            try:
                response = await self._post(exchange, attempt, plan)
                await _accept(response, streamed=plan.request.stream)
            except UpstreamFault as fault:
                self._recorder.attempted(attempt.upstream, _label(fault))
                failure = fault
                if not fault.safe_to_repeat:
                    break
            else:
                self._recorder.attempted(attempt.upstream, "200")
                return response
        raise failure

    async def _post(self, exchange: Exchange, attempt: Attempt, plan: Plan) -> Response:
        provider = self._deployment.providers[attempt.upstream]
        body = plan.body_for(attempt)
        exchange.sent_at = self._clock()
        if exchange.attempts == 1:
            exchange.overhead_s = exchange.sent_at - exchange.call.received_at
        response = await provider.post(CHAT_PATH, exchange.call.forward, body)
        exchange.first_byte_at = self._clock()
        return response


async def _accept(response: Response, *, streamed: bool) -> None:
    """Return if this is an answer; else an UpstreamFault says what the client hears and whether another may be asked."""
    try:
        if response.status != 200:
            verdict = after_status(
                response.status,
                await response.read(),
                response.header("retry-after"),
                retry_after_ms=response.header("retry-after-ms"),
                content_type=response.header("content-type"),
            )
            raise UpstreamFault(verdict.problem, safe_to_repeat=verdict.try_next, answered=response.status)
        if streamed and not _is_event_stream(response):
            problem = upstream_error("The provider answered a stream with something else.", may_have_run=True)
            raise UpstreamFault(problem, safe_to_repeat=False, answered=200)
    except BaseException:
        response.close()
        raise


def _is_event_stream(response: Response) -> bool:
    return (response.header("content-type") or "").partition(";")[0].strip().lower() == "text/event-stream"


def _label(fault: UpstreamFault) -> str:
    """How an attempt that failed is counted."""
    if fault.answered is not None:
        return str(fault.answered)
    if fault.problem.status == 504:
        return "timeout"
    return "connect_error" if fault.safe_to_repeat else "reset"
