"""Accounts in the ledger: keys to call with, and what was held, settled and spent."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import AccountKeys, Balance
from meshproxy.ledger.store import Store, Unavailable
from meshproxy.policy.principal import Key
from meshproxy.units import parse_usd
from tests.harness.waiting import PATIENCE_S, until

T = TypeVar("T")

_numbers = itertools.count(1)


class Background:
    """An event loop in a thread of its own, for a store or a provider that outlives the loops of single tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, run there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Caller:
    """A key that was made for a test. `auth` is its header."""

    def __init__(self, secret: str, key: Key) -> None:
        self.secret = secret
        self.key = key
        self.account = key.account
        self.auth = {"authorization": f"Bearer {secret}"}


async def usage_events(store: Store, account: str) -> list[dict[str, str]]:
    """An account's usage stream, oldest first."""
    entries = await store.execute("XRANGE", AccountKeys(account).usage, "-", "+")
    events = [[word.decode() for word in flat] for _, flat in entries]
    return [dict(zip(words[::2], words[1::2], strict=True)) for words in events]


class Books:
    """The ledger as an auditor reads it."""

    def __init__(self, store: Store, ledger: Ledger | None = None, directory: Directory | None = None) -> None:
        self.store = store
        self.ledger = ledger or Ledger(store)
        self.directory = directory or Directory(store)

    @classmethod
    async def open(cls, url: str, timeout_s: float = 10) -> "Books":
        return cls(await connect(Redis(url=url, timeout_s=timeout_s)))

    async def close(self) -> None:
        await self.store.close()

    async def key(self, account: str | None = None, credit: str = "25.00", **fields: Any) -> Caller:
        """Mint a key, of a new account unless it is named, and grant the account credit."""
        secret, key = await self.directory.create_key(account or f"account-{next(_numbers)}", **fields)
        if parse_usd(credit):
            await self.ledger.grant(key.account, parse_usd(credit))
        return Caller(secret, key)

    async def events(self, account: str, kind: str | None = None) -> list[dict[str, str]]:
        """What became of an account's holds and grants, or of those that became `kind`, oldest first."""
        return [e for e in await usage_events(self.store, account) if kind is None or e["event"] == kind]

    async def until(self, account: str, condition: Callable[[Balance], bool], timeout_s: float = PATIENCE_S) -> Balance:
        """The balance once it is so. A store that is away is waited for."""
        balance: Balance | None = None

        async def fitting() -> Balance | None:
            nonlocal balance
            with suppress(Unavailable):
                balance = await self.ledger.balance(account)
                return balance if condition(balance) else None
            return None

        try:
            return await until(fitting, f"the balance of {account}", timeout_s)
        except AssertionError as late:
            raise AssertionError(f"{late}: {balance}") from None

    async def balanced(self, account: str, timeout_s: float = PATIENCE_S) -> Balance:
        """The balance once nothing is held; what was granted is either left or spent."""
        balance = await self.until(account, lambda now: now.held_nusd == 0, timeout_s)
        assert balance.granted_nusd == balance.balance_nusd + balance.settled_nusd
        assert await self.store.execute("HLEN", AccountKeys(account).holds) == 0
        return balance

    async def closed(self, account: str, timeout_s: float = PATIENCE_S) -> Balance:
        """As `balanced`; the events must say the same, and no hold may have been settled twice."""
        balance = await self.balanced(account, timeout_s)
        events = await self.events(account)
        settled = [event for event in events if event["event"] == "settled"]
        holds = [event["hold_id"] for event in settled]
        assert len(set(holds)) == len(holds)
        assert balance.settled_nusd == sum(int(event["cost_nusd"]) for event in settled)
        assert balance.granted_nusd == sum(int(event["amount_nusd"]) for event in events if event["event"] == "grant")
        return balance

    async def settled(self, account: str, count: int) -> list[dict[str, str]]:
        """An account's settlements once there are so many; the books are closed then."""

        async def enough() -> list[dict[str, str]] | None:
            found = await self.events(account, "settled")
            return found if len(found) >= count else None

        found = await until(enough, f"{count} settlements")
        await self.closed(account)
        return found
