"""`meshproxy requests`: show one request by its id."""

import argparse

from meshproxy.cli.arguments import Output, add_command
from meshproxy.cli.books import open_desk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `requests show`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add_command(commands, "show", show).add_argument(
        "request_id", metavar="REQUEST_ID", help="x-request-id of its answer"
    )


async def show(args: argparse.Namespace, out: Output) -> None:
    """Show one request: its key, model and upstream, how it ended, what it used and cost.

    meshproxy requests show 018f2c6e-7a31
    meshproxy requests show 018f2c6e-7a31 --json | jq -r .cost_usd
    """
    async with open_desk(args) as desk:
        out.record(await desk.request(args.request_id))
