import msgspec
import pytest

from meshproxy.errors import GatewayError
from meshproxy.policy.principal import Account, Bounds, Budgets, Key, KeyChange, Limits, Principal

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


@pytest.mark.parametrize(
    "change, expected",
    [
        (KeyChange(name="n" * 257), ("string_too_long", ("body", "name"), "At most 256 characters")),
        *(
            (KeyChange(models=models), ("value_error", ("body", "models"), "1 to 1000 names, or null for all models"))
            for models in ([], [""], ["m"] * 1001)
        ),
        (
            KeyChange(models=["a"], default_model="b"),
            ("value_error", ("body", "default_model"), "b is not among the models"),
        ),
        (
            KeyChange(bounds=Bounds(limits={"requests_per_day": 10**15})),
            ("value_error", ("body", "requests_per_day"), "At most 100000000"),
        ),
        (
            KeyChange(params={"stream": True}),
            ("extra_forbidden", ("body", "params", "stream"), "Not a request parameter that can be stored"),
        ),
    ],
)
def test_a_change_that_makes_no_key_is_refused(change, expected):
    with pytest.raises(GatewayError) as caught:
        change.applied_to(KEY)
    (detail,) = caught.value.response.details
    assert (detail.type, detail.loc, detail.msg) == expected


@pytest.mark.parametrize(
    "fields",
    [{"name": "n" * 256}, {"models": None, "default_model": "b"}, {"models": ["m"] * 1000}, {"params": {"top_p": 0.5}}],
)
def test_a_change_is_applied(fields):
    assert KeyChange(**fields).applied_to(KEY) == msgspec.structs.replace(KEY, **fields)


@pytest.mark.parametrize(
    "clear, left",
    [(False, (Limits(5, burst=9), Budgets(1, 2), Budgets(3))), (True, (Limits(burst=9), Budgets(), Budgets()))],
)
def test_bounds_are_changed_one_by_one_or_cleared_first(clear, left):
    key = msgspec.structs.replace(KEY, limits=Limits(5), budgets=Budgets(1, 2), session=Budgets(3))
    changed = KeyChange(bounds=Bounds(limits={"burst": 9}, clear=clear)).applied_to(key)
    assert (changed.limits, changed.budgets, changed.session) == left
