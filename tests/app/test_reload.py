import pytest

from meshproxy.app.load import Loaded
from meshproxy.app.reload import FIXED, Reloader, Standing, hold_back
from meshproxy.config import Secrets, Settings, Unfit, parse

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


STANDING = Standing(parse("[redis]\nurl = 'unix:///embedded'"), Secrets({}), "/journal", 7)


def test_an_unfit_file_changes_nothing():
    def read():
        raise Unfit(["server.x: unknown key"])

    expected = Standing(STANDING.settings, STANDING.secrets, "/journal", 7, reload_failed=True)
    assert expected == Reloader(Settings(), read).next(STANDING)


def test_a_good_one_is_the_next_generation_over_the_same_store():
    wanted = parse("[server]\nlisten = '127.0.0.1:9'\ndrain_s = 1")
    read = lambda: Loaded(wanted, Secrets({"a": "b"}), [])  # noqa: E731
    reloader = Reloader(Settings(), read)
    first = reloader.next(STANDING)
    assert (8, "/journal", {"a": "b"}) == (first.generation, first.journal, first.secrets.upstreams)
    assert ("unix:///embedded", 1, "127.0.0.1:8080") == (
        first.settings.redis.url,
        first.settings.server.drain_s,
        first.settings.server.listen,
    )
    assert 9 == reloader.next(first).generation
