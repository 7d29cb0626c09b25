"""Money and times: integers of nano-USD and Unix seconds inside, decimal strings and RFC 3339 at the edges.

No amount is ever a float.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

NUSD_PER_USD = 1_000_000_000
# The largest integer that a Lua number in Redis, and every reader of JSON (RFC 8259, section 6), holds exactly.
MAX_EXACT_INT = 2**53 - 1
MAX_NUSD = 9_000_000 * NUSD_PER_USD  # below MAX_EXACT_INT

_DECIMAL = re.compile(r"(-?)(\d{1,12})(?:\.(\d{1,9}))?", re.ASCII)


def parse_usd(text: str) -> int:
    """Parse a decimal string in USD, such as `25.00`, into nano-USD.

    Raises ValueError for anything else, an exponent or a `+` included, and above MAX_NUSD.
    """
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a decimal amount in USD with at most 9 decimals")
    sign, whole, fraction = match.groups()
    amount = int(whole) * NUSD_PER_USD + int((fraction or "").ljust(9, "0"))
    if amount > MAX_NUSD:
        raise ValueError(f"{text!r} is more than {MAX_NUSD // NUSD_PER_USD} USD")
    return -amount if sign else amount


@lru_cache(1024)
def format_usd(amount_nusd: int) -> str:
    """Format nano-USD as a decimal string in USD: at least two decimals, at most nine, no trailing zeros past two."""
    whole, fraction = divmod(abs(amount_nusd), NUSD_PER_USD)
    digits = f"{fraction:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount_nusd < 0 else ''}{whole}.{digits}"


def in_usd(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's fields for display: each amount `X_nusd` becomes `X_usd`, a decimal string or None."""
    amounts = {name: amount for name, amount in fields.items() if name.endswith("_nusd")}
    formatted = {name: None if amount is None else format_usd(amount) for name, amount in amounts.items()}
    return {name.replace("_nusd", "_usd"): formatted.get(name, value) for name, value in fields.items()}


DAY_S = 86_400
MAX_DOUBLINGS = 16
YEAR_10000_S = 253_402_300_800  # in Unix time: RFC 3339 has years of four digits

_SPAN = re.compile(r"(\d{1,6})([smhdw])", re.ASCII)
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}
_DATE_CHARS = len("2026-11-24")


def rfc3339(moment: float | None, timespec: str = "seconds") -> str | None:
    """Format Unix seconds as `2026-11-24T09:00:00Z`, or to `timespec="milliseconds"`; None stays None."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def backoff_s(failures: int, first_s: float, most_s: float) -> float:
    """Return the pause after a number of failures in a row: `first_s`, doubled for each after the first, at most `most_s`."""
    return min(most_s, first_s * 2.0 ** min(failures - 1, MAX_DOUBLINGS))


def parse_span(text: str) -> int:
    """Parse `30d`, `24h`, `15m`, `10s` or `2w` into seconds. Raises ValueError for anything else."""
    span = _SPAN.fullmatch(text)
    if span is None:
        raise ValueError(f"{text!r} is not a duration such as 30d, 24h, 15m")
    return int(span[1]) * _UNIT_S[span[2]]


def parse_moment(text: str, now: float, direction: int = 1) -> float:
    """Parse an RFC 3339 time, or a span after `now` (`direction` 1) or before it (-1), into Unix seconds.

    Raises ValueError for anything else, for a time of day without a time zone, and for times before 1970 or after 9999.
    """
    if _SPAN.fullmatch(text):
        return _showable(now + direction * parse_span(text), text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is neither a time such as 2026-11-24T09:00:00Z nor a duration such as 30d, 24h, 15m"
        ) from error
    if moment.tzinfo is None:
        if len(text) > _DATE_CHARS:
            raise ValueError(f"{text!r} needs its time zone, such as Z")
        moment = moment.replace(tzinfo=UTC)  # a bare day begins at midnight UTC, as the aggregates' days do
    return _showable(moment.timestamp(), text)


def _showable(unix_s: float, text: str) -> float:
    if not 0 <= unix_s < YEAR_10000_S:
        raise ValueError(f"{text!r} is not between 1970 and 9999")
    return unix_s
