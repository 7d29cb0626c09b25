import asyncio
import base64
import re

import pytest
from structlog.testing import capture_logs

from meshproxy.errors import GatewayError, Source, ledger_unavailable
from meshproxy.server.admin import create_admin
from meshproxy.telemetry.exposition import decode, render, summarize
from meshproxy.telemetry.metrics import Metrics

TOKEN = "a token, with ünicode"


class State:
    def __init__(self):
        self.counted = Metrics(["m"], ["up"], version="1.2.3")
        self.not_ready = []
        self.trouble = None

    async def metrics(self, accept):
        return await render(decode(await self.counted.snapshot()), accept)

    async def ready(self):
        return self.not_ready

    async def status(self):
        if self.trouble is not None:
            raise self.trouble
        return {
            **summarize(decode(await self.counted.snapshot())),
            "version": "1.2.3",
            "uptime_s": 1.5,
            "not_ready": self.not_ready,
            "max_in_flight": 10,
            "ledger_state": "up",
            "workers": [{"pid": 1, "state": "running", "uptime_s": 1.5, "restarts": 0}],
        }


@pytest.fixture
def state():
    return State()


@pytest.fixture
async def client(aiohttp_client, state):
    return await aiohttp_client(create_admin(state))


@pytest.fixture
async def guarded(aiohttp_client, state):
    return await aiohttp_client(create_admin(state, TOKEN))


async def test_healthz_is_always_well(client, state):
    state.not_ready = ["draining"]
    answer = await client.get("/healthz")
    assert (answer.status, await answer.json()) == (200, {"status": "ok"})


async def test_readyz(client, state):
    answer = await client.get("/readyz")
    assert (answer.status, await answer.json()) == (200, {"status": "ready"})
    state.not_ready = ["draining", "ledger unreachable"]
    answer = await client.get("/readyz")
    assert (
        answer.status,
        await answer.json(),
    ) == (503, {"status": "unready", "reasons": ["draining", "ledger unreachable"]})
    assert answer.headers["cache-control"] == "no-store"


async def test_metrics_as_text(client):
    answer = await client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'meshproxy_build_info{version="1.2.3"} 1.0' in (await answer.text()).splitlines()


async def test_metrics_as_openmetrics(client):
    answer = await client.get(
        "/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    )
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert (await answer.text()).endswith("# EOF\n")


async def test_status(client):
    answer = await client.get("/status")
    body = await answer.json()
    assert (body["version"], body["requests"]["total"], body["ledger_state"]) == ("1.2.3", 0, "up")
    assert answer.content_type == "application/json"


async def test_the_page_loads_nothing_from_elsewhere(client):
    answer = await client.get("/")
    html = await answer.text()
    assert (answer.status, answer.content_type, answer.charset) == (200, "text/html", "utf-8")
    assert (
        re.findall(r"https?://|//[a-z]|@import|url\(", re.sub(r"^\s*//.*$|; // .*$", "", html, flags=re.MULTILINE))
        == []
    )


async def test_the_pages_policy_lets_its_own_script_and_style_run_and_nothing_else(client):
    policy = (await client.get("/")).headers["content-security-policy"]
    assert re.match(r"default-src 'none'; script-src 'sha256-[\w+/]{43}='; style-src 'sha256-[\w+/]{43}='; ", policy)
    html = await (await client.get("/")).text()
    assert re.findall(r'\s(?:style|on\w+)="', html) == []


async def test_the_page_is_readable_by_everyone(client):
    html = await (await client.get("/")).text()
    assert '<html lang="en">' in html
    assert "prefers-color-scheme: dark" in html
    assert html.count("<th ") == html.count('<th scope="col"')
    for svg in re.findall(r"<svg[^>]*>", html):
        assert "aria-" in svg


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("DELETE", "/", 405, "method_not_allowed"),
    ],
)
async def test_errors_come_in_the_envelope(client, method, path, status, code):
    answer = await client.request(method, path)
    body = await answer.json()
    assert (status, code, body["request_id"]) == (answer.status, body["error"]["code"], answer.headers["x-request-id"])


async def test_head_is_allowed(client):
    answer = await client.head("/healthz")
    assert (answer.status, await answer.read()) == (200, b"")


async def test_a_fault_of_the_state_is_told_as_what_it_is(client, state):
    state.trouble = GatewayError(Source.GATEWAY, ledger_unavailable())
    answer = await client.get("/status")
    assert (answer.status, (await answer.json())["error"]["code"]) == (503, "ledger_unavailable")


async def test_a_bug_of_the_state_is_logged_and_told_in_json(client, state):
    state.trouble = KeyError("oops")
    with capture_logs() as logs:
        answer = await client.get("/status")
    assert (answer.status, (await answer.json())["error"]["code"]) == (500, "internal_error")
    assert [log["event"] for log in logs] == ["admin_failed"]


def basic(password, user="anyone"):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_probes_need_no_token(guarded, path):
    assert (await guarded.get(path)).status == 200


@pytest.mark.parametrize("path", ["/", "/status", "/metrics", "/nowhere", "/healthz/"])
@pytest.mark.parametrize(
    "offered", [None, "", "Bearer", "Bearer ", "Bearer wrong", TOKEN, basic("wrong"), "Basic !!!", "Basic é"]
)
async def test_everything_else_needs_the_token(guarded, path, offered):
    answer = await guarded.get(path, headers={} if offered is None else {"authorization": offered})
    assert (answer.status, (await answer.json())["error"]["code"]) == (401, "unauthorized")
    assert answer.headers.getall("www-authenticate") == ["Bearer", 'Basic realm="meshproxy admin", charset="UTF-8"']


@pytest.mark.parametrize("path", ["/", "/status", "/metrics"])
@pytest.mark.parametrize("offered", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN), basic(TOKEN, user="")])
async def test_the_token_opens(guarded, path, offered):
    assert (await guarded.get(path, headers={"authorization": offered})).status == 200


async def test_the_token_opens_no_path_that_is_not_there(guarded):
    assert (await guarded.get("/nowhere", headers={"authorization": f"Bearer {TOKEN}"})).status == 404


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:8081", 200),
        ("10.1.2.3", 200),
        ("[::1]:8081", 200),
        ("localhost:8081", 200),
        ("LOCALHOST", 200),
        ("admin.internal:8081", 200),
        ("evil.example", 403),
        ("evil.example:8081", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("[::1].evil.example", 403),
        ("[::1", 403),
        ("admin.internal.", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/metrics", "/status", "/readyz"])
async def test_without_a_token_only_its_own_names_are_answered(aiohttp_client, state, path, host, status):
    client = await aiohttp_client(create_admin(state, hosts=["Admin.internal"]))
    answer = await client.get(path, headers={"host": host})
    assert answer.status == status
    if status == 403:
        assert (await answer.json())["error"]["code"] == "forbidden"


@pytest.mark.parametrize(
    "target, host, status", [("evil.example", "localhost", 403), ("localhost", "evil.example", 200)]
)
async def test_the_host_of_an_absolute_target_counts_and_no_other(aiohttp_client, state, target, host, status):
    client = await aiohttp_client(create_admin(state))
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(f"GET http://{target}/status HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert int((await reader.readline()).split()[1]) == status
    writer.close()


async def test_with_a_token_any_name_will_do(guarded):
    headers = {"authorization": f"Bearer {TOKEN}", "host": "evil.example"}
    assert (await guarded.get("/status", headers=headers)).status == 200
