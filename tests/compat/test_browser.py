"""A page in a real browser calls the gateway from another origin: one in `server.cors_origins`, and one that isn't."""

import json
import queue
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from meshproxy.policy.principal import Limits
from tests.harness.process import Program
from tests.harness.waiting import wait_until

CLIENTS = Path(__file__).parent / "clients"
PATIENCE_S = 60.0
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


class Pages(BaseHTTPRequestHandler):
    """The page, npm's `openai` for it to import, and what it saw."""

    seen: "queue.Queue[Any]" = queue.Queue()

    def do_GET(self) -> None:
        path = CLIENTS / "node" / "node_modules" / self.path.partition("?")[0].lstrip("/")
        file = path if path.suffix == ".mjs" else CLIENTS / "browser.html"
        self._answer(file.read_bytes(), "text/javascript" if file is path else "text/html")

    def do_POST(self) -> None:
        self.seen.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._answer(b"", "text/plain")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def browse(site, page_port, tmp_path_factory) -> Iterator[Any]:
    """Open the page by the name of a host, and return what it saw."""
    server = ThreadingHTTPServer(("127.0.0.1", page_port), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def browse(host: str, **places: str) -> Any:
        whole = quote(json.dumps({"base_url": site.base_url, **places}))
        profile = tmp_path_factory.mktemp("profile")
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"http://{host}:{page_port}/#{whole}"]
        with Program(*command, log=profile / "log") as browser:
            seen = Pages.seen.get(timeout=PATIENCE_S)
            browser.stop()
        return seen

    yield browse
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def seen(site, browse) -> Any:
    """What a page of an allowed origin saw, and whether the provider of the stream that it left is free."""
    if not (CLIENTS / "node" / "node_modules" / "openai-v6").is_dir():
        pytest.skip("needs npm's packages: `make compat` installs them")
    site.forget()
    caller, limited = site.key(), site.key(limits=Limits(requests_per_minute=40, burst=1))
    seen = browse("localhost", key=caller.secret, limited=limited.secret)
    caller.settled()
    limited.settled()
    return seen


def test_whole_answer_and_its_headers(seen):
    assert "Hello there" in seen["whole"]["text"]
    assert seen["whole"]["readable"] == ["x-request-id", "x-ratelimit-limit-requests", "x-mesh-model", "x-mesh-cost"]


def test_stream_is_read_as_it_comes(seen):
    assert seen["stream"]["parts"] > 2
    assert seen["stream"]["last"] == "data: [DONE]"


def test_error_and_how_long_to_wait(seen):
    assert (seen["refused"]["status"], seen["refused"]["code"]) == (429, "rate_limit_exceeded")
    assert {"x-request-id", "retry-after", "retry-after-ms"} <= set(seen["refused"]["readable"])


def test_models(seen):
    assert True is seen["models"]


def test_openai_sdk_in_a_page(seen):
    assert True is seen["sdk"]


def test_aborted_fetch_frees_the_provider(seen, site):
    assert True is seen["abort"]
    (slow,) = [entry for entry in site.received if b"sim/slow" in entry.raw_body]
    wait_until(lambda: slow.ended == "client_closed")


def test_other_origins_get_nothing(site, browse):
    """127.0.0.1 and localhost are two origins."""
    caller = site.key()
    seen = browse("127.0.0.1", key=caller.secret, limited=caller.secret)
    assert {"threw": "TypeError: Failed to fetch"} == seen["whole"] == seen["models"]
    assert caller.settled().settled_nusd == 0
