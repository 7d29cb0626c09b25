"""`meshproxy keys`: API keys from birth to revocation, and what they and their accounts may use."""

import argparse
from typing import Any, Literal

import msgspec

from meshproxy.cli.arguments import Commands, add_command, future, names, param
from meshproxy.cli.books import Books, account, ensure_account, need_account, open_books
from meshproxy.cli.key_limits import (
    add_limit_flags,
    budgets_of,
    given_budgets,
    limits_of,
    session_budgets_of,
    shown_account,
    shown_key_limits,
)
from meshproxy.cli.output import Failed, Misused, Output, rfc3339
from meshproxy.policy.params import check_params
from meshproxy.policy.principal import Budgets, Key, Limits

COLUMNS = ["id", "account", "name", "hint", "status", "created_at", "expires_at", "models"]

CREATE_EXAMPLES = """\
  meshproxy keys create --account acme
  meshproxy keys create --account acme --name ci --expires 30d --budget 50 --budget-daily 5
  meshproxy keys create --account acme --models openai/gpt-4o-mini,openai/gpt-4o --param temperature=0.2
  meshproxy keys create --account acme --json | jq -r .key
"""
LIST_EXAMPLES = """\
  meshproxy keys list
  meshproxy keys list --account acme --json
"""
SHOW_EXAMPLES = """\
  meshproxy keys show key_3f2a                          any unique beginning of an id
"""
STATUS_EXAMPLES = """\
  meshproxy keys {verb} key_3f2a
  meshproxy keys {verb} --account acme                every key of the account at once
"""
REVOKE_EXAMPLES = """\
  meshproxy keys revoke key_3f2a                          for ever; suspend can be taken back
"""
LIMITS_EXAMPLES = """\
  meshproxy keys limits key_3f2a                          show them
  meshproxy keys limits key_3f2a --requests-per-minute 60 --burst 10
  meshproxy keys limits key_3f2a --clear --budget 100     nothing but a budget
  meshproxy keys limits --account acme --tokens-per-minute 500000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`keys create|list|show|suspend|resume|revoke|limits`"""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_create(commands)
    listing = add_command(commands, "list", "list keys", list_keys, examples=LIST_EXAMPLES)
    listing.add_argument("--account", metavar="NAME", type=account, help="of this account alone")
    showing = add_command(commands, "show", "show everything about a key but its secret", show, examples=SHOW_EXAMPLES)
    showing.add_argument("key", metavar="KEY", help="an id, a unique beginning of one, or the secret")
    for verb, summary, run in (
        ("suspend", "refuse a key, or a whole account, until it is resumed", suspend),
        ("resume", "let a suspended key or account in again", resume),
    ):
        _add_target(add_command(commands, verb, summary, run, examples=STATUS_EXAMPLES.format(verb=verb)))
    revoking = add_command(commands, "revoke", "refuse a key for ever", revoke, examples=REVOKE_EXAMPLES)
    revoking.add_argument("key", metavar="KEY", help="an id, a unique beginning of one, or the secret")
    limiting = add_command(
        commands, "limits", "show or set what a key or a whole account may use", limits, examples=LIMITS_EXAMPLES
    )
    _add_target(limiting)
    limiting.add_argument("--clear", action="store_true", help="first take away every limit and budget there is")
    add_limit_flags(limiting)


def _add_create(commands: Commands) -> None:
    creating = add_command(
        commands, "create", "mint a key; its secret is shown this once", create, examples=CREATE_EXAMPLES
    )
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
    target.add_argument("key", metavar="KEY", nargs="?", help="an id, a unique beginning of one, or the secret")
    target.add_argument("--account", metavar="NAME", type=account, help="the whole account")


async def create(args: argparse.Namespace, out: Output) -> None:
    """Mint a key and print its secret, which is kept nowhere."""
    if args.default_model and args.models and args.default_model not in args.models:
        raise Misused(f"argument --default-model: {args.default_model} is not among --models")
    for fault in check_params(dict(args.param), ()):
        raise Misused(f"argument --param: {'.'.join(map(str, fault.loc))}: {fault.msg}")
    async with open_books(args) as books:
        await ensure_account(books, args.account)
        secret, key = await books.directory.create_key(
            args.account,
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
    """List keys, of one account or of all."""
    async with open_books(args) as books:
        if args.account is not None:
            await need_account(books, args.account)
        keys = await books.directory.list_keys(args.account)
    out.rows([shown(key) for key in keys], COLUMNS, empty="no keys")


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show one key."""
    async with open_books(args) as books:
        out.record(shown(await need_key(books, args.key)))


async def suspend(args: argparse.Namespace, out: Output) -> None:
    """Suspend a key or an account."""
    await _set_status(args, out, "suspended")


async def resume(args: argparse.Namespace, out: Output) -> None:
    """Make a suspended key or account active again."""
    await _set_status(args, out, "active")


async def revoke(args: argparse.Namespace, out: Output) -> None:
    """Revoke a key."""
    async with open_books(args) as books:
        await _set_key_status(books, out, args.key, "revoked")


async def limits(args: argparse.Namespace, out: Output) -> None:
    """Set what the flags say, then show what holds."""
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
    return {
        "id": key.id,
        "account": key.account,
        "name": key.name,
        "hint": key.hint,
        "status": key.status,
        "created_at": rfc3339(key.created_at),
        "expires_at": rfc3339(key.expires_at),
        "default_model": key.default_model,
        "models": key.models,
        "params": key.params,
        "clamp": key.clamp,
        **shown_key_limits(key),
    }


async def _set_status(args: argparse.Namespace, out: Output, status: Literal["active", "suspended"]) -> None:
    async with open_books(args) as books:
        if args.account is None:
            await _set_key_status(books, out, args.key, status)
            return
        changed = msgspec.structs.replace(await need_account(books, args.account), status=status)
        await books.directory.put_account(changed)
    out.record(shown_account(changed))


async def _set_key_status(
    books: Books, out: Output, wanted: str, status: Literal["active", "suspended", "revoked"]
) -> None:
    key = await need_key(books, wanted)
    if key.status == "revoked" and status != "revoked":
        raise Failed("key_revoked", f"{key.id} is revoked, which can't be taken back")
    changed = msgspec.structs.replace(key, status=status)
    await books.directory.update_key(changed)
    out.record(shown(changed))


async def _key_limits(args: argparse.Namespace, books: Books, out: Output) -> None:
    key = before = await need_key(books, args.key)
    if args.clear:
        key = msgspec.structs.replace(key, limits=Limits(), budgets=Budgets(), session=Budgets())
    key = msgspec.structs.replace(
        key,
        limits=limits_of(args, key.limits),
        budgets=budgets_of(args, key.budgets),
        session=session_budgets_of(args, key.session),
    )
    if key != before:
        await books.directory.update_key(key)
    out.record({"id": key.id, "account": key.account, **shown_key_limits(key)})


async def _account_limits(args: argparse.Namespace, books: Books, out: Output) -> None:
    if given_budgets(args):
        raise Misused(f"argument {given_budgets(args)[0]}: budgets are of keys; an account has its credit")
    before = await need_account(books, args.account)
    changed = msgspec.structs.replace(before, limits=limits_of(args, Limits() if args.clear else before.limits))
    if changed != before:
        await books.directory.put_account(changed)
    out.record(shown_account(changed))
