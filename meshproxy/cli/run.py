"""`meshproxy check`, `serve` and `simulate`."""

import argparse
import asyncio

import msgspec

from meshproxy.app import serve as process
from meshproxy.app.reload import load
from meshproxy.cli.arguments import Failed, Misused, Output, make_command, port
from meshproxy.simulator import SimulatorSettings, start
from meshproxy.simulator.behaviour import DIALECT_NAMES, FAMILIES, PREFIX, TRAITS


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check --config FILE`."""
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


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve --config FILE`."""
    make_command(parser, serve, configured=True)
    parser.add_argument(
        "--watch", action="store_true", help="reload when the file, or a secret or certificate that it names, changes"
    )


def serve(args: argparse.Namespace, _out: Output) -> int:
    """Run the gateway until SIGTERM or SIGINT.

    meshproxy serve --config /etc/meshproxy/meshproxy.toml
    kill -HUP PID       read the configuration again; a bad one changes nothing
    kill -TERM PID      finish the running streams, settle, and exit 0
    """
    return process.serve(args.config, watch=args.watch)


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `simulate --port N`."""
    make_command(parser, simulate)
    listed = "\n".join(f"  {PREFIX + name:<26}{what}" for name, what in (TRAITS | FAMILIES | DIALECT_NAMES).items())
    parser.description = f"{parser.description}\n\n{listed}"
    defaults = SimulatorSettings()
    pace, first_s = defaults.tokens_per_second, defaults.first_token_s
    parser.add_argument("--port", metavar="N", type=port, required=True, help="0: any free one")
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument(
        "--tokens-per-second", metavar="N", type=float, default=pace, help=f"pace of the answers (default: {pace:g})"
    )
    parser.add_argument(
        "--first-token",
        metavar="SECONDS",
        type=float,
        dest="first_token_s",
        default=first_s,
        help=f"delay of the first (default: {first_s:g})",
    )
    parser.add_argument("--api-key", metavar="KEY", help="the only bearer token let in (default: everyone is)")
    parser.add_argument("--openrouter", action="store_true", help="take `models` and `transforms`, as OpenRouter does")


async def simulate(args: argparse.Namespace, out: Output) -> None:
    """Serve OpenAI's chat completions from a simulated provider, until interrupted. Any model is served. The models
    below cause faults, alone or joined by +, and take options as in sim/slow?tokens=5:

    meshproxy simulate --port 9100
    meshproxy simulate --port 9100 --tokens-per-second 5 --first-token 2
    curl -s http://127.0.0.1:9100/v1/models             every model, with what goes wrong with it
    """
    try:
        settings = msgspec.convert(vars(args), SimulatorSettings)
    except msgspec.ValidationError as error:
        raise Misused(str(error)) from error
    try:
        running = await start(args.host, args.port, settings)
    except OSError as error:
        raise Failed("cannot_listen", f"{args.host}:{args.port}: {error.strerror or error}") from error
    try:
        out.told({"base_url": running.base_url}, f"The simulated provider is at {running.base_url}. Ctrl-C ends it.")
        await asyncio.Event().wait()
    finally:
        await running.close()
