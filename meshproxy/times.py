"""Times: Unix seconds inside; RFC 3339 in UTC, and spans such as `24h`, at the edges."""

import re
from datetime import UTC, datetime

DAY_S = 86_400
MAX_DOUBLINGS = 16

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

    Raises ValueError for anything else, and for a time of day without a time zone.
    """
    if _SPAN.fullmatch(text):
        return now + direction * parse_span(text)
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
    return moment.timestamp()
