"""The wait between a provider's head and its first event: as long as the client's head is held back, a stream that comes to
nothing can still be asked for elsewhere, or be refused with an honest status.
"""

from collections.abc import Callable

from meshproxy.errors import Problem, UpstreamFault, upstream_error
from meshproxy.gateway.call import Downstream, Headers
from meshproxy.policy.failover import after_event
from meshproxy.upstream.response import Response
from meshproxy.wire.convert import LOOK_BYTES as FORM_BYTES
from meshproxy.wire.convert import form_of
from meshproxy.wire.replies import error_event
from meshproxy.wire.sse import PING, StreamScanner

LOOK_BYTES = 2048  # of one look for an event
LONG_S = 3600.0  # longer than any idle_timeout_s that makes sense; then it is looked again


async def first_event(response: Response, hold_s: float, clock: Callable[[], float]) -> None:
    """Return as soon as an event has arrived, or when none has for `hold_s`. Nothing of the body is taken.

    UpstreamFault if the stream broke off, ended, or told of an error before any event.
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

    def end(self, problem: Problem, request_id: str) -> None:
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
    raise UpstreamFault(problem, safe_to_repeat=True, answered=200)


def _raise_if_first(scanner: StreamScanner) -> None:
    """Raise if the first event is an error. One that came with events before it is the client's to hear of, however fast."""
    if scanner.error is not None and scanner.events == 1:
        raise after_event(scanner.error, otherwise="The provider failed before it began.")
