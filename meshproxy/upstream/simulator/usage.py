"""What the simulated provider reports as usage, and its lies about it."""

from collections.abc import Callable
from typing import Any

from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.replies import Usage

ABSURD_TOKENS = 10**15


def reported(usage: Usage, behaviour: Behaviour) -> Usage:
    """The usage object as it is told."""
    lie = behaviour.one_of(_LIES)
    return _mapped(usage, _LIES[lie]) if lie else usage


def _mapped(usage: Usage, lie: Callable[[int], Any]) -> Usage:
    return {name: _mapped(part, lie) if isinstance(part, dict) else lie(part) for name, part in usage.items()}


_LIES: dict[str, Callable[[int], Any]] = {
    "usage-negative": lambda tokens: -tokens - 1,
    "usage-absurd": lambda tokens: tokens + ABSURD_TOKENS,
    "usage-string": str,
}
