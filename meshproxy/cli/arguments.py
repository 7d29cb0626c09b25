"""What may stand on a command line: the words every command takes, and the kinds of value with their bounds."""

import argparse
import json
import os
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeAlias

from meshproxy.cli.output import Output
from meshproxy.money import parse_usd

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name
Run = Callable[[argparse.Namespace, Output], Awaitable[int | None] | int | None]

MAX_COUNT = 2**53 - 1  # the largest integer that a Lua number holds exactly

_DURATION = re.compile(r"(\d{1,6})([smhdw])", re.ASCII)
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help whose examples keep their lines, and whose long flags keep theirs."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def add_common(parser: argparse.ArgumentParser, run: Run, *, examples: str = "") -> None:
    """Make `parser` a command that runs `run`: the arguments all commands share, and examples below the help."""
    common = parser.add_argument_group("common")
    common.add_argument(
        "--config",
        metavar="FILE",
        default=os.environ.get("MESHPROXY_CONFIG") or None,
        help="the configuration (default: $MESHPROXY_CONFIG, else built-in defaults)",
    )
    common.add_argument("--json", action="store_true", help="print JSON, errors too")
    parser.epilog = f"examples:\n{examples}" if examples else None
    parser.set_defaults(run=run, parser=parser)


def add_store(parser: argparse.ArgumentParser, run: Run, *, examples: str = "") -> None:
    """As `add_common`, for a command that works on the store."""
    add_common(parser, run, examples=examples)
    parser.add_argument("--redis", metavar="URL", help="the store, in place of redis.url of the configuration")


def add_command(commands: Commands, name: str, summary: str, run: Run, *, examples: str) -> argparse.ArgumentParser:
    """One command of a family that works on the store."""
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=Formatter
    )
    add_store(parser, run, examples=examples)
    return parser


def usd(text: str) -> int:
    """Nano-USD of a decimal amount that is not negative."""
    amount_nusd = signed_usd(text)
    if amount_nusd < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return amount_nusd


def signed_usd(text: str) -> int:
    """Nano-USD of a decimal amount."""
    try:
        return parse_usd(text.removeprefix("$"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:20]) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose."""
    if not (text.isascii() and text.isdigit()) or not 0 <= int(text[:20]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def names(text: str) -> list[str]:
    """`a,b` as a list; use it with action="extend" so that the flag may be repeated."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name in it")
    return found


def one_of(*allowed: str) -> Callable[[str], list[str]]:
    """As `names`, of a closed set."""

    def parse(text: str) -> list[str]:
        found = names(text)
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return found

    return parse


def param(text: str) -> tuple[str, Any]:
    """`NAME=JSON`, as temperature=0.2."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=JSON, such as temperature=0.2")
    try:
        return name, json.loads(value, parse_constant=_no_constant)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {value!r} is not JSON; a string needs its quotes") from error


def variable(text: str) -> tuple[str, str]:
    """`NAME=TEXT`, the value of a template's slot."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=TEXT")
    return name, value


def past(text: str) -> float:
    """Unix seconds of an RFC 3339 time, or of a duration such as 24h before now."""
    ago_s = _duration_s(text)
    return time.time() - ago_s if ago_s is not None else _rfc3339(text)


def future(text: str) -> float:
    """Unix seconds of an RFC 3339 time that is still to come, or of a duration such as 30d from now."""
    ahead_s = _duration_s(text)
    now = time.time()
    moment = now + ahead_s if ahead_s is not None else _rfc3339(text)
    if moment <= now:
        raise argparse.ArgumentTypeError(f"{text!r} is not in the future")
    return moment


def _duration_s(text: str) -> int | None:
    match = _DURATION.fullmatch(text)
    return int(match[1]) * _UNIT_S[match[2]] if match else None


def _rfc3339(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a time such as 2026-11-24T09:00:00Z nor a duration such as 30d, 24h, 15m"
        ) from error
    if moment.tzinfo is None:
        if len(text) > len("2026-11-24"):
            raise argparse.ArgumentTypeError(f"{text!r} needs its time zone, such as Z")
        moment = moment.replace(tzinfo=UTC)  # a bare day begins at midnight UTC, as the aggregates' days do
    return moment.timestamp()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
