"""TOML text to settings, in one walk of the table beside the types, so that no fault hides another."""

import tomllib
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from meshproxy.config.contradictions import contradictions, likely_mistakes
from meshproxy.config.names import lines_of, nearest, under
from meshproxy.config.settings import Secret, Settings

INSTEAD_OF_TEXT = 'a secret is not written here: say { env = "NAME" } or { file = "/path" }'


class Unfit(Exception):
    """A configuration that can't be used. `faults`: every one, each a sentence that begins with its path."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Decoded(Struct, frozen=True):
    """What a TOML text says. `settings` have None where a value is at fault; `warnings`: what is likely a mistake; `lines`: on
    which line each key stands. Faults and warnings are sentences that begin with a path.
    """

    settings: Settings
    faults: list[str]
    warnings: list[str]
    lines: dict[str, int]


def parse(text: str) -> Settings:
    """The settings of a TOML text; Unfit with every fault in it."""
    decoded = decode(text)
    if decoded.faults:
        raise Unfit(decoded.faults)
    return decoded.settings


def decode(text: str) -> Decoded:
    """The settings of a TOML text with every fault in it; Unfit if it is no TOML."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unfit([f"not TOML: {error}"]) from error
    except RecursionError as error:
        raise Unfit(["not TOML: nested too deeply"]) from error
    faults: list[str] = []
    settings: Settings = _struct(table, Settings, "", faults)
    faults.extend(contradictions(settings))
    return Decoded(settings, faults, list(likely_mistakes(settings, table)), lines_of(text))


def _decoded(value: Any, kind: Any, path: str, faults: list[str]) -> Any:
    """A value of the table as its type wants it; what is at fault comes out as None, and its fault is written down."""
    kind = _chosen(kind, value)
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if isinstance(bare, type) and issubclass(bare, Struct):
        return _struct(value, bare, path, faults)
    if get_origin(bare) is dict and isinstance(value, dict):
        return _mapping(value, bare, path, faults)
    if get_origin(bare) is list and isinstance(value, list) and value:
        item_kind = get_args(bare)[0]
        items = [_decoded(item, item_kind, f"{path}[{index}]", faults) for index, item in enumerate(value)]
        return items if None in items else _leaf(items, kind, path, faults)
    return _leaf(value, kind, path, faults)


def _struct(value: Any, kind: type[Struct], path: str, faults: list[str]) -> Any:
    """A table with fixed keys. Built unchecked: each of its values was checked alone."""
    if not isinstance(value, dict):
        is_text = kind is Secret and isinstance(value, str)
        faults.append(f"{path}: {INSTEAD_OF_TEXT if is_text else 'expected a table'}")
        return None
    hints = get_type_hints(kind, include_extras=True)
    known: dict[str, Any] = {}
    for key, item in value.items():
        if key in hints:
            known[key] = _decoded(item, hints[key], under(path, key), faults)
        else:
            faults.append(f"{under(path, key)}: unknown key{nearest(key, hints)}")
    for item in msgspec.structs.fields(kind):
        if item.required and item.name not in value:
            faults.append(f"{under(path, item.name)}: required, and missing")
            known[item.name] = None
    try:
        return kind(**known)
    except ValueError as error:
        faults.append(f"{path}: {error}")
        return None


def _mapping(table: dict[str, Any], kind: Any, path: str, faults: list[str]) -> dict[str, Any]:
    """A table whose keys are the user's own names."""
    name_kind, item_kind = get_args(kind)
    for name in table:
        _leaf(name, name_kind, under(path, name), faults)
    return {name: _decoded(item, item_kind, under(path, name), faults) for name, item in table.items()}


def _leaf(value: Any, kind: Any, path: str, faults: list[str]) -> Any:
    try:
        value = msgspec.convert(value, kind)
        fault = next(filter(None, (meta.extra["fault"](value) for meta in _metas(kind) if meta.extra)), None)
    except msgspec.ValidationError as error:
        fault = _complaint(str(error), kind)
    if fault is None:
        return value
    faults.append(f"{path}: {fault}")
    return None


def _complaint(message: str, kind: Any) -> str:
    """A sentence of msgspec's in our users' words; the type's own words where it says what was expected."""
    for meta in _metas(kind):
        if meta.description:
            return f"expected {meta.description}"
    words = message.replace("`object`", "a table").replace("`array`", "a list").replace("`", "")
    choices = f", expected {' or '.join(get_args(kind))}" if get_origin(kind) is Literal else ""
    return words[0].lower() + words[1:] + choices


def _metas(kind: Any) -> tuple[Meta, ...]:
    return getattr(kind, "__metadata__", ())


def _chosen(kind: Any, value: Any) -> Any:
    """The one of several types that a value is decoded as. `X | None` is X: TOML has no null, so None only means left out. Of
    a text and a secret it is the secret for a table.
    """
    if get_origin(kind) not in {Union, UnionType}:
        return kind
    parts = [part for part in get_args(kind) if part is not type(None)]
    tables = [part for part in parts if isinstance(part, type) and issubclass(part, Struct)]
    return tables[0] if tables and (isinstance(value, dict) or len(parts) == len(tables)) else parts[0]
