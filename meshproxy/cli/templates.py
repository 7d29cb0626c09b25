"""`meshproxy templates`: stored prompts of accounts, and the global ones that every account may use."""

import argparse
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from meshproxy.cli.arguments import add_command, variable
from meshproxy.cli.books import Books, account, ensure_account, need_account, open_books
from meshproxy.cli.output import Failed, Output
from meshproxy.ledger.keyspace import GLOBAL
from meshproxy.policy.template import Template, check_template, render, to_public

COLUMNS = ["name", "owner", "model", "variables", "updated_at", "id"]
SET_HERE = ("id", "owner", "is_global", "created_at", "updated_at")  # what `show` prints and no file sets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`templates put|list|show|delete|render`"""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    putting = add_command(commands, "put", put)
    putting.add_argument("name", metavar="NAME")
    putting.add_argument(
        "--file",
        metavar="FILE",
        required=True,
        help="JSON with system and messages, and model, params, variables, description; -: stdin",
    )
    _add_owner(putting, "whose it is")
    listing = add_command(commands, "list", list_templates)
    listing.add_argument("--account", metavar="NAME", type=account, help="only what this account can use")
    rendering = add_command(commands, "render", render_one)
    rendering.add_argument(
        "--var", metavar="NAME=TEXT", type=variable, action="append", default=[], help="a slot's value; may be repeated"
    )
    for reading in (add_command(commands, "show", show), rendering):
        reading.add_argument("name", metavar="NAME", help="or its id")
        _add_owner(reading, "as this account finds it: its own before a global one")
    deleting = add_command(commands, "delete", delete)
    deleting.add_argument("name", metavar="NAME", help="or its id")
    _add_owner(deleting, "whose it is")


def _add_owner(parser: argparse.ArgumentParser, meaning: str) -> None:
    owner = parser.add_mutually_exclusive_group()
    owner.add_argument("--account", metavar="NAME", type=account, help=meaning)
    owner.add_argument("--global", dest="account", action="store_const", const=None, help="a global one (the default)")


async def put(args: argparse.Namespace, out: Output) -> None:
    """Create a template, or replace all of one but its id.

    meshproxy templates put greeter --file greeter.json
    echo '{"system": "Greet {{ name }}."}' | meshproxy templates put greeter --file - --account acme
    """
    fields = check_template(_body(args.name, _read(args.file)), partial=False)
    async with open_books(args) as books:
        if args.account is not None:
            await ensure_account(books, args.account)
        before = await _own(books, args.account, args.name)
        now = time.time()
        template = Template(
            id=str(uuid.uuid4()) if before is None else before.id,
            name=args.name,
            owner=args.account,
            is_global=args.account is None,
            created_at=now if before is None else before.created_at,
            updated_at=now,
        )
        template = fields.applied_to(template)
        if not await books.directory.put_template(template):
            raise Failed("name_taken", f"another template {args.name} was made just now")
    out.record(to_public(template))


async def list_templates(args: argparse.Namespace, out: Output) -> None:
    """List what an account can use, or everything.

    meshproxy templates list                            of every account, and the global ones
    meshproxy templates list --account acme             those that acme can use
    """
    async with open_books(args) as books:
        if args.account is not None:
            await need_account(books, args.account)
            found = [each async for each in books.directory.list_templates(args.account)]
        else:
            found = [each async for each in books.directory.list_templates(GLOBAL)]
            for owner in await books.directory.list_accounts():
                found += [each async for each in books.directory.list_templates(owner.name) if not each.is_global]
    out.rows([to_public(template) for template in found], COLUMNS, empty="no templates")


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show a template.

    meshproxy templates show greeter --json > greeter.json
    """
    async with open_books(args) as books:
        out.record(to_public(await _need(books, args.account, args.name)))


async def delete(args: argparse.Namespace, out: Output) -> None:
    """Delete a template of this very owner.

    meshproxy templates delete greeter --account acme
    """
    async with open_books(args) as books:
        template = await _own(books, args.account, args.name)
        if template is None or not await books.directory.delete_template(template):
            raise _absent(args.account, args.name)
    out.record({"id": template.id, "name": template.name, "deleted": True})


async def render_one(args: argparse.Namespace, out: Output) -> None:
    """Print the messages that a request with these variables would get.

    meshproxy templates render greeter --var name=Ada
    meshproxy templates render greeter --account acme --var name=Ada --json
    """
    async with open_books(args) as books:
        template = await _need(books, args.account, args.name)
    messages = render(template, dict(args.var))
    out.told(messages, "\n".join(map(_readable, messages)))


async def _need(books: Books, owner: str | None, name: str) -> Template:
    """The template that a request of this account would get, or the global one."""
    template = await books.directory.template(owner or GLOBAL, name)
    if template is None:
        raise _absent(owner, name)
    return template


async def _own(books: Books, owner: str | None, name: str) -> Template | None:
    """The template of this name or id that is the owner's, not one that it may only use."""
    template = await books.directory.template(owner or GLOBAL, name)
    return template if template is not None and template.owner == owner else None


def _absent(owner: str | None, name: str) -> Failed:
    whose = "global template" if owner is None else f"template of {owner}"
    return Failed("template_not_found", f"there is no {whose} {name}")


def _readable(message: dict[str, Any]) -> str:
    content = message["content"]
    text = content if isinstance(content, str) else msgspec.json.encode(content).decode()
    return f"[{message['role']}]\n{text}\n"


def _read(path: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise Failed("unreadable", f"{path}: {error.strerror}") from error


def _body(name: str, text: bytes) -> bytes:
    """A file's JSON under the name of the command line, without what `show` adds."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return text  # check_template says what is wrong
    return msgspec.json.encode({**{key: raw for key, raw in fields.items() if key not in SET_HERE}, "name": name})
