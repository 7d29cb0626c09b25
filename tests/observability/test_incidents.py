"""Six incidents, staged side by side: does the alert, the dashboard, the log and the status page name the cause of each?

Each has a `meshproxy serve` of its own and two upstreams for one model, and a Prometheus scrapes all six. It evaluates the
shipped rules over what it scraped, in hurried time: each duration in deploy/prometheus is divided by SPEED, so that a window of
ten minutes and `for: 10m` take ten seconds each. The thresholds are as shipped, and so is all that the gateways do: their
breakers, ejections and log lines are in real time. `MESHPROXY_PROOF=full` lets the rules have their own time: half an hour.
"""

import asyncio
import json
import os
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import yaml
from aiohttp import web

from meshproxy.app.serve import quantile
from meshproxy.config import Redis
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.policy.principal import Limits
from meshproxy.units import parse_usd
from tests.harness.process import Gateway, Valkey
from tests.observability.test_prometheus import BOARDS, rehearsal

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
IN_FULL = os.environ.get("MESHPROXY_PROOF") == "full"
SPEED = 1 if IN_FULL else 60
SCRAPE = "5s" if IN_FULL else "500ms"
RATE_INTERVAL = "1m" if IN_FULL else "4s"
HEALTHY_S = 30.0 if IN_FULL else 4.0
MOST_S = 2400.0 if IN_FULL else 45.0  # for an alert to fire
LOOK_S = 2.0 if IN_FULL else 0.5  # between two looks at alerts, dashboards and pages
EVERY_S = 0.5 if IN_FULL else 0.1  # between two requests to a gateway
SLOW_S = 1.5
FLOOD_S = 0.2 if IN_FULL else 0.05  # between two requests of the tenant who floods
PAUSE_MS, PAUSE_EVERY_S = 100, 0.2
_UNITS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
ANSWER = [
    {**CHUNK, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hello there"}}]},
    {**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {**CHUNK, "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}},
]


class Providers:
    """Every upstream, by name: it answers at once, unless it has a delay or a status."""

    def __init__(self) -> None:
        self.delay_s: dict[str, float] = {}
        self.status: dict[str, int] = {}

    async def start(self, stack: AsyncExitStack) -> str:
        app = web.Application()
        app.router.add_post("/{name}/v1/chat/completions", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        await asyncio.sleep(self.delay_s.get(name, 0))  # noqa: TID251 - the provider's delay
        if name in self.status:
            return web.json_response({"error": {"message": "the model has no GPU"}}, status=self.status[name])
        events = "".join(f"data: {json.dumps(event)}\n\n" for event in ANSWER)
        return web.Response(text=events + "data: [DONE]\n\n", content_type="text/event-stream")


class Site:
    """One incident's gateway, its Redis and its traffic."""

    def __init__(self, name: str, providers: Providers, http: aiohttp.ClientSession, home: Path) -> None:
        self.name = name
        self.providers = providers
        self.http = http
        self.home = home / name
        self.home.mkdir()
        self.redis = Valkey(self.home)

    async def start(self, provider: str) -> None:
        await self._mint()
        upstreams = {
            member: {"kind": "openai", "base_url": f"{provider}/{self.name}-{member}/v1"} for member in ("one", "two")
        }
        routes = [{"upstream": member, "model": "m", "weight": 1} for member in upstreams]
        tables = {
            "redis": {"url": self.redis.url, "journal": str(self.home / "journal")},
            "metrics": {"accounts": "all"},
            "upstreams": upstreams,
            "models": {"m/pair": {"upstreams": routes, "input_usd_per_mtok": "2.50", "output_usd_per_mtok": "10.00"}},
        }
        self.gateway = Gateway(self.home, tables)
        await self.gateway.started()

    async def _mint(self) -> None:
        store = await connect(Redis(url=self.redis.url))
        directory, ledger = Directory(store), Ledger(store)
        self.good, _ = await directory.create_key("good", limits=Limits(100_000, 100_000_000))
        self.flood, _ = await directory.create_key("flood", limits=Limits(60, 100_000_000))
        for account in ("good", "flood"):
            await ledger.grant(account, parse_usd("1000"))
        await store.close()

    def end(self) -> None:
        if hasattr(self, "gateway"):
            self.gateway.end()
        self.redis.kill()

    async def ask(self, secret: str, number: int) -> None:
        """One stream; every second one belongs to a session, which stays with its upstream."""
        body = {"model": "m/pair", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
        if number % 2:
            body["session_id"] = f"s{number % 40}"
        with suppress(aiohttp.ClientError, TimeoutError):
            url = f"{self.gateway.url}/v1/chat/completions"
            async with self.http.post(url, json=body, headers={"authorization": f"Bearer {secret}"}) as answer:
                await answer.read()

    async def load(self, secret: str, every_s: float) -> None:
        """Requests at a steady pace, whatever becomes of them, until this is cancelled."""
        number = 0
        async with asyncio.TaskGroup() as group:
            while True:
                number += 1
                group.create_task(self.ask(secret, number))
                await asyncio.sleep(every_s)  # noqa: TID251 - the load's pace

    async def status(self) -> dict[str, Any]:
        async with self.http.get(f"{self.gateway.admin}/status") as answer:
            return await answer.json()


async def slow_member(site: Site) -> None:
    site.providers.delay_s[f"{site.name}-one"] = SLOW_S


async def failing_member(site: Site) -> None:
    site.providers.status[f"{site.name}-one"] = 500


async def all_failing(site: Site) -> None:
    for member in ("one", "two"):
        site.providers.status[f"{site.name}-{member}"] = 500


async def redis_slow(site: Site) -> None:
    while True:
        await asyncio.to_thread(site.redis.request, "CLIENT", "PAUSE", str(PAUSE_MS), "ALL")
        await asyncio.sleep(PAUSE_EVERY_S)  # noqa: TID251 - the incident itself


async def redis_gone(site: Site) -> None:
    site.redis.kill()


async def flood(site: Site) -> None:
    await site.load(site.flood, FLOOD_S)


Samples = list[tuple[dict[str, str], float]]
Lines = list[dict[str, Any]]
Page = dict[str, Any]


class Incident(NamedTuple):
    """What happens, and how each tool names it. One of `alerts` must fire; `may` are others that a cause of this kind raises,
    its symptoms included. `labels` are all that an alert may accuse. `page` gets the page of the moment and the one of the
    begin.
    """

    happens: Callable[[Site], Awaitable[None]]
    alerts: dict[str, dict[str, str]]
    may: set[str]
    labels: dict[str, set[str]]
    panel: tuple[str, str]
    shows: Callable[[Samples], bool]
    logged: Callable[[Lines], bool]
    page: Callable[[Page, Page], bool]


def _value(samples: Samples, **labels: str) -> float:
    return next((value for found, value in samples if labels.items() <= found.items()), 0.0)


def _slow_in_log(lines: Lines) -> bool:
    """The request lines say which upstream was slow."""
    waits = {
        name: [line["ttft_ms"] for line in lines if line.get("upstream") == name and line.get("ttft_ms")][-10:]
        for name in ("one", "two")
    }
    return all(waits.values()) and statistics.median(waits["one"]) > 3 * statistics.median(waits["two"])


def _since(now: dict[str, Any], then: dict[str, Any], share: float) -> float:
    counts = [count - before for count, before in zip(now["counts"], then["counts"], strict=True)]
    return quantile(now["edges"], counts, share) or 0.0


def _first_tokens(page: Page, begin: Page) -> dict[str, float]:
    """The median of each upstream, as the page's columns have it."""
    pairs = zip(page["upstreams"], begin["upstreams"], strict=True)
    return {now["name"]: _since(now["first_token"], then["first_token"], 0.5) for now, then in pairs}


def _slow_on_page(page: Page, begin: Page) -> bool:
    medians = _first_tokens(page, begin)
    return medians["one"] > 3 * medians["two"] > 0


def _not_serving(page: Page) -> set[str]:
    return {upstream["name"] for upstream in page["upstreams"] if upstream["state"] != "serving"}


def _ledger_p99(page: Page, begin: Page) -> float:
    return _since(page["ledger"]["duration"], begin["ledger"]["duration"], 0.99)


FIRST_TOKEN = {"MeshproxyFirstTokenBurnFast", "MeshproxyFirstTokenBurnSlow"}
AVAILABILITY = {"MeshproxyAvailabilityBurnFast", "MeshproxyAvailabilityBurnSlow"}
OF_A_MEMBER = {"MeshproxyUpstreamErrors", "MeshproxyBreakerOpen", "MeshproxyUpstreamEjected"}
NOISE = {"MeshproxyLoopLag"}  # the machine that runs the tests is busy with others

INCIDENTS = {
    "slow-member": Incident(
        slow_member,
        {"MeshproxyUpstreamSlowMember": {"upstream": "one", "model": "m/pair"}},
        FIRST_TOKEN | {"MeshproxyUpstreamSlow"},
        {"upstream": {"one"}, "model": {"m/pair"}},
        ("meshproxy-upstreams", "Latency by model and upstream, median"),
        lambda samples: _value(samples, upstream="one") > 3 * _value(samples, upstream="two") > 0,
        _slow_in_log,
        _slow_on_page,
    ),
    "failing-member": Incident(
        failing_member,
        {alert: {"upstream": "one"} for alert in OF_A_MEMBER},  # ejected for seconds at first, then its breaker is open
        set(),
        {"upstream": {"one"}},
        ("meshproxy-upstreams", "Failures by upstream and kind"),
        lambda samples: {"one"} == {labels["upstream"] for labels, value in samples if value > 0},
        lambda lines: (
            {("one", 500)} == {(line["upstream"], line["status"]) for line in _events(lines, "attempt_failed")}
        ),
        lambda page, _: {"one"} == _not_serving(page) == page["last_errors"].keys(),
    ),
    "all-failing": Incident(
        all_failing,
        {"MeshproxyModelFails": {"model": "m/pair"}},
        OF_A_MEMBER | AVAILABILITY,
        {"upstream": {"one", "two"}, "model": {"m/pair"}},
        ("meshproxy-upstreams", "Failures by model and cause"),
        lambda samples: _value(samples, model="m/pair", cause="provider_not_available") > 0,
        lambda lines: {"one", "two"} == {line["upstream"] for line in _events(lines, "attempt_failed")},
        lambda page, _: {"one", "two"} == _not_serving(page) == page["last_errors"].keys() and bool(page["failures"]),
    ),
    "redis-slow": Incident(
        redis_slow,
        {"MeshproxyLedgerSlow": {}},
        FIRST_TOKEN | AVAILABILITY | {"MeshproxyLedgerErrors"},  # past redis.timeout_s an admission is a 503
        {},
        ("meshproxy-ledger", "Round trips by operation, p99"),
        lambda samples: _value(samples, op="admit") > 0.05,
        lambda lines: bool(_events(lines, "ledger_slow")),
        lambda page, begin: page["ledger_state"] == "up" and _ledger_p99(page, begin) > 0.05,
    ),
    "redis-gone": Incident(
        redis_gone,
        {"MeshproxyLedgerDown": {}},
        AVAILABILITY | {"MeshproxyLedgerErrors", "MeshproxyJournalPending"},
        {},
        ("meshproxy-ledger", "Connected by instance"),
        lambda samples: [value for _, value in samples] == [0.0],
        lambda lines: bool(_events(lines, "ledger_lost")),
        lambda page, _: page["ledger_state"] == "down",
    ),
    "tenant-flood": Incident(
        flood,
        {"MeshproxyAccountFloods": {"account": "flood"}},
        set(),
        {"account": {"flood"}},
        ("meshproxy-tenants", "Refusals by account"),
        lambda samples: (
            {("flood", "429")} == {(labels["account"], labels["code"]) for labels, value in samples if value > 0}
        ),
        lambda lines: (
            {("flood", "key_requests")}
            == {(line["account"], line["refused_by"]) for line in _events(lines, "request") if line["refused_by"]}
        ),
        lambda page, _: (
            [(each["account"], each["refused_by"]) for each in page["refused"]] == [("flood", "key_requests")]
        ),
    ),
}


def _events(lines: Lines, event: str) -> Lines:
    return [line for line in lines if line["event"] == event]


class Evidence:
    """What a tool showed, and after how many seconds. `fired`: every alert that did, with its labels."""

    def __init__(self) -> None:
        self.after_s: dict[str, float] = {}
        self.fired: dict[str, list[dict[str, str]]] = {}
        self.early: dict[str, list[dict[str, str]]] = {}  # before anything happened


def hurried(text: str) -> str:
    """Rules with each duration divided by SPEED: of windows, offsets, intervals and `for`."""

    def divided(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) * _UNITS[found[3]] // SPEED}ms"

    return re.sub(r"(\[|offset |for: |interval: )(\d+)([smhd])", divided, text)


def write_prometheus(home: Path, sites: dict[str, Site]) -> None:
    """The shipped rules, and a job for each incident."""
    for name in ("recording.yml", "alerts.yml"):
        (home / name).write_text(hurried((DEPLOY / name).read_text()))
    jobs = [
        {"job_name": name, "static_configs": [{"targets": [site.gateway.admin.removeprefix("http://")]}]}
        for name, site in sites.items()
    ]
    config = {
        "global": {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE},
        "rule_files": ["recording.yml", "alerts.yml"],
        "scrape_configs": jobs,
    }
    (home / "prometheus.yml").write_text(yaml.safe_dump(config))


def query_of(incident: Incident, job: str) -> str:
    """The shipped panel's query, as Grafana would send it for one job."""
    uid, title = incident.panel
    (board,) = (board for board in BOARDS if board["uid"] == uid)
    (panel,) = (panel for panel in board["panels"] if panel["title"] == title)
    (target,) = panel["targets"]
    query = target["expr"].replace("$job", job).replace("$__rate_interval", RATE_INTERVAL)
    return rehearsal.filled(query)


async def stage(home: Path) -> dict[str, Evidence]:
    """Let all six happen."""
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        providers = Providers()
        provider = await providers.start(stack)
        sites = {}
        for name in INCIDENTS:
            sites[name] = Site(name, providers, http, home)
            stack.callback(sites[name].end)
        await asyncio.gather(*(site.start(provider) for site in sites.values()))
        write_prometheus(home, sites)
        server = rehearsal.started(home)
        prometheus = await asyncio.to_thread(server.__enter__)
        stack.push_async_callback(asyncio.to_thread, server.__exit__, None, None, None)
        loads = [asyncio.create_task(site.load(site.good, EVERY_S)) for site in sites.values()]
        stack.push_async_callback(_ended, loads)
        await asyncio.sleep(HEALTHY_S)  # noqa: TID251 - what rates are measured over
        evidence = {name: Evidence() for name in sites}
        for alert in await _alerts(prometheus):
            evidence[alert["job"]].early.setdefault(alert["alertname"], []).append(alert)
        begins = {name: await site.status() for name, site in sites.items()}
        counts = {name: len(site.gateway.lines) for name, site in sites.items()}
        began_at = time.monotonic()
        happening = [asyncio.create_task(INCIDENTS[name].happens(site)) for name, site in sites.items()]
        stack.push_async_callback(_ended, happening)
        while not all(len(each.after_s) == 4 for each in evidence.values()) and time.monotonic() < began_at + MOST_S:
            await asyncio.sleep(LOOK_S)  # noqa: TID251 - between two looks, until MOST_S
            for alert in await _alerts(prometheus):
                fired = evidence[alert["job"]].fired.setdefault(alert["alertname"], [])
                if alert not in fired:
                    fired.append(alert)
            for name, site in sites.items():
                named = await _named(INCIDENTS[name], site, prometheus, evidence[name], begins[name], counts[name])
                for tool in named - evidence[name].after_s.keys():
                    evidence[name].after_s[tool] = time.monotonic() - began_at
            for task in filter(asyncio.Task.done, happening):
                task.result()
        return evidence


async def _named(
    incident: Incident, site: Site, prometheus: rehearsal.Prometheus, found: Evidence, begin: Page, line_count: int
) -> set[str]:
    """Which tools name the cause now."""
    result = await asyncio.to_thread(prometheus.get, "query", query=query_of(incident, site.name))
    samples = [(each["metric"], float(each["value"][1])) for each in result["result"]]
    lines = site.gateway.lines[line_count:]
    tools = {
        "alert": any(_has(found.fired.get(name, []), labels) for name, labels in incident.alerts.items()),
        "dashboard": incident.shows(samples),
        "log": incident.logged(lines),
        "page": incident.page(await site.status(), begin),
    }
    return {tool for tool, names in tools.items() if names}


def _has(alerts: list[dict[str, str]], labels: dict[str, str]) -> bool:
    return any(labels.items() <= alert.items() for alert in alerts)


async def _alerts(prometheus: rehearsal.Prometheus) -> list[dict[str, str]]:
    found = (await asyncio.to_thread(prometheus.get, "alerts"))["alerts"]
    return [alert["labels"] for alert in found if alert["state"] == "firing"]


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory, prometheus) -> Iterator[dict[str, Evidence]]:
    found = asyncio.run(stage(tmp_path_factory.mktemp("incidents")))
    for name, each in found.items():
        print(name, {tool: f"{after_s:.1f} s" for tool, after_s in sorted(each.after_s.items())}, sorted(each.fired))
    return found


@pytest.mark.parametrize("tool", ["alert", "dashboard", "log", "page"])
@pytest.mark.parametrize("name", INCIDENTS)
def test_the_cause_is_named(evidence, name, tool):
    assert tool in evidence[name].after_s, evidence[name].fired


@pytest.mark.parametrize("name", INCIDENTS)
def test_no_alert_accuses_another(evidence, name):
    incident, found = INCIDENTS[name], evidence[name]
    assert {alert: found.early[alert] for alert in found.early.keys() - NOISE} == {}
    assert found.fired.keys() - incident.alerts.keys() - incident.may - NOISE == set()
    for alert in (alert for alerts in found.fired.values() for alert in alerts):
        accused = {label: alert[label] for label in ("upstream", "account", "model") if label in alert}
        assert {label: value for label, value in accused.items() if value not in incident.labels.get(label, ())} == {}
