"""What `load` accepts can be served; and secrets that are parts of the settings."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshproxy.app.load import load
from meshproxy.app.worker import Worker
from meshproxy.config import ConfigError
from meshproxy.telemetry.logs import RequestLog

MODEL = 'upstreams = [{ upstream = "u", model = "x" }]\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "1"\n'


def mostly(good, wild):
    """What is right seven times in eight: a file with many values, each of them wild, is hardly ever accepted."""
    return st.sampled_from(range(8)).flatmap(lambda number: wild if number == 5 else good)


words = st.text("aZ09-_.:%@/[]?=&, \t~é\0", max_size=12)
labels = st.text("aZ0-_", min_size=1, max_size=63)
hosts = mostly(
    st.lists(labels, min_size=1, max_size=4).map(".".join) | st.sampled_from(["127.0.0.1", "[::1]", "host."]),
    st.sampled_from(["a..b", "a" * 64, "[::::]", ""]) | words,
)
urls = st.builds(
    "{}://{}{}{}".format,
    mostly(st.sampled_from(["http", "https"]), st.just("ftp")),
    hosts,
    mostly(st.sampled_from(["", ":1", ":65535"]), st.sampled_from([":0", ":99999", ":x"])),
    mostly(st.sampled_from(["", "/v1", "/v1/", "/~a/%20;b"]), st.sampled_from(["/a b", "/?x=1"]) | words),
)
stores = st.builds(
    "{}://{}127.0.0.1{}{}{}".format,
    mostly(st.sampled_from(["redis", "rediss", "redis+cluster", "redis+sentinel"]), st.sampled_from(["unix", "http"])),
    mostly(st.sampled_from(["", ":pw@", "user:p%40w@"]), st.just("p/w@")),
    mostly(st.sampled_from(["", ":1"]), st.sampled_from([":0", ":x", ":1,127.0.0.1:2"])),
    mostly(st.sampled_from(["", "/", "/0"]), st.sampled_from(["/9", "/m", "/m/1", "/x"])),
    mostly(
        st.sampled_from(["", "?tls=1"]),
        st.sampled_from(["?db=1", "?ca_file=/nonexistent", "?ca_file=%00", "?x=1", "?cert_file=/dev/null"]),
    ),
)
names = mostly(
    st.sampled_from(["x-a", "api-key", "accept", "proxy-authorization"]),
    st.sampled_from(["te", "Connection", "a b", "HOST"]),
)
values = mostly(st.text("a ~0", min_size=1, max_size=5).map(str.strip).filter(bool), st.text("a \t~é\n", max_size=5))


def text_of(url, store, headers, host):
    lines = ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in headers.items())
    return (
        f'[server]\nlisten = {json.dumps(host + ":0")}\nadmin_listen = "127.0.0.1:0"\n'
        f"[redis]\nurl = {json.dumps(store)}\ntimeout_s = 0.05\n"
        f'[upstreams.u]\nkind = "openai"\nbase_url = {json.dumps(url)}\nheaders = {{ {lines} }}\n[models.m]\n{MODEL}'
    )


def accepted(path, text):
    """The configuration, if it is one that can be served."""
    path.write_text(text, encoding="utf-8")
    try:
        return load(str(path))
    except ConfigError:
        return None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(urls, stores, st.dictionaries(names, values, max_size=2), st.sampled_from(["127.0.0.1", "", "[::1]"]))
async def test_what_is_accepted_starts(tmp_path, url, store, headers, host):
    loaded = accepted(tmp_path / "some.toml", text_of(url, store, headers, host))
    if loaded is None:
        return
    worker = Worker(loaded.settings, loaded.secrets.upstreams, RequestLog())
    await worker.start()
    await worker.stop()


def config_file(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("redis", "expected"),
    [
        ("url = { env = 'STORE' }", "redis://bob:pw@h/2"),
        ("url = { file = '{dir}/url' }", "redis://:other@h"),
        ("url = 'redis://h/2'\npassword = { env = 'PASSWORD' }", "redis://:p%2F%40%20%C3%A9@h/2"),
        ("url = 'rediss://bob@h:1?db=3'\npassword = { file = '{dir}/password' }", "rediss://bob:secret@h:1?db=3"),
        ("url = 'unix:///run/redis.sock'\npassword = { file = '{dir}/password' }", "unix://:secret@/run/redis.sock"),
    ],
)
def test_the_store_s_secrets(tmp_path, monkeypatch, redis, expected):
    monkeypatch.setenv("STORE", "redis://bob:pw@h/2")
    monkeypatch.setenv("PASSWORD", "p/@ é")
    (tmp_path / "url").write_text("redis://:other@h\n")
    (tmp_path / "password").write_text("secret\n")
    loaded = load(config_file(tmp_path, "[redis]\n" + redis.replace("{dir}", str(tmp_path))))
    assert (loaded.settings.redis.url, loaded.settings.redis.password) == (expected, None)


def test_a_header_s_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("AZURE_KEY", "hunter2\n")
    text = '[upstreams.u]\nkind = "openai"\nbase_url = "http://h"\nheaders = { "api-key" = { env = "AZURE_KEY" }, a = "b" }'
    loaded = load(config_file(tmp_path, text))
    assert loaded.settings.upstreams["u"].headers == {"api-key": "hunter2", "a": "b"}


@pytest.mark.parametrize("value", ["", "a\nb", "é"])
def test_a_header_s_secret_that_cannot_be_sent_is_not_shown(tmp_path, monkeypatch, value):
    monkeypatch.setenv("AZURE_KEY", value)
    text = '[upstreams.u]\nkind = "openai"\nbase_url = "http://h"\nheaders = { "api-key" = { env = "AZURE_KEY" } }'
    path = config_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    expected = f"the secret is empty or has characters that a header can't carry ({path}:4)"
    assert caught.value.faults == [f"upstreams.u.headers.api-key: {expected}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n[server]\n\nlisen = 1", 4),
        ("server.lisen = 1", 1),
        ('[upstreams."a.b"]\nkind = "x"', 2),
        ("[upstreams . 'a.b']\n'kind' = \"x\"", 2),
        ('[models.m]\nupstreams = [\n  # first\n  { upstream = "a", model = "x" },\n  { upstrem = "b" },\n]', 5),
        ('[server]\ntls_cert = """\n[log]\nlevel = 1\n"""\n[log]\nlevel = 2', 7),
    ],
)
def test_a_fault_has_the_line_of_its_key(tmp_path, text, line):
    path = config_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert any(fault.endswith(f"({path}:{line})") for fault in caught.value.faults)


def unfit(tmp_path, text):
    """The keys of a configuration's faults."""
    with pytest.raises(ConfigError) as caught:
        load(config_file(tmp_path, text))
    return [fault.partition(": ")[0] for fault in caught.value.faults]


UPSTREAM = '[upstreams.u]\nkind = "openai"\nbase_url = "http://h"\n'
KEY = UPSTREAM + 'api_key = {{ file = "{}" }}'


@pytest.mark.parametrize("name", ["{}/fifo", "{}", "/dev/zero"])
@pytest.mark.parametrize(
    "text, keys",
    [
        (KEY, ["upstreams.u.api_key"]),
        (UPSTREAM + 'headers = {{ x-a = {{ file = "{}" }} }}', ["upstreams.u.headers.x-a"]),
        ('[redis]\nurl = {{ file = "{}" }}', ["redis.url"]),
        ('[server]\ntls_cert = "{0}"\ntls_key = "{0}"', ["server.tls_cert", "server.tls_key"]),
        ('[redis]\nurl = "rediss://h?ca_file={}"', ["redis.url"]),
    ],
)
def test_what_is_no_file_is_not_read(tmp_path, name, text, keys):
    os.mkfifo(tmp_path / "fifo")
    assert unfit(tmp_path, text.format(name.format(tmp_path))) == keys


def test_a_secret_is_no_large_file(tmp_path):
    (tmp_path / "large").write_text("a" * 70_000)
    assert unfit(tmp_path, KEY.format(tmp_path / "large")) == ["upstreams.u.api_key"]


@pytest.mark.parametrize(
    "text, keys",
    [
        ('[server]\ntls_cert = "{0}/crt"\ntls_key = "{0}/key"', ["server.tls_key"]),
        ('[redis]\nurl = "rediss://h?cert_file={0}/crt&key_file={0}/key"', ["redis.url"]),
    ],
)
def test_a_key_with_a_password_is_not_asked_for_on_the_terminal(tmp_path, text, keys):
    certificate = trustme.CA().issue_cert("h")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "crt")
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"a"))
    (tmp_path / "key").write_bytes(locked)
    assert unfit(tmp_path, text.format(tmp_path)) == keys


@pytest.mark.parametrize(
    ("days", "warning"), [(-1, "clients refuse it (certificate has expired)"), (1, "expires on"), (40, None)]
)
def test_a_certificate_that_clients_will_refuse_is_warned_of(tmp_path, days, warning):
    ends_at = datetime.now(UTC) + timedelta(days=days)
    certificate = trustme.CA().issue_cert("h", not_after=ends_at)
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "crt")
    text = UPSTREAM + f"[models.m]\n{MODEL}" + f'[server]\ntls_cert = "{tmp_path}/crt"\ntls_key = "{tmp_path}/crt"\n'
    told = [each for each in load(config_file(tmp_path, text)).warnings if each.startswith("server.tls_cert")]
    assert [warning] * (warning is not None) == [warning for each in told if warning in each]


@pytest.mark.parametrize(
    "listen, admin",
    [
        ("localhost:1", "127.0.0.1:1"),
        ("0.0.0.0:1", "127.0.0.1:1"),
        ("[::]:1", "127.0.0.1:1"),
        ("127.0.0.1:1", "127.1:1"),
        (":1", "127.0.0.1:1"),
        ("unix:{}/a", "unix:{}/./a"),
    ],
)
def test_listeners_that_claim_the_same(tmp_path, listen, admin):
    text = f'[server]\nlisten = "{listen}"\nadmin_listen = "{admin}"\nadmin_token = {{ file = "{tmp_path}/token" }}'
    (tmp_path / "token").write_text("a")
    assert unfit(tmp_path, text.replace("{}", str(tmp_path))) == ["server.admin_listen"]


@pytest.mark.parametrize(
    "listen, admin",
    [
        ("127.0.0.1:1", "127.0.0.2:1"),
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("0.0.0.0:1", "127.0.0.1:2"),
        ("unix:{}/a", "unix:{}/b"),
    ],
)
def test_listeners_that_do_not(tmp_path, listen, admin):
    text = f'[server]\nlisten = "{listen}"\nadmin_listen = "{admin}"'
    assert load(config_file(tmp_path, text.replace("{}", str(tmp_path))))


@pytest.mark.parametrize("name", ["", "/some.toml"])
def test_a_socket_where_something_else_is(tmp_path, name):
    assert unfit(tmp_path, f'[server]\nlisten = "unix:{tmp_path}{name}"') == ["server.listen"]


@pytest.mark.parametrize("name", ["", "/some.toml"])
def test_a_redis_socket_where_something_else_is(tmp_path, name):
    assert unfit(tmp_path, f'[redis]\nurl = "unix://{tmp_path}{name}"') == ["redis.url"]


def test_a_directory_is_no_journal(tmp_path):
    assert unfit(tmp_path, f'[redis]\njournal = "{tmp_path}"') == ["redis.journal"]


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = tmp_path / "some.toml"
    path.write_bytes(b"\xef\xbb\xbf[log]\r\nlevel = 'debug'\r\n")
    assert load(str(path)).settings.log.level == "debug"
