import gc
import io

import pytest
from structlog.testing import capture_logs

from meshproxy.app.reload import FIXED, Loaded, Reloader, RunningConfig, hold_back
from meshproxy.app.worker_process import Serving
from meshproxy.config import ConfigError, Secrets, Settings, parse
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
    held, named = hold_back(Settings(), parse(text))
    assert expected == named
    assert (held, []) == hold_back(Settings(), held)


def test_what_a_reload_changes_comes_through():
    held, _ = hold_back(Settings(), parse("[server]\ndrain_s = 1\nlisten = '127.0.0.1:9'\n[log]\nlevel = 'error'"))
    assert (1, "error", Settings().server.listen) == (held.server.drain_s, held.log.level, held.server.listen)


def test_a_certificate_may_move():
    wanted = parse(TLS.replace("/c", "/d"))
    assert (wanted, []) == hold_back(parse(TLS), wanted)


def test_every_fixed_key_exists():
    settings = Settings()
    assert all(hasattr(getattr(settings, table), name) for table, names in FIXED.items() for name in names)


STANDING = RunningConfig(parse("[redis]\nurl = 'unix:///embedded'"), Secrets({}), "/journal", 7)


class Crew:
    """A crew of one, who can't build what `faults` has."""

    def __init__(self, faults=()):
        self.standing = STANDING
        self.faults = list(faults)
        self.asked = []

    async def prepare(self, standing):
        self.asked.append(("prepare", standing.generation))
        return self.faults

    async def apply(self, standing):
        self.asked.append(("apply", standing.generation))
        self.standing = standing
        return []


def reads(*texts):
    """A file that says each of these in turn, then nothing that can be read."""
    rest = list(texts)

    def read():
        if not rest:
            raise ConfigError(["server.x: unknown key"])
        return Loaded(parse(rest.pop(0)), Secrets({"a": "b"}), [])

    return read


async def test_an_unfit_file_changes_nothing():
    crew = Crew()
    with capture_logs() as logs:
        await Reloader(Settings(), reads()).reload(crew)
    assert RunningConfig(STANDING.settings, STANDING.secrets, "/journal", 7, reload_failed=True) == crew.standing
    assert [("reload_failed", ["server.x: unknown key"])] == [(line["event"], line["faults"]) for line in logs]


async def test_what_a_worker_cannot_build_changes_nothing():
    crew = Crew(["upstreams.a.headers: no"])
    with capture_logs() as logs:
        await Reloader(Settings(), reads("")).reload(crew)
    assert (7, True) == (crew.standing.generation, crew.standing.reload_failed)
    assert [("prepare", 8), ("apply", 7)] == crew.asked
    assert [["upstreams.a.headers: no"]] == [line["faults"] for line in logs if line["event"] == "reload_failed"]


async def test_a_good_one_is_the_next_generation_over_the_same_store():
    crew = Crew()
    reloader = Reloader(Settings(), reads("[server]\nlisten = '127.0.0.1:9'\ndrain_s = 1", ""))
    await reloader.reload(crew)
    first = crew.standing
    assert [("prepare", 8), ("apply", 8)] == crew.asked
    assert (8, "/journal", {"a": "b"}) == (first.generation, first.journal, first.secrets.upstreams)
    assert ("unix:///embedded", 1, "127.0.0.1:8080") == (
        first.settings.redis.url,
        first.settings.server.drain_s,
        first.settings.server.listen,
    )
    await reloader.reload(crew)
    assert 9 == crew.standing.generation


async def test_what_could_not_be_swapped_in_is_not_what_the_next_is_compared_with():
    crew = Crew(["no"])
    reloader = Reloader(Settings(), reads("[server]\nlisten = '127.0.0.1:9'", "[server]\nlisten = '127.0.0.1:9'"))
    await reloader.reload(crew)
    crew.faults = []
    with capture_logs() as logs:
        await reloader.reload(crew)
    assert ["server.listen"] == [line["key"] for line in logs if line["event"] == "reload_needs_restart"]


async def test_a_bug_of_ours_in_a_build_ends_no_worker(monkeypatch, store_server):
    thresholds = gc.get_threshold()
    settings = parse(f"[redis]\nurl = '{store_server}'\n" + PROVIDER.format("http://one"))
    with listen("127.0.0.1:0") as sock:
        serving = Serving(RunningConfig(settings, Secrets({})), sock, LineSink(io.BytesIO(), lambda _: b""))
        await serving.start()
        try:
            wanted = RunningConfig(parse(PROVIDER.format("http://two")), Secrets({}), generation=2)
            with monkeypatch.context() as patched, capture_logs() as logs:
                patched.setattr("meshproxy.app.worker.deploy", lambda *_, **__: None + 1)
                assert ["it can't be built (TypeError)"] == await serving.prepare(wanted)
                assert ["it can't be built (TypeError)"] == await serving.apply(wanted)
            assert {"prepare_failed"} == {line["event"] for line in logs}
            assert 1 == serving.standing.generation
            assert [] == await serving.apply(wanted)
            assert (2, "http://two") == (
                serving.standing.generation,
                serving.worker.gateway.active.settings.upstreams["a"].base_url,
            )
        finally:
            serving.hurry()
            await serving.stop()
            gc.unfreeze()
            gc.set_threshold(*thresholds)
