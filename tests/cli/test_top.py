import os
import pty
import signal
import time

from meshproxy.cli.usage import CLEAR
from tests.cli.conftest import REQUESTS, started


def test_shows_the_most_expensive_first(settle, data, run):
    settle(*REQUESTS)
    rows = data("top")
    assert [(row["account"], row["model"], row["requests"], row["cost_usd"]) for row in rows] == [
        ("acme", "a/b", 2, "2.00"),
        ("acme", "c", 1, "0.25"),
        ("bolt", "c", 1, "0.000000001"),
    ]
    assert data("top", "--account", "bolt") == [rows[2]]
    assert rows[0] == {
        "account": "acme",
        "model": "a/b",
        "requests": 2,
        "requests_per_minute": 0.4,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "cost_usd": "2.00",
        "refused": 0,
    }
    assert run("top", "--once")[1].splitlines()[1].split()[:3] == ["acme", "a/b", "2"]


def test_of_nothing(run):
    assert run("top") == (0, "nothing was settled in the last 5 min\n", "")


def test_a_terminal_is_refreshed_until_interrupted(settle, store_server):
    settle(*REQUESTS)
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "100", "LINES": "4"}
    with started("top", "--interval", "1", "--redis", store_server, stdout=theirs, env=env) as process:
        os.close(theirs)
        seen = b""
        while seen.count(CLEAR.encode()) < 2:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    os.close(ours)
    first = seen.decode().split(CLEAR)[1].splitlines()
    assert first[0] == "last 5 min: 4 requests, 0 refused, 2.250000001 USD    Ctrl-C ends"
    assert [line.split()[:2] for line in first[2:]] == [["account", "model"]]  # four lines fit, one is the prompt's


def test_refusals_are_told_once_an_account(settle, data, store):
    settle(*REQUESTS)
    now = time.time()
    hour = time.strftime("%Y-%m-%dT%H", time.gmtime(now))
    for account, count in (("acme", 7), ("flood", 900)):
        store.sadd("mesh:accounts", account)
        store.hset(f"mesh:{{{account}}}:refused:{hour}", int(now) // 60 % 60, count)
    assert [(row["account"], row["model"], row["refused"]) for row in data("top")] == [
        ("acme", "a/b", 7),
        ("acme", "c", 0),
        ("bolt", "c", 0),
        ("flood", "", 900),
    ]


def test_the_one_that_spends_most_of_many_accounts_is_first(settle, data):
    settle(*((f"a{number:03}", "k", "m", None, 5 if number == 698 else 1) for number in range(700)))
    rows = data("top")
    assert (len(rows), rows[0]["account"], rows[0]["cost_usd"]) == (700, "a698", "0.000000005")
