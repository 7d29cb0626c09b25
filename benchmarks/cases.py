"""The cases, each a load on one proxy and the CPU time that the proxy spent on it."""

import asyncio
import difflib
import http.client
import json
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from benchmarks.arrivals import latencies_s
from benchmarks.processes import OTHER_CORE, PROXY_CORE, Core
from benchmarks.proxies import ANSWER, UNARY_MODEL, Proxy
from benchmarks.streams import Pool
from benchmarks.upstream import ENDING, EVENT

CONNECTIONS = 64
BURSTS_PER_S = 200
FAILED = 0.1  # of a case's streams: where more were refused or cut there is no cost to speak of
GRACE_S = 5.0  # what streams get to end after the last has begun
WORDS = "The quick brown fox jumps over the lazy dog. "
HEADERS = {
    "content-type": "application/json",
    "user-agent": "OpenAI/Python 2.8.1",
    "x-stainless-lang": "python",
    "x-stainless-retry-count": "0",
}


@dataclass
class Result:
    """The result of a case. `us`: the proxy's CPU in microseconds for each of `count` requests or events, if it was measured."""

    count: int
    us: float | None = None
    more: dict[str, float] = field(default_factory=dict)


class Meter:
    """What a proxy spends from now on. Of interest beside it: whether someone else used its core, and whether the other
    core, with upstreams and clients, had time left.
    """

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._proxy_core, self._other_core = Core(PROXY_CORE), Core(OTHER_CORE)
        self._since = time.monotonic()
        self._before_s = proxy.cpu_s()

    def result(self, count: int, **more: float) -> Result:
        """What it spent on doing something `count` times."""
        spent_s = self._proxy.cpu_s() - self._before_s
        took_s = time.monotonic() - self._since
        own = spent_s / took_s
        more |= {
            "per_s": count / took_s,
            "proxy_busy": own,
            "strangers_busy": max(self._proxy_core.busy() - own, 0.0),
            "other_core_busy": self._other_core.busy(),
        }
        return Result(count, spent_s / max(count, 1) * 1e6, more)


def request_body(model: str, prompt: str, *, stream: bool) -> bytes:
    """A chat completion as SDKs send it."""
    fields = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": prompt},
        ],
        "temperature": 0.7,
        "max_tokens": 1000,
    }
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(fields).encode()


def request(model: str, proxy: Proxy, *, stream: bool) -> bytes:
    """The same as bytes of HTTP."""
    body = request_body(proxy.prefixes[stream] + model, WORDS, stream=stream)
    own = proxy.stream_headers if stream else proxy.headers
    headers = {"host": "gateway.test", **HEADERS, **own, "authorization": f"Bearer {proxy.key}"}
    headers |= {"content-length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + body


def unary(
    proxy: Proxy, directory: Path, seconds: int, *, prompt_bytes: int = len(WORDS), key: str | None = None
) -> Result:
    """wrk, 64 connections, as fast as it goes: a request."""
    body = request_body(
        proxy.prefixes[0] + UNARY_MODEL, (WORDS * (prompt_bytes // len(WORDS) + 1))[:prompt_bytes], stream=False
    )
    headers = {**HEADERS, **proxy.headers, "authorization": f"Bearer {key or proxy.key}"}
    lines = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in headers.items())
    script = directory / "request.lua"
    script.write_text(f"wrk.method = 'POST'\nwrk.body = [[{body.decode()}]]\n{lines}")
    _wrk(proxy, script, proxy.warm_up_s)
    meter = Meter(proxy)
    output = _wrk(proxy, script, seconds)
    requests = re.search(r"(\d+) requests in", output)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    broken = re.search(r"Socket errors: (?!connect 0, read 0, write 0,)", output)  # being slow is no error
    if requests is None or broken is not None:
        raise RuntimeError(f"{proxy.name}: {output}")
    return meter.result(int(requests[1]), refused=int(refused[1]) if refused else 0)


def refusals(proxy: Proxy, directory: Path, seconds: int) -> Result:
    """The same with a key that is always over its limit: a 429."""
    result = unary(proxy, directory, seconds, key=proxy.empty_key)
    if result.more["refused"] < result.count - CONNECTIONS:
        raise RuntimeError(f"{proxy.name} served {result.count - result.more['refused']:.0f} requests over the limit")
    return result


def _wrk(proxy: Proxy, script: Path, seconds: int) -> str:
    url = f"http://127.0.0.1:{proxy.unary_port}/v1/chat/completions"
    argv = ["taskset", "-c", str(OTHER_CORE), "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script), url]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=seconds + 30).stdout


def paced(proxy: Proxy, streams: int, seconds: float, *, interval_ms: int = 10) -> Result:
    """Streams of 100 events so far apart, begun at the rate that keeps so many in flight: an event, with its share of the
    stream's own request.
    """
    in_flight = max(1, round(streams * proxy.share))
    length_s = 0.1 * interval_ms

    async def load() -> Result:
        pool = _pool(proxy, 100, interval_ms)
        await pool.open(2 * in_flight)
        meter = Meter(proxy)
        await pool.begin_spread(round(in_flight * seconds / length_s), seconds)
        await pool.wait(length_s + GRACE_S)
        return _of_streams(pool, meter)

    return uvloop.run(load())


def events_alone(proxy: Proxy, streams: int, seconds: float) -> Result:
    """Streams that have begun and don't end yet, an event each every 10 ms: an event, and nothing else."""
    in_flight = max(1, round(streams * proxy.share))

    async def load() -> Result:
        pool = _pool(proxy, 500, 10)
        await pool.open(in_flight)
        await pool.begin_spread(in_flight, 0.5)
        await asyncio.sleep(0.3)
        pool.seen.begin_anew()
        meter = Meter(proxy)
        await asyncio.sleep(min(seconds, 4.0))
        return _of_streams(pool, meter)

    return uvloop.run(load())


def burst(proxy: Proxy, seconds: float) -> Result:
    """Streams whose 100 events come in one write, 200 a second: an event, with its share of the stream's own request."""

    async def load() -> Result:
        pool = _pool(proxy, 100, 0)
        await pool.open(CONNECTIONS)
        meter = Meter(proxy)
        await pool.begin_spread(round(BURSTS_PER_S * proxy.share * seconds), seconds)
        await pool.wait(GRACE_S)
        return _of_streams(pool, meter)

    return uvloop.run(load())


def _pool(proxy: Proxy, events: int, interval_ms: int) -> Pool:
    """Connections for streams of so many events, so far apart; a finish event, one of usage and `[DONE]` follow them."""
    sent = request(f"sse-{events}x{interval_ms}", proxy, stream=True)
    return Pool(proxy.stream_port, sent, events + 3)


def _of_streams(pool: Pool, meter: Meter) -> Result:
    seen = pool.seen
    result = meter.result(
        seen.events,
        streams=seen.begun,
        refused=seen.refused,
        cut=seen.cut,
        uneven=seen.uneven,
        events_per_read=seen.events / max(seen.reads, 1),
        first_event_ms_p50=quantile(seen.first_event_s, 0.5) * 1e3,
        first_event_ms_p99=quantile(seen.first_event_s, 0.99) * 1e3,
        gap_ms_p99=quantile(seen.gaps_s, 0.99) * 1e3,
        gap_ms_max=max(seen.gaps_s, default=0.0) * 1e3,
    )
    if seen.refused + seen.cut > FAILED * seen.begun:
        result.us = None
    pool.close()
    return result


def idle(proxy: Proxy, streams: int) -> Result:
    """Streams that have sent one event and are silent: memory."""
    in_flight = max(1, round(streams * proxy.share))

    async def load() -> Result:
        pool = _pool(proxy, 2, 60_000)
        before = proxy.rss_bytes()
        await pool.open(in_flight)
        await pool.begin_spread(in_flight, 1.0)
        await asyncio.sleep(0.5)
        more = {"refused": float(pool.seen.refused)}
        if proxy.share == 1:  # too few streams would tell of the first one's imports and little else
            more["bytes_per_stream"] = (proxy.rss_bytes() - before) / in_flight
        pool.close()
        return Result(pool.seen.events, more=more)

    return uvloop.run(load())


def latency(proxy: Proxy, per_s: float, seconds: float) -> Result:
    """Whole answers at so many requests a second: how long they took from when they were due."""
    sent = request(UNARY_MODEL, proxy, stream=False)
    latencies_s(proxy.unary_port, sent, per_s * proxy.share, 0.5)
    meter = Meter(proxy)
    latencies = latencies_s(proxy.unary_port, sent, per_s * proxy.share, seconds)
    quantiles = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
    return meter.result(len(latencies), **{name: quantile(latencies, q) * 1e3 for name, q in quantiles.items()})


def changes(proxy: Proxy) -> Result:
    """What the proxy changes in an answer: 1 if a whole one's body isn't the upstream's, and how many events of a stream
    differ from it, are missing or were added.
    """
    whole = _answer(proxy.unary_port, request(UNARY_MODEL, proxy, stream=False))
    lines = _answer(proxy.stream_port, request("sse-100x10", proxy, stream=True)).decode().split("\n\n")
    sent = (EVENT * 100 + b"".join(ENDING)).decode().split("\n\n")
    steps = difflib.SequenceMatcher(None, sent, lines, autojunk=False).get_opcodes()
    events = sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in steps if tag != "equal")
    return Result(1, more={"whole_changed": float(whole != ANSWER.encode()), "events_changed": float(events)})


def _answer(port: int, sent: bytes) -> bytes:
    """Send a request of our own making and return the answer's body."""
    head, _, body = sent.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GRACE_S)
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        return connection.getresponse().read()
    finally:
        connection.close()


def quantile(values: Iterable[float], q: float) -> float:
    """The smallest value that a share `q` of them doesn't exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0
