"""How faults name keys: where one stands in the file, and which right one is nearest to a wrong one."""

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_KEY = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
_HEADER = re.compile(rf"[ \t]*(\[\[?[ \t]*{_DOTTED}[ \t]*\]?\])[ \t]*(?:#.*)?")
_LONG_QUOTE = re.compile(r"\"\"\"|'''")


def under(path: str, key: str) -> str:
    """The path of a key in the table at `path`, quoted where TOML would quote it."""
    name = key if _BARE_KEY.fullmatch(key) else json.dumps(key)
    return f"{path}.{name}" if path else name


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean NAME?`, or nothing if no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def lines_of(text: str) -> dict[str, int]:
    """The line on which each table, key and listed inline table of a TOML text begins, by its path.

    It reads line by line, and knows nothing of what stands inside an inline table: for that, `line_of` gives the line of the
    nearest key around it.
    """
    lines: dict[str, int] = {}
    seen: Counter[str] = Counter()
    table = key = ""
    quote: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if quote is None:
            if header := _HEADER.fullmatch(line):
                table = _path(header[1])
                if header[1].startswith("[["):
                    seen[table] += 1
                    table = f"{table}[{seen[table] - 1}]"
                lines.setdefault(table, number)
            elif found := _KEY.match(line):
                key = f"{table}.{_path(f'{found[1]} = 0')}".removeprefix(".")
                lines.setdefault(key, number)
            elif line.lstrip().startswith("{"):
                lines.setdefault(f"{key}[{seen[key]}]", number)
                seen[key] += 1
        for mark in _LONG_QUOTE.findall(line):
            quote = mark if quote is None else None if mark == quote else quote
    return lines


def line_of(fault: str, lines: Mapping[str, int]) -> int | None:
    """The line that a fault, which begins with its path, is about; None if nothing of that path is in the file."""
    near = [path for path in lines if fault.startswith(path) and fault[len(path) :][:1] in {":", ".", "["}]
    return lines[max(near, key=len)] if near else None


def _path(toml: str) -> str:
    """The path of the only key in one line of TOML, however it is quoted."""
    path, value = "", tomllib.loads(toml)
    while isinstance(value, dict) and value:
        ((key, inner),) = value.items()
        path = under(path, key)
        value = _only(inner)
    return path


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value
