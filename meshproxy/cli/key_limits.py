"""The limits and budgets of a key or an account, as flags, as records and as they are shown."""

import argparse
from typing import Any

import msgspec

from meshproxy.cli.arguments import count, usd
from meshproxy.money import format_usd
from meshproxy.policy.principal import Account, Budgets, Key, Limits

LIMITS = ("requests_per_minute", "tokens_per_minute", "burst")
BUDGETS = {"budget": "total_nusd", "budget_daily": "daily_nusd", "budget_monthly": "monthly_nusd"}


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `keys create` and `keys limits` share."""
    group = parser.add_argument_group("limits")
    group.add_argument("--requests-per-minute", metavar="N", type=count)
    group.add_argument("--tokens-per-minute", metavar="N", type=count)
    group.add_argument(
        "--burst", metavar="N", type=count, help="requests at once: the bucket's size (default: a minute's)"
    )
    group.add_argument("--budget", metavar="USD", type=usd, help="what the key may ever spend")
    group.add_argument("--budget-daily", metavar="USD", type=usd, help="... in a day (UTC)")
    group.add_argument("--budget-monthly", metavar="USD", type=usd, help="... in a month (UTC)")
    group.add_argument("--session-budget", metavar="USD", type=usd, help="what each session_id may spend with the key")


def given_budgets(args: argparse.Namespace) -> list[str]:
    """The budget flags that were used."""
    names = (*BUDGETS, "session_budget")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def limits_of(args: argparse.Namespace, before: Limits) -> Limits:
    """The limits that the flags set, over those that held before."""
    return msgspec.structs.replace(
        before, **{name: value for name in LIMITS if (value := getattr(args, name)) is not None}
    )


def budgets_of(args: argparse.Namespace, before: Budgets) -> Budgets:
    """The key's budgets that the flags set, over those that held before."""
    given = {field: value for flag, field in BUDGETS.items() if (value := getattr(args, flag)) is not None}
    return msgspec.structs.replace(before, **given)


def session_budgets_of(args: argparse.Namespace, before: Budgets) -> Budgets:
    """The budgets of each session that the flags set, over those that held before."""
    return before if args.session_budget is None else msgspec.structs.replace(before, total_nusd=args.session_budget)


def shown_limits(limits: Limits) -> dict[str, Any]:
    """Limits as they are printed."""
    return {name: getattr(limits, name) for name in LIMITS}


def shown_budgets(budgets: Budgets) -> dict[str, Any]:
    """Budgets as they are printed: decimal strings of USD."""
    return {
        f"{period}_usd": None if amount is None else format_usd(amount)
        for period, amount in (
            ("total", budgets.total_nusd),
            ("daily", budgets.daily_nusd),
            ("monthly", budgets.monthly_nusd),
        )
    }


def shown_key_limits(key: Key) -> dict[str, Any]:
    """Everything that bounds a key."""
    return {
        "limits": shown_limits(key.limits),
        "budgets": shown_budgets(key.budgets),
        "session_budgets": shown_budgets(key.session),
    }


def shown_account(account: Account) -> dict[str, Any]:
    """An account's record as it is printed."""
    return {"account": account.name, "status": account.status, "limits": shown_limits(account.limits)}
