"""`meshproxy keys`, and the flags for limits and budgets that `accounts` uses too."""

import argparse
from typing import Any

from msgspec import UNSET

from meshproxy.cli.arguments import (
    Commands,
    Misused,
    Output,
    add_command,
    count,
    future,
    moment,
    names,
    param,
    span,
    usd,
)
from meshproxy.cli.books import account, open_desk
from meshproxy.ledger.desk import Bounds, Desk, KeyChange
from meshproxy.policy.principal import MAX_REQUESTS_PER_DAY, Limits, Status
from meshproxy.policy.template import check_params

BUDGETS = {"budget": "total_nusd", "budget_daily": "daily_nusd", "budget_monthly": "monthly_nusd"}


def add_limit_flags(parser: argparse.ArgumentParser, *, of_account: bool = False) -> None:
    """Add the flags that `keys create`, `keys limits` and `accounts limits` share."""
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
    """Parse a number of requests a day."""
    number = count(text)
    if number > MAX_REQUESTS_PER_DAY:
        raise argparse.ArgumentTypeError(f"{text}: at most {MAX_REQUESTS_PER_DAY}")
    return number


def limits_of(args: argparse.Namespace) -> dict[str, int | None]:
    """Return the limits that the flags name."""
    return _given({name: getattr(args, name) for name in Limits.__struct_fields__})


def budgets_of(args: argparse.Namespace) -> dict[str, int | None]:
    """Return the budgets that the flags name."""
    return _given({field: getattr(args, flag) for flag, field in BUDGETS.items()})


def session_budgets_of(args: argparse.Namespace) -> dict[str, int | None]:
    """Return the budgets for each session that the flags name."""
    return _given({"total_nusd": args.session_budget})


def _given(flags: dict[str, int | None]) -> dict[str, int | None]:
    return {name: value for name, value in flags.items() if value is not None}


COLUMNS = ["id", "account", "name", "hint", "status", "expires_at", "models", "spend_usd", "budget_usd", "last_used_at"]
KEY = "an id, a unique beginning of one, or the secret"
ONCE = "The key is shown this once. Store it now."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `keys create|list|show|update|rotate|suspend|resume|revoke|limits`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_create(commands)
    listing = add_command(commands, "list", list_keys)
    listing.add_argument("--account", metavar="NAME", type=account, help="of this account alone")
    listing.add_argument("--limit", metavar="N", type=count, help="at most so many (default: all)")
    listing.add_argument("--after", metavar="ID", default="", help="those that follow this key")
    add_command(commands, "show", show).add_argument("key", metavar="KEY", help=KEY)
    _add_update(commands)
    rotating = add_command(commands, "rotate", rotate)
    rotating.add_argument("key", metavar="KEY", help=KEY)
    rotating.add_argument("--grace", metavar="SPAN", type=span, default=0, help="how long the old secret works: 24h")
    _add_target(add_command(commands, "suspend", suspend))
    _add_target(add_command(commands, "resume", resume))
    revoking = add_command(commands, "revoke", revoke)
    revoking.add_argument("key", metavar="KEY", help=KEY)
    revoking.set_defaults(account=None)
    limiting = add_command(commands, "limits", limits)
    _add_target(limiting)
    limiting.add_argument("--clear", action="store_true", help="first take away every limit and budget there is")
    add_limit_flags(limiting)


def _add_create(commands: Commands) -> None:
    creating = add_command(commands, "create", create)
    creating.add_argument("--account", metavar="NAME", type=account, required=True, help="made if it doesn't exist")
    creating.add_argument("--name", default="", help="what the key is for")
    creating.add_argument("--default-model", metavar="MODEL", help="for requests that name none")
    creating.add_argument("--expires", metavar="WHEN", type=future, help="a time in RFC 3339, or 30d, 12h from now")
    _add_fields(creating)


def _add_update(commands: Commands) -> None:
    updating = add_command(commands, "update", update)
    updating.add_argument("key", metavar="KEY", help=KEY)
    updating.add_argument("--name", help="what the key is for")
    default = updating.add_mutually_exclusive_group()
    default.add_argument("--default-model", metavar="MODEL", help="for requests that name none")
    default.add_argument("--no-default-model", action="store_true")
    expiry = updating.add_mutually_exclusive_group()
    expiry.add_argument("--expires", metavar="WHEN", type=moment, help="a time in RFC 3339, or 30d, 12h from now")
    expiry.add_argument("--no-expiry", action="store_true")
    updating.add_argument("--any-model", action="store_true", help="lift the restriction to --models")
    _add_fields(updating)


def _add_fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", metavar="MODEL[,...]", type=names, action="extend", help="the only ones it may use")
    parser.add_argument(
        "--param",
        metavar="NAME=JSON",
        type=param,
        action="append",
        default=[],
        help="a request field for requests that lack it, such as temperature=0.2",
    )
    parser.add_argument(
        "--clamp",
        action=argparse.BooleanOptionalAction,
        help="shorten answers to what the credit allows, not refuse them (default: credits.clamp)",
    )
    add_limit_flags(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("key", metavar="KEY", nargs="?", help=KEY)
    target.add_argument("--account", metavar="NAME", type=account, help="the whole account")


async def create(args: argparse.Namespace, out: Output) -> None:
    """Create a key and print its secret, which is not shown again.

    meshproxy keys create --account acme
    meshproxy keys create --account acme --name ci --expires 30d --budget 50 --budget-daily 5
    meshproxy keys create --account acme --models openai/gpt-4o-mini,openai/gpt-4o --param temperature=0.2
    meshproxy keys create --account acme --json | jq -r .key
    """
    if args.default_model and args.models and args.default_model not in args.models:
        raise Misused(f"argument --default-model: {args.default_model} is not among --models")
    change = KeyChange(
        name=args.name,
        expires_at=args.expires,
        default_model=args.default_model,
        models=args.models,
        params=_params(args),
        clamp=args.clamp,
        bounds=_bounds(args),
    )
    async with open_desk(args) as desk:
        made = await desk.create_key(args.account, change)
    out.record(made, note=ONCE)


async def list_keys(args: argparse.Namespace, out: Output) -> None:
    """List the keys of one account or of all, with their spend and last use.

    meshproxy keys list
    meshproxy keys list --account acme --json
    meshproxy keys list --limit 100 --after key_3f2aXq
    """
    async with open_desk(args) as desk:
        keys = await desk.keys(args.account, limit=args.limit, after=args.after)
    rows = [{**key, "spend_usd": key["spend"]["total_usd"], "budget_usd": key["budgets"]["total_usd"]} for key in keys]
    out.rows(keys if out.as_json else rows, COLUMNS, empty="no keys")


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show everything about a key except its secret.

    meshproxy keys show key_3f2a                          any unique beginning of an id
    """
    async with open_desk(args) as desk:
        out.record(await desk.key(args.key))


async def update(args: argparse.Namespace, out: Output) -> None:
    """Change the settings of a key that flags name; its secret stays valid.

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
        bounds=_bounds(args),
    )
    if change == KeyChange():
        raise Misused("nothing to change is named")
    async with open_desk(args) as desk:
        out.record(await desk.change_key(args.key, change))


async def rotate(args: argparse.Namespace, out: Output) -> None:
    """Create a new secret for a key and print it this once; the id, limits, budgets and spend stay.

    meshproxy keys rotate key_3f2a                        the old secret ends now
    meshproxy keys rotate key_3f2a --grace 24h            both work for a day
    """
    async with open_desk(args) as desk:
        rotated = await desk.rotate_key(args.key, args.grace)
    out.record(rotated, note=ONCE)


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
    """Refuse a key's requests for ever.

    meshproxy keys revoke key_3f2a                        suspend can be taken back
    """
    await _set_status(args, out, "revoked")


async def limits(args: argparse.Namespace, out: Output) -> None:
    """Show or set what a key or a whole account may use.

    meshproxy keys limits key_3f2a                        show them
    meshproxy keys limits key_3f2a --requests-per-minute 60 --burst 10
    meshproxy keys limits key_3f2a --clear --budget 100   nothing but a budget
    meshproxy keys limits --account acme --tokens-per-minute 500000
    """
    if args.account is not None and args.session_budget is not None:
        raise Misused("argument --session-budget: sessions have budgets by key")
    bounds = _bounds(args)
    async with open_desk(args) as desk:
        if args.account is not None:
            out.record(await desk.account_limits(args.account, bounds))
        else:
            out.record(await _key_limits(desk, args.key, bounds))


async def _key_limits(desk: Desk, wanted: str, bounds: Bounds) -> dict[str, Any]:
    key = await desk.change_key(wanted, KeyChange(bounds=bounds), action="key.limits")
    return {name: key[name] for name in ("id", "account", "limits", "budgets", "session_budgets")}


async def _set_status(args: argparse.Namespace, out: Output, status: Status) -> None:
    async with open_desk(args) as desk:
        if args.account is not None:
            out.record(await desk.set_account_status(args.account, status))
        else:
            out.record(await desk.set_key_status(args.key, status))


def _bounds(args: argparse.Namespace) -> Bounds:
    return Bounds(
        limits=limits_of(args),
        budgets=budgets_of(args),
        session=session_budgets_of(args),
        clear=getattr(args, "clear", False),
    )


def _params(args: argparse.Namespace) -> dict[str, Any]:
    """Return the params that the flags name. Raises Misused for fields that no request may have."""
    params = dict(args.param)
    for fault in check_params(params, ()):
        raise Misused(f"argument --param: {'.'.join(map(str, fault.loc))}: {fault.msg}")
    return params
