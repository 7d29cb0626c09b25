"""Usage reports: the aggregates and the events that settlements write, summed and looked up.

An aggregate is a hash for each account and hour (UTC, of a request's start), with fields `KEY US MODEL US SESSION US
METRIC` (US: the byte 0x1f). The session `~` holds the requests after an hour reached its bound on fields. Hours are kept
for HOURS_KEPT. A month's hash stays and has the same fields, all with the session `~`. index.lua describes the index of
an account's hours.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache, partial
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from meshproxy.errors import GatewayError, Source, invalid
from meshproxy.ledger.records import AccountKeys
from meshproxy.ledger.store import Script, Store, batches, pairs
from meshproxy.units import format_usd, in_usd, rfc3339

MAX_EVENTS = 1000  # asked for, or read, in one round trip
EVENT_DAYS = 8  # for which a request is found by its id (settle.lua, REQUESTS_KEPT_S)
BATCH_ACCOUNTS = 100  # searched in one round trip
GROUPS = ("session_id", "model", "key", "day")
GROUP_ALIASES = {"session": "session_id", "model": "model", "key": "key", "day": "day"}
INDEXED_AT_ONCE = 500  # accounts of a report whose index of hours is read in parallel
REPORTED_AT_ONCE = 16  # accounts of a report that are read in parallel
HOURS_KEPT = timedelta(days=90)  # settle.lua, HOUR_KEPT_S
MAX_SPAN = timedelta(days=3660)
MAX_FIELDS = 1_000_000  # that one report sums
BATCH_FIELDS = 50_000  # that are read in one round trip, if they are of several hours
SLICE = 500  # fields summed between two turns of the event loop, about a millisecond

_SIZES = cache(partial(Script.load, "sizes"))
_INDEX_HOURS = cache(partial(Script.load, "index_hours"))

_MARK = ord("1")
Group = tuple[str | None, str | None, str | None, str | None]  # values in the order of GROUPS; None: not grouped by


class UsageRow(Struct):
    """The sums of one group. A field that isn't grouped by is None, and so is the session of requests without one."""

    session_id: str | None = None
    model: str | None = None
    key: str | None = None
    day: str | None = None
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    audio_prompt_tokens: int = 0
    audio_completion_tokens: int = 0
    cost_nusd: int = 0


NUMERIC_FIELDS = tuple(name for name in in_usd(asdict(UsageRow())) if name not in GROUPS)  # of a report's row

# From an aggregate's metric, named without its unit, to the row's field.
_METRICS = {name.rpartition("_")[0] or name: name for name in UsageRow.__struct_fields__ if name not in GROUPS}


async def report(
    store: Store,
    accounts: Callable[[], Awaitable[Sequence[str]]],
    *,
    group_by: Sequence[str],
    session_id: str | None,
    since: float,
    until: float,
    now: float,
    on_progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Return the sums of several accounts as they are shown, by account and group. Times are Unix seconds.

    `on_progress` is called with how many accounts are read, of how many. Raises GatewayError as `usage` does.
    """
    moment = datetime.fromtimestamp(now, UTC)
    period = ReportPeriod.of(datetime.fromtimestamp(since, UTC), datetime.fromtimestamp(until, UTC), moment, group_by)
    names = await accounts()
    rows: list[dict[str, Any]] = []
    for number, indexed in enumerate(batches(names, INDEXED_AT_ONCE)):
        on_progress(number * INDEXED_AT_ONCE, len(names))
        hours = dict(zip(indexed, await hours_of(store, indexed, period, moment), strict=True))
        for batch in batches(indexed, REPORTED_AT_ONCE):
            reports = await asyncio.gather(
                *(sum_usage(store, name, hours[name], period, group_by, session_id) for name in batch)
            )
            for name, account_events in zip(batch, reports, strict=True):
                rows += [{"account": name, **shown_row(row, group_by)} for row in account_events]
        if len(rows) > MAX_FIELDS:
            message = "There is too much in this report: name an account."
            raise GatewayError(Source.CLIENT, invalid(message, param="account", place="query"))
    return rows


async def usage(
    store: Store,
    account: str,
    *,
    group_by: Sequence[str] = (),
    session_id: str | None = None,
    since: datetime,
    until: datetime,
    now: datetime,
) -> list[UsageRow]:
    """Sum every hour that `since` to `until` touches, ordered by day, session, model and key as far as grouped by.

    If `since` is older than the hours that are kept, the months before the first whole month of hours are summed from the
    monthly aggregates: every month that `since` to `until` touches. Their `day` is the month (`2026-05`) and their session
    `~`. Naive times are UTC. Raises GatewayError `validation_error` for an unknown group, a span that is negative or
    longer than MAX_SPAN, and a report with too many fields.
    """
    period = ReportPeriod.of(since, until, now, group_by)
    (hours,) = await hours_of(store, [account], period, now)
    return await sum_usage(store, account, hours, period, group_by, session_id)


async def sum_usage(
    store: Store,
    account: str,
    hours: Sequence[str],
    period: "ReportPeriod",
    group_by: Sequence[str],
    session_id: str | None,
) -> list[UsageRow]:
    """Sum an account's months of a period and these hours of it (see `hours_of`)."""
    names = AccountKeys(account)
    keys = {month: names.month(month) for month in period.months}
    keys |= {hour: names.hour(hour) for hour in hours}
    if not keys:
        return []
    rows: dict[Group, UsageRow] = {}
    sizes = await store.run(_SIZES(), list(keys.values()), [])
    if sum(sizes) > MAX_FIELDS:
        raise _invalid("There is too much in `since` to `until`: ask for a shorter time.", "since")
    for batch in _batches(dict(zip(keys, sizes, strict=True))):
        replies = await asyncio.gather(*(store.execute("HGETALL", keys[name]) for name in batch))
        for name, flat in zip(batch, replies, strict=True):
            await _add(rows, name[:10], flat, group_by, session_id)
    return sorted(rows.values(), key=_sort_key)


class ReportPeriod(Struct, frozen=True):
    """The aggregates of a time: whole months (`2026-05`), and hours (`2026-11-24T09`) from `first_hour` to before `end_hour`."""

    months: tuple[str, ...]
    first_hour: str
    end_hour: str

    @classmethod
    def of(cls, since: datetime, until: datetime, now: datetime, group_by: Sequence[str] = ()) -> "ReportPeriod":
        """Return what to read. Raises as `usage` does."""
        unknown = [name for name in group_by if name not in GROUPS]
        if unknown:
            raise _invalid(f"`group_by` takes {', '.join(GROUPS)}, not `{unknown[0][:64]}`.", "group_by")
        start, end = _utc(since), _utc(until)
        if end < start:
            raise _invalid("`since` is after `until`.", "since")
        if end - start > MAX_SPAN:
            raise _invalid(f"`since` to `until` spans more than {MAX_SPAN.days} days.", "since")
        kept_from = _utc(now) - HOURS_KEPT
        first = start
        months: list[str] = []
        if start < kept_from:
            first = _next_month(kept_from)
            month = start.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
            while month < min(end, first):
                months.append(f"{month:%Y-%m}")
                month = _next_month(month)
        last = end if end == _hour(end) else end + timedelta(hours=1)
        return cls(tuple(months), f"{first:%Y-%m-%dT%H}", f"{last:%Y-%m-%dT%H}")

    def hours_among(self, days: Mapping[bytes, bytes]) -> Iterator[str]:
        """Yield the period's hours that an index has: by day, 24 digits."""
        for name, marks in days.items():
            day = name.decode()
            if self.first_hour[:10] <= day <= self.end_hour[:10]:
                hours = (f"{day}T{hour:02}" for hour, mark in enumerate(marks) if mark == _MARK)
                yield from (hour for hour in hours if self.first_hour <= hour < self.end_hour)


def _next_month(moment: datetime) -> datetime:
    """Return the first moment of the month after this one's."""
    first = moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=31)).replace(day=1)


async def hours_of(store: Store, accounts: Sequence[str], period: ReportPeriod, now: datetime) -> list[list[str]]:
    """Return the hours of a period for which each account has aggregates, some of which may have expired.

    An index that isn't complete is completed from all hours that may exist since the period's first: once after an
    upgrade, and again if an older version has settled since.
    """
    names = [AccountKeys(account) for account in accounts]
    replies = await asyncio.gather(
        *(store.execute("HGETALL", keys.hours) for keys in names),
        *(store.execute("HGET", keys.credit, "settled") for keys in names),
    )
    hours: list[list[str]] = []
    for keys, flat, settled in zip(names, replies[: len(names)], replies[len(names) :], strict=True):
        days = dict(pairs(flat))
        covered, first = days.pop(b"nusd", None), days.pop(b"from", b"").decode()
        if covered == (settled or b"0") and first <= period.first_hour:
            hours.append(list(period.hours_among(days)))
            continue
        possible = _hours_between(period.first_hour, f"{_utc(now) + timedelta(days=1):%Y-%m-%dT%H}")
        scanned = [keys.hours, keys.credit, *map(keys.hour, possible)]
        existing = map(bytes.decode, await store.run(_INDEX_HOURS(), scanned, [period.first_hour]))
        hours.append([hour for hour in existing if hour < period.end_hour])
    return hours


class UsageEvent(Struct, frozen=True):
    """What one request used and cost, and why it ended. `hold` is `live`, `abandoned` (settled late) or `none`.

    A request that got an error has its `code` and the last upstream's HTTP status (0: no answer).
    """

    request_id: str
    account: str
    key_id: str
    session_id: str | None
    model: str
    upstream: str
    attempts: int
    outcome: str
    usage_source: str
    hold: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    audio_prompt_tokens: int
    audio_completion_tokens: int
    cost_nusd: int
    price: str
    started_ms: int
    settled_ms: int
    code: str | None = None
    upstream_status: int | None = None


async def events(store: Store, account: str, request_ids: Sequence[str], now: datetime) -> list[UsageEvent]:
    """Return the settled requests of an account among `request_ids`, in their order.

    Requests of the last EVENT_DAYS are found while the usage stream has them. A request is found as soon as it is
    settled, whether it succeeded or failed. `now` gives the current day.
    """
    names = AccountKeys(account)
    days = [names.requests(f"{_utc(now) - timedelta(days=age):%Y-%m-%d}") for age in range(-1, EVENT_DAYS)]
    replies = await asyncio.gather(*(store.execute("HMGET", day, *request_ids) for day in days)) if request_ids else []
    places = [next((place for place in of_days if place is not None), None) for of_days in zip(*replies, strict=True)]
    entries = await asyncio.gather(
        *(store.execute("XRANGE", names.usage, place, place) for place in places if place is not None)
    )
    return [_event(entry[0][1]) for entry in entries if entry]


async def latest_usage_events(store: Store, account: str, since: datetime, limit: int) -> list[UsageEvent]:
    """Return an account's settled requests since `since`, newest first, at most `limit`."""
    latest: list[UsageEvent] = []
    start, end = str(int(_utc(since).timestamp() * 1000)), "+"
    while len(latest) < limit:
        entries = await store.execute("XREVRANGE", AccountKeys(account).usage, end, start, "COUNT", MAX_EVENTS)
        latest += [_event(flat) for _, flat in entries if flat[1] == b"settled"]
        if len(entries) < MAX_EVENTS:
            break
        end = f"({entries[-1][0].decode()}"
    return latest[:limit]


async def find_usage_event(store: Store, accounts: Sequence[str], request_id: str, now: datetime) -> UsageEvent | None:
    """Find a request's event in any of these accounts."""
    for batch in batches(accounts, BATCH_ACCOUNTS):
        for account_events in await asyncio.gather(*(events(store, account, [request_id], now) for account in batch)):
            if account_events:
                return account_events[0]
    return None


def shown_event(event: UsageEvent) -> dict[str, Any]:
    """Return a settled request as it is shown to operators."""
    fields = in_usd(asdict(event))
    started_ms, settled_ms = fields.pop("started_ms"), fields.pop("settled_ms")
    fields["price"] = shown_price(msgspec.json.decode(fields["price"] or "{}"))
    return {
        **fields,
        "started_at": rfc3339(started_ms / 1000),
        "settled_at": rfc3339(settled_ms / 1000),
        "duration_ms": settled_ms - started_ms,
    }


def shown_price(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored price in USD, under the names of the configuration's keys."""
    price: dict[str, Any] = {}
    for name, value in stored.items():
        match name:
            case "request":
                price["request_usd"] = format_usd(value)
            case "markup":
                price["markup"] = format_usd(value)  # a factor, in billionths
            case "tiers":
                price["price_tiers"] = [{"above_prompt_tokens": above, **shown_price(tier)} for above, tier in value]
            case _:
                price[f"{'cached_input' if name == 'cached' else name}_usd_per_mtok"] = format_usd(value)
    return price


def _event(flat: Sequence[bytes]) -> UsageEvent:
    fields = {name.decode(): value.decode() for name, value in pairs(flat)}
    renamed = {"key_id": fields["key"], "session_id": fields["session"] or None}
    return msgspec.convert({"attempts": 0, **fields, **renamed}, UsageEvent, strict=False)


async def _add(
    rows: dict[Group, UsageRow],
    day: str,
    flat: list[bytes],
    group_by: Sequence[str],
    session_id: str | None,
) -> None:
    """Add one hour's hash to the rows of its groups."""
    for at in range(0, len(flat), 2):
        if at % (2 * SLICE) == 0:
            await asyncio.sleep(0)
        key, model, rest = flat[at].decode().split("\x1f", 2)
        session, _, metric = rest.rpartition("\x1f")
        name = _METRICS.get(metric)
        if name is None or (session_id is not None and session != session_id):
            continue
        group = (
            (session or None) if "session_id" in group_by else None,
            model if "model" in group_by else None,
            key if "key" in group_by else None,
            day if "day" in group_by else None,
        )
        row = rows.get(group)
        if row is None:
            row = rows[group] = UsageRow(*group)
        setattr(row, name, getattr(row, name) + int(flat[at + 1]))


def _hour(moment: datetime) -> datetime:
    """Return the beginning of the hour."""
    return moment.replace(minute=0, second=0, microsecond=0)


@lru_cache(8)
def _hours_between(first: str, end: str) -> tuple[str, ...]:
    """Return the names of the hours from `first` to before `end`. Cached, because accounts share them."""
    start, stop = (datetime.strptime(name, "%Y-%m-%dT%H").replace(tzinfo=UTC) for name in (first, end))
    names: list[str] = []
    for day in range((stop - start) // timedelta(days=1) + 2):
        date = f"{start + timedelta(days=day):%Y-%m-%dT}"
        names += [f"{date}{hour:02}" for hour in range(24)]
    return tuple(names[start.hour : start.hour + max(0, (stop - start) // timedelta(hours=1))])


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the non-empty hours in batches that may be read in one round trip."""
    batch: list[str] = []
    fields = 0
    for hour, size in sizes.items():
        if batch and fields + size > BATCH_FIELDS:
            yield batch
            batch, fields = [], 0
        if size:
            batch.append(hour)
            fields += size
    yield batch


def shown_row(row: UsageRow, group_by: Sequence[str]) -> dict[str, Any]:
    """Return a report's row as it is shown: with amounts in USD, and of the groups only those that it is grouped by."""
    return in_usd({name: value for name, value in asdict(row).items() if name not in GROUPS or name in group_by})


def _sort_key(row: UsageRow) -> tuple[str, ...]:
    return (row.day or "", row.session_id or "", row.model or "", row.key or "")


def _invalid(message: str, param: str) -> GatewayError:
    return GatewayError(Source.CLIENT, invalid(message, param=param, place="query"))
