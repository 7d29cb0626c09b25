"""The journal: what was appended is there after every kind of end, and is replayed once as often as it takes."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import zlib
from contextlib import contextmanager
from functools import partial

import msgspec
import pytest
from msgspec import to_builtins
from structlog.testing import capture_logs

from meshproxy.ledger import journal as module
from meshproxy.ledger.journal import MAX_FILES, Journal, JournalFull, other_journals
from meshproxy.ledger.store import StoreError, Unavailable
from tests.harness.waiting import turns, until

MIB = 1_048_576


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "journal"


@pytest.fixture
def open_journal(path):
    """Open journals of one path, and close them at the end."""
    journals = []

    def open_one(max_bytes=MIB, **fields):
        journals.append(Journal(fields.get("path", path), max_bytes))
        return journals[-1]

    yield open_one
    for opened in journals:
        opened.close()


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes nothing, for as long as the context lasts."""

    @contextmanager
    def full():
        def refuse(_file, _data):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(module.os, "write", refuse)
            yield

    return full


class Book:
    """Takes settlements as Redis does: each hold id once."""

    def __init__(self, lost_after=None, refused=()):
        self.charged = []
        self.calls = 0
        self.lost_after = lost_after
        self.refused = refused

    async def settle(self, settlement):
        if self.lost_after is not None and self.calls >= self.lost_after:
            raise Unavailable("connection", "gone")
        self.calls += 1
        if settlement.hold_id in self.refused:
            raise StoreError("WRONGTYPE", "not a hash")
        if settlement.hold_id in self.charged:
            return False
        self.charged.append(settlement.hold_id)
        return True


def line_of(settlement):
    """A settlement as a journal has it on disk."""
    text = msgspec.json.encode({"v": 1, **to_builtins(settlement)})
    return b"%08x %b\n" % (zlib.crc32(text), text)


def names(count):
    return [f"h{number}" for number in range(count)]


async def test_what_is_appended_is_found_by_the_next_process(open_journal, settlement):
    journal = open_journal()
    for name in names(3):
        await journal.append(settlement(name, unheld=True, session="día\n\r\x1f"))
    journal.close()
    found, book = open_journal(), Book()
    assert len(found) == 3
    kept = list(found)
    assert [settlement(name, unheld=True, session="día\n\r\x1f") for name in names(3)] == kept
    assert await found.replay(book.settle) == 3
    assert names(3) == book.charged


async def test_a_replayed_journal_is_empty_on_disk_too(open_journal, path, settlement):
    journal = open_journal()
    await journal.append(settlement())
    assert await journal.replay(Book().settle) == 1
    assert path.with_suffix(".0").read_bytes() == b""
    journal.close()
    assert len(open_journal()) == 0


async def test_an_append_is_over_when_fsync_is(open_journal, settlement, monkeypatch):
    journal, steps = open_journal(), []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(module.os, "write", lambda file, data: (steps.append("write"), write(file, data))[1])
    monkeypatch.setattr(module.os, "fsync", lambda file: (steps.append("fsync"), sync(file))[1])
    await journal.append(settlement())
    steps.append("returned")
    assert steps == ["write", "fsync", "returned"]


async def test_appends_that_come_together_share_an_fsync(open_journal, path, settlement, monkeypatch):
    journal, synced = open_journal(), []
    sync = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda file: (synced.append(file), sync(file))[1])
    await asyncio.gather(*(journal.append(settlement(name)) for name in names(500)))
    assert len(synced) <= 3
    journal.close()
    found, book = open_journal(), Book()
    assert await found.replay(book.settle) == 500
    assert sorted(names(500)) == sorted(book.charged)


@pytest.mark.parametrize("garbage", [b"\n", b"x\n", b"00000000 {}\n", b"zz {\n", b"\xff\xfe\x00\n", b"deadbeef\n"])
async def test_a_line_that_cannot_be_read_costs_no_other(open_journal, path, settlement, garbage):
    journal = open_journal()
    await journal.append(settlement("h0"))
    journal.close()
    with path.with_suffix(".0").open("ab") as file:
        file.write(garbage + line_of(settlement("h1")))
    book = Book()
    assert await open_journal().replay(book.settle) == 2
    assert names(2) == book.charged


async def test_a_crash_at_any_byte_costs_only_the_append_that_was_not_over(path, settlement):
    path.parent.mkdir()
    whole = line_of(settlement("h0"))
    cut = line_of(settlement("h1"))
    for at in range(len(cut)):
        path.with_suffix(".0").write_bytes(whole + cut[:at])
        journal = Journal(path, MIB)
        await journal.append(settlement("h2"))  # on a line of its own, not at the end of the broken one
        journal.close()
        again, book = Journal(path, MIB), Book()
        assert await again.replay(book.settle) == 2
        again.close()
        assert book.charged == ["h0", "h2"], at


async def test_a_bit_that_flipped_is_no_charge(open_journal, path, settlement):
    path.parent.mkdir()
    line = line_of(settlement(cost_nusd=60))
    path.with_suffix(".0").write_bytes(line.replace(b'"cost_nusd":60', b'"cost_nusd":90'))
    assert len(open_journal()) == 0


async def test_the_bound_holds_and_room_comes_back(open_journal, path, settlement):
    size = len(line_of(settlement("h0")))
    journal = open_journal(max_bytes=3 * size)
    for name in names(3):
        await journal.append(settlement(name))
    with pytest.raises(JournalFull):
        await journal.append(settlement("h3"))
    assert 3 * size == path.with_suffix(".0").stat().st_size
    assert await journal.replay(Book().settle) == 3
    await journal.append(settlement("h3"))
    assert len(journal) == 1


async def test_the_bound_counts_what_was_found(open_journal, settlement):
    size = len(line_of(settlement("h0")))
    journal = open_journal(max_bytes=2 * size)
    await journal.append(settlement("h0"))
    journal.close()
    journal = open_journal(max_bytes=2 * size)
    await journal.append(settlement("h1"))
    with pytest.raises(JournalFull):
        await journal.append(settlement("h2"))


async def test_redis_lost_in_a_replay_leaves_the_rest(open_journal, path, settlement):
    journal = open_journal()
    for name in names(5):
        await journal.append(settlement(name))
    book = Book(lost_after=2)
    assert await journal.replay(book.settle) == 2
    assert len(journal) == 3
    assert path.with_suffix(".0").stat().st_size > 0
    book.lost_after = None
    assert await journal.replay(book.settle) == 3
    assert names(5) == book.charged
    assert path.with_suffix(".0").stat().st_size == 0


async def test_a_replay_that_crashed_is_done_again_and_charges_nothing_twice(open_journal, settlement):
    journal = open_journal()
    for name in names(4):
        await journal.append(settlement(name))
    book = Book(lost_after=2)
    await journal.replay(book.settle)
    journal.close()  # the process ends: of the file nothing was taken away yet
    book.lost_after = None
    again = open_journal()
    assert len(again) == 4
    await again.replay(book.settle)
    assert names(4) == book.charged


async def test_what_redis_refuses_stands_in_no_other_way(open_journal, path, settlement):
    journal = open_journal()
    for name in names(3):
        await journal.append(settlement(name))
    book = Book(refused=("h0",))
    with capture_logs() as logs:
        assert await journal.replay(book.settle) == 0
    assert [(line["event"], line["hold_id"]) for line in logs] == [("settlement_refused", "h0")]
    assert await journal.replay(book.settle) == 2
    assert book.charged == ["h1", "h2"]
    assert len(journal) == 1
    book.refused = ()
    assert await journal.replay(book.settle) == 1
    assert path.with_suffix(".0").stat().st_size == 0


async def test_an_append_during_a_replay_is_kept(open_journal, settlement):
    journal, book = open_journal(), Book()
    await journal.append(settlement("h0"))

    async def settle_slowly(kept):
        if kept.hold_id == "h0":
            await journal.append(settlement("h1"))
        return await book.settle(kept)

    assert await journal.replay(settle_slowly) == 2
    assert names(2) == book.charged
    assert len(journal) == 0


async def test_what_is_settled_before_it_is_written_is_not_written_any_more(open_journal, settlement, monkeypatch):
    """Else it would lie there until the next start, when its marker in Redis may be gone."""
    journal, book = open_journal(), Book()
    disk, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (disk.wait(10), fsync(file)))
    appending = [asyncio.create_task(journal.append(settlement(name))) for name in names(2)]
    await turns(1)  # the first is on its way to the disk, and the second waits for it
    replaying = asyncio.create_task(journal.replay(book.settle))
    await until(lambda: not len(journal))
    disk.set()
    await asyncio.gather(*appending, replaying)
    await journal.replay(book.settle)
    journal.close()
    assert len(open_journal()) == 0


async def test_a_full_disk_keeps_it_in_memory_and_the_file_whole(open_journal, path, settlement, monkeypatch):
    journal = open_journal()
    await journal.append(settlement("h0"))
    write = os.write

    def write_half(file, data):
        if len(data) > 40:
            return write(file, data[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "write", write_half)
    with pytest.raises(OSError, match="No space"):
        await journal.append(settlement("h1"))
    monkeypatch.undo()
    assert line_of(settlement("h0")) == path.with_suffix(".0").read_bytes()
    await journal.append(settlement("h2"))
    assert b"".join(map(line_of, map(settlement, names(3)))) == path.with_suffix(".0").read_bytes()
    book = Book()
    assert await journal.replay(book.settle) == 3


async def test_a_disk_that_stays_full_to_the_end_has_it_logged_whole(open_journal, settlement, full_disk):
    """And closing gives how many were lost, for the exit code."""
    journal = open_journal()
    with full_disk(), pytest.raises(OSError, match="No space"):
        await journal.append(settlement("h1"))
    with full_disk(), capture_logs() as logs:
        assert journal.close() == 1
    lost = [line["settlement"] for line in logs if line["event"] == "settlement_lost"]
    assert [to_builtins(settlement("h1"))] == lost


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_write_that_is_cancelled_is_over_before_the_journal_is_closed(
    open_journal, settlement, monkeypatch, refuses
):
    """The settlement is on disk, or logged as lost: a worker that stops cancels the write that waits for its disk."""
    journal, begun, may_go_on, write = open_journal(), asyncio.Event(), threading.Event(), os.write
    loop = asyncio.get_running_loop()

    def slow(file, data):
        loop.call_soon_threadsafe(begun.set)
        may_go_on.wait()
        if refuses:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(module.os, "write", slow)
    appending = asyncio.ensure_future(journal.append(settlement("h1")))
    await begun.wait()
    appending.cancel()
    await turns(3)
    was_over = appending.done()
    may_go_on.set()
    await asyncio.wait({appending})
    lost = journal.close()
    monkeypatch.undo()
    found = {kept.hold_id for kept in open_journal()}
    assert (was_over, lost, found) == (False, int(refuses), set() if refuses else {"h1"})


async def test_a_full_disk_is_logged_once(open_journal, settlement, full_disk):
    journal = open_journal()
    with full_disk(), capture_logs() as logs:
        for name in names(3):
            with pytest.raises(OSError, match="No space"):
                await journal.append(settlement(name))
    assert [(line["event"], line["settlements"]) for line in logs] == [("journal_not_written", 1)]


async def test_a_disk_with_room_at_the_end_takes_it(open_journal, settlement, full_disk):
    journal = open_journal()
    with full_disk(), pytest.raises(OSError, match="No space"):
        await journal.append(settlement("h1"))
    assert (journal.room_bytes, journal.close(), len(open_journal())) == (0, 0, 1)


async def test_a_disk_with_room_again_takes_it_without_another_append(open_journal, path, settlement, full_disk):
    journal = open_journal()
    with full_disk(), pytest.raises(OSError, match="No space"):
        await journal.append(settlement("h1"))
    replaying = asyncio.create_task(journal.keep_replaying(Book(lost_after=0).settle))
    await until(lambda: journal.room_bytes, "room")
    replaying.cancel()
    assert line_of(settlement("h1")) == path.with_suffix(".0").read_bytes()


@pytest.mark.parametrize("refused", ["_write_through", "_truncate"])
async def test_a_disk_has_no_room_until_it_takes_a_write_again(open_journal, path, settlement, monkeypatch, refused):
    """Also where all is settled and nothing is to be written: what is admitted without Redis next needs the disk."""
    journal, book = open_journal(), Book()
    await journal.append(settlement("h1"))
    with monkeypatch.context() as patch:
        patch.setattr(module, refused, _refuse)
        if refused == "_write_through":
            with pytest.raises(OSError, match="Input/output"):
                await journal.append(settlement("h2"))
        assert (await journal.replay(book.settle), journal.room_bytes) == (1 + (refused == "_write_through"), 0)
    replaying = asyncio.create_task(journal.keep_replaying(book.settle))
    await until(lambda: journal.room_bytes, "room")
    replaying.cancel()
    assert path.with_suffix(".0").stat().st_size == (
        0 if refused == "_write_through" else len(line_of(settlement("h1")))
    )


async def test_what_was_kept_in_memory_alone_is_logged_at_the_end(settlement):
    journal = Journal(None, MIB)
    await journal.append(settlement("h0"))
    with capture_logs() as logs:
        assert journal.close() == 1
    assert [line["settlement"]["hold_id"] for line in logs] == ["h0"]


async def test_what_there_is_no_room_for_is_counted_as_lost(open_journal, settlement):
    journal = open_journal(max_bytes=10)
    with capture_logs() as logs:
        for name in names(2):
            with pytest.raises(JournalFull):
                await journal.append(settlement(name))
    assert [line["settlement"] for line in logs] == [to_builtins(settlement(name)) for name in names(2)]
    assert journal.close() == 2


async def test_a_file_of_a_newer_version_is_left_alone_and_named(open_journal, path, settlement):
    path.parent.mkdir(parents=True)
    text = b'{"v":2,"hold_id":"h0"}'
    newer = path.with_suffix(".0")
    newer.write_bytes(b"%08x %b\n" % (zlib.crc32(text), text))
    with capture_logs() as logs:
        journal = open_journal()
    await journal.append(settlement("h1"))
    assert ([str(newer)], text) == ([line["path"] for line in logs], newer.read_bytes()[9:-1])
    assert other_journals(path.parent.parent / "another" / path.name) == [newer]  # it isn't locked either


async def test_a_line_of_the_first_version_is_read(open_journal, path, settlement):
    path.parent.mkdir(parents=True)
    later = ("price", "attempts", "code", "upstream_status")
    text = msgspec.json.encode(
        {name: value for name, value in to_builtins(settlement("h0")).items() if name not in later}
    )
    path.with_suffix(".0").write_bytes(b"%08x %b\n" % (zlib.crc32(text), text))
    (kept,) = open_journal()
    assert (kept, kept.price, kept.attempts, kept.code, kept.upstream_status) == (settlement("h0"), "{}", 0, "", 0)


async def test_what_other_redises_are_owed_is_named(tmp_path, settlement):
    mine, other, running = (tmp_path / name / "journal" for name in ("mine", "other", "running"))
    for path in (mine, other):
        journal = Journal(path, MIB)
        await journal.append(settlement())
        journal.close()
    journal = Journal(running, MIB)
    await journal.append(settlement())
    assert [other.with_suffix(".0")] == other_journals(mine)
    journal.close()
    found = Journal(other, MIB)  # it was not kept locked
    assert len(found) == 1
    found.close()


async def test_two_workers_never_share_a_file(open_journal, path, settlement):
    first, second = open_journal(), open_journal()
    await first.append(settlement("h0"))
    await second.append(settlement("h1"))
    assert line_of(settlement("h0")) == path.with_suffix(".0").read_bytes()
    assert line_of(settlement("h1")) == path.with_suffix(".1").read_bytes()


async def test_the_file_of_a_dead_worker_goes_to_the_one_in_its_place(open_journal, settlement):
    first, second = open_journal(), open_journal()
    await first.append(settlement("h0"))
    await second.append(settlement("h1"))
    first.close()
    third = open_journal()
    assert [kept.hold_id for kept in third] == ["h0"]
    assert len(second) == 1


async def test_fewer_workers_than_before_replay_everything(open_journal, path, settlement):
    workers = [open_journal() for _ in range(4)]
    for name, worker in zip(names(4), workers, strict=True):
        await worker.append(settlement(name))
        worker.close()
    only, book = open_journal(), Book()
    assert await only.replay(book.settle) == 4
    assert sorted(names(4)) == sorted(book.charged)
    assert [path.with_suffix(f".{number}").stat().st_size for number in range(4)] == [0] * 4
    await open_journal().append(settlement("h9"))  # its file is free again
    assert path.with_suffix(".1").read_bytes() == line_of(settlement("h9"))


async def test_what_another_worker_has_locked_is_left_alone(open_journal, settlement):
    first, second, third = open_journal(), open_journal(), open_journal()
    await second.append(settlement("h1"))
    await third.append(settlement("h2"))
    first.close()
    third.close()
    assert [kept.hold_id for kept in open_journal()] == ["h2"]
    assert len(second) == 1


async def test_as_many_files_as_workers_may_be_and_no_more(path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 3)
    journals = [Journal(path, MIB) for _ in range(3)]
    with pytest.raises(OSError, match="in use"):
        Journal(path, MIB)
    for journal in journals:
        journal.close()
    assert MAX_FILES == 256


async def test_a_file_that_a_failing_disk_doesnt_empty_is_settled_all_the_same(open_journal, settlement, monkeypatch):
    journal, book = open_journal(), Book()
    await journal.append(settlement("h1"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_truncate", _refuse)
        assert (await journal.replay(book.settle), len(journal)) == (1, 0)
    assert journal.close() == 0
    assert [kept.hold_id for kept in open_journal()] == ["h1"]  # which is charged once


def _refuse(_file, _data=b""):
    raise OSError(5, "Input/output error")


async def test_files_that_a_failing_disk_leaves_unread_are_left_to_another_worker(
    open_journal, path, settlement, full_disk
):
    first, second = open_journal(), open_journal()
    await first.append(settlement("h1"))
    await second.append(settlement("h2"))
    first.close()
    second.close()
    with full_disk(), pytest.raises(OSError, match="No space"):  # where it moves the second file's line to the first
        Journal(path, MIB)
    assert sorted(kept.hold_id for kept in open_journal()) == ["h1", "h2"]


async def test_nobody_else_can_read_it(open_journal, path, settlement):
    await open_journal().append(settlement())
    assert path.with_suffix(".0").stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


async def test_without_a_path_it_is_kept_in_memory(settlement):
    journal, book = Journal(None, MIB), Book()
    assert journal.room_bytes == MIB
    await journal.append(settlement("h0"))
    assert await journal.replay(book.settle) == 1
    assert book.charged == ["h0"]
    journal.close()


async def test_it_keeps_replaying_whatever_redis_answers(open_journal, settlement, monkeypatch):
    monkeypatch.setattr(module, "REPLAY_INTERVAL_S", 0)
    journal, book = open_journal(), Book(lost_after=0, refused=("h0",))
    replaying = asyncio.create_task(journal.keep_replaying(book.settle))
    for name in names(3):
        await journal.append(settlement(name))
    book.lost_after = None
    await until(lambda: len(journal) <= 1, poll_s=0)
    assert sorted(book.charged) == ["h1", "h2"]
    book.refused = ()
    await until(lambda: not len(journal), poll_s=0)
    assert not replaying.done()
    replaying.cancel()
    await asyncio.wait([replaying])


WRITER = """
    import asyncio, sys
    from pathlib import Path
    from meshproxy.ledger.journal import Journal
    from meshproxy.ledger.records import Settlement
    from meshproxy.openai.usage import Usage

    async def main():
        journal = Journal(Path(sys.argv[1]), 1 << 30)
        number = 0
        async def write(worker):
            nonlocal number
            while True:
                number += 1
                name = f"h{number}"
                await journal.append(Settlement(
                    hold_id=name, request_id="r", account="a", key_id="k", model="m", upstream="u", usage=Usage(1, 1),
                    usage_source="reported", outcome="completed", cost_nusd=1, started_ms=0))
                sys.stdout.write(name + chr(10))
                sys.stdout.flush()
        await asyncio.gather(*(write(worker) for worker in range(8)))

    asyncio.run(main())
"""


@pytest.mark.parametrize("after", [1, 40, 400])
async def test_sigkill_loses_nothing_that_was_acknowledged(path, after):
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path)], stdout=subprocess.PIPE, text=True
    )
    read = partial(writer.stdout.readline)
    acknowledged = {read().strip() for _ in range(after)}
    writer.send_signal(signal.SIGKILL)
    acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
    writer.wait()
    writer.stdout.close()
    journal = Journal(path, 1 << 30)
    found = {kept.hold_id for kept in journal}
    journal.close()
    assert acknowledged - found == set()
    assert len(acknowledged) >= after
