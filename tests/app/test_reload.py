import gc
import io
import re
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meshproxy.app.load import Loaded
from meshproxy.app.reload import RESTART_ONLY, Reloader, RunningConfig, without_restart_keys
from meshproxy.app.worker_process import RunningWorker
from meshproxy.config import ConfigError, Secrets, Settings, parse
from meshproxy.config.settings import Server
from meshproxy.server.listener import listen
from meshproxy.telemetry.logs import LineSink

PROVIDER = '[upstreams.a]\nkind = "openai"\nbase_url = "{}"\n'
TLS = '[server]\ntls_cert = "/c"\ntls_key = "/k"\n'


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[server]\nlisten = '127.0.0.1:9'", ["server.listen"]),
        ("[server]\nworkers = 3\nadmin_listen = '127.0.0.1:9'", ["server.admin_listen", "server.workers"]),
        ("[server]\nproxy_protocol = true", ["server.proxy_protocol"]),
        ("[server]\nadmin_token = { env = 'T' }", ["server.admin_token"]),
        ("[redis]\nurl = 'redis://other'\ntimeout_s = 9", ["redis.url", "redis.timeout_s"]),
        ("[log]\nformat = 'console'\nlevel = 'debug'", ["log.format"]),
        (TLS, ["server.tls_cert", "server.tls_key"]),
        ("[server]\ndrain_s = 1\nmax_in_flight = 5\ntrusted_proxies = []\n[log]\nlevel = 'error'", []),
    ],
)
def test_what_needs_a_restart_is_named_and_held_back(text, expected):
    held, named = without_restart_keys(Settings(), parse(text))
    assert named == expected
    assert without_restart_keys(Settings(), held) == (held, [])


def test_what_a_reload_changes_comes_through():
    held, _ = without_restart_keys(
        Settings(), parse("[server]\ndrain_s = 1\nlisten = '127.0.0.1:9'\n[log]\nlevel = 'error'")
    )
    assert (held.server.drain_s, held.log.level, held.server.listen) == (1, "error", Settings().server.listen)


def test_a_certificate_may_move():
    wanted = parse(TLS.replace("/c", "/d"))
    assert without_restart_keys(parse(TLS), wanted) == (wanted, [])


def test_every_fixed_key_exists():
    settings = Settings()
    assert all(hasattr(getattr(settings, table), name) for table, names in RESTART_ONLY.items() for name in names)


def test_the_docs_say_of_every_key_whether_a_reload_applies_it():
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    applies, restart = (
        re.search(rf"^\| {row}.*$", page, re.MULTILINE).group() for row in ("applies", "needs a restart")
    )
    applied, fixed = (set(re.findall(r"`([\w.\[\]]+)`", row)) for row in (applies, restart))
    server = set(Server.__struct_fields__)
    assert fixed & server == set(RESTART_ONLY["server"])
    assert applied & server == server - fixed
    tables = {name for name in Settings.__struct_fields__ if name not in {"server", "upstreams", "models"}}
    assert {name for name in tables if f"[{name}]" in fixed} == {
        name for name in RESTART_ONLY.keys() & tables if {*RESTART_ONLY[name]} == {*field_names(name)}
    }
    assert {name for name in tables if f"[{name}]" in applied} == tables - RESTART_ONLY.keys()


def field_names(table):
    return getattr(Settings(), table).__struct_fields__


STANDING = RunningConfig(parse("[redis]\nurl = 'unix:///embedded'"), Secrets({}), "/journal", 7)


class Workers:
    """One worker, which can't build what `faults` has."""

    def __init__(self, faults=()):
        self.config = STANDING
        self.faults = list(faults)
        self.asked = []

    async def prepare(self, config):
        self.asked.append(("prepare", config.generation))
        return self.faults

    async def apply(self, config):
        self.asked.append(("apply", config.generation))
        self.config = config
        return []


def reads(*texts, token=None):
    """A file that says each of these in turn, then nothing that can be read. `token`: the admin token."""
    rest = list(texts)

    def read():
        if not rest:
            raise ConfigError(["server.x: unknown key"])
        return Loaded(parse(rest.pop(0)), Secrets({"a": "b"}, token), [])

    return read


async def test_an_unfit_file_changes_nothing():
    workers = Workers()
    with capture_logs() as logs:
        await Reloader(Settings(), reads()).reload(workers)
    assert RunningConfig(STANDING.settings, STANDING.secrets, "/journal", 7, reload_failed=True) == workers.config
    assert [(line["event"], line["faults"]) for line in logs] == [("reload_failed", ["server.x: unknown key"])]


async def test_what_a_worker_cannot_build_changes_nothing():
    workers = Workers(["upstreams.a.headers: no"])
    with capture_logs() as logs:
        await Reloader(Settings(), reads("")).reload(workers)
    assert (workers.config.generation, workers.config.reload_failed) == (7, True)
    assert workers.asked == [("prepare", 8), ("apply", 7)]
    assert [line["faults"] for line in logs if line["event"] == "reload_failed"] == [["upstreams.a.headers: no"]]


async def test_a_good_one_is_the_next_generation_over_the_same_store():
    workers = Workers()
    reloader = Reloader(Settings(), reads("[server]\nlisten = '127.0.0.1:9'\ndrain_s = 1", ""))
    await reloader.reload(workers)
    first = workers.config
    assert workers.asked == [("prepare", 8), ("apply", 8)]
    assert (first.generation, first.journal, first.secrets.upstreams) == (8, "/journal", {"a": "b"})
    assert (
        first.settings.redis.url,
        first.settings.server.drain_s,
        first.settings.server.listen,
    ) == ("unix:///embedded", 1, "127.0.0.1:8080")
    await reloader.reload(workers)
    assert workers.config.generation == 9


async def test_what_could_not_be_swapped_in_is_not_what_the_next_is_compared_with():
    workers = Workers(["no"])
    reloader = Reloader(Settings(), reads("[server]\nlisten = '127.0.0.1:9'", "[server]\nlisten = '127.0.0.1:9'"))
    await reloader.reload(workers)
    workers.faults = []
    with capture_logs() as logs:
        await reloader.reload(workers)
    assert [line["key"] for line in logs if line["event"] == "reload_needs_restart"] == ["server.listen"]


async def test_an_admin_token_of_another_text_in_the_same_file_needs_a_restart():
    workers = Workers()
    with capture_logs() as logs:
        await Reloader(Settings(), reads("", token="new")).reload(workers)
    assert [line["key"] for line in logs if line["event"] == "reload_needs_restart"] == ["server.admin_token"]
    assert workers.config.secrets == Secrets({"a": "b"}, STANDING.secrets.admin_token)


async def test_a_bug_of_ours_in_a_build_ends_no_worker(monkeypatch, store_server):
    thresholds = gc.get_threshold()
    settings = parse(f"[redis]\nurl = '{store_server}'\n" + PROVIDER.format("http://one"))
    with listen("127.0.0.1:0") as sock:
        worker = RunningWorker(RunningConfig(settings, Secrets({})), sock, LineSink(io.BytesIO(), lambda _: b""))
        await worker.start()
        try:
            wanted = RunningConfig(parse(PROVIDER.format("http://two")), Secrets({}), generation=2)
            with monkeypatch.context() as patched, capture_logs() as logs:
                patched.setattr("meshproxy.app.worker.make_active_config", lambda *_, **__: None + 1)
                assert await worker.prepare(wanted) == ["it can't be built (TypeError)"]
                assert await worker.apply(wanted) == ["it can't be built (TypeError)"]
            assert {line["event"] for line in logs} == {"prepare_failed"}
            assert worker.config.generation == 1
            assert await worker.apply(wanted) == []
            assert (
                worker.config.generation,
                worker.worker.gateway.active.settings.upstreams["a"].base_url,
            ) == (2, "http://two")
        finally:
            worker.interrupt()
            await worker.stop()
            gc.unfreeze()
            gc.set_threshold(*thresholds)
