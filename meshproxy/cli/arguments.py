"""Arguments and results of commands.

Results are JSON, one document a line, or aligned text. `Output` is the only place in the commands that prints. Times
are RFC 3339 in UTC and amounts decimal strings in both formats.
"""

import argparse
import inspect
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import msgspec
from msgspec.structs import asdict, replace

from meshproxy.config import ConfigError, Redis, SecretReader, Settings
from meshproxy.errors import Detail
from meshproxy.money import parse_usd
from meshproxy.times import parse_moment, parse_span


class Failed(Exception):
    """A command failed. `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Misused(Exception):
    """The arguments contradict each other in a way that argparse can't detect."""


class Output:
    """Prints a command's results and errors, as JSON or as text."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def told(self, document: Any, text: str) -> None:
        """Print one JSON document on one line, or the same as text, at once: for commands that run for a long time."""
        print(_json(document) if self.as_json else text, flush=True)

    def record(self, record: Mapping[str, Any], *, note: str = "") -> None:
        """Print one object. In text, names of nested members are joined (`limits.burst`), and `note` is appended."""
        flat = list(_flat(record))
        width = max(len(name) for name, _ in flat)
        lines = [f"{name:<{width}}  {_text(value)}" for name, value in flat]
        self.told(record, "\n".join([*lines, "", note] if note else lines))

    def rows(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str) -> None:
        """Print a list of objects: in JSON with all their members, in text with the named columns."""
        self.told(rows, "\n".join(table(rows, columns)) if rows else empty)

    def failed(self, code: str, message: str, details: Sequence[Detail] = ()) -> None:
        """Print to stderr why the command failed, with each fault on its own line."""
        error: dict[str, Any] = {"message": message, "code": code}
        if details:
            error["details"] = [asdict(detail) for detail in details]
        faults = [f"  {'.'.join(map(str, detail.loc[1:]))}: {detail.msg}" for detail in details]
        self._error(error, [f"meshproxy: {message}", *(faults if len(faults) > 1 else ())])

    def warned(self, warnings: Iterable[str]) -> None:
        """Print likely mistakes to stderr, one a line. In JSON they are part of the result."""
        if not self.as_json:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr)

    def unfit(self, faults: Sequence[str]) -> None:
        """Print every fault of a configuration to stderr, one a line."""
        message = f"the configuration has {len(faults)} fault{'s' if len(faults) > 1 else ''}"
        self._error({"message": message, "code": "unfit_configuration", "faults": list(faults)}, faults)

    def _error(self, error: Mapping[str, Any], lines: Iterable[str]) -> None:
        print(_json({"error": error}) if self.as_json else "\n".join(lines), file=sys.stderr)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Return the named columns as aligned lines under a heading. Columns of numbers are aligned right."""
    aligned = []
    for column in columns:
        cells = [_text(row.get(column)) for row in rows]
        width = max(map(len, [column, *cells]))
        align = str.rjust if all(map(_is_number, cells)) else str.ljust
        aligned.append([align(cell, width) for cell in [column, *cells]])
    return ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_number(cell: str) -> bool:
    """Return whether a cell reads as a number or is empty. Empty cells don't change a column's alignment."""
    return cell == "-" or cell.removeprefix("-").replace(".", "", 1).isdigit()


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: Any) -> str:
    """Return a cell as text. Control characters are escaped, because names come from users and a terminal executes
    control characters.
    """
    match value:
        case None | "" | [] | {}:
            text = "-"
        case bool():
            text = "yes" if value else "no"
        case list() if all(isinstance(item, str) for item in value):
            text = ", ".join(value)
        case list() | dict():
            text = _json(value)
        case _:
            text = str(value)
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name
Formatter = partial(
    argparse.RawDescriptionHelpFormatter, max_help_position=32
)  # examples and long flags keep their lines
Run = Callable[[argparse.Namespace, Output], Awaitable[int | None] | int | None]

MAX_COUNT = 2**53 - 1  # the largest integer that a Lua number holds exactly
DAY_MIN = 1440


def make_command(
    parser: argparse.ArgumentParser, run: Run, *, configured: bool = False, on_store: bool = False
) -> None:
    """Make `parser` a command that runs `run`.

    The docstring of `run` is the help text: what the command does, then an empty line and examples. `configured`: the
    command requires a configuration. `on_store`: it takes --redis.
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
    """Add one command of a family that uses the store."""
    summary = (inspect.getdoc(run) or "").partition(".")[0]
    parser = commands.add_parser(name, help=summary[:1].lower() + summary[1:], formatter_class=Formatter)
    make_command(parser, run, on_store=True)
    return parser


def usd(text: str) -> int:
    """Return the nano-USD of a decimal amount that is not negative."""
    amount_nusd = signed_usd(text)
    if amount_nusd < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return amount_nusd


def signed_usd(text: str) -> int:
    """Return the nano-USD of a decimal amount."""
    try:
        return parse_usd(text.removeprefix("$"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole(text, 1, MAX_COUNT)


def minutes(text: str) -> int:
    """A number of minutes up to a day, for which refusals are counted."""
    return _whole(text, 1, DAY_MIN)


def port(text: str) -> int:
    """Parse a TCP port; 0 lets the system choose one."""
    return _whole(text, 0, 65535)


def names(text: str) -> list[str]:
    """Split `a,b` into a list. Use it with action="extend" so that the flag may be repeated."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name in it")
    return found


def variable(text: str) -> tuple[str, str]:
    """Parse `NAME=TEXT`, the value of a template's slot."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def param(text: str) -> tuple[str, Any]:
    """Parse `NAME=JSON`, such as temperature=0.2."""
    name, value = variable(text)
    try:
        return name, msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {value!r} is not JSON; a string needs its quotes") from error


def past(text: str) -> float:
    """Return the Unix seconds of an RFC 3339 time, or of a duration before now such as 24h."""
    return _moment(text, -1)


def future(text: str) -> float:
    """Return the Unix seconds of a future RFC 3339 time, or of a duration from now such as 30d."""
    moment = _moment(text, 1)
    if moment <= time.time():
        raise argparse.ArgumentTypeError(f"{text!r} is not in the future")
    return moment


def moment(text: str) -> float:
    """Return the Unix seconds of any RFC 3339 time, or of a duration from now such as 30d."""
    return _moment(text, 1)


def span(text: str) -> int:
    """Return the seconds of a duration such as 24h."""
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


def load_settings(args: argparse.Namespace) -> Settings:
    """Load the settings of --config, else the built-in defaults. Raises ConfigError with every fault."""
    if not args.config:
        return Settings()
    from meshproxy.app.reload import read  # noqa: PLC0415 - help needs none of what a file is checked with

    return read(args.config)


def load_redis(args: argparse.Namespace) -> Redis:
    """Load the store's settings from --redis, else from the configuration. Raises ConfigError with every fault. No
    secrets other than the store's are read.
    """
    redis = load_settings(args).redis
    url = getattr(args, "redis", None)
    if url is not None:
        return replace(redis, url=url, password=None)
    from meshproxy.app.reload import secret_text  # noqa: PLC0415 - as above

    reader = SecretReader(os.environ, secret_text)
    redis = reader.redis(redis)
    if reader.faults:
        raise ConfigError(reader.faults)
    return redis
