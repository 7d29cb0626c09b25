import hashlib
import re

import pytest

LIMITS = ("requests_per_minute", "tokens_per_minute", "burst", "requests_per_day", "max_parallel")
BOUNDS = {
    "limits": dict.fromkeys(LIMITS),
    "budgets": {"total_usd": None, "daily_usd": None, "monthly_usd": None},
    "session_budgets": {"total_usd": None, "daily_usd": None, "monthly_usd": None},
}


def test_create_shows_the_secret_once(data, run, store):
    key = data("keys", "create", "--account", "acme")
    assert (key["account"], key["status"]) == ("acme", "active")
    assert re.fullmatch(r"rsk_[A-Za-z0-9_-]{20,}", key["key"])
    assert store.exists(f"mesh:key:{hashlib.sha256(key['key'].encode()).hexdigest()}") == 1
    everything = run("keys", "show", key["id"])[1] + run("keys", "list")[1] + run("keys", "show", key["key"])[1]
    assert key["key"] not in everything


def test_create_in_text_says_to_keep_it(run):
    code, out, err = run("keys", "create", "--account", "acme", "--name", "ci")
    assert (code, err) == (0, "")
    assert re.match(r"key +rsk_\S+\nid +\S+\naccount +acme\nname +ci\n", out)
    assert out.endswith("\nThe key is shown only now. Store it.\n")


def test_create_takes_every_limit(data):
    named = "--name ci --default-model a/b --models a/b,c --models d --expires 2099-01-01T00:00:00Z"
    limits = "--requests-per-minute 60 --tokens-per-minute 5000 --burst 5 --requests-per-day 9 --max-parallel 2"
    budgets = "--budget 50 --budget-daily 5.5 --budget-monthly 20 --session-budget 0.25"
    flags = f"{named} {limits} {budgets} --param temperature=0.2 --clamp".split()
    made = data("keys", "create", "--account", "acme", *flags)
    key = data("keys", "show", made["id"])
    expected = {
        "account": "acme",
        "name": "ci",
        "status": "active",
        "expires_at": "2099-01-01T00:00:00Z",
        "default_model": "a/b",
        "models": ["a/b", "c", "d"],
        "params": {"temperature": 0.2},
        "clamp": True,
        "limits": {
            "requests_per_minute": 60,
            "tokens_per_minute": 5000,
            "burst": 5,
            "requests_per_day": 9,
            "max_parallel": 2,
        },
        "budgets": {"total_usd": "50.00", "daily_usd": "5.50", "monthly_usd": "20.00"},
        "session_budgets": {"total_usd": "0.25", "daily_usd": None, "monthly_usd": None},
    }
    assert {name: key[name] for name in expected} == expected


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--budget", "1e3"], "argument --budget: '1e3' is not a decimal amount"),
        (["--budget=-1"], "argument --budget: '-1' is negative"),
        (["--burst", "0"], "argument --burst: '0' is not a whole number"),
        (["--expires", "2020-01-01T00:00:00Z"], "argument --expires: '2020-01-01T00:00:00Z' is not in the future"),
        (["--param", "user=me"], "argument --param: user: 'me' is not JSON"),
        (["--param", "messages=[]"], "argument --param: messages"),
        (["--param", "temperature=3"], "argument --param: temperature"),
        (["--default-model", "a", "--models", "b"], "argument --default-model: a is not one of --models"),
        (["--account", "a{b}"], "argument --account"),
        (["--account", "*"], "argument --account"),
    ],
)
def test_bad_values_are_wrong_usage_and_make_nothing(misuse, store, flags, words):
    assert words in misuse("keys", "create", "--account", "acme", *flags)
    assert store.keys() == []


def test_list_all_or_of_one_account(data, run):
    first = data("keys", "create", "--account", "acme", "--name", "one")
    second = data("keys", "create", "--account", "bolt", "--name", "two")
    assert sorted(key["id"] for key in data("keys", "list")) == sorted([first["id"], second["id"]])
    assert [key["id"] for key in data("keys", "list", "--account", "bolt")] == [second["id"]]
    head, line = run("keys", "list", "--account", "acme")[1].splitlines()
    assert head.split()[:5] == ["id", "account", "name", "hint", "status"]
    assert line.split()[:3] == [first["id"], "acme", "one"]


def test_list_of_nothing(run, error):
    assert run("keys", "list") == (0, "no keys\n", "")
    assert error("keys", "list", "--account", "nobody") == "account_not_found"


def test_a_key_is_found_by_id_prefix_and_secret(data):
    key = data("keys", "create", "--account", "acme")
    found = [data("keys", "show", wanted)["id"] for wanted in (key["id"], key["id"][:12], key["key"])]
    assert [key["id"]] * 3 == found


def test_an_unknown_secret_is_not_repeated(run):
    code, out, err = run("keys", "show", "rsk_" + "x" * 40)
    assert (code, out) == (1, "")
    assert "xxx" not in err


def test_suspend_and_resume_a_key(data):
    key = data("keys", "create", "--account", "acme")
    assert data("keys", "suspend", key["id"])["status"] == "suspended"
    assert data("keys", "show", key["id"])["status"] == "suspended"
    assert data("keys", "resume", key["key"])["status"] == "active"


def test_suspend_and_resume_an_account(data, error):
    data("keys", "create", "--account", "acme")
    assert data("keys", "suspend", "--account", "acme")["status"] == "suspended"
    assert data("keys", "limits", "--account", "acme")["status"] == "suspended"
    assert data("keys", "resume", "--account", "acme")["status"] == "active"
    assert error("keys", "suspend", "--account", "nobody") == "account_not_found"


def test_revoked_is_for_ever(data, error):
    key = data("keys", "create", "--account", "acme")
    assert data("keys", "revoke", key["id"])["status"] == "revoked"
    assert data("keys", "revoke", key["id"])["status"] == "revoked"
    assert error("keys", "resume", key["id"]) == "key_revoked"
    assert error("keys", "suspend", key["id"]) == "key_revoked"


def test_limits_of_a_key(data):
    key = data("keys", "create", "--account", "acme", "--burst", "3")
    named = {"id": key["id"], "account": "acme"}
    assert data("keys", "limits", key["id"]) == named | BOUNDS | {"limits": BOUNDS["limits"] | {"burst": 3}}
    changed = data("keys", "limits", key["id"], "--requests-per-minute", "9", "--budget-daily", "1")
    assert changed["limits"] == BOUNDS["limits"] | {"requests_per_minute": 9, "burst": 3}
    assert changed["budgets"] == {"total_usd": None, "daily_usd": "1.00", "monthly_usd": None}
    assert data("keys", "limits", key["id"]) == changed
    cleared = data("keys", "limits", key["id"], "--clear", "--session-budget", "2")
    assert cleared == named | BOUNDS | {
        "session_budgets": {"total_usd": "2.00", "daily_usd": None, "monthly_usd": None}
    }


def test_limits_of_an_account(data, misuse):
    data("keys", "create", "--account", "acme")
    changed = data("keys", "limits", "--account", "acme", "--tokens-per-minute", "1000")
    assert changed == {
        "account": "acme",
        "status": "active",
        "limits": BOUNDS["limits"] | {"tokens_per_minute": 1000},
        "budgets": BOUNDS["budgets"],
    }
    assert data("keys", "limits", "--account", "acme", "--budget-monthly", "5")["budgets"]["monthly_usd"] == "5.00"
    assert data("keys", "limits", "--account", "acme", "--clear")["limits"] == BOUNDS["limits"]
    assert "only a key has one" in misuse("keys", "limits", "--account", "acme", "--session-budget", "1")


def test_a_key_or_an_account_is_wanted(misuse):
    assert "one of the arguments KEY --account is required" in misuse("keys", "suspend")


def test_update_changes_what_is_named(data, store):
    key = data("keys", "create", "--account", "acme", "--name", "ci", "--burst", "5")
    changed = data(*f"keys update {key['id']} --models a,b --default-model a --expires 2099-01-01 --budget 3".split())
    assert (changed["name"], changed["models"], changed["default_model"]) == ("ci", ["a", "b"], "a")
    assert (changed["expires_at"], changed["budgets"]["total_usd"]) == ("2099-01-01T00:00:00Z", "3.00")
    assert changed["limits"]["burst"] == 5
    assert data("keys", "show", key["key"])["id"] == key["id"]
    lifted = data("keys", "update", key["id"], "--any-model", "--no-expiry", "--no-default-model", "--name", "x")
    assert [lifted[name] for name in ("models", "expires_at", "default_model", "name")] == [None, None, None, "x"]


def test_update_may_end_a_key_at_once(data):
    key = data("keys", "create", "--account", "acme")
    assert data("keys", "update", key["id"], "--expires", "2020-01-01")["expires_at"] == "2020-01-01T00:00:00Z"


def test_update_keeps_the_default_among_the_models(data, error):
    key = data("keys", "create", "--account", "acme", "--default-model", "a")
    assert error("keys", "update", key["id"], "--models", "b") == "validation_error"


def test_update_of_nothing_is_wrong_usage(misuse):
    assert "no flag names a change" in misuse("keys", "update", "key_1")


def test_rotate_gives_the_same_key_another_secret(data, error):
    key = data("keys", "create", "--account", "acme", "--budget", "5")
    rotated = data("keys", "rotate", key["id"])
    assert (rotated["id"], rotated["account"], rotated["budgets"]) == (key["id"], "acme", key["budgets"])
    assert rotated["key"] != key["key"]
    assert data("keys", "show", rotated["key"])["id"] == key["id"]
    assert error("keys", "show", key["key"]) == "key_not_found"


def test_rotate_with_a_grace_leaves_the_old_secret_for_a_while(data, store):
    key = data("keys", "create", "--account", "acme")
    rotated = data("keys", "rotate", key["id"], "--grace", "1h")
    assert [data("keys", "show", secret)["id"] for secret in (key["key"], rotated["key"])] == [key["id"]] * 2
    old = f"mesh:key:{hashlib.sha256(key['key'].encode()).hexdigest()}"
    assert 3500 < store.ttl(old) <= 3600


def test_a_revoked_key_is_not_rotated(data, error):
    key = data("keys", "create", "--account", "acme")
    data("keys", "revoke", key["id"])
    assert error("keys", "rotate", key["id"]) == "key_revoked"


def test_list_tells_what_keys_spent(settle, data):
    key = data("keys", "create", "--account", "acme", "--budget", "5")
    settle(("acme", key["id"], "a/b", None, 1_500_000_000))
    (row,) = data("keys", "list")
    assert (row["spend"]["total_usd"], row["spend"]["day_usd"], row["budgets"]["total_usd"]) == ("1.50", "1.50", "5.00")
    assert row["last_used_at"] >= row["created_at"]


def test_list_by_pages(data):
    ids = [data("keys", "create", "--account", name)["id"] for name in ("a", "b", "c")]
    pages = [[key["id"] for key in data("keys", "list", "--limit", "2", *after)] for after in ([], ["--after", ids[1]])]
    assert [ids[:2], ids[2:]] == pages
