"""Stored prompt templates and params: their validation, their slots, and how a request's variables fill them.

A slot is `{{ name }}` (spaces and tabs trimmed, name `[A-Za-z0-9_]+`) in `system`, in a message's string content, or in
the `text` of a content part; nowhere else. All slots of a text are filled in one pass, so a value is never scanned
again and can't create a slot, a message or a role. A template has at most `MAX_PROMPT_BYTES` of messages and
`MAX_PARAMS_BYTES` of params.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec
import orjson
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.json import Decoder

from meshproxy.errors import Detail, GatewayError, Source, invalid
from meshproxy.openai.errors import detail_of, detail_of_body, validation_error
from meshproxy.openai.request import CAPS, decode_chat
from meshproxy.units import rfc3339

__all__ = ["Template", "TemplateFields", "check_template", "measure", "merge_params", "render", "slots", "to_public"]

GLOBAL_OWNER = "*"  # a global template's owner in responses: Mesh's SDKs require a string
MAX_PROMPT_BYTES = 1_048_576  # of system and messages together, as JSON
MAX_PARAMS_BYTES = 262_144  # room for tools

_SLOT = re.compile(r"\{\{[ \t]*+([A-Za-z0-9_]++)[ \t]*+\}\}")

Message = dict[str, Any]


class Template(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A template's record in the directory.

    `owner` is an account, or None for a global template. `variables` are the names its author declared, with or without
    a slot. Times are Unix seconds.
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

    @property
    def message_count(self) -> int:
        """The number of messages that the template renders."""
        return len(self.messages or ()) + (self.system is not None)


class TemplateFields(Struct, frozen=True, kw_only=True):
    """The fields of a template that a client may write. UNSET: not given; None or empty: cleared."""

    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    system: str | UnsetType | None = UNSET
    messages: list[Message] | UnsetType | None = UNSET
    model: str | UnsetType | None = UNSET
    params: dict[str, Any] | UnsetType = UNSET
    variables: list[str] | UnsetType = UNSET

    def applied_to(self, template: Template) -> Template:
        """Return the template with these fields.

        Raises GatewayError `validation_error` if its prompt is then too large.
        """
        changes = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}
        changed = msgspec.structs.replace(template, **changes)
        details = list(_prompt_errors(changed.system, changed.messages))
        if details:
            raise validation_error(details, "template")
        return changed


def check_template(body: bytes, *, partial: bool) -> TemplateFields:
    """Decode the fields in the body of a POST, or of a PATCH (`partial`), where null clears.

    Raises GatewayError `validation_error` with a detail for every error.
    """
    known: dict[str, Any] = {}
    details: list[Detail] = []
    for name, raw in _members(body).items():
        if name in _IGNORED:
            continue
        decode = _DECODERS.get(name)
        if decode is None:
            details.append(_not_a_field(name))
            continue
        try:
            decode(raw)
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            details.append(_explained(detail_of(error, ("body", name))))
        else:
            known[name] = _EMPTY.get(name) if value is None else value
            details.extend(_field_errors(name, value))
    if not partial:
        details.extend(_missing_fields(known, {detail.loc[1] for detail in details}))
    if details:
        raise validation_error(details, "template")
    return TemplateFields(**known)


def slots(template: Template) -> list[str]:
    """Return the names of a template's slots, each once, in order of appearance."""
    return list(dict.fromkeys(name for text in _texts(template) for name in _SLOT.findall(text)))


def render(template: Template, variables: Mapping[str, str]) -> list[Message]:
    """Return the template's messages, `system` first, with every slot filled. Variables without a slot are ignored.

    Raises GatewayError `validation_error` that names every slot without a variable.
    """
    missing = [name for name in slots(template) if name not in variables]
    if missing:
        raise _missing(template.name, missing)

    def fill(text: str) -> str:
        return _SLOT.sub(lambda slot: variables[slot[1]], text)

    return [_filled(message, fill) for message in _with_system(template)]


def measure(template: Template, variables: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the messages as JSON with unfilled slots, and the bytes by which filling them makes that longer.

    Takes time linear in the template and the variables. Raises GatewayError `validation_error` as `render` does.
    """
    counts = Counter(slot[0] for text in _texts(template) for slot in _SLOT.finditer(text))
    names = {slot: slot.strip("{} \t") for slot in counts}
    missing = [name for name in dict.fromkeys(names.values()) if name not in variables]
    if missing:
        raise _missing(template.name, missing)
    sizes = {name: len(orjson.dumps(variables[name])) for name in set(names.values())}
    longer = sum(count * (sizes[names[slot]] - len(orjson.dumps(slot))) for slot, count in counts.items())
    return orjson.dumps(_with_system(template)), longer


def to_public(template: Template) -> dict[str, Any]:
    """Return a template as `/v1/templates` shows it: times in RFC 3339; `variables` are its slots, then other names."""
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
        "created_at": rfc3339(template.created_at, "milliseconds"),
        "updated_at": rfc3339(template.updated_at, "milliseconds"),
    }


UUID = r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}"


class _Part(Struct):
    type: str


class _Message(Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None


# A name is part of a path: a UUID would be read as an id, and `.` and `..` would be resolved away.
_Name = Annotated[str, Meta(pattern=rf"\A(?!{UUID}\Z|\.\.?\Z)[A-Za-z0-9_.-]{{1,128}}\Z")]
FIELDS: Final[dict[str, Any]] = {
    "name": _Name,
    "description": Annotated[str, Meta(max_length=2048)] | None,
    "system": str | None,
    "messages": list[_Message] | None,
    "model": Annotated[str, Meta(min_length=1, max_length=256)] | None,
    "params": dict[str, Any] | None,
    "variables": Annotated[list[Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_]{1,128}\Z")]], Meta(max_length=256)] | None,
}
_DECODERS: Final = {name: Decoder(kind).decode for name, kind in FIELDS.items()}
_MEMBERS: Final = Decoder(dict[str, Raw])
_EMPTY: Final[dict[str, Any]] = {"params": {}, "variables": []}  # the cleared value, where it isn't None
_IGNORED: Final = frozenset({"team_id"})  # Mesh's, whose teams are accounts here
_NOT_WRITTEN: Final = frozenset({"id", "owner", "is_global", "created_at", "updated_at"})


# What a pattern means, for people.
_PATTERNS: Final = {
    "name": "A name has 1 to 128 of A-Z a-z 0-9 _ . - and is no UUID",
    "variables": "A variable's name has 1 to 128 of A-Z a-z 0-9 _",
}


def _explained(detail: Detail) -> Detail:
    if detail.type != "string_pattern_mismatch":
        return detail
    return Detail(detail.type, detail.loc, _PATTERNS[str(detail.loc[1])])


def _members(body: bytes) -> dict[str, Raw]:
    try:
        body.decode()
        return _MEMBERS.decode(body)
    except UnicodeDecodeError as error:
        detail = Detail("json_invalid", ("body",), f"JSON is not valid UTF-8 (byte {error.start})")
    except (msgspec.DecodeError, RecursionError) as error:
        detail = detail_of_body(error, body)
    raise validation_error([detail], "template")


def _not_a_field(name: str) -> Detail:
    if name in _NOT_WRITTEN:
        return Detail("read_only", ("body", name), "Set by the gateway, and can't be written")
    return Detail("extra_forbidden", ("body", name[:64]), "No such field")


def _field_errors(name: str, value: Any) -> Iterator[Detail]:
    """Yield the errors of a field that its type doesn't exclude."""
    size = _size(value)
    if size is None:
        yield Detail("value_error", ("body", name), "Nested too deeply, or has a number of more than 64 bits")
    elif name == "messages":
        yield from _message_errors(value or ())
    elif name == "params" and value:
        yield from check_params(value, ("body", "params"))
        if size > MAX_PARAMS_BYTES:
            yield Detail("too_long", ("body", "params"), f"More than {MAX_PARAMS_BYTES} bytes of JSON")


def _message_errors(messages: Iterable[Message]) -> Iterator[Detail]:
    for index, message in enumerate(messages):
        parts = message["content"] if isinstance(message["content"], list) else ()
        for at, part in enumerate(parts):
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                yield Detail("string_type", ("body", "messages", index, "content", at, "text"), "Expected str")


def _missing_fields(known: Mapping[str, Any], reported: Collection[str | int]) -> Iterator[Detail]:
    """Yield the errors of a POST that lacks a name, or whose prompt is too large."""
    if "name" not in known and "name" not in reported:
        yield Detail("missing", ("body", "name"), "Field required")
    if not {"system", "messages"} & set(reported):
        yield from _prompt_errors(known.get("system"), known.get("messages"))


def _prompt_errors(system: str | None, messages: list[Message] | None) -> Iterator[Detail]:
    if (_size(system) or 0) + (_size(messages) or 0) > MAX_PROMPT_BYTES:
        yield Detail("too_long", ("body", "messages"), f"More than {MAX_PROMPT_BYTES} bytes of JSON with `system`")


def _size(value: Any) -> int | None:
    """Return the bytes of a value's JSON; None if it can't be encoded at the depth of a reply or a provider's request."""
    try:
        return len(orjson.dumps([[[[value]]]])) - 8
    except TypeError:  # orjson.JSONEncodeError: past 254 levels, or an integer of more than 64 bits
        return None


def _with_system(template: Template) -> list[Message]:
    """Return the template's messages, with `system` first."""
    messages = template.messages or []
    return messages if template.system is None else [{"role": "system", "content": template.system}, *messages]


def _texts(template: Template) -> Iterator[str]:
    """Yield every text that may have slots."""
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


def _missing(template: str, names: list[str]) -> GatewayError:
    listed = ", ".join(f"`{name}`" for name in names)
    details = [Detail("missing", ("body", "variables", name), "Field required") for name in names]
    words = "variable" if len(names) == 1 else "variables"
    return GatewayError(
        Source.CLIENT, invalid(f"The template `{template}` needs the {words} {listed}.", *details, param="variables")
    )


# Params that shape an answer and nothing else. The caller, the prompt, how it is delivered and whether the provider
# keeps it (`user`, `messages`, `model`, `stream`, `store`, `metadata`, ...) is set by the request alone.
ALLOWED: Final = frozenset(
    {
        "audio",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_p",
        "modalities",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "provider",
        "reasoning",
        "reasoning_effort",
        "repetition_penalty",
        "response_format",
        "seed",
        "service_tier",
        "stop",
        "temperature",
        "tool_choice",
        "tools",
        "top_a",
        "top_k",
        "top_logprobs",
        "top_p",
        "verbosity",
    }
)

_NONE: Final[Mapping[str, bytes]] = MappingProxyType({})
_ANY_MESSAGES: Final = [{"role": "user"}]


def check_params(params: Mapping[str, Any], loc: tuple[str, ...]) -> Iterator[Detail]:
    """Yield the errors of stored params at `loc`: names that can't be stored, and values that no request may have."""
    for name in params:
        if name not in ALLOWED:
            yield Detail("extra_forbidden", (*loc, name[:64]), "Not a request parameter that can be stored")
    known = {name: value for name, value in params.items() if name in ALLOWED}
    try:
        decode_chat(msgspec.json.encode({"messages": _ANY_MESSAGES, **known}))
    except GatewayError as error:
        for detail in error.response.details:
            yield Detail(detail.type, (*loc, *detail.loc[1:]), detail.msg)


def merge_params(key: Mapping[str, Any], template: Mapping[str, Any] | None) -> Mapping[str, bytes]:
    """Return the params of a key merged over those of a template, each value as JSON.

    A key's output cap replaces the template's, whatever the two are called.
    """
    if not template:
        return _encoded(key) if key else _NONE
    capped = any(name in key for name in CAPS)
    return _encoded({**{name: value for name, value in template.items() if not (capped and name in CAPS)}, **key})


def _encoded(params: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: msgspec.json.encode(value) for name, value in params.items() if value is not None}
