"""Accounts, keys and templates: what is stored, how it is found, and how soon a change is seen."""

import asyncio
import hashlib
import re

import msgspec
import pytest

from meshproxy.errors import Fault
from meshproxy.ledger import templates as templates_module
from meshproxy.ledger.connection import StoreError
from meshproxy.ledger.directory import Directory, mint_secret
from meshproxy.ledger.keyspace import AccountKeys, key_record
from meshproxy.policy.principal import Account, Budgets, Key, Limits, Principal
from meshproxy.policy.template import Template


@pytest.fixture
def directory(store, clock):
    return Directory(store, clock, wall_clock=lambda: 1_700_000_000.5)


def template(name, owner="acme", **fields):
    id_ = f"{hashlib.md5(f'{owner}/{name}'.encode()).hexdigest()}"
    id_ = f"{id_[:8]}-{id_[8:12]}-{id_[12:16]}-{id_[16:20]}-{id_[20:]}"
    fields = {"id": id_, "system": f"{name} of {owner}", "is_global": owner is None, **fields}
    return Template(name=name, owner=owner, created_at=1.0, updated_at=2.0, **fields)


async def test_a_minted_key_and_what_is_kept_of_it(directory, store):
    secret, key = await directory.create_key("acme", name="web", limits=Limits(60, None, 10), budgets=Budgets(5))
    assert re.fullmatch(r"rsk_[A-Za-z0-9]{43}", secret)
    assert re.fullmatch(r"key_[A-Za-z0-9]{16}", key.id)
    expected = Key(
        id=key.id,
        account="acme",
        created_at=1_700_000_000.5,
        name="web",
        hint=f"{secret[:8]}...{secret[-4:]}",
        limits=Limits(60, None, 10),
        budgets=Budgets(5),
    )
    assert key == expected
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert msgspec.json.decode(await store.execute("GET", key_record(digest)), type=Key) == expected
    assert secret not in repr(await everything(store))
    assert await directory.list_accounts() == [Account("acme")]


async def everything(store):
    readers = {b"string": "GET", b"hash": "HGETALL", b"set": "SMEMBERS"}
    names = await store.execute("KEYS", "*")
    return {name: await store.execute(readers[await store.execute("TYPE", name)], name) for name in names}


def test_secrets_differ():
    assert len({mint_secret() for _ in range(100)}) == 100


async def test_a_secret_leads_to_its_principal(directory):
    secret, key = await directory.create_key("acme")
    assert await directory.principal(secret) == Principal(key, Account("acme"))


@pytest.mark.parametrize("secret", ["rsk_unknown", "", "rsk_\udcff".encode("utf-8", "replace").decode(), "x" * 10_000])
async def test_an_unknown_secret_leads_nowhere(directory, secret):
    assert await directory.principal(secret) is None


async def test_a_second_key_leaves_the_account_alone(directory):
    await directory.put_account(Account("acme", "suspended", Limits(7)))
    secret, key = await directory.create_key("acme")
    assert await directory.principal(secret) == Principal(key, Account("acme", "suspended", Limits(7)))


async def test_a_change_is_seen_at_once_here_and_after_the_time_to_live_elsewhere(directory, store, clock):
    elsewhere = Directory(store, clock)
    secret, key = await directory.create_key("acme")
    for each in (directory, elsewhere):
        assert (await each.principal(secret)).key.status == "active"
    assert await directory.update_key(msgspec.structs.replace(key, status="revoked"))
    await directory.put_account(Account("acme", "suspended"))
    seen = await directory.principal(secret)
    assert (seen.key.status, seen.account.status) == ("revoked", "suspended")
    assert (await elsewhere.principal(secret)).key.status == "active"
    clock.now += 1.0
    seen = await elsewhere.principal(secret)
    assert (seen.key.status, seen.account.status) == ("revoked", "suspended")


async def test_a_new_key_works_although_it_was_tried_before(directory, monkeypatch):
    monkeypatch.setattr("meshproxy.ledger.directory.mint_secret", lambda: "rsk_foretold")
    assert await directory.principal("rsk_foretold") is None
    _, key = await directory.create_key("acme")
    assert (await directory.principal("rsk_foretold")).key == key


async def test_a_key_that_is_not_there_cannot_be_updated(directory):
    assert not await directory.update_key(Key("key_none", "acme", 1.0))
    assert await directory.list_keys() == []


async def test_keys_are_found_by_id_beginning_and_secret(directory):
    secret, key = await directory.create_key("acme")
    _, other = await directory.create_key("acme")
    assert await directory.find_key(key.id) == key
    assert await directory.find_key(secret) == key
    shared = next(n for n in range(20) if key.id[: n + 1] != other.id[: n + 1])
    assert await directory.find_key(key.id[: shared + 1]) == key
    assert await directory.find_key("key_") is None  # more than one
    for wanted in ("key_none", "rsk_none", "*", "", "key_[a-z]*", "a" * 1000):
        assert await directory.find_key(wanted) is None


async def test_keys_are_listed_by_account_or_all(store, clock):
    ticks = iter(range(100))
    directory = Directory(store, clock, wall_clock=lambda: float(next(ticks)))
    made = [(await directory.create_key(account))[1] for account in ("acme", "beta", "acme")]
    assert await directory.list_keys() == made
    assert await directory.list_keys("acme") == [made[0], made[2]]
    assert await directory.list_keys("nobody") == []


@pytest.mark.parametrize("name", ["", "*", "a{b}", "-a", "a b", "a/b", "ä", "a" * 65, "a\n"])
async def test_names_that_no_account_may_have(directory, name):
    with pytest.raises(ValueError, match="account's name"):
        await directory.create_key(name)
    with pytest.raises(ValueError, match="account's name"):
        await directory.put_account(Account(name))
    assert await directory.account(name) is None
    assert await directory.list_accounts() == []


async def test_accounts(directory):
    assert await directory.account("acme") is None
    await directory.put_account(Account("b"))
    await directory.put_account(Account("acme", limits=Limits(5)))
    assert await directory.account("acme") == Account("acme", limits=Limits(5))
    assert await directory.list_accounts() == [Account("acme", limits=Limits(5)), Account("b")]


async def test_a_record_that_cannot_be_read_is_an_error(directory, store):
    secret, _ = await directory.create_key("acme")
    await store.execute("SET", AccountKeys("acme").record, "nonsense")
    with pytest.raises(StoreError, match="can't be read"):
        await directory.principal(secret)


async def test_templates_are_found_by_name_and_by_id(directory):
    mine = template("greet")
    assert await directory.put_template(mine)
    for wanted in ("greet", mine.id, mine.id.upper()):
        assert await directory.template("acme", wanted) == mine
        assert await directory.template("beta", wanted) is None
    for wanted in ("nothing", "a" * 129, "", "gr*", "{{greet}}"):
        assert await directory.template("acme", wanted) is None


async def test_own_templates_come_before_global_ones(directory):
    mine, shared, other = template("greet"), template("greet", None), template("bye", None)
    for each in (mine, shared, other):
        assert await directory.put_template(each)
    assert await directory.template("acme", "greet") == mine
    assert await directory.template("beta", "greet") == shared
    assert await directory.template("acme", shared.id) == shared
    assert await directory.list_templates("acme") == [other, mine, shared]
    assert await directory.list_templates("beta") == [other, shared]


async def test_a_name_belongs_to_one_template_of_an_owner(directory):
    mine = template("greet")
    rival = template("greet", id="11111111-1111-1111-1111-111111111111")
    assert await directory.put_template(mine)
    assert not await directory.put_template(rival)
    assert await directory.template("acme", "greet") == mine
    assert await directory.template("acme", rival.id) is None
    assert await directory.put_template(template("greet", "beta"))


async def test_one_of_many_who_want_a_name_gets_it(directory):
    rivals = [template("greet", id=f"{n:08d}-1111-1111-1111-111111111111") for n in range(20)]
    assert sorted(await asyncio.gather(*map(directory.put_template, rivals))) == [False] * 19 + [True]
    assert len(await directory.list_templates("acme")) == 1


async def test_a_renamed_template_leaves_its_old_name(directory):
    mine = template("greet")
    await directory.put_template(mine)
    renamed = msgspec.structs.replace(mine, name="hello")
    assert await directory.put_template(renamed)
    assert await directory.template("acme", "greet") is None
    assert await directory.template("acme", "hello") == renamed
    assert await directory.template("acme", mine.id) == renamed
    assert await directory.put_template(template("greet", id="11111111-1111-1111-1111-111111111111"))


async def test_a_deleted_template_is_gone_with_its_name(directory, store):
    mine = template("greet")
    await directory.put_template(mine)
    assert await directory.template("acme", "greet") == mine
    assert await directory.delete_template(mine)
    assert not await directory.delete_template(mine)
    assert await directory.template("acme", "greet") is None
    assert await store.execute("KEYS", "*") == []


async def test_an_edited_template_is_seen_elsewhere_after_the_time_to_live(directory, store, clock):
    elsewhere = Directory(store, clock)
    mine = template("greet")
    await directory.put_template(mine)
    assert await elsewhere.template("acme", "greet") == mine
    edited = msgspec.structs.replace(mine, system="other words")
    await directory.put_template(edited)
    assert await directory.template("acme", "greet") == edited
    assert await elsewhere.template("acme", "greet") == mine
    clock.now += 1.0
    assert await elsewhere.template("acme", "greet") == edited


async def test_an_owner_has_so_many_templates_and_no_more(directory, monkeypatch):
    monkeypatch.setattr(templates_module, "MAX_TEMPLATES", 2)
    for name in ("a", "b"):
        assert await directory.put_template(template(name))
    with pytest.raises(Fault, match="no room") as caught:
        await directory.put_template(template("c"))
    assert caught.value.problem.code == "validation_error"
    assert await directory.put_template(template("a", system="a new version fits"))
    assert [each.name for each in await directory.list_templates("acme")] == ["a", "b"]


async def test_an_owners_templates_have_so_many_bytes_and_no_more(directory, monkeypatch):
    monkeypatch.setattr(templates_module, "MAX_OWNER_BYTES", 1000)
    assert await directory.put_template(template("a", system="x" * 600))
    with pytest.raises(Fault, match="no room"):
        await directory.put_template(template("b", system="x" * 600))
    assert await directory.put_template(template("a", system="x" * 700))
