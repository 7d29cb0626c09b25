import re
import tomllib
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy import config
from meshproxy.config import ConfigError, SecretReader, Secrets, parse, split_address
from meshproxy.config.load import decode, likely_mistakes
from meshproxy.units import parse_usd

EXAMPLE = Path(__file__).parent.parent / "config.example.toml"
PROVIDER = '[upstreams.a]\nkind = "openai"\nbase_url = "http://a"\n'
NO_HEADER = "expected the name of a header, except headers of a connection and those that the gateway sets itself"
LABEL = "a label of its host's name has 1 to 63 letters, digits, - and _ (RFC 1035, 2.3.4)"
PRICES = 'input_usd_per_mtok = "1"\noutput_usd_per_mtok = "1"\n'


def faults(text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def provider(line):
    return PROVIDER + line


def model(lines):
    return PROVIDER + '[models.m]\nupstreams = [{ upstream = "a", model = "x" }]\n' + PRICES + lines


def test_nothing_is_the_defaults():
    assert config.Settings() == parse("")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sever = 1", ["sever: unknown key, did you mean server?"]),
        ("zzz = 1", ["zzz: unknown key"]),
        ("server = 1", ["server: expected a table"]),
        ("upstreams = 1", ["upstreams: expected a table, got int"]),
        ("upstreams.a = 1", ["upstreams.a: expected a table"]),
        ("[server]\nlisen = 1", ["server.lisen: unknown key, did you mean listen?"]),
        ("[server]\nlisten = 1", ["server.listen: expected str, got int"]),
        ("[server]\nworkers = -1", ["server.workers: expected int >= 0"]),
        ("[server]\nworkers = true", ["server.workers: expected int, got bool"]),
        ("[server]\nmax_in_flight = 0", ["server.max_in_flight: expected int >= 1"]),
        ("[server]\nheartbeat_s = 0", ["server.heartbeat_s: expected float >= 0.001"]),
        ("[server]\nheartbeat_s = nan", ["server.heartbeat_s: expected float >= 0.001"]),
        ("[server]\nheartbeat_s = inf", ["server.heartbeat_s: expected float <= 86400.0"]),
        ("[server]\ndrain_s = -1", ["server.drain_s: expected float >= 0.0"]),
        ("[server]\nlisten = '8080'", ["server.listen: '8080' is not HOST:PORT"]),
        ("[server]\nlisten = 'a b:1'", ["server.listen: 'a b:1' is not HOST:PORT"]),
        ("[server]\nlisten = '::1:80'", ["server.listen: '::1:80': an IPv6 address goes in brackets"]),
        ("[server]\nadmin_listen = '[x]:1'", ["server.admin_listen: '[x]:1': 'x' is not an IPv6 address"]),
        ("[server]\nlisten = 'unix:a'", ["server.listen: 'unix:a' needs an absolute path"]),
        ("[server]\nlisten = ':1'\nadmin_listen = ':1'", ["server.admin_listen: the same as server.listen"]),
        ("[server]\ntls_cert = '/c'", ["server.tls_key: required with server.tls_cert"]),
        ("[server]\ntls_key = '/k'", ["server.tls_cert: required with server.tls_key"]),
        ("[server]\nadmin_token = {}", ['server.admin_token: use either { env = "NAME" } or { file = "/path" }']),
        ("[server]\ntrusted_proxies = ['x']", ["server.trusted_proxies[0]: 'x' is not a network such as 10.0.0.0/8"]),
        ("[server]\ntrusted_proxies = ['::1', 2]", ["server.trusted_proxies[1]: expected str, got int"]),
        (
            "[log]\nlevel = 'loud'",
            ["log.level: invalid enum value 'loud', expected debug or info or warning or error"],
        ),
        ("[log]\nformat = 1", ["log.format: expected str, got int, expected json or console"]),
        (
            "[redis]\non_failure = 'local'",
            ['redis.journal: required with on_failure = "local", which keeps settlements in this file'],
        ),
        (
            "[redis]\nlocal_allowance_usd = 1.5",
            ['redis.local_allowance_usd: expected a decimal string in USD, as "2.50"'],
        ),
        ("[credits]\nclamp = 'yes'", ["credits.clamp: expected bool, got str"]),
        ("[limits]\nenforce = true", ["limits.enforce: unknown key, did you mean enforce_mid_stream?"]),
        (
            "[defaults]\nrequests_per_minute = 99999999999999999999",
            ["defaults.requests_per_minute: expected int <= 9007199254740991"],
        ),
        ("[defaults]\nmodel = 'a/b'", ["defaults.model: no model is named a/b"]),
        (
            "[upstreams.a]",
            ["upstreams.a.kind: required, and missing", "upstreams.a.base_url: required, and missing"],
        ),
        (
            "[upstreams.'a b']\nkind = 'openai'\nbase_url = 'http://a'",
            ['upstreams."a b": expected 1 to 256 characters of ASCII without spaces'],
        ),
        (
            "[upstreams.a]\nkind = 'opnai'\nbase_url = 'http://a'",
            ["upstreams.a.kind: invalid enum value 'opnai', expected openai or openrouter or simulator"],
        ),
        (
            provider('api_key = "sk-1"'),
            ['upstreams.a.api_key: a secret must not be written here: use { env = "NAME" } or { file = "/path" }'],
        ),
        (provider("api_key = 1"), ["upstreams.a.api_key: expected a table"]),
        (
            provider("api_key = {}"),
            ['upstreams.a.api_key: use either { env = "NAME" } or { file = "/path" }'],
        ),
        (
            provider('api_key = { env = "A", file = "b" }'),
            ['upstreams.a.api_key: use either { env = "NAME" } or { file = "/path" }'],
        ),
        (
            provider('api_key = { enf = "A" }'),
            [
                "upstreams.a.api_key.enf: unknown key, did you mean env?",
                'upstreams.a.api_key: use either { env = "NAME" } or { file = "/path" }',
            ],
        ),
        ("[server]\nlisten = 'a..b:1'", [f"server.listen: 'a..b:1': {LABEL}"]),
        ("[server]\nlisten = '127.0.0.256:1'", ["server.listen: '127.0.0.256:1': its host is not an IPv4 address"]),
        ("[server]\nadmin_hosts = ['http://a']", ["server.admin_hosts[0]: expected a host's name without a port"]),
        ("[server]\nadmin_hosts = ['a:1']", ["server.admin_hosts[0]: expected a host's name without a port"]),
        ("[server]\nadmin_hosts = ['a', '*']", ["server.admin_hosts[1]: expected a host's name without a port"]),
        ("[server]\ncors_origins = ['https://a:99999']", ["server.cors_origins[0]: Port out of range 0-65535"]),
        ("[server]\ncors_origins = ['https://a:443']", ["server.cors_origins[0]: browsers send it as https://a"]),
        (
            "[server]\ncors_origins = ['http://App:80']",
            ["server.cors_origins[0]: browsers send it as http://app"],
        ),
        ("[redis]\njournal = ''", ["redis.journal: expected the path of a file"]),
        ("[redis]\njournal = '/a/'", ["redis.journal: expected the path of a file"]),
        ('[redis]\njournal = "/a\\u0000"', ["redis.journal: expected the path of a file"]),
        (provider('headers = { Content-Encoding = "gzip" }'), [f"upstreams.a.headers.Content-Encoding: {NO_HEADER}"]),
        (
            provider('headers = { X-A = "1", x-a = "2" }'),
            [
                "upstreams.a.headers.X-A: this header is set twice",
                "upstreams.a.headers.x-a: this header is set twice",
            ],
        ),
        (
            provider("headers = { a = 1 }"),
            ["upstreams.a.headers.a: expected printable ASCII without spaces at its ends"],
        ),
        (provider('headers = { "a b" = "c" }'), [f'upstreams.a.headers."a b": {NO_HEADER}']),
        (
            provider(r'headers = { a = "b\r\nc: d" }'),
            ["upstreams.a.headers.a: expected printable ASCII without spaces at its ends"],
        ),
        (provider('headers = { Host = "b" }'), [f"upstreams.a.headers.Host: {NO_HEADER}"]),
        (model("context_window = 8192"), ["models.m.max_output_tokens: 16384 is more than context_window, 8192"]),
        (
            model("cached_input_usd_per_mtok = 1"),
            ['models.m.cached_input_usd_per_mtok: expected a decimal string in USD, as "2.50"'],
        ),
        ("[models.m]\nupstreams = []\n" + PRICES, ["models.m.upstreams: expected a list of length >= 1"]),
        ("[models.m]\nupstreams = [1]\n" + PRICES, ["models.m.upstreams[0]: expected a table"]),
        (
            PROVIDER + '[models."a/b"]\nupstreams = [{ upstream = "aa", model = "x", wait = 1 }]\n' + PRICES,
            [
                'models."a/b".upstreams[0].wait: unknown key, did you mean weight?',
                'models."a/b".upstreams[0].upstream: no upstream is named aa, did you mean a?',
            ],
        ),
        (
            PROVIDER + '[models.m]\nupstreams = [{ upstream = "a", model = "", weight = 0 }]\n' + PRICES,
            [
                "models.m.upstreams[0].model: expected 1 to 256 characters of ASCII without spaces",
                "models.m.upstreams[0].weight: expected int >= 1",
            ],
        ),
    ],
)
def test_faults(text, expected):
    assert faults(text) == expected


@pytest.mark.parametrize("text", ["x", "a = 1\na = 2", "a = " + "9" * 5000, "a = " + "[" * 10_000, "[a", 'a = "\x00"'])
def test_what_is_no_toml(text):
    (fault,) = faults(text)
    assert fault.startswith("not TOML: ")


@pytest.mark.parametrize(
    "url, expected",
    [
        ("https://api.openai.com/v1", None),
        ("http://127.0.0.1:8000", None),
        ("http://[::1]:8000/v1/", None),
        ("http://a.example/x~y/%20", None),
        ("ftp://a", "expected"),
        ("http://", "expected"),
        ("http://:80", "expected"),
        ("http://a\n", "expected"),
        ("http://a/b?c", "expected"),
        ("http://a/#c", "expected"),
        ("http://user:password@a", "expected"),
        ("http://a b", "expected"),
        ("http://é", "expected"),
        ("http://a/é", "expected"),
        ("http://a:99999", "Port out of range 0-65535"),
        ("http://a:0", "there is no port 0"),
        ("http://127.0.0.256", "its host is not an IPv4 address"),
        ("http://1.2.3.4.5", "its host is not an IPv4 address"),
        ("http://256.1", "its host is not an IPv4 address"),
        ("http://127.1", None),
        ("http://2130706433", None),
        ("http://4.example.", None),
    ],
)
def test_base_url(url, expected):
    found = _faults_or_none(f"[upstreams.a]\nkind = 'openai'\nbase_url = {msgspec.json.encode(url).decode()}")
    if expected == "expected":
        expected = "expected an http or https URL without user, query and fragment"
    assert (found and found[0].removeprefix("upstreams.a.base_url: ")) == expected


def _faults_or_none(text):
    try:
        parse(text)
    except ConfigError as unfit:
        return unfit.faults
    return None


@pytest.mark.parametrize(
    "url",
    ["redis://a", "rediss://u:p@a:1/2", "unix:///a", "redis+sentinel://a,b/m/0", "redis+cluster://a,b", "embedded"],
)
def test_redis_url(url):
    assert url == parse(f"[redis]\nurl = '{url}'").redis.url


@pytest.mark.parametrize("url", ["http://u:hunter2@a", "redis:/u:hunter2@a", "u:hunter2@a", "", "redis"])
def test_a_redis_url_is_not_shown_for_it_may_hold_a_password(url):
    (fault,) = faults(f"[redis]\nurl = '{url}'")
    assert (fault.startswith("redis.url: expected a URL with one of redis://, "), "hunter2" in fault) == (True, False)


@pytest.mark.parametrize("address", [":8081", "0.0.0.0:8081", "[::]:8081", "10.0.0.1:8081", "host.example:8081"])
def test_an_admin_listener_that_others_can_reach_needs_a_token(address):
    text = f"[server]\nadmin_listen = '{address}'\n"
    assert faults(text) == [
        f"server.admin_listen: other machines can reach {address}, so server.admin_token is required"
    ]
    assert parse(text + "admin_token = { env = 'TOKEN' }").server.admin_listen == address


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/run/admin.sock"])
def test_an_admin_listener_of_this_machine_needs_none(address):
    assert address == parse(f"[server]\nadmin_listen = '{address}'").server.admin_listen


@pytest.mark.parametrize("usd", ["0", "1", "2.50", "0.000000001", "999999.999999999"])
def test_every_price_that_is_let_through_can_be_parsed(usd):
    text = model("").replace('"1"', f'"{usd}"', 1)
    assert parse_usd(usd) == parse_usd(parse(text).models["m"].input_usd_per_mtok)


@pytest.mark.parametrize(
    "usd", ["", "-1", "+1", "1.", ".5", "1e3", "1,5", " 1", "1\\n", "\\u0663", "0.0000000001", "1000000"]
)
def test_what_is_no_price(usd):
    text = model("").replace('"1"', f'"{usd}"', 1)
    assert faults(text) == ['models.m.input_usd_per_mtok: expected a decimal string in USD, as "2.50"']


TIER = '[[models.m.price_tiers]]\nabove_prompt_tokens = {}\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "1"\n'
SERVICE = '[models.m.service_tiers.{}]\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "1"\n'


@pytest.mark.parametrize(
    "more",
    [
        TIER.format(1) + TIER.format(2),
        SERVICE.format("flex"),
        SERVICE.format("flex") + TIER.format(5).replace("m.price", "m.service_tiers.flex.price"),
        'markup = "1.05"\ncost_from = "usage.cost"',
        'field_usd = { plugins = "0.02" }',
    ],
)
def test_prices_beside_those_of_tokens(more):
    assert list(parse(model(more)).models) == ["m"]


@pytest.mark.parametrize(
    "more, expected",
    [
        (
            TIER.format(2) + TIER.format(2),
            ["models.m.price_tiers: above_prompt_tokens of each must be more than that of the one before it"],
        ),
        (TIER.format(0), ["models.m.price_tiers[0].above_prompt_tokens: expected int >= 1"]),
        (
            TIER.format(1) + "[[models.m.price_tiers]]",
            [
                "models.m.price_tiers[1].input_usd_per_mtok: required, and missing",
                "models.m.price_tiers[1].output_usd_per_mtok: required, and missing",
                "models.m.price_tiers[1].above_prompt_tokens: required, and missing",
            ],
        ),
        (SERVICE.format("default"), ["models.m.service_tiers.default: this tier always has the model's own prices"]),
        (SERVICE.format("flex") + "x = 1", ["models.m.service_tiers.flex.x: unknown key"]),
        ('markup = "0.00"', ['models.m.markup: expected a decimal string above zero, as "1.05"']),
        ('markup = "-1"', ['models.m.markup: expected a decimal string above zero, as "1.05"']),
        ("markup = 1.05", ['models.m.markup: expected a decimal string above zero, as "1.05"']),
        ('cost_from = "usage"', ["models.m.cost_from: invalid enum value 'usage', expected prices or usage.cost"]),
        ('request_usd = "-1"', ['models.m.request_usd: expected a decimal string in USD, as "2.50"']),
        ("field_usd = { plugins = 1 }", ['models.m.field_usd.plugins: expected a decimal string in USD, as "2.50"']),
    ],
)
def test_what_no_tier_fee_or_markup_can_be(more, expected):
    assert faults(model(more)) == expected


@pytest.mark.parametrize(
    "server, url, is_doubted",
    [
        ("", "https://a.example/v1", False),
        ("", "http://127.0.0.1:8080/v1", True),
        ("", "http://localhost:8081", True),
        ("listen = ':80'\n", "http://[::1]:80", True),
        ("listen = '10.0.0.1:80'\n", "http://127.0.0.1:80", False),
        ("", "http://10.0.0.1:8080", False),
        ("", "https://a.example/v1/v1", True),
        ("", "https://a.example/v1/chat", True),
        ("", "http://api.openai.com/v1", True),
        ("", "http://a.example:443/v1", True),
    ],
)
def test_which_base_urls_are_doubted(server, url, is_doubted):
    text = f"[server]\n{server}{PROVIDER.replace('http://a', url, 1)}"
    doubts = [told.partition(": ")[0] for told in likely_mistakes(parse(text), tomllib.loads(text))]
    assert ("upstreams.a.base_url" in doubts) == is_doubted


CHEAP = SERVICE.format("flex").replace('"1"', '"0.0000025"', 1)


@pytest.mark.parametrize(
    "more, expected",
    [
        ('cost_from = "usage.cost"', []),
        ('cost_from = "usage.cost"\nmarkup = "1.05"', []),
        ('markup = "1.05"', ["models.m.markup"]),
        ('cached_input_usd_per_mtok = "1.01"', ["models.m.cached_input_usd_per_mtok"]),
        ('reasoning_usd_per_mtok = "10001"', ["models.m.reasoning_usd_per_mtok"]),
        (CHEAP, ["models.m.service_tiers.flex.input_usd_per_mtok"]),
        (TIER.format(1).replace('"1"', '"0.0000025"', 1), ["models.m.price_tiers[0].input_usd_per_mtok"]),
    ],
)
def test_which_prices_are_doubted(more, expected):
    text = model(more)
    assert [doubt.partition(": ")[0] for doubt in likely_mistakes(parse(text), tomllib.loads(text))] == expected


def test_a_hold_of_nothing_is_doubted():
    text = model('cost_from = "usage.cost"').replace('output_usd_per_mtok = "1"', 'output_usd_per_mtok = "0"')
    (doubt,) = likely_mistakes(parse(text), tomllib.loads(text))
    assert doubt.startswith("models.m.output_usd_per_mtok: ")


EDGE = "metrics.buckets.meshproxy_overhead_seconds"


@pytest.mark.parametrize(
    "edges, expected",
    [
        ("[]", [f"{EDGE}: expected a list of length >= 1"]),
        ("[0]", [f"{EDGE}[0]: expected float > 0.0"]),
        ("[1, inf]", [f"{EDGE}[1]: expected float <= 86400.0"]),
        ("[1, nan]", [f"{EDGE}[1]: expected float > 0.0"]),
        ("[2, 1]", [f"{EDGE}: each edge must be more than the one before it"]),
        ("[1, 1.0]", [f"{EDGE}: each edge must be more than the one before it"]),
        (str([*range(1, 52)]), [f"{EDGE}: expected a list of length <= 50"]),
    ],
)
def test_what_no_histogram_can_have(edges, expected):
    assert faults(f"{EDGE} = {edges}") == expected


def test_a_histogram_that_is_none():
    expected = [
        "metrics.buckets.meshproxy_overhed_seconds: unknown key, did you mean meshproxy_overhead_seconds?",
        "metrics.buckets.meshproxy_requests_total: unknown key",
    ]
    text = "[metrics.buckets]\nmeshproxy_overhed_seconds = [1]\nmeshproxy_requests_total = [1]"
    assert [
        fault.replace(", did you mean meshproxy_request_duration_seconds?", "") for fault in faults(text)
    ] == expected


def test_every_fault_is_told_at_once():
    text = """
    zzz = 1
    [server]
    listen = "nowhere"
    heartbeat_s = "15"
    trusted_proxies = ["x", 1]
    [redis]
    url = "http://a"
    on_failure = "locla"
    [defaults]
    model = "openai/gpt4o"
    [upstreams.openai]
    kind = "openai"
    base_url = "nope"
    api_key = { env = "A", file = "B" }
    [models."openai/gpt-4o"]
    upstreams = [{ upstream = "opnai", model = "x" }, { upstream = "openai" }]
    context_window = 10
    max_output_tokens = 20
    input_usd_per_mtok = 1.5
    """
    expected = [
        "zzz: unknown key",
        "server.listen: 'nowhere' is not HOST:PORT",
        "server.heartbeat_s: expected float, got str",
        "server.trusted_proxies[0]: 'x' is not a network such as 10.0.0.0/8",
        "server.trusted_proxies[1]: expected str, got int",
        "redis.url: expected a URL with one of redis://, rediss://, unix://, redis+sentinel://, redis+cluster://, or embedded",
        "redis.on_failure: invalid enum value 'locla', expected deny or local",
        "upstreams.openai.base_url: expected an http or https URL without user, query and fragment",
        'upstreams.openai.api_key: use either { env = "NAME" } or { file = "/path" }',
        'models."openai/gpt-4o".upstreams[1].model: required, and missing',
        'models."openai/gpt-4o".input_usd_per_mtok: expected a decimal string in USD, as "2.50"',
        'models."openai/gpt-4o".output_usd_per_mtok: required, and missing',
        'models."openai/gpt-4o".upstreams[0].upstream: no upstream is named opnai, did you mean openai?',
        'models."openai/gpt-4o".max_output_tokens: 20 is more than context_window, 10',
        "defaults.model: no model is named openai/gpt4o, did you mean openai/gpt-4o?",
    ]
    assert faults(text) == expected


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
NAMES = sorted({name for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
                for name in kind.__struct_fields__})  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(NAMES), json_like | st.dictionaries(st.sampled_from(NAMES), json_like, max_size=3), max_size=3
    )
)
def test_any_table_is_settings_or_faults(table):
    with patch.object(tomllib, "loads", lambda _: table):
        found = decode("")
    assert found.faults or msgspec.convert(table, config.Settings) == found.settings


@pytest.mark.parametrize(
    "address, expected",
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("localhost:0", ("localhost", 0)),
        (":8080", ("", 8080)),
        ("[::1]:8080", ("::1", 8080)),
        ("[0::0001]:1", ("::1", 1)),
    ],
)
def test_split_address(address, expected):
    assert split_address(address) == expected


@pytest.mark.parametrize(
    "address", ["", "a", "a:", "a:b", "a:-1", "a:65536", "a:\u0663", "::1:1", "[a]:1", "a b:1", "[::1]", "a/b:1"]
)
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match=re.escape(repr(address))):
        split_address(address)


def secrets(text, env=None, files=None):
    def read_file(path):
        content = (files or {})[path]
        if isinstance(content, Exception):
            raise content
        return content

    reader = SecretReader(env or {}, read_file)
    found = reader.secrets(parse(text))
    if reader.faults:
        raise ConfigError(reader.faults)
    return found


ENV, FILE = provider('api_key = { env = "KEY" }'), provider('api_key = { file = "/key" }')


def test_secrets_come_from_the_environment_and_from_files():
    two = (
        ENV
        + '\n[upstreams.b]\nkind = "openai"\nbase_url = "http://b"\napi_key = { file = "/b" }\n'
        + ('[upstreams.c]\nkind = "openai"\nbase_url = "http://c"\n')
    )
    assert Secrets({"a": "sk-1", "b": "sk-2"}) == secrets(two, {"KEY": "sk-1"}, {"/b": " sk-2\n"})


BAD = "upstreams.a.api_key: the secret is empty or has characters that a header can't carry"


@pytest.mark.parametrize(
    "text, env, files, expected",
    [
        (ENV, {}, {}, "upstreams.a.api_key: the environment variable KEY is not set"),
        (ENV, {"KEY": ""}, {}, BAD),
        (ENV, {"KEY": " \n"}, {}, BAD),
        (ENV, {"KEY": "sk-hunter2\r\nx: y"}, {}, BAD),
        (ENV, {"KEY": "sk-hunter2é"}, {}, BAD),
        (FILE, {}, {"/key": "sk-hunter2\x00"}, BAD),
        (
            FILE,
            {},
            {"/key": FileNotFoundError(2, "No such file")},
            "upstreams.a.api_key: /key can't be read (No such file)",
        ),
    ],
)
def test_secrets_that_cannot_be_had(text, env, files, expected):
    with pytest.raises(ConfigError) as caught:
        secrets(text, env, files)
    assert caught.value.faults == [expected]


def test_every_missing_secret_is_told_at_once():
    two = ENV + '\n[upstreams."b/c"]\nkind = "openai"\nbase_url = "http://b"\napi_key = { env = "OTHER" }\n'
    with pytest.raises(ConfigError) as caught:
        secrets(two)
    expected = [
        "upstreams.a.api_key: the environment variable KEY is not set",
        'upstreams."b/c".api_key: the environment variable OTHER is not set',
    ]
    assert caught.value.faults == expected


def test_the_example_says_every_default():
    settings = parse(EXAMPLE.read_text())
    stripped = msgspec.structs.replace(settings, upstreams={}, models={})
    assert config.Settings() == stripped


SECTIONS = [
    ("server", config.Server),
    ("log", config.Log),
    ("stream", config.Stream),
    ("redis", config.Redis),
    ("defaults", config.Defaults),
    ("credits", config.Credits),
    ("limits", config.RateLimits),
    ("idempotency", config.Idempotency),
    ("metrics.buckets", config.Buckets),
    ("tracing", config.Tracing),
    ("upstreams.openai", config.Upstream),
    ('models."openai/gpt-4o"', config.Model),
]
PRICED = [
    ('[models."openai/gpt-4o".service_tiers.priority]', config.ServiceTier),
    ('[[models."google/gemini-2.5-pro".price_tiers]]', config.PriceTier),
]


@pytest.mark.parametrize("section, kind", PRICED)
def test_the_example_shows_what_a_tier_has_beside_the_model_s_prices(section, kind):
    text = re.split(r"^\[", EXAMPLE.read_text().partition(f"\n{section}")[2], maxsplit=1, flags=re.MULTILINE)[0]
    mentioned = set(re.findall(r"^(?:# )?(\w+) = ", text, re.MULTILINE))
    assert mentioned <= set(kind.__struct_fields__)
    assert set(kind.__struct_fields__) - set(config.Model.__struct_fields__) <= mentioned


@pytest.mark.parametrize("section, kind", SECTIONS)
def test_the_example_mentions_every_key_of_a_section(section, kind):
    text = re.split(r"^\[", EXAMPLE.read_text().partition(f"\n[{section}]")[2], maxsplit=1, flags=re.MULTILINE)[0]
    mentioned = re.findall(r"^(?:# )?(\w+) = ", text, re.MULTILINE)
    assert sorted(kind.__struct_fields__) == sorted(mentioned)


@pytest.mark.parametrize("kind", [config.Route, config.Secret])
def test_the_example_mentions_every_key_of_an_inline_table(kind):
    mentioned = set(re.findall(r"[{,] (\w+) = ", EXAMPLE.read_text()))
    assert set(kind.__struct_fields__) <= mentioned


def test_the_example_covers_every_section():
    sections = {name.split(".")[0] for name, _ in SECTIONS}
    assert sorted(config.Settings.__struct_fields__) == sorted(sections)


def test_what_the_example_comments_out_is_the_default_too():
    upstreams = EXAMPLE.read_text().partition("[upstreams.openai]")[2].partition("[models.")[0]
    lines = re.findall(r"^# (\w+ = \S+)", upstreams, re.MULTILINE)
    plain = config.Upstream(kind="openai", base_url="http://a")
    assert parse(provider("\n".join(lines))).upstreams["a"] == plain
    assert lines == [line for line in lines if tomllib.loads(line)]


TOKEN = '[server]\nadmin_token = { env = "TOKEN" }\n'


def test_the_admin_token_is_a_secret_like_others():
    assert Secrets({}, "t0ken") == secrets(TOKEN, {"TOKEN": " t0ken\n"})
    with pytest.raises(ConfigError) as caught:
        secrets(TOKEN + ENV)
    expected = [
        "upstreams.a.api_key: the environment variable KEY is not set",
        "server.admin_token: the environment variable TOKEN is not set",
    ]
    assert caught.value.faults == expected


def test_secrets_are_not_shown():
    assert "hunter2" not in repr(Secrets({"a": "hunter2"}, "hunter2"))
