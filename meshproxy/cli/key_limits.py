"""The limits and budgets of a key or an account, as flags."""

import argparse

from meshproxy.cli.arguments import count, usd
from meshproxy.policy.principal import MAX_REQUESTS_PER_DAY, Limits

BUDGETS = {"budget": "total_nusd", "budget_daily": "daily_nusd", "budget_monthly": "monthly_nusd"}


def add_limit_flags(parser: argparse.ArgumentParser, *, of_account: bool = False) -> None:
    """The flags that `keys create`, `keys limits` and `accounts limits` share."""
    whose = "all keys of the account together" if of_account else "the key, or the account,"
    group = parser.add_argument_group("limits")
    group.add_argument("--requests-per-minute", metavar="N", type=count)
    group.add_argument("--tokens-per-minute", metavar="N", type=count)
    group.add_argument(
        "--burst", metavar="N", type=count, help="requests at once: the bucket's size (default: a minute's)"
    )
    group.add_argument("--requests-per-day", metavar="N", type=daily)
    group.add_argument("--max-parallel", metavar="N", type=count, help="requests that run at the same time")
    group.add_argument("--budget", metavar="USD", type=usd, help=f"what {whose} may ever spend")
    group.add_argument("--budget-daily", metavar="USD", type=usd, help="... in a day (UTC)")
    group.add_argument("--budget-monthly", metavar="USD", type=usd, help="... in a month (UTC)")
    if not of_account:
        group.add_argument(
            "--session-budget", metavar="USD", type=usd, help="what each session_id may spend with the key"
        )


def daily(text: str) -> int:
    """A number of requests a day, on a command line."""
    number = count(text)
    if number > MAX_REQUESTS_PER_DAY:
        raise argparse.ArgumentTypeError(f"{text}: at most {MAX_REQUESTS_PER_DAY}")
    return number


def limits_of(args: argparse.Namespace) -> dict[str, int | None]:
    """The limits that the flags name."""
    return _given({name: getattr(args, name) for name in Limits.__struct_fields__})


def budgets_of(args: argparse.Namespace) -> dict[str, int | None]:
    """The budgets that the flags name."""
    return _given({field: getattr(args, flag) for flag, field in BUDGETS.items()})


def session_budgets_of(args: argparse.Namespace) -> dict[str, int | None]:
    """The budgets of each session that the flags name."""
    return _given({"total_nusd": args.session_budget})


def _given(flags: dict[str, int | None]) -> dict[str, int | None]:
    return {name: value for name, value in flags.items() if value is not None}
