"""`meshproxy check`: would this configuration serve?"""

import argparse

from meshproxy import app
from meshproxy.cli.arguments import add_common
from meshproxy.cli.configuration import required
from meshproxy.cli.output import Output

EXAMPLES = """\
  meshproxy check --config meshproxy.toml && systemctl reload meshproxy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`check --config FILE`"""
    parser.description = (
        "Print `ok` and exit 0 if the configuration can be used, secrets and certificate\n"
        "included; else print every fault, one a line, and exit 78."
    )
    add_common(parser, check, examples=EXAMPLES)


def check(args: argparse.Namespace, out: Output) -> None:
    """Unfit, with every fault, unless the file can be served."""
    settings, _ = app.load(required(args))
    if out.as_json:
        out.document({"ok": True, "upstreams": list(settings.upstreams), "models": list(settings.models)})
    else:
        out.line("ok")
