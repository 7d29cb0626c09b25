"""Accounts and keys of a history: their limits and budgets, and how these are drawn."""

import math
import random
from collections.abc import Mapping
from typing import Final, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

MINUTE_S, DAY_S = 60, 86_400
LIMITS: Final = ("requests_per_minute", "burst", "tokens_per_minute", "requests_per_day", "max_parallel")


class Bucket(NamedTuple):
    """A bucket of requests or of tokens: what it regains in its period, and what it has when it is full."""

    kind: str
    limit: float
    size: float
    period_s: int = MINUTE_S

    @property
    def rate(self) -> float:
        """What it regains in a second."""
        return self.limit / self.period_s

    def told_s(self, level: float) -> float:
        """Return the reset that is told at a level: the time until it is full, in whole ms, or in whole seconds from 1 s on."""
        millis = math.ceil(round((self.size - level) * self.period_s * 1000 / self.limit, 3))
        return millis / 1000 if millis < 1000 else math.ceil(millis / 1000)


class Limits(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True, kw_only=True):
    """What all requests of a key or of an account may do together. Budgets are nano-USD: in all, of a day, of a month."""

    requests_per_minute: int | None = None
    burst: int | None = None
    tokens_per_minute: int | None = None
    requests_per_day: int | None = None
    max_parallel: int | None = None
    budget_nusd: int | None = None
    daily_nusd: int | None = None
    monthly_nusd: int | None = None

    def buckets(self, requests: int | None = None, tokens: int | None = None) -> list[Bucket]:
        """Return the buckets, of a minute and of a day. `requests` and `tokens`: what a minute has without a limit."""
        requests, tokens, daily = (
            self.requests_per_minute or requests,
            self.tokens_per_minute or tokens,
            self.requests_per_day,
        )
        found = [] if requests is None else [Bucket("requests", requests, self.burst or requests)]
        found += [] if tokens is None else [Bucket("tokens", tokens, tokens)]
        return found + ([] if daily is None else [Bucket("requests", daily, daily, DAY_S)])

    @property
    def limits(self) -> dict[str, int]:
        """The limits, by their names."""
        found = {name: getattr(self, name) for name in LIMITS}
        return {name: limit for name, limit in found.items() if limit is not None}

    @property
    def budgets(self) -> dict[str, int]:
        """The budgets, by the word that messages have for their period."""
        budgets = {"total": self.budget_nusd, "daily": self.daily_nusd, "monthly": self.monthly_nusd}
        return {period: budget for period, budget in budgets.items() if budget is not None}


class AccountPlan(Limits, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """An account's limits and budgets, for all of its keys together."""


class KeyPlan(Limits, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """A key, and what its requests may do. `session_budget_nusd` is of each of its sessions.

    `expires_s`: after the set-up; None: never. `models`: those that it may use; empty: all.
    """

    account: int = 0
    session_budget_nusd: int | None = None
    expires_s: float | None = None
    models: tuple[str, ...] = ()


# In how many histories of a profile accounts have limits or budgets of their own, or keys budgets of a day or a month.
BOUNDED: Final[Mapping[str, float]] = {
    "credit": 0.5,
    "store": 0.25,
    "tenants": 0.2,
    "mixed": 0.2,
    **dict.fromkeys(("workers", "clients", "long"), 0.1),
}
MOVED_UP: Final = 0.15  # of histories in which a key has limits: its account has them in its place
CROSSING: Final = 0.03  # of all histories, which go on past midnight
BUDGETS: Final = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)


def limited_key(rng: random.Random, account: int) -> KeyPlan:
    """Draw a key with a limit or a budget, or neither."""
    which = rng.choice(
        (
            "none",
            "none",
            "requests",
            "burst",
            "tokens",
            "tokens",
            "parallel",
            "parallel",
            "budget",
            "session",
            "session",
        )
    )
    return KeyPlan(
        account,
        requests_per_minute=rng.choice((1, 3, 60)) if which in {"requests", "burst"} else None,
        burst=rng.choice((1, 2)) if which == "burst" else None,
        tokens_per_minute=rng.choice((50, 300, 1000, 3000)) if which == "tokens" else None,
        max_parallel=rng.choice((1, 2)) if which == "parallel" else None,
        budget_nusd=rng.choice((0, 200_000, 1_000_000, 5_000_000)) if which == "budget" else None,
        session_budget_nusd=rng.choice((300_000, 1_000_000)) if which == "session" else None,
    )


def limited_account(rng: random.Random) -> AccountPlan:
    """Draw an account with a limit, with a budget, or with both."""
    which = rng.choice(("requests", "burst", "tokens", "day", "parallel", "total", "daily", "daily", "monthly", "both"))
    return AccountPlan(
        requests_per_minute=rng.choice((2, 4, 60)) if which in {"requests", "burst"} else None,
        burst=rng.choice((1, 2, 3)) if which == "burst" else None,
        tokens_per_minute=rng.choice((300, 1000, 3000)) if which in {"tokens", "both"} else None,
        requests_per_day=rng.choice((1, 3, 1000)) if which == "day" else None,
        max_parallel=rng.choice((1, 2, 3)) if which in {"parallel", "both"} else None,
        budget_nusd=rng.choice((0, *BUDGETS)) if which == "total" else None,
        daily_nusd=rng.choice(BUDGETS) if which in {"daily", "both"} else None,
        monthly_nusd=rng.choice(BUDGETS) if which == "monthly" else None,
    )


class Bounded(Struct, frozen=True):
    """What is drawn beside a history's steps: what its accounts and keys may do, and when its day ends."""

    accounts: tuple[AccountPlan, ...] = ()
    keys: tuple[KeyPlan, ...] = ()
    midnight_s: float | None = None
    ends_month: bool = False


def bounded(rng: random.Random, profile: str, accounts: int, keys: tuple[KeyPlan, ...]) -> Bounded:
    """Draw the limits and budgets of some accounts and keys, and a midnight in between."""
    plans: tuple[AccountPlan, ...] = ()
    if rng.random() < BOUNDED.get(profile, 0.0):
        plans = tuple(limited_account(rng) if rng.random() < 0.6 else AccountPlan() for _ in range(accounts))
        keys = tuple(_dated(rng, key) if rng.random() < 0.4 else key for key in keys)
    elif rng.random() < MOVED_UP and any(key.limits for key in keys):
        plans, keys = _moved_up(keys)
    has_dates = any(plan.daily_nusd is not None or plan.monthly_nusd is not None for plan in (*plans, *keys))
    if rng.random() > (0.6 if has_dates else CROSSING):
        return Bounded(plans, keys)
    return Bounded(plans, keys, rng.choice((0.2, 0.5, 1.5, 3.0, 8.0)), rng.random() < 0.4)


def _moved_up(keys: tuple[KeyPlan, ...]) -> tuple[tuple[AccountPlan, ...], tuple[KeyPlan, ...]]:
    """Return accounts with the limits of their first key that has some, and keys without limits."""
    plans = [AccountPlan() for _ in range(1 + max(key.account for key in keys))]
    for key in keys:
        if key.limits and not plans[key.account].limits:
            plans[key.account] = AccountPlan(**key.limits)
    return tuple(plans), tuple(replace(key, **dict.fromkeys(key.limits)) for key in keys)


def _dated(rng: random.Random, key: KeyPlan) -> KeyPlan:
    """Return a key with a budget of a day or a month, or with requests of a day."""
    which = rng.choice(("daily", "daily", "monthly", "day"))
    if which == "day":
        return replace(key, requests_per_day=rng.choice((1, 3, 1000)))
    budget = rng.choice(BUDGETS)
    return replace(key, daily_nusd=budget) if which == "daily" else replace(key, monthly_nusd=budget)
