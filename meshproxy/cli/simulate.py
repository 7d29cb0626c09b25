"""`meshproxy simulate`: the simulated provider alone."""

import argparse
import asyncio

import msgspec

from meshproxy.cli.arguments import add_common, port
from meshproxy.cli.output import Failed, Misused, Output
from meshproxy.upstream.simulator import SimulatorSettings, start
from meshproxy.upstream.simulator.behaviour import FAMILIES, PREFIX, TRAITS

EXAMPLES = """\
  meshproxy simulate --port 9100
  meshproxy simulate --port 9100 --tokens-per-second 5 --first-token 2
  curl -s http://127.0.0.1:9100/v1/models             every model, with what goes wrong with it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`simulate --port N`"""
    listed = "\n".join(f"  {PREFIX + name:<26}{what}" for name, what in (TRAITS | FAMILIES).items())
    parser.description = (
        "Serve OpenAI's chat completions from a simulated provider, until interrupted. Any model is served;\n"
        f"these misbehave, alone or joined by +, and take options as in sim/slow?tokens=5:\n\n{listed}"
    )
    add_common(parser, simulate, examples=EXAMPLES)
    defaults = SimulatorSettings()
    parser.add_argument("--port", metavar="N", type=port, required=True, help="0: any free one")
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument(
        "--tokens-per-second",
        metavar="N",
        type=float,
        default=defaults.tokens_per_second,
        help=f"pace of the answers (default: {defaults.tokens_per_second:g})",
    )
    parser.add_argument(
        "--first-token",
        metavar="SECONDS",
        type=float,
        default=defaults.first_token_s,
        dest="first_token_s",
        help=f"delay of the first (default: {defaults.first_token_s:g})",
    )
    parser.add_argument("--api-key", metavar="KEY", help="the only bearer token let in (default: everyone is)")
    parser.add_argument("--openrouter", action="store_true", help="take `models` and `transforms`, as OpenRouter does")


async def simulate(args: argparse.Namespace, out: Output) -> None:
    """Serve until interrupted."""
    try:
        settings = msgspec.convert(vars(args), SimulatorSettings)
    except msgspec.ValidationError as error:
        raise Misused(str(error)) from error
    try:
        running = await start(args.host, args.port, settings)
    except OSError as error:
        raise Failed("cannot_listen", f"{args.host}:{args.port}: {error.strerror or error}") from error
    try:
        if out.as_json:
            out.document({"base_url": running.base_url})
        out.line(f"The simulated provider is at {running.base_url}. Ctrl-C ends it.")
        out.flush()
        await asyncio.Event().wait()
    finally:
        await running.close()
