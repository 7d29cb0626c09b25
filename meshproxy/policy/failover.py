"""What a provider's refusal means: what the client is told of it, and whether another provider may be asked instead."""

import math

from meshproxy.errors import (
    MAX_RETRY_AFTER_S,
    Problem,
    UpstreamFault,
    invalid,
    provider_not_available,
    upstream_error,
)
from meshproxy.value import Value
from meshproxy.wire.replies import provider_error

DEFAULT_RETRY_AFTER_S = 1.0  # where a provider is full and doesn't say for how long

_REFUSED_REQUEST = frozenset({400, 413, 422})  # every provider would refuse it
_REFUSED_US = {  # our account or our configuration there, which the caller can do nothing about
    401: "The provider refused the gateway's credentials.",
    402: "The provider refused the gateway's account.",
    403: "The provider refused the gateway.",
    404: "The provider doesn't serve what the gateway asked for.",
}
_FULL = frozenset(
    {503, 529}
)  # RFC 9110, 15.6.4, and Anthropic's and Cloudflare's word for overloaded: nothing was done
_IN_THE_MIDDLE = frozenset({408, 409})  # refused, but who knows after what


class Verdict(Value, frozen=True):
    """What the client is told if nothing better comes, and whether the next attempt may be made."""

    problem: Problem
    try_next: bool


def after_status(
    status: int,
    body: bytes,
    retry_after: str | None,
    *,
    retry_after_ms: str | None = None,
    content_type: str | None = None,
) -> Verdict:
    """The verdict on an answer whose status isn't 200. The provider's words go to the client, but for those about our account
    there, which may name it or its key.
    """
    if status in _REFUSED_REQUEST:
        words = provider_error(body, content_type)
        return Verdict(invalid("The provider refused the request.", provider_error=words), try_next=False)
    if status in _REFUSED_US:
        return Verdict(upstream_error(_REFUSED_US[status], may_have_run=False), try_next=True)
    wait_s = wait_of(retry_after, retry_after_ms)
    if status == 429:
        limited = provider_not_available("The provider has no capacity left.", wait_s or DEFAULT_RETRY_AFTER_S)
        return Verdict(limited, try_next=True)
    words = provider_error(body, content_type)
    if status in _FULL:
        full = Problem(502, "upstream_error", "The provider is overloaded.", retry_after_s=wait_s, provider_error=words)
        return Verdict(full, try_next=True)
    if status >= 500 or status in _IN_THE_MIDDLE:
        failed = upstream_error(f"The provider failed with status {status}.", may_have_run=True, provider_error=words)
        return Verdict(failed, try_next=True)
    nonsense = f"The provider answered with status {status}, which makes no sense here."
    accepted = 200 <= status < 300  # whatever it did, it did it: another would do it again
    return Verdict(upstream_error(nonsense, may_have_run=accepted, provider_error=words), try_next=not accepted)


def is_unwell(fault: UpstreamFault) -> bool:
    """Whether a fault speaks against the upstream itself: it couldn't be reached, fell silent, broke off or failed. That it has
    no capacity, or refuses this request or our account, doesn't; neither does what never left the gateway.
    """
    if fault.answered is None:
        return fault.problem.status != 503  # no connection was free, or the gateway is shutting down
    return fault.answered >= 500 or fault.answered == 200


def asks_to_wait_s(fault: UpstreamFault) -> float:
    """For how long the upstream should be spared, by its own word; at most MAX_RETRY_AFTER_S, 0.0 if it didn't ask."""
    return min(fault.problem.retry_after_s or 0.0, MAX_RETRY_AFTER_S) if fault.answered is not None else 0.0


def wait_of(retry_after: str | None, retry_after_ms: str | None = None) -> float | None:
    """Seconds that a provider asks to wait, at most MAX_RETRY_AFTER_S; None if it doesn't say. An HTTP date can't be read
    without a clock, and counts as not said.
    """
    for text, per_second in ((retry_after_ms, 1000), (retry_after, 1)):
        wait = _number(text)
        if wait is not None:
            return min(wait / per_second, MAX_RETRY_AFTER_S)
    return None


def _number(text: str | None) -> float | None:
    """A count that is finite and not negative."""
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None
