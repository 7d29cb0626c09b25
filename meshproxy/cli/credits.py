"""`meshproxy credits`: prepaid credit of accounts."""

import argparse

from meshproxy.cli.arguments import add_command, signed_usd
from meshproxy.cli.books import Books, account, ensure_account, need_account, open_books
from meshproxy.cli.output import Failed, Misused, Output
from meshproxy.money import format_usd, in_usd

MAX_NOTE = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`credits grant|show`"""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    granting = add_command(commands, "grant", grant)
    granting.add_argument("account", metavar="ACCOUNT", type=account)
    granting.add_argument(
        "amount", metavar="AMOUNT", type=signed_usd, help="USD, such as 25.00; a negative one takes back"
    )
    granting.add_argument("--note", default="", help="why, for the account's usage stream")
    add_command(commands, "show", show).add_argument("account", metavar="ACCOUNT", type=account)


async def grant(args: argparse.Namespace, out: Output) -> None:
    """Add credit to an account, which is made if it doesn't exist.

    meshproxy credits grant acme 25.00 --note "invoice 1204"
    meshproxy credits grant acme -5.00 --note "typed 30, meant 25"
    """
    if args.amount == 0:
        raise Misused("argument AMOUNT: nothing to grant")
    if len(args.note) > MAX_NOTE:
        raise Misused(f"argument --note: at most {MAX_NOTE} characters")
    granted = format_usd(args.amount)
    async with open_books(args) as books:
        await ensure_account(books, args.account)
        try:
            await books.ledger.grant(args.account, args.amount, args.note)
        except ValueError as error:
            raise Failed("balance_out_of_range", f"no balance may be so large: {granted} USD") from error
        out.record({**await credit(books, args.account), "granted_now_usd": granted})


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show what an account has, holds and may spend.

    meshproxy credits show acme
    meshproxy credits show acme --json | jq -r .available_usd
    """
    async with open_books(args) as books:
        await need_account(books, args.account)
        out.record(await credit(books, args.account))


async def credit(books: Books, name: str) -> dict[str, str]:
    """An account's credit in decimal strings of USD: granted = balance + settled, available = balance - held."""
    balance = await books.ledger.balance(name)
    amounts = ("balance_nusd", "held_nusd", "available_nusd", "granted_nusd", "settled_nusd")
    return {"account": name, **in_usd({amount: getattr(balance, amount) for amount in amounts})}
