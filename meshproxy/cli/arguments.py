"""What may stand on a command line: how a command is made of a function, and the kinds of value with their bounds."""

import argparse
import inspect
import os
import re
import textwrap
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import msgspec

from meshproxy.cli.output import Output
from meshproxy.money import parse_usd
from meshproxy.times import parse_moment, parse_span

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name
Formatter = partial(
    argparse.RawDescriptionHelpFormatter, max_help_position=32
)  # examples and long flags keep their lines
Run = Callable[[argparse.Namespace, Output], Awaitable[int | None] | int | None]

MAX_COUNT = 2**53 - 1  # the largest integer that a Lua number holds exactly


def make_command(
    parser: argparse.ArgumentParser, run: Run, *, configured: bool = False, on_store: bool = False
) -> None:
    """Make `parser` a command that runs `run`, whose docstring is the help: what it does, and after an empty line examples.
    `configured`: it makes no sense without a configuration; `on_store`: it takes --redis.
    """
    parser.description, _, examples = (inspect.getdoc(run) or "").partition("\n\n")
    parser.epilog = f"examples:\n{textwrap.indent(examples, '  ')}"
    parser.set_defaults(run=run, parser=parser)
    common = parser.add_argument_group("common")
    config = os.environ.get("MESHPROXY_CONFIG") or None
    common.add_argument(
        "--config",
        metavar="FILE",
        required=configured and config is None,
        default=config,
        help="the configuration (default: $MESHPROXY_CONFIG, else built-in defaults)",
    )
    common.add_argument("--json", action="store_true", help="print JSON, errors too")
    if on_store:
        common.add_argument("--redis", metavar="URL", help="the store, in place of redis.url of the configuration")


def add_command(commands: Commands, name: str, run: Run) -> argparse.ArgumentParser:
    """One command of a family that works on the store."""
    summary = (inspect.getdoc(run) or "").partition(".")[0]
    parser = commands.add_parser(name, help=summary[:1].lower() + summary[1:], formatter_class=Formatter)
    make_command(parser, run, on_store=True)
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
    return _whole(text, 1, MAX_COUNT)


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose."""
    return _whole(text, 0, 65535)


def names(text: str) -> list[str]:
    """`a,b` as a list; use it with action="extend" so that the flag may be repeated."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name in it")
    return found


def variable(text: str) -> tuple[str, str]:
    """`NAME=TEXT`, the value of a template's slot."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def param(text: str) -> tuple[str, Any]:
    """`NAME=JSON`, as temperature=0.2."""
    name, value = variable(text)
    try:
        return name, msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {value!r} is not JSON; a string needs its quotes") from error


def past(text: str) -> float:
    """Unix seconds of an RFC 3339 time, or of a duration such as 24h before now."""
    return _moment(text, -1)


def future(text: str) -> float:
    """Unix seconds of an RFC 3339 time that is still to come, or of a duration such as 30d from now."""
    moment = _moment(text, 1)
    if moment <= time.time():
        raise argparse.ArgumentTypeError(f"{text!r} is not in the future")
    return moment


def moment(text: str) -> float:
    """Unix seconds of an RFC 3339 time, past ones too, or of a duration such as 30d from now."""
    return _moment(text, 1)


def span(text: str) -> int:
    """Seconds of a duration such as 24h."""
    try:
        return parse_span(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit()) or not least <= int(text[:20]) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def _moment(text: str, direction: int) -> float:
    try:
        return parse_moment(text, time.time(), direction)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
