"""`meshproxy templates`: stored prompts of accounts, and global ones for all accounts."""

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

from meshproxy.cli.arguments import account, open_administration, variable
from meshproxy.cli.command_line import CommandError, Output, add_command
from meshproxy.policy.template import check_template, render, to_public

COLUMNS = ["name", "owner", "model", "variables", "updated_at", "id"]
# set by the gateway; a file from `show --json` has them
SERVER_FIELDS = ("id", "owner", "is_global", "created_at", "updated_at")


def add_templates(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `templates put|list|show|delete|render`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    putting = add_command(commands, "put", put)
    putting.add_argument("name", metavar="NAME", help="the template's name")
    putting.add_argument(
        "--file",
        metavar="FILE",
        required=True,
        help="JSON with system, messages, model, params, variables and description; - reads stdin",
    )
    _add_owner(putting, "the account that owns it")
    listing = add_command(commands, "list", list_templates)
    listing.add_argument("--account", metavar="NAME", type=account, help="only templates that this account can use")
    rendering = add_command(commands, "render", render_messages)
    rendering.add_argument(
        "--var",
        metavar="NAME=TEXT",
        type=variable,
        action="append",
        default=[],
        help="the value of a slot; may be repeated",
    )
    for reading in (add_command(commands, "show", show), rendering):
        reading.add_argument("name", metavar="NAME", help="the template's name or id")
        _add_owner(reading, "the template that this account would use: its own, else a global one")
    deleting = add_command(commands, "delete", delete)
    deleting.add_argument("name", metavar="NAME", help="the template's name or id")
    _add_owner(deleting, "the account that owns it")


def _add_owner(parser: argparse.ArgumentParser, meaning: str) -> None:
    owner = parser.add_mutually_exclusive_group()
    owner.add_argument("--account", metavar="NAME", type=account, help=meaning)
    owner.add_argument(
        "--global", dest="account", action="store_const", const=None, help="a global template (the default)"
    )


async def put(args: argparse.Namespace, out: Output) -> None:
    """Create a template, or replace one completely; only its id stays.

    meshproxy templates put greeter --file greeter.json
    echo '{"system": "Greet {{ name }}."}' | meshproxy templates put greeter --file - --account acme
    """
    fields = check_template(_template_json(args.name, _read(args.file)), partial=False)
    async with open_administration(args) as administration:
        out.print_record(await administration.put_template(args.account, args.name, fields))


async def list_templates(args: argparse.Namespace, out: Output) -> None:
    """List the templates that an account can use, or all templates.

    meshproxy templates list                            templates of every account, and global ones
    meshproxy templates list --account acme             only those that acme can use
    """
    async with open_administration(args) as administration:
        out.print_rows(await administration.templates(args.account), COLUMNS, empty="no templates")


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show a template.

    meshproxy templates show greeter --json > greeter.json
    """
    async with open_administration(args) as administration:
        out.print_record(to_public(await administration.template(args.account, args.name)))


async def delete(args: argparse.Namespace, out: Output) -> None:
    """Delete a template of this account, or a global one.

    meshproxy templates delete greeter --account acme
    """
    async with open_administration(args) as administration:
        out.print_record(await administration.delete_template(args.account, args.name))


async def render_messages(args: argparse.Namespace, out: Output) -> None:
    """Print the messages that a request with these variables would send.

    meshproxy templates render greeter --var name=Ada
    meshproxy templates render greeter --account acme --var name=Ada --json
    """
    async with open_administration(args) as administration:
        template = await administration.template(args.account, args.name)
    messages = render(template, dict(args.var))
    out.print(messages, "\n".join(map(_readable, messages)))


def _readable(message: dict[str, Any]) -> str:
    content = message["content"]
    text = content if isinstance(content, str) else msgspec.json.encode(content).decode()
    return f"[{message['role']}]\n{text}\n"


def _read(path: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise CommandError("unreadable", f"{path}: {error.strerror}") from error


def _template_json(name: str, text: bytes) -> bytes:
    """Return a file's JSON with the name from the command line, without the members that only `show` adds."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return text  # check_template reports what is wrong
    return msgspec.json.encode({**{key: raw for key, raw in fields.items() if key not in SERVER_FIELDS}, "name": name})
