"""`meshproxy serve`: the gateway itself."""

import argparse

from meshproxy import app
from meshproxy.cli.arguments import add_common
from meshproxy.cli.configuration import required
from meshproxy.cli.output import Output

EXAMPLES = """\
  meshproxy serve --config /etc/meshproxy/meshproxy.toml
  kill -HUP PID       read the configuration again; a bad one changes nothing
  kill -TERM PID      finish the running streams, settle, and exit 0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`serve --config FILE`"""
    parser.description = "Run the gateway until SIGTERM or SIGINT."
    add_common(parser, serve, examples=EXAMPLES)


def serve(args: argparse.Namespace, _out: Output) -> int:
    """Hand over to the composition root; its exit code."""
    return app.serve(required(args))
