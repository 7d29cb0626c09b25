"""The types of arguments, and the configuration and store that a command uses.

What a health check doesn't need is imported only where it is used: `meshproxy healthcheck` runs every few seconds.
"""

import argparse
import getpass
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec.structs import replace

from meshproxy.cli.command_line import CommandError, argument
from meshproxy.config import ConfigError, Redis, SecretReader, Settings, resolved
from meshproxy.units import MAX_EXACT_INT, parse_moment, parse_span, parse_usd

if TYPE_CHECKING:
    from meshproxy.ledger.administration import Administration

Parsed = TypeVar("Parsed")
Operation = Callable[["Administration"], Awaitable[Any]]

DAY_MIN = 1440  # refusals are counted for so many minutes


def nusd(text: str) -> int:
    """Return the nano-USD of a decimal amount that is not negative."""
    amount = signed_nusd(text)
    if amount < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return amount


def signed_nusd(text: str) -> int:
    """Return the nano-USD of a decimal amount."""
    return _checked(parse_usd, text.removeprefix("$"))


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole(text, 1, MAX_EXACT_INT)


def minutes(text: str) -> int:
    """Parse a number of minutes up to a day."""
    return _whole(text, 1, DAY_MIN)


def port(text: str) -> int:
    """Parse a TCP port; 0 lets the system choose one."""
    return _whole(text, 0, 65535)


def names(text: str) -> list[str]:
    """Split `a,b` into a list. Use it with action="extend" so that the flag may be repeated."""
    parts = [name.strip() for name in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name in it")
    return parts


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
    return _checked(lambda text: parse_moment(text, time.time(), -1), text)


def moment(text: str) -> float:
    """Return the Unix seconds of any RFC 3339 time, or of a duration from now such as 30d."""
    return _checked(lambda text: parse_moment(text, time.time()), text)


def future(text: str) -> float:
    """Return the Unix seconds of a future RFC 3339 time, or of a duration from now such as 30d."""
    when = moment(text)
    if when <= time.time():
        raise argparse.ArgumentTypeError(f"{text!r} is not in the future")
    return when


def span(text: str) -> int:
    """Return the seconds of a duration such as 24h."""
    return _checked(parse_span, text)


def account(text: str) -> str:
    """Parse an account's name."""
    from meshproxy.policy.principal import check_account_name  # noqa: PLC0415 - a health check doesn't need it

    _checked(check_account_name, text)
    return text


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit()) or not least <= int(text[:20]) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def _checked(parse: Callable[[str], Parsed], text: str) -> Parsed:
    """Parse a text. A ValueError becomes argparse's error with the same message."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


ACCOUNT = argument("account", metavar="ACCOUNT", type=account, help="the account's name")


def load_settings(args: argparse.Namespace) -> Settings:
    """Load the settings of --config, else the built-in defaults. Raises ConfigError with every fault."""
    if not args.config:
        return Settings()
    from meshproxy.app.load import read  # noqa: PLC0415 - as above

    return read(args.config)


def load_redis(args: argparse.Namespace) -> Redis:
    """Load the store's settings from --redis, else from the configuration, of which no other secrets are read.

    Raises ConfigError with every fault.
    """
    redis = load_settings(args).redis
    if args.redis is not None:
        return replace(redis, url=args.redis, password=None)
    from meshproxy.app.load import secret_text  # noqa: PLC0415 - as above

    reader = SecretReader(os.environ, secret_text)
    redis = reader.redis(redis)
    if reader.faults:
        raise ConfigError(reader.faults)
    return redis


@asynccontextmanager
async def open_administration(args: argparse.Namespace) -> "AsyncIterator[Administration]":
    """Open the operations on the configuration's store, and close it at the end.

    Raises CommandError if the store can't be reached.
    """
    from meshproxy.ledger.administration import Administration  # noqa: PLC0415
    from meshproxy.ledger.connection import StoreError, Unavailable, connect  # noqa: PLC0415 - redis-py; see above
    from meshproxy.ledger.directory import Directory  # noqa: PLC0415
    from meshproxy.ledger.ledger import Ledger  # noqa: PLC0415

    settings = load_redis(args)
    if settings.url == "embedded":
        raise CommandError(
            "store_embedded", "an embedded store is a part of `serve` or `dev`: name it with --redis URL"
        )
    shown = re.sub(r"(?<=://)[^/@]*@", "", resolved(settings.url))  # without the password
    try:
        store = await connect(settings)
        try:
            yield Administration(store, Directory(store), Ledger(store), _actor())
        finally:
            await store.close()
    except Unavailable as error:
        raise CommandError(error.response.code, f"{shown}: {error.reason}") from error
    except StoreError as error:
        raise CommandError("store_error", f"{shown}: {error}") from error


def _actor() -> str:
    """Return the name for audit events: the command line, with its user if the system has a name for it."""
    try:
        return f"cli:{getpass.getuser()}"
    except (OSError, KeyError):  # a container's user may have no name
        return "cli"
