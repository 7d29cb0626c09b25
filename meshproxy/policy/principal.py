"""Who is calling, and what they may do and spend."""

from typing import Any, Literal

import msgspec
from msgspec import Struct

Status = Literal["active", "suspended", "revoked"]


MAX_REQUESTS_PER_DAY = 100_000_000  # a bucket counts in parts of which a day has 86,400,000, below 2**53 in all


class Limits(Struct, frozen=True, omit_defaults=True):
    """Limits of one key or one account. None: the configuration's default for a key, no limit for an account.

    `burst` is the request bucket's size (requests at once); None means a full minute's worth. `max_parallel` counts the requests
    that run at the same time.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    burst: int | None = None
    requests_per_day: int | None = None
    max_parallel: int | None = None


class Budgets(Struct, frozen=True, omit_defaults=True):
    """What may be spent at most, in nano-USD; None: no budget. Days and months are UTC."""

    total_nusd: int | None = None
    daily_nusd: int | None = None
    monthly_nusd: int | None = None


class Account(Struct, frozen=True, omit_defaults=True):
    """An account's record in the directory; its balance lives in the ledger. `budgets` hold for all of its keys together."""

    name: str
    status: Status = "active"
    limits: Limits = Limits()
    budgets: Budgets = Budgets()


class Key(Struct, frozen=True, omit_defaults=True):
    """A key's record in the directory. The secret itself is nowhere: records are found by its SHA-256.

    `models` lists the only models the key may use (None: all); `params` are request fields (temperature, ...) that hold
    where the request doesn't say; `session` is a budget for each session_id; times are Unix seconds.
    """

    id: str
    account: str
    created_at: float
    name: str = ""
    hint: str = ""
    status: Status = "active"
    expires_at: float | None = None
    default_model: str | None = None
    models: list[str] | None = None
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    limits: Limits = Limits()
    budgets: Budgets = Budgets()
    session: Budgets = Budgets()
    clamp: bool | None = None


class Principal(Struct, frozen=True):
    """An authenticated caller: its key and its account."""

    key: Key
    account: Account

    def may_use(self, model: str) -> bool:
        """Whether the key's list of models lets this one through."""
        return self.key.models is None or model in self.key.models
