import asyncio
import io
import json
import os
import re
import subprocess
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import redis

from meshproxy import config
from meshproxy.cli.command_line import main
from meshproxy.ledger.connection import connect
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import HoldRequest, Settlement
from meshproxy.openai.usage import Usage
from tests.harness.process import MESHPROXY, Program

REQUESTS = [  # as `settle` takes them
    ("acme", "key_1", "a/b", "s1", 1_500_000_000),
    ("acme", "key_1", "a/b", "s2", 500_000_000),
    ("acme", "key_2", "c", None, 250_000_000),
    ("bolt", "key_3", "c", None, 1),
]


def leaves(*path):
    """Every command below `path` that runs something, with its help."""
    with redirect_stdout(io.StringIO()) as shown:
        assert main([*path, "--help"]) == 0
    _, _, commands = shown.getvalue().partition("\ncommands:\n")
    if not commands:
        yield path, shown.getvalue()
    for name in re.findall(r"^ {4}(\w+) ", commands, re.MULTILINE):
        yield from leaves(*path, name)


@contextmanager
def started(*args, **options):
    """A command as a process of its own, gone at the end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Program(*MESHPROXY, *args, log=Path(os.devnull), **{**pipes, **options}) as program:
        yield program.process
        program.end()
        program.process.communicate()


@pytest.fixture
def file(tmp_path):
    """Write a file: its path."""

    def write(text):
        path = tmp_path / "file"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def store(store_server):
    """A plain client of the server, which begins empty."""
    with redis.Redis.from_url(store_server, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def run(store, store_server, capsys, monkeypatch):
    """Run a command on the store: its exit code, stdout and stderr."""
    monkeypatch.delenv("MESHPROXY_CONFIG", raising=False)

    def run(*args):
        code = main([*args, "--redis", store_server])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def data(run):
    """Run a command with --json: what it printed, after it succeeded."""

    def data(*args):
        code, out, err = run(*args, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return data


@pytest.fixture
def error(run):
    """Run a command with --json: the code of the error it failed with."""

    def error(*args):
        code, out, err = run(*args, "--json")
        assert (code, out) == (1, "")
        return json.loads(err)["error"]["code"]

    return error


@pytest.fixture
def misuse(run):
    """Run a command that is wrong usage: what it said."""

    def misuse(*args):
        code, out, err = run(*args)
        assert (code, out) == (2, "")
        return err

    return misuse


@pytest.fixture
def settle(store, store_server):
    """Settle requests: each a tuple of account, key, model, session and cost in nano-USD."""

    async def all_of(requests):
        link = await connect(config.Redis(url=store_server))
        ledger = Ledger(link)
        for account in {account for account, *_ in requests}:
            await ledger.grant(account, 100_000_000_000)
        for number, (account, key, model, session, cost) in enumerate(requests):
            held = {"hold_id": f"hold-{number}", "account": account, "key_id": key, "session": session}
            await ledger.admit(HoldRequest(**held, amount_nusd=0, tokens=0, ttl_ms=1000, strict=True))
            assert await ledger.settle(
                Settlement(
                    **held,
                    request_id=f"req-{number}",
                    model=model,
                    upstream="sim",
                    usage=Usage(prompt=10, completion=5, cached=2),
                    usage_source="reported",
                    outcome="completed",
                    cost_nusd=cost,
                    started_ms=int(time.time() * 1000),
                )
            )
        await link.close()

    def settle(*requests):
        store.sadd("mesh:accounts", *{account for account, *_ in requests})
        for account in {account for account, *_ in requests}:
            store.set(f"mesh:{{{account}}}:record", f'{{"name": "{account}"}}')
        asyncio.run(all_of(requests))

    return settle
