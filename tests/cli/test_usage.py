import io
from datetime import UTC, datetime

import pytest

from meshproxy.cli.usage import Progress
from tests.cli.conftest import REQUESTS


def sums(**fields):
    tokens = {"prompt": 10, "completion": 5, "cached": 2, "cache_write": 0, "reasoning": 0}
    audio = {"audio_prompt": 0, "audio_completion": 0}
    requests = fields.pop("requests")
    counted = {f"{name}_tokens": count * requests for name, count in (tokens | audio).items()}
    return {"requests": requests, **counted, **fields}


def test_one_row_an_account(settle, data):
    settle(*REQUESTS)
    assert data("usage") == [
        {"account": "acme", **sums(requests=3, cost_usd="2.25")},
        {"account": "bolt", **sums(requests=1, cost_usd="0.000000001")},
    ]


def test_by_model_and_session(settle, data):
    settle(*REQUESTS)
    rows = data("usage", "--account", "acme", "--by", "session,model", "--since", "1h")
    assert [(row["session_id"], row["model"], row["cost_usd"]) for row in rows] == [
        (None, "c", "0.25"),
        ("s1", "a/b", "1.50"),
        ("s2", "a/b", "0.50"),
    ]


def test_by_day_and_key(settle, data):
    settle(*REQUESTS)
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    rows = data("usage", "--by", "day", "--by", "key", "--account", "acme")
    assert [(row["key"], row["day"], row["requests"]) for row in rows] == [("key_1", today, 2), ("key_2", today, 1)]


def test_one_session(settle, data):
    settle(*REQUESTS)
    assert data("usage", "--account", "acme", "--session", "s2") == [
        {"account": "acme", **sums(requests=1, cost_usd="0.50")}
    ]


def test_text(settle, run):
    settle(*REQUESTS)
    code, out, err = run("usage", "--by", "model", "--account", "acme")
    assert (code, err) == (0, "")
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "account model requests prompt_tokens completion_tokens cached_tokens reasoning_tokens cost_usd",
        "acme a/b 2 20 10 4 0 2.00",
        "acme c 1 10 5 2 0 0.25",
    ]


def test_a_time_without_use(settle, run):
    settle(*REQUESTS)
    assert run("usage", "--until", "3d") == (0, "no usage\n", "")


def test_bad_arguments(misuse, error):
    assert "argument --since: after --until" in misuse("usage", "--since", "1h", "--until", "2h")
    words = "argument --by: 'hour' is not one of session, model, key, day"
    assert words in misuse("usage", "--by", "day,hour")
    assert error("usage", "--account", "nobody") == "account_not_found"


def test_as_csv(settle, run):
    settle(*REQUESTS)
    code, out, err = run("usage", "--account", "acme", "--by", "model", "--format", "csv")
    head, *lines = [line.split(",") for line in out.splitlines()]
    assert (code, err, head[:3], head[-1]) == (0, "", ["account", "model", "requests"], "cost_usd")
    assert [(line[0], line[1], line[2], line[-1]) for line in lines] == [
        ("acme", "a/b", "2", "2.00"),
        ("acme", "c", "1", "0.25"),
    ]


@pytest.mark.parametrize(
    ("session", "cell"),
    [
        ("=1+cmd|' /C calc'!A0", "'=1+cmd|' /C calc'!A0"),
        ("@SUM(1)", "'@SUM(1)"),
        ("-1+1", "'-1+1"),
        ("-1", "-1"),
        ("s=1", "s=1"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\t=1", "\\t=1"),
    ],
)
def test_a_clients_session_id_is_no_formula_in_csv(settle, run, session, cell):
    settle(("acme", "k", "m", session, 1_000_000_000))
    _, out, _ = run("usage", "--by", "session", "--format", "csv")
    assert out.splitlines()[1].split(",")[:3] == ["acme", cell, "1"]


def test_years_ago_are_shown_by_month(settle, data):
    settle(*REQUESTS)
    month = datetime.now(UTC).strftime("%Y-%m")
    rows = data("usage", "--account", "acme", "--by", "day", "--since", "400d")
    assert {row["day"][:7] for row in rows} == {month}
    assert sum(row["requests"] for row in rows) == 3


def test_a_report_that_takes_long_says_each_second_how_far_it_is():
    times = iter((0.0, 0.9, 1.0, 1.0, 1.5))
    stderr = io.StringIO()
    progress = Progress(stderr, lambda: next(times))
    for done in (500, 1000, 1500):
        progress(done, 10_000)
    assert stderr.getvalue() == "1,000 of 10,000 accounts ...\n"
