"""A backup that is taken under load, restored into an empty Redis, and made whole, as docs/operations.md describes it."""

import asyncio
import shutil
import signal
from contextlib import asynccontextmanager
from decimal import Decimal

from meshproxy.units import parse_usd
from tests.deploy.conftest import open_site
from tests.harness.process import Program, free_port, listens, program
from tests.harness.waiting import until

MODEL = "sim/plain?tokens=6&tps=400"


@asynccontextmanager
async def redis_server(folder, port, appendonly="yes"):
    """Redis with the settings that docs/ledger.md recommends and its files in a folder."""
    folder.mkdir(exist_ok=True)
    options = ("--appendonly", appendonly, "--maxmemory-policy", "noeviction", "--save", "")
    command = (program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, *options)
    with Program(*command, log=folder / "log") as server:
        await server.until(lambda: listens(port))
        yield
        server.stop()


async def ask(site, gateway, caller, count):
    streams = [site.stream(gateway.url, caller, MODEL) for _ in range(count)]
    return sum(stream.is_whole for stream in await asyncio.gather(*streams))


async def saved(store, command):
    """Let Redis write its data set to its disk, and wait until it has."""
    before = await store.execute("LASTSAVE") if command == "BGSAVE" else None
    await store.execute(command)

    async def done():
        persistence = (await store.execute("INFO", "persistence")).decode()
        busy = "rdb_bgsave_in_progress:1" in persistence or "aof_rewrite_in_progress:1" in persistence
        return not busy and (before is None or await store.execute("LASTSAVE") >= before)

    await until(done, command)


async def books(site, caller):
    """Return the account's balance. Requests that the backup caught in flight hold credit until their deadlines."""
    balance = await site.books.ledger.balance(caller.account)
    assert balance.granted_nusd == balance.balance_nusd + balance.settled_nusd
    return balance


async def test_a_backup_is_restored_and_the_books_made_whole_from_the_log(simulator, tmp_path):
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    async with redis_server(tmp_path / "redis", port), open_site(url, simulator, tmp_path) as site:
        gateway = await site.gateway(models=(MODEL,))
        caller = await site.key("10.00")
        assert await ask(site, gateway, caller, 10) == 10
        await site.settled(caller, 10)
        streams = [site.stream(gateway.url, caller, MODEL) for _ in range(5)]
        await saved(site.books.store, "BGSAVE")
        shutil.copy(tmp_path / "redis" / "dump.rdb", tmp_path / "backup.rdb")
        assert sum(stream.is_whole for stream in await asyncio.gather(*streams)) == 5
        assert await ask(site, gateway, caller, 5) == 5
        gateway.command("credits", "grant", caller.account, "5.00", "--ref", "invoice-2")
        await site.settled(caller, 20)
        lost = await books(site, caller)
        await until(lambda: len(gateway.logged("request")) == 20, "the log")
        log = gateway.logged("request")
        gateway.send(signal.SIGTERM)
        assert await gateway.exit() == 0

    (tmp_path / "restored").mkdir()
    shutil.copy(tmp_path / "backup.rdb", tmp_path / "restored" / "dump.rdb")
    async with redis_server(tmp_path / "restored", port, appendonly="no"), open_site(url, simulator, tmp_path) as site:
        await site.books.store.execute("CONFIG", "SET", "appendonly", "yes")
        gateway = await site.gateway(models=(MODEL,))
        restored = await books(site, caller)
        assert restored.granted_nusd == parse_usd("10.00")

        (row,) = gateway.command("usage", "--account", caller.account, "--since", "24h")
        owed = sum(Decimal(line["cost_usd"]) for line in log) - Decimal(row["cost_usd"])
        assert owed > 0
        for _ in range(2):  # repeating either changes nothing
            gateway.command("credits", "grant", caller.account, "5.00", "--ref", "invoice-2")
            gateway.command("credits", "grant", caller.account, f"-{owed}", "--ref", "restored-2026-11-28")
        assert (await books(site, caller)).balance_nusd == lost.balance_nusd
        assert await ask(site, gateway, caller, 5) == 5
