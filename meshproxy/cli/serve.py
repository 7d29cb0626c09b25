"""`meshproxy serve`: the gateway itself."""

import argparse

from meshproxy.app import process
from meshproxy.cli.arguments import make_command
from meshproxy.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`serve --config FILE`"""
    make_command(parser, serve, configured=True)


def serve(args: argparse.Namespace, _out: Output) -> int:
    """Run the gateway until SIGTERM or SIGINT.

    meshproxy serve --config /etc/meshproxy/meshproxy.toml
    kill -HUP PID       read the configuration again; a bad one changes nothing
    kill -TERM PID      finish the running streams, settle, and exit 0
    """
    return process.serve(args.config)
