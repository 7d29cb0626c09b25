"""Accounts, keys and templates: what is stored, how it is found, and how soon a change is seen."""

import asyncio
import hashlib
import re
from functools import partial

import msgspec
import pytest
from msgspec.structs import replace

from meshproxy.errors import GatewayError
from meshproxy.ledger import templates as templates_module
from meshproxy.ledger.directory import Directory, digest_of, mint_secret
from meshproxy.ledger.records import AUDIT, KEY_IDS, AccountKeys, key_record
from meshproxy.ledger.store import Store, StoreError
from meshproxy.policy.principal import Account, Budgets, Key, Limits, Principal
from meshproxy.policy.template import Template


class Between(Store):
    """A store in which something `happens` behind each reading of a record."""

    def __init__(self, store, happens):
        self._store, self._happens = store, happens

    @property
    def connected(self):
        return self._store.connected

    def send(self, op, command):
        reply = self._store.send(op, command)
        return asyncio.ensure_future(self._read(reply)) if op == "GET" else reply

    async def _read(self, reply):
        record = await reply
        await self._happens()
        return record

    async def close(self):
        await self._store.close()


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
    readers = {b"string": ("GET",), b"hash": ("HGETALL",), b"set": ("SMEMBERS",), b"stream": ("XREVRANGE", "+", "-")}
    found = {}
    for name in await store.execute("KEYS", "*"):
        command, *args = readers[await store.execute("TYPE", name)]
        found[name] = await store.execute(command, name, *args)
    return found


def test_secrets_differ():
    assert len({mint_secret() for _ in range(100)}) == 100


async def test_a_secret_leads_to_its_principal(directory):
    secret, key = await directory.create_key("acme")
    assert await directory.principal(secret) == Principal(key, Account("acme"))


@pytest.mark.parametrize("secret", ["rsk_unknown", "", "rsk_\udcff".encode("utf-8", "replace").decode(), "x" * 10_000])
async def test_an_unknown_secret_leads_nowhere(directory, secret):
    assert await directory.principal(secret) is None


async def test_a_second_key_leaves_the_account_alone(directory):
    await directory.ensure_account("acme")
    await directory.change_account("acme", lambda account: replace(account, status="suspended", limits=Limits(7)))
    secret, key = await directory.create_key("acme")
    assert await directory.principal(secret) == Principal(key, Account("acme", "suspended", Limits(7)))


async def test_a_change_is_seen_at_once_here_and_after_the_time_to_live_elsewhere(directory, store, clock):
    elsewhere = Directory(store, clock)
    secret, key = await directory.create_key("acme")
    for each in (directory, elsewhere):
        assert (await each.principal(secret)).key.status == "active"
    await directory.set_key_status(key.id, "revoked")
    await directory.set_account_status("acme", "suspended")
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


async def test_what_is_not_there_cannot_be_changed(directory, store, snapshot):
    assert await directory.change_key("key_none", lambda key: replace(key, name="x")) is None
    assert await directory.set_key_status("key_none", "revoked") is None
    assert await directory.rotate_key("key_none") is None
    assert await directory.change_account("nobody", lambda account: account) is None
    assert await directory.delete_account("nobody") is None
    assert await snapshot(store) == {}


async def test_no_change_in_flight_undoes_a_revocation(directory, store):
    """Another revokes between this one's reading and writing."""
    secret, key = await directory.create_key("acme")
    elsewhere = Directory(store)
    revoked = []

    async def revoke():
        if not revoked:
            revoked.append(await elsewhere.set_key_status(key.id, "revoked"))

    changed = await Directory(Between(store, revoke)).change_key(key.id, lambda key: replace(key, limits=Limits(9)))
    assert (changed.status, changed.limits) == ("revoked", Limits(9))
    assert (await directory.principal(secret)).key == changed


async def test_a_key_that_others_change_each_time_is_a_conflict(directory, store):
    elsewhere = Directory(store)
    _, key = await directory.create_key("acme")
    names = iter(map(str, range(99)))

    async def rename():
        name = next(names)
        await elsewhere.change_key(key.id, lambda key: replace(key, name=name))

    with pytest.raises(GatewayError) as caught:
        await Directory(Between(store, rename)).change_key(key.id, lambda key: replace(key, limits=Limits(9)))
    assert (caught.value.response.status, caught.value.response.code) == (409, "changed_meanwhile")


async def test_of_many_changes_at_once_none_is_lost(directory):
    _, key = await directory.create_key("acme")
    fields = [{"name": "n"}, {"models": ["m"]}, {"limits": Limits(1)}, {"expires_at": 9.0}, {"default_model": "d"}]
    await asyncio.gather(*(directory.change_key(key.id, partial(replace, **each)) for each in fields))
    found = await directory.find_key(key.id)
    assert (found.name, found.models, found.limits, found.expires_at, found.default_model) == (
        *("n", ["m"], Limits(1), 9.0, "d"),
    )


async def test_a_revoked_key_stays_revoked(directory):
    _, key = await directory.create_key("acme")
    await directory.set_key_status(key.id, "revoked")
    with pytest.raises(GatewayError, match="can't be taken back"):
        await directory.set_key_status(key.id, "active")
    with pytest.raises(GatewayError, match="can't be taken back"):
        await directory.rotate_key(key.id)
    assert (await directory.find_key(key.id)).status == "revoked"


async def test_a_rotated_key_has_another_secret_and_is_the_same_key(directory):
    old, key = await directory.create_key("acme", limits=Limits(7))
    new, rotated = await directory.rotate_key(key.id)
    assert rotated == replace(key, hint=rotated.hint)
    assert rotated.hint.startswith(new[:8])
    assert await directory.principal(old) is None
    assert (await directory.principal(new)).key == await directory.find_key(key.id) == rotated
    assert await directory.list_keys("acme") == [rotated]


async def test_both_secrets_work_until_the_grace_has_passed(directory, store):
    old, key = await directory.create_key("acme")
    new, rotated = await directory.rotate_key(key.id, grace_s=3600)
    assert (await directory.principal(old)).key == (await directory.principal(new)).key == rotated
    assert 3590 < await store.execute("TTL", key_record(digest_of(old))) <= 3600
    await store.execute("DEL", key_record(digest_of(old)))
    assert await Directory(store).principal(old) is None


async def test_what_changes_changes_for_both_secrets(directory):
    old, key = await directory.create_key("acme")
    new, _ = await directory.rotate_key(key.id, grace_s=3600)
    await directory.set_key_status(key.id, "revoked")
    assert [(await directory.principal(secret)).key.status for secret in (old, new)] == ["revoked", "revoked"]


async def test_the_graces_of_several_rotations_are_each_their_own(directory):
    first, key = await directory.create_key("acme")
    second, _ = await directory.rotate_key(key.id, grace_s=3600)
    third, rotated = await directory.rotate_key(key.id)
    assert await directory.principal(second) is None
    assert [(await directory.principal(secret)).key for secret in (first, third)] == [rotated, rotated]


async def test_a_rotation_in_flight_undoes_no_revocation(directory, store):
    _, key = await directory.create_key("acme")
    results = await asyncio.gather(
        *(directory.rotate_key(key.id) for _ in range(3)), directory.set_key_status(key.id, "revoked"),
        return_exceptions=True,
    )  # fmt: skip
    assert (await directory.find_key(key.id)).status == "revoked"
    secrets = [result[0] for result in results if isinstance(result, tuple) and isinstance(result[1], Key)]
    assert {"revoked"} >= {(await directory.principal(secret)).key.status for secret in secrets[-1:]}


async def test_changes_by_many_at_once_wait_for_each_other(directory):
    _, key = await directory.create_key("acme")

    async def allow(model):
        def change(present):
            return replace(present, models=[*(present.models or []), model])

        await directory.change_key(key.id, change)

    await asyncio.gather(*(allow(f"m{number}") for number in range(24)))
    assert len((await directory.find_key(key.id)).models) == 24


class Dying:
    """A store whose process dies before its command of this number."""

    def __init__(self, store, number):
        self._store = store
        self._left = number

    async def execute(self, *command):
        self._die_in_time()
        return await self._store.execute(*command)

    async def run(self, *call):
        self._die_in_time()
        return await self._store.run(*call)

    def _die_in_time(self):
        if not self._left:
            raise ConnectionAbortedError
        self._left -= 1


@pytest.mark.parametrize("grace_s", [0, 60])
@pytest.mark.parametrize("number", range(2, 9))
async def test_a_rotation_whose_process_dies_ends_the_old_secret_in_time_and_can_be_repeated(
    directory, store, clock, number, grace_s
):
    old, key = await directory.create_key("acme")
    with pytest.raises(ConnectionAbortedError):
        await Directory(Dying(store, number), clock, wall_clock=lambda: 1_700_000_000.5).rotate_key(
            key.id, grace_s=grace_s
        )
    is_rotated = number > 3
    later = Directory(store, clock, wall_clock=lambda: 1_700_000_000.5 + grace_s + 1)
    assert (await directory.principal(old) is None) == (is_rotated and grace_s == 0)
    assert (await later.principal(old) is None) == is_rotated
    assert [each.id for each in await directory.list_keys("acme")] == [key.id]
    await directory.set_key_status(key.id, "suspended")
    assert [each.status for each in await directory.list_keys("acme")] == ["suspended"]
    new, rotated = await directory.rotate_key(key.id)
    assert (await directory.principal(new)).key == await directory.find_key(key.id) == rotated
    assert (await store.execute("HGET", KEY_IDS, key.id)).decode() == digest_of(new)
    assert (await store.execute("HGET", AccountKeys("acme").keys, key.id)).decode() == digest_of(new)
    # milliseconds; -2: no record, -1: for good, which works for no request
    expected = [-1] if number in {6, 7} else range(1, 60_001) if is_rotated and grace_s else [-2]
    assert await store.execute("PTTL", key_record(digest_of(old))) in expected


async def test_a_late_rotation_does_not_put_back_an_older_secret(directory, store, clock):
    _, key = await directory.create_key("acme")
    with pytest.raises(ConnectionAbortedError):
        await Directory(Dying(store, 4), clock).rotate_key(key.id)
    rotations = await asyncio.gather(*(directory.rotate_key(key.id) for _ in range(8)))
    assert [each.id for each in await directory.list_keys()] == [key.id]
    works = [await directory.principal(secret) for secret, _ in rotations]
    assert [principal.key.id for principal in works if principal is not None] == [key.id]


async def test_a_record_of_a_newer_version_is_an_error(directory, store):
    secret, _ = await directory.create_key("acme")
    await store.execute("SET", key_record(digest_of(secret)), b'{"v":2,"id":"k","account":"acme","created_at":1}')
    with pytest.raises(StoreError, match="newer version"):
        await directory.principal(secret)


@pytest.mark.parametrize("edit", ["change", "rotate"])
async def test_an_edit_keeps_what_a_newer_release_wrote_into_a_key(directory, store, edit):
    _, key = await directory.create_key("acme", limits=Limits(requests_per_minute=5))
    digest = (await store.execute("HGET", KEY_IDS, key.id)).decode()
    newer = msgspec.json.decode(await store.execute("GET", key_record(digest)))
    newer["regions"], newer["limits"]["images_per_day"] = ["eu"], 9
    await store.execute("SET", key_record(digest), msgspec.json.encode(newer))
    if edit == "change":
        await directory.change_key(key.id, lambda found: replace(found, limits=Limits(requests_per_minute=7)))
    else:
        await directory.rotate_key(key.id)
    digest = (await store.execute("HGET", KEY_IDS, key.id)).decode()
    edited = msgspec.json.decode(await store.execute("GET", key_record(digest)))
    per_minute = 7 if edit == "change" else 5
    assert edited["regions"] == ["eu"]
    assert edited["limits"] == newer["limits"] | {"requests_per_minute": per_minute}


async def test_an_edit_keeps_what_a_newer_release_wrote_into_an_account(directory, store):
    await directory.ensure_account("acme")
    await store.execute("SET", AccountKeys("acme").record, b'{"v":1,"name":"acme","plan":"gold"}')
    await directory.set_account_status("acme", "suspended")
    edited = msgspec.json.decode(await store.execute("GET", AccountKeys("acme").record))
    assert (edited["plan"], edited["status"]) == ("gold", "suspended")


async def test_a_record_without_a_version_is_of_the_first(directory, store):
    secret, key = await directory.create_key("acme")
    await store.execute("SET", key_record(digest_of(secret)), msgspec.json.encode(key))
    assert (await directory.principal(secret)).key == key


async def test_every_change_is_an_audit_event(directory):
    _, key = await directory.create_key("acme", actor="ops", name="ci")
    await directory.change_key(key.id, lambda key: replace(key, limits=Limits(9)), actor="eve", action="key.limits")
    await directory.rotate_key(key.id, grace_s=60, actor="eve")
    await directory.set_key_status(key.id, "suspended", actor="eve")
    await directory.set_account_status("acme", "suspended", actor="ops")
    await directory.append_audit_event("ops", "credit.grant", "acme", "acme", {"amount_usd": "5.00"})
    events = (await directory.audit())[::-1]
    assert [(event.actor, event.action, event.target, event.account) for event in events] == [
        ("ops", "key.create", key.id, "acme"),
        ("eve", "key.limits", key.id, "acme"),
        ("eve", "key.rotate", key.id, "acme"),
        ("eve", "key.suspend", key.id, "acme"),
        ("ops", "account.suspend", "acme", "acme"),
        ("ops", "credit.grant", "acme", "acme"),
    ]
    assert events[1].detail == '{"limits":{"requests_per_minute":9}}'
    assert events[0].at_ms > 1_764_000_000_000
    assert [event.action for event in await directory.audit(limit=1)] == ["credit.grant"]


async def test_no_audit_event_has_a_secret(directory, store):
    secret, key = await directory.create_key("acme")
    new, _ = await directory.rotate_key(key.id)
    text = str(await store.execute("XRANGE", AUDIT, "-", "+"))
    assert not [word for word in (secret, new, digest_of(secret), digest_of(new)) if word in text]


async def test_what_changes_nothing_is_no_event(directory):
    _, key = await directory.create_key("acme")
    await directory.set_key_status(key.id, "active")
    assert [event.action for event in await directory.audit()] == ["key.create"]


async def test_a_deleted_account_leaves_nothing_behind(directory, ledger, ask, settlement, store, snapshot):
    await directory.create_key("beta")
    before = await snapshot(store)
    secret, key = await directory.create_key("acme")
    await directory.rotate_key(key.id)
    await directory.templates.put(template("greet"))
    await ledger.grant("acme", 1000, ref="inv-7")
    await ledger.admit(ask("h1", key_id=key.id, session="s1", key_limits=Limits(9), budgets=Budgets(500)))
    await ledger.settle(settlement("h1", key_id=key.id, session="s1"))
    assert await directory.delete_account("acme") > 10
    left = await snapshot(store)
    assert {name: left[name] for name in left if name != AUDIT} == {n: before[n] for n in before if n != AUDIT}
    assert await directory.principal(secret) is None
    assert await directory.account("acme") is None


async def test_an_account_with_requests_in_flight_is_not_deleted(directory, ledger, ask):
    await directory.create_key("acme")
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1"))
    with pytest.raises(GatewayError, match="in flight"):
        await directory.delete_account("acme")
    assert (await ledger.balance("acme")).balance_nusd == 1000


async def test_an_account_of_dead_holds_is_deleted(directory, ledger, ask):
    await ledger.grant("acme", 1000)
    await ledger.admit(ask("h1", ttl_ms=0))
    assert await directory.delete_account("acme")


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
        await directory.ensure_account(name)
    assert await directory.account(name) is None
    assert await directory.list_accounts() == []


async def test_accounts(directory):
    assert await directory.account("acme") is None
    for name in ("b", "acme", "acme"):
        await directory.ensure_account(name)
    await directory.change_account("acme", lambda account: replace(account, limits=Limits(5)))
    assert await directory.account("acme") == Account("acme", limits=Limits(5))
    assert await directory.list_accounts() == [Account("acme", limits=Limits(5)), Account("b")]


async def test_an_account_that_only_a_grant_made_is_listed(directory, ledger):
    await ledger.grant("amce", 25)
    assert await directory.list_accounts() == [Account("amce")]
    changed = await directory.set_account_status("amce", "suspended")
    assert changed == await directory.account("amce") == Account("amce", "suspended")


async def test_a_record_that_cannot_be_read_is_an_error(directory, store):
    secret, _ = await directory.create_key("acme")
    await store.execute("SET", AccountKeys("acme").record, "nonsense")
    with pytest.raises(StoreError, match="can't be read"):
        await directory.principal(secret)


async def test_templates_are_found_by_name_and_by_id(directory):
    mine = template("greet")
    assert await directory.templates.put(mine)
    for wanted in ("greet", mine.id, mine.id.upper()):
        assert await directory.templates.find("acme", wanted) == mine
        assert await directory.templates.find("beta", wanted) is None
    for wanted in ("nothing", "a" * 129, "", "gr*", "{{greet}}"):
        assert await directory.templates.find("acme", wanted) is None


async def test_own_templates_come_before_global_ones(directory):
    mine, shared, other = template("greet"), template("greet", None), template("bye", None)
    for each in (mine, shared, other):
        assert await directory.templates.put(each)
    assert await directory.templates.find("acme", "greet") == mine
    assert await directory.templates.find("beta", "greet") == shared
    assert await directory.templates.find("acme", shared.id) == shared
    assert [each async for each in directory.templates.list("acme")] == [other, mine, shared]
    assert [each async for each in directory.templates.list("beta")] == [other, shared]


async def test_a_name_belongs_to_one_template_of_an_owner(directory):
    mine = template("greet")
    rival = template("greet", id="11111111-1111-1111-1111-111111111111")
    assert await directory.templates.put(mine)
    assert not await directory.templates.put(rival)
    assert await directory.templates.find("acme", "greet") == mine
    assert await directory.templates.find("acme", rival.id) is None
    assert await directory.templates.put(template("greet", "beta"))


async def test_one_of_many_who_want_a_name_gets_it(directory):
    rivals = [template("greet", id=f"{n:08d}-1111-1111-1111-111111111111") for n in range(20)]
    assert sorted(await asyncio.gather(*map(directory.templates.put, rivals))) == [False] * 19 + [True]
    assert len([each async for each in directory.templates.list("acme")]) == 1


async def test_a_renamed_template_leaves_its_old_name(directory):
    mine = template("greet")
    await directory.templates.put(mine)
    renamed = msgspec.structs.replace(mine, name="hello")
    assert await directory.templates.put(renamed)
    assert await directory.templates.find("acme", "greet") is None
    assert await directory.templates.find("acme", "hello") == renamed
    assert await directory.templates.find("acme", mine.id) == renamed
    assert await directory.templates.put(template("greet", id="11111111-1111-1111-1111-111111111111"))


async def test_a_deleted_template_is_gone_with_its_name(directory, store):
    mine = template("greet")
    await directory.templates.put(mine)
    assert await directory.templates.find("acme", "greet") == mine
    assert await directory.templates.delete(mine)
    assert not await directory.templates.delete(mine)
    assert await directory.templates.find("acme", "greet") is None
    assert await store.execute("KEYS", "*") == []


async def test_an_edited_template_is_seen_elsewhere_after_the_time_to_live(directory, store, clock):
    elsewhere = Directory(store, clock)
    mine = template("greet")
    await directory.templates.put(mine)
    assert await elsewhere.templates.find("acme", "greet") == mine
    edited = msgspec.structs.replace(mine, system="other words")
    await directory.templates.put(edited)
    assert await directory.templates.find("acme", "greet") == edited
    assert await elsewhere.templates.find("acme", "greet") == mine
    clock.now += 1.0
    assert await elsewhere.templates.find("acme", "greet") == edited


async def test_of_many_edits_of_a_template_none_is_lost(directory):
    mine = template("greet")
    await directory.templates.put(mine)
    fields = [{"system": "other words"}, {"description": "d"}, {"model": "m"}]
    await asyncio.gather(*(directory.templates.change(mine, partial(replace, **each)) for each in fields))
    found = await directory.templates.find("acme", "greet")
    assert (found.system, found.description, found.model) == ("other words", "d", "m")


async def test_an_edit_brings_no_deleted_template_back(directory):
    mine = template("greet")
    await directory.templates.put(mine)
    await directory.templates.delete(mine)
    assert await directory.templates.change(mine, partial(replace, system="x")) is None
    assert [each async for each in directory.templates.list("acme")] == []


async def test_an_edit_takes_no_name_from_another(directory):
    await directory.templates.put(template("greet"))
    other = template("bye", id="11111111-1111-1111-1111-111111111111")
    await directory.templates.put(other)
    with pytest.raises(ValueError, match="greet"):
        await directory.templates.change(other, partial(replace, name="greet"))


async def test_an_owner_has_so_many_templates_and_no_more(directory, monkeypatch):
    monkeypatch.setattr(templates_module, "MAX_TEMPLATES", 2)
    for name in ("a", "b"):
        assert await directory.templates.put(template(name))
    with pytest.raises(GatewayError, match="no room") as caught:
        await directory.templates.put(template("c"))
    assert caught.value.response.code == "validation_error"
    assert await directory.templates.put(template("a", system="a new version fits"))
    assert [each.name async for each in directory.templates.list("acme")] == ["a", "b"]


async def test_an_owners_templates_have_so_many_bytes_and_no_more(directory, monkeypatch):
    monkeypatch.setattr(templates_module, "MAX_OWNER_BYTES", 1000)
    assert await directory.templates.put(template("a", system="x" * 600))
    with pytest.raises(GatewayError, match="no room"):
        await directory.templates.put(template("b", system="x" * 600))
    assert await directory.templates.put(template("a", system="x" * 700))
