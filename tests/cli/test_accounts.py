import time

import pytest

from tests.cli.conftest import REQUESTS

NO_SPEND = {"total_usd": "0.00", "day_usd": "0.00", "month_usd": "0.00"}


def test_list_has_an_account_that_only_a_grant_made(data):
    data("keys", "create", "--account", "acme")
    data("credits", "grant", "amce", "25")
    found = {each["account"]: each["balance_usd"] for each in data("accounts", "list")}
    assert found == {"acme": "0.00", "amce": "25.00"}


def test_list_by_pages(data):
    for name in ("a", "b", "c"):
        data("credits", "grant", name, "1")
    names = [
        [each["account"] for each in data("accounts", "list", "--limit", "2", *after)]
        for after in ([], ["--after", "b"])
    ]
    assert names == [["a", "b"], ["c"]]


def test_list_in_text(run):
    run("credits", "grant", "acme", "2")
    head, line = run("accounts", "list")[1].splitlines()
    assert head.split()[:3] == ["account", "status", "balance_usd"]
    assert line.split()[:3] == ["acme", "active", "2.00"]


def test_show(settle, data):
    settle(*REQUESTS)
    shown = data("accounts", "show", "acme")
    assert (shown["balance_usd"], shown["held_usd"], shown["available_usd"]) == ("97.75", "0.00", "97.75")
    assert (shown["spend"]["total_usd"], shown["running"], shown["keys"]) == ("2.25", 0, 0)


@pytest.mark.parametrize("command", ["show", "limits", "suspend", "resume"])
def test_an_unknown_account(error, command):
    assert error("accounts", command, "nobody") == "account_not_found"


def test_limits(data):
    data("credits", "grant", "acme", "1")
    changed = data(
        "accounts", "limits", "acme", "--budget-monthly", "5", "--max-parallel", "2", "--requests-per-day", "9"
    )
    assert changed["budgets"] == {"total_usd": None, "daily_usd": None, "monthly_usd": "5.00"}
    assert (changed["limits"]["max_parallel"], changed["limits"]["requests_per_day"]) == (2, 9)
    assert data("accounts", "limits", "acme") == changed
    assert data("accounts", "limits", "acme", "--clear", "--budget-daily", "1")["budgets"] == {
        "total_usd": None,
        "daily_usd": "1.00",
        "monthly_usd": None,
    }


def test_suspend_and_resume(data):
    data("credits", "grant", "acme", "1")
    assert data("accounts", "suspend", "acme")["status"] == "suspended"
    assert data("accounts", "resume", "acme")["status"] == "active"


def test_delete_leaves_nothing_of_it(data, error, store):
    key = data("keys", "create", "--account", "acme")
    data("credits", "grant", "acme", "1", "--ref", "r")
    assert data("accounts", "delete", "acme", "--yes")["deleted"] is True
    assert error("keys", "show", key["id"]) == "key_not_found"
    assert store.keys("*acme*") == []


def test_delete_wants_a_yes(misuse, store):
    assert "for good" in misuse("accounts", "delete", "acme")
    assert store.keys() == []


def test_each_change_is_audited(data):
    key = data("keys", "create", "--account", "acme", "--name", "ci")
    data("keys", "rotate", key["id"])
    data("keys", "update", key["id"], "--name", "nightly")
    data("accounts", "limits", "acme", "--max-parallel", "2")
    data("credits", "grant", "acme", "5", "--ref", "r1")
    data("credits", "grant", "acme", "5", "--ref", "r1")
    data("accounts", "suspend", "acme")
    data("keys", "revoke", key["id"])
    events = data("accounts", "audit")
    assert [event["action"] for event in reversed(events)] == [
        "key.create",
        "key.rotate",
        "key.update",
        "account.limits",
        "credit.grant",
        "account.suspend",
        "key.revoke",
    ]
    assert {event["actor"].partition(":")[0] for event in events} == {"cli"}
    assert key["key"] not in str(events)
    assert events[4]["detail"] == {"name": "nightly"}
    assert events[0]["at"][:10] == time.strftime("%Y-%m-%d", time.gmtime())


def test_what_a_request_came_to(settle, data, error):
    settle(*REQUESTS)
    shown = data("requests", "show", "req-0")
    expected = {
        "request_id": "req-0",
        "account": "acme",
        "key_id": "key_1",
        "session_id": "s1",
        "model": "a/b",
        "upstream": "sim",
        "attempts": 0,
        "outcome": "completed",
        "cost_usd": "1.50",
        "prompt_tokens": 10,
    }
    assert {name: shown[name] for name in expected} == expected
    assert error("requests", "show", "req-9") == "request_not_found"
