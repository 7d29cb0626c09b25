"""`meshproxy keys`, and the flags for limits and budgets that `accounts` uses too."""

import argparse
from functools import partial
from typing import Any

from msgspec import UNSET

from meshproxy.cli.arguments import Operation, account, count, future, moment, names, nusd, param, span
from meshproxy.cli.command_line import AddTo, StoreCommand, UsageError, add_family, argument, one_of, titled
from meshproxy.policy.principal import MAX_REQUESTS_PER_DAY, Bounds, KeyChange, Limits, Status
from meshproxy.policy.template import check_params

BUDGETS = {"total_nusd": "budget", "daily_nusd": "budget_daily", "monthly_nusd": "budget_monthly"}


def daily(text: str) -> int:
    """Parse a number of requests a day."""
    number = count(text)
    if number > MAX_REQUESTS_PER_DAY:
        raise argparse.ArgumentTypeError(f"{text}: at most {MAX_REQUESTS_PER_DAY}")
    return number


def limit_flags(whose: str, *, of_account: bool = False) -> AddTo:
    """Return the flags that `keys create|update|limits` and `accounts limits` share. `whose`: for the help."""
    numbers = partial(argument, metavar="N", type=count)
    amounts = partial(argument, metavar="USD", type=nusd)
    flags = (
        numbers("--requests-per-minute", help="sustained rate of requests"),
        numbers("--tokens-per-minute", help="sustained rate of tokens"),
        numbers("--burst", help="requests at once: the size of the token bucket (default: a minute's requests)"),
        numbers("--requests-per-day", type=daily, help=f"requests in a day, at most {MAX_REQUESTS_PER_DAY:,}"),
        numbers("--max-parallel", help="requests in progress at the same time"),
        amounts("--budget", help=f"most that {whose} may spend in total"),
        amounts("--budget-daily", help="most to spend in a day (UTC)"),
        amounts("--budget-monthly", help="most to spend in a month (UTC)"),
    )
    of_session = amounts("--session-budget", help="most that each session_id may spend with the key")
    return titled("limits", *flags if of_account else (*flags, of_session))


def bounds_of(args: argparse.Namespace) -> Bounds:
    """Return the limits and budgets that the flags name."""

    def named(flags: dict[str, str]) -> dict[str, int | None]:
        return {field: value for field, flag in flags.items() if (value := getattr(args, flag, None)) is not None}

    limits = {name: name for name in Limits.__struct_fields__}
    session = {"total_nusd": "session_budget"}
    return Bounds(
        limits=named(limits), budgets=named(BUDGETS), session=named(session), clear=getattr(args, "clear", False)
    )


def create(args: argparse.Namespace) -> Operation:
    """Create a key and print its secret, which is not shown again.

    meshproxy keys create --account acme
    meshproxy keys create --account acme --name ci --expires 30d --budget 50 --budget-daily 5
    meshproxy keys create --account acme --models openai/gpt-4o-mini,openai/gpt-4o --param temperature=0.2
    meshproxy keys create --account acme --json | jq -r .key
    """
    if args.default_model and args.models and args.default_model not in args.models:
        raise UsageError(f"argument --default-model: {args.default_model} is not one of --models")
    change = KeyChange(
        name=args.name,
        expires_at=args.expires,
        default_model=args.default_model,
        models=args.models,
        params=_params(args),
        clamp=args.clamp,
        bounds=bounds_of(args),
    )
    return lambda administration: administration.create_key(args.account, change)


def list_keys(args: argparse.Namespace) -> Operation:
    """List the keys of one account or of all, with their spend and last use.

    meshproxy keys list
    meshproxy keys list --account acme --json
    meshproxy keys list --limit 100 --after key_3f2aXq
    """
    return lambda administration: administration.keys(args.account, limit=args.limit, after=args.after)


def show(args: argparse.Namespace) -> Operation:
    """Show everything about a key except its secret.

    meshproxy keys show key_3f2a                          any unique beginning of an id
    """
    return lambda administration: administration.key(args.key)


def update(args: argparse.Namespace) -> Operation:
    """Change only the settings of a key that are given as flags; its secret stays valid.

    meshproxy keys update key_3f2a --name "nightly jobs"
    meshproxy keys update key_3f2a --models openai/gpt-4o-mini --expires 30d
    meshproxy keys update key_3f2a --any-model --no-expiry
    """
    change = KeyChange(
        name=UNSET if args.name is None else args.name,
        models=None if args.any_model else args.models or UNSET,
        default_model=None if args.no_default_model else args.default_model or UNSET,
        expires_at=None if args.no_expiry else UNSET if args.expires is None else args.expires,
        params=_params(args) or UNSET,
        clamp=UNSET if args.clamp is None else args.clamp,
        bounds=bounds_of(args),
    )
    if change == KeyChange():
        raise UsageError("no flag names a change")
    return lambda administration: administration.change_key(args.key, change)


def rotate(args: argparse.Namespace) -> Operation:
    """Give a key a new secret, which is printed only now. The key keeps its id, limits, budgets and spend.

    meshproxy keys rotate key_3f2a                        the old secret stops working now
    meshproxy keys rotate key_3f2a --grace 24h            both work for a day
    """
    return lambda administration: administration.rotate_key(args.key, args.grace)


def suspend(args: argparse.Namespace) -> Operation:
    """Refuse a key's or an account's requests until it is resumed.

    meshproxy keys suspend key_3f2a
    meshproxy keys suspend --account acme                 every key of the account at once
    """
    return _set_status(args, "suspended")


def resume(args: argparse.Namespace) -> Operation:
    """Accept the requests of a suspended key or account again.

    meshproxy keys resume key_3f2a
    meshproxy keys resume --account acme
    """
    return _set_status(args, "active")


def revoke(args: argparse.Namespace) -> Operation:
    """Refuse a key's requests for good.

    meshproxy keys revoke key_3f2a                        can't be undone; `suspend` can
    """
    return lambda administration: administration.set_key_status(args.key, "revoked")


def limits(args: argparse.Namespace) -> Operation:
    """Show or change the limits and budgets of a key or of a whole account.

    meshproxy keys limits key_3f2a                        only show them
    meshproxy keys limits key_3f2a --requests-per-minute 60 --burst 10
    meshproxy keys limits key_3f2a --clear --budget 100   replace all of them by one budget
    meshproxy keys limits --account acme --tokens-per-minute 500000
    """
    if args.account is not None and args.session_budget is not None:
        raise UsageError("argument --session-budget: only a key has one, not an account")
    bounds = bounds_of(args)
    if args.account is not None:
        return lambda administration: administration.account_limits(args.account, bounds)
    return lambda administration: administration.key_limits(args.key, bounds)


def _set_status(args: argparse.Namespace, status: Status) -> Operation:
    if args.account is not None:
        return lambda administration: administration.set_account_status(args.account, status)
    return lambda administration: administration.set_key_status(args.key, status)


def _params(args: argparse.Namespace) -> dict[str, Any]:
    """Return the params that the flags name. Raises UsageError for fields that no request may have."""
    params = dict(args.param)
    for fault in check_params(params, ()):
        raise UsageError(f"argument --param: {'.'.join(map(str, fault.loc))}: {fault.msg}")
    return params


COLUMNS = (
    *("id", "account", "name", "hint", "status", "expires_at", "models"),
    *("spend_usd=spend.total_usd", "budget_usd=budgets.total_usd", "last_used_at"),
)
ONCE_NOTE = "The key is shown only now. Store it."
KEY_HELP = "the key's id, an unambiguous beginning of it, or the secret"
WHEN_HELP = "an RFC 3339 time, or a time from now such as 30d or 12h"

KEY = argument("key", metavar="KEY", help=KEY_HELP)
TARGET = one_of(
    argument("key", metavar="KEY", nargs="?", help=KEY_HELP),
    argument("--account", metavar="NAME", type=account, help="the whole account instead of a key"),
    required=True,
)
CLEAR = argument("--clear", action="store_true", help="first remove all limits and budgets")
DEFAULT_MODEL = argument("--default-model", metavar="MODEL", help="the model of requests that name none")
FIELDS = (
    argument(
        "--models", metavar="MODEL[,...]", type=names, action="extend", help="the only models that the key may use"
    ),
    argument(
        "--param",
        metavar="NAME=JSON",
        type=param,
        action="append",
        default=[],
        help="a default for a request field, such as temperature=0.2; may be repeated",
    ),
    argument(
        "--clamp",
        action=argparse.BooleanOptionalAction,
        help="shorten an answer that the credit doesn't cover, instead of refusing it (default: credits.clamp)",
    ),
    limit_flags("the key"),
)
CREATE = (
    argument("--account", metavar="NAME", type=account, required=True, help="created if it doesn't exist"),
    argument("--name", default="", help="what the key is for"),
    DEFAULT_MODEL,
    argument("--expires", metavar="WHEN", type=future, help=WHEN_HELP),
    *FIELDS,
)
UPDATE = (
    KEY,
    argument("--name", help="what the key is for"),
    one_of(DEFAULT_MODEL, argument("--no-default-model", action="store_true", help="remove the default model")),
    one_of(
        argument("--expires", metavar="WHEN", type=moment, help=WHEN_HELP),
        argument("--no-expiry", action="store_true", help="the key never expires"),
    ),
    argument("--any-model", action="store_true", help="allow every model again"),
    *FIELDS,
)
LIST = (
    argument("--account", metavar="NAME", type=account, help="this account's keys only"),
    argument("--limit", metavar="N", type=count, help="at most this many (default: all)"),
    argument("--after", metavar="ID", default="", help="only keys created after this one"),
)
GRACE = argument(
    "--grace",
    metavar="SPAN",
    type=span,
    default=0,
    help="how long the old secret still works, such as 24h (default: 0s)",
)
KEYS = {
    "create": StoreCommand(create, CREATE, note=ONCE_NOTE),
    "list": StoreCommand(list_keys, LIST, COLUMNS, "no keys"),
    "show": StoreCommand(show, [KEY]),
    "update": StoreCommand(update, UPDATE),
    "rotate": StoreCommand(rotate, [KEY, GRACE], note=ONCE_NOTE),
    "suspend": StoreCommand(suspend, [TARGET]),
    "resume": StoreCommand(resume, [TARGET]),
    "revoke": StoreCommand(revoke, [KEY]),
    "limits": StoreCommand(limits, [TARGET, CLEAR, limit_flags("the key or account")]),
}
add_keys = partial(add_family, commands=KEYS)
