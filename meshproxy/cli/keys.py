"""`meshproxy keys`, and the flags for limits and budgets that `accounts` uses too."""

import argparse
from typing import Any

from msgspec import UNSET

from meshproxy.cli.arguments import account, count, future, moment, names, open_administration, param, span, usd
from meshproxy.cli.command_line import Commands, Output, UsageError, add_command
from meshproxy.policy.principal import MAX_REQUESTS_PER_DAY, Bounds, KeyChange, Limits, Status
from meshproxy.policy.template import check_params

BUDGETS = {"total_nusd": "budget", "daily_nusd": "budget_daily", "monthly_nusd": "budget_monthly"}


def add_limit_flags(parser: argparse.ArgumentParser, whose: str, *, of_account: bool = False) -> None:
    """Add the flags that `keys create|update|limits` and `accounts limits` share. `whose`: for the help."""
    group = parser.add_argument_group("limits")
    group.add_argument("--requests-per-minute", metavar="N", type=count, help="sustained rate of requests")
    group.add_argument("--tokens-per-minute", metavar="N", type=count, help="sustained rate of tokens")
    group.add_argument(
        "--burst",
        metavar="N",
        type=count,
        help="requests at once: the size of the token bucket (default: a minute's requests)",
    )
    group.add_argument(
        "--requests-per-day", metavar="N", type=daily, help=f"requests in a day, at most {MAX_REQUESTS_PER_DAY:,}"
    )
    group.add_argument("--max-parallel", metavar="N", type=count, help="requests in progress at the same time")
    group.add_argument("--budget", metavar="USD", type=usd, help=f"most that {whose} may spend in total")
    group.add_argument("--budget-daily", metavar="USD", type=usd, help="most to spend in a day (UTC)")
    group.add_argument("--budget-monthly", metavar="USD", type=usd, help="most to spend in a month (UTC)")
    if not of_account:
        group.add_argument(
            "--session-budget", metavar="USD", type=usd, help="most that each session_id may spend with the key"
        )


def daily(text: str) -> int:
    """Parse a number of requests a day."""
    number = count(text)
    if number > MAX_REQUESTS_PER_DAY:
        raise argparse.ArgumentTypeError(f"{text}: at most {MAX_REQUESTS_PER_DAY}")
    return number


def bounds_of(args: argparse.Namespace) -> Bounds:
    """Return the limits and budgets that the flags name."""

    def named(flags: dict[str, str]) -> dict[str, int | None]:
        return {field: value for field, flag in flags.items() if (value := getattr(args, flag, None)) is not None}

    limits = {name: name for name in Limits.__struct_fields__}
    session = {"total_nusd": "session_budget"}
    return Bounds(
        limits=named(limits), budgets=named(BUDGETS), session=named(session), clear=getattr(args, "clear", False)
    )


COLUMNS = ["id", "account", "name", "hint", "status", "expires_at", "models", "spend_usd", "budget_usd", "last_used_at"]
KEY_HELP = "the key's id, an unambiguous beginning of it, or the secret"
ONCE_NOTE = "The key is shown only now. Store it."


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `keys create|list|show|update|rotate|suspend|resume|revoke|limits`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_create(commands)
    listing = add_command(commands, "list", list_keys)
    listing.add_argument("--account", metavar="NAME", type=account, help="this account's keys only")
    listing.add_argument("--limit", metavar="N", type=count, help="at most this many (default: all)")
    listing.add_argument("--after", metavar="ID", default="", help="only keys created after this one")
    add_command(commands, "show", show).add_argument("key", metavar="KEY", help=KEY_HELP)
    _add_update(commands)
    rotating = add_command(commands, "rotate", rotate)
    rotating.add_argument("key", metavar="KEY", help=KEY_HELP)
    rotating.add_argument(
        "--grace",
        metavar="SPAN",
        type=span,
        default=0,
        help="how long the old secret still works, such as 24h (default: 0s)",
    )
    _add_target(add_command(commands, "suspend", suspend))
    _add_target(add_command(commands, "resume", resume))
    revoking = add_command(commands, "revoke", revoke)
    revoking.add_argument("key", metavar="KEY", help=KEY_HELP)
    revoking.set_defaults(account=None)
    limiting = add_command(commands, "limits", limits)
    _add_target(limiting)
    limiting.add_argument("--clear", action="store_true", help="first remove all limits and budgets")
    add_limit_flags(limiting, "the key or account")


def _add_create(commands: Commands) -> None:
    creating = add_command(commands, "create", create)
    creating.add_argument("--account", metavar="NAME", type=account, required=True, help="created if it doesn't exist")
    creating.add_argument("--name", default="", help="what the key is for")
    creating.add_argument("--default-model", metavar="MODEL", help="the model of requests that name none")
    creating.add_argument(
        "--expires", metavar="WHEN", type=future, help="an RFC 3339 time, or a time from now such as 30d or 12h"
    )
    _add_fields(creating)


def _add_update(commands: Commands) -> None:
    updating = add_command(commands, "update", update)
    updating.add_argument("key", metavar="KEY", help=KEY_HELP)
    updating.add_argument("--name", help="what the key is for")
    default = updating.add_mutually_exclusive_group()
    default.add_argument("--default-model", metavar="MODEL", help="the model of requests that name none")
    default.add_argument("--no-default-model", action="store_true", help="remove the default model")
    expiry = updating.add_mutually_exclusive_group()
    expiry.add_argument(
        "--expires", metavar="WHEN", type=moment, help="an RFC 3339 time, or a time from now such as 30d or 12h"
    )
    expiry.add_argument("--no-expiry", action="store_true", help="the key never expires")
    updating.add_argument("--any-model", action="store_true", help="allow every model again")
    _add_fields(updating)


def _add_fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", metavar="MODEL[,...]", type=names, action="extend", help="the only models that the key may use"
    )
    parser.add_argument(
        "--param",
        metavar="NAME=JSON",
        type=param,
        action="append",
        default=[],
        help="a default for a request field, such as temperature=0.2; may be repeated",
    )
    parser.add_argument(
        "--clamp",
        action=argparse.BooleanOptionalAction,
        help="shorten an answer that the credit doesn't cover, instead of refusing it (default: credits.clamp)",
    )
    add_limit_flags(parser, "the key")


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("key", metavar="KEY", nargs="?", help=KEY_HELP)
    target.add_argument("--account", metavar="NAME", type=account, help="the whole account instead of a key")


async def create(args: argparse.Namespace, out: Output) -> None:
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
    async with open_administration(args) as administration:
        created = await administration.create_key(args.account, change)
    out.print_record(created, note=ONCE_NOTE)


async def list_keys(args: argparse.Namespace, out: Output) -> None:
    """List the keys of one account or of all, with their spend and last use.

    meshproxy keys list
    meshproxy keys list --account acme --json
    meshproxy keys list --limit 100 --after key_3f2aXq
    """
    async with open_administration(args) as administration:
        keys = await administration.keys(args.account, limit=args.limit, after=args.after)
    rows = [{**key, "spend_usd": key["spend"]["total_usd"], "budget_usd": key["budgets"]["total_usd"]} for key in keys]
    out.print_rows(keys if out.as_json else rows, COLUMNS, empty="no keys")


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show everything about a key except its secret.

    meshproxy keys show key_3f2a                          any unique beginning of an id
    """
    async with open_administration(args) as administration:
        out.print_record(await administration.key(args.key))


async def update(args: argparse.Namespace, out: Output) -> None:
    """Change only the settings of a key that are given as flags; its secret stays valid.

    meshproxy keys update key_3f2a --name "nightly jobs"
    meshproxy keys update key_3f2a --models openai/gpt-4o-mini --expires 30d
    meshproxy keys update key_3f2a --any-model --no-expiry
    """
    params = _params(args)
    change = KeyChange(
        name=UNSET if args.name is None else args.name,
        models=None if args.any_model else args.models or UNSET,
        default_model=None if args.no_default_model else args.default_model or UNSET,
        expires_at=None if args.no_expiry else UNSET if args.expires is None else args.expires,
        params=params or UNSET,
        clamp=UNSET if args.clamp is None else args.clamp,
        bounds=bounds_of(args),
    )
    if change == KeyChange():
        raise UsageError("no flag names a change")
    async with open_administration(args) as administration:
        out.print_record(await administration.change_key(args.key, change))


async def rotate(args: argparse.Namespace, out: Output) -> None:
    """Give a key a new secret, which is printed only now. The key keeps its id, limits, budgets and spend.

    meshproxy keys rotate key_3f2a                        the old secret stops working now
    meshproxy keys rotate key_3f2a --grace 24h            both work for a day
    """
    async with open_administration(args) as administration:
        rotated = await administration.rotate_key(args.key, args.grace)
    out.print_record(rotated, note=ONCE_NOTE)


async def suspend(args: argparse.Namespace, out: Output) -> None:
    """Refuse a key's or an account's requests until it is resumed.

    meshproxy keys suspend key_3f2a
    meshproxy keys suspend --account acme                 every key of the account at once
    """
    await _set_status(args, out, "suspended")


async def resume(args: argparse.Namespace, out: Output) -> None:
    """Accept the requests of a suspended key or account again.

    meshproxy keys resume key_3f2a
    meshproxy keys resume --account acme
    """
    await _set_status(args, out, "active")


async def revoke(args: argparse.Namespace, out: Output) -> None:
    """Refuse a key's requests for good.

    meshproxy keys revoke key_3f2a                        can't be undone; `suspend` can
    """
    await _set_status(args, out, "revoked")


async def limits(args: argparse.Namespace, out: Output) -> None:
    """Show or change the limits and budgets of a key or of a whole account.

    meshproxy keys limits key_3f2a                        only show them
    meshproxy keys limits key_3f2a --requests-per-minute 60 --burst 10
    meshproxy keys limits key_3f2a --clear --budget 100   replace all of them by one budget
    meshproxy keys limits --account acme --tokens-per-minute 500000
    """
    if args.account is not None and args.session_budget is not None:
        raise UsageError("argument --session-budget: only a key has one, not an account")
    bounds = bounds_of(args)
    async with open_administration(args) as administration:
        if args.account is not None:
            out.print_record(await administration.account_limits(args.account, bounds))
        else:
            key = await administration.change_key(args.key, KeyChange(bounds=bounds), action="key.limits")
            shown = ("id", "account", "limits", "budgets", "session_budgets")
            out.print_record({name: key[name] for name in shown})


async def _set_status(args: argparse.Namespace, out: Output, status: Status) -> None:
    async with open_administration(args) as administration:
        if args.account is not None:
            out.print_record(await administration.set_account_status(args.account, status))
        else:
            out.print_record(await administration.set_key_status(args.key, status))


def _params(args: argparse.Namespace) -> dict[str, Any]:
    """Return the params that the flags name. Raises UsageError for fields that no request may have."""
    params = dict(args.param)
    for fault in check_params(params, ()):
        raise UsageError(f"argument --param: {'.'.join(map(str, fault.loc))}: {fault.msg}")
    return params
