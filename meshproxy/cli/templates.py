"""`meshproxy templates`: stored prompts of accounts, and global ones for all accounts."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from meshproxy.cli.arguments import Operation, account, variable
from meshproxy.cli.command_line import AddTo, CommandError, StoreCommand, add_family, argument, one_of
from meshproxy.policy.template import check_template

COLUMNS = ("name", "owner", "model", "variables", "updated_at", "id")
# set by the gateway; a file from `show --json` has them
SERVER_FIELDS = ("id", "owner", "is_global", "created_at", "updated_at")


def put(args: argparse.Namespace) -> Operation:
    """Create a template, or replace one completely; only its id stays.

    meshproxy templates put greeter --file greeter.json
    echo '{"system": "Greet {{ name }}."}' | meshproxy templates put greeter --file - --account acme
    """
    fields = check_template(_template_json(args.name, _read(args.file)), partial=False)
    return lambda administration: administration.put_template(args.account, args.name, fields)


def list_templates(args: argparse.Namespace) -> Operation:
    """List the templates that an account can use, or all templates.

    meshproxy templates list                            templates of every account, and global ones
    meshproxy templates list --account acme             only those that acme can use
    """
    return lambda administration: administration.templates(args.account)


def show(args: argparse.Namespace) -> Operation:
    """Show a template.

    meshproxy templates show greeter --json > greeter.json
    """
    return lambda administration: administration.template(args.account, args.name)


def delete(args: argparse.Namespace) -> Operation:
    """Delete a template of this account, or a global one.

    meshproxy templates delete greeter --account acme
    """
    return lambda administration: administration.delete_template(args.account, args.name)


def render_messages(args: argparse.Namespace) -> Operation:
    """Print the messages that a request with these variables would send.

    meshproxy templates render greeter --var name=Ada
    meshproxy templates render greeter --account acme --var name=Ada --json
    """
    return lambda administration: administration.rendered(args.account, args.name, dict(args.var))


def _readable(messages: Sequence[dict[str, Any]]) -> str:
    """Return messages as text."""
    contents = [(message["role"], message["content"]) for message in messages]
    return "\n".join(
        f"[{role}]\n{content if isinstance(content, str) else msgspec.json.encode(content).decode()}\n"
        for role, content in contents
    )


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


def _owner(meaning: str) -> AddTo:
    is_global = argument(
        "--global", dest="account", action="store_const", const=None, help="a global template (the default)"
    )
    return one_of(argument("--account", metavar="NAME", type=account, help=meaning), is_global)


FILE = argument(
    "--file",
    metavar="FILE",
    required=True,
    help="JSON with system, messages, model, params, variables and description; - reads stdin",
)
VAR = argument(
    "--var",
    metavar="NAME=TEXT",
    type=variable,
    action="append",
    default=[],
    help="the value of a slot; may be repeated",
)
NAME = argument("name", metavar="NAME", help="the template's name or id")
OWNED = _owner("the account that owns it")
USED = _owner("the template that this account would use: its own, else a global one")
USABLE = argument("--account", metavar="NAME", type=account, help="only templates that this account can use")

TEMPLATES = {
    "put": StoreCommand(put, [argument("name", metavar="NAME", help="the template's name"), FILE, OWNED]),
    "list": StoreCommand(list_templates, [USABLE], COLUMNS, "no templates"),
    "render": StoreCommand(render_messages, [VAR, NAME, USED], text=_readable),
    "show": StoreCommand(show, [NAME, USED]),
    "delete": StoreCommand(delete, [NAME, OWNED]),
}
add_templates = partial(add_family, commands=TEMPLATES)
