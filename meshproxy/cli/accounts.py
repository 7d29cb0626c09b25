"""`meshproxy accounts` and `credits`: accounts with their credit, limits and budgets."""

import argparse
from functools import partial
from typing import Any

from meshproxy.cli.arguments import ACCOUNT, Operation, count, signed_nusd
from meshproxy.cli.command_line import StoreCommand, UsageError, add_family, argument
from meshproxy.cli.keys import CLEAR, bounds_of, limit_flags
from meshproxy.ledger.administration import MAX_NOTE, MAX_REF

COLUMNS = (
    *("account", "status", "balance_usd", "held_usd", "available_usd"),
    *("spent_today_usd=spend.day_usd", "spent_month_usd=spend.month_usd"),
)
GRANT_COLUMNS = ("granted_at", "amount_usd", "balance_usd", "ref", "note", "actor")
AUDIT_COLUMNS = ("at", "actor", "action", "target", "account", "detail")
AUDIT_LIMIT = 100


def list_accounts(args: argparse.Namespace) -> Operation:
    """List accounts with their credit and spend, including accounts without keys.

    meshproxy accounts list
    meshproxy accounts list --json | jq -r '.[] | select(.available_usd | tonumber < 1) | .account'
    meshproxy accounts list --limit 100 --after acme
    """
    return lambda administration: administration.accounts(limit=args.limit, after=args.after)


def show(args: argparse.Namespace) -> Operation:
    """Show an account's credit, limits, budgets and spend.

    meshproxy accounts show acme
    meshproxy accounts show acme --json | jq -r .available_usd
    """
    return lambda administration: administration.account(args.account)


def limits(args: argparse.Namespace) -> Operation:
    """Show or change the limits and budgets of all keys of an account together.

    meshproxy accounts limits acme                        only show them
    meshproxy accounts limits acme --budget-monthly 500 --max-parallel 20
    meshproxy accounts limits acme --clear                remove all of them
    """
    return lambda administration: administration.account_limits(args.account, bounds_of(args))


def suspend(args: argparse.Namespace) -> Operation:
    """Refuse every key of an account until it is resumed.

    meshproxy accounts suspend acme
    """
    return lambda administration: administration.set_account_status(args.account, "suspended")


def resume(args: argparse.Namespace) -> Operation:
    """Accept a suspended account's requests again.

    meshproxy accounts resume acme
    """
    return lambda administration: administration.set_account_status(args.account, "active")


def delete(args: argparse.Namespace) -> Operation:
    """Delete an account with all its data: keys, credit, history, usage, templates.

    meshproxy accounts delete acme --yes
    """
    if not args.yes:
        raise UsageError(f"argument --yes: required to delete {args.account} for good")
    return lambda administration: administration.delete_account(args.account)


def audit(args: argparse.Namespace) -> Operation:
    """List the latest changes to accounts, keys, credit and templates, with who made them and when.

    meshproxy accounts audit
    meshproxy accounts audit --limit 1000 --json | jq '.[] | select(.account == "acme")'
    """
    return lambda administration: administration.audit(args.limit)


def grant(args: argparse.Namespace) -> Operation:
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
    return lambda administration: administration.grant(args.account, args.amount, args.note, args.ref)


def show_credit(args: argparse.Namespace) -> Operation:
    """Show an account's balance, held and available credit.

    meshproxy credits show acme
    meshproxy credits show acme --json | jq -r .available_usd
    """
    return lambda administration: administration.credit(args.account)


def history(args: argparse.Namespace) -> Operation:
    """List an account's grants, newest first.

    meshproxy credits history acme
    """
    return lambda administration: administration.grants(args.account)


def _limit(**options: Any) -> Any:
    return argument("--limit", metavar="N", type=count, **options)


AFTER = argument("--after", metavar="NAME", default="", help="only accounts whose name sorts after this one")
YES = argument("--yes", action="store_true", help="required, because a deletion can't be undone")
AMOUNT = argument("amount", metavar="AMOUNT", type=signed_nusd, help="USD, such as 25.00; negative to take credit back")
REF = argument("--ref", help="an id of the payment or invoice; a repeated grant with the same ref changes nothing")
NOTE = argument("--note", default="", help="a reason, shown in the history")

ACCOUNTS = {
    "list": StoreCommand(
        list_accounts, [_limit(help="at most this many (default: all)"), AFTER], COLUMNS, "no accounts"
    ),
    "show": StoreCommand(show, [ACCOUNT]),
    "limits": StoreCommand(limits, [ACCOUNT, CLEAR, limit_flags("all keys of the account together", of_account=True)]),
    "suspend": StoreCommand(suspend, [ACCOUNT]),
    "resume": StoreCommand(resume, [ACCOUNT]),
    "delete": StoreCommand(delete, [ACCOUNT, YES]),
    "audit": StoreCommand(
        audit,
        [_limit(default=AUDIT_LIMIT, help="at most this many (default: %(default)s)")],
        AUDIT_COLUMNS,
        "no changes",
    ),
}
CREDITS = {
    "grant": StoreCommand(grant, [ACCOUNT, AMOUNT, REF, NOTE]),
    "show": StoreCommand(show_credit, [ACCOUNT]),
    "history": StoreCommand(history, [ACCOUNT], GRANT_COLUMNS, "no grants"),
}
add_accounts = partial(add_family, commands=ACCOUNTS)
add_credits = partial(add_family, commands=CREDITS)
