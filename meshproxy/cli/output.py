"""How results look: JSON, one document a line, or aligned text. The one place in the commands that prints.

Times are RFC 3339 in UTC and amounts decimal strings in both.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
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

    def told(self, document: Any, text: str) -> None:
        """One JSON document on one line, or the same in words; at once, for commands that go on for long."""
        print(_json(document) if self.as_json else text, flush=True)

    def record(self, record: Mapping[str, Any], *, note: str = "") -> None:
        """One thing. In text a nested table's names are joined (`limits.burst`), and `note` follows."""
        flat = list(_flat(record))
        width = max(len(name) for name, _ in flat)
        lines = [f"{name:<{width}}  {_text(value)}" for name, value in flat]
        self.told(record, "\n".join([*lines, "", note] if note else lines))

    def rows(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str) -> None:
        """Many things: in JSON all they have, in text the named columns."""
        self.told(rows, "\n".join(table(rows, columns)) if rows else empty)

    def failed(self, code: str, message: str, details: Sequence[Detail] = ()) -> None:
        """Why the command failed, on stderr, with each thing that is wrong on its own line."""
        error: dict[str, Any] = {"message": message, "code": code}
        if details:
            error["details"] = [asdict(detail) for detail in details]
        faults = [f"  {'.'.join(map(str, detail.loc[1:]))}: {detail.msg}" for detail in details]
        self._error(error, [f"meshproxy: {message}", *(faults if len(faults) > 1 else ())])

    def warned(self, warnings: Iterable[str]) -> None:
        """What is likely a mistake, on stderr, one a line; in JSON it is a part of the result."""
        if not self.as_json:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr)

    def unfit(self, faults: Sequence[str]) -> None:
        """Every fault of a configuration, on stderr, one a line."""
        message = f"the configuration has {len(faults)} fault{'s' if len(faults) > 1 else ''}"
        self._error({"message": message, "code": "unfit_configuration", "faults": list(faults)}, faults)

    def _error(self, error: Mapping[str, Any], lines: Iterable[str]) -> None:
        print(_json({"error": error}) if self.as_json else "\n".join(lines), file=sys.stderr)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """The named columns in aligned lines under a head; one of numbers is aligned right."""
    aligned = []
    for column in columns:
        cells = [_text(row.get(column)) for row in rows]
        width = max(map(len, [column, *cells]))
        align = str.rjust if all(map(_is_number, cells)) else str.ljust
        aligned.append([align(cell, width) for cell in [column, *cells]])
    return ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_number(cell: str) -> bool:
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
            text = "-"
        case bool():
            text = "yes" if value else "no"
        case list() if all(isinstance(item, str) for item in value):
            text = ", ".join(value)
        case list() | dict():
            text = _json(value)
        case _:
            text = str(value)
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
