"""Decode a request, or refuse it as OpenAI does; and make JSON values that fit a JSON Schema.

Values are for structured output and for the arguments of tools. Supported: type (also a list of types), enum, const,
properties, required, items, prefixItems, anyOf, oneOf, allOf, $ref within the document ($defs, definitions, "#"), the
usual bounds, and common formats. Not supported: pattern, not, if/then/else, patternProperties; for a schema that
depends on them the value may not fit.
"""

from collections.abc import Iterator, Mapping
from math import floor, inf, isinf
from random import Random
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from meshproxy.openai.errors import detail_of, field_path

MAX_DEPTH = 6  # deeper values have only required members
MAX_VALUES = 2_000  # a bound on a value's size; beyond it only required members
HARD_DEPTH = 40  # a schema that requires itself has no finite value; null ends it
HARD_VALUES = 20_000  # a bound on memory, for long arrays of long arrays

FORMATS = {
    "date": "2025-03-14",
    "date-time": "2025-03-14T15:09:26Z",
    "time": "15:09:26Z",
    "duration": "P3D",
    "email": "ada@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "9b2f7c1e-4d3a-4b6e-8f10-2a5c6d7e8f90",
}
WORDS = ("Paris", "a pear tree", "the old harbour", "nine bridges")

Schema = Mapping[str, Any]


def value_for(schema: Schema, rng: Random) -> Any:
    """Return a value for the schema. Raises `ValueError` if it isn't a schema."""
    try:
        return _Sampler(schema, rng).value(schema, 0)
    except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not a JSON Schema: {error}") from error


class _Sampler:
    def __init__(self, root: Schema, rng: Random) -> None:
        self._root = root
        self._rng = rng
        self._made = 0

    def value(self, schema: Any, depth: int) -> Any:
        self._made += 1
        if not isinstance(schema, Mapping) or depth > HARD_DEPTH or self._made > HARD_VALUES:
            return None
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self._rng.choice(schema["enum"])
        match self._type(schema):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return self._string(schema)
            case "integer":
                return int(self._number(schema, step=1))
            case "number":
                return self._number(schema, step=None)
            case "boolean":
                return self._rng.random() < 0.5
            case _:
                return None

    def _only_required(self, depth: int) -> bool:
        return depth > MAX_DEPTH or self._made > MAX_VALUES

    def _resolved(self, schema: Schema) -> Schema:
        """Follow references, merge allOf, and choose a branch of anyOf and oneOf."""
        for _ in range(HARD_DEPTH):
            if isinstance(schema.get("$ref"), str):
                schema = _without(schema, "$ref") | self._referred(schema["$ref"])
            elif schema.get("allOf"):
                schema = self._merged(schema)
            elif branches := schema.get("anyOf") or schema.get("oneOf"):
                schema = _without(schema, "anyOf", "oneOf") | dict(self._rng.choice(branches))
            else:
                break
        return schema

    def _referred(self, reference: str) -> dict[str, Any]:
        schema: Any = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            step = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(step) if isinstance(schema, Mapping) else None
        return dict(schema) if isinstance(schema, Mapping) else {"type": "null"}

    def _merged(self, schema: Schema) -> dict[str, Any]:
        merged = _without(schema, "allOf")
        for part in map(self._resolved, schema["allOf"]):
            properties = {**merged.get("properties", {}), **part.get("properties", {})}
            required = [*merged.get("required", []), *part.get("required", [])]
            merged |= {**part, "properties": properties, "required": required}
        return merged

    def _type(self, schema: Schema) -> Any:
        named = schema.get("type")
        if isinstance(named, list) and named:
            return self._rng.choice(named)
        if named is None:
            return "object" if "properties" in schema else "array" if "items" in schema else "string"
        return named

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = schema.get("required", [])
        properties = schema.get("properties", {})
        if not all(isinstance(name, str) for name in required):
            raise TypeError("required is not a list of strings")
        if not isinstance(properties, Mapping):
            raise TypeError("properties is not an object")
        names = [name for name in properties if name in required or not self._only_required(depth)]
        made = {name: self.value(properties[name], depth + 1) for name in names}
        return made | {name: "" for name in required if name not in made}

    def _array(self, schema: Schema, depth: int) -> list[Any]:
        least = int(schema.get("minItems", 0))
        count = least if self._only_required(depth) else min(max(least, 2), int(schema.get("maxItems", MAX_VALUES)))
        made = [self.value(item, depth + 1) for item in schema.get("prefixItems", [])]
        items = schema.get("items", {"type": "string"})
        while len(made) < min(count, MAX_VALUES) and items is not False:
            made.append(self.value(items, depth + 1))
        return made

    def _number(self, schema: Schema, *, step: float | None) -> float:
        low, high = schema.get("minimum", -inf), schema.get("maximum", inf)
        above, below = schema.get("exclusiveMinimum", -inf), schema.get("exclusiveMaximum", inf)
        least, most = max(low, above), min(high, below)
        value: float = self._rng.randint(1, 40)
        if not least < value < most:
            value = most - 1 if isinf(least) else least + 1 if isinf(most) else (least + most) / 2
        step = schema.get("multipleOf", step)
        if step is None:
            return value
        multiples = [(floor(value / step) + more) * step for more in (0, 1)]
        return next(
            (multiple for multiple in multiples if low <= multiple <= high and above < multiple < below), multiples[0]
        )

    def _string(self, schema: Schema) -> str:
        if schema.get("format") in FORMATS:
            return FORMATS[schema["format"]]
        least, most = int(schema.get("minLength", 0)), int(schema.get("maxLength", MAX_VALUES))
        return self._rng.choice(WORDS).ljust(min(least, MAX_VALUES), ".")[:most]


def _without(schema: Schema, *names: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in names}


class Refusal(Exception):
    """An error answer: its status, the four members of OpenAI's error object, and the wait if there is one."""

    def __init__(
        self,
        status: int,
        message: Any,
        *,
        type: str | None = "invalid_request_error",  # noqa: A002 - the member's name on the wire
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = [] if retry_after_s is None else [("retry-after", f"{retry_after_s:g}")]
        self.error: dict[str, Any] = {"message": message, "type": type, "param": param, "code": code}
        self.more: dict[str, Any] = {}  # members of the error that only some providers have

    def body(self) -> bytes:
        """Return the JSON that OpenAI sends."""
        return msgspec.json.encode({"error": self.error})


def requested_error(status: int, retry_after_s: float) -> Refusal:
    """Return the answer of `sim/error-STATUS`."""
    message, kind, code = _ERRORS.get(status, _SERVER_ERROR if status >= 500 else _CLIENT_ERROR)
    return Refusal(status, message, type=kind, code=code, retry_after_s=retry_after_s if status in _RETRIABLE else None)


_RETRIABLE = frozenset({429, 503, 529})
_CLIENT_ERROR = ("The simulated provider refuses this request, as requested.", "invalid_request_error", None)
_SERVER_ERROR = ("The server had an error while processing your request. Sorry about that!", "server_error", None)
_QUOTA = "You exceeded your current quota, please check your plan and billing details."
_ERRORS: dict[int, tuple[str, str, str | None]] = {
    401: ("Incorrect API key provided: sk-s****fake.", "invalid_request_error", "invalid_api_key"),
    402: (_QUOTA, "insufficient_quota", "insufficient_quota"),
    403: ("Country, region, or territory not supported.", "request_forbidden", "unsupported_country_region_territory"),
    404: ("The model does not exist or you do not have access to it.", "invalid_request_error", "model_not_found"),
    408: ("Timed out reading the request.", "invalid_request_error", "request_timeout"),
    409: ("The resource was updated by another process.", "conflict_error", "conflict"),
    422: ("Unprocessable entity.", "invalid_request_error", "unprocessable_entity"),
    429: ("Rate limit reached for requests per min (RPM).", "requests", "rate_limit_exceeded"),
    503: ("That model is currently overloaded with other requests.", "server_error", "service_unavailable"),
    529: ("Overloaded.", "overloaded_error", "overloaded"),
}


MESH_FIELDS = ("template", "variables", "session_id", "transforms", "models")
OPENROUTER_FIELDS = ("session_id", "transforms", "models")

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Cap = Annotated[int, Meta(ge=1, le=2**53)]


class Message(Struct, frozen=True):
    """One message. `content`: text, or parts of which some have a `text`."""

    role: Literal["system", "assistant", "user", "function", "tool", "developer"]
    content: str | list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """Return the content, or its text parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content or () if isinstance(part.get("text"), str))


class Function(Struct, frozen=True):
    """The function of a tool, or the one that `tool_choice` names. `parameters`: a JSON Schema."""

    name: str
    parameters: dict[str, Any] | None = None


class Tool(Struct, frozen=True):
    """A tool. Kinds that the simulator never calls have no `function`."""

    type: str = ""
    function: Function | None = None


class ToolChoice(Struct, frozen=True):
    """The one tool that must be called."""

    function: Function


class JsonSchema(Struct, frozen=True):
    """The schema of a structured answer."""

    name: str
    schema: dict[str, Any] | None = None


class ResponseFormat(Struct, frozen=True):
    """The format of the answer: text or JSON."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StreamOptions(Struct, frozen=True):
    """Whether a stream reports its usage."""

    include_usage: bool | None = None


class CompletionRequest(Struct, frozen=True, kw_only=True):
    """A chat completion request.

    `models`: OpenRouter's fallbacks, after `model`. `given`: the names of all fields of the request. Some fields are
    checked but have no effect.
    """

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    models: list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    max_tokens: Cap | None = None
    max_completion_tokens: Cap | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] = []
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat()
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1
    frequency_penalty: Penalty = 0
    presence_penalty: Penalty = 0
    transforms: list[str] = []
    user: str = ""
    given: frozenset[str] = frozenset()

    @property
    def include_usage(self) -> bool:
        """Return whether a chunk of its own reports the usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    def cap(self, names: tuple[str, ...]) -> int | None:
        """Return the cap under the first of these names that is present."""
        caps = {"max_completion_tokens": self.max_completion_tokens, "max_tokens": self.max_tokens}
        return next((caps[name] for name in names if caps[name] is not None), None)

    @property
    def last_user_text(self) -> str:
        """Return the text of the last user message, else of the last message."""
        users = [message for message in self.messages if message.role == "user"]
        return (users or self.messages)[-1].text

    @property
    def prompt_tokens(self) -> int:
        """Return for each message a quarter of the UTF-8 bytes of its text, rounded up, plus 3."""
        return sum(-(-len(message.text.encode()) // 4) + 3 for message in self.messages)


def decode_request(body: bytes, *, openrouter: bool) -> CompletionRequest:
    """Decode a request. Raises `Refusal` (400) for what OpenAI would refuse."""
    fields = _members(body)
    for name in MESH_FIELDS:
        if name in fields and not (openrouter and name in OPENROUTER_FIELDS):
            raise Refusal(400, f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    if fields.get("model") is None:
        raise Refusal(400, "you must provide a model parameter")
    try:
        given_fields = {name: value for name, value in fields.items() if value is not None}
        request = msgspec.convert({**given_fields, "given": frozenset(fields)}, CompletionRequest)
    except msgspec.ValidationError as error:
        raise _refusal_of(error) from None
    for refusal in _contradictory_fields(request):
        raise refusal
    return request


def _members(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        message = "We could not parse the JSON body of your request. The OpenAI API expects a JSON payload."
        raise Refusal(400, message) from None


_CODES = {
    "missing": "missing_required_parameter",
    "literal_error": "invalid_value",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "less_than_equal": "{kind}_above_max_value",
    "greater_than_equal": "{kind}_below_min_value",
}


def _refusal_of(error: msgspec.ValidationError) -> Refusal:
    """Return OpenAI's error for a field that a type refuses."""
    detail = detail_of(error, ("body",))
    kind = "integer" if detail.msg.startswith("Expected int ") else "decimal"
    code = _CODES.get(detail.type, "invalid_type").format(kind=kind)
    return Refusal(400, f"Invalid '{field_path(detail)}': {detail.msg}.", param=field_path(detail), code=code)


def _contradictory_fields(request: CompletionRequest) -> Iterator[Refusal]:
    """Yield refusals of fields that need, or exclude, another field."""
    for index, message in enumerate(request.messages):
        place = f"messages[{index}]"
        if message.content is None and message.role != "assistant":
            yield _missing(f"{place}.content", "invalid_type")
        if message.role == "tool" and message.tool_call_id is None:
            yield _missing(f"{place}.tool_call_id", "missing_required_parameter")
    for index, tool in enumerate(request.tools):
        if tool.type == "function" and tool.function is None:
            yield _missing(f"tools[{index}].function", "invalid_type")
    if request.response_format.type == "json_schema" and request.response_format.json_schema is None:
        yield _missing("response_format.json_schema", "invalid_type")
    if request.stream_options is not None and not request.stream:
        yield Refusal(400, "'stream_options' is only allowed when 'stream' is enabled.", param="stream_options")
    if request.tool_choice is not None and not request.tools:
        yield Refusal(400, "'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        both = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
        yield Refusal(400, both, param="max_tokens", code="invalid_parameter_combination")


def _missing(param: str, code: str) -> Refusal:
    return Refusal(400, f"Missing required parameter: '{param}'.", param=param, code=code)
