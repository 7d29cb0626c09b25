"""Run a command from an argument list and return its exit code.

0: done. 1: failed. 2: wrong usage. 78: the configuration is invalid (EX_CONFIG of sysexits.h). Results are JSON, one
document a line, or aligned text; errors go to stderr as text or, with --json, as `{"error": {...}}`. A command's
docstring is its help text. `Output` is the only place in the commands that prints results.
"""

import argparse
import asyncio
import importlib
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from msgspec.structs import asdict

from meshproxy import VERSION
from meshproxy.config import ConfigError
from meshproxy.errors import Detail, GatewayError

if TYPE_CHECKING:
    from meshproxy.ledger.administration import Administration

EX_FAILED = 1
EX_USAGE = 2
EX_CONFIG = 78  # sysexits.h
EX_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# By command: the module in this package that has its `add_COMMAND`, and a summary.
COMMANDS = {
    "dev": ("dev", "run everything for a trial: gateway, store, simulated provider, a key with credit"),
    "serve": ("run", "run the gateway"),
    "check": ("run", "check a configuration and list all its faults"),
    "simulate": ("run", "run the simulated provider alone"),
    "healthcheck": ("run", "check whether a running gateway is ready"),
    "keys": ("keys", "create, list, change, rotate, limit, suspend and revoke API keys"),
    "accounts": ("accounts", "list, limit, suspend and delete accounts"),
    "credits": ("accounts", "grant prepaid credit and show what is left of it"),
    "templates": ("templates", "store, list, show, render and delete prompt templates"),
    "usage": ("usage", "report requests, tokens and cost by session, model, key or day"),
    "requests": ("usage", "show one request by its id"),
    "top": ("usage", "watch requests, tokens and cost of the last minutes"),
}

EXAMPLES = """\
examples:
  meshproxy dev                                       try everything at once
  meshproxy check --config meshproxy.toml             before a deployment
  meshproxy serve --config meshproxy.toml
  meshproxy keys create --account acme --budget 50    create a key
  meshproxy credits grant acme 25.00
  meshproxy usage --by model --since 24h

exit codes: 0 done, 1 failed, 2 wrong usage, 78 bad configuration
"""

# Keeps the lines of examples, and long flags on one line with their help.
Formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)


class CommandError(Exception):
    """A command failed. `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class UsageError(Exception):
    """Wrong arguments. `parser`: the parser of the argument; None if the command itself checks it."""

    def __init__(self, message: str, parser: argparse.ArgumentParser | None = None) -> None:
        super().__init__(message)
        self.parser = parser


class Output:
    """Prints a command's results and errors, as JSON or as text."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def print(self, document: Any, text: str) -> None:
        """Print one JSON document on one line, or the same as text, at once: some commands run for a long time."""
        print(_json(document) if self.as_json else text, flush=True)

    def print_record(self, record: Mapping[str, Any], *, note: str = "") -> None:
        """Print one object. In text, names of nested members are joined (`limits.burst`), and `note` is appended."""
        flat = list(_flat(record))
        width = max(len(name) for name, _ in flat)
        lines = [f"{name:<{width}}  {_text(value)}" for name, value in flat]
        self.print(record, "\n".join([*lines, "", note] if note else lines))

    def print_rows(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str) -> None:
        """Print a list of objects: in JSON with all their members, in text with the named columns."""
        self.print(rows, "\n".join(table(rows, columns)) if rows else empty)

    def print_error(self, code: str, message: str, details: Sequence[Detail] = ()) -> None:
        """Print to stderr why the command failed, with each of several details on its own line."""
        error: dict[str, Any] = {"message": message, "code": code}
        if details:
            error["details"] = [asdict(detail) for detail in details]
        lines = [f"  {'.'.join(map(str, detail.loc[1:]))}: {detail.msg}" for detail in details]
        self._to_stderr(error, [f"meshproxy: {message}", *(lines if len(lines) > 1 else ())])

    def print_warnings(self, warnings: Iterable[str]) -> None:
        """Print likely mistakes to stderr, one a line. In JSON they are part of the result."""
        if not self.as_json:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr)

    def print_faults(self, faults: Sequence[str]) -> None:
        """Print every fault of a configuration to stderr, one a line."""
        message = f"the configuration has {len(faults)} fault{'s' if len(faults) > 1 else ''}"
        self._to_stderr({"message": message, "code": "unfit_configuration", "faults": list(faults)}, faults)

    def _to_stderr(self, error: Mapping[str, Any], lines: Iterable[str]) -> None:
        print(_json({"error": error}) if self.as_json else "\n".join(lines), file=sys.stderr)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Return the named columns as aligned lines under a heading. Columns of numbers are aligned right.

    A column is `HEADING=NAME` where they differ; a nested member's name is joined (`spend.total_usd`).
    """
    records = [dict(_flat(row)) for row in rows]
    aligned = []
    for column in columns:
        heading, _, name = column.partition("=")
        cells = [_text(record.get(name or heading)) for record in records]
        width = max(map(len, [heading, *cells]))
        align = str.rjust if all(map(_is_number, cells)) else str.ljust
        aligned.append([align(cell, width) for cell in [heading, *cells]])
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
    """Format a cell. Control characters are escaped: names come from users, and a terminal would execute them."""
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
    return printable(text)


def printable(text: str) -> str:
    """Return the text with control characters escaped, those that only move or reorder text included."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


AddTo = Callable[[Any], object]
Run = Callable[[argparse.Namespace, Output], Awaitable[int | None] | int | None]


def make_command(
    parser: argparse.ArgumentParser,
    run: Run,
    documented: Callable[..., Any] | None = None,
    *,
    needs_config: bool = False,
    uses_store: bool = False,
) -> None:
    """Make `parser` a command that runs `run`.

    The docstring of `run`, or of `documented`, is the help text: what the command does; its last paragraph has examples.
    `uses_store`: the command takes --redis.
    """
    parser.description, _, examples = (inspect.getdoc(documented or run) or "").rpartition("\n\n")
    parser.epilog = f"examples:\n{textwrap.indent(examples, '  ')}"
    parser.set_defaults(run=run, parser=parser)
    common = parser.add_argument_group("common")
    config = os.environ.get("MESHPROXY_CONFIG") or None
    common.add_argument(
        "--config",
        metavar="FILE",
        required=needs_config and config is None,
        default=config,
        help="the configuration (default: $MESHPROXY_CONFIG, else built-in defaults)",
    )
    common.add_argument("--json", action="store_true", help="print results and errors as JSON")
    if uses_store:
        common.add_argument("--redis", metavar="URL", help="the Redis to use instead of the configuration's redis.url")


def argument(*names: str, **options: Any) -> AddTo:
    """Return the function that adds one argument, as argparse's `add_argument` takes it, to a parser or a group."""
    return lambda parser: parser.add_argument(*names, **options)


def one_of(*arguments: AddTo, required: bool = False) -> AddTo:
    """Return the function that adds arguments of which at most one may be given. `required`: one must be."""
    return lambda parser: _add_all(parser.add_mutually_exclusive_group(required=required), arguments)


def titled(title: str, *arguments: AddTo) -> AddTo:
    """Return the function that adds arguments under a title in the help."""
    return lambda parser: _add_all(parser.add_argument_group(title), arguments)


def _add_all(parser: Any, arguments: Iterable[AddTo]) -> None:
    for add_to in arguments:
        add_to(parser)


class StoreCommand(NamedTuple):
    """A command of a family that uses the store.

    `run` checks the arguments and returns the operation, whose result is printed: a list as rows with these `columns`
    (`empty` if there are none), anything else as a record with the `note`, or in the words of `text`.
    """

    run: Callable[[argparse.Namespace], Callable[["Administration"], Awaitable[Any]]]
    arguments: Sequence[AddTo] = ()
    columns: Sequence[str] = ()
    empty: str = ""
    note: str = ""
    text: Callable[[Any], str] | None = None

    async def print(self, args: argparse.Namespace, out: Output) -> None:
        """Run the operation, and print its result."""
        from meshproxy.cli.arguments import open_administration  # noqa: PLC0415 - it imports this module

        operation = self.run(args)
        async with open_administration(args) as administration:
            result = await operation(administration)
        if self.text is not None:
            out.print(result, self.text(result))
        elif self.columns:
            out.print_rows(result, self.columns, empty=self.empty)
        else:
            out.print_record(result, note=self.note)


def add_family(parser: argparse.ArgumentParser, commands: Mapping[str, StoreCommand]) -> None:
    """Add the commands of a family. A command's summary is the first sentence of its help."""
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in commands.items():
        summary = (inspect.getdoc(command.run) or "").partition(".")[0]
        added = subparsers.add_parser(name, help=summary[:1].lower() + summary[1:], formatter_class=Formatter)
        make_command(added, command.print, command.run, uses_store=True)
        _add_all(added, command.arguments)


class _Parser(argparse.ArgumentParser):
    """A parser that raises an exception where argparse prints and exits, so that --json also applies to wrong usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self)


def build_parser(chosen: str) -> argparse.ArgumentParser:
    """Build the parser, with the arguments of the command `chosen` and only the names of the other commands.

    So only the module of that command is imported, and `--help` and health checks load no other libraries.
    """
    parser = _Parser(
        prog="meshproxy",
        usage="meshproxy [-h] [--version] COMMAND ...",
        description="An edge proxy for LLM traffic: keys, rate limits, prepaid credit, streams relayed untouched.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"meshproxy {VERSION}")
    parser.set_defaults(run=None, parser=parser, json=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND [...]", prog="meshproxy")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=Formatter
        )
        command.set_defaults(parser=command)
        if name == chosen:
            getattr(importlib.import_module(f"meshproxy.cli.{module}"), f"add_{name}")(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser(argv[0] if argv else "").parse_args(argv)
    except SystemExit as stop:  # --help or --version
        return int(stop.code or 0)
    except UsageError as error:
        return _wrong_usage(error, as_json="--json" in argv)
    if args.run is None:
        args.parser.print_help(sys.stderr)
        return EX_USAGE
    out = Output(as_json=args.json)
    try:
        return _run(args, out)
    except UsageError as error:
        error.parser = args.parser
        return _wrong_usage(error, as_json=args.json)
    except ConfigError as error:
        out.print_faults(error.faults)
        return EX_CONFIG
    except CommandError as error:
        out.print_error(error.code, str(error))
    except GatewayError as error:
        out.print_error(error.response.code, error.response.message, error.response.details)
    except BrokenPipeError:  # `meshproxy usage | head`: the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    return EX_FAILED


def _run(args: argparse.Namespace, out: Output) -> int:
    result = args.run(args, out)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    sys.stdout.flush()
    return result or 0


def _wrong_usage(error: UsageError, *, as_json: bool) -> int:
    """Print what is wrong with an argument list, and return the exit code."""
    if error.parser is not None and not as_json:
        error.parser.print_usage(sys.stderr)
    Output(as_json=as_json).print_error("usage", str(error))
    return EX_USAGE
