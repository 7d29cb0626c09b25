"""The wait between a provider's head and its first event: as long as the client's head is held back, a stream that comes to
nothing can still be asked for elsewhere, or be refused with an honest status.
"""

from collections.abc import Callable

from meshproxy.errors import UpstreamFault, upstream_error
from meshproxy.policy.failover import after_event
from meshproxy.upstream.response import Response
from meshproxy.wire.sse import StreamScanner

LOOK_BYTES = 2048  # of one look for an event


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
