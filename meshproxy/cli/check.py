"""`meshproxy check`: would this configuration serve?"""

import argparse

from meshproxy.app.load import load
from meshproxy.cli.arguments import make_command
from meshproxy.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`check --config FILE`"""
    make_command(parser, check, configured=True)


def check(args: argparse.Namespace, out: Output) -> None:
    """Print `ok` and exit 0 if the configuration can be served, secrets and the files that it
    names included, with what is likely a mistake on stderr; else print every fault, one a line,
    and exit 78.

    meshproxy check --config meshproxy.toml && systemctl reload meshproxy
    """
    loaded = load(args.config)
    settings, warnings = loaded.settings, loaded.warnings
    out.warned(warnings)
    document = {"ok": True, "upstreams": list(settings.upstreams), "models": list(settings.models)}
    out.told({**document, "warnings": warnings} if warnings else document, "ok")
