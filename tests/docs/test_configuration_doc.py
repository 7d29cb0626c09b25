import importlib.util
from pathlib import Path

import msgspec
import pytest

from meshproxy import config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("configuration_doc", ROOT / "scripts" / "configuration_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_settings_say(script):
    written = script.PAGE.read_text(encoding="utf-8")
    assert script.page(script.EXAMPLE.read_text(encoding="utf-8")) == written, "run `make docs`"


def test_every_section_is_there(script):
    assert set(config.Settings.__struct_fields__) == {name.split(".")[0] for name in script.SECTIONS}


def test_every_key_is_told_in_words_or_by_its_section(script):
    rows = [line for line in script.page(script.EXAMPLE.read_text(encoding="utf-8")).splitlines() if "| `" in line]
    wordless = [row.split("`")[1] for row in rows if row.endswith("|  |")]
    assert set(wordless) <= set(config.Buckets.__struct_fields__)
    without_buckets = sum(len(msgspec.structs.fields(kind)) for kind in script.SECTIONS.values()) - 1
    assert len(rows) == without_buckets
