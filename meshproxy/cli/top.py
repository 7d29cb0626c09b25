"""`meshproxy top`: who uses what, as it happens."""

import argparse
import asyncio
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from msgspec.structs import asdict

from meshproxy.cli.arguments import count, make_command
from meshproxy.cli.books import account, open_desk
from meshproxy.cli.output import Output, table
from meshproxy.cli.usage_tail import Row, Tail, with_refusals
from meshproxy.money import format_usd, in_usd

COLUMNS = [
    *("account", "model", "requests", "requests_per_minute", "refused"),
    *("prompt_tokens", "completion_tokens", "cost_usd"),
]
CLEAR = "\x1b[H\x1b[2J"  # ECMA-48: cursor home, erase in page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`top`"""
    make_command(parser, top, on_store=True)
    parser.add_argument("--account", metavar="NAME", type=account, help="this account alone (default: every account)")
    parser.add_argument("--minutes", metavar="N", type=count, default=5, help="how far to look back (default: 5)")
    parser.add_argument("--interval", metavar="S", type=count, default=2, help="seconds between refreshes (default: 2)")
    parser.add_argument("--once", action="store_true", help="print one table and exit; --json and pipes do so anyway")


async def top(args: argparse.Namespace, out: Output) -> None:
    """Requests, refusals, tokens and cost of the last minutes by account and model, the most expensive first.

    meshproxy top                             refresh every two seconds, until Ctrl-C
    meshproxy top --account acme --minutes 15
    meshproxy top --once --json               one snapshot for a script
    """
    nothing = f"nothing was settled in the last {args.minutes} min"
    async with open_desk(args) as desk:
        tail = Tail(desk.store, await desk.account_names(args.account), args.minutes * 60)
        while True:
            refused = await desk.ledger.refusals(tail.accounts, args.minutes)
            used = with_refusals(await tail.read(), dict(zip(tail.accounts, refused, strict=True)))
            rows = [shown(row, args.minutes) for row in used]
            if args.once or args.json or not sys.stdout.isatty():
                out.rows(rows, COLUMNS, empty=nothing)
                return
            lines = [heading(used, args.minutes), ""]
            lines += table(rows, COLUMNS) if rows else [nothing]
            size = shutil.get_terminal_size()
            print(CLEAR + "\n".join(line[: size.columns] for line in lines[: size.lines - 1]), flush=True)
            await asyncio.sleep(args.interval)


def shown(row: Row, minutes: int) -> dict[str, Any]:
    """A row as it is printed."""
    return {**in_usd(asdict(row)), "requests_per_minute": round(row.requests / minutes, 1)}


def heading(rows: Sequence[Row], minutes: int) -> str:
    """A line of sums."""
    requests, cost = sum(row.requests for row in rows), format_usd(sum(row.cost_nusd for row in rows))
    refused = sum(row.refused for row in rows)
    return f"last {minutes} min: {requests} requests, {refused} refused, {cost} USD    Ctrl-C ends"
