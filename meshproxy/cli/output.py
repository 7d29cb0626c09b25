"""How results look: JSON, one document a line, or aligned text. The one place in the commands that prints.

Times are RFC 3339 in UTC and amounts decimal strings in both.
"""

import importlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any

from msgspec.structs import asdict

from meshproxy.errors import Detail


class Failed(Exception):
    """A command could not do what it was asked; `code` is for machines, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Misused(Exception):
    """The arguments contradict each other in a way that argparse can't see."""


class Output:
    """Where a command's result goes."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def record(self, record: Mapping[str, Any], *, note: str = "") -> None:
        """One thing. In text a nested table's names are joined (`limits.burst`), and `note` follows."""
        if self.as_json:
            self.document(record)
            return
        flat = list(_flat(record))
        width = max(len(name) for name, _ in flat)
        for name, value in flat:
            print(f"{name:<{width}}  {_text(value)}".rstrip())
        if note:
            print(f"\n{note}")

    def rows(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str = "nothing") -> None:
        """Many things: in JSON all they have, in text the named columns."""
        if self.as_json:
            self.document(rows)
        elif not rows:
            print(empty)
        elif sys.stdout.isatty() and find_spec("rich") is not None:
            importlib.import_module("meshproxy.cli.rich_table").show(columns, cells(rows, columns))
        else:
            for line in table(columns, cells(rows, columns)):
                print(line)

    def document(self, value: Any) -> None:
        """One JSON document on one line."""
        print(json.dumps(value, ensure_ascii=False))

    def line(self, text: str) -> None:
        """A line for people; nothing with --json."""
        if not self.as_json:
            print(text)

    def flush(self) -> None:
        """Let out what was printed, before a command goes on for long."""
        sys.stdout.flush()

    def failed(self, code: str, message: str, details: Sequence[Detail] = ()) -> None:
        """Why the command failed, on stderr, with each thing that is wrong on its own line."""
        error: dict[str, Any] = {"message": message, "code": code}
        if details:
            error["details"] = [asdict(detail) for detail in details]
        faults = [f"  {'.'.join(map(str, detail.loc[1:]))}: {detail.msg}" for detail in details]
        self._error(error, [f"meshproxy: {message}", *(faults if len(faults) > 1 else ())])

    def unfit(self, faults: Sequence[str]) -> None:
        """Every fault of a configuration, on stderr, one a line."""
        message = f"the configuration has {len(faults)} fault{'s' if len(faults) > 1 else ''}"
        self._error({"message": message, "code": "unfit_configuration", "faults": list(faults)}, faults)

    def _error(self, error: Mapping[str, Any], lines: Iterable[str]) -> None:
        for line in [json.dumps({"error": error}, ensure_ascii=False)] if self.as_json else lines:
            print(line, file=sys.stderr)


def rfc3339(moment: float | None) -> str | None:
    """`2026-11-24T09:00:00Z` of Unix seconds."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    """The text of each named column of each row."""
    return [[_text(row.get(column)) for column in columns] for row in rows]


def table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines under a head; a column of numbers is aligned right."""
    lines = [list(columns), *body]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    numeric = [bool(body) and all(is_number(line[index]) for line in body) for index in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]


def is_number(cell: str) -> bool:
    """Whether a cell reads as a number, or is empty among numbers."""
    return cell == "-" or cell.removeprefix("-").replace(".", "", 1).isdigit()


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: Any) -> str:
    """One cell. Control characters are escaped: names come from users, and a terminal obeys what it is sent."""
    match value:
        case None | "" | [] | {}:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() if all(isinstance(item, str) for item in value):
            return _printable(", ".join(value))
        case list() | dict():
            return _printable(json.dumps(value, ensure_ascii=False))
        case _:
            return _printable(str(value))


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
