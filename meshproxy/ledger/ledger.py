"""Credit and token buckets in two phases: a hold at admission, and one settlement, however the request ends.

A hold is renewed while its request runs. Each step is one atomic script and one round trip. docs/ledger.md describes
the model.

A denial is a value. Errors of Redis are raised as the Store's Unavailable and StoreError.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from meshproxy.ledger.records import (
    ACCOUNTS,
    NO_BUDGETS,
    NO_LIMITS,
    Balance,
    BucketState,
    Denial,
    Grant,
    Granted,
    Hold,
    HoldRequest,
    KeyUse,
    Settlement,
    Spend,
    account_keys,
    hold_keys,
    settlement_keys,
)
from meshproxy.ledger.store import Argument, Packed, Script, Store, Unavailable, batches, pack, pairs
from meshproxy.policy.principal import Account, Budgets, Limits
from meshproxy.units import MAX_NUSD

USAGE_EVENTS_KEPT = 1_000_000
MAX_GRANTS_READ = 1000
MAX_REFUSED_ACCOUNTS = 4096  # whose refusals one worker counts between two writes
NOTE_REFUSALS_S = 1.0
REFUSED_KEPT_S = 86_400
BATCH_KEYS = 500  # keys whose commands share one write
MAX_KNOWN_LIMITS = 1024  # different limits and budgets, whose arguments to scripts are cached

_NO_LIMIT = -1
_PAST_MOST, _GRANTED, _GRANTED_BEFORE, _OTHER_AMOUNT = range(4)  # outcomes of grant.lua
_ADMITTED, _NO_CREDIT, _OVER_BUDGET, _RATE_LIMITED = range(
    4
)  # outcomes of admit.lua and renew.lua; renew.lua adds 4: gone
_BUDGETS = tuple(
    f"{scope} {period} budget" for scope in ("key", "session", "account") for period in ("total", "daily", "monthly")
)
LIMITS = (
    "key requests",
    "key tokens",
    "account requests",
    "account tokens",
    "key requests per day",
    "account requests per day",
    "key parallel requests",
    "account parallel requests",
)  # names of limits in a rate_limit denial, in the order of admit.lua


class RefTaken(ValueError):
    """Another amount was granted under the same ref."""


class Ledger:
    """Holds, settlements, grants and balances of all accounts in one store.

    `usage_events_kept` bounds each account's usage stream approximately (XADD MAXLEN ~).
    """

    def __init__(self, store: Store, *, usage_events_kept: int = USAGE_EVENTS_KEPT) -> None:
        self._store = store
        self._usage_events_kept = usage_events_kept
        self._admit = Script.load("admit")
        self._renew = Script.load("renew")
        self._settle = Script.load("settle")
        self._grant = Script.load("grant")
        self._balance = Script.load("balance")
        self._refused: Counter[str] = Counter()  # by account, since the last write to Redis

    async def admit(self, request: HoldRequest) -> Hold | Denial:
        """Hold credit for a request and debit its buckets, or return the denial. Safe to repeat with its hold id."""
        least = request.amount_nusd if request.amount_min_nusd is None else request.amount_min_nusd
        args: list[Argument] = [
            request.hold_id,
            request.ttl_ms,
            request.amount_nusd,
            least,
            int(request.strict),
            request.tokens,
            request.key_id,
            request.session or "",
        ]
        head = hold_keys(request.account, request.key_id, request.session)
        tail = _limits(
            request.key_limits,
            request.account_limits,
            request.budgets,
            NO_BUDGETS if request.session is None else request.session_budgets,
            request.account_budgets,
            request.share_percent,
        )
        reply = await self._store.run(self._admit, (), args, head=head, tail=tail)
        buckets = _buckets(reply, 8, request.key_limits, request.account_limits)
        if reply[0] == _ADMITTED:
            return Hold(request, reply[1], reply[2], buckets)
        if request.account in self._refused or len(self._refused) < MAX_REFUSED_ACCOUNTS:
            self._refused[request.account] += 1
        return _denied(reply, buckets)

    async def renew(
        self,
        hold: Hold,
        *,
        amount_nusd: int,
        tokens: int | None = None,
        ttl_ms: int | None = None,
        enforce_tokens: bool = False,
    ) -> Hold | Denial:
        """Raise a hold to a new total of credit and tokens, and set its deadline to `ttl_ms` from now.

        None keeps the value of the hold request. A hold is never lowered. A denied hold keeps its amount and gets the
        new deadline. Tokens beyond a bucket's level become its debt, unless `enforce_tokens` denies them.
        """
        request = hold.request
        args: list[Argument] = [
            request.hold_id,
            request.ttl_ms if ttl_ms is None else ttl_ms,
            amount_nusd,
            request.tokens if tokens is None else tokens,
            int(request.strict),
            int(enforce_tokens),
            *_amounts(request.budgets),
            *_amounts(NO_BUDGETS if request.session is None else request.session_budgets),
            *_amounts(request.account_budgets),
        ]
        head = hold_keys(request.account, request.key_id, request.session)
        reply = await self._store.run(self._renew, (), args, head=head)
        if reply[0] == _ADMITTED:
            return Hold(request, reply[1], reply[2], hold.buckets)
        return _denied(reply, ())

    async def settle(self, settlement: Settlement) -> bool:
        """Charge a request's cost once. False: nothing was charged, it was settled before or never admitted."""
        return bool(await self.send_settlement(settlement))

    def send_settlement(self, settlement: Settlement) -> "asyncio.Future[Any]":
        """Send the settlement now and return the future of its reply, for a caller that doesn't wait.

        A truthy reply means that it was charged now.
        """
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
            settlement.attempts,
            usage.cache_write_1h,
            0 if settlement.replay is None else settlement.replay_ttl_ms,
            settlement.code,
            settlement.upstream_status,
        ]
        if settlement.budgets != NO_BUDGETS or settlement.account_budgets != NO_BUDGETS:
            args += [*_amounts(settlement.budgets), *_amounts(settlement.account_budgets)]
        hour = _hour(settlement.started_ms // 3_600_000)
        head = settlement_keys(settlement.account, settlement.key_id, hour)
        names = account_keys(settlement.account)
        keys = [names.unheld + settlement.hold_id]
        if settlement.session:
            keys.append(names.session_spend(settlement.session))
        if settlement.replay is not None:
            keys.append(settlement.replay)
        return self._store.run(self._settle, keys, args, head=head)

    async def grant(self, account: str, amount_nusd: int, note: str = "", *, ref: str = "", actor: str = "") -> Granted:
        """Grant credit, or take credit back with a negative amount, once for each `ref`.

        `actor` is recorded as who did it.

        Raises ValueError if the balance would exceed MAX_NUSD, and RefTaken if another amount was granted under `ref`.
        """
        names = account_keys(account)
        await self._store.execute("SADD", ACCOUNTS, account)
        keys = [names.credit, names.usage, names.spend, names.grants, names.grant_refs]
        outcome, balance = await self._store.run(self._grant, keys, [amount_nusd, note, MAX_NUSD, ref, actor])
        if outcome == _PAST_MOST:
            raise ValueError(f"{account}: a balance of {balance} nano-USD can't be moved by {amount_nusd}")
        if outcome == _OTHER_AMOUNT:
            raise RefTaken(f"{account}: another amount was granted under the ref {ref!r}")
        return Granted(balance, is_new=outcome == _GRANTED)

    async def grants(self, account: str, limit: int = MAX_GRANTS_READ) -> list[Grant]:
        """Return the latest grants of an account, newest first. Grants of versions that kept no history are missing."""
        entries = await self._store.execute("XREVRANGE", account_keys(account).grants, "+", "-", "COUNT", limit)
        return [
            Grant(
                int(fields[b"amount_nusd"]),
                int(fields[b"balance_nusd"]),
                fields[b"note"].decode(),
                fields[b"ref"].decode(),
                fields[b"actor"].decode(),
                int(fields[b"granted_ms"]),
            )
            for fields in (dict(pairs(flat)) for _, flat in entries)
        ]

    async def balance(
        self,
        account: str,
        key_id: str | None = None,
        *,
        key_limits: Limits = NO_LIMITS,
        account_limits: Limits = NO_LIMITS,
    ) -> Balance:
        """Release expired holds and return an account's credit and spend.

        With a key, the result also has the key's spend and all buckets.
        """
        names = account_keys(account)
        keys = names.script_keys if key_id is None else (*names.script_keys, *names.script_keys_of_key(key_id))
        reply = await self._store.run(self._balance, keys, [*_rates(account_limits), *_rates(key_limits)])
        numbers = list(map(int, reply[:12]))
        balance, held, granted, settled = numbers[:4]
        return Balance(
            balance,
            held,
            granted,
            settled,
            Spend(*numbers[6:9]),
            _buckets(reply, 12, key_limits, account_limits),
            Spend(settled, *numbers[4:6]),
            *numbers[9:],
        )

    async def note_refusals(self) -> None:
        """Write this process's counts of refused requests to Redis each second, until cancelled.

        A refusal itself writes nothing. Counts that Redis can't take are dropped.
        """
        while True:
            await asyncio.sleep(NOTE_REFUSALS_S)
            refused, self._refused = self._refused, Counter()
            minute = int(time.time()) // 60
            for account, count in refused.items():
                key = account_keys(account).refused(_hour(minute // 60))
                with contextlib.suppress(Unavailable):
                    await asyncio.gather(
                        self._store.execute("HINCRBY", key, minute % 60, count),
                        self._store.execute("EXPIRE", key, REFUSED_KEPT_S),
                    )

    async def refusals(self, accounts: Sequence[str], minutes: int) -> list[int]:
        """Count each account's requests that the ledger refused (402, 429) in the last `minutes`, at most a day."""
        now = int(time.time()) // 60
        first = now - min(minutes, REFUSED_KEPT_S // 60) + 1
        hours = range(first // 60, now // 60 + 1)
        found: list[int] = []
        for batch in batches([account_keys(account) for account in accounts], BATCH_KEYS):
            replies = await asyncio.gather(
                *(self._store.execute("HGETALL", names.refused(_hour(hour))) for names in batch for hour in hours)
            )
            for place in range(len(batch)):
                of_account = replies[place * len(hours) : (place + 1) * len(hours)]
                found.append(
                    sum(_counts_since(first, hour, flat) for hour, flat in zip(hours, of_account, strict=True))
                )
        return found

    async def key_spends(self, account: str, key_ids: Sequence[str]) -> list[KeyUse]:
        """Return the spend and the time of last use of an account's keys, in the order of `key_ids`."""
        names = account_keys(account)
        seconds, _ = await self._store.execute("TIME")
        day = time.strftime("%Y-%m-%d", time.gmtime(int(seconds)))
        fields = ("total", f"day:{day}", f"month:{day[:7]}", "used_ms")
        uses: list[KeyUse] = []
        for batch in batches(key_ids, BATCH_KEYS):
            spends = (self._store.execute("HMGET", names.key_spend(key_id), *fields) for key_id in batch)
            for found in await asyncio.gather(*spends):
                *spent, used_ms = (int(value or 0) for value in found)
                uses.append(KeyUse(Spend(*spent), used_ms))
        return uses

    async def account_balances(self, accounts: Sequence[str]) -> dict[str, int]:
        """Return the balance of each account in nano-USD, with its holds: one field read, cheap enough for each few seconds."""
        found: dict[str, int] = {}
        for batch in batches(accounts, BATCH_KEYS):
            replies = await asyncio.gather(
                *(self._store.execute("HGET", account_keys(account).credit, "balance") for account in batch)
            )
            found |= {account: int(reply or 0) for account, reply in zip(batch, replies, strict=True)}
        return found

    async def balances(self, accounts: Sequence[str]) -> list[Balance]:
        """Return the balances of accounts, in their order."""
        found: list[Balance] = []
        for batch in batches(accounts, BATCH_KEYS):
            found += await asyncio.gather(*map(self.balance, batch))
        return found

    async def budget_shares(self, accounts: Sequence[Account]) -> dict[tuple[str, str], float]:
        """Return how much of their budgets accounts have spent, by account and budget."""
        budgeted = [account for account in accounts if account.budgets != NO_BUDGETS]
        shares: dict[tuple[str, str], float] = {}
        for account, balance in zip(budgeted, await self.balances([each.name for each in budgeted]), strict=True):
            budgets, spend = account.budgets, balance.account_spend
            for budget, most, spent in (
                ("total", budgets.total_nusd, spend.total_nusd),
                ("daily", budgets.daily_nusd, spend.day_nusd),
                ("monthly", budgets.monthly_nusd, spend.month_nusd),
            ):
                if most is not None:
                    shares[account.name, budget] = spent / max(most, 1)
        return shares


@lru_cache(48)
def _hour(hours: int) -> str:
    """Format an hour, given as hours since the epoch, as key names spell it."""
    return time.strftime("%Y-%m-%dT%H", time.gmtime(hours * 3600))


def _counts_since(first: int, hour: int, flat: Sequence[bytes]) -> int:
    """Sum an hour's counts by minute, from the minute `first` (since the epoch) on."""
    return sum(int(count) for minute, count in pairs(flat) if hour * 60 + int(minute) >= first)


@lru_cache(MAX_KNOWN_LIMITS)
def _rates(limits: Limits) -> tuple[str, ...]:
    """Return requests per minute, burst, tokens per minute, requests per day and parallel requests, for scripts."""
    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    return _texts(requests, limits.request_bucket, tokens, limits.requests_per_day, limits.max_parallel)


@lru_cache(MAX_KNOWN_LIMITS)
def _amounts(budgets: Budgets) -> tuple[str, ...]:
    """Return the budgets in total, of a day and of a month, for scripts."""
    return _texts(budgets.total_nusd, budgets.daily_nusd, budgets.monthly_nusd)


@lru_cache(MAX_KNOWN_LIMITS)
def _limits(
    key: Limits,
    account: Limits,
    budgets: Budgets,
    session_budgets: Budgets,
    account_budgets: Budgets,
    share_percent: int,
) -> Packed:
    """Return the arguments of admit.lua from the key's limits on, packed."""
    amounts = (*_amounts(budgets), *_amounts(session_budgets), *_amounts(account_budgets))
    return pack(*_rates(key), *_rates(account), *amounts, str(share_percent))


def _texts(*limits: int | None) -> tuple[str, ...]:
    return tuple(str(_NO_LIMIT if limit is None else limit) for limit in limits)


def _denied(reply: Sequence[int], buckets: tuple[BucketState, ...]) -> Denial:
    outcome, _, available, which, retry_ms, budget, spent, needed = reply[:8]
    if outcome == _NO_CREDIT:
        return Denial("insufficient_credits", "credit", available, buckets=buckets, needed_nusd=needed)
    if outcome == _OVER_BUDGET:
        return Denial(
            "spend_limit",
            _BUDGETS[which - 1],
            available,
            buckets=buckets,
            needed_nusd=needed,
            budget_nusd=budget,
            spent_nusd=spent,
        )
    if outcome == _RATE_LIMITED:
        return Denial("rate_limit", LIMITS[which - 1], available, None if retry_ms < 0 else retry_ms / 1000, buckets)
    return Denial("gone", "hold", available, buckets=buckets)


def _buckets(reply: Sequence[int], first: int, key: Limits, account: Limits) -> tuple[BucketState, ...]:
    """Return the states of the buckets that have a limit, from pairs of remaining and ms until full."""
    states = []
    if (limit := key.requests_per_minute) is not None:
        states.append(BucketState("key", "requests", limit, reply[first], reply[first + 1] / 1000))
    if (limit := key.tokens_per_minute) is not None:
        states.append(BucketState("key", "tokens", limit, reply[first + 2], reply[first + 3] / 1000))
    if (limit := account.requests_per_minute) is not None:
        states.append(BucketState("account", "requests", limit, reply[first + 4], reply[first + 5] / 1000))
    if (limit := account.tokens_per_minute) is not None:
        states.append(BucketState("account", "tokens", limit, reply[first + 6], reply[first + 7] / 1000))
    if (limit := key.requests_per_day) is not None:
        states.append(BucketState("key", "requests", limit, reply[first + 8], reply[first + 9] / 1000, "day"))
    if (limit := account.requests_per_day) is not None:
        states.append(BucketState("account", "requests", limit, reply[first + 10], reply[first + 11] / 1000, "day"))
    return tuple(states)
