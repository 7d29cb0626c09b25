"""The ledger's records, the names of its keys in Redis, and how the directory's records are stored.

Amounts are nano-USD; durations are seconds unless the name says ms.
"""

import hashlib
import re
from functools import lru_cache
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from meshproxy.ledger.store import Packed, StoreError, pack
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
    """A request for a hold. Limits are resolved already: None means no limit, not a default.

    `amount_min_nusd`: hold less than `amount_nusd` if it doesn't fit, but at least this (None: all or nothing). A
    lowered hold takes at most `share_percent` of the available room, but at least the minimum. `tokens` is the estimate
    that the token buckets are debited by; the settlement corrects it.
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
        """Return the amount to hold in a room of `room_nusd`, None if that is too small. `admit.lua` does the same."""
        if self.amount_nusd <= room_nusd:
            return self.amount_nusd
        if self.amount_min_nusd is None or self.amount_min_nusd > room_nusd:
            return None
        return max(self.amount_min_nusd, room_nusd * self.share_percent // 100)


class BucketState(Struct, frozen=True):
    """One bucket after the decision.

    `limit` is per `per`; `remaining` shows a debt as 0; `reset_s` is the time until it is full.
    """

    scope: Scope
    kind: Kind
    limit: int
    remaining: int
    reset_s: float
    per: Period = "minute"


class Hold(Struct, frozen=True):
    """A hold of `amount_nusd` in all, lower than requested where the request allows it. `buckets`: as of admission."""

    request: HoldRequest
    amount_nusd: int
    available_nusd: int
    buckets: tuple[BucketState, ...]

    @property
    def hold_id(self) -> str:
        """The id by which the hold is renewed and settled."""
        return self.request.hold_id


class Denial(Struct, frozen=True):
    """Why a hold is denied.

    `which` names the limit: "key requests", "account requests per day", "key parallel requests", "session daily
    budget", "credit", or "hold" (the hold is gone: settled or forgotten). `retry_after_s` is exact, and None where
    waiting doesn't help. `needed_nusd` is the least amount that a hold needs. `spent_nusd` is what is spent or held of
    `budget_nusd`.
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
    """What a request used and cost.

    `outcome` is why it ended, from a closed set. `price` is JSON: the prices it was billed by.

    `code` is that of the error that the client got, `upstream_status` the HTTP status of the last upstream (0: none).
    `unheld`: admitted without Redis, so that Redis may have no hold of it; this stays true through every retry.
    `replay` is the record of the request's Idempotency-Key; `replay_ttl_ms` is how long its answer is kept, -1 if
    that isn't complete. The budgets are those whose thresholds append events to the usage stream.
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
    code: str = ""
    upstream_status: int = 0
    replay: str | None = None
    replay_ttl_ms: int = 0
    budgets: Budgets = NO_BUDGETS
    account_budgets: Budgets = NO_BUDGETS


class Spend(Struct, frozen=True):
    """What a key or an account has spent: in total, and in this UTC day and month of Redis's clock."""

    total_nusd: int = 0
    day_nusd: int = 0
    month_nusd: int = 0


class Balance(Struct, frozen=True):
    """An account's credit: granted = balance + settled.

    Of the requested key: `spend`, `used_ms` (its last settlement, Unix ms, 0: none) and `key_running`, its running
    requests.
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
        """The credit that new holds may take. Negative where an actual cost exceeded its hold."""
        return self.balance_nusd - self.held_nusd


class Granted(Struct, frozen=True):
    """The result of a grant: the balance now. `is_new` False: its ref was granted before, and nothing was added."""

    balance_nusd: int
    is_new: bool


class Grant(Struct, frozen=True):
    """One grant of an account's history: amount (negative: taken back), balance after it, time (Unix ms) and actor."""

    amount_nusd: int
    balance_nusd: int
    note: str
    ref: str
    actor: str
    granted_ms: int


class KeyUse(Struct, frozen=True):
    """What a key has spent, and when its last request was settled (Unix ms; 0: never)."""

    spend: Spend
    used_ms: int


PREFIX = "mesh:"
MAX_KNOWN_KEYS = 4096  # whose names in Redis are cached
MAX_SESSION_BYTES = 64  # bound on a session's name in a key's name: 256 characters may be 1 KiB


class AccountKeys:
    """The names of one account's keys in Redis.

    Hashes: `credit` (balance, held, granted, settled: nano-USD), `held` (what each key and session with a budget holds:
    `key:ID`, `session:NAME`), `holds` (hold id to its packed record), `abandoned` (holds released at their deadline,
    kept for a late settlement), `bucket` (the account's buckets), `keys` (key id to the digest its record is stored
    under), `templates` (id to record, JSON), `template_names` (name to id), `spend` (the account's, by day and month),
    `grant_refs` (ref to amount). Sorted set: `deadlines` (hold id by deadline in ms: a hold is released then, an
    abandoned hold is forgotten then). Streams: `usage` (one event per settlement), `grants` (one entry per grant).
    String: `record` (the account's, JSON).

    `unheld` with a hold id names the mark that a request was settled which was admitted without Redis.
    `script_keys` are the eight keys that every script with holds takes first (hold.lua).
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
        self.unheld = root + "unheld:"
        self.hours = root + "hours"
        self.record = root + "record"
        self.keys = root + "keys"
        self.templates = root + "templates"
        self.template_names = root + "template-names"
        self.script_keys = (
            *(self.credit, self.held, self.holds, self.deadlines, self.abandoned, self.usage),
            *(self.bucket, self.spend),
        )

    def key_bucket(self, key_id: str) -> str:
        """Name the hash of one key's buckets."""
        return f"{self.root}bucket:{key_id}"

    def key_spend(self, key_id: str) -> str:
        """Name the hash of a key's spend: total, by day, by month."""
        return f"{self.root}spend:{key_id}"

    def script_keys_of_key(self, key_id: str) -> tuple[str, str, str]:
        """Name one key's buckets, spend, and running requests (a sorted set: hold id by deadline in ms)."""
        root = self.root
        return f"{root}bucket:{key_id}", f"{root}spend:{key_id}", f"{root}running:{key_id}"

    def requests(self, day: str) -> str:
        """Name the hash from request id to its event in `usage`, of the requests that began on a day (`2026-11-24`)."""
        return f"{self.root}requests:{day}"

    def session_spend(self, session: str) -> str:
        """Name the hash of a session's spend: total, by day, by month. A long name is replaced by its SHA-256."""
        name = session.encode(errors="surrogatepass")
        short = session if len(name) <= MAX_SESSION_BYTES else f"sha256:{hashlib.sha256(name).hexdigest()}"
        return f"{self.root}session:{short}"

    def hour(self, hour: str) -> str:
        """Name the hash of one hour's aggregates (`2026-11-24T09`)."""
        return f"{self.root}hour:{hour}"

    def month(self, month: str) -> str:
        """Name the hash of one month's aggregates (`2026-11`)."""
        return f"{self.root}month:{month}"

    def refused(self, hour: str) -> str:
        """Name the hash of refused requests by minute of an hour (`2026-11-24T09`)."""
        return f"{self.root}refused:{hour}"

    def replay(self, key_id: str, digest: str) -> str:
        """Name the hash of one Idempotency-Key of a key, by its SHA-256: its owner and the state of the answer."""
        return f"{self.root}replay:{key_id}:{digest}"

    @property
    def replays(self) -> str:
        """The sorted set of the owners of Idempotency-Keys, by when their records end (Unix ms)."""
        return f"{self.root}replays"

    @property
    def replay_sizes(self) -> str:
        """The hash of the bytes of the answers kept for replay, by owner, and their `total`."""
        return f"{self.root}replay-sizes"

    def replay_parts(self, owner: str) -> str:
        """Name the list of the parts of an answer kept for replay."""
        return f"{self.root}replay-parts:{owner}"


@lru_cache(MAX_KNOWN_KEYS)
def account_keys(account: str) -> AccountKeys:
    """Return the names of one account's keys, cached."""
    return AccountKeys(account)


@lru_cache(MAX_KNOWN_KEYS)
def hold_keys(account: str, key_id: str, session: str | None = None) -> Packed:
    """Return the keys that scripts with holds take first (hold.lua): the account's, the API key's, the session's."""
    names = account_keys(account)
    keys = *names.script_keys, *names.script_keys_of_key(key_id)
    return pack(*keys) if session is None else pack(*keys, names.session_spend(session))


@lru_cache(MAX_KNOWN_KEYS)
def settlement_keys(account: str, key_id: str, hour: str) -> Packed:
    """Return the keys of settle.lua that all settlements of a key in one hour (`2026-11-24T09`) have."""
    names = account_keys(account)
    aggregates = names.hour(hour), names.requests(hour[:10]), names.hours, names.month(hour[:7])
    return pack(*hold_keys(account, key_id).texts, *aggregates)


class AuditEvent(Struct, frozen=True):
    """One change: actor, action, target, account, changed fields as JSON (never a secret), and time (Unix ms)."""

    actor: str
    action: str
    target: str
    account: str
    detail: str
    at_ms: int


GLOBAL = "*"  # the owner of global templates: no account may have this name
ACCOUNTS = PREFIX + "accounts"  # set: every account's name
AUDIT = PREFIX + "audit"  # stream of the changes to accounts, keys, credit and templates
KEY_IDS = PREFIX + "key-ids"  # hash: key id to the digest its record is stored under


def key_record(digest: str) -> str:
    """Name the string of a key's directory record (JSON), by the SHA-256 (hex) of its secret."""
    return f"{PREFIX}key:{digest}"


FORMAT = 1  # version of a record's format in the directory; a record without `v` is version 1

_VERSION = re.compile(rb'\{"v":(\d+),')

Record = TypeVar("Record")


def encode(record: Struct, before: bytes = b"") -> bytes:
    """Encode a record as it is stored: JSON, whose `v` is the version of its format.

    Fields of the stored record `before` that this release doesn't know are kept: during an upgrade, a newer release wrote
    them.
    """
    text = msgspec.json.encode(record)
    unknown = _unknown_fields(record, msgspec.json.decode(before)) if before else {}
    if unknown:
        text = msgspec.json.encode(_merged(msgspec.json.decode(text), unknown))
    return b'{"v":%d,%b' % (FORMAT, text[1:])


def _unknown_fields(record: Struct, before: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored record that its type doesn't have, those of nested records included."""
    known = {field.encode_name: getattr(record, field.name) for field in msgspec.structs.fields(record)}
    unknown = {name: value for name, value in before.items() if name not in known and name != "v"}
    for name, value in known.items():
        if isinstance(value, Struct) and isinstance(before.get(name), dict):
            nested = _unknown_fields(value, before[name])
            if nested:
                unknown[name] = nested
    return unknown


def _merged(fields: dict[str, Any], unknown: dict[str, Any]) -> dict[str, Any]:
    nested = {
        name: _merged(fields[name], value) for name, value in unknown.items() if isinstance(fields.get(name), dict)
    }
    return fields | unknown | nested


def decode(record: bytes, kind: type[Record]) -> Record:
    """Decode a record of the directory. Raises StoreError if it is invalid or of a newer version."""
    version = _VERSION.match(record)
    if version is not None and int(version[1]) > FORMAT:
        raise StoreError("RECORD", "a record of the directory is of a newer version")
    try:
        return msgspec.json.decode(record, type=kind)
    except msgspec.DecodeError as error:
        raise StoreError("RECORD", f"a record of the directory can't be read: {error}") from error
