"""Relay: an upstream's events go to the client as they come, in the call that brought them.

There is no queue and no task between the two sockets: the upstream's protocol calls `data`, which scans the bytes and writes
them on, in the frames they arrived in where those hold. What a client doesn't take in time stops the reading upstream
(backpressure); credit is renewed behind the stream's back and never awaited while some is left.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from meshproxy.errors import ErrorResponse, UpstreamError, insufficient_credits, upstream_error
from meshproxy.gateway.admit import Lease
from meshproxy.gateway.exchange import Downstream, Exchange, refused
from meshproxy.gateway.settle import bill
from meshproxy.ledger.records import Denial
from meshproxy.money import format_usd
from meshproxy.openai.errors import error_event
from meshproxy.openai.event_stream import COST, DONE, PING, StreamScanner
from meshproxy.policy.failover import in_stream
from meshproxy.upstream.response import Response

MAX_DRAINED_BYTES: Final = 8_388_608  # read on after the client has gone, to learn what it used
LAST_BYTE_S: Final = 2.0  # that the end of a body gets behind its [DONE]: then its connection is given up
LOOK_BYTES: Final = 16_384  # relayed between two looks at how much waits for the client
CREDIT_RAN_OUT: Final = "Credit ran out in the middle of the answer: the account has {} USD available when it is paid."
OUTCOMES = {
    "insufficient_credits": "insufficient_credits",
    "spend_limit_exceeded": "insufficient_credits",
    "rate_limit_exceeded": "rate_limited",
}


class Relay:
    """One stream from an upstream's response to its client. It is the upstream's `Sink`.

    `run` returns when the stream has ended, whichever way; `outcome` then says which.
    """

    __slots__ = (
        "_afterwards",
        "_clock",
        "_downstream",
        "_drained_bytes",
        "_exchange",
        "_first_at",
        "_last_at",
        "_lease",
        "_many_choices",
        "_max_gap_s",
        "_response",
        "_signal",
        "_unlooked_bytes",
        "_withheld",
        "_written_at",
        "ended",
        "outcome",
        "scanner",
    )

    def __init__(
        self,
        response: Response,
        downstream: Downstream,
        exchange: Exchange,
        lease: Lease,
        scanner: StreamScanner,
        clock: Callable[[], float],
    ) -> None:
        self._response = response
        self._downstream = downstream
        self._exchange = exchange
        self._lease = lease
        self._many_choices = exchange.plan is not None and exchange.plan.request.n > 1
        self._clock = clock
        self._signal: asyncio.Future[None] | None = None
        self._written_at = clock()
        self._first_at = self._last_at = 0.0  # of events; 0.0: none yet
        self._max_gap_s = 0.0
        self._drained_bytes = 0
        self._unlooked_bytes = 0
        self._withheld: bytes | None = None
        self._afterwards: Callable[[], None] | None = None
        self.scanner = scanner
        scanner.tell_cost = self._cost
        self.ended = False
        self.outcome = "upstream_failed"

    async def run(self) -> None:
        """Relay until the end; a cancellation closes the upstream's socket at once."""
        try:
            self._response.relay(self)
            while not self.ended:
                self._signal = asyncio.get_running_loop().create_future()
                if self._downstream.congested():
                    await self._downstream.drained()
                else:
                    self._resume()  # the client may have caught up before anyone looked
                    await self._signal
        finally:
            self._response.close()
            exchange = self._exchange
            exchange.first_event_at, exchange.last_event_at = self._first_at, self._last_at
            exchange.max_gap_s = self._max_gap_s

    def data(self, payload: bytes, frame: bytes | None) -> None:
        """Body bytes from upstream; see `upstream.response.Sink`."""
        arrived_at = self._clock()
        scanner, lease = self.scanner, self._lease
        try:
            events = scanner.feed(payload)
        except UpstreamError as fault:
            self.fail(fault)
            return
        is_spent = scanner.most > lease.watermark and lease.spent(scanner.tokens)
        if is_spent and scanner.tokens > lease.bound:
            self._withhold(events)
            return
        if events:
            self._downstream.write(events, frame if events is payload else None)
            self._timed(arrived_at)
        self._unlooked_bytes += len(payload)
        if scanner.done:
            self._say_done()
        elif scanner.error is not None:
            self._stop_by_provider()
        elif is_spent:
            self._wait()
        elif self._unlooked_bytes >= LOOK_BYTES:
            self._look_at_client()

    def end(self) -> None:
        """The upstream's body is complete, which is a good end only if its last event said so."""
        if self.ended:
            return
        if self._withheld is not None:
            self._afterwards = self.end
            return
        rest = self.scanner.finish()
        if rest:
            self._downstream.write(rest)
        if self.scanner.error is not None:
            self._stop_by_provider()
        elif self.scanner.done or (self.scanner.complete and not self._many_choices):
            self._say_done()
            self._finish()
        else:
            problem = upstream_error("The provider ended the stream early.", may_have_run=True)
            self._exchange.failed(UpstreamError(problem, safe_to_repeat=False, answered=200))
            self.stop(problem)

    def fail(self, fault: UpstreamError) -> None:
        """The upstream died or fell silent; after its [DONE] that is nobody's business."""
        if self._withheld is not None:
            self._afterwards = partial(self.fail, fault)
        elif self.scanner.done:
            self._finish()
        else:
            self._exchange.failed(fault)
            self.stop(fault.problem)

    def stop(self, problem: ErrorResponse) -> None:
        """End the stream here, telling the client why: an error event, never a silent success and never [DONE]."""
        if self.ended:
            return
        self._exchange.code = problem.code
        self._downstream.write(error_event(self._exchange.told(problem), self._exchange.call.request_id))
        self._finish()
        self._response.close()

    def renewed(self, refusal: Denial | ErrorResponse | None) -> None:
        """A renewal came back: go on, unless credit is out or the client is what is waited for."""
        if refusal is not None and not self.ended:
            problem = refused(refusal) if isinstance(refusal, Denial) else refusal
            self.outcome = OUTCOMES.get(problem.code, "failed")
            if isinstance(refusal, Denial) and refusal.reason == "insufficient_credits":
                problem = insufficient_credits(CREDIT_RAN_OUT.format(format_usd(self._left_nusd(refusal))))
            self.stop(problem)
        elif not self.ended:
            self._let_go()
            if self._downstream.congested():
                self._wake()  # to wait for the client, which is full of what was let go
            else:
                self._resume()

    def bill(self) -> None:
        """Write down what the stream has used and cost so far."""
        scanner = self.scanner
        most = self._lease.bound if self.short_of_credit else None
        bill(
            self._exchange,
            scanner.report,
            scanner.reported_model,
            lambda: scanner.tokens,
            most,
            audio_output=lambda: scanner.audio_tokens,
            outdated=scanner.outdated,
        )

    def _left_nusd(self, denied: Denial) -> int:
        """What the account has available when this stream, which ends now, is settled."""
        self.bill()
        held_nusd = 0 if self._lease.unheld else self._lease.hold.amount_nusd
        return denied.available_nusd + held_nusd - self._exchange.cost_nusd

    def _cost(self) -> str:
        """What the stream costs by now, which is what is charged if nothing more comes."""
        self.bill()
        return format_usd(self._exchange.cost_nusd)

    @property
    def short_of_credit(self) -> bool:
        """Whether the stream ended for want of credit, or while some of it waited for credit."""
        return self.outcome == "insufficient_credits" or self._withheld is not None

    def shut_down(self, problem: ErrorResponse) -> None:
        """The gateway can't wait any longer for this stream."""
        self.outcome = "shutdown"
        self.stop(problem)

    def look_after(self, now: float, heartbeat_s: float) -> None:
        """Keep middleboxes from closing a stream whose upstream is silent. One that has said all isn't waited for."""
        silent_s = now - self._written_at
        if self.ended:
            return
        if self.outcome == "completed":
            if silent_s >= LAST_BYTE_S:
                self._response.close()
                self._finish()
        elif silent_s >= heartbeat_s and not self._downstream.congested():
            self._downstream.write(PING)
            self._written_at = now

    def _withhold(self, events: bytes) -> None:
        """More than a slice past the hold has come: the client gets it when there is credit for it. It is at most what one
        read brought, for the reading stops.
        """
        self._withheld = (self._withheld or b"") + events
        self._wait()

    def _let_go(self) -> None:
        """There is credit for what was withheld: do all that was put off."""
        if self._withheld is None or self._lease.exhausted:
            return
        events, self._withheld = self._withheld, None
        if events:
            self._downstream.write(events)
            self._timed(self._clock())
        if self.scanner.done:
            self._say_done()
        elif self.scanner.error is not None:
            self._stop_by_provider()
        if self._afterwards is not None:
            self._afterwards()

    def _say_done(self) -> None:
        """The client needn't wait for the end of the upstream's body."""
        if self.outcome != "completed":
            self.outcome = "completed"
            cost = self._cost()
            self._downstream.write(DONE if cost == self.scanner.told_cost else COST % cost.encode() + DONE)
            self._written_at = self._clock()

    def _look_at_client(self) -> None:
        """Wait for one that doesn't keep up; of one that has gone, read its usage, unless that takes too much."""
        looked_bytes, self._unlooked_bytes = self._unlooked_bytes, 0
        if not self._exchange.detached:
            if self._downstream.congested():
                self._wait()
            return
        self._drained_bytes += looked_bytes
        if self._drained_bytes > MAX_DRAINED_BYTES:
            self._response.close()
            self._finish()

    def _wait(self) -> None:
        """Read on when there is credit, or room."""
        self._response.pause()
        self._wake()

    def _stop_by_provider(self) -> None:
        fault = in_stream(self.scanner.error)
        self._exchange.failed(fault)
        self.stop(fault.problem)

    def _timed(self, arrived_at: float) -> None:
        if self._first_at:
            gap_s = arrived_at - self._last_at
            if gap_s > self._max_gap_s:  # noqa: PLR1730 - max() costs as much as all else here
                self._max_gap_s = gap_s
        else:
            self._first_at = arrived_at
            self._exchange.overhead_s += self._clock() - arrived_at
        self._last_at = self._written_at = arrived_at

    def _finish(self) -> None:
        self.ended = True
        self._downstream.finish()
        self._wake()

    def _resume(self) -> None:
        if not self._lease.exhausted:
            self._response.resume()

    def _wake(self) -> None:
        if self._signal is not None and not self._signal.done():
            self._signal.set_result(None)
