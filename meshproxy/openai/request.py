"""The chat completion request: types and bounds of its members, its decoding, and the encoding of a provider's body.

The types and bounds are OpenAI's ("Create chat completion", API reference) and ours. Bodies are bounded by bytes and by
the number of elements, since checks of very many elements would stall other requests.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.json import Decoder

from meshproxy.errors import Detail
from meshproxy.openai.errors import detail_of, detail_of_body, validation_error

CHAT_PATH = "/v1/chat/completions"

MAX_NAME_CHARS = 256  # of a model, a template, a user, a session
MAX_MODELS = 32  # fallbacks that one request may name
MAX_TOKENS = 2**31 - 1  # a bound for arithmetic; no model comes near

_Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
_Label = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
_Cap = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class _Object(Struct, gc=False):
    """Any JSON object; its members are skipped."""


class _Message(Struct, gc=False):
    role: str
    content: str | list[_Object] | None = None
    images: Raw | UnsetType = UNSET  # beside the text, as base64 (Ollama, "Generate a chat completion")


class _StreamOptions(Struct, gc=False):
    include_usage: bool | None = None


class LargeMembers(Struct, gc=False):
    """The members that may be large: each is passed on whole, or is a list whose items are skipped."""

    messages: Raw = Raw()
    tools: Raw = Raw()
    functions: Raw = Raw()
    response_format: Raw = Raw()
    prediction: Raw = Raw()


FIELDS: Final[dict[str, Any]] = {
    "best_of": Annotated[int, Meta(ge=1, le=128)],
    "frequency_penalty": _Penalty,
    "max_completion_tokens": _Cap,
    "max_new_tokens": int,
    "max_output_tokens": int,
    "max_tokens": _Cap,
    "messages": list[_Message],
    "model": _Name,
    "models": Annotated[list[_Name], Meta(max_length=MAX_MODELS)],
    "n": Annotated[int, Meta(ge=1, le=128)],
    "n_predict": int,
    "presence_penalty": _Penalty,
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "service_tier": _Label,
    "session_id": _Label,
    "stop": str | list[str],
    "stream": bool,
    "stream_options": _StreamOptions,
    "temperature": Annotated[float, Meta(ge=0, le=2)],
    "template": _Name,
    "timeout": Annotated[float, Meta(gt=0)],
    "tool_choice": Literal["none", "auto", "required"] | _Object,
    "tools": list[_Object],
    "top_p": Annotated[float, Meta(ge=0, le=1)],
    "transforms": list[Literal["middle-out"]],
    "user": _Label,
    "variables": dict[str, str],
}

# Names of the output cap. One effective cap is sent, under one of the first two. The others are read too, because a
# provider that knows one gives it precedence: llama.cpp reads `n_predict` before `max_tokens` (tools/server/README.md),
# Text Generation Inference has `max_new_tokens`, and OpenAI's Responses API `max_output_tokens`. In those a value below
# 1 is no cap (llama.cpp's -1).
CAPS: Final[tuple[str, ...]] = (
    "max_completion_tokens",
    "max_tokens",
    "max_output_tokens",
    "max_new_tokens",
    "n_predict",
)
_CAPS_OF: Final = attrgetter(*CAPS)
# Other spellings of such names, without underscores and in lower case: Ollama's `num_predict`, Gemini's `maxOutputTokens`,
# Anthropic's `max_tokens_to_sample`, Llama's `max_gen_len` (Amazon Bedrock, "Inference parameters"), and what is like them.
_CAP_NAME: Final = re.compile(
    r"(?:max|num|n)(?:new|output|completion|gen|generated|generation|response)?(?:tokens(?:to(?:sample|generate))?|predict)|"
    r"max(?:new|output|completion|gen|generated|generation|response)len(?:gth)?"
)
MAX_CAP_NAME_CHARS = 32
MAX_KNOWN_NAMES = 1024  # of other members, for which it is known whether they are caps

# Members of Mesh's own requests that neither the gateway nor a provider reads (Mesh's SDKs, "chat.completions.create").
UNREAD: Final = frozenset({"async_mode", "cache", "image", "modality"})

# Members that control an answer and aren't part of its prompt.
STEERING: Final = FIELDS.keys() - {"messages", "tools"}

# The allowed values in the error messages of enumerated members.
ALLOWED: Final = {"tool_choice": "none, auto, required or an object", "transforms": "middle-out"}

DECODERS: Final = {name: Decoder(kind | None).decode for name, kind in FIELDS.items()}


# Of variables and everything else that isn't bulk: millions of members would stall every stream for seconds.
MAX_LOOSE_BYTES = 1_048_576
# Opening braces in the messages of a body above MAX_LOOSE_BYTES, those in texts included: 33 MB of empty messages took
# 0.2 s. Eight megabytes of JSON as text, more than a model's two million tokens, have fewer.
MAX_BRACES = 262_144
MAX_TOOLS_BYTES = 4_194_304  # 33 MB of `{}` took half a second, which every stream waited for

# Members that aren't passed on unchanged: Mesh's own fields, and those that are rewritten.
_OWN: Final = frozenset(
    {"template", "variables", "session_id", "timeout", "transforms", "models", "model", "messages", *CAPS}
)
# Members that a key's or template's params can't set: they belong to the request itself, or are Mesh's own.
_RESERVED: Final = _OWN | UNREAD | {"stream", "stream_options"}

_MEMBERS: Final = Decoder(dict[str, Raw])
_COUNT: Final = Decoder(int | None).decode
_NOT_PASSED_ON: Final = _OWN | UNREAD
# The known members of a body, decoded at once. UNSET: absent.
_Known: Final[Any] = msgspec.defstruct(
    "_Known", [(name, kind | None | UnsetType, UNSET) for name, kind in FIELDS.items()], gc=False
)
_KNOWN: Final = Decoder(_Known)
_BULK: Final = Decoder(LargeMembers)
_TEXT: Final = Decoder(str)


class RepeatedRequest(Struct, frozen=True, gc=False):
    """What a repeat needs of its body while it waits for the first request: the client's deadline in seconds, and the form."""

    timeout: Annotated[float, Meta(gt=0)] | None = None
    stream: bool | None = None


_REPEATED = Decoder(RepeatedRequest)


def decode_repeated(body: bytes) -> RepeatedRequest:
    """Return the members of a repeat's body; without them where one is invalid, as the first request is refused then."""
    try:
        return _REPEATED.decode(body)
    except (msgspec.MsgspecError, ValueError):
        return RepeatedRequest()


class ChatRequest(Struct, frozen=True):
    """A valid request.

    - `fields`: every OpenAI or unknown member as its own bytes, in order of arrival, without `model`, `messages`, caps
      and Mesh's own fields. Known members that are null are dropped.
    - `messages`: the array's bytes as they came; None if there are none (then `template` is given and must supply
      them).
    - `text_only`: the content of every message is a string.
    - `max_tokens`: the effective cap of one choice: the smallest given, by whatever name.
    - `timeout_s`: the client's own deadline, in seconds.
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
    timeout_s: float | None = None
    n: int = 1
    models: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()


def decode_chat(body: bytes) -> ChatRequest:
    """Decode a request body. Raises the client's GatewayError, 422, with a detail for every bad field."""
    return request_of(members_of(body), body)


def request_of(members: Mapping[str, Raw], body: bytes) -> ChatRequest:
    """Check the members of a request and build it; the second half of `decode_chat`."""
    try:
        known = _KNOWN.decode(body)
        fields, caps = _passed_on(members, known)
    except (msgspec.DecodeError, RecursionError):
        known = _checked(members)
        fields, caps = _passed_on(members, known)
    messages = known.messages or ()
    if not messages and not known.template:
        known = _checked(members)  # raises
    text_only = True
    for message in messages:
        if type(message.content) is not str or message.images is not UNSET:
            text_only = False
            break
    return ChatRequest(
        fields=fields,
        messages=bytes(members["messages"]) if messages else None,
        message_count=len(messages),
        text_only=text_only,
        model=known.model or None,
        template=known.template or None,
        variables=known.variables or {},
        session_id=None if known.session_id is UNSET else known.session_id,
        service_tier=None if known.service_tier is UNSET else known.service_tier,
        stream=known.stream is True,
        include_usage=bool(known.stream_options) and known.stream_options.include_usage is True,
        max_tokens=_least_cap(caps),
        timeout_s=known.timeout or None,
        n=max(known.n or 1, known.best_of or 1),
        models=tuple(known.models or ()),
        transforms=tuple(known.transforms or ()),
    )


def _passed_on(members: Mapping[str, Raw], known: Any) -> tuple[dict[str, Raw], list[int | None]]:
    """Return the members that are passed on, and every cap on output. Raises a DecodeError for a cap that is no number."""
    fields: dict[str, Raw] = {}
    caps = [*_CAPS_OF(known)]
    for name, raw in members.items():
        if name in _NOT_PASSED_ON:
            continue
        if name in FIELDS:
            if getattr(known, name) is None:
                continue
        elif len(name) <= MAX_CAP_NAME_CHARS and _is_cap(name):
            caps.append(_COUNT(raw))
            continue
        fields[name] = raw
    return fields, caps


def _checked(members: Mapping[str, Raw]) -> Any:
    """Decode the known members one by one. Raises the client's GatewayError, 422, with a detail for every bad member.

    A body of which they are all good may still have been refused as a whole: for an earlier value of a repeated name.
    """
    known: dict[str, Any] = {}
    details: list[Detail] = []
    for name, raw in members.items():
        try:
            if name in DECODERS:
                known[name] = DECODERS[name](raw)
            elif len(name) <= MAX_CAP_NAME_CHARS and _is_cap(name):
                _COUNT(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            details.extend(_member_errors(name, raw, error))
    if not known.get("messages") and known.get("template") is None:
        details.extend(_missing_messages(details))
    if details:
        raise validation_error(details, "request")
    return _Known(**known)


def with_params(request: ChatRequest, params: Mapping[str, bytes]) -> ChatRequest:
    """Return the request with the params of a key or template (name to JSON bytes) in the fields that it lacks.

    `n` and `max_tokens` then match what the provider is sent. Raises the client's GatewayError, 422, for an invalid
    param.
    """
    known: dict[str, Any] = {}
    details: list[Detail] = []
    fields = dict(request.fields)
    for name, value in params.items():
        is_cap = name in CAPS and request.max_tokens is None
        if value == b"null" or name in fields or (name in _RESERVED and not is_cap):
            continue
        if not is_cap:
            fields[name] = Raw(value)
        try:
            known[name] = DECODERS[name](value) if name in DECODERS else None
        except (msgspec.DecodeError, RecursionError) as error:
            details.append(detail_of(error, ("params", name)))
    if details:
        raise validation_error(details, "request")
    cap = request.max_tokens or _least_cap([known.get(name) for name in CAPS])
    tier = known.get("service_tier") or request.service_tier
    return msgspec.structs.replace(
        request, fields=fields, n=max(known.get("n") or 1, request.n), max_tokens=cap, service_tier=tier
    )


def encode_upstream(
    request: ChatRequest,
    *,
    model: str,
    messages: bytes,
    max_tokens: int | None = None,
    cap_field: str = CAPS[0],
    stream_usage: bool = True,
    native: bool = False,
    models: Sequence[str] = (),
) -> bytes:
    """Build the provider's request body: `model`, `messages` unchanged, and the request's fields.

    The cap is sent once, under `cap_field`: `max_tokens`, or if that is None the request's own. A stream asks for its
    usage, unless `stream_usage` is off because the provider refuses `stream_options`. `native`: the provider knows
    `transforms` (OpenRouter). `models`: the fallbacks that the provider walks, by its own names.
    """
    body: dict[str, Any] = {"model": model, "messages": Raw(messages), **request.fields}
    if not stream_usage:
        body.pop("stream_options", None)
    elif request.stream and not request.include_usage:
        body["stream_options"] = _asking_for_usage(request.fields.get("stream_options"))
    cap = max_tokens or request.max_tokens
    if cap is not None:
        body[cap_field] = cap
    if models:
        body["models"] = models
    if native and request.transforms:
        body["transforms"] = request.transforms
    return msgspec.json.encode(body)


def members_of(body: bytes) -> dict[str, Raw]:
    """Return the members of a JSON object as their own bytes; a repeated name's last value wins.

    The grammar is checked to the end, escapes included. UTF-8 isn't checked where a value stays raw: hence the decode
    of a body that isn't plain ASCII.
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
        detail = detail_of_body(error, body)
    raise validation_error([detail], "request")


def _too_long(body: bytes) -> Detail | None:
    """Return the error of a large body whose members have too many elements to check in time; None if there is none."""
    bulk = _BULK.decode(body)
    sizes = [memoryview(raw).nbytes for raw in msgspec.structs.astuple(bulk)]
    if memoryview(bulk.tools).nbytes > MAX_TOOLS_BYTES:
        return Detail("too_long", ("body", "tools"), f"Tools must fit into {MAX_TOOLS_BYTES} bytes")
    if bytes(bulk.messages).count(b"{") > MAX_BRACES:
        return Detail("too_long", ("body", "messages"), f"Messages must have at most {MAX_BRACES} opening braces")
    if len(body) - sum(sizes) > MAX_LOOSE_BYTES:
        message = f"All but {', '.join(LargeMembers.__struct_fields__)} must fit into {MAX_LOOSE_BYTES} bytes"
        return Detail("too_long", ("body",), message)
    return None


def _least_cap(caps: Iterable[int | UnsetType | None]) -> int | None:
    """Return the smallest cap; None if there is none. A value below 1 is no cap."""
    least: int | None = None
    for cap in caps:
        if cap and cap >= 1 and (least is None or cap < least):
            least = cap
    return None if least is None else min(least, MAX_TOKENS)


@lru_cache(MAX_KNOWN_NAMES)
def _is_cap(name: str) -> bool:
    """Return whether a member that FIELDS doesn't have is named as a cap on output. For names of bounded length."""
    return _CAP_NAME.fullmatch(name.replace("_", "").lower()) is not None


def _asking_for_usage(options: Raw | None) -> Raw:
    """Return `stream_options` with `include_usage` set."""
    members = {} if options is None else _MEMBERS.decode(options)
    return Raw(msgspec.json.encode(members | {"include_usage": Raw(b"true")}))


def _member_errors(name: str, raw: Raw, error: Exception) -> Iterator[Detail]:
    """Yield the details of a member that can't be decoded."""
    if name == "variables" and isinstance(error, msgspec.ValidationError):
        yield from _variable_errors(raw, error)
        return
    detail = detail_of(error, ("body", name))
    if detail.type == "literal_error":
        detail = Detail(detail.type, detail.loc, f"{detail.msg}: expected {ALLOWED[name]}")
    yield detail


def _variable_errors(raw: Raw, error: msgspec.ValidationError) -> Iterator[Detail]:
    """Yield a detail for each bad variable: the decoder of a dict doesn't name the bad member."""
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
