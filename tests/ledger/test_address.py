"""Every kind of URL, and what is wrong with one without saying what was in it."""

import pytest

from meshproxy.config import ConfigError
from meshproxy.ledger.store import Endpoint, Login, RedisAddress, Tls, parse_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://127.0.0.1:6379/0", RedisAddress("server", (Endpoint("127.0.0.1", 6379),))),
        ("redis://cache", RedisAddress("server", (Endpoint("cache", 6379),))),
        ("redis://[::1]:7000/2", RedisAddress("server", (Endpoint("::1", 7000),), Login(db=2))),
        ("redis://u:p%40ss%2F@h/1", RedisAddress("server", (Endpoint("h", 6379),), Login("u", "p@ss/", 1))),
        ("redis://:secret@h?db=4", RedisAddress("server", (Endpoint("h", 6379),), Login(None, "secret", 4))),
        ("rediss://h?ca_file=/ca.pem", RedisAddress("server", (Endpoint("h", 6379),), tls=Tls("/ca.pem"))),
        ("unix:///run/redis.sock?db=3", RedisAddress("server", (Endpoint(path="/run/redis.sock"),), Login(db=3))),
        ("unix://:pw@/run/redis.sock", RedisAddress("server", (Endpoint(path="/run/redis.sock"),), Login(None, "pw"))),
        (
            "redis+sentinel://a,b:7000/mymaster/2",
            RedisAddress("sentinel", (Endpoint("a", 26379), Endpoint("b", 7000)), Login(db=2), service="mymaster"),
        ),
        (
            "redis+cluster://:pw@a,b:7001?tls=1",
            RedisAddress("cluster", (Endpoint("a", 6379), Endpoint("b", 7001)), Login(None, "pw"), Tls()),
        ),
    ],
)
def test_urls(url, expected):
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("embedded", "scheme"),
        ("http://h", "scheme"),
        ("redis://", "host and port"),
        ("redis://:hunter2/x@h", "host and port"),
        ("redis://h:hunter2", "host and port"),
        ("redis://h:99999", "host and port"),
        ("redis://h:0", "host and port"),
        ("redis://[::1]:00", "host and port"),
        ("redis://:hunter2#x@h", "host and port"),
        ("redis://:hunter2[x@h", "host and port"),
        ("redis+cluster://:hunter2\u2100@a,b", "host and port"),
        ("redis://a,b", "one server"),
        ("redis://h/zero", "database is a number"),
        ("redis://h/-1", "database is a number"),
        ("redis://h/9999999999", "database is a number"),
        ("redis://h/1?db=3", "different databases"),
        ("redis://h?db=1&db=2", "twice"),
        ("redis+cluster://h?tls=maybe", "tls is one of"),
        ("rediss://h?tls=0", "contradict"),
        ("unix:///h?tls=1", "contradict"),
        ("redis://127.0.0.256", "host and port"),
        ("redis://h?hunter2=1", "unknown option"),
        ("unix://relative.sock", "absolute path"),
        ("unix:///", "absolute path"),
        ("redis+sentinel://h", "name of the master"),
        ("redis+cluster://h/1", "no database but 0"),
    ],
)
def test_what_is_wrong_is_told_without_the_url(url, fault):
    with pytest.raises(ConfigError, match=fault) as caught:
        parse_url(url)
    assert caught.value.faults[0].startswith("redis.url: ")
    assert "hunter2" not in str(caught.value)


def test_an_address_never_shows_its_login():
    assert "hunter2" not in repr(parse_url("redis://bob:hunter2@h"))
    assert "bob" not in repr(parse_url("redis://bob:hunter2@h"))


def test_endpoints_are_named_as_one_would_type_them():
    assert [str(e) for e in (Endpoint("h", 1), Endpoint("::1", 2), Endpoint(path="/s"))] == ["h:1", "[::1]:2", "/s"]


@pytest.mark.parametrize(
    "spellings",
    [
        ("redis://127.0.0.1", "redis://:secret@localhost:6379/0", "rediss://u:p@[::1]/?db=0", "redis://LOCALHOST."),
        ("redis://Redis.example:6379/2", "redis://:x@redis.example/2"),
        ("redis+cluster://a:1,b:2", "redis+cluster://:x@b:2,a:1"),
        ("redis+sentinel://a,b/mymaster", "redis+sentinel://:x@b:26379,a/mymaster/0"),
        ("unix:///run/redis.sock", "unix://:x@/run/redis.sock?db=0"),
    ],
)
def test_one_redis_has_one_canonical_address(spellings):
    assert len({parse_url(url).canonical for url in spellings}) == 1


def test_other_redises_have_others():
    urls = ("redis://a", "redis://a/1", "redis://b", "redis://a:1", "redis+cluster://a", "unix:///a", "unix:///b")
    assert len({parse_url(url).canonical for url in urls}) == len(urls)


def test_a_canonical_address_has_no_credentials():
    assert "secret" not in parse_url("redis://user:secret@host").canonical
