"""`meshproxy top`: who uses what, as it happens."""

import argparse
import asyncio
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from meshproxy.cli.arguments import add_store, count
from meshproxy.cli.books import account, chosen_accounts, open_books
from meshproxy.cli.output import Output, cells, table
from meshproxy.cli.usage_tail import Row, Tail
from meshproxy.money import format_usd

COLUMNS = ["account", "model", "requests", "requests_per_minute", "prompt_tokens", "completion_tokens", "cost_usd"]
CLEAR = "\x1b[H\x1b[2J"  # ECMA-48: cursor home, erase in page

EXAMPLES = """\
  meshproxy top                             refresh every two seconds, until Ctrl-C
  meshproxy top --account acme --minutes 15
  meshproxy top --once --json               one snapshot for a script
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`top`"""
    parser.description = "Requests, tokens and cost of the last minutes by account and model, from the usage streams."
    add_store(parser, top, examples=EXAMPLES)
    parser.add_argument("--account", metavar="NAME", type=account, help="this account alone (default: every account)")
    parser.add_argument("--minutes", metavar="N", type=count, default=5, help="how far to look back (default: 5)")
    parser.add_argument("--interval", metavar="S", type=count, default=2, help="seconds between refreshes (default: 2)")
    parser.add_argument("--once", action="store_true", help="print one table and exit; --json and pipes do so anyway")


async def top(args: argparse.Namespace, out: Output) -> None:
    """One snapshot, or one after the other on a terminal."""
    async with open_books(args) as books:
        tail = Tail(books.store, await chosen_accounts(books, args.account), args.minutes * 60)
        if args.once or args.json or not sys.stdout.isatty():
            out.rows(shown(await tail.read(), args.minutes), COLUMNS, empty=nothing(args.minutes))
            return
        while True:
            print(CLEAR + screen(await tail.read(), tail, args.minutes), flush=True)
            await asyncio.sleep(args.interval)


def shown(rows: Sequence[Row], minutes: int) -> list[dict[str, Any]]:
    """Rows as they are printed."""
    return [
        {
            "account": row.account,
            "model": row.model,
            "requests": row.requests,
            "requests_per_minute": round(row.requests / minutes, 1),
            "prompt_tokens": row.prompt_tokens,
            "completion_tokens": row.completion_tokens,
            "cost_usd": format_usd(row.cost_nusd),
        }
        for row in rows
    ]


def screen(rows: Sequence[Row], tail: Tail, minutes: int) -> str:
    """What fits the terminal: a line of sums, and the most expensive rows."""
    size = shutil.get_terminal_size()
    cost = format_usd(sum(row.cost_nusd for row in rows))
    lines = [f"last {minutes} min: {sum(row.requests for row in rows)} requests, {cost} USD    Ctrl-C ends", ""]
    lines += table(COLUMNS, cells(shown(rows, minutes), COLUMNS)) if rows else [nothing(minutes)]
    if tail.accounts_left_out:
        lines.insert(1, f"{tail.accounts_left_out} accounts are not shown; name one with --account")
    return "\n".join(line[: size.columns] for line in lines[: size.lines - 1])


def nothing(minutes: int) -> str:
    """What stands in place of an empty table."""
    return f"nothing was settled in the last {minutes} min"
