"""The ledger: credit and buckets in two phases. A request is admitted with a hold, renews it while it runs, and is settled
once, whatever becomes of it. Each step is one script, one round trip, and atomic; docs/ledger.md tells the model.

A denial is a value. What Redis does wrong arrives as the Store's Fault.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from meshproxy.ledger.keyspace import AccountKeys
from meshproxy.ledger.records import (
    NO_BUDGETS,
    NO_LIMITS,
    Admitted,
    Ask,
    Balance,
    BucketState,
    Denied,
    Settlement,
    Spend,
)
from meshproxy.ledger.scripts import Script
from meshproxy.ledger.store import Argument, Store
from meshproxy.money import MAX_NUSD
from meshproxy.policy.principal import Budgets, Limits

USAGE_EVENTS_KEPT = 1_000_000
MAX_KNOWN_ACCOUNTS = 4096  # whose keys are kept ready

_NO_LIMIT = -1
_ADMITTED, _NO_CREDIT, _OVER_BUDGET, _RATE_LIMITED = range(4)  # outcomes of admit.lua and renew.lua; 4 is gone
_BUDGETS = (
    "key total budget",
    "key daily budget",
    "key monthly budget",
    "session total budget",
    "session daily budget",
    "session monthly budget",
)
_BUCKETS = ("key requests", "key tokens", "account requests", "account tokens")


class Ledger:
    """Holds, settlements and balances of every account over one store. `usage_events_kept` bounds each account's usage
    stream, roughly (XADD MAXLEN ~).
    """

    def __init__(self, store: Store, *, usage_events_kept: int = USAGE_EVENTS_KEPT) -> None:
        self._store = store
        self._usage_events_kept = usage_events_kept
        self._admit = Script.load("admit")
        self._renew = Script.load("renew")
        self._settle = Script.load("settle")
        self._grant = Script.load("grant")
        self._balance = Script.load("balance")
        self._known: dict[str, AccountKeys] = {}

    async def admit(self, ask: Ask) -> Admitted | Denied:
        """Hold credit for a request and debit its buckets, or say why not. Safe to repeat with the same hold id."""
        least = ask.amount_nusd if ask.amount_min_nusd is None else ask.amount_min_nusd
        args: list[Argument] = [
            ask.hold_id,
            ask.ttl_ms,
            ask.amount_nusd,
            least,
            int(ask.strict),
            ask.tokens,
            ask.key_id,
            ask.session or "",
            *_rates(ask.key_limits),
            *_rates(ask.account_limits),
            *_amounts(ask.budgets),
            *_session_amounts(ask),
        ]
        reply = await self._store.run(self._admit, _hold_keys(self._names(ask.account), ask), args)
        buckets = _buckets(reply, 5, ask.key_limits, ask.account_limits)
        if reply[0] == _ADMITTED:
            return Admitted(ask, reply[1], reply[2], buckets)
        return _denied(reply, buckets)

    async def renew(
        self,
        hold: Admitted,
        *,
        amount_nusd: int,
        tokens: int | None = None,
        ttl_ms: int | None = None,
        enforce_tokens: bool = False,
    ) -> Admitted | Denied:
        """Raise a hold to a new total of credit and tokens (never lower it), and put its deadline `ttl_ms` from now; None is
        as it was asked for. Denied: it stays as it was, with the new deadline. Tokens are debited into debt unless enforced.
        """
        ask = hold.ask
        args: list[Argument] = [
            ask.hold_id,
            ask.ttl_ms if ttl_ms is None else ttl_ms,
            amount_nusd,
            ask.tokens if tokens is None else tokens,
            int(ask.strict),
            int(enforce_tokens),
            *_amounts(ask.budgets),
            *_session_amounts(ask),
        ]
        reply = await self._store.run(self._renew, _hold_keys(self._names(ask.account), ask), args)
        if reply[0] == _ADMITTED:
            return Admitted(ask, reply[1], reply[2], hold.buckets)
        return _denied(reply, ())

    async def settle(self, settlement: Settlement) -> bool:
        """Charge what a request cost, once. False: settled before, or never admitted; nothing was charged now."""
        return bool(await self._store.run(self._settle, *self._charge(settlement)))

    def settling(self, settlement: Settlement) -> "asyncio.Future[Any]":
        """The same, sent now, for who won't wait; what is truthy was charged now. ScriptMissing: `settle` it."""
        return self._store.call(self._settle, *self._charge(settlement))

    def _charge(self, settlement: Settlement) -> tuple[list[str], list[Argument]]:
        """The keys and arguments of settle.lua."""
        if settlement.cost_nusd < 0:
            raise ValueError(f"{settlement.hold_id}: a cost of {settlement.cost_nusd} nano-USD would be a gift")
        usage = settlement.usage
        args: list[Argument] = [
            settlement.hold_id,
            int(settlement.unheld),
            self._usage_events_kept,
            settlement.cost_nusd,
            settlement.request_id,
            settlement.key_id,
            settlement.account,
            settlement.session or "",
            settlement.model,
            settlement.upstream,
            usage.prompt,
            usage.completion,
            usage.cached,
            usage.cache_write,
            usage.reasoning,
            usage.audio_prompt,
            usage.audio_completion,
            settlement.usage_source,
            settlement.outcome,
            settlement.price,
            settlement.started_ms,
        ]
        return _settlement_keys(self._names(settlement.account), settlement), args

    async def grant(self, account: str, amount_nusd: int, note: str = "") -> int:
        """Grant credit, or take some back with a negative amount; the new balance. ValueError past what a balance may be."""
        keys = self._names(account)
        done, balance = await self._store.run(self._grant, [keys.credit, keys.usage], [amount_nusd, note, MAX_NUSD])
        if not done:
            raise ValueError(f"{account}: a balance of {balance} nano-USD can't be moved by {amount_nusd}")
        return int(balance)

    async def balance(
        self,
        account: str,
        key_id: str | None = None,
        *,
        key_limits: Limits = NO_LIMITS,
        account_limits: Limits = NO_LIMITS,
    ) -> Balance:
        """An account's credit after expired holds are released; with a key, its spend and the state of every bucket."""
        names = self._names(account)
        keys = [*names.books, names.bucket]
        if key_id is not None:
            keys += [names.key_bucket(key_id), names.key_spend(key_id)]
        reply = await self._store.run(self._balance, keys, [*_rates(account_limits), *_rates(key_limits)])
        balance, held, granted, settled, *spend = map(int, reply[:7])
        return Balance(balance, held, granted, settled, Spend(*spend), _buckets(reply, 7, key_limits, account_limits))

    def _names(self, account: str) -> AccountKeys:
        """The account's keys, made once."""
        names = self._known.get(account)
        if names is None:
            if len(self._known) >= MAX_KNOWN_ACCOUNTS:
                self._known.clear()
            names = self._known[account] = AccountKeys(account)
        return names


def _hold_keys(names: AccountKeys, ask: Ask) -> list[str]:
    keys = [*names.books, names.bucket, names.key_bucket(ask.key_id), names.key_spend(ask.key_id)]
    if ask.session is not None:
        keys.append(names.session_spend(ask.session))
    return keys


@lru_cache(48)
def _hour(hours: int) -> str:
    """The hour that is so many hours after the epoch, as keys name it."""
    return time.strftime("%Y-%m-%dT%H", time.gmtime(hours * 3600))


def _settlement_keys(names: AccountKeys, settlement: Settlement) -> list[str]:
    key_id = settlement.key_id
    hour = _hour(settlement.started_ms // 3_600_000)
    keys = [*names.books, names.bucket, names.key_bucket(key_id), names.key_spend(key_id)]
    keys += [names.hour(hour), names.unheld(settlement.hold_id)]
    if settlement.session is not None:
        keys.append(names.session_spend(settlement.session))
    return keys


def _rates(limits: Limits) -> tuple[int, int, int]:
    """Requests a minute, burst and tokens a minute, as scripts want them."""
    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    if requests is None:
        return _NO_LIMIT, _NO_LIMIT, _NO_LIMIT if tokens is None else tokens
    burst = requests if limits.burst is None else limits.burst
    return requests, burst, _NO_LIMIT if tokens is None else tokens


def _amounts(budgets: Budgets) -> tuple[int, int, int]:
    total, daily, monthly = budgets.total_nusd, budgets.daily_nusd, budgets.monthly_nusd
    return (
        _NO_LIMIT if total is None else total,
        _NO_LIMIT if daily is None else daily,
        _NO_LIMIT if monthly is None else monthly,
    )


def _session_amounts(ask: Ask) -> tuple[int, int, int]:
    return _amounts(NO_BUDGETS if ask.session is None else ask.session_budgets)


def _denied(reply: Sequence[int], buckets: tuple[BucketState, ...]) -> Denied:
    outcome, _, available, which, retry_ms = reply[:5]
    if outcome == _NO_CREDIT:
        return Denied("insufficient_credits", "credit", available, None, buckets)
    if outcome == _OVER_BUDGET:
        return Denied("spend_limit", _BUDGETS[which - 1], available, None, buckets)
    if outcome == _RATE_LIMITED:
        return Denied("rate_limit", _BUCKETS[which - 1], available, None if retry_ms < 0 else retry_ms / 1000, buckets)
    return Denied("gone", "hold", available, None, buckets)


def _buckets(reply: Sequence[int], first: int, key: Limits, account: Limits) -> tuple[BucketState, ...]:
    """The states of the buckets that have a limit, from pairs of remaining and ms until full."""
    states = []
    if (limit := key.requests_per_minute) is not None:
        states.append(BucketState("key", "requests", limit, reply[first], reply[first + 1] / 1000))
    if (limit := key.tokens_per_minute) is not None:
        states.append(BucketState("key", "tokens", limit, reply[first + 2], reply[first + 3] / 1000))
    if (limit := account.requests_per_minute) is not None:
        states.append(BucketState("account", "requests", limit, reply[first + 4], reply[first + 5] / 1000))
    if (limit := account.tokens_per_minute) is not None:
        states.append(BucketState("account", "tokens", limit, reply[first + 6], reply[first + 7] / 1000))
    return tuple(states)
