"""`meshproxy serve`, `check`, `simulate` and `healthcheck`.

What a command runs is imported only by it: a health check runs every few seconds and loads no HTTP library except the
standard one.
"""

import argparse
import asyncio
import http.client
import socket

import msgspec

from meshproxy.cli.arguments import load_settings, port
from meshproxy.cli.command_line import CommandError, Output, UsageError, make_command
from meshproxy.config import split_address

READY_TIMEOUT_S = 2.0
READY_REQUEST = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check --config FILE`."""
    make_command(parser, check, needs_config=True)


def check(args: argparse.Namespace, out: Output) -> None:
    """Check whether a configuration can be served, with the secrets and files that it names.

    Prints `ok` and exits 0, with likely mistakes as warnings on stderr; else prints every fault, one a line, and exits 78.

    meshproxy check --config meshproxy.toml && systemctl reload meshproxy
    """
    from meshproxy.app.load import load  # noqa: PLC0415 - see above

    loaded = load(args.config)
    settings, warnings = loaded.settings, loaded.warnings
    out.print_warnings(warnings)
    document = {"ok": True, "upstreams": list(settings.upstreams), "models": list(settings.models)}
    out.print({**document, "warnings": warnings} if warnings else document, "ok")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve --config FILE`."""
    make_command(parser, serve, needs_config=True)
    parser.add_argument(
        "--watch",
        action="store_true",
        help="reload when the configuration, or a secret or certificate that it names, changes",
    )


def serve(args: argparse.Namespace, _out: Output) -> int:
    """Run the gateway until SIGTERM or SIGINT.

    meshproxy serve --config /etc/meshproxy/meshproxy.toml
    kill -HUP PID       read the configuration again; a bad one changes nothing
    kill -TERM PID      finish the running streams, settle, and exit 0
    """
    from meshproxy.app import serve as process  # noqa: PLC0415 - see above

    return process.serve(args.config, watch=args.watch)


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `simulate --port N`."""
    from meshproxy.simulator import SimulatorSettings  # noqa: PLC0415 - see above
    from meshproxy.simulator.behaviour import DIALECT_NAMES, FAMILIES, PREFIX, TRAITS  # noqa: PLC0415

    make_command(parser, simulate)
    models = "\n".join(f"  {PREFIX + name:<26}{what}" for name, what in (TRAITS | FAMILIES | DIALECT_NAMES).items())
    parser.description = f"{parser.description}\n\n{models}"
    defaults = SimulatorSettings()
    parser.add_argument("--port", metavar="N", type=port, required=True, help="0: any free port")
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument(
        "--tokens-per-second",
        metavar="N",
        type=float,
        default=defaults.tokens_per_second,
        help="speed of the answers (default: %(default)g)",
    )
    parser.add_argument(
        "--first-token",
        metavar="SECONDS",
        type=float,
        dest="first_token_s",
        default=defaults.first_token_s,
        help="time to the first token (default: %(default)g)",
    )
    parser.add_argument("--api-key", metavar="KEY", help="the only accepted API key (default: any is accepted)")
    parser.add_argument(
        "--openrouter", action="store_true", help="accept `models` and `transforms`, as OpenRouter does"
    )


async def simulate(args: argparse.Namespace, out: Output) -> None:
    """Serve OpenAI's chat completions from a simulated provider, until interrupted.

    Any model is served. The models below cause faults, alone or joined by +, and take options as in sim/slow?tokens=5:

    meshproxy simulate --port 9100
    meshproxy simulate --port 9100 --tokens-per-second 5 --first-token 2
    curl -s http://127.0.0.1:9100/v1/models             list every model, with what goes wrong with it
    """
    from meshproxy.simulator import SimulatorSettings, start  # noqa: PLC0415 - see above

    try:
        settings = msgspec.convert(vars(args), SimulatorSettings)
    except msgspec.ValidationError as error:
        raise UsageError(str(error)) from error
    try:
        running = await start(args.host, args.port, settings)
    except OSError as error:
        raise CommandError("cannot_listen", f"{args.host}:{args.port}: {error.strerror or error}") from error
    try:
        out.print({"base_url": running.base_url}, f"The simulated provider is at {running.base_url}. Ctrl-C ends it.")
        await asyncio.Event().wait()
    finally:
        await running.close()


def add_healthcheck(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `healthcheck`."""
    make_command(parser, healthcheck)


def healthcheck(args: argparse.Namespace, out: Output) -> None:
    """Exit 0 if GET /readyz at server.admin_listen answers 200 within two seconds, else 1.

    meshproxy healthcheck --config meshproxy.toml
    HEALTHCHECK CMD ["meshproxy", "healthcheck"]        in a Dockerfile
    """
    address = load_settings(args).server.admin_listen
    try:
        with _connect(address) as connection:
            connection.sendall(READY_REQUEST)
            response = http.client.HTTPResponse(connection)
            response.begin()
    except (OSError, http.client.HTTPException) as error:
        raise CommandError("not_ready", f"{address} doesn't answer: {error}") from error
    if response.status != 200:
        raise CommandError("not_ready", f"{address} answers {response.status}")
    out.print({"ready": True, "address": address}, "ready")


def _connect(address: str) -> socket.socket:
    """Connect to a listener's address. One on every interface is reached by loopback."""
    if not address.startswith("unix:"):
        host, port = split_address(address)
        loopback = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
        return socket.create_connection((loopback.get(host, host), port), timeout=READY_TIMEOUT_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(READY_TIMEOUT_S)
    connection.connect(address.removeprefix("unix:"))
    return connection
