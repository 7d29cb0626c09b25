"""Run a command from an argument list and return its exit code.

0: done. 1: failed. 2: wrong usage. 78: the configuration is invalid (EX_CONFIG of sysexits.h). Errors are printed to
stderr as text or, with --json, as `{"error": {...}}`.
"""

import argparse
import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from meshproxy.cli.arguments import Failed, Formatter, Misused, Output
from meshproxy.config import ConfigError
from meshproxy.errors import GatewayError
from meshproxy.version import VERSION

EX_FAILED = 1
EX_USAGE = 2
EX_CONFIG = 78  # sysexits.h
EX_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

COMMANDS = {
    "dev": "everything with nothing: store, simulated provider, key, credit, ready to paste",
    "serve": "run the gateway",
    "check": "tell every fault of a configuration",
    "simulate": "run the simulated provider alone",
    "healthcheck": "ask a running gateway whether it is ready",
    "keys": "mint API keys, look at them, change, rotate, limit, suspend and revoke them",
    "accounts": "list accounts, limit, suspend and delete them",
    "credits": "grant prepaid credit and see what is left of it",
    "templates": "store prompt templates and try them",
    "usage": "requests, tokens and cost by session, model, key or day",
    "requests": "find what became of one request by its id",
    "top": "watch requests, tokens and cost as they happen",
}

PROCESSES = frozenset({"serve", "check", "simulate"})  # the commands in cli/run.py

EXAMPLES = """\
examples:
  meshproxy dev                                       try everything at once
  meshproxy check --config meshproxy.toml             before a deployment
  meshproxy serve --config meshproxy.toml
  meshproxy keys create --account acme --budget 50    mint a key
  meshproxy credits grant acme 25.00
  meshproxy usage --by model --since 24h

exit codes: 0 done, 1 failed, 2 wrong usage, 78 bad configuration
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser(argv[0] if argv else "").parse_args(argv)
    except SystemExit as stop:  # --help or --version
        return int(stop.code or 0)
    except _WrongUsage as error:
        return _misused(error.parser, str(error), as_json="--json" in argv)
    if args.run is None:
        args.parser.print_help(sys.stderr)
        return EX_USAGE
    out = Output(as_json=args.json)
    try:
        return _run(args, out)
    except Misused as error:
        return _misused(args.parser, str(error), as_json=args.json)
    except ConfigError as error:
        out.unfit(error.faults)
        return EX_CONFIG
    except Failed as error:
        out.failed(error.code, str(error))
    except GatewayError as error:
        out.failed(error.problem.code, error.problem.message, error.problem.details)
    except BrokenPipeError:  # `meshproxy usage | head`: the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    return EX_FAILED


class _WrongUsage(Exception):
    """argparse can't parse an argument list."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser = parser


class _Parser(argparse.ArgumentParser):
    """A parser that raises an exception where argparse prints and exits, so that --json also applies to wrong usage."""

    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(self, message)


def build_parser(wanted: str) -> argparse.ArgumentParser:
    """Build the parser, with the arguments of the family `wanted` and only the names of the other families."""
    parser = _Parser(
        prog="meshproxy",
        usage="meshproxy [-h] [--version] COMMAND ...",
        description="An edge proxy for LLM traffic: keys, rate limits, prepaid credit, streams relayed untouched.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"meshproxy {VERSION}")
    parser.set_defaults(run=None, parser=parser, json=False)
    families = parser.add_subparsers(title="commands", metavar="COMMAND [...]", prog="meshproxy")
    for name, summary in COMMANDS.items():
        family = families.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=Formatter
        )
        family.set_defaults(parser=family)
        if name == wanted:
            _add_arguments(name, family)
    return parser


def _misused(parser: argparse.ArgumentParser, message: str, *, as_json: bool) -> int:
    """Print what is wrong with an argument list, and return the exit code."""
    if not as_json:
        parser.print_usage(sys.stderr)
    Output(as_json=as_json).failed("usage", message)
    return EX_USAGE


def _add_arguments(name: str, family: argparse.ArgumentParser) -> None:
    """Add a command's arguments. Its module is imported only now, so that a command loads only what it uses."""
    if name in PROCESSES:
        getattr(importlib.import_module("meshproxy.cli.run"), f"add_{name}")(family)
    else:
        importlib.import_module(f"meshproxy.cli.{name}").add_arguments(family)


def _run(args: argparse.Namespace, out: Output) -> int:
    result = args.run(args, out)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    sys.stdout.flush()
    return result or 0
