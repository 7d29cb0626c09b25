"""The credit of a request in flight: a stream holds its prompt and a slice of output, and asks for the next slice behind the
relay's back when half of this one is used. While some is left nothing waits; when it is used up before the answer comes, the
relay stops reading until it does.
"""

from collections.abc import Callable

from meshproxy.errors import Fault, Problem
from meshproxy.gateway.admission import refused
from meshproxy.gateway.resolve import Plan
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import Admitted, Denied
from meshproxy.telemetry.tasks import Tasks


class Lease:
    """One hold and the output tokens it covers.

    `unheld`: the ledger has no such hold any more (it lost data, or the worker was stuck past every deadline), so the
    settlement must not count on one. A ledger that can't be reached refuses nothing: it is asked again.
    """

    __slots__ = (
        "_cap",
        "_ledger",
        "_on_change",
        "_renewing",
        "_slice",
        "_tasks",
        "_used",
        "covered",
        "hold",
        "plan",
        "unheld",
    )

    def __init__(
        self, hold: Admitted, plan: Plan, covered: int, slice_tokens: int, ledger: Ledger, tasks: Tasks
    ) -> None:
        self.hold = hold
        self.covered = covered
        self.unheld = False
        self.plan = plan
        self._cap = plan.output_tokens
        self._slice = slice_tokens
        self._ledger = ledger
        self._tasks = tasks
        self._used = 0
        self._renewing = False
        self._on_change: Callable[[Problem | None], None] = _ignore

    def watch(self, on_change: Callable[[Problem | None], None]) -> None:
        """Call this with None when a renewal came back, or with the problem that refused it."""
        self._on_change = on_change

    @property
    def exhausted(self) -> bool:
        """Whether more output was seen than the hold covers."""
        return self._used > self.covered < self._cap

    def spent(self, tokens: int) -> bool:
        """Note how many tokens of output were seen so far; whether the hold is used up."""
        self._used = tokens
        if tokens + self._slice // 2 > self.covered < self._cap and not self._renewing:
            self._renewing = True
            self._tasks.spawn("renew", self._extend())
        return tokens > self.covered < self._cap

    async def keep(self) -> None:
        """Put the deadline off, so that the hold outlives a slow request."""
        await self._renew(self.hold.amount_nusd)

    async def _extend(self) -> None:
        covered = min(self._used + self._slice, self._cap)
        amount_nusd = self.plan.hold_nusd(covered)
        try:
            denied = await self._renew(amount_nusd)
        except Fault:
            return
        finally:
            self._renewing = False
        if denied is not None:
            self._on_change(refused(denied))
        else:
            self.covered = covered
            self._on_change(None)

    async def _renew(self, amount_nusd: int) -> Denied | None:
        answer = await self._ledger.renew(self.hold, amount_nusd=amount_nusd)
        if isinstance(answer, Admitted):
            self.hold = answer
            return None
        self.unheld = answer.which == "hold"
        return None if self.unheld else answer


def _ignore(_problem: Problem | None) -> None:
    """Nobody watches yet."""
