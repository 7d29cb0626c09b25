"""`meshproxy accounts`: list, change and delete accounts, with their credit, limits and budgets."""

import argparse

from meshproxy.cli.arguments import Misused, Output, add_command, count
from meshproxy.cli.books import account, open_desk
from meshproxy.cli.keys import add_limit_flags, budgets_of, limits_of
from meshproxy.ledger.desk import Bounds

COLUMNS = ["account", "status", "balance_usd", "held_usd", "available_usd", "spent_today_usd", "spent_month_usd"]
AUDIT_COLUMNS = ["at", "actor", "action", "target", "account", "detail"]
AUDITED = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `accounts list|show|limits|suspend|resume|delete|audit`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    listing = add_command(commands, "list", list_accounts)
    listing.add_argument("--limit", metavar="N", type=count, help="at most so many (default: all)")
    listing.add_argument("--after", metavar="NAME", default="", help="those that follow this account")
    add_command(commands, "show", show).add_argument("account", metavar="ACCOUNT", type=account)
    limiting = add_command(commands, "limits", limits)
    limiting.add_argument("account", metavar="ACCOUNT", type=account)
    limiting.add_argument("--clear", action="store_true", help="first take away every limit and budget there is")
    add_limit_flags(limiting, of_account=True)
    add_command(commands, "suspend", suspend).add_argument("account", metavar="ACCOUNT", type=account)
    add_command(commands, "resume", resume).add_argument("account", metavar="ACCOUNT", type=account)
    deleting = add_command(commands, "delete", delete)
    deleting.add_argument("account", metavar="ACCOUNT", type=account)
    deleting.add_argument("--yes", action="store_true", help="it can't be taken back, so say it")
    auditing = add_command(commands, "audit", audit)
    auditing.add_argument("--limit", metavar="N", type=count, default=AUDITED, help=f"(default: {AUDITED})")


async def list_accounts(args: argparse.Namespace, out: Output) -> None:
    """List accounts with their credit and spend, including accounts without keys.

    meshproxy accounts list
    meshproxy accounts list --json | jq -r '.[] | select(.available_usd | tonumber < 1) | .account'
    meshproxy accounts list --limit 100 --after acme
    """
    async with open_desk(args) as desk:
        found = await desk.accounts(limit=args.limit, after=args.after)
    rows = [
        {**each, "spent_today_usd": each["spend"]["day_usd"], "spent_month_usd": each["spend"]["month_usd"]}
        for each in found
    ]
    out.rows(found if out.as_json else rows, COLUMNS, empty="no accounts")


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show an account's credit, limits, budgets and spend.

    meshproxy accounts show acme
    meshproxy accounts show acme --json | jq -r .available_usd
    """
    async with open_desk(args) as desk:
        out.record(await desk.account(args.account))


async def limits(args: argparse.Namespace, out: Output) -> None:
    """Show or set what all keys of an account together may use and spend.

    meshproxy accounts limits acme                        show them
    meshproxy accounts limits acme --budget-monthly 500 --max-parallel 20
    meshproxy accounts limits acme --clear                take them all away
    """
    bounds = Bounds(limits=limits_of(args), budgets=budgets_of(args), clear=args.clear)
    async with open_desk(args) as desk:
        out.record(await desk.account_limits(args.account, bounds))


async def suspend(args: argparse.Namespace, out: Output) -> None:
    """Refuse every key of an account until it is resumed.

    meshproxy accounts suspend acme
    """
    async with open_desk(args) as desk:
        out.record(await desk.set_account_status(args.account, "suspended"))


async def resume(args: argparse.Namespace, out: Output) -> None:
    """Accept a suspended account's requests again.

    meshproxy accounts resume acme
    """
    async with open_desk(args) as desk:
        out.record(await desk.set_account_status(args.account, "active"))


async def delete(args: argparse.Namespace, out: Output) -> None:
    """Delete an account with all its data: keys, credit, history, usage, templates.

    meshproxy accounts delete acme --yes
    """
    if not args.yes:
        raise Misused(f"argument --yes: {args.account} is deleted for ever; say --yes")
    async with open_desk(args) as desk:
        out.record(await desk.delete_account(args.account))


async def audit(args: argparse.Namespace, out: Output) -> None:
    """List the latest changes to accounts, keys, credit and templates: who, what, when.

    meshproxy accounts audit
    meshproxy accounts audit --limit 1000 --json | jq '.[] | select(.account == "acme")'
    """
    async with open_desk(args) as desk:
        out.rows(await desk.audit(args.limit), AUDIT_COLUMNS, empty="nothing was changed")
