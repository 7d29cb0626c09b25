"""The scripts against a model of them, step by step, in orders that nobody thought of (Hypothesis).

The scripts are the real ones but for their clock, which is a key of the store, so that time is a step like any other. The model
is the ledger's rules said plainly in Python. After every step the two agree on every number, and the invariants hold.
"""

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import AccountKeys, Denial, Hold, HoldRequest, Settlement
from meshproxy.ledger.store import Script, expand, script_text
from meshproxy.openai.usage import Usage
from meshproxy.policy.principal import Budgets, Limits

CLOCK = """
local now_ms = tonumber(redis.call('GET', 'clock'))
local function whole(number)
  return string.format('%.0f', number + 0)
end
"""
START_MS = 1_764_028_000_000  # 2025-11-24, so that a few days cross into December
KEYS = AccountKeys("acme")
KEY_LIMITS = Limits(requests_per_minute=30, tokens_per_minute=600, burst=4, max_parallel=2)
ACCOUNT_LIMITS = Limits(requests_per_minute=60, tokens_per_minute=900, max_parallel=3)
KEY_BUDGETS = Budgets(total_nusd=7_000, daily_nusd=3_000, monthly_nusd=5_000)
ACCOUNT_BUDGETS = Budgets(total_nusd=12_000, daily_nusd=4_000, monthly_nusd=8_000)
SESSION_BUDGETS = Budgets(total_nusd=3_000, daily_nusd=2_000)
UNIT = 60_000

amounts = st.integers(0, 1_500)
tokens = st.integers(0, 1_200)


def on_the_store_s_clock(name: str) -> Script:
    read = lambda name: CLOCK if name == "clock" else script_text(name)  # noqa: E731
    return Script.of(name, expand(read(name), read))


@dataclass
class Bucket:
    """A bucket in sixty-thousandths, with the most it may ever have given out."""

    rate: int
    size: int
    at_ms: int = START_MS
    level: int = 0
    taken: int = 0

    def __post_init__(self) -> None:
        self.level = self.size * UNIT

    def refill(self, now_ms: int) -> None:
        self.level = min(self.size * UNIT, self.level + (now_ms - self.at_ms) * self.rate)
        self.at_ms = now_ms

    def wait_ms(self, count: int) -> int:
        missing = min(count, self.size) * UNIT - self.level
        return max(0, -(-missing // self.rate))

    def take(self, count: int) -> None:
        self.level = min(self.size * UNIT, self.level - count * UNIT)
        self.taken += count


@dataclass
class Hold:
    request: HoldRequest
    admitted: Hold
    amount: int
    tokens: int
    deadline_ms: int


@dataclass
class Spend:
    total: int = 0
    days: dict[str, int] = field(default_factory=dict)
    months: dict[str, int] = field(default_factory=dict)

    def charge(self, date: str, cost: int) -> None:
        self.total += cost
        self.days[date] = self.days.get(date, 0) + cost
        self.months[date[:7]] = self.months.get(date[:7], 0) + cost

    def room(self, budgets: Budgets, date: str, held: int) -> int:
        pairs = (
            (budgets.total_nusd, self.total),
            (budgets.daily_nusd, self.days.get(date, 0)),
            (budgets.monthly_nusd, self.months.get(date[:7], 0)),
        )
        return min(budget - spent - held for budget, spent in pairs if budget is not None)


class LedgerMachine(RuleBasedStateMachine):
    """One account with two keys and two sessions, in strict mode."""

    dial: Any
    name: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.store = self.run(self.dial(self.name))
        self.ledger = Ledger(self.store)
        for script in ("admit", "renew", "settle", "grant", "balance"):
            setattr(self.ledger, f"_{script}", on_the_store_s_clock(script))
        self.now_ms = START_MS
        self.ids = itertools.count()
        self.balance = self.granted = self.settled = self.overrun = 0
        self.live: dict[str, Hold] = {}
        self.abandoned: dict[str, Hold] = {}
        self.done: list[Settlement] = []
        self.spends = {"key:k1": Spend(), "key:k2": Spend(), "session:s1": Spend(), "session:s2": Spend()}
        self.account_spend = Spend()
        self.requests = {"k1": Bucket(30, 4), "k2": Bucket(30, 4), "account": Bucket(60, 60)}
        self.tokens = {"k1": Bucket(600, 600), "k2": Bucket(600, 600), "account": Bucket(900, 900)}
        self.set_clock(0)

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def set_clock(self, later_ms: int) -> None:
        async def write() -> None:
            await self.store.execute("SET", "clock", self.now_ms)

        self.now_ms += later_ms
        self.run(write())

    def teardown(self) -> None:
        with contextlib.closing(self.runner):
            self.run(self.store.close())

    # what the model knows

    @property
    def date(self) -> str:
        return f"{datetime.fromtimestamp(self.now_ms // 1000, UTC):%Y-%m-%d}"

    def held(self, owner: str | None = None) -> int:
        return sum(hold.amount for hold in self.live.values() if owner is None or owner in owners(hold.request))

    def release(self) -> None:
        for hold_id, hold in list(self.live.items()):
            if hold.deadline_ms <= self.now_ms:
                self.abandoned[hold_id] = self.live.pop(hold_id)

    def room(self, ask: HoldRequest) -> dict[str, int]:
        """Free credit, and the room under each budget."""
        rooms = {"credit": self.balance - self.held()}
        budgets = {"key": ask.budgets, "session": ask.session_budgets}
        for owner in owners(ask):
            scope = owner.partition(":")[0]
            rooms[scope] = self.spends[owner].room(budgets[scope], self.date, self.held(owner))
        rooms["account"] = self.account_spend.room(ask.account_budgets, self.date, self.held())
        return rooms

    def buckets(self, ask: HoldRequest) -> list[tuple[str, Bucket, int]]:
        found = [
            ("key requests", self.requests[ask.key_id], 1),
            ("key tokens", self.tokens[ask.key_id], ask.tokens),
            ("account requests", self.requests["account"], 1),
            ("account tokens", self.tokens["account"], ask.tokens),
        ]
        for _, bucket, _ in found:
            bucket.refill(self.now_ms)
        return found

    def take_tokens(self, ask: HoldRequest, count: int) -> None:
        for _, bucket, _ in self.buckets(ask)[1::2]:
            bucket.take(count)

    def snapshot(self) -> Any:
        return self.run(self.everything())

    async def everything(self) -> dict[bytes, Any]:
        keys = sorted(await self.store.execute("KEYS", "mesh:*"))
        return {key: await self.store.execute("DUMP", key) for key in keys}

    def settle_releases(self) -> None:
        """Let the scripts release what has expired, so that a denial has nothing left to write."""
        self.release()
        self.run(self.ledger.balance("acme"))

    # steps

    @initialize(amount=st.integers(1_000, 20_000))
    def first_grant(self, amount: int) -> None:
        self.grant(amount)

    @rule(amount=st.integers(-200, 3_000))
    def grant(self, amount: int) -> None:
        self.balance += amount
        self.granted += amount
        self.overrun += max(0, -amount)
        assert self.run(self.ledger.grant("acme", amount)).balance_nusd == self.balance

    @rule(later_ms=st.one_of(st.integers(1, 5_000), st.integers(60_000, 90_000_000)))
    def wait(self, later_ms: int) -> None:
        self.set_clock(later_ms)

    @rule(
        key=st.sampled_from(["k1", "k2"]),
        session=st.sampled_from([None, "s1", "s2"]),
        amount=amounts,
        least=st.none() | st.integers(0, 300),
        tokens=tokens,
        ttl_ms=st.integers(1, 20_000),
    )
    def admit(self, key: str, session: str | None, amount: int, least: int | None, tokens: int, ttl_ms: int) -> None:
        ask = HoldRequest(
            hold_id=f"h{next(self.ids)}",
            account="acme",
            key_id=key,
            session=session,
            amount_nusd=amount,
            amount_min_nusd=None if least is None else min(least, amount),
            tokens=tokens,
            ttl_ms=ttl_ms,
            key_limits=KEY_LIMITS,
            account_limits=ACCOUNT_LIMITS,
            budgets=KEY_BUDGETS,
            session_budgets=SESSION_BUDGETS,
            account_budgets=ACCOUNT_BUDGETS,
        )
        self.settle_releases()
        before = self.snapshot()
        answer = self.run(self.ledger.admit(ask))
        expected = self.decide(ask)
        if isinstance(answer, Denial):
            assert (answer.reason, answer.which.split()[0], answer.retry_after_s) == expected
            assert self.snapshot() == before
        else:
            assert answer.amount_nusd == expected
            self.live[ask.hold_id] = Hold(ask, answer, answer.amount_nusd, tokens, self.now_ms + ttl_ms)
            for _, bucket, count in self.buckets(ask):
                bucket.take(count)

    def decide(self, ask: HoldRequest) -> Any:
        least = ask.amount_nusd if ask.amount_min_nusd is None else ask.amount_min_nusd
        rooms = self.room(ask)
        for name in ("credit", "key", "session", "account"):
            if rooms.get(name, least) < least:
                return ("insufficient_credits" if name == "credit" else "spend_limit", name, None)
        wait_ms, which = max(
            ((bucket.wait_ms(count), name) for name, bucket, count in self.buckets(ask)), key=lambda pair: pair[0]
        )
        running = [hold.request.key_id for hold in self.live.values()]
        if wait_ms < 1000 and running.count(ask.key_id) >= KEY_LIMITS.max_parallel:
            return ("rate_limit", "key", 1.0)
        if wait_ms < 1000 and len(running) >= ACCOUNT_LIMITS.max_parallel:
            return ("rate_limit", "account", 1.0)
        if wait_ms > 0:
            return ("rate_limit", which.split()[0], wait_ms / 1000)
        return min(ask.amount_nusd, *rooms.values())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def admit_again(self, data: st.DataObject) -> None:
        hold = self.pick(data, self.live)
        self.settle_releases()
        if hold.request.hold_id in self.live:
            before = self.snapshot()
            assert self.run(self.ledger.admit(hold.request)).amount_nusd == hold.amount
            assert self.snapshot() == before

    @precondition(lambda self: self.live or self.abandoned)
    @rule(
        data=st.data(),
        more=amounts,
        more_tokens=st.integers(0, 300),
        ttl_ms=st.integers(1, 20_000),
        enforce=st.booleans(),
    )
    def renew(self, data: st.DataObject, more: int, more_tokens: int, ttl_ms: int, enforce: bool) -> None:
        hold = self.pick(data, {**self.live, **self.abandoned})
        live = hold.request.hold_id in self.live
        if live:
            hold.deadline_ms = self.now_ms + ttl_ms
        self.release()
        total = hold.amount + more
        expected = self.decide_renewal(hold, total - hold.amount * live, more_tokens * enforce)
        answer = self.run(
            self.ledger.renew(
                hold.admitted,
                amount_nusd=total,
                tokens=hold.tokens + more_tokens,
                ttl_ms=ttl_ms,
                enforce_tokens=enforce,
            )
        )
        if isinstance(answer, Denial):
            assert answer.reason == expected
            return
        assert (expected, answer.amount_nusd) == (None, total)
        self.take_tokens(hold.request, more_tokens)
        hold.amount, hold.tokens, hold.deadline_ms = total, hold.tokens + more_tokens, self.now_ms + ttl_ms
        self.live[hold.request.hold_id] = hold
        self.abandoned.pop(hold.request.hold_id, None)

    def decide_renewal(self, hold: Hold, more: int, enforced_tokens: int) -> str | None:
        rooms = self.room(hold.request)
        for name in ("credit", "key", "session", "account"):
            if more > 0 and rooms.get(name, more) < more:
                return "insufficient_credits" if name == "credit" else "spend_limit"
        waits = [bucket.wait_ms(enforced_tokens) for _, bucket, _ in self.buckets(hold.request)[1::2]]
        return "rate_limit" if enforced_tokens and max(waits) > 0 else None

    @precondition(lambda self: self.live or self.abandoned)
    @rule(data=st.data(), share=st.integers(0, 120), prompt=st.integers(0, 800))
    def settle(self, data: st.DataObject, share: int, prompt: int) -> None:
        hold = self.pick(data, {**self.live, **self.abandoned})
        hold_id, late = hold.request.hold_id, hold.request.hold_id in self.abandoned
        settlement = Settlement(
            hold_id=hold_id,
            request_id=hold_id,
            account="acme",
            key_id=hold.request.key_id,
            session=hold.request.session,
            model="m",
            upstream="u",
            usage=Usage(prompt),
            usage_source="reported",
            outcome="completed",
            cost_nusd=hold.amount * share // 100,
            started_ms=self.now_ms,
        )
        assert self.run(self.ledger.settle(settlement)) is True
        (self.abandoned if late else self.live).pop(hold_id)
        self.balance -= settlement.cost_nusd
        self.settled += settlement.cost_nusd
        self.overrun += settlement.cost_nusd if late else max(0, settlement.cost_nusd - hold.amount)
        if settlement.cost_nusd:
            for owner in owners(hold.request):
                self.spends[owner].charge(self.date, settlement.cost_nusd)
            self.account_spend.charge(self.date, settlement.cost_nusd)
        self.take_tokens(hold.request, prompt - hold.tokens)
        self.done.append(settlement)

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        settlement = data.draw(st.sampled_from(self.done))
        before = self.snapshot()
        assert self.run(self.ledger.settle(settlement)) is False
        assert self.snapshot() == before

    @staticmethod
    def pick(data: st.DataObject, holds: dict[str, Hold]) -> Hold:
        return holds[data.draw(st.sampled_from(sorted(holds)))]

    # what always holds

    @invariant()
    def the_books_agree_with_the_model(self) -> None:
        self.release()
        balance = self.run(self.ledger.balance("acme", "k1", key_limits=KEY_LIMITS, account_limits=ACCOUNT_LIMITS))
        numbers = (balance.balance_nusd, balance.held_nusd, balance.granted_nusd, balance.settled_nusd)
        assert (self.balance, self.held(), self.granted, self.settled) == numbers
        assert balance.granted_nusd == balance.balance_nusd + balance.settled_nusd
        spend = self.spends["key:k1"]
        assert balance.spend.total_nusd == spend.total
        assert balance.spend.day_nusd == spend.days.get(self.date, 0)
        assert balance.spend.month_nusd == spend.months.get(self.date[:7], 0)
        assert balance.account_spend.day_nusd == self.account_spend.days.get(self.date, 0)
        assert balance.account_spend.month_nusd == self.account_spend.months.get(self.date[:7], 0)
        running = [hold.request.key_id for hold in self.live.values()]
        assert (balance.key_running, balance.account_running) == (running.count("k1"), len(running))

    @invariant()
    def no_more_is_held_than_there_is(self) -> None:
        """But for what came out dearer than its hold, was settled after it was abandoned, or was taken back."""
        assert self.balance - self.held() >= -self.overrun

    @invariant()
    def the_holds_add_up(self) -> None:
        holds, held, abandoned = self.run(self.read_holds())
        assert {hold_id.decode(): int(record.split()[0]) for hold_id, record in holds} == {
            hold_id: hold.amount for hold_id, hold in self.live.items()
        }
        assert {owner.decode(): int(amount) for owner, amount in held} == {
            owner: self.held(owner) for owner in self.spends if self.held(owner)
        }
        assert {hold_id.decode() for hold_id, _ in abandoned} == set(self.abandoned)

    async def read_holds(self) -> list[list[tuple[bytes, bytes]]]:
        flat = [await self.store.execute("HGETALL", key) for key in (KEYS.holds, KEYS.held, KEYS.abandoned)]
        return [list(zip(each[::2], each[1::2], strict=True)) for each in flat]

    @invariant()
    def every_settlement_is_one_event(self) -> None:
        async def events() -> list[Any]:
            return await self.store.execute("XRANGE", KEYS.usage, "-", "+")

        fields = [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in self.run(events())]
        settled = [event[b"hold_id"].decode() for event in fields if event[b"event"] == b"settled"]
        assert sorted(settled) == sorted(settlement.hold_id for settlement in self.done)

    @invariant()
    def buckets_are_exact_and_never_give_too_much(self) -> None:
        balance = self.run(self.ledger.balance("acme", "k1", key_limits=KEY_LIMITS, account_limits=ACCOUNT_LIMITS))
        expected = [self.requests["k1"], self.tokens["k1"], self.requests["account"], self.tokens["account"]]
        for bucket, state in zip(expected, balance.buckets, strict=True):
            bucket.refill(self.now_ms)
            assert state.remaining == max(0, bucket.level // UNIT)
            assert round(state.reset_s * 1000) == -(-(bucket.size * UNIT - bucket.level) // bucket.rate)
        for bucket in self.requests.values():
            assert bucket.taken * UNIT <= bucket.size * UNIT + bucket.rate * (self.now_ms - START_MS)


def owners(ask: HoldRequest) -> list[str]:
    return [f"key:{ask.key_id}", *([f"session:{ask.session}"] if ask.session else [])]


@pytest.mark.parametrize(("name", "examples"), [("fakeredis", 20), ("valkey", 60), ("redis", 25)])
def test_the_scripts_keep_the_ledger_s_rules(dial, name, examples):
    machine = type("Machine", (LedgerMachine,), {"dial": staticmethod(dial), "name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
