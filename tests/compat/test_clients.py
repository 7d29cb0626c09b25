"""Every client does the same things by changing its base URL and key: a table of clients, and what each must see.

A client is a program in its own language (clients/README.md), which runs as a process and stays alive between requests. Those
that take long to build run under `make compat` alone; a client that isn't installed is skipped, and says what it lacks.
docs/clients.md is this table in words, with what is particular about each.
"""

import importlib.util
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meshproxy.policy.principal import Limits
from tests.harness.waiting import wait_until

FOLDER = Path(__file__).parent / "clients"
ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
WAIT_S = 1.5  # a bucket of 40 a minute, refilled by one
TWENTY = "Answer in 20 tokens, please."


@dataclass(frozen=True)
class Client:
    """A client, and what it is known to do differently.

    `needs`, `module`: the path in its folder, and the Python package, without which it can't run. `heavy`: under `make compat`
    alone. `obeys`: it doesn't repeat a request whose answer says `x-should-retry: false`. `code`, `event_code`: its errors, and
    those of an event in a stream, have the gateway's code; `words`: their text has its message.
    """

    name: str
    folder: str
    command: tuple[str, ...]
    needs: str = ""
    module: str = ""
    heavy: bool = False
    obeys: bool = True
    code: bool = True
    event_code: bool = True
    words: bool = True


def node(name: str, **known: Any) -> Client:
    return Client(name, "node", ("node", "driver.mjs", name), needs=f"node_modules/{name}", **known)


def python(name: str, module: str, **known: Any) -> Client:
    return Client(name, "python", (sys.executable, "-W", "ignore", "driver.py", name), module=module, **known)


def built(name: str, folder: str, *command: str, needs: str, **known: Any) -> Client:
    return Client(name, folder, command, needs=needs, heavy=True, **known)


CLIENTS = [
    python("openai", "openai"),
    python("langchain", "langchain_openai"),
    python("pydantic-ai", "pydantic_ai"),
    python("meshapi", "meshapi", obeys=False),
    python("litellm", "litellm", heavy=True, code=False, event_code=False),
    node("openai-v4"),
    node("openai-v6"),
    node("openai-v7"),
    node("ai", obeys=False),
    built("openai-go", "go", "./driver", needs="driver", event_code=False, words=False),
    built("openai-java", "java", "java", "-cp", "target/classes:target/lib/*", "Driver", needs="target/lib"),
    built("async-openai", "rust", "target/debug/driver", needs="target/debug/driver", obeys=False, event_code=False),
]


class Driver:
    """A client's process."""

    def __init__(self, client: Client, site: Any) -> None:
        self.client = client
        self.site = site
        self._process = subprocess.Popen(
            client.command, cwd=FOLDER / client.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, do: str, key: str, model: str = "openai/gpt-4o", words: str = "Hello there", **more: Any) -> Any:
        """What the client saw when it did this: `text` and `total`, or a tool's `name` and `arguments`, or an `error`."""
        asked = {"do": do, "key": key, "model": model, "words": words, "retries": False, **more}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"base_url": self.site.base_url, **asked}).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        assert ready, f"{self.client.name} says nothing to {do}"
        line = self._process.stdout.readline()
        assert line, f"{self.client.name} ended with {self._process.wait(PATIENCE_S)}"
        return json.loads(line)

    def model(self, name: str) -> str:
        """A model that fails, for this client alone: the others' failures don't open its breaker."""
        return f"{name}-{CLIENTS.index(self.client)}"

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_S)
        finally:
            self._process.kill()
            self._process.stdout.close()


def missing(client: Client) -> str | None:
    """What keeps this client from running here."""
    if client.heavy and "MESHPROXY_COMPAT" not in os.environ:
        return "is run by `make compat` alone"
    program = client.command[0]
    if "/" not in program and shutil.which(program) is None:
        return f"needs {program}"
    if client.module and importlib.util.find_spec(client.module) is None:
        return f"needs the package {client.module}"
    if client.needs and not (FOLDER / client.folder / client.needs).exists():
        return f"needs clients/{client.folder}/{client.needs}, which `make compat` makes where its compiler is"
    return None


@pytest.fixture(scope="module", params=CLIENTS, ids=lambda client: client.name)
def ask(request: pytest.FixtureRequest, site: Any) -> Iterator[Driver]:
    if lack := missing(request.param):
        pytest.skip(f"{request.param.name} {lack}")
    driver = Driver(request.param, site)
    yield driver
    driver.close()


DECLARED = {
    "python": ("pyproject.toml", r'"{}(?:\[\w+\])?==([\d.]+)"'),
    "node": ("tests/compat/clients/node/package.json", r'"{}": "(?:npm:openai@)?([\d.]+)"'),
    "go": ("tests/compat/clients/go/go.mod", r"{} v([\d.]+)"),
    "java": ("tests/compat/clients/java/pom.xml", r"<artifactId>{}</artifactId>\s*<version>([\d.]+)"),
    "rust": ("tests/compat/clients/rust/Cargo.toml", r'{} = \{{ version = "=([\d.]+)"'),
}
PACKAGES = {
    "langchain": "langchain-openai",
    "pydantic-ai": "pydantic-ai-slim",
    "openai-go": "github.com/openai/openai-go/v3",
}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_the_docs_name_each_client_and_its_version(client):
    package = PACKAGES.get(client.name, client.name)
    file, pattern = DECLARED[client.folder]
    found = re.search(pattern.format(package), (ROOT / file).read_text())
    told = {"openai-java": "com.openai:openai-java"}.get(package, re.sub(r"^openai-v\d$", "openai", package))
    assert f"`{told}` {found[1]}" in (ROOT / "docs" / "clients.md").read_text()


def test_unary(ask, caller):
    assert ask("whole", caller.secret)["text"].count("Hello there") == 1


def test_stream(ask, caller):
    assert ask("stream", caller.secret)["text"].count("Hello there") == 1


def test_usage_is_the_same_whole_and_streamed(ask, caller):
    whole, stream = (ask(do, caller.secret, words=TWENTY)["total"] for do in ("whole", "stream"))
    assert whole == stream > 20


def test_tools(ask, caller):
    called = ask("tools", caller.secret, words="Use get_weather for Oslo.")
    assert (called["name"], list(called["arguments"])) == ("get_weather", ["city"])


@pytest.mark.parametrize("do", ["whole", "stream"])
@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "unauthorized", "This key is not known."),
        (402, "insufficient_credits", "less than this request may cost"),
        (400, "context_length_exceeded", "maximum context length"),
    ],
)
def test_error(ask, caller, do, status, code, words):
    asked = {
        401: {"key": "rsk_unknown"},
        402: {"key": caller.site.key(credit="0").secret},
        400: {"model": "sim/dialect-openai+error-context"},
    }[status]
    error = ask(do, **{"key": caller.secret, **asked})["error"]
    assert (status, code if ask.client.code else None) == (error["status"], error["code"])
    assert words in error["message" if ask.client.words else "inside"]
    assert (words in error["message"]) == ask.client.words


def test_429_is_waited_for_as_told(ask, caller):
    """1.5 s: a client that guesses begins with half of one, and is refused again."""
    limited = caller.site.key(limits=Limits(requests_per_minute=40, burst=1))
    ask("whole", limited.secret, retries=True)
    began = time.monotonic()
    assert "text" in ask("whole", limited.secret, retries=True)
    assert time.monotonic() - began >= WAIT_S - 0.1
    wait_until(lambda: caller.site.statuses(limited.account) == [200, 429, 200])
    limited.settled()


def test_death_in_mid_stream_is_an_error(ask, caller):
    said = ask("stream", caller.secret, model=ask.model("dies"))
    assert ("upstream_error" if ask.client.event_code else None) == said["error"]["code"]
    assert "in the middle of its answer" in said["error"]["message"]


def test_leaving_a_stream_frees_provider_hold_and_slot(ask, caller):
    """While the client lives on: nothing is freed by its exit."""
    single = caller.site.key(limits=Limits(max_parallel=1))
    assert ask("hang_up", single.secret, model="sim/slow")["text"]
    (entry,) = caller.site.received
    wait_until(lambda: entry.ended == "client_closed")
    single.settled()
    assert "text" in ask("whole", single.secret)


def test_no_second_payment(ask, caller):
    """After a 504 the provider may have done the work: the answer says x-should-retry: false."""
    error = ask("whole", caller.secret, model=ask.model("late"), retries=True)["error"]
    assert error["status"] == 504
    wait_until(lambda: 504 in caller.site.statuses(caller.account))
    assert (len(caller.site.statuses(caller.account)) == 1) == ask.client.obeys
