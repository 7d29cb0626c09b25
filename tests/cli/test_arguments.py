import argparse
import time

import pytest

from meshproxy.cli import arguments


@pytest.mark.parametrize(
    "parse, text, expected",
    [
        (arguments.nusd, "25.00", 25_000_000_000),
        (arguments.nusd, "$0.000000001", 1),
        (arguments.signed_nusd, "-1.5", -1_500_000_000),
        (arguments.count, "600", 600),
        (arguments.port, "0", 0),
        (arguments.port, "65535", 65535),
        (arguments.names, "a/b, c", ["a/b", "c"]),
        (arguments.param, "temperature=0.2", ("temperature", 0.2)),
        (arguments.param, 'stop=["a=b"]', ("stop", ["a=b"])),
        (arguments.variable, "name=a=b", ("name", "a=b")),
        (arguments.variable, "name=", ("name", "")),
        (arguments.past, "1970-01-01T00:01:00Z", 60),
        (arguments.past, "1970-01-01T01:00:00+01:00", 0),
        (arguments.past, "1970-01-02", 86_400),
    ],
)
def test_good_values(parse, text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "parse, text, words",
    [
        (arguments.nusd, "-1", "negative"),
        (arguments.nusd, "1e3", "decimal amount"),
        (arguments.nusd, "0.0000000001", "at most 9 decimals"),
        (arguments.nusd, "99999999", "more than"),
        (arguments.count, "0", "not a whole number from 1"),
        (arguments.count, "-3", "not a whole number from 1"),
        (arguments.count, "1.5", "not a whole number from 1"),
        (arguments.count, "9007199254740992", "not a whole number from 1"),
        (arguments.count, "٣", "not a whole number from 1"),
        (arguments.count, "9" * 5000, "not a whole number from 1"),
        (arguments.minutes, "0", "not a whole number from 1 to 1440"),
        (arguments.minutes, "1441", "not a whole number from 1 to 1440"),
        (arguments.port, "65536", "not a whole number from 0 to 65535"),
        (arguments.port, "http", "not a whole number from 0 to 65535"),
        (arguments.names, "a,,b", "empty name"),
        (arguments.names, "", "empty name"),
        (arguments.param, "temperature", "NAME=VALUE"),
        (arguments.param, "user=me", "needs its quotes"),
        (arguments.param, "temperature=NaN", "not JSON"),
        (arguments.variable, "na-me=x", "NAME=VALUE"),
        (arguments.past, "yesterday", "neither a time"),
        (arguments.past, "2026-11-24T09:00:00", "needs its time zone"),
        (arguments.future, "2020-01-01T00:00:00Z", "not in the future"),
        (arguments.future, "0d", "not in the future"),
        (arguments.future, "999999w", "not between 1970 and 9999"),
        (arguments.past, "1969-12-31", "not between 1970 and 9999"),
    ],
)
def test_bad_values_are_told_plainly(parse, text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        parse(text)


def test_durations_count_from_now():
    now = time.time()
    assert arguments.future("30d") - now == pytest.approx(30 * 86_400, abs=5)
    assert now - arguments.past("90m") == pytest.approx(5400, abs=5)
