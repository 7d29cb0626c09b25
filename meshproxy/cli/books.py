"""The store that a command works on: its directory of accounts, keys and templates, and its ledger."""

import argparse
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import Struct

from meshproxy.cli.configuration import load_redis
from meshproxy.cli.output import Failed
from meshproxy.config import plain
from meshproxy.ledger.connection import Store, StoreError, Unavailable, connect
from meshproxy.ledger.directory import Directory, check_account_name
from meshproxy.ledger.ledger import Ledger
from meshproxy.policy.principal import Account

ACTOR = "cli"  # who audit events say made a change


class Books(Struct, frozen=True):
    """An open store."""

    store: Store
    directory: Directory
    ledger: Ledger


@asynccontextmanager
async def open_books(args: argparse.Namespace) -> AsyncIterator[Books]:
    """The books of the configuration's store, closed at the end. Failed if it can't be reached."""
    settings = load_redis(args)
    if settings.url == "embedded":
        raise Failed("store_embedded", "an embedded store lives inside `serve` or `dev`; name it with --redis URL")
    shown = without_password(plain(settings.url))
    try:
        store = await connect(settings)
        try:
            yield Books(store, Directory(store), Ledger(store))
        finally:
            await store.close()
    except Unavailable as error:
        raise Failed(error.problem.code, f"{shown}: {error.reason}") from error
    except StoreError as error:
        raise Failed("store_error", f"{shown}: {error}") from error


def account(text: str) -> str:
    """An account's name, on a command line."""
    try:
        check_account_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


async def chosen_accounts(books: Books, name: str | None) -> list[str]:
    """The one account asked for, which must exist, or all."""
    if name is not None:
        return [(await need_account(books, name)).name]
    return [found.name for found in await books.directory.list_accounts()]


async def need_account(books: Books, name: str) -> Account:
    """An account that exists; Failed if it doesn't."""
    found = await books.directory.account(name)
    if found is None:
        raise Failed("account_not_found", f"there is no account {name}")
    return found


async def ensure_account(books: Books, name: str) -> Account:
    """An account, made if there is none yet."""
    return await books.directory.ensure_account(name, actor=ACTOR)


def without_password(url: str) -> str:
    """A URL that may be shown."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)
