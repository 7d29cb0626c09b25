"""`meshproxy credits`: grant and show accounts' prepaid credit."""

import argparse

from meshproxy.cli.arguments import Misused, Output, add_command, signed_usd
from meshproxy.cli.books import account, open_desk
from meshproxy.ledger.desk import MAX_NOTE, MAX_REF

COLUMNS = ["granted_at", "amount_usd", "balance_usd", "ref", "note", "actor"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `credits grant|show|history`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    granting = add_command(commands, "grant", grant)
    granting.add_argument("account", metavar="ACCOUNT", type=account)
    granting.add_argument(
        "amount", metavar="AMOUNT", type=signed_usd, help="USD, such as 25.00; a negative one takes back"
    )
    granting.add_argument(
        "--ref", default="", help="a payment's or invoice's id: granted once, however often it is said"
    )
    granting.add_argument("--note", default="", help="why, for the history")
    add_command(commands, "show", show).add_argument("account", metavar="ACCOUNT", type=account)
    add_command(commands, "history", history).add_argument("account", metavar="ACCOUNT", type=account)


async def grant(args: argparse.Namespace, out: Output) -> None:
    """Add credit to an account, which is created if it doesn't exist.

    meshproxy credits grant acme 25.00 --ref invoice-1204
    meshproxy credits grant acme -5.00 --note "typed 30, meant 25"
    """
    if args.amount == 0:
        raise Misused("argument AMOUNT: nothing to grant")
    for flag, text, most in (("--note", args.note, MAX_NOTE), ("--ref", args.ref, MAX_REF)):
        if len(text) > most:
            raise Misused(f"argument {flag}: at most {most} characters")
    async with open_desk(args) as desk:
        out.record(await desk.grant(args.account, args.amount, args.note, args.ref))


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show an account's balance, held and available credit.

    meshproxy credits show acme
    meshproxy credits show acme --json | jq -r .available_usd
    """
    async with open_desk(args) as desk:
        out.record(await desk.credit(args.account))


async def history(args: argparse.Namespace, out: Output) -> None:
    """List an account's grants, newest first.

    meshproxy credits history acme
    """
    async with open_desk(args) as desk:
        out.rows(await desk.grants(args.account), COLUMNS, empty="nothing was granted")
