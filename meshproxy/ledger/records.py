"""What goes into the ledger and what comes out. Amounts are nano-USD, spans of time are seconds unless the name says ms."""

import hashlib
from typing import Literal

from msgspec import Struct

from meshproxy.openai.usage import Usage
from meshproxy.policy.principal import Budgets, Limits

NO_LIMITS = Limits()
NO_BUDGETS = Budgets()

Reason = Literal["rate_limit", "insufficient_credits", "spend_limit", "gone"]
Scope = Literal["key", "account"]
Kind = Literal["requests", "tokens"]
Period = Literal["minute", "day"]
UsageSource = Literal["reported", "estimated", "drained", "none"]


class HoldRequest(Struct, frozen=True, kw_only=True):
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


class BucketState(Struct, frozen=True):
    """One bucket as the decision left it: `limit` a `per`, `remaining` (a debt shows as 0), `reset_s` until it is full."""

    scope: Scope
    kind: Kind
    limit: int
    remaining: int
    reset_s: float
    per: Period = "minute"


class Hold(Struct, frozen=True):
    """A hold of `amount_nusd` in all, which a clamped ask may find lower than it asked for. `buckets` are as of admission."""

    ask: HoldRequest
    amount_nusd: int
    available_nusd: int
    buckets: tuple[BucketState, ...]

    @property
    def hold_id(self) -> str:
        """The id it is renewed and settled by."""
        return self.ask.hold_id


class Denial(Struct, frozen=True):
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


class Settlement(Struct, frozen=True, kw_only=True):
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


class Spend(Struct, frozen=True):
    """What a key or an account spent: ever, and in this UTC day and month of Redis's clock."""

    total_nusd: int = 0
    day_nusd: int = 0
    month_nusd: int = 0


class Balance(Struct, frozen=True):
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


class Granted(Struct, frozen=True):
    """What a grant came to: the balance now. `is_new`: False where its ref was granted before, so that nothing was added."""

    balance_nusd: int
    is_new: bool


class Grant(Struct, frozen=True):
    """One grant of an account's history: the amount (negative: taken back), the balance after it, when (Unix ms) and by whom."""

    amount_nusd: int
    balance_nusd: int
    note: str
    ref: str
    actor: str
    granted_ms: int


class KeyUse(Struct, frozen=True):
    """What a key spent, and when its last request was settled (Unix ms; 0: none was)."""

    spend: Spend
    used_ms: int


PREFIX = "mesh:"
MAX_SESSION_BYTES = 64  # of a session's name in a key; four times a name's 256 characters would be a KiB


class AccountKeys:
    """The keys of one account.

    Hashes: `credit` (balance, held, granted, settled: nano-USD), `held` (what each key and session with a budget holds:
    `key:ID`, `session:NAME`), `holds` (hold id to its packed record), `abandoned` (holds released at their deadline, kept for a
    late settlement), `bucket` (the account's buckets), `keys` (key id to the digest its record is stored under), `templates` (id
    to record, JSON), `template_names` (name to id), `spend` (the account's, by day and month), `grant_refs` (ref to amount).
    Sorted set: `deadlines` (hold id by deadline in ms: of a hold, its release; of an abandoned one, when it is forgotten).
    Streams: `usage` (one event a settlement), `grants` (one entry a grant). String: `record` (the account's, JSON).

    `books` are the eight keys that every script with holds begins with (hold.lua).
    """

    def __init__(self, account: str) -> None:
        root = f"{PREFIX}{{{account}}}:"
        self.root = root
        self.account = account
        self.credit = root + "credit"
        self.held = root + "held"
        self.holds = root + "holds"
        self.deadlines = root + "deadlines"
        self.abandoned = root + "abandoned"
        self.usage = root + "usage"
        self.bucket = root + "bucket"
        self.spend = root + "spend"
        self.grants = root + "grants"
        self.grant_refs = root + "grant-refs"
        self.record = root + "record"
        self.keys = root + "keys"
        self.templates = root + "templates"
        self.template_names = root + "template-names"
        self.books = (
            *(self.credit, self.held, self.holds, self.deadlines, self.abandoned, self.usage),
            *(self.bucket, self.spend),
        )

    def unheld(self, hold_id: str) -> str:
        """String: marks the settlement of a request that was admitted without Redis, so that it is charged once."""
        return f"{self.root}unheld:{hold_id}"

    def key_bucket(self, key_id: str) -> str:
        """Hash: one key's buckets."""
        return f"{self.root}bucket:{key_id}"

    def key_spend(self, key_id: str) -> str:
        """Hash: what a key spent and holds: total, by day, by month."""
        return f"{self.root}spend:{key_id}"

    def key_books(self, key_id: str) -> tuple[str, str, str]:
        """One key's buckets, spend, and running requests (a sorted set: hold id by deadline in ms)."""
        root = self.root
        return f"{root}bucket:{key_id}", f"{root}spend:{key_id}", f"{root}running:{key_id}"

    def requests(self, day: str) -> str:
        """Hash: request id to its event in `usage`, of the requests that began on a day, `2026-11-24`."""
        return f"{self.root}requests:{day}"

    def session_spend(self, session: str) -> str:
        """Hash: what a session spent and holds: total, by day, by month. A long name is told by its SHA-256."""
        name = session.encode(errors="surrogatepass")
        short = session if len(name) <= MAX_SESSION_BYTES else f"sha256:{hashlib.sha256(name).hexdigest()}"
        return f"{self.root}session:{short}"

    def hour(self, hour: str) -> str:
        """Hash: the aggregates of one hour, `2026-11-24T09`."""
        return f"{self.root}hour:{hour}"

    def refused(self, hour: str) -> str:
        """Hash: how many requests were refused in each minute of an hour, `2026-11-24T09`."""
        return f"{self.root}refused:{hour}"

    def replay(self, key_id: str, digest: str) -> str:
        """Hash: one Idempotency-Key of a key, by its SHA-256: who owns it and how far the answer is."""
        return f"{self.root}replay:{key_id}:{digest}"

    @property
    def replays(self) -> str:
        """Sorted set: the owners of its Idempotency-Keys, by when their records end (Unix ms)."""
        return f"{self.root}replays"

    @property
    def replay_sizes(self) -> str:
        """Hash: the bytes of the answers that are kept for replay, by owner, and their `total`."""
        return f"{self.root}replay-sizes"

    def replay_parts(self, owner: str) -> str:
        """List: the answer that a request got, for replay."""
        return f"{self.root}replay-parts:{owner}"


GLOBAL = "*"  # the owner of global templates: no account may have this name
ACCOUNTS = PREFIX + "accounts"  # set: every account's name
AUDIT = PREFIX + "audit"  # stream: every change to accounts, keys and credit
KEY_IDS = PREFIX + "key-ids"  # hash: key id to the digest its record is stored under


def key_record(digest: str) -> str:
    """String: a key's directory record, JSON, by the SHA-256 (hex) of its secret."""
    return f"{PREFIX}key:{digest}"
