"""Relay: pass an upstream's events to the client in the call that delivered them.

There is no queue and no task between the two sockets. The upstream's protocol calls `data`, which scans the bytes and
writes them to the client, in the frames in which they arrived where possible. A client that falls behind pauses the
reading upstream (backpressure). Credit is renewed in the background and awaited only when it is used up. A relay
withholds at most what one read brought, and after a hang-up reads at most `MAX_DRAINED_BYTES`.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from meshproxy.errors import ErrorResponse, UpstreamError, insufficient_credits
from meshproxy.gateway.admit import Lease
from meshproxy.gateway.exchange import Downstream, Exchange, denial_response
from meshproxy.gateway.settle import bill
from meshproxy.ledger.records import Denial
from meshproxy.openai.errors import error_event
from meshproxy.openai.event_stream import COST, DONE, PING, StreamScanner
from meshproxy.policy.failover import ended_early, stream_error
from meshproxy.units import format_usd
from meshproxy.upstream.response import LAST_BYTE_S, Response

MAX_DRAINED_BYTES: Final = 8_388_608  # read after the client has gone, to learn the usage
BACKLOG_CHECK_BYTES: Final = 16_384  # relayed between two checks of the client's backlog
CREDIT_RAN_OUT: Final = "Credit ran out in the middle of the answer: the account has {} USD available when it is paid."
OUTCOMES = {
    "insufficient_credits": "insufficient_credits",
    "spend_limit_exceeded": "insufficient_credits",
    "rate_limit_exceeded": "rate_limited",
}


class Relay:
    """One stream from an upstream's response to its client. It implements the upstream's `Sink`.

    `run` returns when the stream has ended; `outcome` is how it ended.
    """

    __slots__ = (
        "_choices",
        "_clock",
        "_deferred",
        "_downstream",
        "_drained_bytes",
        "_exchange",
        "_first_at",
        "_has_natives",
        "_last_at",
        "_lease",
        "_max_gap_s",
        "_response",
        "_signal",
        "_unchecked_bytes",
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
        self._choices = 1 if exchange.plan is None else exchange.plan.request.n
        self._has_natives = exchange.candidate is not None and bool(exchange.candidate.natives)
        self._clock = clock
        self._signal: asyncio.Future[None] | None = None
        early_head = exchange.early_head
        self._written_at = early_head.written_at if early_head is not None else clock()
        self._first_at = self._last_at = 0.0  # times of events; 0.0: none yet
        self._max_gap_s = 0.0
        self._drained_bytes = 0
        self._unchecked_bytes = 0
        self._withheld: bytes | None = None
        self._deferred: Callable[[], None] | None = None
        self.scanner = scanner
        scanner.cost_so_far = self._cost
        self.ended = False
        self.outcome = "upstream_failed"

    async def run(self) -> None:
        """Relay until the end. A cancellation closes the upstream's connection at once."""
        try:
            self._response.relay(self)
            while not self.ended:
                self._signal = asyncio.get_running_loop().create_future()
                if self._downstream.congested():
                    await self._downstream.drained()
                else:
                    self._resume()  # the client may have caught up before `congested` was checked
                    await self._signal
        finally:
            self._response.close()
            exchange = self._exchange
            exchange.first_event_at, exchange.last_event_at = self._first_at, self._last_at
            exchange.max_gap_s = self._max_gap_s

    def data(self, payload: bytes, frame: bytes | None) -> None:
        """Process body bytes from upstream; see `upstream.response.Sink`."""
        arrived_at = self._clock()
        scanner, lease = self.scanner, self._lease
        try:
            events = scanner.feed(payload)
        except UpstreamError as error:
            self.fail(error)
            return
        is_exhausted = scanner.most > lease.watermark and lease.record_output(scanner.tokens)
        if is_exhausted and scanner.tokens > lease.bound:
            self._withhold(events)
            return
        if events:
            self._downstream.write(events, frame if events is payload else None)
            if arrived_at - self._last_at > self._max_gap_s:  # the first event, or the longest gap
                self._record_times(arrived_at)
            self._last_at = self._written_at = arrived_at
        self._unchecked_bytes += len(payload)
        if scanner.done:
            self._complete()
        elif scanner.error is not None:
            self._stop_by_provider()
        elif is_exhausted:
            self._wait()
        elif self._unchecked_bytes >= BACKLOG_CHECK_BYTES:
            self._check_backlog()

    def end(self) -> None:
        """End the stream at the end of the upstream's body: a success only if the last event was final."""
        if self.ended:
            return
        if self._withheld is not None:
            self._deferred = self.end
            return
        rest = self.scanner.finish()
        if rest:
            self._downstream.write(rest)
        if self.scanner.error is not None:
            self._stop_by_provider()
        elif self.scanner.done or (self.scanner.complete and self._all_ended()):
            self._complete()
            self._finish()
        else:
            error = ended_early()
            self._exchange.record_failure(error)
            self.stop(error.response)

    def _all_ended(self) -> bool:
        """Return whether all `n` choices have a finish reason, given that one has."""
        return self._choices == 1 or self.scanner.ended_choices >= self._choices

    def fail(self, error: UpstreamError) -> None:
        """End the stream after the upstream failed. Ignore errors after `[DONE]`: the stream is complete."""
        if self._withheld is not None:
            self._deferred = partial(self.fail, error)
        elif self.scanner.done:
            self._finish()
        else:
            self._exchange.record_failure(error)
            self.stop(error.response)

    def stop(self, error_response: ErrorResponse) -> None:
        """End the stream early with an error event, never with `[DONE]` or without a reason. A complete one just ends."""
        if self.ended:
            return
        if self.outcome != "completed":
            if not self._exchange.detached:
                self._exchange.code, self._exchange.end_sent = error_response.code, True
            event = error_event(self._exchange.mask_secrets(error_response), self._exchange.call.request_id)
            self._downstream.write(event)
        self._finish()
        self._response.close()

    def renewed(self, refusal: Denial | ErrorResponse | None) -> None:
        """Continue after a renewal of the hold, or stop if it was refused and the stream isn't complete."""
        if self.ended:
            return
        if refusal is not None and self.outcome != "completed":
            error_response = denial_response(refusal) if isinstance(refusal, Denial) else refusal
            self.outcome = OUTCOMES.get(error_response.code, "failed")
            if isinstance(refusal, Denial) and refusal.reason == "insufficient_credits":
                error_response = insufficient_credits(CREDIT_RAN_OUT.format(format_usd(self._left_nusd(refusal))))
            self.stop(error_response)
        else:
            self._release_withheld()
            if self._downstream.congested():
                self._wake()  # `run` then waits for the client, which has the withheld events to read
            else:
                self._resume()

    def bill(self) -> None:
        """Record what the stream has used and cost so far. The provider's model matters where it walks fallbacks itself."""
        scanner = self.scanner
        most = self._lease.bound if self.short_of_credit else None
        bill(
            self._exchange,
            scanner.report,
            scanner.reported_model if self._has_natives else None,
            lambda: scanner.tokens,
            most,
            audio_output=lambda: scanner.audio_tokens,
            outdated=scanner.outdated,
            served_tier=scanner.service_tier,
        )

    def _left_nusd(self, denied: Denial) -> int:
        """Return what the account will have available once this stream, which ends now, is settled."""
        self.bill()
        held_nusd = 0 if self._lease.unheld else self._lease.hold.amount_nusd
        return denied.available_nusd + held_nusd - self._exchange.cost_nusd

    def _cost(self) -> str:
        """Return the cost so far, as a decimal string in USD: the charge if nothing more comes."""
        self.bill()
        return format_usd(self._exchange.cost_nusd)

    @property
    def short_of_credit(self) -> bool:
        """Whether the stream ended for lack of credit, or while events waited for credit."""
        return self.outcome == "insufficient_credits" or self._withheld is not None

    def shut_down(self, error_response: ErrorResponse) -> None:
        """End the stream because the gateway shuts down."""
        if self.outcome != "completed":
            self.outcome = "shutdown"
        self.stop(error_response)

    def ping_if_silent(self, now: float, heartbeat_s: float) -> None:
        """Ping a client whose upstream is silent, so that no proxy on the way closes the connection.

        A stream whose answer is complete ends LAST_BYTE_S later, even if the upstream's body hasn't.
        """
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
        """Keep events from the client until there is credit: they go more than a slice past the hold.

        They are at most what one read brought, since reading pauses.
        """
        self._withheld = (self._withheld or b"") + events
        self._wait()

    def _release_withheld(self) -> None:
        """Send the withheld events once there is credit, and do what was put off with them."""
        if self._withheld is None or self._lease.exhausted:
            return
        events, self._withheld = self._withheld, None
        if events:
            self._downstream.write(events)
            self._record_times(self._clock())
        if self.scanner.done:
            self._complete()
        elif self.scanner.error is not None:
            self._stop_by_provider()
        if self._deferred is not None:
            self._deferred()

    def _complete(self) -> None:
        """Complete the answer for the client without waiting for the end of the upstream's body."""
        if self.outcome != "completed":
            self.outcome = "completed"
            self._exchange.end_sent = not self._exchange.detached
            cost = self._cost()
            self._downstream.write(DONE if cost == self.scanner.written_cost else COST % cost.encode() + DONE)
            self._written_at = self._clock()

    def _check_backlog(self) -> None:
        """Pause for a client that falls behind. After a hang-up, read on for the usage, up to MAX_DRAINED_BYTES."""
        checked_bytes, self._unchecked_bytes = self._unchecked_bytes, 0
        if not self._exchange.detached:
            if self._downstream.congested():
                self._wait()
            return
        self._drained_bytes += checked_bytes
        if self._drained_bytes > MAX_DRAINED_BYTES:
            self._response.close()
            self._finish()

    def _wait(self) -> None:
        """Pause reading until there is credit, or the client catches up."""
        self._response.pause()
        self._wake()

    def _stop_by_provider(self) -> None:
        """End the stream with the error that the provider sent in it."""
        error = stream_error(self.scanner.error)
        self._exchange.record_failure(error)
        self.stop(error.response)

    def _record_times(self, arrived_at: float) -> None:
        """Record when events arrived: the first, the last, and the longest gap."""
        if self._first_at:
            gap_s = arrived_at - self._last_at
            if gap_s > self._max_gap_s:  # noqa: PLR1730 - max() costs as much as the rest of this method
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
        """Read on from upstream, unless the stream waits for credit."""
        if not self._lease.exhausted:
            self._response.resume()

    def _wake(self) -> None:
        """Wake `run`, to check the client and the end of the stream."""
        if self._signal is not None and not self._signal.done():
            self._signal.set_result(None)
