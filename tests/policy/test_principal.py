import msgspec
import pytest

from meshproxy.policy.principal import Account, Key, Principal

KEY = Key(id="k1", account="acme", created_at=0.0)


@pytest.mark.parametrize(
    "models, expected",
    [(None, True), (["a/one"], True), (["b/two", "a/one"], True), (["one"], False), ([], False)],
)
def test_a_key_may_use_the_models_on_its_list(models, expected):
    key = msgspec.structs.replace(KEY, models=models)
    assert Principal(key, Account("acme")).may_use("a/one") == expected


@pytest.mark.parametrize(
    "record, kind, expected",
    [
        (KEY, Key, {"id": "k1", "account": "acme", "created_at": 0.0}),
        (Account("acme"), Account, {"name": "acme"}),
    ],
)
def test_a_record_has_what_differs_from_an_active_one_without_limits(record, kind, expected):
    assert (expected, record) == (msgspec.to_builtins(record), msgspec.convert(expected, kind))
    assert record.status == "active"


@pytest.mark.parametrize("status", ["active", "suspended", "revoked"])
def test_a_key_and_an_account_have_a_status(status):
    record = {"name": "acme", "status": status}
    key = msgspec.convert({**record, "id": "k1", "account": "acme", "created_at": 0.0}, Key)
    assert [msgspec.convert(record, Account).status, key.status] == [status, status]


def test_a_key_need_not_have_a_name():
    assert (KEY.name, KEY.hint) == ("", "")
