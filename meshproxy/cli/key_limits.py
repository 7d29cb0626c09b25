"""The limits and budgets of a key or an account, as flags, as records and as they are shown."""

import argparse
from typing import Any, TypeVar

from msgspec.structs import asdict, replace

from meshproxy.cli.arguments import count, usd
from meshproxy.money import in_usd
from meshproxy.policy.principal import MAX_REQUESTS_PER_DAY, Account, Budgets, Key, Limits

Bounds = TypeVar("Bounds", Limits, Budgets)


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `keys create` and `keys limits` share."""
    group = parser.add_argument_group("limits")
    group.add_argument("--requests-per-minute", metavar="N", type=count)
    group.add_argument("--tokens-per-minute", metavar="N", type=count)
    group.add_argument(
        "--burst", metavar="N", type=count, help="requests at once: the bucket's size (default: a minute's)"
    )
    group.add_argument("--requests-per-day", metavar="N", type=daily)
    group.add_argument("--max-parallel", metavar="N", type=count, help="requests that run at the same time")
    group.add_argument("--budget", metavar="USD", type=usd, help="what the key, or the account, may ever spend")
    group.add_argument("--budget-daily", metavar="USD", type=usd, help="... in a day (UTC)")
    group.add_argument("--budget-monthly", metavar="USD", type=usd, help="... in a month (UTC)")
    group.add_argument("--session-budget", metavar="USD", type=usd, help="what each session_id may spend with the key")


def daily(text: str) -> int:
    """A number of requests a day, on a command line."""
    number = count(text)
    if number > MAX_REQUESTS_PER_DAY:
        raise argparse.ArgumentTypeError(f"{text}: at most {MAX_REQUESTS_PER_DAY}")
    return number


def limits_of(args: argparse.Namespace, before: Limits) -> Limits:
    """The limits that the flags set, over those that held before."""
    return _with(before, **{name: getattr(args, name) for name in Limits.__struct_fields__})


def budgets_of(args: argparse.Namespace, before: Budgets) -> Budgets:
    """The key's budgets that the flags set, over those that held before."""
    return _with(before, total_nusd=args.budget, daily_nusd=args.budget_daily, monthly_nusd=args.budget_monthly)


def session_budgets_of(args: argparse.Namespace, before: Budgets) -> Budgets:
    """The budgets of each session that the flags set, over those that held before."""
    return _with(before, total_nusd=args.session_budget)


def _with(before: Bounds, **given: int | None) -> Bounds:
    return replace(before, **{name: value for name, value in given.items() if value is not None})


def shown_bounds(key: Key) -> dict[str, Any]:
    """Everything that bounds a key."""
    return {
        "limits": asdict(key.limits),
        "budgets": in_usd(asdict(key.budgets)),
        "session_budgets": in_usd(asdict(key.session)),
    }


def shown_account(account: Account) -> dict[str, Any]:
    """An account's record as it is printed."""
    return {
        "account": account.name,
        "status": account.status,
        "limits": asdict(account.limits),
        "budgets": in_usd(asdict(account.budgets)),
    }
