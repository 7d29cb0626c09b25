"""`meshproxy usage`: what was used and what it cost, from the hourly aggregates."""

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec.structs import asdict

from meshproxy.cli.arguments import make_command, names, past
from meshproxy.cli.books import account, chosen_accounts, open_books
from meshproxy.cli.output import Misused, Output
from meshproxy.ledger.usage_report import GROUPS, Row, usage
from meshproxy.money import in_usd

DEFAULT_SPAN_S = 30 * 86_400
BY = {"session": "session_id", "model": "model", "key": "key", "day": "day"}
SHOWN = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost_usd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`usage`"""
    make_command(parser, report, on_store=True)
    parser.add_argument("--account", metavar="NAME", type=account, help="this account alone (default: every account)")
    parser.add_argument(
        "--by", metavar="WHAT[,...]", type=names, action="extend", default=[], help="session, model, key, day"
    )
    parser.add_argument("--session", metavar="ID", help="this session_id alone")
    parser.add_argument("--since", metavar="WHEN", type=past, help="a time in RFC 3339, or 24h, 7d ago (default: 30d)")
    parser.add_argument("--until", metavar="WHEN", type=past, help="likewise (default: now)")


async def report(args: argparse.Namespace, out: Output) -> None:
    """Requests, tokens and cost of accounts. Whole hours (UTC), by when requests started; 92 days at most.

    meshproxy usage                                     every account, the last 30 days
    meshproxy usage --account acme --by model --since 24h
    meshproxy usage --by day,model --since 2026-11-01 --until 2026-12-01 --json
    meshproxy usage --account acme --by session --session support-4711
    """
    until = time.time() if args.until is None else args.until
    since = until - DEFAULT_SPAN_S if args.since is None else args.since
    if since > until:
        raise Misused("argument --since: after --until")
    if unknown := set(args.by) - BY.keys():
        raise Misused(f"argument --by: {min(unknown)!r} is none of {', '.join(BY)}")
    groups = [name for name in GROUPS if name in {BY[word] for word in args.by}]
    rows: list[dict[str, Any]] = []
    async with open_books(args) as books:
        for name in await chosen_accounts(books, args.account):
            found = await usage(
                books.store,
                name,
                group_by=groups,
                session_id=args.session,
                since=datetime.fromtimestamp(since, UTC),
                until=datetime.fromtimestamp(until, UTC),
            )
            rows += [shown(name, row, groups) for row in found]
    out.rows(rows, ["account", *groups, *SHOWN], empty="nothing was used")


def shown(name: str, row: Row, groups: Sequence[str]) -> dict[str, Any]:
    """A row as it is printed."""
    fields = {field: value for field, value in asdict(row).items() if field not in GROUPS or field in groups}
    return {"account": name, **in_usd(fields)}
