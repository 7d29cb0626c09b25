"""A gateway with everything on, a little of every kind of load, and a real Prometheus that scrapes it every second.

For the test that runs every query of every panel, and for preview.py. Nothing here needs the network.
"""

import asyncio
import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).parent.parent
WINDOW = "10s"  # what $__rate_interval becomes: some scrapes' worth
START_S = 15.0
TIDE_S = 9.0
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"

# (model, fields, seconds between two): something of all that is counted.
STREAM: dict[str, Any] = {"stream": True}
MIX: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("openai/gpt-4o", STREAM, 0.25),
    ("openai/gpt-4o-mini", STREAM, 0.4),
    ("sim/fast", {}, 0.2),
    ("sim/fast", STREAM, 0.3),
    ("sim/tokens-200", STREAM | {"max_tokens": 1000}, 1.5),
    ("sim/cached", {}, 1.0),
    ("sim/reasoning", STREAM, 1.0),
    ("sim/no-usage", STREAM, 0.9),
)
TROUBLE: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("sim/error-500", {}, 0.9),
    ("sim/error-429", {}, 1.3),
    ("sim/error-400", {}, 1.7),
    ("sim/refuse", {}, 1.9),
    ("sim/die-mid-stream", STREAM, 1.1),
    ("no/such-model", {}, 1.0),
)


class Gateway:
    """`meshproxy dev` and its keys. `cli` runs another command on its store."""

    def __init__(self, told: dict[str, str]) -> None:
        self.base_url, self.admin_url = told["base_url"], told["admin_url"]
        self.admin = urllib.parse.urlsplit(self.admin_url).netloc
        self.key = told["key"]
        self._redis = told["redis_url"]

    def cli(self, *args: str) -> dict[str, Any]:
        """A command's answer."""
        command = (sys.executable, "-m", "meshproxy", *args, "--redis", self._redis, "--json")
        said = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603 - our own program
        answer: dict[str, Any] = json.loads(said.splitlines()[0])
        return answer

    def mint(self, account: str, credit: str, *limits: str) -> str:
        """The secret of a new key, its account's credit granted."""
        secret = str(self.cli("keys", "create", "--account", account, *limits)["key"])
        if float(credit):
            self.cli("credits", "grant", account, credit)
        return secret

    def metrics(self, accept: str = "text/plain") -> str:
        """One scrape."""
        request = urllib.request.Request(f"{self.admin_url}metrics", headers={"accept": accept})  # noqa: S310 - loopback
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return str(answer.read().decode())


@contextmanager
def gateway() -> Iterator[Gateway]:
    """`meshproxy dev` on free ports, until the block ends."""
    command = (sys.executable, "-m", "meshproxy", "dev", "--port", "0", "--json")
    env = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:  # noqa: S603
        try:
            yield Gateway(json.loads(process.stdout.readline() if process.stdout else b""))
        finally:
            process.terminate()


class Prometheus:
    """A running server, by its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: object) -> Any:
        """The data of an answer; ValueError with Prometheus' own words for a bad query."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}") as answer:  # noqa: S310 - loopback
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error)["error"]) from error

    def range(self, query: str, start: float, end: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """The series of a query over time."""
        series: list[dict[str, Any]] = self.get("query_range", query=query, start=start, end=end, step=step_s)["result"]
        return series


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    """Debian's Prometheus with the rules of deploy/prometheus, scraping `target` every second into `directory`."""
    for name in ("recording.yml", "alerts.yml"):
        shutil.copy(ROOT / "deploy" / "prometheus" / name, directory)
    _hasten(directory / "recording.yml")
    text = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    for said, meant in (
        ("127.0.0.1:8081", target),
        ("interval: 15s", "interval: 1s"),
        ("interval: 30s", "interval: 1s"),
    ):
        text = text.replace(said, meant)
    (directory / "prometheus.yml").write_text(text)
    with started(directory) as server:
        yield server


@contextmanager
def started(directory: Path) -> Iterator[Prometheus]:
    """Start Debian's Prometheus with the configuration in `directory`; it has scraped twice when the block begins."""
    port = _free_port()
    command = (
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        "--log.level=error",
    )
    with (directory / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:  # noqa: S603
        try:
            server = Prometheus(f"http://127.0.0.1:{port}")
            _wait_for(server)
            yield server
        finally:
            process.terminate()


async def load(gate: Gateway, duration_s: float, *, trouble_every: float = 1) -> tuple[float, float]:
    """A little of everything for so long: good answers, errors, 402, 429, and clients that hang up. `trouble_every`: how many
    times rarer errors are than usual. Returns when it began and when it asked for the last time, in Unix seconds.
    """
    busy = gate.mint("busy", "25.00", "--requests-per-minute", "100000", "--tokens-per-minute", "100000000")
    poor = gate.mint("poor", "0")
    slow = gate.mint("slow", "5.00", "--requests-per-minute", "30", "--burst", "1")
    spent = gate.mint("spent", "5.00", "--budget", "0.000001")
    gate.cli("accounts", "limits", "busy", "--budget-monthly", "50.00")
    short = gate.mint("short", "0.0012")
    async with aiohttp.ClientSession(gate.base_url + "/", headers={"traceparent": TRACEPARENT}) as http:
        kinds = [
            *((busy, {"model": model, **fields}, every_s) for model, fields, every_s in MIX),
            *((busy, {"model": model, **fields}, every_s * trouble_every) for model, fields, every_s in TROUBLE),
            (poor, {"model": "sim/fast"}, 1.1),
            (slow, {"model": "sim/fast"}, 0.7),
            (spent, {"model": "sim/fast"}, 1.2),
            (short, {"model": "sim/tokens-200", "stream": True, "max_tokens": 5000}, 3.0),
            ("rsk_nobody", {"model": "sim/fast"}, 2.0),
        ]
        began_at = time.time()
        ends_at = time.monotonic() + duration_s
        async with asyncio.TaskGroup() as group:
            for key, fields, every_s in kinds:
                group.create_task(_repeat(group, ends_at, every_s, http, key, fields))
            group.create_task(_hang_up_again_and_again(ends_at, http, busy))
            group.create_task(_look_around(ends_at, http, gate.key))
    return began_at, began_at + duration_s


async def _repeat(
    group: asyncio.TaskGroup,
    ends_at: float,
    every_s: float,
    http: aiohttp.ClientSession,
    key: str,
    fields: dict[str, Any],
) -> None:
    """However long each takes, at a pace that comes and goes."""
    while time.monotonic() < ends_at:
        group.create_task(_ask(http, key, fields))
        left_s = ends_at - time.monotonic()
        await asyncio.sleep(min(every_s * (1 + 0.5 * math.sin(left_s / TIDE_S)), max(left_s, 0)))


async def _ask(http: aiohttp.ClientSession, key: str, fields: dict[str, Any]) -> None:
    with contextlib.suppress(aiohttp.ClientError):
        async with _asked(http, key, fields) as answer:
            await answer.read()


@asynccontextmanager
async def _asked(
    http: aiohttp.ClientSession, key: str, fields: dict[str, Any]
) -> AsyncIterator[aiohttp.ClientResponse]:
    body = {"messages": [{"role": "user", "content": "Tell me of the sea."}], **fields}
    async with http.post("chat/completions", json=body, headers={"authorization": f"Bearer {key}"}) as answer:
        yield answer


async def _hang_up_again_and_again(ends_at: float, http: aiohttp.ClientSession, key: str) -> None:
    while time.monotonic() < ends_at:
        async with _asked(http, key, {"model": "openai/gpt-4o", "stream": True}) as answer:
            await answer.content.readany()
            answer.close()
        await asyncio.sleep(0.8)


async def _look_around(ends_at: float, http: aiohttp.ClientSession, key: str) -> None:
    while time.monotonic() < ends_at:
        for path in ("models", "models/openai/gpt-4o", "templates", "usage", "key", "nowhere"):
            async with http.get(path, headers={"authorization": f"Bearer {key}"}) as answer:
                await answer.read()
        await asyncio.sleep(0.5)


def queries(board: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each query of a dashboard: its panel, and its target with the variables filled in."""
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel, {**target, "expr": filled(target["expr"])}


def filled(expr: str) -> str:
    """A query as Grafana would send it."""
    for variable, value in (
        ("$__rate_interval", WINDOW),
        ("$__range", "1m"),
        ("$job", ".+"),
        ("$instance", ".+"),
        ("$model", ".+"),
        ("$account", ".+"),
    ):
        expr = expr.replace(variable, value)
    return expr


def _hasten(rules: Path) -> None:
    rules.write_text(rules.read_text().replace("interval: 5m", "interval: 1s"))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_for(server: Prometheus) -> None:
    """Until it has scraped the gateway twice."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if server.get("query", query="count_over_time(up[1m]) >= 2")["result"]:
                return
        time.sleep(0.1)
    raise TimeoutError("Prometheus has scraped nothing")
