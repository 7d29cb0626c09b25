"""`meshproxy healthcheck`, for a container's HEALTHCHECK.

It runs every few seconds, so it loads no HTTP library except the standard one.
"""

import argparse
import http.client
import socket

from meshproxy.cli.arguments import Failed, Output, load_settings, make_command
from meshproxy.config import split_address

TIMEOUT_S = 2.0
REQUEST = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `healthcheck`."""
    make_command(parser, healthcheck)


def healthcheck(args: argparse.Namespace, out: Output) -> None:
    """GET /readyz of server.admin_listen: exit 0 if it answers 200 within two seconds, else 1.

    meshproxy healthcheck --config meshproxy.toml
    HEALTHCHECK CMD ["meshproxy", "healthcheck"]        in a Dockerfile
    """
    address = load_settings(args).server.admin_listen
    try:
        status = ready_status(address)
    except (OSError, http.client.HTTPException) as error:
        raise Failed("not_ready", f"{address} doesn't answer: {error}") from error
    if status != 200:
        raise Failed("not_ready", f"{address} answers {status}")
    out.told({"ready": True, "address": address}, "ready")


def ready_status(address: str) -> int:
    """Return the status of GET /readyz at an address in the configuration's format."""
    with _connection(address) as connection:
        connection.sendall(REQUEST)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status


def _connection(address: str) -> socket.socket:
    if not address.startswith("unix:"):
        host, port = split_address(address)
        loopback = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  every interface has this one too
        return socket.create_connection((loopback.get(host, host), port), timeout=TIMEOUT_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    connection.connect(address.removeprefix("unix:"))
    return connection
