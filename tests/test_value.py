"""The options of a record hold, however its module was built."""

import ast
import importlib
from pathlib import Path

import meshproxy

PACKAGE = Path(meshproxy.__file__).parent


def _options():
    """Each class with options in the package: its module, its name, the options as they are written."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(["meshproxy", *path.relative_to(PACKAGE).with_suffix("").parts])
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                written = {option.arg: ast.literal_eval(option.value) for option in node.keywords}
                written.pop("kw_only", None)  # no part of what a class says of itself
                if written:
                    yield module, node.name, written


def test_every_option_that_is_written_holds():
    expected = [(module, name, options) for module, name, options in _options()]
    actual = [
        (module, name, {option: getattr(_config(module, name), option) for option in options})
        for module, name, options in expected
    ]

    assert expected == actual
    assert len(expected) > 40


def _config(module, name):
    return getattr(importlib.import_module(module), name).__struct_config__
