"""Scripts are whole before Redis sees them, and called by the SHA-1 that Redis computes."""

import hashlib

import pytest

from meshproxy.ledger.scripts import Script, expand


def test_an_include_is_replaced_by_its_text():
    texts = {"main": "-- include: shared\nreturn double(2)\n", "shared": "local function double(n) return n * 2 end\n"}
    assert expand("main", texts.__getitem__) == "local function double(n) return n * 2 end\nreturn double(2)\n"


def test_includes_may_include():
    texts = {"a": "-- include: b\n", "b": "-- include: c\nb\n", "c": "c\n"}
    assert expand("a", texts.__getitem__) == "c\nb\n"


@pytest.mark.parametrize("line", ["x = 1 -- include: b", "  -- include: b", "-- include: ../b", "--include: b"])
def test_only_a_whole_line_is_an_include(line):
    assert expand("a", {"a": line}.__getitem__) == line


def test_backslashes_of_an_included_text_stay():
    assert expand("a", {"a": "-- include: b", "b": r"s = '\1\n'"}.__getitem__) == r"s = '\1\n'"


def test_a_circle_is_an_error():
    with pytest.raises(ValueError, match="in a circle"):
        expand("a", {"a": "-- include: a"}.__getitem__)


def test_the_sha_is_the_one_of_the_whole_text():
    script = Script.of("one", "return 1")
    assert script.sha == hashlib.sha1(b"return 1").hexdigest()
    assert script.name == "one"


def test_a_missing_script_is_told_by_name():
    with pytest.raises(FileNotFoundError, match=r"no_such_script\.lua"):
        Script.load("no_such_script")
