"""`meshproxy usage`: report usage and cost from the hourly aggregates."""

import argparse
import asyncio
import csv
import io
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from meshproxy.cli.arguments import Misused, Output, make_command, names, past
from meshproxy.cli.books import account, open_desk
from meshproxy.ledger.desk import BY, NUMBERS, USAGE_SPAN_S
from meshproxy.ledger.usage_report import GROUPS

SHOWN = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost_usd")
PATIENCE_S = 1.0  # seconds before a line says that the report takes a while


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `usage`."""
    make_command(parser, report, on_store=True)
    parser.add_argument("--account", metavar="NAME", type=account, help="this account alone (default: every account)")
    parser.add_argument(
        "--by", metavar="WHAT[,...]", type=names, action="extend", default=[], help="session, model, key, day"
    )
    parser.add_argument("--session", metavar="ID", help="this session_id alone")
    parser.add_argument("--since", metavar="WHEN", type=past, help="a time in RFC 3339, or 24h, 7d ago (default: 30d)")
    parser.add_argument("--until", metavar="WHEN", type=past, help="likewise (default: now)")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="json is --json")


async def report(args: argparse.Namespace, out: Output) -> None:
    """Show requests, tokens and cost of accounts. Whole hours (UTC) by the requests' start; 92 days at most.

    meshproxy usage                                     every account, the last 30 days
    meshproxy usage --account acme --by model --since 24h
    meshproxy usage --by day,model --since 2026-11-01 --until 2026-12-01 --format csv
    meshproxy usage --account acme --by session --session support-4711
    """
    until = time.time() if args.until is None else args.until
    since = until - USAGE_SPAN_S if args.since is None else args.since
    if since > until:
        raise Misused("argument --since: after --until")
    if unknown := set(args.by) - BY.keys():
        raise Misused(f"argument --by: {min(unknown)!r} is none of {', '.join(BY)}")
    groups = [name for name in GROUPS if name in {BY[word] for word in args.by}]
    async with open_desk(args) as desk:
        working = asyncio.create_task(_say_working())
        try:
            rows = await desk.usage(args.account, group_by=groups, session_id=args.session, since=since, until=until)
        finally:
            working.cancel()
    if args.format == "csv":
        sys.stdout.write(as_csv(rows, ["account", *groups, *NUMBERS]))
        return
    shown = Output(as_json=out.as_json or args.format == "json")
    shown.rows(rows, ["account", *groups, *SHOWN], empty="nothing was used")


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as CSV with a header line (RFC 4180, but lines end with LF, as shells expect)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


async def _say_working() -> None:
    """If the report takes longer than a second, print to a terminal's stderr that it is being computed."""
    await asyncio.sleep(PATIENCE_S)
    if sys.stderr.isatty():
        print("adding up the hours of every account ...", file=sys.stderr, flush=True)
