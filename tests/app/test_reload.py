import pytest

from meshproxy.app.reload import FIXED, Reloader, hold_back, needs_restart
from meshproxy.config import Settings, Unfit, parse

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
        (TLS, ["server.tls_cert"]),
        ("[server]\ndrain_s = 1\nmax_in_flight = 5\ntrusted_proxies = []\n[log]\nlevel = 'error'", []),
    ],
)
def test_what_needs_a_restart_is_named_and_held_back(text, expected):
    wanted = parse(text)
    assert expected == list(needs_restart(Settings(), wanted))
    held = hold_back(Settings(), wanted)
    assert [] == list(needs_restart(Settings(), held))


def test_what_a_reload_changes_comes_through():
    wanted = parse("[server]\ndrain_s = 1\nlisten = '127.0.0.1:9'\n[log]\nlevel = 'error'")
    held = hold_back(Settings(), wanted)
    assert (1, "error", Settings().server.listen) == (held.server.drain_s, held.log.level, held.server.listen)


def test_a_certificate_may_move():
    running, wanted = parse(TLS), parse(TLS.replace("/c", "/d"))
    assert [] == list(needs_restart(running, wanted))
    assert "/d" == hold_back(running, wanted).server.tls_cert


def test_every_fixed_key_exists():
    settings = Settings()
    assert all(hasattr(getattr(settings, table), name) for table, names in FIXED.items() for name in names)


def test_an_unfit_file_changes_nothing():
    def read():
        raise Unfit(["server.x: unknown key"])

    assert None is Reloader(Settings(), read).next()


def test_what_was_held_back_once_is_not_news_the_next_time():
    wanted = parse("[server]\nlisten = '127.0.0.1:9'")
    reloader = Reloader(Settings(), lambda: (wanted, {"a": "b"}))
    first, second = reloader.next(), reloader.next()
    assert first == second == (Settings(), {"a": "b"})
