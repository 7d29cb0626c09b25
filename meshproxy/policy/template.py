"""Stored prompt templates: their slots, and how a request's variables fill them.

A slot is `{{ name }}` (spaces and tabs trimmed, name `[A-Za-z0-9_]+`) in `system`, in a message's string content, or in the
`text` of a content part; nowhere else. All slots of a text are filled in one pass, so a value is never scanned again and
can't create a slot, a message or a role.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from meshproxy.errors import Detail, Fault, Source, invalid

GLOBAL_OWNER = "*"  # how a global template's owner reads at the edge: Mesh's SDKs want a string there

_SLOT = re.compile(r"\{\{[ \t]*+([A-Za-z0-9_]++)[ \t]*+\}\}")

Message = dict[str, Any]


class Template(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A template's record in the directory. `owner` is an account, or None for a global one; `variables` are the names its
    author declared, slots or not; times are Unix seconds.
    """

    id: str
    name: str
    created_at: float
    updated_at: float
    owner: str | None = None
    is_global: bool = False
    description: str | None = None
    system: str | None = None
    messages: list[Message] | None = None
    model: str | None = None
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    variables: list[str] = msgspec.field(default_factory=list)


def slots(template: Template) -> list[str]:
    """The names of a template's slots, each once, in order of appearance."""
    return list(dict.fromkeys(name for text in _texts(template) for name in _SLOT.findall(text)))


def render(template: Template, variables: Mapping[str, str]) -> list[Message]:
    """The template's messages, `system` first, with every slot filled; variables that no slot asks for are ignored.

    Fault `validation_error` naming every slot that has no variable.
    """
    missing = [name for name in slots(template) if name not in variables]
    if missing:
        raise _missing(template.name, missing)

    def fill(text: str) -> str:
        return _SLOT.sub(lambda slot: variables[slot[1]], text)

    rendered: list[Message] = [] if template.system is None else [{"role": "system", "content": fill(template.system)}]
    rendered += [_filled(message, fill) for message in template.messages or ()]
    return rendered


def to_public(template: Template) -> dict[str, Any]:
    """A template as `/v1/templates` shows it: times in RFC 3339, `variables` its slots and then what else was declared."""
    return {
        "id": template.id,
        "name": template.name,
        "owner": template.owner or GLOBAL_OWNER,
        "is_global": template.is_global,
        "description": template.description,
        "system": template.system,
        "messages": template.messages,
        "model": template.model,
        "params": template.params,
        "variables": list(dict.fromkeys([*slots(template), *template.variables])),
        "created_at": _rfc3339(template.created_at),
        "updated_at": _rfc3339(template.updated_at),
    }


def _texts(template: Template) -> Iterator[str]:
    """Every text that may have slots."""
    if template.system is not None:
        yield template.system
    for message in template.messages or ():
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from _part_texts(content)


def _part_texts(parts: Iterable[Any]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


def _filled(message: Message, fill: Callable[[str], str]) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": fill(content)}
    if isinstance(content, list):
        return {**message, "content": [_filled_part(part, fill) for part in content]}
    return message


def _filled_part(part: Any, fill: Callable[[str], str]) -> Any:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return {**part, "text": fill(part["text"])}
    return part


def _missing(template: str, names: list[str]) -> Fault:
    listed = ", ".join(f"`{name}`" for name in names)
    details = [Detail("missing", ("body", "variables", name), "Field required") for name in names]
    words = "variable" if len(names) == 1 else "variables"
    return Fault(
        Source.CLIENT, invalid(f"The template `{template}` needs the {words} {listed}.", *details, param="variables")
    )


def _rfc3339(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
