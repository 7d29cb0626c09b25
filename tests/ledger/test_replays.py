"""Idempotency keys: one owner at a time, and an answer that is nobody else's."""

import asyncio

import pytest

from meshproxy.ledger.replays import Claim, Replays, body_digest
from tests.harness.waiting import until

BODY = b'{"messages": []}'
TTL_MS = 60_000


@pytest.fixture
def replays(store):
    return Replays(store)


@pytest.fixture
def claim(replays):
    """Claim a key for a body."""

    async def make(
        owner, *, name="once", body=BODY, account="acme", key_id="k1", ttl_ms=TTL_MS, most_keys=100, most_bytes=1000
    ):
        wanted = replays.claim_by(account, key_id, name, owner)
        return await replays.claim(wanted, body_digest(body), ttl_ms, most_keys=most_keys, most_bytes=most_bytes)

    return make


async def test_the_first_has_the_key_and_the_others_hear_of_it(claim):
    assert ((await claim("h1")).state, (await claim("h2")).owner) == ("claimed", "h1")
    assert (await claim("h3")).state == "running"


async def test_of_many_at_once_one_has_it(claim):
    claims = await asyncio.gather(*(claim(f"h{number}") for number in range(90)))
    assert [found.state for found in claims if found.state != "running"] == ["claimed"]
    (owner,) = {found.owner for found in claims}
    assert next(found.owner for found in claims if found.state == "claimed") == owner


async def test_another_body_is_a_conflict_while_it_runs_and_after(claim, replays):
    first = await claim("h1")
    assert (await claim("h2", body=b"{}")).state == "conflict"
    await replays.conclude(first, "finished", TTL_MS)
    assert (await claim("h3", body=b"{}")).state == "conflict"


@pytest.mark.parametrize("other", [{"name": "twice"}, {"key_id": "k2"}, {"account": "other"}])
async def test_names_of_other_keys_and_accounts_are_others(claim, other):
    await claim("h1")
    assert (await claim("h2", **other)).state == "claimed"


@pytest.mark.parametrize(("sent", "state"), [(2, "finished"), (3, "lost"), (1, "lost")])
async def test_an_answer_without_all_its_parts_is_not_finished(claim, replays, sent, state):
    """A failover may have lost them after they were appended."""
    first = await claim("h1")
    await replays.append(first, [b"head", b"body"], TTL_MS)
    await replays.conclude(first, "finished", TTL_MS, sent)
    assert (await claim("h2")).state == state


@pytest.mark.parametrize("conclusion", ["finished", "lost"])
async def test_a_conclusion_is_kept(claim, replays, conclusion):
    await replays.conclude(await claim("h1"), conclusion, TTL_MS)
    assert ((await claim("h2")).state, (await claim("h2")).owner) == (conclusion, "h1")


async def test_a_failure_leaves_the_key_to_the_next_even_for_another_body(claim, replays):
    await replays.conclude(await claim("h1"), "failed", TTL_MS)
    second = await claim("h2", body=b"{}")
    assert (second.state, second.owner) == ("claimed", "h2")


async def test_only_the_owner_concludes(claim, replays):
    first = await claim("h1")
    await replays.conclude(first, "failed", TTL_MS)
    await claim("h2")
    await replays.conclude(first, "finished", TTL_MS)
    assert ((await claim("h3")).state, (await claim("h3")).owner) == ("running", "h2")


async def test_a_claim_that_nobody_waited_for_can_be_given_up(claim, replays):
    await claim("h1")
    await replays.conclude(replays.claim_by("acme", "k1", "once", "h9"), "failed", TTL_MS)
    assert (await claim("h2")).state == "running"
    await replays.conclude(replays.claim_by("acme", "k1", "once", "h1"), "failed", TTL_MS)
    assert (await claim("h3")).state == "claimed"


async def test_parts_are_read_from_where_one_was(claim, replays):
    owner, reader = await claim("h1"), await claim("h2")
    assert await replays.read(reader, 0) == ("running", [])
    await replays.append(owner, [b"a", b"b"], TTL_MS)
    assert await replays.read(reader, 0) == ("running", [b"a", b"b"])
    await replays.append(owner, [b"c"], TTL_MS, 2)
    await replays.conclude(owner, "finished", TTL_MS, 3)
    assert await replays.read(reader, 2) == ("finished", [b"c"])


async def test_finished_means_that_there_are_no_more_parts(claim, replays):
    """The state is read first, so that a part which comes between the two is never missed."""
    owner, reader = await claim("h1"), await claim("h2")
    _, (state, parts) = await asyncio.gather(
        asyncio.wait_for(_append_and_finish(replays, owner), 5), replays.read(reader, 0)
    )
    assert (state, parts) in [("running", []), ("running", [b"a"]), ("finished", [b"a"])]


async def _append_and_finish(replays, owner):
    await replays.append(owner, [b"a"], TTL_MS)
    await replays.conclude(owner, "finished", TTL_MS)


async def test_a_reader_never_mixes_two_answers(claim, replays):
    first, reader = await claim("h1"), await claim("h2")
    await replays.append(first, [b"old"], TTL_MS)
    await replays.conclude(first, "failed", TTL_MS)
    third = await claim("h3")
    await replays.append(third, [b"new"], TTL_MS)
    assert await replays.read(reader, 0) == (None, [b"old"])
    assert await replays.read(await claim("h4"), 0) == ("running", [b"new"])


async def test_everything_ends_by_itself(claim, replays, store):
    owner = await claim("h1")
    await replays.append(owner, [b"a"], TTL_MS)
    for key in (owner.record, owner.parts):
        assert 0 < await store.execute("PTTL", key) <= TTL_MS
    await replays.conclude(owner, "finished", 10 * TTL_MS)
    for key in (owner.record, owner.parts):
        assert TTL_MS < await store.execute("PTTL", key) <= 10 * TTL_MS


async def test_the_record_of_a_dead_owner_is_gone_and_the_key_free(claim, replays, store):
    owner, reader = await claim("h1"), await claim("h2")
    await store.execute("DEL", owner.record)
    assert await replays.read(reader, 0) == (None, [])
    assert (await claim("h3")).state == "claimed"


async def test_names_are_digests(claim):
    made = await claim("h1", name="very secret\n\x00 name {}")
    assert "secret" not in made.record
    assert isinstance(made, Claim)
    assert "{acme}" in made.record
    assert "{acme}" in made.parts


async def charged(store, found, age_ms=0):
    """As settle.lua leaves the record, a while ago."""
    seconds, micros = await store.execute("TIME")
    at_ms = int(seconds) * 1000 + int(micros) // 1000 - age_ms
    await store.execute("HSET", found.record, "state", "charged", "charged_ms", at_ms)


async def test_a_charged_request_still_runs_until_its_answer_is_told_of(claim, replays, store):
    first = await claim("h1")
    await charged(store, first)
    assert (await claim("h2")).state == "running"
    await replays.conclude(first, "finished", TTL_MS)
    assert (await claim("h2")).state == "finished"


async def test_a_charged_request_whose_worker_died_is_not_run_again(claim, store):
    await charged(store, await claim("h1"), age_ms=15_000)
    assert [(await claim("h2")).state, (await claim("h3", body=b"{}")).state] == ["lost", "conflict"]


async def test_an_account_has_so_many_keys_and_another_has_its_own(claim):
    for number in range(3):
        assert (await claim(f"h{number}", name=f"n{number}", most_keys=3)).state == "claimed"
    assert (await claim("h3", name="n3", most_keys=3)).state == "full"
    assert (await claim("h4", name="n0", most_keys=3)).state == "running"
    assert (await claim("h5", name="n3", account="other", most_keys=3)).state == "claimed"


async def test_an_account_has_so_many_bytes(claim, replays):
    first = await claim("h1", name="n1", most_bytes=10)
    await replays.append(first, [b"123456", b"7890"], TTL_MS)
    assert (await claim("h2", name="n2", most_bytes=10)).state == "full"
    assert (await claim("h3", name="n3", most_bytes=11)).state == "claimed"


async def test_what_has_ended_is_counted_no_more(claim, replays):
    first = await claim("h1", name="n1", most_keys=1)
    await replays.append(first, [b"x" * 1000], TTL_MS)
    await replays.conclude(first, "failed", 1)

    async def claimed():
        return (await claim("h2", name="n2", most_keys=1)).state == "claimed"

    await until(claimed)
