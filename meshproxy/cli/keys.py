"""`meshproxy keys`: API keys from birth to revocation, and what they and their accounts may use."""

import argparse
from typing import Any

from msgspec.structs import asdict, replace

from meshproxy.cli.arguments import Commands, add_command, future, names, param
from meshproxy.cli.books import ACTOR, Books, account, need_account, open_books
from meshproxy.cli.key_limits import (
    add_limit_flags,
    budgets_of,
    limits_of,
    session_budgets_of,
    shown_account,
    shown_bounds,
)
from meshproxy.cli.output import Failed, Misused, Output, rfc3339
from meshproxy.policy.params import check_params
from meshproxy.policy.principal import Account, Budgets, Key, Limits, Status

COLUMNS = ["id", "account", "name", "hint", "status", "created_at", "expires_at", "models"]
KEY = "an id, a unique beginning of one, or the secret"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`keys create|list|show|suspend|resume|revoke|limits`"""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_create(commands)
    listing = add_command(commands, "list", list_keys)
    listing.add_argument("--account", metavar="NAME", type=account, help="of this account alone")
    add_command(commands, "show", show).add_argument("key", metavar="KEY", help=KEY)
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
    creating.add_argument(
        "--models", metavar="MODEL[,...]", type=names, action="extend", help="the only ones it may use"
    )
    creating.add_argument("--expires", metavar="WHEN", type=future, help="a time in RFC 3339, or 30d, 12h from now")
    creating.add_argument(
        "--param",
        metavar="NAME=JSON",
        type=param,
        action="append",
        default=[],
        help="a request field for requests that lack it, such as temperature=0.2",
    )
    creating.add_argument(
        "--clamp",
        action=argparse.BooleanOptionalAction,
        help="shorten answers to what the credit allows, not refuse them (default: credits.clamp)",
    )
    add_limit_flags(creating)


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("key", metavar="KEY", nargs="?", help=KEY)
    target.add_argument("--account", metavar="NAME", type=account, help="the whole account")


async def create(args: argparse.Namespace, out: Output) -> None:
    """Mint a key; its secret is shown this once.

    meshproxy keys create --account acme
    meshproxy keys create --account acme --name ci --expires 30d --budget 50 --budget-daily 5
    meshproxy keys create --account acme --models openai/gpt-4o-mini,openai/gpt-4o --param temperature=0.2
    meshproxy keys create --account acme --json | jq -r .key
    """
    if args.default_model and args.models and args.default_model not in args.models:
        raise Misused(f"argument --default-model: {args.default_model} is not among --models")
    for fault in check_params(dict(args.param), ()):
        raise Misused(f"argument --param: {'.'.join(map(str, fault.loc))}: {fault.msg}")
    async with open_books(args) as books:
        secret, key = await books.directory.create_key(
            args.account,
            actor=ACTOR,
            name=args.name,
            expires_at=args.expires,
            default_model=args.default_model,
            models=args.models,
            params=dict(args.param),
            limits=limits_of(args, Limits()),
            budgets=budgets_of(args, Budgets()),
            session=session_budgets_of(args, Budgets()),
            clamp=args.clamp,
        )
    out.record({"key": secret, **shown(key)}, note="The key is shown this once. Store it now.")


async def list_keys(args: argparse.Namespace, out: Output) -> None:
    """List keys, of one account or of all.

    meshproxy keys list
    meshproxy keys list --account acme --json
    """
    async with open_books(args) as books:
        if args.account is not None:
            await need_account(books, args.account)
        keys = await books.directory.list_keys(args.account)
    out.rows([shown(key) for key in keys], COLUMNS, empty="no keys")


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show everything about a key but its secret.

    meshproxy keys show key_3f2a                          any unique beginning of an id
    """
    async with open_books(args) as books:
        out.record(shown(await need_key(books, args.key)))


async def suspend(args: argparse.Namespace, out: Output) -> None:
    """Refuse a key, or a whole account, until it is resumed.

    meshproxy keys suspend key_3f2a
    meshproxy keys suspend --account acme                 every key of the account at once
    """
    await _set_status(args, out, "suspended")


async def resume(args: argparse.Namespace, out: Output) -> None:
    """Let a suspended key or account in again.

    meshproxy keys resume key_3f2a
    meshproxy keys resume --account acme
    """
    await _set_status(args, out, "active")


async def revoke(args: argparse.Namespace, out: Output) -> None:
    """Refuse a key for ever.

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
    async with open_books(args) as books:
        if args.account is not None:
            await _account_limits(args, books, out)
        else:
            await _key_limits(args, books, out)


async def need_key(books: Books, wanted: str) -> Key:
    """The one key that an id, a unique beginning of one, or a secret means."""
    key = await books.directory.find_key(wanted)
    if key is None:
        shown_as = "with this secret" if wanted.startswith("rsk_") else wanted
        raise Failed("key_not_found", f"there is no key {shown_as}, or more than one")
    return key


def shown(key: Key) -> dict[str, Any]:
    """A key as it is printed. It never had its secret."""
    fields = {"id": key.id, "account": key.account, "name": key.name, **asdict(key), **shown_bounds(key)}
    del fields["session"]
    return fields | {"created_at": rfc3339(key.created_at), "expires_at": rfc3339(key.expires_at)}


async def _set_status(args: argparse.Namespace, out: Output, status: Status) -> None:
    async with open_books(args) as books:
        if args.account is not None:
            found = await books.directory.set_account_status(args.account, status, actor=ACTOR)
            out.record(shown_account(found or await need_account(books, args.account)))
            return
        key = await need_key(books, args.key)
        try:
            changed = await books.directory.set_key_status(key.id, status, actor=ACTOR)
        except ValueError as error:
            raise Failed("key_revoked", str(error)) from error
        out.record(shown(changed or key))


async def _key_limits(args: argparse.Namespace, books: Books, out: Output) -> None:
    before = await need_key(books, args.key)

    def limited(key: Key) -> Key:
        start = replace(key, limits=Limits(), budgets=Budgets(), session=Budgets()) if args.clear else key
        return replace(
            start,
            limits=limits_of(args, start.limits),
            budgets=budgets_of(args, start.budgets),
            session=session_budgets_of(args, start.session),
        )

    key = await books.directory.change_key(before.id, limited, actor=ACTOR, action="key.limits") or before
    out.record({"id": key.id, "account": key.account, **shown_bounds(key)})


async def _account_limits(args: argparse.Namespace, books: Books, out: Output) -> None:
    if args.session_budget is not None:
        raise Misused("argument --session-budget: sessions have budgets by key")

    def limited(account: Account) -> Account:
        return replace(
            account,
            limits=limits_of(args, Limits() if args.clear else account.limits),
            budgets=budgets_of(args, Budgets() if args.clear else account.budgets),
        )

    changed = await books.directory.change_account(args.account, limited, actor=ACTOR, action="account.limits")
    out.record(shown_account(changed or await need_account(books, args.account)))
