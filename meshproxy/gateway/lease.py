"""The credit of a request in flight: a stream holds its prompt and a slice of output, and asks for the next slice behind the
relay's back when half of this one is used. While some is left nothing waits; when it is used up before the answer comes, the
relay stops reading until it does.
"""

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from meshproxy.errors import Problem, ledger_unavailable
from meshproxy.gateway.resolve import Plan
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.local import LocalAdmission
from meshproxy.ledger.records import NO_LIMITS, Admitted, Ask, Denied
from meshproxy.ledger.store import StoreError, Unavailable
from meshproxy.telemetry.tasks import Tasks

RENEW_RETRY_S = 0.25
MAX_RENEW_RETRIES = 40  # ten seconds: then a stream without credit and without a ledger ends


class Credit:
    """Where holds come from and what they are renewed by. `local` is None where Redis's absence denies; `enforce_tokens`:
    token buckets end streams too.
    """

    __slots__ = ("enforce_tokens", "ledger", "local", "tasks")

    def __init__(self, ledger: Ledger, local: LocalAdmission | None, tasks: Tasks, *, enforce_tokens: bool) -> None:
        self.ledger = ledger
        self.local = local
        self.tasks = tasks
        self.enforce_tokens = enforce_tokens


class Lease:
    """One hold and the output tokens it covers, of the `plan` that it was admitted with.

    `is_local`: admitted without Redis. `unheld`: the settlement can't count on a hold, because it was local or because the
    ledger has lost it (data, or this worker was stuck past every deadline) and admitted none anew. `watermark`: the tokens of
    output past which `spent` has to be asked.
    """

    __slots__ = (
        "_cap",
        "_credit",
        "_on_change",
        "_over",
        "_renewing",
        "_slice",
        "_used",
        "covered",
        "hold",
        "is_local",
        "plan",
        "unheld",
        "watermark",
    )

    def __init__(
        self, hold: Admitted, plan: Plan, covered: int, slice_tokens: int, credit: Credit, *, is_local: bool
    ) -> None:
        self.hold = hold
        self.plan = plan
        self.covered = covered
        self.is_local = is_local
        self.unheld = is_local
        self._cap = plan.output_bound
        self._slice = slice_tokens
        self._credit = credit
        self._used = 0
        self._renewing = False
        self._over = False
        self._on_change: Callable[[Denied | Problem | None], None] = _ignore
        self.watermark = self._renew_at()

    def watch(self, on_change: Callable[[Denied | Problem | None], None]) -> None:
        """Call this with None when a renewal came back, or with what refused it."""
        self._on_change = on_change

    @property
    def bound(self) -> int:
        """The most output tokens that the client gets on this hold, and is charged if it gets no other: a slice past it."""
        return self.covered + self._slice

    @property
    def exhausted(self) -> bool:
        """Whether more output was seen than the hold covers."""
        return self._used > self.covered < self._cap

    def spent(self, tokens: int) -> bool:
        """Note how many tokens of output were seen so far; whether the hold is used up."""
        self._used = tokens
        if tokens > self.watermark and not self._renewing and self.covered < self._cap:
            self._renewing = True
            self.watermark = self.covered
            self._credit.tasks.spawn("renew", self._extend())
        return tokens > self.covered < self._cap

    def _renew_at(self) -> int:
        """Half a slice before the end of what is covered; never, where that is all there can be."""
        return self.covered - self._slice // 2 if self.covered < self._cap else self._cap

    async def keep(self) -> None:
        """Put the deadline off, so that the hold outlives a slow request."""
        if not self.is_local:
            denied = await self._renew(self.hold.amount_nusd, self.covered)
            if denied is not None:
                self._on_change(denied)

    def end(self) -> None:
        """The request is over: ask for nothing more."""
        self._over = True
        self._on_change = _ignore

    async def _extend(self) -> None:
        """Ask for another slice. However it goes, the stream hears of it: it may be waiting."""
        problem: Denied | Problem | None = ledger_unavailable()
        try:
            problem = await self._ask_for_slice()
        finally:
            self._renewing = False
            if problem is None and not self._over:
                self.spent(self._used)  # more may have come meanwhile than was asked for
            self._on_change(problem)

    async def _ask_for_slice(self) -> Denied | Problem | None:
        """Ask until there is an answer."""
        problem: Denied | Problem | None
        for _ in range(MAX_RENEW_RETRIES):
            covered = min(self._used + self._slice, self._cap)
            try:
                problem = await self._renew(self.plan.hold_nusd(covered), covered)
                break
            except (Unavailable, StoreError):
                problem = self._extend_locally(covered)
                if problem is None or self._over:
                    break
                await asyncio.sleep(RENEW_RETRY_S)
        if problem is None:
            self.covered = covered
            self.watermark = self._renew_at()
        return problem

    def _extend_locally(self, covered: int) -> Problem | None:
        """Take another slice from what this worker may admit by itself, if it may."""
        more_nusd = self.plan.hold_nusd(covered) - self.plan.hold_nusd(self.covered)
        if self._credit.local is None or not self._credit.local.take(self.hold.ask, more_nusd):
            return ledger_unavailable()
        return None

    async def _renew(self, amount_nusd: int, covered: int) -> Denied | None:
        """Renew the hold, or admit another where the ledger has none any more. None: it is held."""
        tokens = self.plan.prompt_tokens + covered
        answer = await self._credit.ledger.renew(
            self.hold,
            amount_nusd=amount_nusd,
            tokens=tokens,
            enforce_tokens=self._credit.enforce_tokens,
        )
        if isinstance(answer, Denied) and answer.which == "hold":
            self.unheld = True
            if self._over:
                return None
            answer = await self._credit.ledger.admit(_anew(self.hold.ask, amount_nusd, tokens))
        if isinstance(answer, Denied):
            return answer
        self.hold = replace(answer, ask=self.hold.ask, buckets=self.hold.buckets)
        self.unheld = False
        return None


def _anew(ask: Ask, amount_nusd: int, tokens: int) -> Ask:
    """What the ledger is asked in place of a hold that it has lost: credit and budgets have to pay for all of it, and its limits
    are those of a request that was admitted already.
    """
    return replace(
        ask,
        amount_nusd=amount_nusd,
        amount_min_nusd=None,
        tokens=tokens,
        key_limits=NO_LIMITS,
        account_limits=NO_LIMITS,
    )


def _ignore(_refusal: Denied | Problem | None) -> None:
    """Nobody watches."""
