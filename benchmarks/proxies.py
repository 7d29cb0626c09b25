"""The proxies under test, the upstreams behind them, and how each is configured: for what it does best, one worker each.

A proxy that has no idea of models gets two ports, one for each upstream; meshproxy picks by the model.
"""

import asyncio
import contextlib
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from benchmarks.processes import OTHER_CORE, PROXY_CORE, Process, free_ports, program
from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.policy.principal import Limits

PLENTY = 1_000_000_000
PLENTY_NUSD = 10**15
STREAM_MODELS = ("sse-100x10", "sse-100x40", "sse-500x10", "sse-100x0", "sse-2x60000")
UNARY_MODEL = "small"
ANSWER = (
    '{"id":"chatcmpl-BlJh2mVnyTqCkSgW0aXeUdRfPz","object":"chat.completion","created":1764000000,"model":"small",'
    '"choices":[{"index":0,"message":{"role":"assistant","content":"The quick brown fox jumps over the lazy dog.",'
    '"refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":12,'
    '"completion_tokens":10,"total_tokens":22,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},'
    '"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,'
    '"rejected_prediction_tokens":0}},"service_tier":"default","system_fingerprint":"fp_07871e2ad8"}'
)


@dataclass(frozen=True)
class Upstreams:
    """Ports of what every proxy stands before."""

    unary: int
    streams: int


@dataclass(frozen=True)
class Proxy:
    """A proxy that is up; without a process it is the upstreams themselves. `key` is the caller's, `empty_key` one whose
    request bucket is always empty, where such things are known. `share`: how much of a case's load it can be asked to take.
    """

    name: str
    process: Process | None
    unary_port: int
    stream_port: int
    key: str = "rsk_" + "x" * 43
    empty_key: str | None = None
    share: float = 1.0
    warm_up_s: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)  # besides the key, for whole answers
    stream_headers: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, str] = ("", "")  # before the model's name, of whole answers and of streams

    def cpu_s(self) -> float:
        """Seconds of CPU so far."""
        return self.process.cpu_s() if self.process is not None else 0.0

    def rss_bytes(self) -> int:
        """Memory now."""
        return self.process.rss_bytes() if self.process is not None else 0


Start = Callable[[Upstreams, Path], AbstractContextManager[Proxy]]


@contextmanager
def upstreams(directory: Path) -> Iterator[Upstreams]:
    """nginx for whole answers, which costs it some 10 us each, and the raw protocol of `upstream.py` for streams."""
    unary, streams = free_ports(2)
    answer = f"default_type application/json; return 200 '{ANSWER}';"
    conf = directory / "upstream.conf"
    conf.write_text(
        nginx_conf(directory, "upstream", [f"server {{ listen 127.0.0.1:{unary}; location / {{ {answer} }} }}"])
    )
    with (
        Process([program("nginx"), "-c", str(conf)], OTHER_CORE, [unary]),
        Process([sys.executable, "-m", "benchmarks.upstream", str(streams)], OTHER_CORE, [streams]),
    ):
        yield Upstreams(unary, streams)


@contextmanager
def nginx(behind: Upstreams, directory: Path) -> Iterator[Proxy]:
    """A plain reverse proxy: kept connections upstream, nothing buffered, nothing logged."""
    ports = free_ports(2)
    servers = []
    for port, upstream in zip(ports, (behind.unary, behind.streams), strict=True):
        passing = f'proxy_pass http://u{upstream}; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;'
        servers += [
            f"upstream u{upstream} {{ server 127.0.0.1:{upstream}; keepalive 2048; keepalive_requests 1000000000; }}",
            f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ {passing} }} }}",
        ]
    conf = directory / "nginx.conf"
    conf.write_text(nginx_conf(directory, "nginx", servers))
    with Process([program("nginx"), "-c", str(conf)], PROXY_CORE, ports) as process:
        yield Proxy("nginx", process, ports[0], ports[1])


def nginx_conf(directory: Path, name: str, servers: list[str]) -> str:
    """One worker, no logs, connections kept for ever; bodies up to 1 MiB stay in memory."""
    temp = "\n".join(
        f"{kind}_temp_path {directory}/{name}-{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""\
daemon off; worker_processes 1; pid {directory}/{name}.pid; error_log /dev/null; worker_rlimit_nofile 20000;
events {{ worker_connections 10000; }}
http {{
access_log off; tcp_nodelay on; keepalive_requests 1000000000; keepalive_timeout 1h; proxy_read_timeout 1h;
client_body_buffer_size 1m; client_max_body_size 32m;
{temp}
{chr(10).join(servers)}
}}
"""


@contextmanager
def haproxy(behind: Upstreams, directory: Path) -> Iterator[Proxy]:
    """One thread, connections shared."""
    ports = free_ports(2)
    parts = "".join(
        f"listen p{port}\n  bind 127.0.0.1:{port} backlog 4096\n  server u 127.0.0.1:{upstream} pool-max-conn -1\n"
        for port, upstream in zip(ports, (behind.unary, behind.streams), strict=True)
    )
    conf = directory / "haproxy.cfg"
    conf.write_text(
        "global\n  nbthread 1\n  maxconn 8000\n"
        "defaults\n  mode http\n  http-reuse always\n  option http-no-delay\n"
        "  timeout client 1h\n  timeout server 1h\n  timeout connect 5s\n" + parts
    )
    with Process([program("haproxy"), "-q", "-db", "-f", str(conf)], PROXY_CORE, ports) as process:
        yield Proxy("haproxy", process, ports[0], ports[1])


def naive(behind: Upstreams, _directory: Path) -> AbstractContextManager[Proxy]:
    """See naive.py."""
    return _of_ours("naive", "naive aiohttp", behind)


def pipe(behind: Upstreams, _directory: Path) -> AbstractContextManager[Proxy]:
    """See pipe.py."""
    return _of_ours("pipe", "bare uvloop pipe", behind)


@contextmanager
def _of_ours(module: str, name: str, behind: Upstreams) -> Iterator[Proxy]:
    ports = free_ports(2)
    pairs = [str(port) for pair in zip(ports, (behind.unary, behind.streams), strict=True) for port in pair]
    with Process([sys.executable, "-m", f"benchmarks.{module}", *pairs], PROXY_CORE, ports) as process:
        yield Proxy(name, process, ports[0], ports[1])


@contextmanager
def meshproxy(behind: Upstreams, directory: Path, *, workers: int = 1) -> Iterator[Proxy]:
    """Everything on: keys, four buckets, credit, usage, metrics, and the log of requests in a file."""
    port, admin_port, redis_port = free_ports(3)
    conf = directory / "meshproxy.toml"
    conf.write_text(meshproxy_conf(behind, port, admin_port, redis_port, workers))
    with ExitStack() as stack:
        options = ["--port", str(redis_port), "--save", "", "--bind", "127.0.0.1", "--dir", str(directory)]
        stack.enter_context(Process([program("redis-server"), *options], OTHER_CORE, [redis_port]))
        keys = asyncio.run(_mint_keys(redis_port))
        argv = [sys.executable, "-m", "meshproxy", "serve", "--config", str(conf)]
        log = directory / "meshproxy.log"
        process = stack.enter_context(Process(argv, PROXY_CORE, [port, admin_port], stderr=log))
        _wait_until_ready(admin_port)
        yield Proxy("meshproxy", process, port, port, *keys)


def meshproxy_conf(behind: Upstreams, port: int, admin_port: int, redis_port: int, workers: int) -> str:
    """A configuration with both upstreams, and a model for each kind of stream."""
    models = [(UNARY_MODEL, "unary"), *((name, "streams") for name in STREAM_MODELS)]
    entries = "".join(
        f'[models."{name}"]\nupstreams = [{{ upstream = "{upstream}", model = "{name}" }}]\n'
        'input_usd_per_mtok = "2.50"\noutput_usd_per_mtok = "10.00"\n'
        for name, upstream in models
    )
    return f"""\
[server]
listen = "127.0.0.1:{port}"
admin_listen = "127.0.0.1:{admin_port}"
workers = {workers}
[redis]
url = "redis://127.0.0.1:{redis_port}/0"
[defaults]
requests_per_minute = {PLENTY}
tokens_per_minute = {PLENTY * 1000}
[upstreams.unary]
kind = "openai"
base_url = "http://127.0.0.1:{behind.unary}/v1"
[upstreams.streams]
kind = "openai"
base_url = "http://127.0.0.1:{behind.streams}/v1"
max_connections = 4096
{entries}"""


async def _mint_keys(redis_port: int) -> tuple[str, str]:
    """A key that may do anything, and one whose bucket holds a single request a minute, both of accounts with credit."""
    store = await connect(Redis(url=f"redis://127.0.0.1:{redis_port}/0"))
    directory, ledger = Directory(store), Ledger(store)
    free, _ = await directory.create_key("free")
    await directory.ensure_account("free")
    await directory.change_account("free", lambda account: replace(account, limits=Limits(PLENTY, PLENTY * 1000)))
    bound, _ = await directory.create_key("bound", limits=Limits(requests_per_minute=1, burst=1))
    for account in ("free", "bound"):
        await ledger.grant(account, PLENTY_NUSD)
    await store.close()
    return free, bound


def _wait_until_ready(admin_port: int) -> None:
    """It listens before it has reached Redis; until then it answers 503."""
    for _ in range(100):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/readyz"),
        ):
            return
        time.sleep(0.05)
    raise RuntimeError("meshproxy did not become ready")


def own() -> list[Start]:
    """Return how to start the proxies that need no gateway of others."""
    return [nginx, haproxy, meshproxy, naive, pipe]
