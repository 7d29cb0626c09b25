"""A chat completion request: the client's bytes to a typed request, and a typed request to the provider's bytes.

The body is decoded once, into its members' own bytes; then each member that the gateway depends on is checked alone, so that
a client hears of everything that is wrong at once. What the gateway doesn't know it passes on untouched, and `messages` and
`tools` are never taken apart: they go out as the bytes they came in.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw
from msgspec.json import Decoder

from meshproxy.errors import Detail, Fault, Source, invalid
from meshproxy.value import Value
from meshproxy.wire.details import detail_of, name_of
from meshproxy.wire.fields import ALLOWED, DECODERS, MAX_NAME_CHARS, Bulk

MAX_DETAILS = 32  # complaints shown to a client
# Of variables and what else isn't bulk: millions of members would stall every stream for seconds.
MAX_LOOSE_BYTES = 1_048_576
# Of messages in a body above MAX_LOOSE_BYTES, in their text too: 33 MB of empty messages took 0.2 s. Eight megabytes of JSON as
# text, more than a model's two million tokens, have fewer.
MAX_BRACES = 262_144
MAX_TOOLS_BYTES = 4_194_304  # 33 MB of `{}` took half a second, which every stream waited for

# Two names of one thing, the one that counts first.
CAPS: Final[tuple[str, ...]] = ("max_completion_tokens", "max_tokens")

# Members that a key's or template's params can't set: the request's own shape, and Mesh's own fields.
_OWN: Final = frozenset({"template", "variables", "session_id", "transforms", "models", "model", "messages"})
_RESERVED: Final = _OWN | {"stream", "stream_options"}

_MEMBERS: Final = Decoder(dict[str, Raw])
_BULK: Final = Decoder(Bulk)
_TEXT: Final = Decoder(str)


class ChatRequest(Value, frozen=True):
    """A request that is sound as far as its bytes can tell.

    `fields` has every OpenAI and unknown member as its own bytes, in order of arrival, without `model`, `messages` and Mesh's
    own; known members that are null are dropped. `messages` is the array's bytes as they came, None when there are none (then
    `template` is given and must supply them); `text_only`: every content is a string. `max_tokens` is what counts:
    `max_completion_tokens`, else `max_tokens`.
    """

    fields: dict[str, Raw]
    messages: bytes | None
    message_count: int
    text_only: bool
    variables: dict[str, str]
    model: str | None = None
    template: str | None = None
    session_id: str | None = None
    service_tier: str | None = None
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    n: int = 1
    models: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()


def decode_chat(body: bytes) -> ChatRequest:
    """The request in a body. Fault of the client, 422, with a detail for every bad field, for anything else."""
    return check_members(members_of(body))


def check_members(members: Mapping[str, Raw]) -> ChatRequest:
    """The request that these members make; see `decode_chat`, whose second half this is."""
    fields: dict[str, Raw] = {}
    known: dict[str, Any] = {}
    details: list[Detail] = []
    for name, raw in members.items():
        decode = DECODERS.get(name)
        if decode is None:
            fields[name] = raw
            continue
        try:
            value = decode(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            details.extend(_complaints(name, raw, error))
            continue
        if value is not None:
            known[name] = value
            if name not in _OWN:
                fields[name] = raw
            elif name == "messages":
                known["messages_raw"] = raw
    if not known.get("messages") and "template" not in known:
        details.extend(_missing_messages(details))
    if details:
        raise _unfit(details)
    return _request(fields, known)


def with_params(request: ChatRequest, params: Mapping[str, bytes]) -> ChatRequest:
    """The request with the params (name to JSON bytes) of a key or template in the fields that it lacks, so that `n` and
    `max_tokens` are what the provider will be asked for. Fault of the client, 422, for a param that isn't right.
    """
    known: dict[str, Any] = {}
    details: list[Detail] = []
    fields = _filled(request.fields, params)
    for name in (fields.keys() - request.fields.keys()) & DECODERS.keys():
        try:
            known[name] = DECODERS[name](fields[name])
        except (msgspec.DecodeError, RecursionError) as error:
            details.append(detail_of(error, ("params", name)))
    if details:
        raise _unfit(details)
    cap = known.get(CAPS[0]) or known.get(CAPS[1]) or request.max_tokens
    tier = known.get("service_tier") or request.service_tier
    return msgspec.structs.replace(
        request, fields=fields, n=known.get("n") or request.n, max_tokens=cap, service_tier=tier
    )


def encode_upstream(
    request: ChatRequest,
    *,
    model: str,
    messages: bytes,
    max_tokens: int | None = None,
    cap_field: str = CAPS[0],
    native: bool = False,
    models: Sequence[str] = (),
) -> bytes:
    """The provider's request body: `model`, `messages` as they are, and the request's fields.

    A stream always asks for its usage. `max_tokens` is put under every name that the request used for its cap, else under
    `cap_field`. `native`: the provider knows `transforms` (OpenRouter). `models`: the fallbacks that it is to walk, in its own
    names.
    """
    fields = dict(request.fields)
    if request.stream and not request.include_usage:
        fields["stream_options"] = _asking_for_usage(fields.get("stream_options"))
    if max_tokens is not None:
        cap = Raw(b"%d" % max_tokens)
        fields |= dict.fromkeys([name for name in CAPS if name in fields] or [cap_field], cap)
    body: dict[str, Any] = {"model": model, "messages": Raw(messages), **fields}
    if models:
        body["models"] = models
    if native and request.transforms:
        body["transforms"] = request.transforms
    return msgspec.json.encode(body)


def members_of(body: bytes) -> dict[str, Raw]:
    """The members of a JSON object as their own bytes; of two with one name the last wins. The grammar is checked to the
    end, escapes included, but UTF-8 isn't where a value stays raw: hence the decode, for a body that isn't plain ASCII.
    """
    try:
        if not body.isascii():
            body.decode()
        detail = _too_long(body) if len(body) > MAX_LOOSE_BYTES else None
        if detail is None:
            return _MEMBERS.decode(body)
    except UnicodeDecodeError as error:
        detail = Detail("json_invalid", ("body",), f"JSON is not valid UTF-8 (byte {error.start})")
    except (msgspec.DecodeError, RecursionError) as error:
        detail = detail_of(error, ("body",))
    raise _unfit([detail])


def _too_long(body: bytes) -> Detail | None:
    """What is too large in a large body, of the members whose checks take time by their number of elements."""
    bulk = _BULK.decode(body)
    sizes = [memoryview(raw).nbytes for raw in msgspec.structs.astuple(bulk)]
    if memoryview(bulk.tools).nbytes > MAX_TOOLS_BYTES:
        return Detail("too_long", ("body", "tools"), f"Tools must fit into {MAX_TOOLS_BYTES} bytes")
    if bytes(bulk.messages).count(b"{") > MAX_BRACES:
        return Detail("too_long", ("body", "messages"), f"Messages must have at most {MAX_BRACES} opening braces")
    if len(body) - sum(sizes) > MAX_LOOSE_BYTES:
        message = f"All but {', '.join(Bulk.__struct_fields__)} must fit into {MAX_LOOSE_BYTES} bytes"
        return Detail("too_long", ("body",), message)
    return None


def _request(fields: dict[str, Raw], known: dict[str, Any]) -> ChatRequest:
    options = known.get("stream_options")
    messages = known.get("messages")
    return ChatRequest(
        fields=fields,
        messages=bytes(known["messages_raw"]) if messages else None,
        message_count=len(messages or ()),
        text_only=all(type(message.content) is str for message in messages or ()),
        model=known.get("model"),
        template=known.get("template"),
        variables=known.get("variables") or {},
        session_id=known.get("session_id"),
        service_tier=known.get("service_tier"),
        stream=known.get("stream", False),
        include_usage=options is not None and options.include_usage is True,
        max_tokens=known.get(CAPS[0]) or known.get(CAPS[1]),
        n=known.get("n", 1),
        models=tuple(known.get("models", ())),
        transforms=tuple(known.get("transforms", ())),
    )


def _filled(fields: Mapping[str, Raw], params: Mapping[str, bytes]) -> dict[str, Raw]:
    filled = dict(fields)
    capped = any(name in fields for name in CAPS)
    for name, value in params.items():
        taken = name in fields or name in _RESERVED or (capped and name in CAPS)
        if not taken and value != b"null":
            filled[name] = Raw(value)
    return filled


def _asking_for_usage(options: Raw | None) -> Raw:
    members = {} if options is None else _MEMBERS.decode(options)
    return Raw(msgspec.json.encode(members | {"include_usage": Raw(b"true")}))


def _complaints(name: str, raw: Raw, error: Exception) -> Iterator[Detail]:
    if name == "variables" and isinstance(error, msgspec.ValidationError):
        yield from _bad_variables(raw, error)
        return
    detail = detail_of(error, ("body", name))
    if detail.type == "literal_error":
        detail = Detail(detail.type, detail.loc, f"{detail.msg}: expected {ALLOWED[name]}")
    yield detail


def _bad_variables(raw: Raw, error: msgspec.ValidationError) -> Iterator[Detail]:
    """A detail for each: a decoder of a dict doesn't tell which member is wrong."""
    try:
        members = _MEMBERS.decode(raw)
    except msgspec.ValidationError:
        yield detail_of(error, ("body", "variables"))
        return
    for name, value in members.items():
        try:
            _TEXT.decode(value)
        except msgspec.ValidationError as wrong:
            yield detail_of(wrong, ("body", "variables", name[:MAX_NAME_CHARS]))


def _missing_messages(details: list[Detail]) -> Iterator[Detail]:
    if not any(detail.loc[1] in {"messages", "template"} for detail in details):
        yield Detail("missing", ("body", "messages"), "Field required: give messages, or a template that has some")


def _unfit(details: list[Detail]) -> Fault:
    first, *others = details
    where = name_of(first)
    more = f" (and {len(others)} more)" if others else ""
    message = f"Invalid request: {where + ': ' if where else ''}{first.msg}{more}"
    return Fault(Source.CLIENT, invalid(message, *details[:MAX_DETAILS], param=where or None))
