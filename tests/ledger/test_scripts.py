"""Scripts are whole before Redis sees them, and called by the SHA-1 that Redis computes."""

import hashlib
import re
from pathlib import Path

import pytest

from meshproxy.ledger import store
from meshproxy.ledger.store import Script, expand


def test_an_include_is_replaced_by_its_text():
    texts = {"shared": "local function double(n) return n * 2 end\n"}
    text = "-- include: shared\nreturn double(2)\n"
    assert expand(text, texts.__getitem__) == "local function double(n) return n * 2 end\nreturn double(2)\n"


@pytest.mark.parametrize("line", ["x = 1 -- include: b", "  -- include: b", "-- include: ../b", "--include: b"])
def test_only_a_whole_line_is_an_include(line):
    assert expand(line, {}.__getitem__) == line


def test_backslashes_of_an_included_text_stay():
    assert expand("-- include: b", {"b": r"s = '\1\n'"}.__getitem__) == r"s = '\1\n'"


def test_what_is_included_includes_nothing():
    """Else it would go to Redis as a comment."""
    folder = Path(store.__file__).parent / "scripts"
    included = {name for path in folder.glob("*.lua") for name in re.findall("-- include: (.*)", path.read_text())}
    assert {"bucket", "clock"} <= included
    assert [name for name in included if "-- include" in (folder / f"{name}.lua").read_text()] == []


def test_the_sha_is_the_one_of_the_whole_text():
    script = Script.of("one", "return 1")
    assert script.sha == hashlib.sha1(b"return 1").hexdigest()
    assert script.name == "one"


def test_a_missing_script_is_told_by_name():
    with pytest.raises(FileNotFoundError, match=r"no_such_script\.lua"):
        Script.load("no_such_script")
