"""npm's `openai`, three major versions of it: 4 has a transport of its own (node-fetch), 6 is the last for Node 20, and 7 asks
for Node 22 but runs on 20 as far as is used here. One process per version runs every scenario of clients/node/scenarios.mjs.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from meshproxy.policy.principal import Limits
from tests.harness.waiting import wait_until

NODE_DIR = Path(__file__).parent / "clients" / "node"
PACKAGES = ["openai-v4", "openai-v6", "openai-v7"]
PATIENCE_S = 60.0


@pytest.fixture(scope="module", params=PACKAGES)
def run(request, site) -> Any:
    """What a version of the package saw, by scenario, and the entries of the provider's journal."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    assert (NODE_DIR / "node_modules" / request.param).is_dir(), "run `make compat` once: it installs the npm packages"
    site.forget()
    caller, limited = site.key(), site.key(limits=Limits(requests_per_minute=600, burst=1))
    places = {
        "baseURL": site.base_url,
        "key": caller.secret,
        "poor": site.key(credit="0").secret,
        "limited": limited.secret,
    }
    ended = subprocess.run(
        ["node", "scenarios.mjs", request.param],
        input=json.dumps(places),
        cwd=NODE_DIR,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    yield Run(request.param, json.loads(ended.stdout), site.received)
    caller.settled()
    limited.settled()


class Run:
    """One run of the scenarios."""

    def __init__(self, package: str, seen: dict[str, Any], received: list[Any]) -> None:
        self.package = package
        self.seen = seen
        self.bodies = [json.loads(entry.raw_body) for entry in received]
        self.received = received

    def entry_of(self, user: str) -> Any:
        """The journal's entry for the request of this `user`."""
        (found,) = [e for e, body in zip(self.received, self.bodies, strict=True) if body.get("user") == user]
        return found


def test_unary(run):
    unary = run.seen["unary"]
    assert "Hello there" in unary["content"]
    assert unary["usage"]["total_tokens"] > 0
    assert unary["id"]


@pytest.mark.parametrize("scenario", ["stream", "readable_stream"])
def test_stream_says_what_the_whole_answer_says(run, scenario):
    assert run.seen["unary"]["content"] == run.seen[scenario]


def test_stream_helper(run):
    content = run.seen["unary"]["content"]
    assert run.seen["stream_helper"] == {"final": content, "deltas": content}


def test_usage_chunk(run):
    assert run.seen["hidden_usage"] == []
    assert run.seen["usage"]["choices"] == []
    assert run.seen["usage"]["total"] > 0


def test_tools(run):
    assert run.seen["tools"] == {"name": "get_weather", "arguments": ["city"]}
    assert run.seen["run_tools"] == {"content": "string", "asked": ["string"]}


def test_structured_output(run):
    assert run.seen["parse"] == ["name", "age"]


def test_headers(run):
    assert {
        "request_id": "mine-1",
        "x-mesh-model": "openai/gpt-4o",
        "x-mesh-attempts": "1",
        "x-ratelimit-limit-requests": "600",
    }.items() <= run.seen["headers"].items()
    assert int(run.seen["headers"]["x-ratelimit-remaining-requests"]) < 600


def test_models(run):
    assert run.seen["models"] == {"listed": True, "retrieved": "vendor/family/model:free"}


def test_template(run):
    assert run.seen["template"] == ["name"]
    rendered = {"role": "system", "content": "Greet Ada."}
    (body,) = [body for body in run.bodies if rendered in body["messages"]]
    assert not {"template", "variables", "session_id"} & body.keys()


@pytest.mark.parametrize(
    ("status", "name", "code", "param"),
    [
        ("401", "AuthenticationError", "unauthorized", None),
        ("402", "APIError", "insufficient_credits", None),
        ("404", "NotFoundError", "model_not_found", "model"),
        ("422", "UnprocessableEntityError", "validation_error", "temperature"),
        ("502", "InternalServerError", "upstream_error", None),
        ("504", "InternalServerError", "gateway_timeout", None),
    ],
)
def test_errors(run, status, name, code, param):
    error = run.seen["errors"][status]
    assert (name, int(status), code, param) == (error["name"], error["status"], error["code"], error["param"])
    assert error["requestID"]


@pytest.mark.parametrize("scenario", ["mid_stream", "cut_stream"])
def test_stream_that_fails_throws(run, scenario):
    assert (run.seen[scenario]["name"], run.seen[scenario]["code"]) == ("APIError", "upstream_error")


def test_rate_limit_is_waited_for_as_told(run):
    """A tenth of a second; without retry-after-ms it would be half of one at least, less a quarter for jitter."""
    assert run.seen["retries"]["status"] == 200
    assert run.seen["retries"]["waited"] < 375


def test_no_retry_where_it_would_pay_twice(run):
    assert run.seen["no_second_payment"] == {"status": 504, "sent": 1}


def test_leaving_a_stream_early_frees_the_provider(run):
    assert True is run.seen["abort"]
    wait_until(lambda: run.entry_of("aborted").ended == "client_closed")


def test_client_that_runs_out_of_patience(run):
    assert run.seen["timeout"]["name"] == "APIConnectionTimeoutError"
    wait_until(lambda: run.entry_of("timed-out").ended == "client_closed")
