"""`meshproxy usage`, `requests` and `top`: what was used and what it cost.

`usage` reads the hourly aggregates, `requests show` one settled request, and `top` the accounts' usage streams of the last
minutes. All that `top` reads and keeps is bounded. It sums events by SLOT_S, so its window moves in such steps.
"""

import argparse
import asyncio
import csv
import io
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TextIO

from msgspec import Struct
from msgspec.structs import asdict

from meshproxy.cli.arguments import Operation, account, count, minutes, names, open_administration, past
from meshproxy.cli.command_line import (
    Output,
    StoreCommand,
    UsageError,
    add_family,
    argument,
    make_command,
    printable,
    table,
)
from meshproxy.ledger.administration import USAGE_SPAN_S
from meshproxy.ledger.connection import Store
from meshproxy.ledger.records import AccountKeys
from meshproxy.ledger.usage_report import GROUP_ALIASES, GROUPS, NUMERIC_FIELDS
from meshproxy.units import format_usd, in_usd

TEXT_COLUMNS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost_usd")
NOTICE_AFTER_S = 1.0  # that a report takes


def add_usage(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `usage`."""
    make_command(parser, report, uses_store=True)
    parser.add_argument("--account", metavar="NAME", type=account, help="this account only (default: every account)")
    parser.add_argument(
        "--by",
        metavar="WHAT[,...]",
        type=names,
        action="extend",
        default=[],
        help="group by any of session, model, key, day",
    )
    parser.add_argument("--session", metavar="ID", help="this session_id only")
    parser.add_argument(
        "--since", metavar="WHEN", type=past, help="an RFC 3339 time, or an age such as 24h or 7d (default: 30d)"
    )
    parser.add_argument("--until", metavar="WHEN", type=past, help="the end, in the same form (default: now)")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="json: the same as --json")


async def report(args: argparse.Namespace, out: Output) -> None:
    """Show requests, tokens and cost by account. A request counts in the hour (UTC) in which it started.

    Before the last 90 days whole months are shown, and `day` is the month: 2026-05.

    meshproxy usage                                     every account, the last 30 days
    meshproxy usage --account acme --by model --since 24h
    meshproxy usage --by day,model --since 2026-11-01 --until 2026-12-01 --format csv
    meshproxy usage --account acme --by session --session support-4711
    """
    until = time.time() if args.until is None else args.until
    since = until - USAGE_SPAN_S if args.since is None else args.since
    if since > until:
        raise UsageError("argument --since: after --until")
    if unknown := set(args.by) - GROUP_ALIASES.keys():
        raise UsageError(f"argument --by: {min(unknown)!r} is not one of {', '.join(GROUP_ALIASES)}")
    groups = [name for name in GROUPS if name in {GROUP_ALIASES[word] for word in args.by}]
    async with open_administration(args) as administration:
        rows = await administration.usage(
            args.account,
            group_by=groups,
            session_id=args.session,
            since=since,
            until=until,
            on_progress=Progress(sys.stderr, time.monotonic),
        )
    if args.format == "csv":
        sys.stdout.write(as_csv(rows, ["account", *groups, *NUMERIC_FIELDS]))
        return
    output = Output(as_json=out.as_json or args.format == "json")
    output.print_rows(rows, ["account", *groups, *TEXT_COLUMNS], empty="no usage")


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as CSV with a header line (RFC 4180, but lines end with LF, as shells expect).

    Clients choose session ids. So control characters are escaped, as in tables, and a text that a spreadsheet would
    take for a formula gets an apostrophe (https://owasp.org/www-community/attacks/CSV_Injection).
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


_FORMULA = re.compile(r"[=+@-](?!\d*\Z)")  # a whole number is none


def _cell(value: object) -> object:
    """Return a value as it can be opened in a spreadsheet. Amounts and numbers stay as they are."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    return f"'{shown}" if _FORMULA.match(shown) else shown


class Progress:
    """Writes a line to stderr each NOTICE_AFTER_S that a report takes: how many accounts are read."""

    def __init__(self, stderr: TextIO, clock: Callable[[], float]) -> None:
        self._stderr = stderr
        self._clock = clock
        self._next_at = clock() + NOTICE_AFTER_S

    def __call__(self, done: int, accounts: int) -> None:
        """Note that so many accounts are read."""
        if self._clock() >= self._next_at:
            self._next_at = self._clock() + NOTICE_AFTER_S
            print(f"{done:,} of {accounts:,} accounts ...", file=self._stderr, flush=True)


def show_request(args: argparse.Namespace) -> Operation:
    """Show one request: its key, model and upstream, how it ended, what it used and cost.

    meshproxy requests show 018f2c6e-7a31
    meshproxy requests show 018f2c6e-7a31 --json | jq -r .cost_usd
    """
    return lambda administration: administration.request(args.request_id)


REQUEST_ID = argument("request_id", metavar="REQUEST_ID", help="the x-request-id header of its answer")
add_requests = partial(add_family, commands={"show": StoreCommand(show_request, [REQUEST_ID])})


SLOT_S = 5
BATCH_ACCOUNTS = 500  # accounts read in one write
BATCH_EVENTS = 1_000  # events read of one account at a time
MAX_EVENTS_READ = 50_000  # events of one account in one reading; the rest is read next time
MAX_SUMS = 500_000


class TopRow(Struct):
    """The sums of an account and model in the window.

    `refused` counts all of the account's requests that were refused in the window (402, 429). It is set only in the
    account's first row. `model` is empty if nothing was settled.
    """

    account: str
    model: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_nusd: int = 0
    refused: int = 0

    def add(self, other: "TopRow") -> None:
        """Add another row's counts, except its refusals."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cost_nusd += other.cost_nusd


class UsageWindow:
    """Reads the usage streams of accounts and keeps the sums of the last `window_s` seconds."""

    def __init__(self, store: Store, accounts: Sequence[str], window_s: int) -> None:
        self.accounts = list(accounts)
        self._store = store
        self._window_ms = window_s * 1000
        self._last_ids: dict[str, str] = {}
        self._sums: dict[tuple[int, str, str], TopRow] = {}  # by slot, account and model

    async def read(self) -> list[TopRow]:
        """Return the window's sums by account and model, the most expensive first."""
        seconds, micros = await self._store.execute("TIME")
        since_ms = int(seconds) * 1000 + int(micros) // 1000 - self._window_ms
        for first in range(0, len(self.accounts), BATCH_ACCOUNTS):
            batch = self.accounts[first : first + BATCH_ACCOUNTS]
            await asyncio.gather(*(self._read_new(account, since_ms) for account in batch))
        oldest = since_ms // (SLOT_S * 1000)
        self._sums = {key: row for key, row in self._sums.items() if key[0] >= oldest}
        rows: dict[tuple[str, str], TopRow] = {}
        for (_, name, model), used in self._sums.items():
            rows.setdefault((name, model), TopRow(name, model)).add(used)
        return sorted(rows.values(), key=_by_cost)

    async def _read_new(self, account: str, since_ms: int) -> None:
        """Add the new events of an account's stream."""
        for _ in range(MAX_EVENTS_READ // BATCH_EVENTS):
            last = self._last_ids.get(account)
            start = f"({last}" if last is not None else str(since_ms)
            entries = await self._store.execute("XRANGE", AccountKeys(account).usage, start, "+", "COUNT", BATCH_EVENTS)
            self._add_events(account, entries, since_ms)
            if len(entries) < BATCH_EVENTS:
                break

    def _add_events(self, account: str, entries: Sequence[Any], since_ms: int) -> None:
        if entries:
            self._last_ids[account] = entries[-1][0].decode()
        for _, flat in entries:
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            if fields[b"event"] != b"settled":
                continue
            settled_ms, model = int(fields[b"settled_ms"]), fields[b"model"].decode()
            counts = (int(fields[name]) for name in (b"prompt_tokens", b"completion_tokens", b"cost_nusd"))
            key = (settled_ms // (SLOT_S * 1000), account, model)
            if settled_ms >= since_ms and (key in self._sums or len(self._sums) < MAX_SUMS):
                self._sums.setdefault(key, TopRow(account, model)).add(TopRow(account, model, 1, *counts))


def with_refusals(rows: Sequence[TopRow], refused: dict[str, int]) -> list[TopRow]:
    """Return the rows with each account's refusals in its first row.

    An account that was only refused gets a row of its own.
    """
    left = {account: count for account, count in refused.items() if count}
    for row in rows:
        row.refused = left.pop(row.account, 0)
    only = [TopRow(account, "", refused=count) for account, count in left.items()]
    return sorted([*rows, *only], key=_by_cost)


def _by_cost(row: TopRow) -> tuple[int, int, int, str, str]:
    """Return a sort key that puts the highest cost first."""
    return (-row.cost_nusd, -row.requests, -row.refused, row.account, row.model)


TOP_COLUMNS = [
    *("account", "model", "requests", "requests_per_minute", "refused"),
    *("prompt_tokens", "completion_tokens", "cost_usd"),
]
CLEAR = "\x1b[H\x1b[2J"  # ECMA-48: cursor home, erase in page


def add_top(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `top`."""
    make_command(parser, top, uses_store=True)
    parser.add_argument("--account", metavar="NAME", type=account, help="this account only (default: every account)")
    parser.add_argument(
        "--minutes", metavar="N", type=minutes, default=5, help="length of the window, at most 1440 (default: 5)"
    )
    parser.add_argument("--interval", metavar="S", type=count, default=2, help="seconds between refreshes (default: 2)")
    parser.add_argument("--once", action="store_true", help="print one table and exit, as --json and pipes always do")


async def top(args: argparse.Namespace, out: Output) -> None:
    """Show requests, refusals, tokens and cost of the last minutes by account and model, the most expensive first.

    meshproxy top                             refresh every two seconds, until Ctrl-C
    meshproxy top --account acme --minutes 15
    meshproxy top --once --json               one snapshot for a script
    """
    empty = f"nothing was settled in the last {args.minutes} min"
    async with open_administration(args) as administration:
        window = UsageWindow(administration.store, await administration.account_names(args.account), args.minutes * 60)
        while True:
            refused = await administration.ledger.refusals(window.accounts, args.minutes)
            used = with_refusals(await window.read(), dict(zip(window.accounts, refused, strict=True)))
            rows = [_printed(row, args.minutes) for row in used]
            if args.once or args.json or not sys.stdout.isatty():
                out.print_rows(rows, TOP_COLUMNS, empty=empty)
                return
            lines = [_totals(used, args.minutes), ""]
            lines += table(rows, TOP_COLUMNS) if rows else [empty]
            size = shutil.get_terminal_size()
            print(CLEAR + "\n".join(line[: size.columns] for line in lines[: size.lines - 1]), flush=True)
            await asyncio.sleep(args.interval)


def _printed(row: TopRow, minutes: int) -> dict[str, Any]:
    """Return a row as it is printed."""
    return {**in_usd(asdict(row)), "requests_per_minute": round(row.requests / minutes, 1)}


def _totals(rows: Sequence[TopRow], minutes: int) -> str:
    """Return the line of sums above the table."""
    requests, cost = sum(row.requests for row in rows), format_usd(sum(row.cost_nusd for row in rows))
    refused = sum(row.refused for row in rows)
    return f"last {minutes} min: {requests} requests, {refused} refused, {cost} USD    Ctrl-C ends"
