"""Real balancers in front: what one of them passes on as a request, the gateway takes for that request and for no other.

The corpus goes through each; its log of what it sent on is compared with what the gateway counted, case by case.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshproxy.policy.principal import Limits
from tests.harness.process import Program, program
from tests.harness.waiting import until
from tests.hostile.corpus import BODY, CASES, END

PATIENCE_S = 10.0
CLOSED_S = 0.3  # by then a balancer has answered what it will; some wait for more of a body
FREE = Limits(1_000_000, 1_000_000_000, 1_000_000)
MESSAGES = json.loads(BODY)["messages"]
FLUSH = b"GET /flush HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n"

HAPROXY = """
global
  nbthread 1
  log stdout format raw local0
defaults
  mode http
  log global
  log-format "%ST %s %HU"
  timeout client 5s
  timeout server 5s
  timeout connect 5s
  timeout http-request 5s
  retries 0
  option http-keep-alive
  http-reuse always
frontend front
  {options}
  bind unix@{socket}
  default_backend back
backend back
  server mesh {host}:{port}
"""
NGINX = """
daemon off;
master_process off;
pid {directory}/pid;
error_log /dev/null;
events {{}}
http {{
  log_format sent '$upstream_status mesh $request_uri';
  access_log {directory}/log sent;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  upstream mesh {{ server {host}:{port}; keepalive 8; }}
  server {{
    listen unix:{socket};
    merge_slashes off;
    ignore_invalid_headers {options};
    underscores_in_headers on;
    location / {{
      proxy_pass http://mesh;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_request_buffering off;
      proxy_buffering off;
      proxy_next_upstream off;
    }}
  }}
}}
"""


BALANCERS = {
    "haproxy": (HAPROXY, "no option accept-invalid-http-request"),
    "haproxy-lenient": (HAPROXY, "option accept-invalid-http-request"),
    "nginx": (NGINX, "on"),
    "nginx-lenient": (NGINX, "off"),
}


class Balancer:
    """A process that logs `STATUS SERVER URI` for each request: what it got from which server."""

    def __init__(self, socket: Path, log: Path) -> None:
        self._socket = socket
        self._log = log.open(encoding="latin-1")

    async def send(self, data: bytes) -> bytes:
        """Send bytes on a connection of their own, and read until it is closed or nothing more comes."""
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(data)
            async with asyncio.timeout(CLOSED_S):
                return await reader.read(-1)
        except (TimeoutError, ConnectionError):
            return b""
        finally:
            writer.close()

    async def sent_on(self) -> Counter[str]:
        """How the gateway answered what was sent on to it since this was asked last."""
        await self.send(FLUSH)
        statuses: Counter[str] = Counter()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                line = await until(self._log.readline, "its log", poll_s=0.001)
                status, _, rest = line.partition(" ")
                if rest == "mesh /flush\n":
                    return statuses
                if rest.startswith("mesh ") and status != "-":
                    statuses[status] += 1


@pytest.mark.parametrize("name", BALANCERS)
async def test_what_one_of_them_passes_on_is_read_as_it_was_sent(mesh, tmp_path_factory, name):
    config, options = BALANCERS[name]
    caller = await mesh.key(credit="100", limits=FREE)
    misread = {}
    async with _running(name.partition("-")[0], config, options, mesh, tmp_path_factory.mktemp("b")) as balancer:
        before = await mesh.counted()
        for case, (data, _) in CASES.items():
            await balancer.send(data.replace(b"KEY", caller.secret.encode()) + END)
            sent_on = await balancer.sent_on()
            await mesh.quiet()
            now = await mesh.counted()
            counted = now - before - Counter({"404": 1})  # the flush
            before = now
            unanswered = Counter({"other": counted["other"]})  # the balancer hung up on what it had begun to send
            if sent_on.total() != counted.total() or counted - sent_on != unanswered:
                misread[case] = (dict(sent_on), dict(counted))
    assert misread == {}
    served = [entry for entry in mesh.received if entry.status == 200]
    assert served
    assert [entry.raw_body for entry in served if json.loads(entry.raw_body)["messages"] != MESSAGES] == []


@asynccontextmanager
async def _running(name, config, options, mesh, directory) -> AsyncIterator[Balancer]:
    path = program(name)
    socket, file = directory / "socket", directory / "config"
    file.write_text(config.format(host=mesh.host, port=mesh.port, socket=socket, directory=directory, options=options))
    flags = ["-db", "-f", str(file)] if name == "haproxy" else ["-c", str(file)]
    with Program(path, *flags, log=directory / "log") as running:
        await running.until(socket.exists)
        yield Balancer(socket, running.log)
