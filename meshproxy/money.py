"""Money: integers of nano-USD inside, decimal strings at the edges. No amount is ever a float."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

NUSD_PER_USD = 1_000_000_000
MAX_NUSD = 9_000_000 * NUSD_PER_USD  # below 2**53, so a Lua number holds any amount exactly

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
