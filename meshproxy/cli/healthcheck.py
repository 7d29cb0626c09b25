"""`meshproxy healthcheck`: for a container's HEALTHCHECK. It runs every few seconds, so it loads no HTTP library
but the standard one.
"""

import argparse
import http.client
import socket

from meshproxy.cli.arguments import add_common
from meshproxy.cli.configuration import load
from meshproxy.cli.output import Failed, Output
from meshproxy.config import split_address

TIMEOUT_S = 2.0

EXAMPLES = """\
  meshproxy healthcheck --config meshproxy.toml
  HEALTHCHECK CMD ["meshproxy", "healthcheck"]        in a Dockerfile
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`healthcheck`"""
    parser.description = "GET /readyz of server.admin_listen: exit 0 if it answers 200 within two seconds, else 1."
    add_common(parser, healthcheck, examples=EXAMPLES)


def healthcheck(args: argparse.Namespace, out: Output) -> None:
    """Failed unless the gateway says that it is ready."""
    address = load(args).server.admin_listen
    try:
        status = ready_status(address)
    except (OSError, http.client.HTTPException) as error:
        raise Failed("not_ready", f"{address} doesn't answer: {error}") from error
    if status != 200:
        raise Failed("not_ready", f"{address} answers {status}")
    if out.as_json:
        out.document({"ready": True, "address": address})
    else:
        out.line("ready")


def ready_status(address: str) -> int:
    """The status that GET /readyz gets at an address as configurations write it."""
    connection = _connection(address)
    try:
        connection.request("GET", "/readyz", headers={"host": "localhost", "connection": "close"})
        return connection.getresponse().status
    finally:
        connection.close()


def _connection(address: str) -> http.client.HTTPConnection:
    if address.startswith("unix:"):
        return _UnixConnection(address.removeprefix("unix:"))
    host, port = split_address(address)
    loopback = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  every interface has this one too
    return http.client.HTTPConnection(loopback.get(host, host), port, timeout=TIMEOUT_S)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)
