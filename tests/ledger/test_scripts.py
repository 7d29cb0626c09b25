"""Scripts are whole before Redis sees them, and called by the SHA-1 that Redis computes."""

import asyncio
import hashlib
import re
from pathlib import Path

import hiredis
import pytest

from meshproxy.ledger import store
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.local import KEPT_MS, WORKERS, WorkerCount
from meshproxy.ledger.records import Hold, HoldRequest, Settlement
from meshproxy.ledger.replays import Replays
from meshproxy.ledger.store import Script, ScriptCall, Store, expand, script_text
from meshproxy.ledger.templates import MAX_OWNER_BYTES, MAX_TEMPLATES, Templates
from meshproxy.openai.usage import Usage
from meshproxy.policy.principal import Budgets, Limits
from meshproxy.policy.template import Template
from meshproxy.units import MAX_NUSD
from tests.harness.waiting import turns


def test_an_include_is_replaced_by_its_text():
    texts = {"shared": "local function double(n) return n * 2 end\n"}
    text = "-- include: shared\nreturn double(2)\n"
    assert expand(text, texts.__getitem__) == "local function double(n) return n * 2 end\nreturn double(2)\n"


@pytest.mark.parametrize("line", ["x = 1 -- include: b", "  -- include: b", "-- include: ../b", "--include: b"])
def test_only_a_whole_line_is_an_include(line):
    assert expand(line, {}.__getitem__) == line


def test_backslashes_of_an_included_text_stay():
    assert expand("-- include: b", {"b": r"s = '\1\n'"}.__getitem__) == r"s = '\1\n'"


def test_what_is_included_includes_nothing():
    """Else it would go to Redis as a comment."""
    folder = Path(store.__file__).parent / "scripts"
    included = {name for path in folder.glob("*.lua") for name in re.findall("-- include: (.*)", path.read_text())}
    assert {"bucket", "clock"} <= included
    assert [name for name in included if "-- include" in (folder / f"{name}.lua").read_text()] == []


def test_the_sha_is_the_one_of_the_whole_text():
    script = Script.of("one", "return 1")
    assert script.sha == hashlib.sha1(b"return 1").hexdigest()
    assert script.name == "one"


def test_a_missing_script_is_told_by_name():
    with pytest.raises(FileNotFoundError, match=r"no_such_script\.lua"):
        Script.load("no_such_script")


class Sent(Store):
    """A store that keeps the last call of a script, and its packed form."""

    connected = True
    call = None

    def send(self, op, command):
        answer = asyncio.get_running_loop().create_future()
        if isinstance(command, ScriptCall):
            self.call = command
        else:
            answer.set_result(None)
        return answer

    async def close(self):
        pass

    def arguments(self, script):
        """Name the keys and arguments of the last call as the head of the script's file numbers them."""
        reader = hiredis.Reader(encoding="utf-8")
        reader.feed(self.call.packed)
        _, sha, key_count, *values = reader.gets()
        texts = [value.decode() if isinstance(value, bytes) else str(value) for value in self.call.by_text()[3:]]
        assert (sha, values) == (Script.load(script).sha, texts)
        head = " ".join(
            line.removeprefix("--").strip() for line in script_text(script).splitlines() if line.startswith("--")
        )
        _, keys, argv, _ = re.split(r" KEYS | ARGV | reply ", head, maxsplit=3)
        named = {}
        for numbered, of in ((keys, values[: int(key_count)]), (argv, values[int(key_count) :])):
            for number, name in re.findall(r"\b(\d+)(?:-\d+)? ([^,(;:.]*[^,(;:. ])", numbered):
                named[name] = of[int(number) - 1] if int(number) <= len(of) else None
        return named


@pytest.fixture
def sent():
    return Sent()


KEY = Limits(requests_per_minute=101, burst=102, tokens_per_minute=103, requests_per_day=104, max_parallel=105)
ACCOUNT = Limits(requests_per_minute=201, burst=202, tokens_per_minute=203, requests_per_day=204, max_parallel=205)
HOLD = HoldRequest(
    hold_id="h",
    account="acme",
    key_id="k",
    amount_nusd=11,
    tokens=13,
    ttl_ms=14,
    session="s",
    amount_min_nusd=12,
    share_percent=15,
    key_limits=KEY,
    account_limits=ACCOUNT,
    budgets=Budgets(301, 302, 303),
    session_budgets=Budgets(401, 402, 403),
    account_budgets=Budgets(501, 502, 503),
)


async def test_the_arguments_of_an_admission_are_in_the_order_of_its_head(sent):
    admission = asyncio.ensure_future(Ledger(sent).admit(HOLD))
    await turns(1)
    admission.cancel()
    expected = {
        "credit": "mesh:{acme}:credit",
        "key's bucket": "mesh:{acme}:bucket:k",
        "key's running": "mesh:{acme}:running:k",
        "session's spend": "mesh:{acme}:session:s",
        "hold id": "h",
        "time to live": "14",
        "amount": "11",
        "least amount": "12",
        "strict": "1",
        "tokens": "13",
        "key id": "k",
        "session or ''": "s",
        "key's requests per minute": "101",
        "account's": "501",  # the budgets, which come after its limits
        "key's budgets": "301",
        "session's": "401",
        "share of the room": "15",
    }
    assert {name: sent.arguments("admit").get(name) for name in expected} == expected
    assert sent.call.by_text()[-20:] == tuple(
        map(str, (*range(101, 106), *range(201, 206), 301, 302, 303, 401, 402, 403, 501, 502, 503, 15))
    )


async def test_the_arguments_of_a_settlement_are_in_the_order_of_its_head(sent):
    usage = Usage(21, 22, 23, 24, 25, 26, 27, 28)
    Ledger(sent, usage_events_kept=30).send_settlement(
        Settlement(
            hold_id="h",
            request_id="r",
            account="acme",
            key_id="k",
            model="m",
            upstream="u",
            usage=usage,
            usage_source="reported",
            outcome="completed",
            cost_nusd=31,
            started_ms=1_764_000_000_000,
            session="s",
            price="{}",
            attempts=32,
            code="c",
            upstream_status=33,
            replay="mesh:{acme}:replay:k:d",
            replay_ttl_ms=34,
            budgets=Budgets(301, 302, 303),
            account_budgets=Budgets(501, 502, 503),
        )
    )
    expected = {
        "key's spend": "mesh:{acme}:spend:k",
        "hour": "mesh:{acme}:hour:2025-11-24T16",
        "requests of the day": "mesh:{acme}:requests:2025-11-24",
        "index of hours": "mesh:{acme}:hours",
        "month": "mesh:{acme}:month:2025-11",
        "marker of a settlement without a hold": "mesh:{acme}:unheld:h",
        "hold id": "h",
        "unheld": "0",
        "events kept in usage": "30",
        "cost": "31",
        "request id": "r",
        "key id": "k",
        "account": "acme",
        "session or ''": "s",
        "model": "m",
        "upstream": "u",
        "tokens": "21",
        "usage source": "reported",
        "outcome": "completed",
        "price": "{}",
        "start time": "1764000000000",
        "attempts": "32",
        "cache-write tokens that are cached for an hour": "28",
        "how long a charged record is kept": "34",
        "error's code or ''": "c",
        "the upstream's HTTP status": "33",
        "key's budgets": "301",
        "account's": "501",
    }
    assert {name: sent.arguments("settle").get(name) for name in expected} == expected
    command = sent.call.by_text()
    assert [command.index(tokens) for tokens in range(21, 28)] == list(range(command.index(21), command.index(21) + 7))
    assert command[19:21] == ("mesh:{acme}:session:s", "mesh:{acme}:replay:k:d")


CLAIM = Replays.claim_by("acme", "k", "once", "h")
TEMPLATE = Template(id="t", name="greeting", owner="acme", created_at=0.0, updated_at=0.0)


def templates(sent):
    return Templates(sent, lambda: 0.0, ttl_s=1, stale_s=1)


CALLS = {  # of every other script: what calls it, and its arguments by the names that the head of its file gives them
    "renew": (
        lambda sent: Ledger(sent).renew(
            Hold(HOLD, 0, 0, ()), amount_nusd=21, tokens=22, ttl_ms=23, enforce_tokens=True
        ),
        {
            "hold id": "h",
            "time to live": "23",
            "total amount": "21",
            "total tokens": "22",
            "strict": "1",
            "enforce tokens": "1",
            "key's budgets": "301",
            "session's": "401",
            "account's": "501",
        },
    ),
    "balance": (
        lambda sent: Ledger(sent).balance("acme", "k", key_limits=KEY, account_limits=ACCOUNT),
        {
            "credit": "mesh:{acme}:credit",
            "usage": "mesh:{acme}:usage",
            "key's bucket": "mesh:{acme}:bucket:k",
            "key's running": "mesh:{acme}:running:k",
            "account's requests per minute": "201",
            "key's": "101",
        },
    ),
    "grant": (
        lambda sent: Ledger(sent).grant("acme", 21, "note", ref="ref", actor="ops"),
        {
            "credit": "mesh:{acme}:credit",
            "usage": "mesh:{acme}:usage",
            "account's spend": "mesh:{acme}:spend",
            "grants": "mesh:{acme}:grants",
            "refs": "mesh:{acme}:grant-refs",
            "amount": "21",
            "note": "note",
            "largest absolute balance allowed": str(MAX_NUSD),
            "ref or ''": "ref",
            "actor": "ops",
        },
    ),
    "claim": (
        lambda sent: Replays(sent).claim(CLAIM, "digest", 21, most_keys=22, most_bytes=23),
        {
            "record": CLAIM.record,
            "the account's owners": "mesh:{acme}:replays",
            "sizes of their answers": "mesh:{acme}:replay-sizes",
            "owner": "h",
            "digest of the body": "digest",
            "time to live": "21",
            "most records of an account": "22",
            "most bytes": "23",
        },
    ),
    "append": (
        lambda sent: Replays(sent).append(CLAIM, [b"part"], 21, 22),
        {
            "parts of the answer": CLAIM.parts,
            "sizes of the account's answers": "mesh:{acme}:replay-sizes",
            "time to live": "21",
            "owner": "h",
            "number of parts before these": "22",
        },
    ),
    "conclude": (
        lambda sent: Replays(sent).conclude(CLAIM, "finished", 21, 23),
        {
            "record": CLAIM.record,
            "parts of the answer": CLAIM.parts,
            "the account's owners": "mesh:{acme}:replays",
            "sizes of their answers": "mesh:{acme}:replay-sizes",
            "owner": "h",
            "state": "finished",
            "time to live": "21",
            "how many parts there must be if it is finished": "23",
        },
    ),
    "beat": (
        lambda sent: WorkerCount(sent, "w").beat(),
        {"workers": WORKERS, "worker id": "w", "how long a worker counts after its last report": str(KEPT_MS)},
    ),
    "put_template": (
        lambda sent: templates(sent).put(TEMPLATE),
        {
            "the owner's names": "mesh:{acme}:template-names",
            "the owner's templates": "mesh:{acme}:templates",
            "id": "t",
            "name": "greeting",
            "most templates of an owner": str(MAX_TEMPLATES),
            "most bytes of all records of an owner": str(MAX_OWNER_BYTES),
        },
    ),
    "delete_template": (
        lambda sent: templates(sent).delete(TEMPLATE),
        {
            "the owner's names": "mesh:{acme}:template-names",
            "the owner's templates": "mesh:{acme}:templates",
            "id": "t",
        },
    ),
}


@pytest.mark.parametrize("script", CALLS)
async def test_the_arguments_of_a_call_are_in_the_order_of_its_scripts_head(sent, script):
    call, expected = CALLS[script]
    calling = asyncio.ensure_future(call(sent))
    await turns(2)
    calling.cancel()
    named = sent.arguments(script)
    assert {name: named.get(name) for name in expected} == expected
