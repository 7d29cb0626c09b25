import json

import pytest

from meshproxy.cli.command_line import main


def test_a_grant_makes_the_account(data):
    assert data("credits", "grant", "acme", "25.00", "--note", "invoice 7") == {
        "account": "acme",
        "balance_usd": "25.00",
        "held_usd": "0.00",
        "available_usd": "25.00",
        "granted_usd": "25.00",
        "settled_usd": "0.00",
        "granted_now_usd": "25.00",
    }


def test_grants_add_up_and_can_be_taken_back(data, store):
    data("credits", "grant", "acme", "30.00")
    data("credits", "grant", "acme", "-5.000000001", "--note", "typed 30")
    assert data("credits", "show", "acme") == {
        "account": "acme",
        "balance_usd": "24.999999999",
        "held_usd": "0.00",
        "available_usd": "24.999999999",
        "granted_usd": "24.999999999",
        "settled_usd": "0.00",
    }
    events = [fields for _, fields in store.xrange("mesh:{acme}:usage")]
    assert [(event["event"], event["amount_nusd"], event["note"]) for event in events] == [
        ("grant", "30000000000", ""),
        ("grant", "-5000000001", "typed 30"),
    ]


def test_text(run):
    run("credits", "grant", "acme", "1")
    code, out, err = run("credits", "show", "acme")
    assert (code, out.splitlines()[:2], err) == (0, ["account        acme", "balance_usd    1.00"], "")


def test_no_such_account(error):
    assert error("credits", "show", "nobody") == "account_not_found"


def test_a_balance_has_a_bound(data, error):
    data("credits", "grant", "acme", "9000000")
    assert error("credits", "grant", "acme", "1") == "balance_out_of_range"
    assert data("credits", "show", "acme")["balance_usd"] == "9000000.00"


@pytest.mark.parametrize("amount", ["0", "ten", "1e2", "9000001"])
def test_bad_amounts(misuse, store, amount):
    misuse("credits", "grant", "acme", amount)
    assert store.keys() == []


def test_a_store_that_is_not_there(tmp_path, capsys):
    assert main(["credits", "show", "acme", "--json", "--redis", f"unix://:pass-word@{tmp_path}/none.sock"]) == 1
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["code"] == "ledger_unavailable"
    assert "none.sock" in error["message"]
    assert "pass-word" not in error["message"]


def test_an_embedded_store_is_out_of_reach(capsys):
    assert main(["credits", "show", "acme", "--redis", "embedded"]) == 1
    assert "--redis URL" in capsys.readouterr().err


def test_a_ref_counts_once(data, error):
    first = data("credits", "grant", "acme", "25", "--ref", "invoice-7", "--note", "paid")
    again = data("credits", "grant", "acme", "25", "--ref", "invoice-7")
    assert [told["balance_usd"] for told in (first, again)] == ["25.00", "25.00"]
    assert [told["granted_now_usd"] for told in (first, again)] == ["25.00", "0.00"]
    assert error("credits", "grant", "acme", "26", "--ref", "invoice-7") == "ref_taken"


@pytest.mark.parametrize("ref", [" invoice-7", "invoice-7\n"])
def test_white_space_around_a_ref_does_not_count(data, ref):
    data("credits", "grant", "acme", "25", "--ref", "invoice-7")
    assert data("credits", "grant", "acme", "25", "--ref", ref)["balance_usd"] == "25.00"


@pytest.mark.parametrize("ref", ["", " "])
def test_an_empty_ref_is_refused(misuse, error, ref):
    assert "argument --ref: empty" in misuse("credits", "grant", "acme", "25", "--ref", ref)
    assert error("credits", "show", "acme") == "account_not_found"


def test_history(data):
    data("credits", "grant", "acme", "25", "--ref", "invoice-7", "--note", "paid")
    data("credits", "grant", "acme", "-1.5")
    newest, oldest = data("credits", "history", "acme")
    assert (newest["amount_usd"], newest["balance_usd"], newest["note"], newest["ref"]) == ("-1.50", "23.50", "", "")
    assert (oldest["amount_usd"], oldest["note"], oldest["ref"]) == ("25.00", "paid", "invoice-7")
    assert oldest["granted_at"].endswith("Z")


def test_history_of_nobody(error):
    assert error("credits", "history", "nobody") == "account_not_found"
