"""`meshproxy top`: what was settled in the last minutes, from the usage streams of the accounts.

Everything is bounded: the accounts read at a time, the events read at a time, the sums kept. Events are summed by
SLOT_S, so the window moves in steps of that length.
"""

import argparse
import asyncio
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from meshproxy.cli.arguments import Output, count, make_command, minutes, table
from meshproxy.cli.books import account, open_desk
from meshproxy.ledger.connection import Store
from meshproxy.ledger.records import AccountKeys
from meshproxy.money import format_usd, in_usd

SLOT_S = 5
BATCH_ACCOUNTS = 500  # accounts read in one write
BATCH_EVENTS = 1_000  # events read of one account at a time
MAX_EVENTS_READ = 50_000  # events of one account in one reading; the rest is read next time
MAX_SUMS = 500_000


class Row(Struct):
    """The sums of an account and model, in the window or of one request.

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

    def add(self, other: "Row") -> None:
        """Add another row's counts."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cost_nusd += other.cost_nusd


class Tail:
    """Reads the streams of some accounts and keeps the last `window_s` of them."""

    def __init__(self, store: Store, accounts: Sequence[str], window_s: int) -> None:
        self.accounts = list(accounts)
        self._store = store
        self._window_ms = window_s * 1000
        self._last_ids: dict[str, str] = {}
        self._sums: dict[tuple[int, str, str], Row] = {}  # by slot, account and model

    async def read(self) -> list[Row]:
        """Return the window's sums by account and model, the most expensive first."""
        seconds, micros = await self._store.execute("TIME")
        since_ms = int(seconds) * 1000 + int(micros) // 1000 - self._window_ms
        for first in range(0, len(self.accounts), BATCH_ACCOUNTS):
            batch = self.accounts[first : first + BATCH_ACCOUNTS]
            await asyncio.gather(*(self._follow(account, since_ms) for account in batch))
        oldest = since_ms // (SLOT_S * 1000)
        self._sums = {key: row for key, row in self._sums.items() if key[0] >= oldest}
        rows: dict[tuple[str, str], Row] = {}
        for (_, name, model), used in self._sums.items():
            rows.setdefault((name, model), Row(name, model)).add(used)
        return sorted(rows.values(), key=order)

    async def _follow(self, account: str, since_ms: int) -> None:
        """Add the new events of an account's stream."""
        for _ in range(MAX_EVENTS_READ // BATCH_EVENTS):
            last = self._last_ids.get(account)
            start = f"({last}" if last is not None else str(since_ms)
            entries = await self._store.execute("XRANGE", AccountKeys(account).usage, start, "+", "COUNT", BATCH_EVENTS)
            self._remember(account, entries, since_ms)
            if len(entries) < BATCH_EVENTS:
                break

    def _remember(self, account: str, entries: Sequence[Any], since_ms: int) -> None:
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
                self._sums.setdefault(key, Row(account, model)).add(Row(account, model, 1, *counts))


def with_refusals(rows: Sequence[Row], refused: dict[str, int]) -> list[Row]:
    """Return the rows with each account's refusals in its first row, and with a row for each account that was only
    refused.
    """
    left = {account: count for account, count in refused.items() if count}
    for row in rows:
        row.refused = left.pop(row.account, 0)
    only = [Row(account, "", refused=count) for account, count in left.items()]
    return sorted([*rows, *only], key=order)


def order(row: Row) -> tuple[int, int, int, str, str]:
    """Return a sort key: the highest cost first."""
    return (-row.cost_nusd, -row.requests, -row.refused, row.account, row.model)


COLUMNS = [
    *("account", "model", "requests", "requests_per_minute", "refused"),
    *("prompt_tokens", "completion_tokens", "cost_usd"),
]
CLEAR = "\x1b[H\x1b[2J"  # ECMA-48: cursor home, erase in page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `top`."""
    make_command(parser, top, on_store=True)
    parser.add_argument("--account", metavar="NAME", type=account, help="this account alone (default: every account)")
    parser.add_argument(
        "--minutes", metavar="N", type=minutes, default=5, help="how far to look back, at most 1440 (default: 5)"
    )
    parser.add_argument("--interval", metavar="S", type=count, default=2, help="seconds between refreshes (default: 2)")
    parser.add_argument("--once", action="store_true", help="print one table and exit; --json and pipes do so anyway")


async def top(args: argparse.Namespace, out: Output) -> None:
    """Show requests, refusals, tokens and cost of the last minutes by account and model, the most expensive first.

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
    """Return a row as it is printed."""
    return {**in_usd(asdict(row)), "requests_per_minute": round(row.requests / minutes, 1)}


def heading(rows: Sequence[Row], minutes: int) -> str:
    """Return a line of sums."""
    requests, cost = sum(row.requests for row in rows), format_usd(sum(row.cost_nusd for row in rows))
    refused = sum(row.refused for row in rows)
    return f"last {minutes} min: {requests} requests, {refused} refused, {cost} USD    Ctrl-C ends"
