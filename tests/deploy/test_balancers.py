"""Two gateways behind the balancers that they are deployed behind, with the configurations that deploy/ gives, over real sockets.
Run with -s to see the figures.
"""

import asyncio
import signal
import statistics
import time
from contextlib import asynccontextmanager
from functools import partial

import aiohttp
import pytest

from tests.deploy.conftest import ROOT, tell
from tests.harness.clients import CHAT, HELLO, chat, fetch
from tests.harness.process import Program, free_port, listens, program
from tests.harness.waiting import until

PACED = "sim/plain?tokens=40&tps=50"  # 0.8 s: an event each 20 ms
LONGER = "sim/plain?tokens=75&tps=50"  # 1.5 s
BALANCERS = pytest.mark.parametrize("balancer", ["haproxy", "nginx"])
CLIENT = "127.0.0.9"  # loopback has many
GRACE_S = 1.5  # HAProxy's checks take at most 1.25 s to take an instance out


def haproxy_config(gateways, port):
    text = (ROOT / "deploy/haproxy.cfg").read_text().replace("bind :8000", f"bind 127.0.0.1:{port}")
    text = text.replace("maxconn 20000", "maxconn 1000")  # which needs twice as many file descriptors
    for number, gateway in enumerate(gateways, 1):
        line = f"server meshproxy-{number} meshproxy-{number}:8080"
        assert line in text
        admin_port = gateway.admin.rpartition(":")[2]
        text = text.replace(line, f"server meshproxy-{number} {gateway.listen} check port {admin_port}")
    return text


def nginx_config(gateways, port, home):
    text = (ROOT / "deploy/nginx.conf").read_text().replace("listen 8000;", f"listen 127.0.0.1:{port};")
    for number, gateway in enumerate(gateways, 1):
        assert f"server meshproxy-{number}:8080 " in text
        text = text.replace(f"server meshproxy-{number}:8080 ", f"server {gateway.listen} ")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"    {kind}_temp_path {home}/{kind};\n" for kind in kinds)
    return f"daemon off;\npid {home}/nginx.pid;\nerror_log stderr;\nuser root;\n" + text.replace(
        "http {\n", f"http {{\n{paths}"
    )


def command(balancer, gateways, port, home):
    path = home / f"{balancer}.conf"
    if balancer == "haproxy":
        path.write_text(haproxy_config(gateways, port))
        return [program("haproxy"), "-f", str(path), "-db"]
    path.write_text(nginx_config(gateways, port, home))
    return [program("nginx"), "-e", "stderr", "-p", str(home), "-c", str(path)]


@asynccontextmanager
async def behind(balancer, gateways, home):
    """The URL of a balancer that has both gateways in rotation."""
    port = free_port()
    with Program(*command(balancer, gateways, port, home), log=home / f"{balancer}.log") as running:
        await running.until(lambda: listens(port))
        yield f"http://127.0.0.1:{port}"


async def pair(site, **options):
    first = await site.gateway(models=(PACED, LONGER), drain_grace_s=GRACE_S, **options)
    return [first, await site.gateway(models=(PACED, LONGER), drain_grace_s=GRACE_S, **options)]


def served(gateway):
    return gateway.metric("meshproxy_requests_total")


@BALANCERS
async def test_streams_pass_unharmed_and_undelayed(site, tmp_path, balancer):
    gateways = await pair(site)
    caller = await site.key()
    async with behind(balancer, gateways, tmp_path) as url:
        direct = await asyncio.gather(*(site.stream(gateways[0].url, caller, PACED) for _ in range(10)))
        through = await asyncio.gather(*(site.stream(url, caller, PACED) for _ in range(10)))
    assert all(stream.is_whole for stream in direct + through)
    assert {len(stream.events) for stream in direct} == {len(stream.events) for stream in through}
    first = [statistics.median(stream.first_event_s for stream in streams) for streams in (direct, through)]
    gap = [statistics.median(stream.max_gap_s for stream in streams) for streams in (direct, through)]
    tell(
        f"{balancer}: first event {first[0] * 1000:.1f} ms direct, {first[1] * 1000:.1f} ms through; "
        f"largest gap {gap[0] * 1000:.1f} and {gap[1] * 1000:.1f} ms of 20 ms paced events"
    )
    assert first[1] < first[0] + 0.25
    assert gap[1] < gap[0] + 0.1  # a balancer that buffers would show 0.8 s
    assert through[0].headers["content-type"] == "text/event-stream; charset=utf-8"


@BALANCERS
async def test_the_client_is_known_through_them(site, tmp_path, balancer):
    gateways = await pair(site, trusted_proxies=["127.0.0.1/32"])
    async with behind(balancer, gateways, tmp_path) as url:
        assert await client_through(url, await site.key(), gateways) == CLIENT


async def test_the_client_is_known_through_the_proxy_protocol(site, tmp_path):
    gateways = await pair(site, trusted_proxies=["127.0.0.1/32"], proxy_protocol=True)
    port = free_port()
    text = (
        haproxy_config(gateways, port)
        .replace("option forwardfor", "")
        .replace(" check port ", " send-proxy-v2 check port ")
    )
    file = tmp_path / "haproxy.cfg"
    file.write_text(text.replace("default-server check", "default-server no-check-send-proxy check"))
    with Program(program("haproxy"), "-f", file, "-db", log=tmp_path / "haproxy.log") as running:
        await running.until(lambda: listens(port))
        assert await client_through(f"http://127.0.0.1:{port}", await site.key(), gateways) == CLIENT


async def client_through(url, caller, gateways):
    """What a gateway logs as the client of a request that lies about where it comes from."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(CLIENT, 0))) as http:
        headers = {**caller.auth, "X-Forwarded-For": "6.6.6.6", "Forwarded": "for=6.6.6.6"}
        answer = await fetch("POST", url + CHAT, session=http, json={"messages": HELLO}, headers=headers)
        assert answer.status == 200
    lines = await until(
        lambda: [line for gateway in gateways for line in gateway.logged("request")], "the request's line"
    )
    return lines[0]["client"]


@BALANCERS
async def test_one_is_drained_and_then_one_is_killed_in_the_middle_of_streams(site, tmp_path, balancer):
    gateways = await pair(site)
    caller = await site.key()
    async with behind(balancer, gateways, tmp_path) as url:
        streams = [site.stream(url, caller, LONGER) for _ in range(12)]
        await until(lambda: streaming(gateways) == 12, "the streams to flow")
        gateways[0].send(signal.SIGTERM)
        assert await gateways[0].exit() == 0
        assert [stream.is_whole for stream in await asyncio.gather(*streams)] == [True] * 12
        await gateways[0].started()
        streams, shares = await spread(site, url, caller, gateways)
        gateways[1].send(signal.SIGKILL)
        await gateways[1].exit()
        done = await asyncio.gather(*streams)
        whole = sum(stream.is_whole for stream in done)
        assert shares[0] == whole
        assert not any(stream.events[-1:] == ["[DONE]"] for stream in done if not stream.is_whole)
        answers = await asyncio.gather(*(ask(site, url, caller) for _ in range(20)))
        tell(
            f"{balancer}: drained in the middle of 12 streams, 12 whole; killed in the middle of {len(done)}, "
            f"{whole} of the other instance whole, {len(done) - whole} of its own told as broken"
        )
    assert answers == [200] * 20


def streaming(gateways):
    return sum(gateway.metric('meshproxy_in_flight_requests{phase="stream"}') for gateway in gateways)


async def spread(site, url, caller, gateways):
    """Streams on both instances, the restarted one back in rotation, and how many on each."""
    streams = []
    for _ in range(100):
        streams += [site.stream(url, caller, LONGER) for _ in range(4)]
        await until(partial(all_flow, gateways, streams), "the streams to flow")
        shares = [int(gateway.metric('meshproxy_in_flight_requests{phase="stream"}')) for gateway in gateways]
        if min(shares) >= 4:
            return [stream for stream in streams if not stream.done()], shares
    raise AssertionError("the restarted instance gets no streams")


def all_flow(gateways, streams):
    return streaming(gateways) == sum(not stream.done() for stream in streams)


async def ask(site, url, caller):
    """The status that a client sees, or what went wrong."""
    answer = await chat(url, caller.auth, session=site.http)
    return answer.broken or answer.status


@BALANCERS
async def test_a_rolling_restart_under_load_loses_nothing(site, tmp_path, balancer):
    gateways = await pair(site)
    caller = await site.key(credit="1000.00")
    async with behind(balancer, gateways, tmp_path) as url:
        stopped = asyncio.Event()
        load = asyncio.create_task(offer(site, url, caller, stopped))
        begun_at = time.monotonic()
        for gateway in gateways:
            before = served(gateway)
            await until(lambda gateway=gateway, before=before: served(gateway) > before + 10, "load on it")
            gateway.send(signal.SIGTERM)
            assert await gateway.exit() == 0
            await gateway.started()
            await until(lambda gateway=gateway: served(gateway) > 10, "load on the new one")
        lasted_s = time.monotonic() - begun_at
        stopped.set()
        answers, streams = await load
    lost = [answer for answer in answers if answer != 200]
    cut = [(stream.status, stream.broken, stream.events[-1:]) for stream in streams if not stream.is_whole]
    gap_ms = max(stream.max_gap_s for stream in streams) * 1000
    tell(
        f"{balancer}: both instances restarted in {lasted_s:.1f} s under load: {len(answers)} requests, {len(lost)} lost; "
        f"{len(streams)} streams, {len(cut)} cut; largest gap {gap_ms:.0f} ms"
    )
    assert (lost, cut) == ([], [])
    settled = await site.settled(caller, len(answers) + len(streams))
    assert {event["outcome"] for event in settled} == {"completed"}


async def offer(site, url, caller, stopped):
    """Forty requests and ten streams a second, whether or not those before are answered; at most 30 s."""
    answers, streams = [], []
    for turn in range(1200):
        answers.append(asyncio.create_task(ask(site, url, caller)))
        if turn % 4 == 0:
            streams.append(site.stream(url, caller, PACED))
        await asyncio.sleep(0.025)  # noqa: TID251 - the load's pace
        if stopped.is_set():
            break
    return await asyncio.gather(*answers), await asyncio.gather(*streams)
