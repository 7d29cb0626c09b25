"""The store and the desk (its operations) that a command uses."""

import argparse
import getpass
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from meshproxy.cli.arguments import Failed, load_redis
from meshproxy.config import plain
from meshproxy.ledger.connection import StoreError, Unavailable, connect
from meshproxy.ledger.desk import Desk
from meshproxy.ledger.directory import Directory, check_account_name
from meshproxy.ledger.ledger import Ledger


@asynccontextmanager
async def open_desk(args: argparse.Namespace) -> AsyncIterator[Desk]:
    """Open the desk over the configuration's store, and close it at the end. Raises Failed if the store can't be
    reached.
    """
    settings = load_redis(args)
    if settings.url == "embedded":
        raise Failed("store_embedded", "an embedded store lives inside `serve` or `dev`; name it with --redis URL")
    shown = without_password(plain(settings.url))
    try:
        store = await connect(settings)
        try:
            yield Desk(store, Directory(store), Ledger(store), actor())
        finally:
            await store.close()
    except Unavailable as error:
        raise Failed(error.problem.code, f"{shown}: {error.reason}") from error
    except StoreError as error:
        raise Failed("store_error", f"{shown}: {error}") from error


def actor() -> str:
    """Return the name for audit events: the command line, with its user if the system has a name for it."""
    try:
        return f"cli:{getpass.getuser()}"
    except (OSError, KeyError):  # a container's user may have no name
        return "cli"


def account(text: str) -> str:
    """Parse an account's name."""
    try:
        check_account_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def without_password(url: str) -> str:
    """Return a URL without its password, for messages."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)
