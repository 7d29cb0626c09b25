"""`meshproxy accounts` and `credits`: accounts with their credit, limits and budgets."""

import argparse

from meshproxy.cli.arguments import account, count, open_administration, signed_usd
from meshproxy.cli.command_line import Output, UsageError, add_command
from meshproxy.cli.keys import add_limit_flags, bounds_of
from meshproxy.ledger.administration import MAX_NOTE, MAX_REF

COLUMNS = ["account", "status", "balance_usd", "held_usd", "available_usd", "spent_today_usd", "spent_month_usd"]
GRANT_COLUMNS = ["granted_at", "amount_usd", "balance_usd", "ref", "note", "actor"]
AUDIT_COLUMNS = ["at", "actor", "action", "target", "account", "detail"]
AUDIT_LIMIT = 100


def add_accounts(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `accounts list|show|limits|suspend|resume|delete|audit`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    listing = add_command(commands, "list", list_accounts)
    listing.add_argument("--limit", metavar="N", type=count, help="at most this many (default: all)")
    listing.add_argument("--after", metavar="NAME", default="", help="only accounts whose name sorts after this one")
    add_command(commands, "show", show).add_argument(
        "account", metavar="ACCOUNT", type=account, help="the account's name"
    )
    limiting = add_command(commands, "limits", limits)
    limiting.add_argument("account", metavar="ACCOUNT", type=account, help="the account's name")
    limiting.add_argument("--clear", action="store_true", help="first remove all limits and budgets")
    add_limit_flags(limiting, "all keys of the account together", of_account=True)
    add_command(commands, "suspend", suspend).add_argument(
        "account", metavar="ACCOUNT", type=account, help="the account's name"
    )
    add_command(commands, "resume", resume).add_argument(
        "account", metavar="ACCOUNT", type=account, help="the account's name"
    )
    deleting = add_command(commands, "delete", delete)
    deleting.add_argument("account", metavar="ACCOUNT", type=account, help="the account's name")
    deleting.add_argument("--yes", action="store_true", help="required, because a deletion can't be undone")
    auditing = add_command(commands, "audit", audit)
    auditing.add_argument(
        "--limit", metavar="N", type=count, default=AUDIT_LIMIT, help="at most this many (default: %(default)s)"
    )


async def list_accounts(args: argparse.Namespace, out: Output) -> None:
    """List accounts with their credit and spend, including accounts without keys.

    meshproxy accounts list
    meshproxy accounts list --json | jq -r '.[] | select(.available_usd | tonumber < 1) | .account'
    meshproxy accounts list --limit 100 --after acme
    """
    async with open_administration(args) as administration:
        found = await administration.accounts(limit=args.limit, after=args.after)
    rows = [
        {**each, "spent_today_usd": each["spend"]["day_usd"], "spent_month_usd": each["spend"]["month_usd"]}
        for each in found
    ]
    out.print_rows(found if out.as_json else rows, COLUMNS, empty="no accounts")


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show an account's credit, limits, budgets and spend.

    meshproxy accounts show acme
    meshproxy accounts show acme --json | jq -r .available_usd
    """
    async with open_administration(args) as administration:
        out.print_record(await administration.account(args.account))


async def limits(args: argparse.Namespace, out: Output) -> None:
    """Show or change the limits and budgets of all keys of an account together.

    meshproxy accounts limits acme                        only show them
    meshproxy accounts limits acme --budget-monthly 500 --max-parallel 20
    meshproxy accounts limits acme --clear                remove all of them
    """
    async with open_administration(args) as administration:
        out.print_record(await administration.account_limits(args.account, bounds_of(args)))


async def suspend(args: argparse.Namespace, out: Output) -> None:
    """Refuse every key of an account until it is resumed.

    meshproxy accounts suspend acme
    """
    async with open_administration(args) as administration:
        out.print_record(await administration.set_account_status(args.account, "suspended"))


async def resume(args: argparse.Namespace, out: Output) -> None:
    """Accept a suspended account's requests again.

    meshproxy accounts resume acme
    """
    async with open_administration(args) as administration:
        out.print_record(await administration.set_account_status(args.account, "active"))


async def delete(args: argparse.Namespace, out: Output) -> None:
    """Delete an account with all its data: keys, credit, history, usage, templates.

    meshproxy accounts delete acme --yes
    """
    if not args.yes:
        raise UsageError(f"argument --yes: required to delete {args.account} for good")
    async with open_administration(args) as administration:
        out.print_record(await administration.delete_account(args.account))


async def audit(args: argparse.Namespace, out: Output) -> None:
    """List the latest changes to accounts, keys, credit and templates, with who made them and when.

    meshproxy accounts audit
    meshproxy accounts audit --limit 1000 --json | jq '.[] | select(.account == "acme")'
    """
    async with open_administration(args) as administration:
        out.print_rows(await administration.audit(args.limit), AUDIT_COLUMNS, empty="no changes")


def add_credits(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `credits grant|show|history`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    granting = add_command(commands, "grant", grant)
    granting.add_argument("account", metavar="ACCOUNT", type=account, help="the account's name")
    granting.add_argument(
        "amount", metavar="AMOUNT", type=signed_usd, help="USD, such as 25.00; negative to take credit back"
    )
    granting.add_argument(
        "--ref", help="an id of the payment or invoice; a repeated grant with the same ref changes nothing"
    )
    granting.add_argument("--note", default="", help="a reason, shown in the history")
    add_command(commands, "show", show_credit).add_argument(
        "account", metavar="ACCOUNT", type=account, help="the account's name"
    )
    add_command(commands, "history", history).add_argument(
        "account", metavar="ACCOUNT", type=account, help="the account's name"
    )


async def grant(args: argparse.Namespace, out: Output) -> None:
    """Add credit to an account, which is created if it doesn't exist.

    meshproxy credits grant acme 25.00 --ref invoice-1204
    meshproxy credits grant acme -5.00 --note "typed 30, meant 25"
    """
    if args.amount == 0:
        raise UsageError("argument AMOUNT: it must not be 0")
    for flag, text, most in (("--note", args.note, MAX_NOTE), ("--ref", args.ref or "", MAX_REF)):
        if len(text) > most:
            raise UsageError(f"argument {flag}: at most {most} characters")
    if args.ref is not None and not args.ref.strip():
        raise UsageError("argument --ref: empty: leave it out, or name a payment")
    async with open_administration(args) as administration:
        out.print_record(await administration.grant(args.account, args.amount, args.note, args.ref))


async def show_credit(args: argparse.Namespace, out: Output) -> None:
    """Show an account's balance, held and available credit.

    meshproxy credits show acme
    meshproxy credits show acme --json | jq -r .available_usd
    """
    async with open_administration(args) as administration:
        out.print_record(await administration.credit(args.account))


async def history(args: argparse.Namespace, out: Output) -> None:
    """List an account's grants, newest first.

    meshproxy credits history acme
    """
    async with open_administration(args) as administration:
        out.print_rows(await administration.grants(args.account), GRANT_COLUMNS, empty="no grants")
