"""What goes into the ledger and what comes out. Amounts are nano-USD, spans of time are seconds unless the name says ms."""

from typing import Literal

from meshproxy.policy.principal import Budgets, Limits
from meshproxy.value import Value
from meshproxy.wire.usage import Usage

NO_LIMITS = Limits()
NO_BUDGETS = Budgets()

Reason = Literal["rate_limit", "insufficient_credits", "spend_limit", "gone"]
Scope = Literal["key", "account"]
Kind = Literal["requests", "tokens"]
Period = Literal["minute", "day"]
UsageSource = Literal["reported", "estimated", "drained", "none"]


class Ask(Value, frozen=True, kw_only=True):
    """A request that wants in. Limits are resolved: None is no limit here, not a default that holds elsewhere.

    `amount_min_nusd`: hold less than `amount_nusd`, down to this, rather than deny (None: all or nothing). Then no more than
    `share_percent` of the room that there is is held, but for the least.
    `tokens` is the estimate that the token buckets are debited by until the settlement puts them right.
    """

    hold_id: str
    account: str
    key_id: str
    amount_nusd: int
    tokens: int
    ttl_ms: int
    session: str | None = None
    amount_min_nusd: int | None = None
    share_percent: int = 100
    strict: bool = True
    key_limits: Limits = NO_LIMITS
    account_limits: Limits = NO_LIMITS
    budgets: Budgets = NO_BUDGETS
    session_budgets: Budgets = NO_BUDGETS
    account_budgets: Budgets = NO_BUDGETS

    def amount_within(self, room_nusd: int) -> int | None:
        """What is held where there is so much room; None where it is too little. `admit.lua` has the same rule."""
        if self.amount_nusd <= room_nusd:
            return self.amount_nusd
        if self.amount_min_nusd is None or self.amount_min_nusd > room_nusd:
            return None
        return max(self.amount_min_nusd, room_nusd * self.share_percent // 100)


class BucketState(Value, frozen=True):
    """One bucket as the decision left it: `limit` a `per`, `remaining` (a debt shows as 0), `reset_s` until it is full."""

    scope: Scope
    kind: Kind
    limit: int
    remaining: int
    reset_s: float
    per: Period = "minute"


class Admitted(Value, frozen=True):
    """A hold of `amount_nusd` in all, which a clamped ask may find lower than it asked for. `buckets` are as of admission."""

    ask: Ask
    amount_nusd: int
    available_nusd: int
    buckets: tuple[BucketState, ...]

    @property
    def hold_id(self) -> str:
        """The id it is renewed and settled by."""
        return self.ask.hold_id


class Denied(Value, frozen=True):
    """Why not. `which` names the limit: "key requests", "account requests per day", "key parallel requests", "session daily
    budget", "credit", "hold" (which is gone: settled, or forgotten). `retry_after_s` is exact, and None where waiting doesn't
    help. `needed_nusd` is what a hold needs at least; of a budget `spent_nusd` is spent or held.
    """

    reason: Reason
    which: str
    available_nusd: int
    retry_after_s: float | None = None
    buckets: tuple[BucketState, ...] = ()
    needed_nusd: int = 0
    budget_nusd: int = 0
    spent_nusd: int = 0


class Settlement(Value, frozen=True, kw_only=True):
    """What a request came to. `outcome` is why it ended, a word of a closed set; `price` the prices it was billed by, JSON.

    `unheld`: admitted without Redis, and perhaps never held there. It stays with the settlement through every retry. `replay`
    is the record of the request's Idempotency-Key, and `replay_ttl_ms` how long its answer is kept. The budgets are those that
    events tell of when a share of them is spent.
    """

    hold_id: str
    request_id: str
    account: str
    key_id: str
    model: str
    upstream: str
    usage: Usage
    usage_source: UsageSource
    outcome: str
    cost_nusd: int
    started_ms: int
    session: str | None = None
    price: str = "{}"
    unheld: bool = False
    attempts: int = 0
    replay: str | None = None
    replay_ttl_ms: int = 0
    budgets: Budgets = NO_BUDGETS
    account_budgets: Budgets = NO_BUDGETS


class Spend(Value, frozen=True):
    """What a key or an account spent: ever, and in this UTC day and month of Redis's clock."""

    total_nusd: int = 0
    day_nusd: int = 0
    month_nusd: int = 0


class Balance(Value, frozen=True):
    """An account's credit: granted = balance + settled. Of the key that was asked for: `spend`, `used_ms` (its last settlement,
    0: none) and how many of its requests run.
    """

    balance_nusd: int
    held_nusd: int
    granted_nusd: int
    settled_nusd: int
    spend: Spend = Spend()
    buckets: tuple[BucketState, ...] = ()
    account_spend: Spend = Spend()
    used_ms: int = 0
    key_running: int = 0
    account_running: int = 0

    @property
    def available_nusd(self) -> int:
        """What new holds may take. Negative where a real cost came out above its hold."""
        return self.balance_nusd - self.held_nusd


class Granted(Value, frozen=True):
    """What a grant came to: the balance now. `is_new`: False where its ref was granted before, so that nothing was added."""

    balance_nusd: int
    is_new: bool


class Grant(Value, frozen=True):
    """One grant of an account's history: the amount (negative: taken back), the balance after it, when (Unix ms) and by whom."""

    amount_nusd: int
    balance_nusd: int
    note: str
    ref: str
    actor: str
    granted_ms: int


class KeyUse(Value, frozen=True):
    """What a key spent, and when its last request was settled (Unix ms; 0: none was)."""

    spend: Spend
    used_ms: int
