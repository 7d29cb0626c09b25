import pytest
from multidict import CIMultiDict

from meshproxy.server.client_address import TrustedProxies, address

PROXIES = ["127.0.0.0/8", "10.0.0.0/8", "2001:db8:ffff::/48"]


def client(peer, *headers):
    return TrustedProxies(PROXIES).client_of(peer, CIMultiDict(headers))


def forwarded_for(peer, *lines):
    return client(peer, *(("X-Forwarded-For", line) for line in lines))


def forwarded(peer, *lines):
    return client(peer, *(("Forwarded", line) for line in lines))


@pytest.mark.parametrize(
    "peer, lines, expected",
    [
        ("203.0.113.7", [], "203.0.113.7"),
        ("203.0.113.7", ["198.51.100.1"], "203.0.113.7"),  # a stranger's word
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),  # what a client wrote before the proxy appended
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6", "198.51.100.1", "10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.1, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["", " , "], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8::9]:4711"], "2001:db8::9"),
        ("10.0.0.1", ["2001:DB8:0::9"], "2001:db8::9"),
        ("::ffff:10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("2001:db8:ffff::1", ["2001:db8::9"], "2001:db8::9"),
        ("fe80::1%eth0", [], "fe80::1"),
        (None, ["198.51.100.1"], "198.51.100.1"),  # a unix socket
        ("", ["198.51.100.1"], "198.51.100.1"),
        ("/run/client.sock", ["198.51.100.1"], "198.51.100.1"),
        (None, [], None),
    ],
)
def test_x_forwarded_for(peer, lines, expected):
    assert forwarded_for(peer, *lines) == expected


@pytest.mark.parametrize(
    "line, expected",
    [
        ("for=198.51.100.1", "198.51.100.1"),
        ('For="198.51.100.1:4711"', "198.51.100.1"),
        ('for="[2001:db8::9]:4711";proto=https', "2001:db8::9"),
        ("proto=https; by=10.0.0.1; FOR=198.51.100.1", "198.51.100.1"),
        ("for=6.6.6.6, for=198.51.100.1;by=10.0.0.9, for=10.0.0.2", "198.51.100.1"),
        ("for=6.6.6.6, for=_hidden", "10.0.0.1"),
        ("for=unknown", "10.0.0.1"),
        ("proto=https", "10.0.0.1"),
        ("xfor=198.51.100.1", "10.0.0.1"),
        ('for="', "10.0.0.1"),
    ],
)
def test_forwarded(line, expected):
    assert forwarded("10.0.0.1", line) == expected


def test_a_stranger_s_forwarded_is_not_believed():
    assert forwarded("203.0.113.7", "for=198.51.100.1") == "203.0.113.7"


def test_where_the_two_differ_neither_is_believed():
    both = [("Forwarded", "for=6.6.6.6"), ("X-Forwarded-For", "198.51.100.1")]
    assert client("10.0.0.1", *both) == "10.0.0.1"
    agreed = [("Forwarded", "for=198.51.100.1"), ("X-Forwarded-For", "198.51.100.1")]
    assert client("10.0.0.1", *agreed) == "198.51.100.1"


def test_only_the_nearest_hops_are_looked_at():
    assert forwarded_for("10.0.0.1", ", ".join(["198.51.100.1"] + ["10.0.0.2"] * 40)) == "10.0.0.2"


@pytest.mark.parametrize(
    "text", ["", "x", "1.2.3", "1.2.3.4.5", "[", "[]", "[1.2.3.4", "1.2.3.4:", "::1::", "0x7f.1", "\u0661.1.1.1"]
)
def test_what_is_no_address(text):
    assert text == "[1.2.3.4" or address(text) is None
